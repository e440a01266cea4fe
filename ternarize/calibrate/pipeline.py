"""The calibrated part of a conversion: data, budget, block loop, and the figures at the end."""

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ternarize.calibrate.budget import allocate, count_forms
from ternarize.calibrate.data import MAX_SEQ_LEN, Samples, read
from ternarize.calibrate.inputs import Generate
from ternarize.calibrate.run import Calibration
from ternarize.calibrate.solved import Solved, open_solved
from ternarize.calibrate.speech import ear_for
from ternarize.calibrate.texts import SELF
from ternarize.errors import CheckpointError, OutputError, UsageError
from ternarize.files import metadata
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import byte_view
from ternarize.files.metadata import RANS
from ternarize.files.outputs import write_whole
from ternarize.measure.encoders import pool
from ternarize.measure.figures import Figure, mean_of
from ternarize.measure.language_models import compare_logits, summarize
from ternarize.models.configuration import class_of, open_config
from ternarize.models.reads import CAUSAL, ENCODER_DECODER, has_tokenizer, kind_of, open_tokenizer
from ternarize.plans.layout import Plan, TensorPlan
from ternarize.plans.recipe import Calibrate
from ternarize.progress import Progress
from ternarize.ranks import World
from ternarize.runtime.decode import cache_of
from ternarize.trits.scales import scale_values, store_scales
from ternarize.version import __version__

TOKENS_IN_BATCH = 4096
_FIRST_WEIGHTS = 1024  # of a tensor, by which sources of the same shapes are told apart
BUDGET, INPUTS, ENVIRONMENTS = "budget.json", "inputs.json", "environments.json"


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    solved   tensor of the source -> the file that has it, and its record there
    tensors  the plan's tensors, in the forms that the budget gave them
    record   plain data for ternarize.json: data, environments, blocks, quality; {} without
    training  the same of a training after it (train/run.py), which measures what came of both
    """

    solved: dict[str, Solved]
    tensors: list[TensorPlan]
    record: dict[str, Any]
    training: dict[str, Any] | None = None

    @property
    def quality(self) -> dict[str, Figure]:
        """The figures of the result."""
        found: dict[str, Figure] = (self.training or self.record)["quality"]
        return found


def join(plan: Plan, world: World, *, needed: bool = True) -> bool:
    """Whether the processes of a world are to call `calibrate`; the first one says it: `needed`.

    Raises UsageError in all where one of them has another recipe or source than the first, by the
    first weights of every tensor.
    """
    if world.size == 1:
        return needed
    own = None
    with world.agreed():
        if needed:
            own = _digest_of(plan)
    known = world.firsts(own)
    if known is None:
        return False
    with world.agreed():
        if known != own:
            raise UsageError(
                f"rank {world.rank}",
                "has another source, other options or another version than rank 0",
                "the same in all",
                "Start all by one command",
            )
    return True


def _digest_of(plan: Plan) -> str:
    """SHA-256, hex, over what a calibration is of: version, recipe, configuration, some weights."""
    tensors = {t.name: (t.info.dtype, t.info.shape) for t in plan.tensors}
    parts = [__version__, asdict(plan.recipe), plan.source.config, tensors]
    sha = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, info in plan.source.tensors.items():
        first = plan.source.read(name, 0, min(_FIRST_WEIGHTS, info.numel))
        sha.update(byte_view(first).numpy().tobytes())
    return sha.hexdigest()


def calibrate(
    plan: Plan,
    tensors: Sequence[TensorPlan],
    folder: Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    world: World | None = None,
) -> Calibrated:
    """Calibrate the ternary tensors of a plan.

    tensors  the plan's, those that are not to be calibrated marked as kept
    folder   for the files of the blocks; what is there from a run that was broken off is used
    world    the processes that share the work, each of which calls this; of their tensors those of
             the first count, and each of the others has an empty folder of its own

    Raises UsageError for data that cannot be used, CheckpointError for a model that cannot be run.
    """
    calibration = plan.recipe.calibrate
    assert calibration is not None
    world = world or World()
    environments = world.all(_environment(device))
    samples: Samples | None = None
    with world.agreed():
        if world.rank == 0:
            trained = plan.recipe.training is not None
            samples = samples_of(plan.source.directory, calibration, trained=trained)
            _check_same(folder, {"data": samples.digest, "device": device})
            environments = _note_environments(folder, environments)
    samples, tensors = world.firsts((samples, tensors))
    assert samples is not None
    bpw, coded = calibration.target_bpw, plan.recipe.codec == RANS and not plan.recipe.training
    if bpw is not None:
        how: dict[str, Any] = {"coded": coded, "device": device, "progress": progress}
        tensors = _budget(plan.source, tensors, samples, bpw, folder, world, **how)
    bits = plan.recipe.scale_bits

    def rounding(scales: Tensor) -> Tensor:
        stored = store_scales(scales.cpu(), bits=bits)
        return scale_values(stored, torch.float64).to(scales.device)

    prepared = partial(
        Calibration,
        plan.source,
        tensors,
        folder=folder,
        rounding=rounding,
        steps=calibration.reconstruct,
        window=calibration.window,
        seed=calibration.seed,
        device=device,
        progress=progress,
        world=world,
    )
    learn = {"train": samples.batches, "held": samples.heldout}
    with _exact_products():
        run = prepared({**learn, "report": [] if plan.recipe.training else samples.report})
        if plan.recipe.training:  # which measures its own result
            quality = {}
            for _ in run.run():
                pass
        else:
            quality = _quality(run, samples)
    samples.description["notes"] += [] if plan.recipe.training else _not_measured(plan)
    solved: dict[str, Solved] = {}
    for file in run.solved.files().values():
        packed = open_solved(file)
        for name, record in metadata.records_of(packed).items():
            solved[name] = packed, record
    found = {
        "data": samples.description,
        "environments": environments,
        "quality": quality,
        "forms": count_forms(tensors),
        "uncalibrated": sum(len(r.uncalibrated) for r in run.reports),
        "blocks": [asdict(report) for report in run.reports],
    }
    return Calibrated(solved, list(tensors), found)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products in float32 and not in TF32, whatever the caller has set."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def _not_measured(plan: Plan) -> list[str]:
    """What the figures of the calibration leave out: all that it does not run in its final form."""
    names = [t.name for t in plan.tensors if t.packed and not _in_block(t.name)]
    notes = [f"the figures are without the rounding of {', '.join(names)}"] if names else []
    if plan.recipe.activations != "none":
        notes.append("the figures are without the rounding of activations")
    return notes


def _in_block(name: str) -> bool:
    return any(step.isdigit() for step in name.split("."))


def _left_at(path: Path) -> Any:
    """What an earlier run has left, None if nothing."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _leave(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value).encode())


