"""The two streams of every batch: the source model, and the model as it will be."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ternarize.calibrate.blocks import Batch, Call, Forward, map_tensors

FLOAT, PACKED = 0, 1  # the streams
KINDS_OF_SAMPLES = ("train", "held", "report")


@dataclass
class Lane:
    """The two forwards of one batch, and what they wait with (a Call, or the final output).

    index  of the batch among all of its kind, also those that other processes have
    """

    kind: str
    index: int
    batch: Batch
    forwards: tuple[Forward, Forward]
    waiting: list[Any] = field(default_factory=list)

    @property
    def mask(self) -> Tensor | None:
        """Which tokens count in the block at which it waits; None: all.

        Those of a decoder count where a block is given states of two lengths, its own and the
        encoder's: only there what is as long as the mask is known to be the decoder's.
        """
        mask = mask_of(self.batch)
        decoded = self.batch.get("decoder_input_ids")
        if decoded is not None and len(_lengths(self.waiting[PACKED], len(decoded))) < 2:
            return None
        return mask

    def tokens(self, output: Any) -> Tensor:
        """The hidden states that a block gives, (tokens, n), without padding."""
        return tokens_of(hidden_of(output), self.mask)


def mask_of(batch: Batch) -> Tensor | None:
    """Which tokens of a model's output count; of an encoder-decoder those of the decoder."""
    side = "decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask"
    return batch.get(side)


def _lengths(call: Call, batch: int) -> set[int]:
    """Lengths of the hidden states, (batch, length, n), that a block is called with."""
    found: set[int] = set()

    def look(t: Tensor) -> Tensor:
        if t.ndim == 3 and len(t) == batch and t.is_floating_point():
            found.add(t.shape[1])
        return t

    map_tensors((call.args, call.kwargs), look)
    return found


def tokens_of(values: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length, n) -> (tokens, n) without padding."""
    if mask is not None and values.shape[:-1] in (mask.shape, (mask.numel(),)):
        return values[mask.reshape(values.shape[:-1]).bool().to(values.device)]
    return values.reshape(-1, values.shape[-1])


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block gives, alone or first of several."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def takes(call: Call, hidden: Tensor) -> bool:
    """Whether a block is called with just these hidden states."""
    found = []
    map_tensors((call.args, call.kwargs), lambda t: found.append(t is hidden) or t)  # type: ignore[func-returns-value]
    return any(found)


def with_hidden(call: Call, old: Tensor, new: Tensor) -> Call:
    """The call with other hidden states."""
    args, kwargs = map_tensors((call.args, call.kwargs), lambda t: new if t is old else t)
    return Call(call.block, args, kwargs)
