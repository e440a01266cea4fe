"""A packed model in vLLM: beside `ternarize generate`, and beside its source in the same engine.

    python benchmarks/vllm_engine.py PACKED SOURCE [--requests 1 8 32] [--new-tokens 64]
        [--compiled] [--json F]

For an environment with vLLM. Each engine is a process of its own, one after the other: it is
loaded, answers a batch of each size once uncounted and then --rounds times, and says the median of
its tokens per second (those written, of all requests, over the time of the whole batch, its prompts
of 16 tokens included). `generate` is one request with the packed model in transformers, decoded by
the compiled core. vLLM calls operators one by one; with --compiled it compiles the model first, as
it does by itself, which takes a minute where it has not done so before. Resident memory is what the
process has more after its first answers than before loading, so that what vLLM needs beside weights
(a cache of keys and values of 1 GiB, as far as it is touched) is in it; what the packed linear
layers alone hold in vLLM is told as a share of 16 bits a weight. What is written, greedily, is not
looked at.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common

import ternarize
from ternarize.measure.bench import run

PROMPT = 16
CACHE_GIB = 1
Made = tuple[Callable[[int], object], dict[str, Any]]  # what writes, and figures of it
ENGINES = {"generate": "PACKED", "vllm, packed": "PACKED", "vllm, bfloat16": "SOURCE"}


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return print("FIGURES", json.dumps(measured(**json.loads(sys.argv[2]))))
    parser = common.parser(__doc__)
    parser.add_argument("packed")
    parser.add_argument("source")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles the models")
    parser.add_argument("--only", nargs="+", choices=ENGINES)
    args = parser.parse_args()
    found = {}
    for name in args.only or ENGINES:
        found[name] = in_a_process(name, args)
        rates = found[name]["tokens_per_second"].items()
        said = ", ".join(f"{rate:.1f} with {number}" for number, rate in rates)
        print(f"{name}: {found[name]['resident_mb']:.0f} MB, tokens/s {said}", flush=True)
        if "linear_share" in found[name]:
            print(f"linear layers take {found[name]['linear_share']:.1%} of 16 bits a weight")
    asked = {"requests": args.requests, "new_tokens": args.new_tokens, "dtype": args.dtype}
    asked |= {"compiled": args.compiled}
    common.write_figures(args.json, __file__, {**asked, "rounds": args.rounds, "engines": found})


def in_a_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    model = args.packed if ENGINES[name] == "PACKED" else args.source
    given = {"name": name, "model": model, "new_tokens": args.new_tokens, "dtype": args.dtype}
    given |= {"requests": args.requests, "rounds": args.rounds, "compiled": args.compiled}
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    quiet |= {"VLLM_CPU_KVCACHE_SPACE": f"{CACHE_GIB}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    found = subprocess.run(
        [sys.executable, __file__, "--serve", json.dumps(given)],
        env={**os.environ, **quiet},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(each for each in found.stdout.splitlines() if each.startswith("FIGURES "))
    figures: dict[str, Any] = json.loads(line.removeprefix("FIGURES "))
    return figures


def measured(
    name: str,
    model: str,
    new_tokens: int,
    dtype: str,
    requests: list[int],
    rounds: int,
    compiled: bool,
) -> dict[str, Any]:
    """Tokens per second by the number of requests, and the memory that the engine took."""
    make: Callable[[str, str, int], Made] = partial(of_vllm, compiled=compiled)
    if name == "generate":
        make = of_generate
    importlib.import_module("transformers" if name == "generate" else "vllm")
    before = resident()
    write, figures = make(model, dtype, new_tokens)
    write(1)
    figures |= {"resident_mb": (resident() - before) / 2**20}
    rates = {}
    for number in [1] if name == "generate" else requests:
        write(number)
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            write(number)
            seconds.append(time.perf_counter() - began)
        rates[number] = number * new_tokens / statistics.median(seconds)
    return {**figures, "tokens_per_second": rates}


def of_vllm(model: str, dtype: str, new_tokens: int, compiled: bool) -> Made:
    vllm = importlib.import_module("vllm")
    size = {"max_model_len": PROMPT + new_tokens, "max_num_seqs": 32}
    # prompts that were read before are to be read again, and texts are none
    size |= {"enable_prefix_caching": False, "skip_tokenizer_init": True}
    engine = vllm.LLM(model=model, dtype=dtype, enforce_eager=not compiled, **size)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    figures = {}
    if "quantization_config" in json.loads((Path(model) / "config.json").read_text()):
        figures["linear_share"] = engine.apply_model(linear_share)[0]

    def write(number: int) -> object:
        given = [{"prompt_token_ids": prompt(each)} for each in range(number)]
        return engine.generate(given, sampling, use_tqdm=False)

    return write, figures


def linear_share(model: Any) -> float:
    """What the linear layers of vLLM's model hold, by what 16 bits a weight would take."""
    kind = importlib.import_module("vllm.model_executor.layers.linear").LinearBase
    layers = [each for each in model.modules() if isinstance(each, kind)]
    held = sum(each.nbytes for layer in layers for each in layer.parameters())
    return float(held / sum(2 * each.input_size * each.output_size for each in layers))


def of_generate(model: str, dtype: str, new_tokens: int) -> Made:
    loaded = ternarize.load(model, dtype=dtype)
    return lambda number: run(loaded, PROMPT, new_tokens, number), {}


def prompt(number: int) -> list[int]:
    return [(17 * number + 31 * place) % 1000 + 5 for place in range(PROMPT)]


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
