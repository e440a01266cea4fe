"""The training stage of a conversion: data, two models, the loop, and what is stored in the end."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.calibrate.blocks import Blocks
from ternarize.calibrate.pipeline import Calibrated, environments_of, quality_of
from ternarize.calibrate.solved import Solved, open_solved, read_numbers, read_planes, write_solved
from ternarize.errors import UsageError
from ternarize.files import metadata
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import stamp
from ternarize.files.metadata import SCALE_SUFFIX
from ternarize.measure.measured import fast_dtype
from ternarize.plans.engine import check_held
from ternarize.plans.layout import Plan, TensorPlan
from ternarize.plans.recipe import Recipe, Train
from ternarize.progress import Progress
from ternarize.qat.modules import LOG_SCALE, hold_dense, latent_modules
from ternarize.qat.rounding import Form
from ternarize.qat.schedule import Schedule, end_decay, parameter_groups
from ternarize.ranks import World
from ternarize.sources.checkpoint import locate
from ternarize.sources.packed import check_record, open_packed, refuse_folded
from ternarize.train.compiled import compile_blocks
from ternarize.train.divided import by_names, regrouped, shard_blocks, whole
from ternarize.train.loop import Job, check_rounds, tokens_at_once, train
from ternarize.train.objectives import first_error, held_loss, objective
from ternarize.train.optimizer import make_optimizer
from ternarize.train.parallel import check_alike, exchange_of
from ternarize.train.recompute import recompute_blocks
from ternarize.train.sources import Data, data_of
from ternarize.train.state import Progressed
from ternarize.train.students import Pair, make_pair, teacher_folder
from ternarize.train.texts import batch_of
from ternarize.trits.base3 import BASE3
from ternarize.trits.ternary import scaled

_TICKS = 1000  # of progress
RAMP = 0.3  # share of the budget in which a share of zeros is reached that was not there before
LATENT_RATE = 0.006  # of latent weights, in units of their scales
# from scratch, as BitNet b1.58 is trained: high rates, and decay in the first half
SCRATCH_RATE, SCRATCH_DECAY = 0.002, 0.1
FOLDER = "training"  # in the folder of the calibration

# (step, figures by name), for those who keep a log
Log = Callable[[int, Mapping[str, float]], None]


def open_training(plan: Plan, device: str = "cpu", count: int = 1) -> Data:
    """What a plan's training reads, opened before anything long begins.

    count  processes that train together

    Raises UsageError for texts that cannot be used, for a teacher of other words and for more
    processes than have work, CheckpointError where the model or its tokenizer cannot be used.
    """
    training = plan.recipe.training
    assert training is not None
    if training.objective == "distill":
        teacher_folder(plan.source.directory, training)
    data = data_of(plan.source.directory, training, plan.recipe.calibrate)
    check_rounds(training, tokens_at_once(device), count, data.held)
    return data


def train_model(
    plan: Plan,
    data: Data | None,
    tensors: Sequence[TensorPlan],
    folder: Path,
    calibrated: Calibrated | None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    log: Log | None = None,
    world: World | None = None,
) -> Calibrated | None:
    """Train the ternary tensors of a plan, and what stands between them.

    data        what `open_training` gives
    tensors     the plan's; of those to be trained the choice says ternary
    folder      of the calibration: its blocks, and the state of a training that was broken off
    calibrated  where calibration has put the tensors to begin with; None: begin with `itf`
    world       the processes that train together, each of which calls this: data and tensors are
                those of the first, and each of the others has a folder of its own

    Returns what is to be stored, with the figures of the trained model in its record; None in the
    processes beside the first. Raises
    OutputError where the folder holds a training that began otherwise, CheckpointError for a model
    that cannot be run.
    """
    training = plan.recipe.training
    assert training is not None
    source, world = plan.source, world or World()
    given, tensors = world.firsts((data and _without_texts(data), tensors))
    data = data or given
    assert data is not None
    todo = {t.name: t for t in tensors if t.ternary and not t.tied_to and t.planes == 1}
    made_on = "cpu" if training.shard else device
    blocks = Blocks(source, list(todo), made_on)
    if training.start is not None:
        calibrated = _of_packed(training.start, tensors)
        tensors = calibrated.tensors
        if plan.recipe.engine is not None:
            check_held(tensors, plan.source.config, plan.recipe)
    begun = calibrated.solved if calibrated else {}
    by_name = {t.name: t for t in tensors}
    activations = plan.recipe.activations or "none"
    scale = "absmean" if plan.recipe.method == "absmean" else "learned"
    form, where = (training, scale, activations), (made_on, fast_dtype(device))
    pair = make_pair(blocks, begun, by_name, *form, *where)
    models = [model for model in (pair.student, pair.teacher) if model is not None]
    if training.recompute:
        recompute_blocks(pair.student, blocks.paths)
    if training.compile:
        compile_blocks(models, blocks.paths, device)
        pair.compiled = True
    schedule, ramp = _schedule_of(plan.recipe, pair.student) if todo else (None, 0.0)
    groups = _groups_of(training, pair.student)
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)

    check_alike(world, models, pair.dtype)
    environments = environments_of(folder, device, world)
    sigma = world.firsts(0.0 if world.rank else first_error(pair, data.held, data.pad))
    exchange = exchange_of(world, device)
    if training.shard:
        assert exchange is not None
        groups = by_names(groups, pair.trained())  # whole parameters are to be gone
        shard_blocks(models, blocks.paths, device, exchange)
        groups = regrouped(groups, pair.trained())
    loss = objective(pair, data.common, data.first, training.seed, data.pad, sigma)

    def hold(value: Tensor) -> Tensor:
        if not training.shard:
            return value
        return value.new_empty(0) if world.rank else value.cpu()

    def keep(file: Path, loss: float) -> None:
        values, ends = stored_of(pair, blocks, hold)
        if world.rank == 0:
            write_solved(file, blocks, by_name, values, {"held": json.dumps(loss)}, ends)

    def at(done: float, exact: bool) -> None:
        end_decay(job.optimizer, done)
        if schedule is not None:
            schedule.at(done, exact=exact)

    job = Job(
        training,
        place,
        pair.trained(),
        make_optimizer(groups, training.optimizer),
        loss,
        lambda: held_loss(loss, data.held, world),
        keep,
        _known(data, pair, device, training),
        partial(_tell, progress, log),
        training.micro_batch or tokens_at_once(device),
        at,
        ramp,
        world,
        exchange,
    )
    had = _had(training.start, data)
    progressed = train(job, itertools.islice(data.stream, had, None))
    if world.rank:
        return None
    if training.shard:  # whole again: the first process alone measures what came of it
        pair = make_pair(blocks, begun, by_name, *form, *where)
    best = open_solved(progressed.best_file(place))
    records = metadata.records_of(best)
    record = calibrated.record if calibrated else {}
    _take_best(pair, blocks, best)
    described = _described(progressed, data, pair) | {
        "samples": had + progressed.samples,
        "environments": environments,
        "quality": _quality(pair, data),
    }
    solved_now = {**begun} | {name: (best, each) for name, each in records.items()}
    return Calibrated(solved_now, list(tensors), record, described)


def _schedule_of(recipe: Recipe, student: Any) -> tuple[Schedule | None, float]:
    """What keeps the zeros that are asked for, and the share of the budget in which they come.

    A calibration has reached them, or this training is to.
    """
    if recipe.zeros is None:
        return None, 0.0
    ramp = RAMP if recipe.calibrate is None else 0.0
    schedule = Schedule(student, zeros=recipe.zeros, ramp=ramp, least=True)
    schedule.at(0.0)
    return schedule, ramp


def _groups_of(training: Train, student: Any) -> list[dict[str, Any]]:
    """The optimizer's groups, with their rates at their highest."""
    scratch = training.from_scratch
    usual, decay = (SCRATCH_RATE, SCRATCH_DECAY) if scratch else (LATENT_RATE, 0.0)
    rate = usual if training.lr is None else training.lr
    return parameter_groups(student, rate, relative=not scratch, weight_decay=decay)


