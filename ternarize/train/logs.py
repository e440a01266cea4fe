"""Where a training is logged: whatever accelerate's trackers know."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

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
    try:
        from accelerate import Accelerator
    except ImportError:
        raise UsageError(
            "--report-to",
            "needs accelerate, which is not installed",
            "it",
            "Run pip install 'ternarize[train]'",
        ) from None
    try:
        folder = output.with_name(output.name + ".logs")
        accelerator = Accelerator(log_with=list(names), project_dir=str(folder), cpu=True)
        accelerator.init_trackers(output.name)
    except (ValueError, ImportError) as error:
        raise UsageError(
            "--report-to",
            f"{', '.join(names)} cannot be used ({first_line(error)})",
            "the name of a tracker that accelerate knows, and its package",
            "Install it, or leave it out",
        ) from None
    found = {tracker.name for tracker in accelerator.trackers}
    if missing := [name for name in names if name not in found]:
        raise UsageError(
            "--report-to",
            f"{missing[0]}, whose package is not installed",
            "a tracker that is",
            f"Run pip install {missing[0]}",
        )

    def log(step: int, figures: Mapping[str, float]) -> None:
        accelerator.log(dict(figures), step=step)

    try:
        yield log
    finally:
        accelerator.end_training()
