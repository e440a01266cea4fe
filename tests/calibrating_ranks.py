"""What each of several processes does in test_calibrate_ranks.py: conversions, or a command.

    python tests/calibrating_ranks.py FILE      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

FILE is JSON: {"jobs": [[source, output, data, options], ...], "die": [rank, solved], "cli": [...]}.
The process of that rank ends at once when it has solved so many matrices of the last job.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrating
import torch

from ternarize.calibrate import gptq, pipeline, solve_block
from ternarize.calibrate.gptq import solve
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.ranks import World, ranks_of_launcher

# few candidates for each matrix, and batches of one sample, so that there are several
QUICK: list[tuple[Any, str, Any]] = [
    *((gptq, name, value) for name, value in calibrating.FEW.items()),
    (pipeline, "TOKENS_IN_BATCH", 1),
]


def converted(job: list[Any], world: World | None = None) -> None:
    """One conversion: [source, output, data, options]."""
    source, output, data, options = job
    convert(source, output, calibrating.recipe(Path(data), **options), world=world)


def dying(solve: Callable[..., Any], left: int) -> Callable[..., Any]:
    def solved(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)
        return solve(*args, **options)

    return solved


def world_rank() -> int:
    return int(os.environ["RANK"])


def main(file: Path) -> None:
    asked = json.loads(file.read_text("utf-8"))
    rank, solved = asked.get("die", (-1, 0))
    for module, name, value in QUICK:
        setattr(module, name, value)
    torch.set_num_threads(1)
    last = dying(solve, solved) if world_rank() == rank else solve
    if "cli" in asked:
        setattr(solve_block, "solve", last)  # noqa: B010
        app(asked["cli"])
    with ranks_of_launcher() as world:
        for job in asked["jobs"]:
            if job is asked["jobs"][-1]:
                setattr(solve_block, "solve", last)  # noqa: B010
            converted(job, world)
            told = file.with_suffix(f".{world.rank}")
            told.write_text(json.dumps(world.sent))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
