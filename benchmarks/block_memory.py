"""A model trained block by block in the memory of one GPU, under a limit that stands for it.

    python benchmarks/block_memory.py WORK_DIRECTORY [--layers N] [--steps N] [--json OUT.json]

The model that is meant has 8 B parameters: LLaMA with a hidden size of 4096, 32 layers of 14336
inner dimensions and 8 key-value heads of 32, and a vocabulary of 128256. What runs is random and
an eighth as wide (512, 1792, vocabulary 16032): its blocks have 1/64 of the weights, its largest
Hessian 1/64 of the numbers, and with samples an eighth as long (256 of 64 tokens for 256 of 512),
in batches of an eighth of the tokens, its activations are 1/64, too. So 24 GB / 64 stand for 24 GB;
layers, and candidates of a matrix (one here), cost time alone where blocks come one by one, and are
fewer. Each run is a process of its own, in which a tiny model has been converted before. What a GPU
has nothing of is not counted: the memory of block by block is that above what is in use when the
samples wait at the first block, which is the host's.

    free      `convert --dataset --reconstruct STEPS`, and the most memory that it takes (Linux),
              for each weight of a block
    limited   the same with no more data than that limit (RLIMIT_DATA), to the same bytes

The last line is what that makes of the large model, and what a training of all of it holds (by the
plan of its configuration).
"""

import os
import resource
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from filecmp import cmp
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from common import hide_bars, parser, write_figures
from safetensors.torch import save_file

from ternarize.calibrate import gptq, pipeline
from ternarize.convert.run import convert
from ternarize.errors import TernarizeError, is_no_memory
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe, Train
from ternarize.progress import Progress

LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
NARROWER, GB = 8, 24  # times; of the GPU that is meant
SMALL = {n: v // NARROWER if n.endswith("_size") else v for n, v in LARGE.items()}
TINY = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
NO_LIMIT = resource.RLIM_INFINITY
SAMPLES, LENGTH = 256, 64
FEW = {"ROUNDS": 1, "SWEEPS": 1, "DAMPINGS": (0.1,), "PULLS": (0.3,)}  # of gptq: candidates


def weights_of_block(sizes: dict[str, int]) -> int:
    """Weights of the matrices of one layer."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    return hidden * (2 * hidden + 2 * narrow + 3 * inner)


def weights_of_model(sizes: dict[str, int]) -> int:
    """Weights of all matrices, the embedding and an output head of its own among them."""
    ends = 2 * sizes["vocab_size"] * sizes["hidden_size"]
    return sizes["num_hidden_layers"] * weights_of_block(sizes) + ends


def limit() -> int:
    """Bytes that stand for the memory of the GPU."""
    return GB * 10**9 * weights_of_block(SMALL) // weights_of_block(LARGE)


def make_model(work: Path, sizes: dict[str, int], layers: int) -> None:
    """Write a random model, and inputs to calibrate it on."""
    torch.manual_seed(0)
    table: dict[str, Any] = {**sizes, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**table, architectures=["LlamaForCausalLM"])
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(work / "model")
    shape = (SAMPLES * 5 // 4, LENGTH)  # a tenth more choose, another gives the figures
    save_file({"input_ids": torch.randint(sizes["vocab_size"], shape)}, work / "inputs.safetensors")


def whole_gb(work: Path, optimizer: str) -> float:
    """GB that a training of the large model holds beside activations, from its configuration."""
    table: dict[str, Any] = LARGE
    config = transformers.LlamaConfig(
        **table, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16
    )
    config.save_pretrained(work / "large")
    training = Train(texts=("any",), steps=1, optimizer=optimizer)
    plan = make_plan(work / "large", Recipe("itf", train=training), config_only=True)
    return plan.train_memory() / 1e9


def by_blocks(work: Path, output: Path, steps: int, progress: Progress) -> None:
    """Calibrate and train block by block."""
    data = str(work / "inputs.safetensors")
    calibrate = Calibrate(data, num_samples=SAMPLES, rotation=64, reconstruct=steps)
    convert(work / "model", output, Recipe("gptq", 64, calibrate=calibrate), progress=progress)


def measured(work: Path, name: str, steps: int, most: int) -> dict[str, Any]:
    """Run in this process; most: bytes of data that it may have above what it has now, 0: any.

    Both from the first block until packing begins.
    """
    hide_bars()
    for constant, value in FEW.items():
        setattr(gptq, constant, value)
    pipeline.TOKENS_IN_BATCH //= NARROWER
    with TemporaryDirectory() as folder:  # what the program takes by itself is there
        by_blocks(work / "tiny", Path(folder) / "packed", 1, lambda *_: None)
    for place in (work / name, work / f"{name}.partial"):
        shutil.rmtree(place, ignore_errors=True)
    seen, over, ended = list[int](), threading.Event(), "done"

    def look() -> None:
        while not over.wait(0.005):
            seen.append(_memory("RssAnon"))

    def progress(done: int, total: int, text: str, stage: str) -> None:
        if stage == "calibrating" and not seen:
            seen.append(_memory("RssAnon"))
            data = _memory("VmData") + most if most else NO_LIMIT
            resource.setrlimit(resource.RLIMIT_DATA, (data, NO_LIMIT))
            threading.Thread(target=look, daemon=True).start()
        elif stage == "packing":
            over.set()
            resource.setrlimit(resource.RLIMIT_DATA, (NO_LIMIT, NO_LIMIT))

    try:
        by_blocks(work, work / name, steps, progress)
    except Exception as error:
        if not (isinstance(error, TernarizeError) or is_no_memory(error)):
            raise
        ended = str(error)
    over.set()
    return {"name": name, "ended": ended, "peak": max(seen) - seen[0], "most": most}


def _memory(field: str) -> int:
    """Of this process, bytes: RssAnon, what it has of no file; VmData, what it has asked for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path, help="directory for models")
    arguments.add_argument("--layers", type=int, default=1, help="of the model that runs")
    arguments.add_argument("--steps", type=int, default=10, help="of each block")
    args = arguments.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    # what is given back is given back: at this size malloc would keep it for later
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    make_model(args.work, SMALL, args.layers)
    make_model(args.work / "tiny", TINY, 1)
    rows = []
    for name, most in (("free", 0), ("limited", limit())):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            rows.append(alone.submit(measured, args.work, name, args.steps, most).result())
        print(rows[-1], file=sys.stderr, flush=True)
    small, large = weights_of_block(SMALL), weights_of_block(LARGE)
    a_weight = rows[0]["peak"] / small
    files = [args.work / name / "model.safetensors" for name in ("free", "limited")]
    figures = {
        "rows": rows,
        "block": small,
        "bytes_per_weight_of_block": a_weight,
        "same_bytes": all(f.exists() for f in files) and cmp(files[0], files[1], shallow=False),
        "large": {
            "weights": weights_of_model(LARGE),
            "block": large,
            "by_blocks_gb": a_weight * large / 1e9,
            "whole_gb": {name: whole_gb(args.work, name) for name in ("adamw", "adafactor")},
        },
    }
    print("| | limit, MB | peak, MB | bytes a weight of a block | ended |\n|---|---|---|---|---|")
    for row in rows:
        cells = [row["name"], f"{row['most'] / 1e6:.0f}" if row["most"] else "none"]
        cells += [f"{row['peak'] / 1e6:.0f}", f"{row['peak'] / small:.1f}", row["ended"]]
        print(f"| {' | '.join(cells)} |")
    print(f"same bytes: {figures['same_bytes']}; by count: {figures['large']}")
    write_figures(args.json, __file__, figures)


if __name__ == "__main__":
    main()
