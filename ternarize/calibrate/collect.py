"""The moments of a group's matrices, from the samples of all processes, at those that solve them.

Sums over calibration tokens are taken over each of CHUNKS chunks of the batches, batch i being of
chunk i % CHUNKS, and the sums of the chunks are added up in their order, each by the processes that
solve a matrix of it. What is known of held-out tokens, and of those that reach an expert, is
smaller as it is than summed up: the tokens themselves go to who solves the matrix, which adds them
up in the order of the batches. Either way the order is the same for any number of processes.

So these bytes go from one process to another, float32 unless told otherwise, with c columns and r
rows of a matrix, and n tokens of a batch:

    each chunk        c^2 + 2 c for the inputs of a group, and r c + 2 r for each of its matrices
    held-out batches  n c for the inputs, and n min(r, 256) for each matrix
    experts           n c for the n tokens that reach one

once to each process that solves a matrix of the group and does not have the batch itself, and two
numbers of 8 bytes beside each sum.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from ternarize.calibrate.blocks import Blocks, Call, patched
from ternarize.calibrate.gptq import probe_rows
from ternarize.calibrate.lanes import FLOAT, PACKED, Lane, tokens_of
from ternarize.calibrate.moments import Inputs, Moments
from ternarize.calibrate.ranks import CHUNKS, rank_of
from ternarize.calibrate.solved import form_of
from ternarize.calibrate.tracing import Group, Product, Trace
from ternarize.plans.layout import TensorPlan
from ternarize.qat.rounding import Form
from ternarize.ranks import World
from ternarize.trits.rotation import rotate

Tick = Callable[[float, str], None]  # (how much of the block is done, what comes next)
MatrixKey = tuple[str, int]  # parameter, expert
Sums = dict[MatrixKey, Moments]


@dataclass(frozen=True)
class LoadedBlock:
    """A block whose weights are loaded, and what it runs on.

    plans   parameter of the model -> the plan of its tensor, if that is ternary
    lanes   batches of this process that wait at this block
    counts  how many batches of each kind all processes have
    """

    path: str
    block: nn.Module
    blocks: Blocks
    plans: Mapping[str, TensorPlan]
    lanes: list[Lane]
    counts: Mapping[str, int]
    world: World

    def names(self) -> list[str]:
        """The block's parameters that become ternary."""
        return [n for n, _ in self.block.named_parameters() if f"{self.path}.{n}" in self.plans]

    def plan(self, name: str) -> TensorPlan:
        """How a parameter of the block is stored."""
        return self.plans[f"{self.path}.{name}"]

    def weight(self, name: str) -> Tensor:
        """A parameter of the block, as it is in it now."""
        return self.block.get_parameter(name).data

    def lane(self, kind: str, index: int) -> Lane | None:
        """A batch, if this process has it."""
        return next((x for x in self.lanes if x.kind == kind and x.index == index), None)


@dataclass(frozen=True)
class _Rows:
    """What one product says of its matrix: inputs x (n, cols), targets y (n, rows) if any."""

    matrix: MatrixKey
    x: Tensor
    y: Tensor | None


def collect(
    loaded: LoadedBlock,
    group: Group,
    patch: Mapping[str, Tensor],
    solvers: Mapping[MatrixKey, int],
    tick: Tick,
) -> tuple[Sums, Sums]:
    """Moments of the matrices of a group that this process solves, of calibration, held-out tokens.

    patch    parameters of the block that the packed stream has otherwise
    solvers  who solves each matrix

    Of inputs as the matrix is stored, rotated or not. Matrices with the same input share what
    is known of it. Held-out targets are those of `probe_rows`. Matrices that no token reaches are
    not there.
    """
    done, total = count(), max(1, sum(x.kind in ("train", "held") for x in loaded.lanes))

    def rows(lane: Lane) -> Iterator[_Rows]:
        tick(next(done) / total, ", ".join(group.names))
        return _rows(loaded, group, lane, patch)

    if group.stack:
        return tuple(  # type: ignore[return-value]
            _gathered(loaded, group, kind, solvers, rows) for kind in ("train", "held")
        )
    train = _summed(loaded, group, solvers, rows)
    return train, _gathered(loaded, group, "held", solvers, rows)


