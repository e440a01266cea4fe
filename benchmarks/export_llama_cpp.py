"""A packed language model here and in llama.cpp, which reads its export to GGUF.

    python benchmarks/export_llama_cpp.py MODEL TEXT [--types tq2_0 tq1_0] [--json OUT.json]

MODEL is a packed checkpoint that the types hold exactly, TEXT a text with documents between lines
`<|doc|>`. Needs llama-cpp-python. llama.cpp rounds the input of a ternary product to 8 bits in
blocks of 256 values; ternarize, with activations int8, a token at a time. Both run on the same
windows of token ids. The *twin* is the dense model with llama.cpp's rounding: of inputs in blocks
of 256 values, of the head's input to float16. It is compared with llama.cpp on keys and values in
float32 (they are float16 otherwise). What is left is the order of sums: a value near the middle of
two integers is rounded to the other one, and that spreads. How much, the twin in float64 against
the twin in float32 shows. Positions of all windows count for agreement, all but the first of each
for perplexity; `clear` are positions where the first of two likeliest tokens is ahead by 0.1 nats.
"""

import importlib
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import hide_bars, parser, write_figures
from torch import Tensor, nn

import ternarize
from ternarize.measure.bench import bench
from ternarize.measure.documents import cut_windows, read_documents
from ternarize.models.reads import open_tokenizer
from ternarize.publish.export import export
from ternarize.runtime.modules.linear import TernaryLinear

llama_cpp: Any = importlib.import_module("llama_cpp")  # has no types for us
Engine = Any
BLOCK = 256
SEQ_LEN = 256
PROMPTS = ("The function returns", "This proposal describes")
NEW_TOKENS = 32
F32 = 0  # ggml's number of the type


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("--types", nargs="+", default=["tq2_0", "tq1_0"])
    arguments.add_argument("--positions", type=int, default=2048)
    arguments.add_argument("--threads", type=int, default=2)
    given = arguments.parse_args()
    hide_bars()
    torch.set_num_threads(given.threads)
    tokenizer = open_tokenizer(given.model)
    documents = read_documents(given.text)
    windows = cut_windows(documents, tokenizer, SEQ_LEN, given.positions)
    models = {
        "ours, int8": ternarize.load(given.model, dtype="float32", activations="int8"),
        "ours, float": ternarize.load(given.model, dtype="float32", activations="none"),
        "twin": twin(given.model, "float32"),
        "twin, float64": twin(given.model, "float64"),
    }
    ours = {name: logits_of(model, windows) for name, model in models.items()}
    speed = bench(models["ours, int8"], prompt=128, decode=64, batch=1, repeats=3)
    figures: dict[str, Any] = {
        "model": given.model.name,
        "positions": windows.numel(),
        "perplexity": {name: perplexity(logits, windows) for name, logits in ours.items()},
        "tokens_per_second": {
            "ours, int8": [speed["prompt_tokens_per_second"], speed["decode_tokens_per_second"]]
        },
        "twins": compare(ours["twin"], ours["twin, float64"], windows),
        "types": {},
    }
    for name, value in figures["perplexity"].items():
        print(f"{name:13} perplexity {value:.4f}")
    print(f"twins against each other: {words(figures['twins'])}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.types:
            path = Path(folder) / f"{kind}.gguf"
            report = export(given.model, path, "gguf", kind=kind)
            engine = open_engine(path, given.threads)
            theirs = torch.stack([engine_logits(engine, window) for window in windows])
            wide = open_engine(path, given.threads, type_k=F32, type_v=F32)
            wide_logits = torch.stack([engine_logits(wide, window) for window in windows])
            wide.close()
            row: dict[str, Any] = {
                "bytes": report["bytes"],
                "exact": report["exact"],
                "perplexity": perplexity(theirs, windows),
                "against": {
                    name: compare(wide_logits if "twin" in name else theirs, logits, windows)
                    for name, logits in ours.items()
                },
                "equal_tokens": same_tokens(engine, tokenizer, documents[:50]),
                "tokens_per_second": engine_speed(engine, windows),
                "continuations": continuations(engine, models["ours, int8"], tokenizer),
            }
            figures["types"][kind] = row
            show(kind, row)
            engine.close()
    write_figures(given.json, __file__, figures)


def open_engine(path: Path, threads: int, **options: Any) -> Engine:
    return llama_cpp.Llama(
        str(path),
        n_ctx=SEQ_LEN,
        n_batch=SEQ_LEN,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
        **options,
    )


def twin(path: Path, dtype: str) -> Any:
    """The dense model with inputs of ternary layers rounded as llama.cpp does."""
    packed = ternarize.load(path)
    layers = {name for name, m in packed.named_modules() if isinstance(m, TernaryLinear)}
    model = ternarize.load(path, dtype=dtype, dequantize=True)
    for name, module in model.named_modules():
        if name in layers:
            module.register_forward_pre_hook(lambda _, inputs: (round_blocks(inputs[0]),))
    if packed.dtype == torch.float16:  # a product with float16 weights takes float16 inputs
        parts: Any = model  # has no annotations
        head = parts.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().to(inputs[0].dtype),))
    return model


