"""Several processes that write one journal: what they tell each other, and how much that is.

Each has a share of the data and all values. They exchange how the loss changes along perturbations,
or their votes on them in trits, and the losses of candidates; the first one's record is what all
apply, so that no rounding can drive them apart, and digests are compared.
"""

import datetime

import torch
import torch.distributed as dist
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError
from ternarize.ranks import others_gone
from ternarize.trits.base3 import pack, unpack

SILENCE = datetime.timedelta(minutes=30)  # of a process that works
EXCHANGES = ("alignments", "votes")
_REMEDY = "Start all again: the journal goes on behind its last record"


class Ranks:
    """The processes of a run; without torch.distributed there is one.

    exchange  "alignments": means of float32; "votes": sums of trits
    sent      bytes that this process has given to the others
    """

    def __init__(self, exchange: str = EXCHANGES[0]) -> None:
        if exchange not in EXCHANGES:
            raise UsageError("exchange", f"{exchange!r}", f"one of {', '.join(EXCHANGES)}")
        several = dist.is_available() and dist.is_initialized()
        self.exchange, self.sent = exchange, 0
        self.rank = dist.get_rank() if several else 0
        self.count = dist.get_world_size() if several else 1

    def agreed(self, changes: Tensor) -> Tensor:
        """What all say of perturbations: (k, 2), how the loss changes along them and against."""
        if self.count == 1:
            return changes
        if self.exchange == "alignments":
            return self._mean(changes.to(torch.float32)).to(changes.dtype)
        falls, side = changes.min(1)
        strong = falls <= falls.median()
        trits = torch.where(strong & (falls < 0), 1 - 2 * side, 0).to(torch.int8)
        own = pack(trits[None], -1)
        each = [torch.empty_like(own) for _ in range(self.count)]
        with others_gone(_REMEDY):
            dist.all_gather(each, own)
        self.sent += own.numel()
        votes = sum(unpack(one, len(trits), -1)[0].to(changes.dtype) for one in each)
        assert isinstance(votes, Tensor)
        return torch.stack([-votes, votes], 1)

    def mean(self, value: float) -> float:
        """The mean of a number over all."""
        if self.count == 1:
            return value
        return float(self._mean(torch.tensor([value], dtype=torch.float64)))

    def _mean(self, values: Tensor) -> Tensor:
        with others_gone(_REMEDY):
            dist.all_reduce(values)
        self.sent += values.numel() * values.element_size()
        return values / self.count

    def firsts(self, data: bytes) -> bytes:
        """The bytes that the first process gives, at all of them."""
        if self.count == 1:
            return data
        size = torch.tensor([len(data)])
        with others_gone(_REMEDY):
            dist.broadcast(size, 0)
            body = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).clone()
            if self.rank:
                body = torch.empty(max(1, int(size)), dtype=torch.uint8)
            dist.broadcast(body, 0)
        if not self.rank:
            self.sent += 8 + int(size)
        return body.numpy().tobytes()[: int(size)]

    def check_same(self, number: int, digest: str) -> None:
        """Raise CheckpointError where a process has other values than the first."""
        told = self.firsts(digest.encode()).decode()
        differ = self.mean(float(told != digest))
        if differ:
            raise CheckpointError(
                f"attempt {number}",
                f"{round(differ * self.count)} of {self.count} processes have other values",
                "the same in all",
                "Start again: the journal is as the first process has it",
            )
