"""What each of several processes does in test_train_ranks.py: trainings, or a command.

    python tests/training_ranks.py FILE      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

FILE is JSON: {"jobs": [[source, output, text, options], ...], "die": [rank, name, count],
"cli": [...], "save_every": seconds, "signal": number}. The process of that rank is sent the signal,
SIGKILL if none is named, where it calls a function of DYING for the count-th time in the last job,
unless torchrun has started it again.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrating
import torch
from safetensors import safe_open
from test_train_cli import Fake, tracking
from test_train_run import recipe_of
from torch import Tensor

from ternarize.calibrate import gptq
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.convert.scratch import train_from_scratch
from ternarize.plans.recipe import Recipe, Train
from ternarize.ranks import World, ranks_of_launcher
from ternarize.train import loop, parallel, students
from ternarize.train import run as train_run
from ternarize.train.state import STATE

# few candidates for each matrix, and few looks; gradients in several pieces
QUICK: list[tuple[Any, str, Any]] = [
    *(
        (gptq, "ROUNDS", 1),
        (gptq, "SWEEPS", 1),
        (gptq, "DAMPINGS", (0.1,)),
        (gptq, "PULLS", (0.3,)),
    ),
    *((loop, "LOOKS", 4), (parallel, "AT_ONCE", 10_000)),
    # also where a processor is faster in bfloat16, of which sums in another order would be seen
    *((module, "fast_dtype", lambda device: torch.float32) for module in (students, train_run)),
]
DYING: dict[str, tuple[Any, str]] = {
    "add": (parallel.Gradients, "add"),
    "take": (parallel.Gradients, "take"),
    "held": (train_run, "held_loss"),
    "save": (loop, "save_state"),
}


def recipe(text: str, options: dict[str, Any]) -> Recipe:
    """Steps of four micro-batches of a sample each; with `num_samples` after a calibration."""
    own = {"micro_batch": 16, **options}
    if "num_samples" not in own:
        return recipe_of(text, **own)
    base = calibrating.recipe(Path(text), num_samples=own.pop("num_samples"), rotation=0)
    train = Train(**{"steps": 4, "batch": 64, "train_len": 16, "lr": 0.01, **own})
    return Recipe("gptq", 32, calibrate=base.calibrate, train=train)


def local(tensor: Any) -> Tensor:
    """What a process has of a tensor."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def step_of(folder: Path) -> int:
    """How far the state in a folder is, 0 without one."""
    if not (folder / STATE).exists():
        return 0
    with safe_open(folder / STATE, framework="pt") as state:
        return int(json.loads(state.metadata()["facts"])["progressed"]["step"])


def noted(file: Path) -> None:
    """Have written what stands in this process when a training begins: of the parameters how many
    weights ("own"), of how many ("all"), the bytes of all tensors ("held"), and the step that the
    state in its folder is of ("step").
    """
    train = loop.train

    def noting(job: Any, samples: Any) -> Any:
        own = sum(local(p).numel() for p in job.parameters.values())
        whole = sum(p.numel() for p in job.parameters.values())
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        stored = [local(t).untyped_storage() for t in tensors]
        held = {each.data_ptr(): each.nbytes() for each in stored if each.data_ptr()}
        about = {"own": own, "all": whole, "held": sum(held.values())}
        file.write_text(json.dumps({**about, "step": step_of(job.folder)}))
        return train(job, samples)

    setattr(train_run, "train", noting)  # noqa: B010


def trained(job: list[Any], world: World | None = None) -> dict[str, Any]:
    """One training: [source, output, text, options]."""
    source, output, text, options = job
    run = train_from_scratch if options.get("from_scratch") else convert
    return run(source, output, recipe(text, options), world=world)


def dying(function: Callable[..., Any], left: int, number: int) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    return called


def main(file: Path) -> None:
    asked = json.loads(file.read_text("utf-8"))
    for module, name, value in QUICK:
        setattr(module, name, value)
    torch.set_num_threads(1)
    setattr(loop, "SAVE_EVERY", asked.get("save_every", loop.SAVE_EVERY))  # noqa: B010

    def last() -> None:
        rank, name, count = asked.get("die", (-1, "", 0))
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and int(os.environ["RANK"]) == rank:
            where, own = DYING[name]
            number = asked.get("signal", signal.SIGKILL)
            setattr(where, own, dying(getattr(where, own), count, number))

    if "cli" in asked:
        tracking.LOGGER_TYPE_TO_CLASS["tensorboard"] = Fake
        tracking._available_trackers = [tracking.LoggerType.TENSORBOARD]
        last()
        app(asked["cli"])
    noted(file.with_suffix(f".weights-{os.environ['RANK']}"))
    with ranks_of_launcher() as world:
        for job in asked["jobs"]:
            if job is asked["jobs"][-1]:
                last()
            trained(job, world)
            file.with_suffix(f".{world.rank}").write_text(json.dumps(world.sent))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
