"""How fast a whole model runs on the CPU: ours, torch in BF16, and llama.cpp on the same weights.

    python benchmarks/inference.py [--threads 2] [--rounds 7] [--json F]
    pip install gguf llama-cpp-python       # for llama.cpp; it may lie in another folder:
    python benchmarks/inference.py --llama .../site-packages

The model is LLaMA-shaped, of about 1 B parameters (16 layers of synthetic.py), ternarized without
data, with a scale per row or groups of 128. Each engine is a process of its own that sleeps until
it is its turn, so that none disturbs another; in a round each has a turn: a prompt of 128 tokens,
then 32 tokens one at a time (then ours 8 texts at once). Medians and best of the rounds; the
ratios are medians of those within a round.

llama.cpp has the head and the embedding in F16, as they are in ours, in Q8_0 beside our int8, or in
Q4_0, which is our int4 in groups of 32, number for number. Its scales of rows are exact; groups of
128 it cannot have. Resident memory is what a process has more after its first turn than before
loading, when it had already loaded a tiny model. Pages of the file, which the system can drop,
count in it, but not in private memory. The peak is of loading.
"""

import argparse
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import synthetic
import torch
import transformers

import ternarize
from ternarize.convert.run import convert
from ternarize.measure.bench import READ_BYTES, bytes_per_step, read_bandwidth, run
from ternarize.plans.recipe import Recipe
from ternarize.publish.export import export

PROMPT, DECODE, BATCH = 128, 32, 8
MB = 1 << 20
SIZES = ("held_mb", "resident_mb", "private_mb", "peak_mb")
Engine = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(json.loads(sys.argv[2]))
    parser = common.parser(__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--llama", type=Path, help="the folder that llama_cpp is installed in")
    parser.add_argument("--no-llama", action="store_true", help="without llama.cpp")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="engines that have this in their name"
    )
    parser.add_argument("--folder", type=Path, help="where models are kept for the next run")
    args = parser.parse_args()
    common.hide_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        figures = measure(make_engines(folder, args), args.rounds)
    bandwidth = read_bandwidth(args.rounds)
    for one in figures.values():
        if bandwidth and "bytes_per_step" in one:
            one["share_of_bandwidth"] = one["bytes_per_step"] * one["decode"] / bandwidth
    show(figures, args.threads, bandwidth)
    options = {"layers": args.layers, "threads": args.threads, "rounds": args.rounds}
    common.write_figures(
        args.json, __file__, {"options": options, "bandwidth": bandwidth, "engines": figures}
    )


def make_engines(folder: Path, args: argparse.Namespace) -> dict[str, Engine]:
    """Make the models that are not there yet; by name, what each process is to load."""
    source = folder / "source"
    if not source.exists():
        synthetic.write_llama(source, args.layers)
        synthetic.write_llama(folder / "tiny", 1)
    packed = {"rows": -1, "groups of 128": 128}
    for name, group_size in packed.items():
        for path, becomes in ((name, "keep"), (f"{name}, int4 head", "int4")):
            if not (folder / path).exists():
                recipe = Recipe(method="absmean", group_size=group_size, head=becomes)
                convert(source, folder / path, recipe)
    if not (folder / "tiny packed").exists():
        convert(folder / "tiny", folder / "tiny packed", Recipe(method="absmean"))
    engines: dict[str, Engine] = {}
    for name in packed:
        for activations in ("int8", "none"):
            for head in (None, "int8", "int4"):
                label = f"{name}, activations {activations}" + (f", {head} head" if head else "")
                path = f"{name}, int4 head" if head == "int4" else name
                options = {"activations": activations, "head": head if head == "int8" else None}
                engines[label] = {"kind": "ternarize", "path": path, "options": options}
    engines["torch bf16"] = {"kind": "torch", "path": "source"}
    if not args.no_llama:
        for blocks in ("tq2_0", "tq1_0"):
            for head, kept in (("F16", "f16"), ("Q8_0", "q8_0"), ("Q4_0", None)):
                file = folder / f"{blocks}.{head.lower()}.gguf"
                if not file.exists():
                    of = folder / ("rows" if kept else "rows, int4 head")
                    how: Any = {"kind": blocks, "kept_type": kept, "tokenizer": False}
                    export(of, file, "gguf", allow_requantize=True, **how)
                label = f"llama.cpp {blocks.upper()}, {head} head"
                engines[label] = {"kind": "llama", "path": file.name}
    engines = {
        name: engine for name, engine in engines.items() if any(part in name for part in args.only)
    }
    for engine in engines.values():
        engine |= {"folder": str(folder), "threads": args.threads, "llama": str(args.llama or "")}
    return engines


# ------------------------------------------------------------------------------------------------
# A process of one engine: answers each line of its input with a line of figures


