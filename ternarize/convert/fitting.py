"""What data decide of a conversion: calibration and training, in one process or several."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ternarize.calibrate.pipeline import Calibrated, calibrate
from ternarize.convert.journal import State
from ternarize.convert.tensor import not_finite
from ternarize.convert.workplace import CALIBRATION
from ternarize.errors import WeightError
from ternarize.measure.figures import check_quality
from ternarize.plans.layout import Plan
from ternarize.plans.lossless import exact_groups
from ternarize.plans.plan import calibrated_plan
from ternarize.progress import Progress
from ternarize.ranks import World
from ternarize.train.run import Log, open_training, train_model


def fit(
    plan: Plan,
    partial: Path,
    state: State,
    bounds: Mapping[str, float],
    *,
    device: str,
    progress: Progress | None,
    log: Log | None,
    world: World,
) -> None:
    """Calibrate and train what is not ternary already; the layout changes to what comes of it.

    partial  OUTPUT.partial
    bounds   on the figures
    """
    source, tensors = plan.source, state.tensors
    todo = [t for t in tensors if t.ternary and not t.tied_to]
    ordinary = [t for t in todo if exact_groups(source, t) is None]
    # what loads into one parameter is calibrated together, or not at all
    touched = {p for t in ordinary for p in t.choice.parameters}
    fitted = {t.name for t in ordinary}
    fitted |= {t.name for t in todo if not touched.isdisjoint(t.choice.parameters)}
    for at, tensor in enumerate(tensors):
        if tensor.name in fitted:
            tensors[at] = calibrated_plan(tensor, plan.recipe)
        elif tensor.ternary and not tensor.tied_to:
            tensors[at] = replace(tensor, choice=replace(tensor.choice, codec=""))
    folder = partial / CALIBRATION
    where: dict[str, Any] = {"device": device, "progress": progress, "world": world}
    found: Calibrated | None = None
    try:
        data = open_training(plan, device, world.size) if plan.recipe.training else None
        if plan.recipe.calibrate:
            found = calibrate(plan, tensors, folder, **where)
        if data is not None:
            begun = tensors if found is None else found.tensors
            found = train_model(plan, data, begun, folder, found, log=log, **where)
    except WeightError as error:
        raise not_finite(source, source.tensors[error.where]) from None
    assert found is not None
    check_quality(found.quality, bounds)
    plans = {t.name: t for t in found.tensors if t.name in found.solved}
    for index, shard in enumerate(state.shards):
        relaid = tuple(plans.get(t.name, t) for t in shard.tensors)
        state.shards[index] = replace(shard, tensors=relaid)
    state.calibrated = found
    state.forget_unwritten(partial)  # what was packed before a break, in this layout, counts


def fit_beside(plan: Plan, device: str, world: World) -> None:
    """Do the share of a process beside the first, which has what comes of it."""
    found: Calibrated | None = None
    with TemporaryDirectory(prefix="ternarize-") as own:
        if plan.recipe.calibrate:
            found = calibrate(plan, (), Path(own), device=device, world=world)
        if plan.recipe.training:
            train_model(plan, None, (), Path(own), found, device=device, world=world)