def round_blocks(x: Tensor) -> Tensor:
    """Each 256 values along the last dimension: r = 127 / max |x|, round(r x) / r, in float32."""
    blocks = torch.unflatten(x, -1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    factor = 127 / torch.where(largest > 0, largest, 1)
    rounded: Tensor = (blocks * factor).round() * (1 / factor)
    return rounded.flatten(-2)


def logits_of(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(window[None]).logits.float() for window in windows])


def engine_logits(engine: Engine, window: Tensor) -> Tensor:
    engine.reset()
    engine.eval(window.tolist())
    return torch.from_numpy(np.array(engine.scores[: len(window)]))


def perplexity(logits: Tensor, windows: Tensor) -> float:
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(float(losses))


def compare(theirs: Tensor, ours: Tensor, windows: Tensor) -> dict[str, float]:
    """Top-1 agreement, the ratio of perplexities, and the mean KL divergence in nats."""
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    same = (theirs.argmax(-1) == ours.argmax(-1)).double()
    first, second = ours.topk(2, -1).values.unbind(-1)
    return {
        "top1_agreement": float(same.mean()),
        "top1_agreement_where_clear": float(same[first - second > 0.1].mean()),
        "perplexity_ratio": perplexity(theirs, windows) / perplexity(ours, windows),
        "kl_divergence": float((p.exp() * (p - q)).sum(-1).double().mean()),
    }


def same_tokens(engine: Engine, tokenizer: Any, documents: list[str]) -> str:
    """How many documents have the same tokens in both."""
    same = sum(
        engine.tokenize(text.encode(), add_bos=True) == tokenizer(text, verbose=False)["input_ids"]
        for text in documents
    )
    return f"{same} of {len(documents)} documents"


def engine_speed(engine: Engine, windows: Tensor) -> list[float]:
    """Tokens per second: reading 128 at once, then writing 64 one by one; medians of 3."""

    def run(take: Callable[[list[int]], None]) -> tuple[float, float]:
        engine.reset()
        ids = windows.flatten()[:192].tolist()
        began = time.perf_counter()
        take(ids[:128])
        read = time.perf_counter()
        for token in ids[128:]:
            take([token])
        return 128 / (read - began), 64 / (time.perf_counter() - read)

    runs = [run(engine.eval) for _ in range(3)]
    return [sorted(each)[1] for each in zip(*runs, strict=True)]


def continuations(engine: Engine, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Greedy texts of both, and how many tokens they have in common at the start."""
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            mine = list(ids)
            for _ in range(NEW_TOKENS):
                mine.append(int(model(torch.tensor([mine])).logits[0, -1].argmax()))
        engine.reset()
        engine.eval(ids)
        theirs = list(ids)
        for _ in range(NEW_TOKENS):
            theirs.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
            engine.eval(theirs[-1:])
        mine, theirs = mine[len(ids) :], theirs[len(ids) :]
        pairs = list(zip(mine, theirs, strict=True))
        common = next((n for n, (a, b) in enumerate(pairs) if a != b), NEW_TOKENS)
        rows.append(
            {
                "prompt": prompt,
                "ours": tokenizer.decode(mine),
                "llama.cpp": tokenizer.decode(theirs),
                "equal_at_the_start": f"{common} of {NEW_TOKENS} tokens",
            }
        )
    return rows


def words(found: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.5f}" for key, value in found.items())


def show(kind: str, row: dict[str, Any]) -> None:
    print(f"\n{kind}: {row['bytes']:,} bytes, perplexity in llama.cpp {row['perplexity']:.4f}")
    for name, found in row["against"].items():
        print(f"  against {name:13} {words(found)}")
    print(f"  equal tokens: {row['equal_tokens']}")
    print("  tokens per second, read and written:", *(f"{n:.0f}" for n in row["tokens_per_second"]))
    for each in row["continuations"]:
        print(f"  {each['equal_at_the_start']} after {each['prompt']!r}:")
        print(f"    ours      {each['ours']!r}\n    llama.cpp {each['llama.cpp']!r}")


if __name__ == "__main__":
    main()