def _check_same(folder: Path, inputs: dict[str, str]) -> None:
    """Blocks that an earlier run has left must come from the same samples and device."""
    before = _left_at(folder / INPUTS)
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        _leave(folder / INPUTS, inputs)
    elif before != inputs:
        raise OutputError(
            folder.parent,
            f"holds blocks calibrated on other samples or another device ({before} there, "
            f"{inputs} now)",
            "the same",
            "Remove it to begin anew",
        )


def environments_of(folder: Path, device: str, world: World) -> list[dict[str, Any]]:
    """What the sums of this run depend on beside its input, after those of runs it goes on from.

    As far as it can be told: the same bytes are promised on the same machine alone. In all
    processes of a world, each of which calls this.
    """
    return _note_environments(folder, world.all(_environment(device)))


def _environment(device: str) -> dict[str, Any]:
    """What the sums of this process depend on beside its input."""
    return {
        "device": device,
        "machine": platform.machine(),
        "processor": torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _note_environments(folder: Path, now: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    known: list[dict[str, Any]] = _left_at(folder / ENVIRONMENTS) or []
    new = [own for at, own in enumerate(now) if own not in known and own not in now[:at]]
    if new:
        known += new
        _leave(folder / ENVIRONMENTS, known)
    return known


def samples_of(directory: Path, calibration: Calibrate, *, trained: bool) -> Samples:
    """The samples of a calibration of a model, made from its data set.

    trained  whether the model is trained afterwards
    """
    config = open_config(directory)
    model_class = class_of(config)
    if model_class is None:
        raise CheckpointError(
            directory / "config.json",
            f"architectures {config.architectures}; calibration runs the model and needs a class "
            f"of transformers {transformers.__version__}",
            remedy="Convert it without --dataset, or install the version that has the class",
        )
    length = calibration.seq_len or MAX_SEQ_LEN
    tokenizer = open_tokenizer(directory) if has_tokenizer(directory) else None
    return read(
        calibration,
        config=config,
        model_class=model_class,
        tokenizer=tokenizer,
        generate=_writer(directory, model_class) if calibration.dataset == SELF else None,
        ear=ear_for(calibration.dataset, directory, model_class, tokenizer),
        batch_size=max(1, TOKENS_IN_BATCH // length),
        trained=trained,
    )


def _writer(directory: Path, model_class: Any) -> Generate:
    """Lets the source model write text, loaded when it is first asked to."""

    @cache
    def model() -> Any:
        return model_class.from_pretrained(directory, dtype="auto").eval()

    @torch.inference_mode()
    def write(prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Sample from the model, token by token, at temperature 1: (n, p) -> (n, length) int64."""
        ids, memory = prompt, dict[str, Any]()
        while ids.shape[1] < length:  # a model without a memory reads all of it again
            output = model()(input_ids=ids[:, -1:] if memory else ids, use_cache=True, **memory)
            memory = cache_of(output)
            probabilities = output.logits[:, -1].float().softmax(-1).cpu()
            new = torch.multinomial(probabilities, 1, generator=generator)
            ids = torch.cat([ids, new], 1)
        return ids[:, :length].clone()

    return write


def _budget(
    source: Checkpoint,
    tensors: Sequence[TensorPlan],
    samples: Samples,
    target_bpw: float,
    folder: Path,
    world: World,
    **how: Any,
) -> list[TensorPlan]:
    """Spend the bits, or read how they were spent before the run was broken off.

    how  further arguments of `allocate`
    """
    forms = world.firsts(_left_at(folder / BUDGET))
    if forms is not None:
        names = ("group_size", "planes", "zeros")
        return [
            replace(t, **dict(zip(names, forms[t.name], strict=True))) if t.ternary else t
            for t in tensors
        ]
    found = allocate(source, tensors, samples.heldout, target_bpw, world=world, **how)
    if world.rank == 0:
        _leave(folder / BUDGET, {t.name: [t.group_size, t.planes, t.zeros] for t in found})
    return found


def _quality(run: Calibration, samples: Samples) -> dict[str, Figure]:
    """Run the calibration, and measure the packed model against the source on the report set."""
    model = run.blocks.model
    compare = partial(_compared, kind_of(type(model), model.config), samples.first)
    own = [(index, compare(samples.report[index], *pair)) for index, *pair in run.run()]
    found = sorted(sum(run.world.all(own), []), key=lambda each: each[0])
    return _figures([each for _, each in found])


def quality_of(
    model_class: Any,
    config: Any,
    outputs: Iterable[tuple[Mapping[str, Tensor], Any, Any]],
    first: int,
) -> dict[str, Figure]:
    """The figures of a model against its source, from what both give for some batches.

    outputs  (batch, the source's output or None, the model's output)
    first    position of a window whose token is the first that counts as predicted

    Language models: perplexity of both, KL divergence, top-1 agreement, as `evaluate` defines them.
    Others: cosine of the pooled embeddings (encoders), or of all outputs.
    """
    compare = partial(_compared, kind_of(model_class, config), first)
    return _figures([compare(*each) for each in outputs])


# of a batch: for each sample what `summarize` takes, or its cosine
_Compared = tuple[list[Any], Tensor | None]


def _compared(
    kind: str, first: int, batch: Mapping[str, Tensor], float_output: Any, packed_output: Any
) -> _Compared:
    """What the figures need of both outputs for a batch."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    both = [each for each in (packed_output, float_output) if each is not None]
    mask = batch.get("decoder_attention_mask")  # of decoders that write what is heard
    words = kind in (CAUSAL, ENCODER_DECODER) or mask is not None
    if words and getattr(packed_output, "logits", None) is not None and ids is not None:
        rows = []
        for row in range(len(ids)):
            end = ids.shape[1] if mask is None else int(mask[row].sum())
            if end <= first:  # nothing is said, or written
                continue
            logits = [output.logits[row, : end - 1] for output in both]
            rows.append(compare_logits(logits, ids[row, :end], first))
        return rows, None
    ours, theirs = (pool(output[0], batch.get("attention_mask")) for output in both)
    return [], (ours * theirs).sum(-1)


def _figures(found: Sequence[_Compared]) -> dict[str, Figure]:
    rows = [row for each, _ in found for row in each]
    if rows:
        return summarize(torch.tensor(rows, dtype=torch.float64).T)
    cosines = [each for _, each in found if each is not None]
    return {"cosine": mean_of(torch.cat(cosines).double())}
