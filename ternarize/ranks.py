"""Several processes at one piece of work: how they find each other, and tell each other things.

torch.distributed carries what is exchanged; the processes trust each other.
"""

import datetime
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ternarize.errors import RankError, TernarizeError, UsageError, first_line

_Any = TypeVar("_Any")

_AT_ONCE = 1 << 22  # elements that are received at a time, to be added
_START = datetime.timedelta(minutes=10)  # for a process that begins
_WAIT = datetime.timedelta(days=1)  # for one that solves a large matrix
_FAULT = "ternarize/fault"


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
        with others_gone("Run the same command again: it goes on from what is done"):
            try:
                yield
            except RuntimeError:
                said = self._fault()
                if said is not None:
                    where, found, expected, remedy = said
                    raise RankError(where, found, expected, remedy) from None
                raise

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


@contextmanager
def others_gone(remedy: str) -> Iterator[None]:
    """Inside, another process that has died is a RankError."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            "another process",
            f"is gone ({str(error).splitlines()[0]:.100})",
            "all of them to the end",
            remedy,
        ) from error


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
        store, rank, size = next(rendezvous("env://", timeout=_START))
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


def _bytes_of(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