def as_stored(values: Tensor, form: Form) -> Tensor:
    """Rows of weights or inputs, rotated if the weight is stored so."""
    return rotate(values, form.block, form.seed) if form.block else values


def _summed(
    loaded: LoadedBlock,
    group: Group,
    solvers: Mapping[MatrixKey, int],
    rows: Callable[[Lane], Iterator[_Rows]],
) -> Sums:
    """The moments of calibration tokens, chunk after chunk."""
    world, batches = loaded.world, loaded.counts["train"]
    own = [matrix for matrix, rank in solvers.items() if rank == world.rank]
    chunks, total = min(CHUNKS, batches), Sums()
    for first in range(0, chunks, world.size):
        mine, part = first + world.rank, Sums()
        for index in range(mine, batches, CHUNKS) if mine < chunks else ():
            lane = loaded.lane("train", index)
            assert lane is not None
            for each in rows(lane):
                _add(part, group, each, list(solvers), keep=False)
        for giver in range(min(world.size, chunks - first)):
            for rank in sorted(set(solvers.values())):
                theirs = [matrix for matrix, solver in solvers.items() if solver == rank]
                if giver == rank == world.rank:
                    total = _folded(total, part, group, own)
                elif giver == world.rank:
                    _send_sums(world, part, group, theirs, rank)
                elif rank == world.rank:
                    total = total or _zeros(loaded, group, own)
                    _add_sums(world, total, group, own, giver)
    return total


def _gathered(
    loaded: LoadedBlock,
    group: Group,
    kind: str,
    solvers: Mapping[MatrixKey, int],
    rows: Callable[[Lane], Iterator[_Rows]],
) -> Sums:
    """The moments of tokens that go to who solves the matrix, batch after batch."""
    world, batches, found = loaded.world, loaded.counts[kind], Sums()
    own = [matrix for matrix, rank in solvers.items() if rank == world.rank]
    keep = kind == "held"
    for first in range(0, batches, world.size):
        indices = range(first, min(first + world.size, batches))
        mine = {index: lane for index in indices if (lane := loaded.lane(kind, index))}
        seen = {index: rows(lane) for index, lane in mine.items()}
        if world.size > 1:  # all side by side, and only then one after the other
            seen = {index: iter(list(each)) for index, each in seen.items()}
        for index in indices:
            holder = rank_of(world, kind, index)
            if holder == world.rank:
                each = list(seen[index]) if world.size > 1 else seen[index]
                for rank in sorted(set(solvers.values()) - {holder}):
                    _send_rows(world, [one for one in each if solvers[one.matrix] == rank], rank)
                for one in each:
                    if solvers[one.matrix] == world.rank:
                        _add(found, group, one, own, keep=keep)
            elif own:
                for one in _received_rows(world, holder, loaded.blocks.device):
                    _add(found, group, one, own, keep=keep)
    return found


def _add(sums: Sums, group: Group, rows: _Rows, among: list[MatrixKey], *, keep: bool) -> None:
    """Add what a product says; the first `among` those with its inputs adds these."""
    name, expert = rows.matrix
    lead = group.lead(name, {each for each, _ in among}), expert
    if rows.matrix not in sums:
        known = sums[lead].inputs if lead in sums else None
        known = known or Inputs.empty(rows.x.shape[-1], keep=keep, device=rows.x.device)
        count = 0 if rows.y is None else rows.y.shape[-1]
        sums[rows.matrix] = Moments.empty(known, count, target=rows.y is not None)
    assert sums[rows.matrix].inputs is sums[lead].inputs
    if rows.matrix == lead:
        sums[lead].inputs.add(rows.x)
    if rows.y is not None:
        sums[rows.matrix].add(rows.x, rows.y)


def _leads(group: Group, matrices: list[MatrixKey]) -> list[MatrixKey]:
    """Of some matrices those whose inputs are all that there are."""
    names = {name for name, _ in matrices}
    return [(name, expert) for name, expert in matrices if group.lead(name, names) == name]


def _folded(total: Sums, part: Sums, group: Group, own: list[MatrixKey]) -> Sums:
    """A total with the sums of another chunk; `part` becomes it if there is none."""
    if not total:
        return {matrix: part[matrix] for matrix in own}
    for lead in _leads(group, own):
        total[lead].inputs.fold(part[lead].inputs)
    for matrix in own:
        total[matrix].fold(part[matrix])
    return total


