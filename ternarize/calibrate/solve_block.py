"""One block: its sequential groups, their moments, and each matrix solved against them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ternarize.calibrate.blocks import Blocks, Call, patched
from ternarize.calibrate.gptq import Rounding, Solution, probe_rows, solve
from ternarize.calibrate.lanes import FLOAT, PACKED, Lane, tokens_of
from ternarize.calibrate.moments import Inputs, Moments
from ternarize.calibrate.solved import Parts, form_of
from ternarize.calibrate.tracing import Group, Product, Trace, sequential_groups
from ternarize.plans.layout import TensorPlan
from ternarize.qat.rounding import Form
from ternarize.trits.methods import itf
from ternarize.trits.rotation import rotate

Tick = Callable[[float, str], None]  # (how much of the block is done, what comes next)
Key = tuple[str, int, str]  # parameter, expert, kind of samples


@dataclass(frozen=True)
class LoadedBlock:
    """A block whose weights are loaded, and what it runs on.

    plans  parameter of the model -> the plan of its tensor, if that is ternary
    lanes  batches that wait at this block
    """

    path: str
    block: nn.Module
    blocks: Blocks
    plans: Mapping[str, TensorPlan]
    lanes: Sequence[Lane]

    def names(self) -> list[str]:
        """The block's parameters that become ternary."""
        return [n for n, _ in self.block.named_parameters() if f"{self.path}.{n}" in self.plans]

    def plan(self, name: str) -> TensorPlan:
        """How a parameter of the block is stored."""
        return self.plans[f"{self.path}.{name}"]

    def weight(self, name: str) -> Tensor:
        """A parameter of the block, as it is in it now."""
        return self.block.get_parameter(name).data


def without_data(loaded: LoadedBlock) -> dict[str, Tensor]:
    """The parameters of the block as `itf` without data would have them."""
    patch = {}
    for name in loaded.names():
        form = form_of(loaded.plan(name))
        logical = form.turn(loaded.weight(name)).contiguous()
        patch[name] = form.turn(itf(logical, form.group_size).dequantize(torch.float32))
    return patch


def held_error(
    loaded: LoadedBlock, patch: Mapping[str, Tensor], targets: Sequence[object]
) -> float:
    """Squared error of the patched block on held-out tokens of the packed stream.

    targets  what the float stream gives, for each lane; the error is relative to it
    """
    error = energy = 0.0
    with patched(loaded.block, patch):
        for lane, target in zip(loaded.lanes, targets, strict=True):
            if lane.kind == "held":
                output = lane.tokens(loaded.blocks.run(lane.waiting[PACKED]))
                wanted = lane.tokens(target)
                error += float((output - wanted).double().square().sum())
                energy += float(wanted.double().square().sum())
    return error / max(energy, 1e-30)


def solve_block(
    loaded: LoadedBlock, rounding: Rounding, tick: Tick
) -> tuple[Parts, dict[str, tuple[float, float]], dict[str, int]]:
    """Ternarize a block, group after group; each sees the groups before it as they have become.

    Returns it, held-out errors {weight: of its products without statistics, and with them}, and
    what saw too few tokens {tensor of the source, with [expert] if it holds several: how many}.
    """
    names, parts = loaded.names(), Parts()
    matrices: dict[str, tuple[float, float]] = {}
    unseen: dict[str, dict[int, int]] = {name: {} for name in names}
    groups, biases = _groups(loaded, names)
    for at, group in enumerate(groups):

        def part(fraction: float, what: str, at: int = at) -> None:
            tick((at + fraction) / len(groups), what)

        moments = _moments(loaded, group, parts.patch(), part)
        for name in group.names:
            # experts keep their biases: without targets there is no mean to fit them to
            bias = None if group.stack else biases.get(name)
            matrices[name] = _solve_weight(
                loaded, name, bias, moments, rounding, parts, unseen[name]
            )
    return parts, matrices, _uncalibrated(loaded, unseen)


def _groups(loaded: LoadedBlock, names: Sequence[str]) -> tuple[list[Group], dict[str, str]]:
    """The block's groups, and {weight: the parameter that is its product's bias}."""
    first = next(lane for lane in loaded.lanes if lane.kind == "train").waiting[FLOAT]
    trace = Trace({n: loaded.weight(n) for n in names})
    trace.run(lambda: loaded.blocks.run(first))
    groups = sequential_groups(trace, {n: loaded.block.get_parameter(n) for n in names})
    reached = {n for group in groups for n in group.names}
    groups += [Group((n,), 0, 0) for n in names if n not in reached]
    parameters = {p.untyped_storage().data_ptr(): n for n, p in loaded.block.named_parameters()}
    biases = {}
    for product in trace.products:
        if product.bias is not None:
            name = parameters.get(product.bias.untyped_storage().data_ptr())
            if name is not None and loaded.weight(name).shape == product.bias.shape:
                biases[product.name] = name
    return groups, biases


