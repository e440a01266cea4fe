"""Where a training is logged: whatever accelerate's trackers know."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ternarize.errors import UsageError, first_line
from ternarize.train.run import Log


@contextmanager
def logging_to(names: Sequence[str], output: Path) -> Iterator[Log | None]:
    """A function that logs a step's figures to trackers, None without any.

    names   of trackers: "tensorboard", "wandb", ...
    output  of the training; what trackers write on this disk goes into OUTPUT.logs

    Raises UsageError for a tracker that is not known, or whose package is not installed.
    """
    if not names:
        yield None
        return
    accelerator = _open_trackers(names, output)

    def log(step: int, figures: Mapping[str, float]) -> None:
        accelerator.log(dict(figures), step=step)

    try:
        yield log
    finally:
        for tracker in accelerator.trackers:  # `end_training` would end torch's group of processes
            tracker.finish()


def _open_trackers(names: Sequence[str], output: Path) -> Any:
    """accelerate's Accelerator with these trackers."""
    try:
        accelerate: Any = importlib.import_module("accelerate")
        tracking: Any = importlib.import_module("accelerate.tracking")
    except ImportError:
        raise UsageError(
            "--report-to",
            "trackers are accelerate's, which is not installed",
            "it",
            "Run pip install 'ternarize[train]'",
        ) from None
    known, available = tracking.LOGGER_TYPE_TO_CLASS, [*map(str, tracking.get_available_trackers())]
    for name in names:
        if name not in known:
            raise UsageError("--report-to", f"{name!r}", f"one of {', '.join(known)}")
        if name in map(str, tracking.LoggerType) and name not in available:
            remedy = f"Run pip install {name}"
            raise UsageError("--report-to", f"{name} is not installed", "it", remedy)
    folder = output.with_name(output.name + ".logs")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        accelerator = accelerate.Accelerator(
            log_with=list(names), project_dir=str(folder), cpu=True
        )
        accelerator.init_trackers(output.name)
    except Exception as error:  # a tracker has a service of its own, and raises what it likes
        raise UsageError(
            "--report-to",
            f"{', '.join(names)} cannot be used ({first_line(error)})",
            "a tracker that starts",
            "Set it up, or leave it out",
        ) from error
    return accelerator