def _tell(
    progress: Progress | None, log: Log | None, step: int, done: float, figures: Mapping[str, float]
) -> None:
    if progress is not None:
        progress(int(_TICKS * done), _TICKS, _in_words(step, figures), "training")
    if log is not None:
        log(step, figures)


def _without_texts(data: Data) -> Data:
    """What processes beside the first are to know of it: they are told the samples of each step."""
    held = [{name: value.clone() for name, value in sample.items()} for sample in data.held]
    return replace(data, stream=iter(()), held=held, report=[])


def _of_packed(start: str, tensors: Sequence[TensorPlan]) -> Calibrated:
    """Where to begin from a packed checkpoint of the same source: its trits, groups and rotations.

    Raises UsageError where it has another tensor than the plan.
    """
    packed, records = open_packed(start)
    table = check_record(packed, records) or {}
    rows = table.get("tensors", {})
    refuse_folded(start, table)
    begun: dict[str, Solved] = {}
    relaid = []
    for tensor in tensors:
        record = records.get(tensor.name)
        fitted = rows.get(tensor.name, {}).get("fitted") is True
        kind = tensor.becomes
        end = tensor.packed and not tensor.ternary
        usable = (kind, "kept") if end else (kind,)  # what is dense is rounded from the source
        found = record.kind if record else "not"
        if end and record and record.shape and record.group_size == 0:  # no conversion writes that
            found = f"{found} with one scale"
        if end and found == "kept" and fitted:  # rounding would be of the source
            found = "kept, as it was trained,"
        if not tensor.tied_to and found not in usable:
            raise UsageError(
                start,
                f"{tensor.name} is {found} there",
                f"{kind}, as it is to be",
                "Start from a conversion of this model with the same options",
            )
        if record is not None and record.shape is not None and tensor.packed:
            scale = packed.tensors[tensor.name + SCALE_SUFFIX].dtype
            tensor = replace(
                tensor,
                planes=record.planes,
                scale_dtype=scale,
                group_size=record.group_size,
                rotation=record.rotation,
            )
            begun[tensor.name] = packed, record
        elif record is not None and record.shape is None and not tensor.choice.bound:
            if len(tensor.shape) == 1 or fitted:  # it may not be that of the source
                begun[tensor.name] = packed, record
        relaid.append(tensor)
    return Calibrated(begun, relaid, {})