def _zeros(loaded: LoadedBlock, group: Group, own: list[MatrixKey]) -> Sums:
    """Sums over no tokens."""
    found, names = Sums(), {name for name, _ in own}
    for name, expert in own:
        weight = loaded.weight(name)
        rows, cols = form_of(loaded.plan(name)).turn(weight).shape
        lead = group.lead(name, names), expert
        inputs = found[lead].inputs if lead in found else Inputs.empty(cols, device=weight.device)
        found[name, expert] = Moments.empty(inputs, rows, target=True)
    return found


def _send_sums(world: World, part: Sums, group: Group, matrices: list[MatrixKey], to: int) -> None:
    """Give the sums of a chunk to who solves some matrices."""
    leads = [part[lead].inputs for lead in _leads(group, matrices)]
    numbers = [float(each.tokens) for each in leads]
    numbers += [part[matrix].energy for matrix in matrices]
    world.send(torch.tensor(numbers, dtype=torch.float64), to, "sums")
    for inputs in leads:
        assert inputs.hessian is not None
        world.send(inputs.hessian, to, "sums")
        world.send(inputs.total, to, "sums")
    for matrix in matrices:
        target = part[matrix].target
        assert target is not None
        world.send(target, to, "sums")
        world.send(part[matrix].total, to, "sums")


def _add_sums(world: World, total: Sums, group: Group, own: list[MatrixKey], giver: int) -> None:
    """Add the sums of a chunk that another process gives."""
    leads = [total[lead].inputs for lead in _leads(group, own)]
    numbers = world.receive([len(leads) + len(own)], torch.float64, giver).tolist()
    for inputs, tokens in zip(leads, numbers[: len(leads)], strict=True):
        assert inputs.hessian is not None
        world.add_received(inputs.hessian, giver)
        world.add_received(inputs.total, giver)
        inputs.tokens += int(tokens)
    for matrix, energy in zip(own, numbers[len(leads) :], strict=True):
        target = total[matrix].target
        assert target is not None
        world.add_received(target, giver)
        world.add_received(total[matrix].total, giver)
        total[matrix].energy += energy


def _at_rest(values: Tensor) -> Tensor:
    """As they lie in memory when another process has sent them: products may round by that."""
    return values.clone() if values.storage_offset() else values.contiguous()


def _send_rows(world: World, rows: list[_Rows], to: int) -> None:
    """Give tokens to who solves their matrices; inputs that several share go once."""
    xs = {id(each.x): each.x for each in rows}
    places = {key: at for at, key in enumerate(xs)}
    words = [(each.matrix, places[id(each.x)], each.y is not None) for each in rows]
    ys = [each.y for each in rows if each.y is not None]
    world.send_all(words, [*xs.values(), *ys], to, "tokens")


def _received_rows(world: World, giver: int, device: torch.device) -> list[_Rows]:
    words, tensors = world.receive_all(giver)
    tensors = [tensor.to(device) for tensor in tensors]
    rest = iter(tensors[1 + max((at for _, at, _ in words), default=-1) :])
    return [_Rows(matrix, tensors[at], next(rest) if y else None) for matrix, at, y in words]


def _rows(
    loaded: LoadedBlock, group: Group, lane: Lane, patch: Mapping[str, Tensor]
) -> Iterator[_Rows]:
    """What each product with a matrix of the group says, in the order in which they are made."""
    packed = _products(loaded, group, lane.waiting[PACKED], patch)
    floats = None
    if not group.stack:
        floats = _products(loaded, group, lane.waiting[FLOAT], {})
    inputs: dict[tuple[int, ...], Tensor] = {}
    for at, p in enumerate(packed):
        if group.stack or p.source not in inputs:
            x = tokens_of(p.x, lane.mask)
            if group.stack:  # tokens that do not reach an expert may come to it as zeros
                x = x[x.any(-1)]
            x = as_stored(x, form_of(loaded.plan(p.name)))
            inputs[p.source] = _at_rest(x) if group.stack or lane.kind == "held" else x
        x, y = inputs[p.source], None
        if floats is not None:
            y = tokens_of(_target(p, floats[at]), lane.mask)
            if lane.kind == "held":
                y = _at_rest(y[:, probe_rows(p.y.shape[-1]).to(x.device)])
        yield _Rows((p.name, p.expert), x, y)


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
