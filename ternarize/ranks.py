"""Several processes at one piece of work: how they find each other, and tell each other things.

torch.distributed carries what is exchanged; the processes trust each other.
"""

import datetime
import os
import pickle
import re
import socket
import stat
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ternarize.errors import CheckpointError, RankError, TernarizeError, UsageError, first_line

_Any = TypeVar("_Any")

_AT_ONCE = 1 << 22  # elements that are received at a time, to be added
_START = datetime.timedelta(minutes=10)  # for a process that begins
_WAIT = datetime.timedelta(days=1)  # for one that solves a large matrix
TRAINING_WAIT = datetime.timedelta(minutes=30)  # for one that trains
SILENT = 300  # seconds after which a machine that answers nothing is gone
_FAULT = "fault"
_AGAIN = 0.05  # seconds between looks at a store
_PLACE = r"^\[\S+:\d+\] "  # in the source of gloo


class World:
    """The processes of a run; without arguments there is one.

    rank, size  of this process, and how many there are, all of them in torch's default group
    sent        bytes that this process has given to the others, by what they were
    store       where a process that fails says why
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self.sent: Counter[str] = Counter()

    def firsts(self, value: _Any, kind: str = "words") -> _Any:
        """What the first process gives, at all of them."""
        return value if self.size == 1 else self._told_by(0, value, kind)

    def all(self, value: _Any, kind: str = "words") -> list[_Any]:
        """What each process gives, in their order, at all of them."""
        if self.size == 1:
            return [value]
        return [self._told_by(rank, value, kind) for rank in range(self.size)]

    def gather(self, tensor: Tensor, kind: str) -> list[Tensor]:
        """The tensors of one form that each gives, on the CPU, in their order, at all of them."""
        if self.size == 1:
            return [tensor]
        each = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.others_gone():
            dist.all_gather(each, tensor)
        self.sent[kind] += tensor.nbytes * (self.size - 1)
        return each

    def check_same(self, value: object, found: str, remedy: str) -> None:
        """Raise CheckpointError in all processes where one has another value than the first."""
        told = self.all(value)
        others = [rank for rank, each in enumerate(told) if each != told[0]]
        if others:
            where = f"rank {others[0]}"
            raise CheckpointError(where, f"{found} than rank 0", "the same in all", remedy)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Inside, nothing is exchanged; an error that one process finds there all of them raise."""
        own: TernarizeError | None = None
        try:
            yield
        except TernarizeError as error:
            if self.size == 1:
                raise
            own = error
        first = next((each for each in self.all(own) if each is not None), None)
        if first is not None:
            raise own or first

    def send(self, tensor: Tensor, to: int, kind: str) -> None:
        """Give a tensor to another process, which asks for it by `receive` or `add_received`."""
        self.sent[kind] += tensor.nbytes
        flat = tensor.reshape(-1)
        for first in range(0, len(flat), _AT_ONCE):
            own = flat[first : first + _AT_ONCE].cpu()
            with self.others_gone():
                dist.send(own, to)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, giver: int) -> Tensor:
        """A tensor that another process gives, on the CPU."""
        found = torch.empty(tuple(shape), dtype=dtype)
        flat = found.view(-1)
        for first in range(0, len(flat), _AT_ONCE):
            with self.others_gone():
                dist.recv(flat[first : first + _AT_ONCE], giver)
        return found

    def add_received(self, total: Tensor, giver: int) -> None:
        """Add to a contiguous tensor, in place, one of its shape that another process gives."""
        flat = total.view(-1)
        for first in range(0, len(flat), _AT_ONCE):
            some = flat[first : first + _AT_ONCE]
            some += self.receive([len(some)], some.dtype, giver).to(some.device)

    def send_all(self, words: Any, tensors: Sequence[Tensor], to: int, kind: str) -> None:
        """Give words and tensors to another process, which asks for them by `receive_all`."""
        shapes = [(tuple(t.shape), t.dtype) for t in tensors]
        body = _bytes_of((words, shapes))
        with self.others_gone():
            dist.send(torch.tensor([len(body)]), to)
            dist.send(body, to)
        self.sent["words"] += 8 + len(body)
        for tensor in tensors:
            self.send(tensor, to, kind)

    def receive_all(self, giver: int) -> tuple[Any, list[Tensor]]:
        """Words and tensors, on the CPU, that another process gives."""
        size = torch.empty(1, dtype=torch.int64)
        with self.others_gone():
            dist.recv(size, giver)
            body = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(body, giver)
        words, shapes = pickle.loads(body.numpy().tobytes())
        return words, [self.receive(shape, dtype, giver) for shape, dtype in shapes]

    def _told_by(self, rank: int, value: Any, kind: str) -> Any:
        body = _bytes_of(value) if rank == self.rank else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(body)])
        with self.others_gone():
            dist.broadcast(size, rank)
            if rank != self.rank:
                body = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(body, rank)
        if rank == self.rank:
            self.sent[kind] += (8 + len(body)) * (self.size - 1)
            return value
        return pickle.loads(body.numpy().tobytes())

    @contextmanager
    def others_gone(self) -> Iterator[None]:
        """Inside, another process that has ended is a RankError, with its reason."""
        try:
            yield
        except RuntimeError as error:
            said = self._fault()
            if said is not None:
                where, found, expected, remedy = said
                raise RankError(where, found, expected, remedy) from None
            raise RankError(
                "another process",
                f"is gone ({re.sub(_PLACE, '', first_line(error)):.100})",
                "all of them to the end",
                "Run the same command again: it goes on from what is done",
            ) from error

    def tell_fault(self, error: Exception) -> None:
        """Leave word of why this process ends, for the first one."""
        parts = ("where", "found", "expected", "remedy")
        said = tuple(getattr(error, part, "") for part in parts)
        if not isinstance(error, TernarizeError):
            name, remedy = type(error).__name__, "Mend it, then run the same command again"
            said = (f"rank {self.rank}", f"failed ({name}: {first_line(error)})", "", remedy)
        try:
            if self._store is not None and self._fault() is None:
                self._store.set(_FAULT, pickle.dumps(said))
        except RuntimeError:
            return  # the store is gone with its owner: nobody is left to be told

    def _fault(self) -> Any:
        try:
            if self._store is not None and self._store.check([_FAULT]):
                return pickle.loads(self._store.get(_FAULT))
        except RuntimeError:
            return None  # the store is gone with its owner: what is known stays
        return None