def _had(start: str | None, data: Data) -> int:
    """How many samples of this very stream the start was trained on: it goes on behind them."""
    if start is None:
        return 0
    record = check_record(*open_packed(start)) or {}
    training = record.get("training", {})
    same = all(training.get(name) == value for name, value in data.about.items())
    return int(training.get("samples", 0)) if same else 0


def stored_of(
    pair: Pair, blocks: Blocks, hold: Callable[[Tensor], Tensor] = lambda value: value
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, tuple[Tensor, Tensor]]]:
    """What is to be stored of the student.

    hold  makes of each value, as soon as it is there, what is kept of it

    Returns, by parameter, ternary matrices and vectors; and by tensor of the source the numbers and
    scales of ends in 8 or 4 bits. What several parameters share is there once, as in the source.
    """
    found: dict[str, tuple[Tensor, ...]] = {}
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    names = {
        parameter: name
        for name, place in blocks.places.items()
        for parameter in place.parameters
        if parameter not in blocks.tied
    }
    latents = set[int]()
    with torch.no_grad():
        for path, module in latent_modules(pair.student):
            for leaf, form in module.forms.items():
                name = f"{path}.{leaf}"
                latents.add(id(module._parameters[leaf]))
                if name not in names:
                    continue
                if form.codec == BASE3:
                    found[name] = (hold(_stored(module, leaf, form)),)
                else:
                    ends[names[name]] = module.numbers_and_scales(leaf)
        for name, parameter in pair.trained().items():
            if id(parameter) not in latents and not name.endswith(LOG_SCALE):
                found[name] = (hold(whole(parameter).clone()),)
    return found, ends


