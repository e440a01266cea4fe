"""What the steps of a training cost: memory and time, whatever they bring.

    python benchmarks/training_memory.py MODEL TEXT [--steps N] [--part N] [--only NAME ...]
        [--json OUT.json]

MODEL is a checkpoint with its tokenizer, TEXT what is trained on. Each row of VARIANTS takes as
many steps, of PART tokens in windows of 256, by `ternarize train`'s own loop from the weights as
`itf` rounds them, without a look at held-out text; in a process of its own. Beside tokens a second
there are seconds of processor time for a thousand tokens, which say more where other work is done.
Bytes are for each weight of the model:

    state   parameters of student and teacher (what they share counts once), gradients and the
            optimizer's, counted after the last step
    peak    the most memory that the process has had in the steps, above what it had before the
            models were there (Linux); what stays of reading and rounding them is in it
    above   what the steps need above what was in use before the first one: gradients, moments and
            activations

Of the processor's seconds there is also the teacher's share, up to its last hidden states: what
answers of its that are kept could save of a second pass over a text.
"""

import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import hide_bars, parser, write_figures
from torch import Tensor

from ternarize.calibrate.blocks import Blocks
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe, Train
from ternarize.qat.schedule import parameter_groups
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.train.loop import Job, tokens_at_once, train
from ternarize.train.objectives import objective
from ternarize.train.optimizer import make_optimizer
from ternarize.train.recompute import recompute_blocks
from ternarize.train.run import LATENT_RATE, open_training
from ternarize.train.students import Pair, make_pair

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, recomputed": {"recompute": True},
    "adafactor": {"optimizer": "adafactor"},
    "adafactor, recomputed": {"optimizer": "adafactor", "recompute": True},
    "adamw, towards the text": {"objective": "text"},
}
COLUMNS = {
    "tokens_per_second": ".1f",
    "processor": ".1f",
    "teacher": ".3f",
    "state": ".2f",
    "peak": ".2f",
    "above": ".2f",
}


def row_of(name: str, model: Path, text: Path, steps: int, part: int) -> dict[str, Any]:
    """Train a variant for some steps."""
    hide_bars()
    options = {"texts": (str(text),), "steps": steps, "batch": part, "train_len": 256}
    training = Train(**{**options, **VARIANTS[name]})
    plan = make_plan(model, Recipe("itf", 64, scale_bits=8, train=training))
    data = open_training(plan)
    before = _memory("VmRSS")
    tensors = {t.name: t for t in plan.tensors}
    blocks = Blocks(plan.source, [t.name for t in plan.tensors if t.ternary])
    pair = make_pair(blocks, {}, tensors, training, "learned", "none", "cpu")
    if training.recompute:
        recompute_blocks(pair.student, blocks.paths)
    groups = parameter_groups(pair.student, LATENT_RATE, relative=True)
    optimizer = make_optimizer(groups, training.optimizer)
    spent = _timed(pair)

    def clock(sign: int) -> None:
        spent["steps"] += sign * time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            training,
            Path(folder),
            pair.trained(),
            optimizer,
            objective(pair, data.common, data.first, 0, data.pad, 1.0),
            held=lambda: 0.0,
            keep=lambda file, loss: None,
            known={},
            told=lambda step, done, figures: clock(1),
            part=tokens_at_once("cpu"),
            at=lambda done, _: clock(-1 if done < 1 else 0),
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        loaded = _memory("VmRSS")
        progressed = train(job, data.stream)
        peak = _memory("VmHWM")
    models = [m for m in (pair.student, pair.teacher) if m is not None]
    state = [p for m in models for p in (*m.parameters(), *m.buffers())]
    state += [p.grad for p in pair.trained().values() if p.grad is not None]
    state += [v for own in optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
    weights = sum(t.info.numel for t in plan.tensors if not t.tied_to)
    return {
        "name": name,
        "tokens": progressed.tokens,
        "tokens_per_second": progressed.tokens / progressed.seconds,
        "processor": spent["steps"] / progressed.tokens * 1000,
        "teacher": spent["teacher"] / spent["steps"],
        "weights": weights,
        "trained": sum(p.numel() for p in pair.trained().values()),
        "state": _bytes_of(state) / weights,
        "peak": (peak - before) / weights,
        "above": (peak - loaded) / weights,
    }


def _timed(pair: Pair) -> dict[str, float]:
    """Seconds of processor time: of the teacher's forwards as they go on, and 0 of steps."""
    spent = {"teacher": 0.0, "steps": 0.0}
    hidden = pair.hidden

    def timed(model: Any, batch: Any) -> Tensor:
        begun = time.process_time()
        found = hidden(model, batch)
        spent["teacher"] += (time.process_time() - begun) * (model is pair.teacher)
        return found

    pair.hidden = timed  # type: ignore[method-assign]
    return spent


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors hold, those that share memory once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _memory(field: str) -> int:
    """Of this process, bytes: VmRSS, what it has; VmHWM, the most that it has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of bytes a weight and of speed."""
    lines = [
        "| | tokens/s | processor s / 1,000 | teacher | state, bytes a weight | peak | for steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], *(f"{row[name]:{style}}" for name, style in COLUMNS.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="checkpoint directory")
    arguments.add_argument("text", type=Path, help="text to train on")
    arguments.add_argument("--steps", type=int, default=2, help="of each row")
    arguments.add_argument("--part", type=int, default=2048, help="tokens of a step")
    names = list(VARIANTS)
    arguments.add_argument("--only", nargs="*", choices=names, default=names, help="rows")
    args = arguments.parse_args()
    open_checkpoint(args.model)
    rows = []
    for name in args.only:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            given = (name, args.model, args.text, args.steps, args.part)
            rows.append(alone.submit(row_of, *given).result())
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(rows))
    write_figures(args.json, __file__, {"steps": args.steps, "part": args.part, "rows": rows})


if __name__ == "__main__":
    main()