def ranks_launched() -> int:
    """How many processes torchrun, or what sets the same variables, has started."""
    named = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and dist.is_available()
    return int(os.environ.get("WORLD_SIZE", "1")) if named else 1


@contextmanager
def ranks_of_launcher(wait: datetime.timedelta = _WAIT) -> Iterator[World]:
    """Inside, the processes of torchrun know each other; without it there is one.

    Each has the GPU of its number on the machine as its own. Where the caller has made torch's
    default group, its processes are those, and it stays.

    wait  for the others, before they count as gone
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if ranks_launched() == 1:
        yield World()
        return
    from torch.distributed.rendezvous import rendezvous

    try:
        with silence_ends():
            given, rank, size = next(rendezvous("env://", timeout=_START))
            store = own_part(given, rank, size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            "torchrun",
            f"{ranks_launched()} processes do not find each other ({first_line(error)})",
            "all of them at MASTER_ADDR and MASTER_PORT",
            "Look after the launcher",
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    world = World(rank, size, store)
    try:
        yield world
    except Exception as error:
        world.tell_fault(error)
        raise
    finally:
        dist.destroy_process_group()


def own_part(store: Any, rank: int, size: int, wait: datetime.timedelta = _START) -> Any:
    """A part of a launcher's store that no other start of the processes has: torchrun keeps its
    store, with all that was said in it, when it starts them again (--max-restarts).

    Each process leaves a word of its own; the first answers each with the name of the part, until
    all of them have been there.

    Raises RuntimeError where one does not come.
    """
    made: Any = dist.PrefixStore  # type: ignore[attr-defined]
    own = uuid.uuid4().hex
    if rank:
        store.set(f"ternarize/{rank}", own)
        part = made(store.get(f"ternarize/{own}").decode(), store)
        part.set(f"came/{rank}", "")
        return part
    part = made(own, store)
    missing, answered, end = set(range(1, size)), set(), time.monotonic() + wait.total_seconds()
    while missing:
        for other in (each for each in missing if store.check([f"ternarize/{each}"])):
            word = store.get(f"ternarize/{other}").decode()
            if word not in answered:  # it may be one of an earlier start, which nobody waits for
                store.set(f"ternarize/{word}", own)
                answered.add(word)
        missing = {each for each in missing if not part.check([f"came/{each}"])}
        if time.monotonic() > end:
            raise RuntimeError(f"rank {min(missing)} has not come within {wait}")
        time.sleep(_AGAIN if missing else 0)
    return part


@contextmanager
def silence_ends() -> Iterator[None]:
    """TCP connections that are made inside break when the other end's machine has answered nothing
    for SILENT seconds: one that vanishes closes none of its own.

    It is the systems that answer, also for processes that are at work for hours.
    """
    before = _sockets()
    yield
    options = {
        "TCP_KEEPIDLE": SILENT // 2,
        "TCP_KEEPALIVE": SILENT // 2,  # the same on macOS
        "TCP_KEEPINTVL": max(1, SILENT // 10),
        "TCP_KEEPCNT": 5,
        "TCP_USER_TIMEOUT": 1000 * SILENT,  # where something is on its way
    }
    for number in _sockets() - before:
        # what is closed meanwhile, or has no such options, stays as it is
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as found:
            inet = found.family in (socket.AF_INET, socket.AF_INET6)
            if inet and found.type == socket.SOCK_STREAM:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name in (each for each in options if hasattr(socket, each)):
                    found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), options[name])


def _sockets() -> set[int]:
    """The open files of this process that are sockets, where the system lists them."""
    found = set()
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        with suppress(OSError):  # the listing itself was one of them
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
    return found


def gpu_of(device: str) -> str | None:
    """The UUID of a GPU, of the current one without a number; None for other devices.

    Numbers are a process's own: a launcher may show each another GPU as its first.
    """
    place = torch.device(device)
    if place.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(place)
    return str(properties.uuid)


def check_gpus(world: World, device: str) -> None:
    """Raise UsageError, in all processes, where several would use one GPU.

    By its number, or since nothing gives each its own: with a LOCAL_RANK they may share one.
    """
    given = ":" not in device and "LOCAL_RANK" in os.environ
    told = world.all((None if given else gpu_of(device), device))
    gpus = [gpu for gpu, _ in told]
    for gpu, name in told:
        if gpu is not None and gpus.count(gpu) > 1:
            raise UsageError(
                "--device",
                f"{name} for {gpus.count(gpu)} processes is one GPU ({gpu})",
                "a GPU for each",
                "Use --device cuda, with a LOCAL_RANK for each, as torchrun sets it",
            )


def _bytes_of(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
