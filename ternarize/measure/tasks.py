"""Tasks of the lm-evaluation-harness, run on a packed language model."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ternarize.errors import CheckpointError, TernarizeError, UsageError, first_line, is_no_memory
from ternarize.measure.measured import Measured, compute_dtype, shared_tokenizer
from ternarize.models.reads import CAUSAL, longest_text
from ternarize.trits.ternary import check_device


def evaluate_tasks(
    packed: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    activations: str | None = None,
) -> dict[str, Any]:
    """Run tasks of the lm-evaluation-harness on a packed language model.

    packed        directory or Hub id; an ordinary checkpoint can be measured too
    tasks         names of its tasks or groups, e.g. ["arc_easy", "piqa"]; most fetch their data, or
                  take it from the cache of the Hub
    include_path  directory with tasks of your own (.yaml), whose data may lie on the disk
    limit         use no more than the first examples of each task
    batch_size    examples at a time; None: 1
    others        as in `evaluate`

    Returns {"kind", "model", "harness": its version, "dtype", "device", "limit", "tasks": {task:
    {metric: {"value", "standard_error"}}}}.

    Raises UsageError where the harness is not installed or knows no such task, CheckpointError when
    the model cannot be loaded, the data of a task cannot be had, or it fails.

    https://github.com/EleutherAI/lm-evaluation-harness
    """
    for name, value in (("limit", limit), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(name, f"{value}", "at least 1", "Use a larger number")
    harness, models, known = _harness(tasks, include_path)
    measured = Measured.at(packed)
    if measured.kind != CAUSAL:
        raise UsageError(
            measured.directory, f"is an {measured.kind}", f"a {CAUSAL} to run tasks on"
        )
    tokenizer = shared_tokenizer([measured])
    device = device if device == "auto" else check_device(device)
    model = measured.load(device, compute_dtype(dtype, device), activations)
    wrapped = models.HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size or 1,
        max_length=longest_text(measured.config, tokenizer),
    )
    try:
        found = harness.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=known, limit=limit, log_samples=False
        )
    except (MemoryError, TernarizeError):
        raise
    except Exception as error:  # loaders, templates and metrics of a task raise what they like
        if is_no_memory(error):
            raise
        raise _not_run(tasks, error) from error
    return {
        "kind": CAUSAL,
        "model": str(packed),
        "harness": harness.__version__,
        "dtype": str(model.dtype)[6:],
        "device": str(model.device),
        "limit": limit,
        "tasks": {task: _metrics(row) for task, row in found["results"].items()},
    }


def _not_run(tasks: Sequence[str], error: Exception) -> CheckpointError:
    """The error of tasks that the harness began and could not run."""
    cause = error.__cause__ or error.__context__
    why = f"{type(error).__name__}: {first_line(error)}"
    if cause is not None and not isinstance(error, OSError):  # which say themselves what is missing
        why += f"; {type(cause).__name__}: {first_line(cause)}"
    found, where = f"cannot be run ({why[:300]})", f"--tasks {','.join(tasks)}"
    if isinstance(error, OSError):
        return CheckpointError(
            where,
            found,
            "its data on this disk, in the cache of the Hub or on the network",
            "Run it once where there is a network, or tasks of your own on data that lie here "
            "(--include-path)",
        )
    return CheckpointError(
        where,
        found,
        "a task that runs",
        "Repair its data or its .yaml; --debug says where it fails",
    )


def _harness(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, Any, Any]:
    """The harness, its models of transformers, and the tasks that it knows; raises UsageError."""
    include = None if include_path is None else Path(include_path).expanduser()
    if include is not None and not include.is_dir():
        raise UsageError(include_path, "no such directory", "one with tasks", "Check it")
    names = ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
    try:
        harness, models, task_list = map(importlib.import_module, names)
    except ImportError as error:
        raise UsageError(
            "--tasks",
            f"the lm-evaluation-harness cannot be imported ({error})",
            "it",
            "Run pip install 'ternarize[lm-eval]'",
        ) from None
    known = task_list.TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if not known.match_tasks([task]):
            raise UsageError(
                "--tasks",
                f"{task!r} is no task of lm_eval {harness.__version__}",
                "one of `lm_eval ls tasks`, or of --include-path",
                "Check the name",
            )
    return harness, models, known


def _metrics(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc,none": x, "acc_stderr,none": y, ...} -> {"acc": {"value": x, "standard_error": y}}."""
    metrics = {}
    for key, value in row.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = row.get(f"{metric}_stderr,{kept}")
            error = float(error) if isinstance(error, (int, float)) else None
            name = metric if kept == "none" else f"{metric} ({kept})"
            metrics[name] = {"value": float(value), "standard_error": error}
    return metrics