def serve(engine: Engine) -> None:
    turn, about = LOADERS[engine["kind"]](engine)
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def load_transformers(engine: Engine) -> tuple[Callable[[], dict[str, float]], dict[str, Any]]:
    common.hide_bars()
    torch.set_num_threads(engine["threads"])
    folder, options = Path(engine["folder"]), engine.get("options", {})
    auto: Any = transformers.AutoModelForCausalLM
    load: Any = ternarize.load if engine["kind"] == "ternarize" else auto.from_pretrained
    load(folder / ("tiny packed" if engine["kind"] == "ternarize" else "tiny"), **options)
    gc.collect()
    before = resident()
    model = load(folder / engine["path"], **options)
    peak = resident()["peak"]
    held = {id(p): p.nbytes for p in (*model.parameters(), *model.buffers())}
    about = {
        "bytes_per_step": bytes_per_step(model),
        "held_mb": sum(held.values()) / MB,
        "peak_mb": peak - before["now"],
    }

    def turn() -> dict[str, float]:
        prompt, decode = run(model, PROMPT, DECODE)
        figures = {"prompt": PROMPT / prompt, "decode": DECODE / decode}
        if engine["kind"] == "ternarize":
            _, seconds = run(model, 8, 8, BATCH)
            figures["batch"] = BATCH * 8 / seconds
        return figures

    turn()
    after = resident()
    about["resident_mb"] = after["now"] - before["now"]
    about["private_mb"] = after["private"] - before["private"]
    return turn, about


def load_llama(engine: Engine) -> tuple[Callable[[], dict[str, float]], dict[str, Any]]:
    if engine["llama"]:
        sys.path.insert(0, engine["llama"])
    llama_cpp: Any = importlib.import_module("llama_cpp")  # has no types for us

    path, threads = str(Path(engine["folder"]) / engine["path"]), engine["threads"]
    before = resident()
    model = llama_cpp.Llama(
        path, n_ctx=256, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(synthetic.VOCAB, (PROMPT + DECODE,), generator=generator).tolist()

    def turn() -> dict[str, float]:
        model.reset()
        began = time.perf_counter()
        model.eval(ids[:PROMPT])
        read = time.perf_counter()
        for token in ids[PROMPT:]:
            model.eval([token])
        done = time.perf_counter()
        return {"prompt": PROMPT / (read - began), "decode": DECODE / (done - read)}

    turn()
    after = resident()
    return turn, {
        "held_mb": Path(path).stat().st_size / MB,
        "resident_mb": after["now"] - before["now"],
        "private_mb": after["private"] - before["private"],
    }


def resident() -> dict[str, float]:
    """MB of this process in memory: now, at most, and without the pages that are those of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"now": "VmRSS", "peak": "VmHWM", "private": "RssAnon"}
    return {key: int(fields[name].split()[0]) / 1024 for key, name in names.items()}


LOADERS = {"ternarize": load_transformers, "torch": load_transformers, "llama": load_llama}


# ------------------------------------------------------------------------------------------------


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, Any]]:
    """By engine: medians and lists of its figures, and what its process said of itself."""
    processes: dict[str, subprocess.Popen[str]] = {}
    figures: dict[str, dict[str, Any]] = {}
    try:
        for name, engine in engines.items():
            command = [sys.executable, "-W", "ignore", __file__, "--serve", json.dumps(engine)]
            pipe = subprocess.PIPE
            processes[name] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            figures[name] = {**answer(processes[name], name), "rounds": []}
        for _ in range(rounds):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                figures[name]["rounds"].append(answer(process, name))
    finally:
        for process in processes.values():
            process.kill()
    for one in figures.values():
        for key in one["rounds"][0]:
            one[key] = statistics.median(each[key] for each in one["rounds"])
            one[f"best_{key}"] = max(each[key] for each in one["rounds"])
    return figures


def answer(process: "subprocess.Popen[str]", name: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{name}: its process ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def show(figures: dict[str, dict[str, Any]], threads: int, bandwidth: float | None) -> None:
    memory = "not measured" if bandwidth is None else f"{bandwidth / 1e9:.1f} GB/s"
    print(f"{threads} threads, reads of {READ_BYTES / MB:.0f} MB: {memory}\n")
    peers = [name for name in figures if "TQ2_0" in name or name.startswith("torch")]
    columns = ["tokens/s", "prompt", "decode", "best", "8 texts", "share of memory's speed"]
    columns += ["MB held", "resident", "private", "peak"]
    columns += [f"prompt, decode x {name}" for name in peers]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for name, one in figures.items():
        cells = [f"{one[key]:.1f}" for key in ("prompt", "decode", "best_decode")]
        cells.append(f"{one['batch']:.0f}" if "batch" in one else "")
        share = one.get("share_of_bandwidth")
        cells.append("" if share is None else f"{share:.2f}")
        cells += [f"{one[k]:.0f}" if k in one else "" for k in SIZES]
        for peer in peers:
            cells.append(
                ", ".join(f"{ratio(one, figures[peer], key):.2f}" for key in ("prompt", "decode"))
            )
        print(f"| {name} | {' | '.join(cells)} |")


def ratio(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    pairs = zip(one["rounds"], other["rounds"], strict=True)
    ratios: list[float] = [a[key] / b[key] for a, b in pairs]
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
