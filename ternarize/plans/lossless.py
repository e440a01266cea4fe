"""Groups in which weights that are ternary already lose nothing."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from ternarize.errors import CheckpointError
from ternarize.files.checkpoint import Checkpoint
from ternarize.plans.layout import TensorPlan, logical
from ternarize.plans.recipe import GROUP_SIZE
from ternarize.sources.folded import Folded
from ternarize.sources.imports.common import Imported
from ternarize.trits.methods import levels


def is_lossless(source: Checkpoint, tensor: TensorPlan, group_size: int) -> bool:
    """Whether a tensor is ternary in these groups, exactly; reads it up to where it is not."""
    trial = replace(tensor, group_size=group_size)
    return all(
        levels(logical(source.read(tensor.name, start, stop), trial), group_size) is not None
        for start, stop in trial.pieces()
    )


def exact_groups(source: Checkpoint, tensor: TensorPlan) -> int | None:
    """The groups in which a tensor of an ordinary source is ternary: packed so, it loses nothing.

    Those that are planned, or finer ones if only these are exact (several matrices with a scale
    each, fused); None if it is in none. An ordinary weight is told from its first row.
    """
    cols = tensor.shape[-1]
    if not tensor.choice.transposed and cols:
        first_row = source.read(tensor.name, 0, min(cols, tensor.info.numel)).reshape(-1, cols)
        if levels(first_row, GROUP_SIZE if tensor.group_size <= 0 else tensor.group_size) is None:
            return None
    return next((n for n in finer(tensor.group_size) if is_lossless(source, tensor, n)), None)


def own_groups(
    source: Checkpoint, tensors: Iterable[TensorPlan], everything: Iterable[TensorPlan], read: bool
) -> list[TensorPlan]:
    """Give tensors that are ternary at the source the largest groups in which they are.

    everything  all tensors of the checkpoint: those that share a parameter must have equal groups,
                and keep what they have
    read        look at weights (the first row of each tensor, and all of those that are ternary);
                else what the source's format says decides
    """
    filled = Counter(p for t in everything if t.ternary for p in t.choice.parameters)
    found = []
    for tensor in tensors:
        group_size = None
        if tensor.ternary and not tensor.tied_to:
            exclusive = all(filled[p] == 1 for p in tensor.choice.parameters)
            if isinstance(source, Imported):
                group_size = source.group_sizes.get(tensor.name)
            if read and exclusive and (group_size is None or group_size > 0):
                coarsest = _coarsest(source, tensor)
                group_size = group_size if coarsest is None else coarsest
        found.append(tensor if group_size is None else replace(tensor, group_size=group_size))
    return found


def _coarsest(source: Checkpoint, tensor: TensorPlan) -> int | None:
    """The largest groups in which a tensor is ternary; None if it is in none that is tried, and if
    it is all 0, which says nothing of groups.

    Tensors, rows, equal parts of rows (models trained with their matrices split over devices have a
    scale for each part), powers of two down to 32. An ordinary weight is told from its first 32
    elements, which are of one group in all of these.
    """
    cols = tensor.shape[-1]
    if tensor.choice.transposed or tensor.info.numel == 0:
        return None
    row = source.read(tensor.name, 0, cols).reshape(1, cols)
    if levels(row[:, :32], -1) is None:
        return None
    parts = {cols // n for n in range(2, 17) if cols % n == 0} | {256, 128, 64, 32}
    sizes = (0, -1, *sorted((n for n in parts if 32 <= n < cols), reverse=True))
    likely = (n for n in sizes if levels(row, n) is not None)
    found = next((n for n in likely if is_lossless(source, tensor, n)), None)
    if found != 0 or any(bool(source.read(tensor.name, *at).any()) for at in tensor.pieces()):
        return found
    return None


def finer(group_size: int) -> tuple[int, ...]:
    """Groups to try, in turn, for an ordinary source that is ternary; the first is as asked for."""
    return {0: (0, -1, GROUP_SIZE), -1: (-1, GROUP_SIZE)}.get(group_size, (group_size,))


def check_lossless(source: Checkpoint, tensors: Iterable[TensorPlan], group_size: int) -> None:
    """Raise CheckpointError where ternary weights would lose something in these groups."""
    imported = isinstance(source, Imported) and source.group_sizes
    tried = (group_size,) if imported else finer(group_size)
    for tensor in tensors:
        if not tensor.ternary or tensor.tied_to:
            continue
        if isinstance(source, Imported) and source.group_sizes:
            own = source.group_sizes.get(tensor.name)
        else:
            own = _coarsest(source, tensor)
        if own is None or own == 0 or (own == -1 and tried != (0,)):
            continue
        if own > 0 and group_size > 0 and own % group_size == 0:
            continue
        if not any(is_lossless(source, tensor, each) for each in tried):
            raise not_lossless(source, tensor, group_size, own)


def refuse_ternary(source: Folded, tensors: Iterable[TensorPlan]) -> None:
    """Raise CheckpointError for a weight that is ternary, and would not be once it is rotated."""
    assert source.raw is not None
    for tensor in tensors:
        if tensor.ternary and tensor.name in source.raw.tensors:
            if _coarsest(source.raw, tensor) is not None:
                raise CheckpointError(
                    f"{tensor.info.file}: {tensor.name}",
                    "is ternary already, and would not be once a rotation is folded into it",
                    "a weight that is not",
                    "Leave out --fold",
                )


def not_lossless(
    source: Checkpoint, tensor: TensorPlan, group_size: int, own: int
) -> CheckpointError:
    """The error for a weight that is ternary in the groups `own`, and not in these."""
    what = source.format if isinstance(source, Imported) else "ternary in floating point"
    groups = {0: "for the tensor", -1: "for each row"}.get(group_size, f"for {group_size} weights")
    return CheckpointError(
        f"{tensor.info.file}: {tensor.name}",
        f"has other values ({what}) than -s, 0 and s with one s {groups}",
        "these alone, so that nothing is lost",
        "Leave out --group-size"
        if group_size != own
        else "Convert the checkpoint it was made from, or leave it in floating point with --keep",
    )
