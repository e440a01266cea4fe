"""One block: its sequential groups, their moments, and each matrix solved against them."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ternarize.calibrate.blocks import patched
from ternarize.calibrate.collect import LoadedBlock, MatrixKey, Tick, as_stored, collect
from ternarize.calibrate.dead_zone import nearest
from ternarize.calibrate.gptq import Rounding, Solution, solve
from ternarize.calibrate.lanes import FLOAT, PACKED
from ternarize.calibrate.moments import Inputs, Moments
from ternarize.calibrate.ranks import share_out
from ternarize.calibrate.solved import Parts, form_of
from ternarize.calibrate.tracing import Group, Trace, sequential_groups
from ternarize.trits.base3 import pack, unpack
from ternarize.trits.ternary import Ternary


def without_data(loaded: LoadedBlock) -> dict[str, Tensor]:
    """The parameters of the block as `nearest` without data would have them."""
    patch = {}
    for name in loaded.names():
        plan = loaded.plan(name)
        form = form_of(plan)
        logical = form.turn(loaded.weight(name)).contiguous()
        plain = nearest(logical, form.group_size, plan.zeros, plan.stored_scale_bits)
        patch[name] = form.turn(plain.dequantize(torch.float32))
    return patch


def held_error(
    loaded: LoadedBlock, patch: Mapping[str, Tensor], targets: Sequence[object]
) -> float:
    """Squared error of the patched block on held-out tokens of the packed stream.

    targets  what the float stream gives, for each lane; the error is relative to it
    """
    error = energy = 0.0
    found = list[tuple[int, float, float]]()
    with patched(loaded.block, patch):
        for lane, target in zip(loaded.lanes, targets, strict=True):
            if lane.kind == "held":
                output = lane.tokens(loaded.blocks.run(lane.waiting[PACKED]))
                wanted = lane.tokens(target)
                missed = float((output - wanted).double().square().sum())
                found.append((lane.index, missed, float(wanted.double().square().sum())))
    for _, own_error, own_energy in sorted(sum(loaded.world.all(found), [])):
        error, energy = error + own_error, energy + own_energy
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
    groups, biases = loaded.world.firsts(_groups(loaded, names))
    for at, group in enumerate(groups):

        def part(fraction: float, what: str, at: int = at) -> None:
            tick((at + fraction) / len(groups), what)

        # experts keep their biases: without targets there is no mean to fit them to
        fitted = {n: biases[n] for n in group.names if n in biases and not group.stack}
        solved = _solve_group(loaded, group, set(fitted), rounding, parts.patch(), part)
        for name in group.names:
            own = {expert: each for (n, expert), each in solved.items() if n == name}
            _take(loaded, name, own, parts)
            count = len(own)
            before = sum(own[expert].plain for expert in range(count)) / count
            matrices[name] = before, sum(own[expert].error for expert in range(count)) / count
            unseen[name] = {e: own[e].tokens for e in range(count) if not own[e].calibrated}
            if name in fitted and (bias := own[0].bias) is not None:
                parts.vectors[fitted[name]] = bias
    return parts, matrices, _uncalibrated(loaded, unseen)


def _groups(loaded: LoadedBlock, names: Sequence[str]) -> tuple[list[Group], dict[str, str]]:
    """The block's groups, and {weight: the parameter that is its product's bias}.

    Of the first batch of all; where another process has that, nothing.
    """
    lane = loaded.lane("train", 0)
    if lane is None:
        return [], {}
    trace = Trace({n: loaded.weight(n) for n in names})
    trace.run(lambda: loaded.blocks.run(lane.waiting[FLOAT]))
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


def _solve_group(
    loaded: LoadedBlock,
    group: Group,
    biased: Container[str],
    rounding: Rounding,
    patch: Mapping[str, Tensor],
    tick: Tick,
) -> dict[MatrixKey, Solution]:
    """Solve the matrices of a group, each in one of the processes.

    biased  weights whose products have a bias that is fitted
    """
    costs = dict[MatrixKey, float]()
    for name in group.names:
        *experts, rows, cols = form_of(loaded.plan(name)).turn(loaded.weight(name)).shape
        for expert in range(*experts or [1]):
            costs[name, expert] = (rows + cols) * float(cols) ** 2
    solvers = share_out(costs, loaded.world.size)
    train, held = collect(loaded, group, patch, solvers, tick)
    found = dict[MatrixKey, Solution]()
    # about the mean last: so others find the inputs' Hessian to the last bit as it was (Metric)
    for matrix in sorted(costs, key=lambda each: each[0] in biased):
        if solvers[matrix] == loaded.world.rank:
            moments = train.pop(matrix, None), held.pop(matrix, None)
            found[matrix] = _solve(loaded, matrix, moments, rounding, bias=matrix[0] in biased)
            del moments  # each is large, and used once
    return _of_all(loaded, found)


def _solve(
    loaded: LoadedBlock,
    matrix: MatrixKey,
    moments: tuple[Moments | None, Moments | None],
    rounding: Rounding,
    *,
    bias: bool,
) -> Solution:
    """Solve a matrix; None of the moments: it has seen no token."""
    name, expert = matrix
    plan, weight = loaded.plan(name), loaded.weight(name)
    form = form_of(plan)
    stack = weight if weight.ndim == 3 else weight[None]
    own = as_stored(form.turn(stack[expert]).contiguous(), form)
    empty = Inputs.empty(own.shape[1], keep=True, device=own.device)
    train, held = (each or Moments.empty(empty, 0, target=False) for each in moments)
    return solve(
        own,
        train,
        held,
        form.group_size,
        rounding,
        planes=plan.planes,
        bias=bias,
        zeros=plan.zeros,
        scale_bits=plan.stored_scale_bits,
    )


def _of_all(loaded: LoadedBlock, own: dict[MatrixKey, Solution]) -> dict[MatrixKey, Solution]:
    """What all processes have solved; between them trits go packed."""
    if loaded.world.size == 1:
        return own
    given = {
        matrix: (
            replace(each, planes=(), bias=None if each.bias is None else each.bias.cpu()),
            [(pack(p.trits.cpu(), -1), p.scales.cpu()) for p in each.planes],
        )
        for matrix, each in own.items()
    }
    found, device = dict(own), loaded.blocks.device
    for theirs in loaded.world.all(given, "solved"):
        for (name, expert), (each, planes) in theirs.items():
            if (name, expert) not in own:
                form = form_of(loaded.plan(name))
                cols = form.turn(loaded.weight(name)).shape[-1]
                bias = None if each.bias is None else each.bias.to(device)
                ternary = tuple(
                    Ternary(unpack(p, cols, -1).to(device), s.to(device), form.group_size)
                    for p, s in planes
                )
                found[name, expert] = replace(each, planes=ternary, bias=bias)
    return found


def _take(loaded: LoadedBlock, name: str, solved: Mapping[int, Solution], parts: Parts) -> None:
    """Put the matrices of a weight, one or by expert, into `parts`."""
    plan, weight = loaded.plan(name), loaded.weight(name)
    form = form_of(plan)
    stack = weight if weight.ndim == 3 else weight[None]
    stored = [torch.empty_like(stack) for _ in range(plan.planes)]
    for expert in range(len(stack)):
        for plane, ternary in zip(stored, solved[expert].planes, strict=True):
            plane[expert] = form.turn(ternary.dequantize(torch.float32))
    parts.stored[name] = tuple(p if weight.ndim == 3 else p[0] for p in stored)
    parts.forms[name] = form


def _uncalibrated(loaded: LoadedBlock, unseen: Mapping[str, Mapping[int, int]]) -> dict[str, int]:
    """How many tokens the matrices {parameter: {expert: tokens}} saw, on the source's names."""
    if not any(unseen.values()):
        return {}
    counts = {}
    for name, experts in unseen.items():
        # a tensor of numbers goes the way of the weights, to find where each matrix comes from
        weight = loaded.weight(name)
        count = torch.full((len(weight) if weight.ndim == 3 else 1,), -1.0)
        for expert, tokens in experts.items():
            count[expert] = tokens
        each = count.view(-1, *(1,) * (weight.ndim - 1))
        counts[f"{loaded.path}.{name}"] = each.expand(weight.shape).contiguous()
    found = {}
    for name, value in loaded.blocks.on_disk(counts).items():
        for expert, one in enumerate(value if value.ndim == 3 else value[None]):
            if (tokens := int(one.flatten()[0])) >= 0:
                found[f"{name}[{expert}]" if value.ndim == 3 else name] = tokens
    return found
