"""What all exports have in common: reading the packed checkpoint, what is lost.

An engine stores a matrix in groups of its own, with scales of its own type. A packed tensor is
*carried* if the engine's groups can hold its trits and scales as they are. What cannot be carried
is refused before anything is written, or, where the user allows it, ternarized again from the dense
weight, and measured:

    relative error = sum (w' - w)^2 / sum w^2        w: as packed, w': as exported
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import CheckpointError
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.sources.packed import open_packed
from ternarize.trits.base3 import BASE3
from ternarize.trits.methods import itf
from ternarize.trits.scales import to_float
from ternarize.trits.ternary import Ternary, group_length


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint that is about to be exported, with every digest checked."""

    checkpoint: Checkpoint
    records: dict[str, Record]

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def config(self) -> dict[str, Any]:
        assert self.checkpoint.config is not None
        return self.checkpoint.config

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype (as safetensors names it) and logical shape of a tensor."""
        found = self.checkpoint.tensors[name]
        return found.dtype, self.records[name].shape or found.shape

    def kept(self, name: str) -> Tensor:
        """A kept tensor, as it is stored."""
        return self.checkpoint.read(name).view(self.checkpoint.tensors[name].shape)

    def stored(self, name: str) -> tuple[Tensor, Tensor]:
        """The packed bytes of a tensor and its scales."""
        return self.kept(name), self.kept(name + SCALE_SUFFIX)

    def planes(self, name: str) -> tuple[Ternary, ...]:
        """The ternary matrices whose sum is the weight (of a rotated tensor: the rotated one)."""
        return container.decode_planes(*self.stored(name), self.records[name])

    def dense(self, name: str) -> Tensor:
        """The float32 weight of a packed tensor, (rows, cols) or (experts, rows, cols)."""
        return container.dequantize(*self.stored(name), self.records[name])


def open_verified(model: str | Path) -> PackedCheckpoint:
    """Open a packed checkpoint and check every byte of it; raises as `verify` does."""
    checkpoint, records = open_packed(model)
    container.check_data(checkpoint, records)
    return PackedCheckpoint(checkpoint, records)


def model_config(packed: PackedCheckpoint) -> Any:
    """The configuration as transformers reads it, without running code of the checkpoint."""
    from ternarize.models.configuration import open_config  # imports transformers

    return open_config(packed.directory)


def common_scales(ternary: Ternary, block: int) -> Tensor | None:
    """The scale of each block of `block` weights along a row, where one scale can serve the block.

    block  divides cols; may be cols

    Returns (..., rows, cols / block) float64, 0 for a block of zero trits; None if trits other than
    zero with different scales meet in a block.
    """
    cols = ternary.trits.shape[-1]
    length = group_length(cols, ternary.group_size)
    unit = math.gcd(length, block)  # no group and no block ends within a unit
    scales = ternary.scales.repeat_interleave(length // unit, -1)[..., : cols // unit]
    wide = unit % 8 == 0  # eight trits at a time
    words = ternary.trits.contiguous().view(torch.int64) if wide else ternary.trits
    used = torch.unflatten(words, -1, (-1, unit // 8 if wide else unit)).ne(0).any(-1)
    scales = torch.where(used, scales, 0.0)
    scales = torch.unflatten(scales, -1, (cols // block, block // unit))
    largest = scales.amax(-1)
    same = (scales == 0) | (scales == largest.unsqueeze(-1))
    return largest if bool(same.all()) else None


def carry(
    packed: PackedCheckpoint, name: str, group_size: int, dtype: torch.dtype
) -> tuple[Ternary | None, str]:
    """A ternary tensor in groups of `group_size`, with scales that `dtype` holds.

    Returns it and what is lost: ("" and exactly the weight), or the weight with rounded scales, or
    None where trits would have to change.
    """
    record = packed.records[name]
    assert record.shape is not None and record.codec == BASE3
    cols = record.shape[-1]
    block = group_size if group_size > 0 else cols
    if cols % block:
        return None, f"{cols} columns, no multiple of {block},"
    if record.rotation[0]:
        return None, "rotated inputs"
    if record.planes > 1:
        return None, f"{record.planes} planes"
    (plane,) = packed.planes(name)
    scales = common_scales(plane, block)
    if scales is not None and group_size == 0:
        top = scales.amax((-2, -1), keepdim=True)
        scales = top if bool(((scales == 0) | (scales == top)).all()) else None
    if scales is None:
        names = {-1: "a scale for each row", 0: "one scale"}
        have = names.get(record.group_size, f"groups of {record.group_size}")
        what = names.get(group_size, f"one scale for {block} weights")
        return None, f"{have}, where the target has {what},"
    rounded = to_float(scales, dtype).to(torch.float64)
    lost = "" if torch.equal(rounded, scales) else unheld(dtype)
    return Ternary(plane.trits, rounded, group_size), lost


def unheld(dtype: torch.dtype) -> str:
    """What `carry` says of scales that a dtype rounds."""
    return f"scales that {str(dtype)[6:]} does not hold"


def carry_or_refit(
    packed: PackedCheckpoint, name: str, group_size: int, dtype: torch.dtype
) -> Ternary:
    """What `carry` gives, or the dense weight ternarized again by `itf`, whatever is lost."""
    carried, _ = carry(packed, name, group_size, dtype)
    return refit(packed.dense(name), group_size, dtype) if carried is None else carried


def refit(dense: Tensor, group_size: int, dtype: torch.dtype) -> Ternary:
    """A dense weight ternarized again, with scales that `dtype` holds."""
    again = itf(dense, group_size)
    scales = to_float(again.scales, dtype).to(torch.float64)
    return Ternary(again.trits, scales, group_size)


def largest_group(
    packed: PackedCheckpoint,
    names: Sequence[str],
    groups: Sequence[int],
    dtype: torch.dtype,
    losses: "Losses",
) -> int:
    """The largest group that holds every tensor exactly, else the smallest, and what it loses.

    groups  sizes to choose from, the largest first; the smallest divides the columns of all
    """
    for group in groups:
        if all(packed.info(name)[1][-1] % group == 0 for name in names):
            lost = [carry(packed, name, group, dtype)[1] for name in names]
            if group == groups[-1] or not any(lost):
                break
    for name, reason in zip(names, lost, strict=True):
        losses.add(reason, name)
    return group


@dataclass
class Losses:
    """What an export cannot carry, and what it costs where that is allowed.

    target   the engine or format, in words
    allowed  whether the user accepts losses
    reasons  what is lost -> the tensors
    general  what is lost of the model as a whole, in words
    errors   tensor -> (squared error, energy), of all that were written and differ
    """

    target: str
    allowed: bool
    reasons: dict[str, list[str]] = field(default_factory=dict)
    general: list[str] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        if reason:
            self.reasons.setdefault(reason, []).append(name)

    def stop_unless_allowed(self, packed: PackedCheckpoint, advice: str) -> None:
        """Raise CheckpointError if something would be lost and the user has not allowed it."""
        if self.allowed or not (self.reasons or self.general):
            return
        what = self.general + [
            f"{reason} in {len(names)} tensors ({names[0]}{', ...' if len(names) > 1 else ''})"
            for reason, names in self.reasons.items()
        ]
        raise CheckpointError(
            packed.directory,
            f"{'; '.join(what)}; {self.target} cannot carry this",
            remedy=f"{advice} --allow-requantize exports the nearest, and says what it costs",
        )

    def measure(self, name: str, before: Tensor, after: Tensor) -> None:
        """Note how far an exported weight is from the packed one; nothing if they are equal."""
        difference = after.to(torch.float64) - before.to(torch.float64)
        squared = float(difference.square().sum())
        if squared:
            self.errors[name] = squared, float(before.to(torch.float64).square().sum())

    def report(self) -> dict[str, Any]:
        """Relative errors by kind of tensor, and the worst tensor of each kind."""
        kinds: dict[str, dict[str, tuple[float, float]]] = {}
        for name, pair in self.errors.items():
            kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), {})[name] = pair
        rows = []
        for kind, members in kinds.items():
            ratios = {n: squared / max(energy, 1e-300) for n, (squared, energy) in members.items()}
            worst = max(ratios, key=lambda n: ratios[n])
            squared, energy = (sum(column) for column in zip(*members.values(), strict=True))
            rows.append(
                {
                    "tensors": kind,
                    "count": len(members),
                    "relative_error": squared / max(energy, 1e-300),
                    "worst": worst,
                    "worst_relative_error": ratios[worst],
                }
            )
        lost = {reason: len(names) for reason, names in self.reasons.items()}
        return {
            "exact": not (self.errors or self.general),
            "lost": [*self.general, *lost],
            "errors": rows,
        }