def _stored(module: Any, leaf: str, form: Form) -> Tensor:
    """s t in the parameter's orientation, in the space of the file."""
    trits, scales = module.trits_and_scales(leaf)
    return form.turn(scaled(trits, scales, form.group_size)).contiguous()


def _known(data: Data, pair: Pair, device: str, training: Train) -> dict[str, Any]:
    """What must be the same when a training goes on, beside the options and the source."""
    models = {}
    for what, name in (("teacher", training.teacher), ("start", training.start)):
        files = [] if name is None else sorted(locate(name).glob("*.safetensors"))
        models[what] = [[file.name, *stamp(file)[1:3]] for file in files]
    return {**data.about, **models, "device": device, "computed_in": str(pair.dtype)[6:]}


def _take_best(pair: Pair, blocks: Blocks, best: Checkpoint) -> None:
    """Put the best state into the student, for its figures; it is trained no more."""
    (file,) = best.files
    values = read_planes(best.directory / file)
    own = dict(pair.student.named_parameters(remove_duplicate=False))
    forms = {
        f"{path}.{leaf}": (module, leaf)
        for path, module in latent_modules(pair.student)
        for leaf in module.forms
    }
    for name, record in metadata.records_of(best).items():
        if record.shape is not None and record.codec != BASE3:
            module, leaf = forms[blocks.places[name].parameters[0]]
            module.set_numbers(leaf, *read_numbers(best, name, record))
    with torch.no_grad():
        for module, _ in forms.values():
            module.threshold = None  # what is stored is ternary by itself
        for name, value in blocks.as_parameters({n: p[0] for n, p in values.items()}).items():
            if name in forms:
                module, leaf = forms[name]
                module.set_stored(leaf, value)
            else:
                own[name].copy_(value)
    inside = [module for _, module in latent_modules(pair.student)]
    ends = [m for m in inside if all(form.codec != BASE3 for form in m.forms.values())]
    hold_dense(ends)  # a head is used whole, for every sample


def _described(progressed: Progressed, data: Data, pair: Pair) -> dict[str, Any]:
    return {
        **data.about,
        "steps": progressed.step,
        "tokens": progressed.tokens,
        "minutes": round(progressed.seconds / 60, 2),
        "computed_in": str(pair.dtype)[6:],
        "held_out": [[step, round(loss, 6)] for step, loss in progressed.held],
        "kept_step": progressed.best,
        **({"budgets": progressed.budgets} if len(progressed.budgets) > 1 else {}),
    }


def _quality(pair: Pair, data: Data) -> dict[str, Any]:
    """The figures of the student, against its teacher if it has one, on the report set."""

    def outputs() -> Any:
        for sample in data.report:
            batch = {k: v for k, v in batch_of([sample], data.pad).items() if k != "labels"}
            batch = {k: v.to(next(pair.student.parameters()).device) for k, v in batch.items()}
            with torch.no_grad(), pair.autocast():
                teacher = None if pair.teacher is None else pair.teacher(**batch)
                yield batch, teacher, pair.student(**batch)

    return quality_of(type(pair.student), pair.student.config, outputs(), data.first)


def _in_words(step: int, figures: Mapping[str, float]) -> str:
    left = figures["left"]
    time = f"{left / 3600:.1f} h" if left >= 3600 else f"{left / 60:.0f} min"
    return (
        f"step {step}: loss {figures['loss']:.3f}, held-out {figures['held']:.3f}, "
        f"{figures['speed']:.0f} tokens/s, {time} left"
    )
