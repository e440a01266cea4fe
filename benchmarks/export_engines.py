"""A small language model in every engine that an export is for: size, exactness, quality, speed.

    python benchmarks/export_engines.py SOURCE TEXT WORK [--json OUT.json]

SOURCE is a checkpoint whose columns are multiples of 256, TEXT a text with documents between lines
`<|doc|>`, WORK an empty folder for what is packed and exported. Each row packs by `itf` with the
groups that its target holds exactly. Every engine runs in a process of its own, in which ternarize
cannot be imported, on the same windows of 256 token ids: the perplexity is over all positions but
the first of each, and the top-1 agreement is with ternarize on the same packed model. Speed is of
64 tokens written one by one behind a prompt of 128, in one process with as many threads. Engines
that are not installed (llama-cpp-python, mlx-lm) are left out.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import hide_bars, parser, write_figures
from torch import Tensor, nn

import ternarize
from ternarize.convert.run import convert
from ternarize.measure.documents import cut_windows, read_documents
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.publish.export import export
from ternarize.runtime.decode import cache_of

SEQ_LEN, PROMPT, WRITTEN = 256, 128, 64
# name -> (target, options of the export, group size, activations, engine)
ROWS: dict[str, tuple[str, dict[str, Any], int, str, str]] = {
    "dense": ("dense", {}, 128, "none", "transformers"),
    "gemma-int2": ("gemma-int2", {}, -1, "none", "transformers"),
    "bitnet": ("bitnet", {}, 0, "int8", "transformers"),
    "gguf tq1_0": ("gguf", {"kind": "tq1_0"}, 256, "int8", "llama.cpp"),
    "gguf tq2_0": ("gguf", {"kind": "tq2_0"}, 256, "int8", "llama.cpp"),
    "gguf q2_0": ("gguf", {"kind": "q2_0"}, 128, "int8", "llama.cpp"),
    # float32: MLX on a CPU has no fast products of float16
    "mlx": ("mlx", {"dtype": "float32"}, 128, "none", "mlx"),
}

COMMON = """
import json, sys, time
sys.modules["ternarize"] = None  # an import of it fails
import numpy as np
job = json.load(sys.stdin)
windows, threads, prompt, written = (job[k] for k in ("windows", "threads", "prompt", "written"))
flat = [token for window in windows for token in window]
"""
ENGINES = {
    "transformers": """
import torch, transformers
torch.set_num_threads(threads)
model = transformers.AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float32)
torch.set_grad_enabled(False)
logits = np.stack([model(torch.tensor([w])).logits[0].numpy() for w in windows])
out = model(torch.tensor([flat[:prompt]]), use_cache=True)
(name,) = {"cache", "past_key_values"}.intersection(out)  # by the version of transformers
began = time.perf_counter()
for token in flat[prompt : prompt + written]:
    out = model(torch.tensor([[token]]), use_cache=True, **{name: out[name]})
""",
    "mlx": """
import mlx.core as mx, mlx_lm
from mlx_lm.models.cache import make_prompt_cache
mx.set_default_device(mx.cpu)
model, _ = mlx_lm.load(job["path"])
logits = np.stack([np.array(model(mx.array([w]))[0].astype(mx.float32)) for w in windows])
cache = make_prompt_cache(model)
mx.eval(model(mx.array([flat[:prompt]]), cache=cache))
began = time.perf_counter()
for token in flat[prompt : prompt + written]:
    mx.eval(model(mx.array([[token]]), cache=cache))
""",
    "llama.cpp": """
import llama_cpp
more = dict(n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)
model = llama_cpp.Llama(job["path"], n_ctx=256, n_batch=256, **more)
logits = []
for window in windows:
    model.reset()
    model.eval(window)
    logits.append(np.array(model.scores[: len(window)]))
logits = np.stack(logits)
model.reset()
model.eval(flat[:prompt])
began = time.perf_counter()
for token in flat[prompt : prompt + written]:
    model.eval([token])
""",
}
END = """
json.dump({"speed": written / (time.perf_counter() - began)}, open(job["out"] + ".json", "w"))
np.save(job["out"], logits)
"""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("source", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--positions", type=int, default=2048)
    arguments.add_argument("--threads", type=int, default=2)
    given = arguments.parse_args()
    hide_bars()
    torch.set_num_threads(given.threads)
    tokenizer = open_tokenizer(given.source)
    windows = cut_windows(read_documents(given.text), tokenizer, SEQ_LEN, given.positions)
    rows = {}
    print(
        f"{'export':12} {'MB':>6} exact  {'ppl':>7} {'ours':>7}  {'top-1':>6} {'tokens/s':>8} ours"
    )
    for name, (to, options, group_size, activations, engine) in ROWS.items():
        packed = given.work / f"packed{group_size}-{activations}"
        if not packed.exists():
            convert(given.source, packed, Recipe("itf", group_size, activations=activations))
        path = given.work / name.replace(" ", ".")
        report = export(packed, path, to, **options)
        found = run(engine, path, windows, given)
        if found is None:
            print(f"{name:12} {report['bytes'] / 1e6:6.2f} {engine} is not installed")
            continue
        theirs, speed = found
        ours, our_speed = here(packed, windows)
        rows[name] = {
            "engine": engine,
            "group_size": group_size,
            "bytes": report["bytes"],
            "exact": report["exact"],
            "largest_error": max((row["relative_error"] for row in report["errors"]), default=0.0),
            "perplexity": perplexity(theirs, windows),
            "our_perplexity": perplexity(ours, windows),
            "top1_agreement": float((theirs.argmax(-1) == ours.argmax(-1)).double().mean()),
            "tokens_per_second": speed,
            "our_tokens_per_second": our_speed,
        }
        row = rows[name]
        print(
            f"{name:12} {row['bytes'] / 1e6:6.2f} {row['exact']!s:5}  {row['perplexity']:7.3f} "
            f"{row['our_perplexity']:7.3f}  {row['top1_agreement']:6.4f} {speed:8.1f} "
            f"{our_speed:.1f}",
            flush=True,
        )
    figures = {"model": given.source.name, "positions": windows.numel(), "threads": given.threads}
    write_figures(given.json, __file__, {**figures, "rows": rows})


def run(engine: str, path: Path, windows: Tensor, given: Any) -> tuple[Tensor, float] | None:
    """Logits and speed in another engine; None where it is not installed."""
    out = str(given.work / "logits.npy")
    job = {"path": str(path), "out": out, "windows": windows.tolist(), "threads": given.threads}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + ENGINES[engine] + END],
        input=json.dumps({**job, "prompt": PROMPT, "written": WRITTEN}),
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
    )
    if done.returncode:
        if "ModuleNotFoundError" in done.stderr:
            return None
        raise RuntimeError(done.stderr[-3000:])
    speed: float = json.loads(Path(out + ".json").read_text())["speed"]
    return torch.from_numpy(np.load(out)), speed


def here(packed: Path, windows: Tensor) -> tuple[Tensor, float]:
    """Logits and speed of ternarize, in float32 with activations as on record."""
    model = ternarize.load(packed, dtype="float32")
    flat = windows.flatten()
    with torch.no_grad():
        logits = torch.cat([model(window[None]).logits for window in windows])
        out = model(flat[None, :PROMPT], use_cache=True)
        began = time.perf_counter()
        for token in flat[PROMPT : PROMPT + WRITTEN]:
            out = model(token.view(1, 1), use_cache=True, **cache_of(out))
        seconds = time.perf_counter() - began
    return logits, WRITTEN / seconds


def perplexity(logits: Tensor, windows: Tensor) -> float:
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(float(losses))


if __name__ == "__main__":
    main()
