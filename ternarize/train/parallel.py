"""A training by several processes, each with all of the model: what they tell each other.

The micro-batches of a step go round: the first to the first process, and so on. After each round
every process has one gradient, and gets from the others, of its share of the weights, theirs, which
it adds up in the order of the micro-batches; after the last round each gives to all what it has
added up. So sums are ((g0 + g1) + g2) + ..., those that autograd makes in one process, whatever the
number of processes. Of W trained weights, N processes and k rounds, each sends

    4 W (N - 1) / N bytes for each of its micro-batches, at most k, and as many at the end.

It goes through NCCL where each process has a GPU of its own, else through gloo and the memory of
the processors. Before each round words are told, so that a process that has ended is missed there
and not within a kernel of a GPU.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.files.headers import byte_view
from ternarize.ranks import TRAINING_WAIT, World, gpu_of, silence_ends

_Words = TypeVar("_Words")

AT_ONCE = 1 << 22  # weights whose gradients are exchanged at a time
_FIRST_WEIGHTS = 1024  # of a parameter, by which models are told apart


class _Span(NamedTuple):
    """Weights first..last of the at-th parameter, in the order in which they lie."""

    at: int
    first: int
    last: int


class Exchange(NamedTuple):
    """What gradients go through, and where they lie for it."""

    group: Any
    place: torch.device


class Gradients:
    """The gradients of parameters, summed over the micro-batches of all processes.

    In one process autograd has summed them already, and there is nothing to do. Those of blocks
    that are divided FSDP2 adds up, as means over the processes.

    exchange  of several processes
    divided   whether some of the parameters are
    """

    def __init__(
        self, world: World, parameters: Mapping[str, Tensor], exchange: Exchange | None = None
    ) -> None:
        self.parameters = [p for p in parameters.values() if not hasattr(p, "full_tensor")]
        self.parts = [p for p in parameters.values() if hasattr(p, "full_tensor")]
        self.divided = bool(self.parts)
        self.world = world
        self.sums: list[Tensor] = []  # of each piece, this process's share
        self.found = [False] * len(self.parameters)  # which have a gradient at all
        if world.size > 1:
            self.pieces = list(_pieces([p.numel() for p in self.parameters]))
            assert exchange is not None
            self.group, self.place = exchange

    def add(self, own: _Words) -> list[_Words]:
        """Add what a round has left in the parameters, in the order of the processes, and take it
        away there. A process without a micro-batch has no gradient, and gives none.

        own  what to tell the others beside

        Returns what each has told.
        """
        if self.world.size == 1:
            return [own]
        has = [p.grad is not None for p in self.parameters]
        told = self.world.all((own, has))
        givers = [rank for rank, (_, theirs) in enumerate(told) if any(theirs)]
        for rank in givers:
            self.found = [a or b for a, b in zip(self.found, told[rank][1], strict=True)]
        for number, piece in enumerate(self.pieces):
            for share in self._shares(piece, givers):
                if number == len(self.sums):
                    self.sums.append(share.clone())
                else:
                    self.sums[number] += share
        for parameter in self.parameters:
            parameter.grad = None
        return [words for words, _ in told]

    def take(self) -> None:
        """Give the parameters, in all processes, the gradients that have been added up."""
        for part in self.parts:
            if part.grad is not None:
                part.grad.mul_(self.world.size)  # of divided blocks there are means, not sums
        if self.world.size == 1 or not self.sums:
            return
        for piece, own in zip(self.pieces, self.sums, strict=True):
            whole = own.new_empty(len(own) * self.world.size)
            with self.world.others_gone():
                dist.all_gather(list(whole.chunk(self.world.size)), own, group=self.group)
            self.world.sent["gradients"] += own.nbytes * (self.world.size - 1)
            at = 0
            for span in piece:
                parameter, count = self.parameters[span.at], span.last - span.first
                if self.found[span.at]:
                    if parameter.grad is None:
                        parameter.grad = torch.empty_like(
                            parameter, memory_format=torch.contiguous_format
                        )
                    given = whole[at : at + count]
                    parameter.grad.view(-1)[span.first : span.last] = given
                at += count
        self.sums, self.found = [], [False] * len(self.parameters)

    def check_same(self, step: int) -> None:
        """Raise CheckpointError in all processes where one has come to have other weights."""
        if self.world.size == 1:
            return
        # sums of bit patterns do not depend on the order in which they are taken
        sums = [int(p.detach().view(torch.int32).sum()) for p in self.parameters]
        self.world.check_same(
            sums,
            f"has other weights after step {step}",
            "Use processors of one kind, with the same versions and number of threads; the same "
            "command goes on from the last state",
        )

    def _share(self, piece: Sequence[_Span]) -> int:
        """Weights of a piece that a process adds up; some at the end are none."""
        count = sum(span.last - span.first for span in piece)
        return -(-count // self.world.size)

    def _shares(self, piece: Sequence[_Span], givers: Sequence[int]) -> Tensor:
        """The gradients of this process's share of a piece: (givers, weights) float32."""
        each, size = self._share(piece), self.world.size
        own = torch.zeros(each * size if self.world.rank in givers else 0, device=self.place)
        at = 0
        for span in piece if len(own) else ():
            grad, count = self.parameters[span.at].grad, span.last - span.first
            if grad is not None:
                own[at : at + count] = grad.reshape(-1)[span.first : span.last]
            at += count
        found = own.new_empty(each * len(givers))
        get = [each if rank in givers else 0 for rank in range(size)]
        with self.world.others_gone():
            dist.all_to_all_single(found, own, get, [len(own) // size] * size, group=self.group)
        self.world.sent["gradients"] += own.nbytes // size * (size - 1)
        return found.view(len(givers), each)


def _pieces(sizes: Sequence[int]) -> Iterator[list[_Span]]:
    """All weights in pieces of AT_ONCE, the last one of what is left."""
    piece: list[_Span] = []
    room = AT_ONCE
    for at, size in enumerate(sizes):
        first = 0
        while first < size:
            last = min(size, first + room)
            piece.append(_Span(at, first, last))
            room -= last - first
            first = last
            if not room:
                yield piece
                piece, room = [], AT_ONCE
    if piece:
        yield piece


def exchange_of(world: World, device: str) -> Exchange | None:
    """NCCL where each process has a GPU of its own, else gloo; None of one process."""
    if world.size == 1:
        return None
    places = world.all(gpu_of(device))
    alone = None not in places and len(set(places)) == world.size
    backend = "nccl" if alone and dist.is_nccl_available() else "gloo"
    with world.others_gone(), silence_ends():
        group = dist.new_group(backend=backend, timeout=TRAINING_WAIT)
    return Exchange(group, torch.device(device if backend == "nccl" else "cpu"))


def check_alike(world: World, models: Sequence[Any], computed_in: torch.dtype) -> None:
    """Raise UsageError, in all processes, where one has other models, by their first weights."""
    if world.size == 1:
        return
    sha = hashlib.sha256(f"{computed_in} {torch.get_num_threads()}".encode())
    for model in models:
        for name, parameter in model.named_parameters():
            sha.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            first = parameter.detach().reshape(-1)[:_FIRST_WEIGHTS].cpu()
            sha.update(byte_view(first).numpy().tobytes())
    told = world.all(sha.hexdigest())
    others = [rank for rank, each in enumerate(told) if each != told[0]]
    if others:
        raise UsageError(
            f"rank {others[0]}",
            "has another teacher or start, computes in another dtype or with other threads than "
            "rank 0",
            "the same in all",
            "Give all the same files, on processors of one kind",
        )