def _solve_weight(
    loaded: LoadedBlock,
    name: str,
    bias: str | None,
    moments: dict[Key, Moments],
    rounding: Rounding,
    parts: Parts,
    unseen: dict[int, int],
) -> tuple[float, float]:
    """Solve a weight, expert after expert, into `parts`; returns its errors before and after.

    moments  those of the weight are taken out: each is large, and used once
    unseen   receives {expert: tokens} of what saw too few
    """
    plan, weight = loaded.plan(name), loaded.weight(name)
    form = form_of(plan)
    stack = weight if weight.ndim == 3 else weight[None]
    stored = [torch.empty_like(stack) for _ in range(plan.planes)]
    errors = []
    for expert, matrix in enumerate(stack):
        matrix = as_stored(form.turn(matrix).contiguous(), form)
        empty = Inputs.empty(matrix.shape[1], keep=True, device=matrix.device)
        train, held = (
            moments.pop((name, expert, kind), Moments.empty(empty, 0, target=False))
            for kind in ("train", "held")
        )
        solution: Solution = solve(
            matrix,
            train,
            held,
            form.group_size,
            rounding,
            planes=plan.planes,
            bias=bias is not None,
        )
        for plane, ternary in zip(stored, solution.planes, strict=True):
            plane[expert] = form.turn(ternary.dequantize(torch.float32))
        errors.append((solution.plain, solution.error))
        if not solution.calibrated:
            unseen[expert] = train.inputs.tokens
        if bias is not None and solution.bias is not None:
            parts.vectors[bias] = solution.bias
        del train, held, solution
    parts.stored[name] = tuple(p if weight.ndim == 3 else p[0] for p in stored)
    parts.forms[name] = form
    before, after = (sum(e) / len(e) for e in zip(*errors, strict=True))
    return before, after


def as_stored(values: Tensor, form: Form) -> Tensor:
    """Rows of weights or inputs, rotated if the weight is stored so."""
    return rotate(values, form.block, form.seed) if form.block else values


def _uncalibrated(loaded: LoadedBlock, unseen: Mapping[str, Mapping[int, int]]) -> dict[str, int]:
    """How many tokens the matrices {parameter: {expert: tokens}} saw, on the source's names."""
    if not any(unseen.values()):
        return {}
    counts = {}
    for name, experts in unseen.items():
        # a tensor of numbers goes the way of the weights, to find where each matrix comes from
        weight = loaded.weight(name)
        count = torch.full((len(weight) if weight.ndim == 3 else 1, 1, 1), -1.0)
        for expert, tokens in experts.items():
            count[expert] = tokens
        counts[f"{loaded.path}.{name}"] = count.expand(-1, *weight.shape[-2:]).reshape(weight.shape)
    found = {}
    for name, value in loaded.blocks.on_disk(counts).items():
        for expert, one in enumerate(value if value.ndim == 3 else value[None]):
            if float(one[0, 0]) >= 0:
                found[name if value.ndim < 3 else f"{name}[{expert}]"] = int(one[0, 0])
    return found


def _moments(
    loaded: LoadedBlock, group: Group, patch: Mapping[str, Tensor], tick: Tick
) -> dict[Key, Moments]:
    """Moments of each matrix of a group, on calibration and on held-out tokens.

    Of inputs as the matrix is stored, rotated or not. Matrices with the same input share what
    is known of it. Held-out targets are those of `probe_rows`.
    """
    found: dict[Key, Moments] = {}
    lanes = [lane for lane in loaded.lanes if lane.kind in ("train", "held")]
    for done, lane in enumerate(lanes):
        tick(done / len(lanes), ", ".join(group.names))
        packed = _products(loaded, group, lane.waiting[PACKED], patch)
        floats = None
        if not group.stack:
            floats = _products(loaded, group, lane.waiting[FLOAT], {})
        sources: dict[str, list[tuple[int, ...]]] = {}
        for p in packed:
            sources.setdefault(p.name, []).append(p.source)
        inputs: dict[tuple[int, ...], Tensor] = {}
        for at, p in enumerate(packed):
            if group.stack or p.source not in inputs:
                x = tokens_of(p.x, lane.mask)
                if group.stack:  # tokens that do not reach an expert may come to it as zeros
                    x = x[x.any(-1)]
                inputs[p.source] = as_stored(x, form_of(loaded.plan(p.name)))
            x, rows, held = inputs[p.source], p.y.shape[-1], lane.kind == "held"
            probe = probe_rows(rows).to(x.device)
            # the first matrix with the same inputs; each expert has its own
            alike = [n for n, own in sources.items() if own == sources[p.name]]
            key = p.name, p.expert, lane.kind
            first = (p.name if group.stack else alike[0]), p.expert, lane.kind
            if key not in found:
                known = found[first].inputs if first in found else None
                known = known or Inputs.empty(x.shape[-1], keep=held, device=x.device)
                count = len(probe) if held else rows
                found[key] = Moments.empty(known, count, target=not group.stack)
            assert found[key].inputs is found[first].inputs
            if key == first:
                found[key].inputs.add(x)
            if floats is not None:
                y = tokens_of(_target(p, floats[at]), lane.mask)
                found[key].add(x, y[:, probe] if held else y)
    return found


def _target(packed: Product, source: Product) -> Tensor:
    """What a product in the packed stream should be (tracing.py), given that in the float one."""
    if packed.terms is None or source.terms is None:
        return source.y
    return source.y + (source.terms - packed.terms) / packed.scale


def _products(
    loaded: LoadedBlock, group: Group, call: Call, patch: Mapping[str, Tensor]
) -> list[Product]:
    """The products with a group's weights, of the patched block on one call."""
    with patched(loaded.block, patch):
        trace = Trace({n: loaded.weight(n) for n in loaded.names()}, group.seen)
        trace.run(lambda: loaded.blocks.run(call))
    return [p for p in trace.products if p.name in group.names]
