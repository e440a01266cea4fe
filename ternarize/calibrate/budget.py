"""Mixed precision: which matrices get more bits, and which get fewer, within a budget.

What a matrix is worth is measured. On held-out samples, in the float model, each matrix alone is
ternarized without data in each form that it may take (groups of 256, 128, 64 or 32 weights, or two
planes), and the block's output compared with what it was:

    harm(matrix, form) = sum |y' - y|^2 / sum |y|^2      over the tokens of the block's output

Relative errors of block outputs add up along the residual stream, so the sum of all harms is what
is to be small while the sum of all bits stays within the budget. Where tensors are stored by their
frequencies there are more forms, with shares of zeros that calibration keeps (dead_zone.py); their
bits are those that streams of such trits are expected to take.

Starting from the smallest form of each matrix, the step with the most harm saved per bit is taken
for as long as it fits; steps that are not on the lower convex hull of (bits, harm) are never taken
(Shoham and Gersho, bit allocation for an arbitrary set of quantizers:
https://doi.org/10.1109/29.90373).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ternarize.calibrate.blocks import Batch, Blocks, Call
from ternarize.calibrate.dead_zone import nearest
from ternarize.errors import CheckpointError, UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import byte_view
from ternarize.plans.layout import TensorPlan
from ternarize.progress import Progress
from ternarize.ranks import World
from ternarize.trits.planes import join_planes
from ternarize.trits.rans import classes_of_items, encode_rows, expected_bytes
from ternarize.trits.scales import store_scales
from ternarize.trits.ternary import Ternary

GROUP_SIZES = (256, 128, 64, 32)
USUAL_ZEROS = 0.36  # share that a calibration leaves where none is asked for, about, at least
ZEROS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SAMPLES = 4  # batches on which harm is measured


@dataclass(frozen=True)
class Offer:
    """One form of a parameter: the plans of the tensors that load into it, their bits, its harm."""

    plans: tuple[TensorPlan, ...]
    bits: int
    harm: float


def allocate(
    source: Checkpoint,
    tensors: Sequence[TensorPlan],
    batches: Sequence[Batch],
    target_bpw: float,
    *,
    coded: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    world: World | None = None,
) -> list[TensorPlan]:
    """Plans of the tensors with other groups, planes and zeros, at most `target_bpw` on average.

    batches     arguments of the model's forward; the first SAMPLES of them are used
    target_bpw  stored bits, scales and padding included, per ternary weight
    coded       whether they are stored by their frequencies: bits are then what is expected of
                shares of zeros, and of the scales that `nearest` gives
    progress    called after each block, in the stage "measuring sensitivity"
    world       processes each of which calls this, and measures its share of the matrices

    Returns a plan for each of `tensors`, in their order; those that are not ternary are unchanged.
    Raises UsageError if not even the smallest forms are within the target, CheckpointError for a
    model that cannot be run block by block.
    """
    measured = _measure(source, tensors, batches, coded, device, progress, world or World())
    total = sum(plan.info.numel for choices in measured for plan in choices[0].plans)
    taken, least = _spend([_hull(choices) for choices in measured], int(target_bpw * total))
    if least > target_bpw * total:
        raise UsageError(
            "target bpw",
            f"{target_bpw}; this model takes at least {least / max(1, total):.4f} bits per "
            "ternary weight",
            remedy=f"Ask for that much, or use --scale-bits 8{'' if coded else ' or --codec rans'}",
        )
    chosen = {plan.name: plan for choice in taken for plan in choice.plans}
    return [chosen.get(t.name, t) for t in tensors]


def _spend(hulls: Sequence[Sequence[Offer]], budget: int) -> tuple[list[Offer], int]:
    """The choice of each hull; and the bits of the smallest choices."""
    at = [0] * len(hulls)
    least = bits = sum(hull[0].bits for hull in hulls)
    while True:
        steps = []
        for index, hull in enumerate(hulls):
            if at[index] + 1 < len(hull):
                now, then = hull[at[index]], hull[at[index] + 1]
                if bits + then.bits - now.bits <= budget:
                    gain = (now.harm - then.harm) / (then.bits - now.bits)
                    steps.append((gain, -index))
        if not steps:
            return [hull[i] for hull, i in zip(hulls, at, strict=True)], least
        index = -max(steps)[1]
        bits += hulls[index][at[index] + 1].bits - hulls[index][at[index]].bits
        at[index] += 1


def _hull(choices: Sequence[Offer]) -> list[Offer]:
    """The lower convex hull of (bits, harm), from the fewest bits to the least harm."""
    hull: list[Offer] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.harm)):
        if hull and choice.harm >= hull[-1].harm:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            if (a.harm - b.harm) * (choice.bits - b.bits) > (b.harm - choice.harm) * (
                b.bits - a.bits
            ):
                break
            hull.pop()
        hull.append(choice)
    return hull


def _measure(
    source: Checkpoint,
    tensors: Sequence[TensorPlan],
    batches: Sequence[Batch],
    coded: bool,
    device: str,
    progress: Progress | None,
    world: World,
) -> list[list[Offer]]:
    """The forms of every parameter, with their harms."""
    blocks = Blocks(source, [t.name for t in tensors if t.ternary], device)
    by_parameter: dict[str, list[TensorPlan]] = {}
    for t in tensors:
        for parameter in blocks.places[t.name].parameters if t.ternary else ():
            by_parameter.setdefault(parameter, []).append(t)
    forwards = [blocks.start(batch) for batch in batches[:SAMPLES]]
    found: dict[int, list[Offer]] = {}  # by the number of the parameter: those of this process
    count = 0
    seen: set[str] = set()
    formed: set[str] = set()  # names of tensors
    try:
        calls = [forward.resume() for forward in forwards]
        while len(seen) < len(blocks.paths):
            if not all(isinstance(c, Call) and c.block == calls[0].block for c in calls):
                raise CheckpointError(
                    source.directory,
                    "its forward does not come to all of its blocks",
                    "that it does",
                    "Convert it without --target-bpw",
                )
            path = calls[0].block
            with blocks.loaded(path) as block:
                outputs = [blocks.run(call) for call in calls]
                for name, weight in block.named_parameters() if path not in seen else ():
                    plans = by_parameter.get(f"{path}.{name}")
                    if plans is None or not formed.isdisjoint(p.name for p in plans):
                        continue  # parameters that share a tensor share its form
                    formed.update(p.name for p in plans)
                    if count % world.size == world.rank:
                        found[count] = _forms(blocks, calls, outputs, weight, plans, coded)
                    count += 1
            seen.add(path)
            if progress is not None:
                what = f"sensitivity of block {len(seen)}"
                progress(len(seen), len(blocks.paths), what, "measuring sensitivity")
            if len(seen) < len(blocks.paths):
                calls = [f.resume(o) for f, o in zip(forwards, outputs, strict=True)]
    finally:
        for forward in forwards:
            forward.stop()
    all_of_them = {number: each for own in world.all(found) for number, each in own.items()}
    return [all_of_them[number] for number in range(count)]


def _forms(
    blocks: Blocks,
    calls: Sequence[Call],
    outputs: Sequence[object],
    parameter: torch.nn.Parameter,
    plans: Sequence[TensorPlan],
    coded: bool,
) -> list[Offer]:
    weight, choices = parameter.data, []
    turned = plans[0].choice.transposed
    flat = weight.flatten(1) if plans[0].kernel else weight
    logical = (weight.transpose(-1, -2) if turned else flat).contiguous()
    cols = logical.shape[-1]
    sizes = [(size, 1) for size in GROUP_SIZES if size < cols] or [(-1, 1)]
    sizes = [(-1, 1), *sizes] if cols <= GROUP_SIZES[0] else sizes
    forms = [(*form, plans[0].zeros) for form in (*sizes, (plans[0].group_size, 2))]
    if coded:
        few = sizes[0][0], plans[0].group_size
        forms += [(size, 1, share) for size in few for share in ZEROS]
    for group_size, planes, share in dict.fromkeys(forms):
        found = [nearest(logical, group_size, share)]
        dense = found[0].dequantize(torch.float32)
        if planes == 2:
            found.append(nearest(logical - dense, group_size, share))
            dense = dense + found[1].dequantize(torch.float32)
        parameter.data = dense.transpose(-1, -2) if turned else dense.view(weight.shape)
        harms = [_harm(blocks.run(c), o) for c, o in zip(calls, outputs, strict=True)]
        parameter.data = weight
        own = tuple(replace(p, group_size=group_size, planes=planes, zeros=share) for p in plans)
        size = _coded_bytes(own, found) if coded else sum(p.stored_bytes() for p in own)
        bits = 8 * size
        choices.append(Offer(own, bits, sum(harms) / len(harms)))
    return choices


def _coded_bytes(plans: Sequence[TensorPlan], found: Sequence[Ternary]) -> int:
    """Bytes that tensors are expected to take as streams, where those are shorter.

    found  the planes of the parameter that they load into, of which the scales count
    """
    scales = join_planes([plane.scales.cpu() for plane in found])
    stored = store_scales(scales, bits=plans[0].stored_scale_bits)
    data = byte_view(stored).view(-1, stored.shape[-1] * stored.element_size())
    part = 1.0  # of its bytes that is left of the scales
    if data.numel() and plans[0].record("").can_be_coded:
        classes = classes_of_items(stored.shape[-1], stored.element_size())
        part = min(1.0, len(encode_rows(data, classes)) / data.numel())
    size = 0.0
    for plan in plans:
        zeros = USUAL_ZEROS if plan.zeros is None else plan.zeros
        packed, of_scales = plan.record("").stored_shapes()
        plain = math.prod(packed)
        if plan.record("").can_be_coded:
            layout = plan.shape[-1], plan.group_size, zeros, plan.planes
            plain = min(plain, expected_bytes(math.prod(packed[:-1]), *layout))
        size += plain + part * math.prod(of_scales) * stored.element_size()
    return math.ceil(size)


def _harm(output: object, wanted: object) -> float:
    a, b = (x if isinstance(x, Tensor) else x[0] for x in (output, wanted))  # type: ignore[index]
    return float((a - b).square().sum() / b.square().sum())


def count_forms(tensors: Sequence[TensorPlan]) -> Mapping[str, int]:
    """How many ternary tensors have each form, for people."""
    counts: dict[str, int] = {}
    for t in tensors:
        if t.ternary:
            more = ", two planes" if t.planes == 2 else ""
            more += "" if t.zeros is None else f", {t.zeros:.0%} zeros"
            what = f"groups of {t.group_size}{more}" if t.group_size > 0 else f"rows{more}"
            counts[what] = counts.get(what, 0) + 1
    return counts
