"""Other quantizers at about 2 bits on a causal language model, by the protocol of ternarize eval.

    pip install auto-round==0.16.1 gptqmodel==7.6.0 hqq==0.2.8.post1 ternary-quant==0.1.6 gguf
    python benchmarks/peers_model.py MODEL TRAIN EVAL WORK [--only NAME ...] [--ggml LIBRARY]
        [--json OUT.json]

MODEL is a checkpoint with its tokenizer, TRAIN and EVAL are texts whose documents stand apart by
lines `<|doc|>`, WORK a folder for what is made. Everything is as in peers_quality.py, whose
functions quantize: the linear layers of the blocks and nothing else, dense weights decoded from
what a peer stores, bits counted from that. Who calibrates gets the same windows: 96 of 512 tokens,
spread evenly over TRAIN. Each row is quantized in a process of its own, into WORK, and only if it
is not there yet; then those that are new are measured side by side, by the protocol of
`ternarize eval --seq-len 512 --max-tokens 8192`: windows of EVAL that begin with what the tokenizer
puts in front, float32 arithmetic on the CPU, against MODEL itself.

llama.cpp's types are made by `ggml_quantize_chunk` of its library (--ggml: libggml-base.so, which
the source distribution of llama-cpp-python 0.3.36 builds with `cmake --build . --target ggml-base`)
and decoded by the package gguf. The importance of a column is the mean square of its inputs, which
is what llama-imatrix computes, here over the same windows. These types have blocks of 256 columns.
Where a matrix has a number of columns that 256 does not divide, llama-quantize takes a type of 4.5
bits instead ("else"); in the other rows of the table two rows of such a matrix are taken as one, so
that each matrix has the type's bits: no file of llama.cpp can hold that, and it is what the type
would give if one did. llama-quantize's choice of larger types for some matrices is not followed.

"MB" is the whole model: what a peer stores for the matrices, and 16 bits for each other weight.
"""

import ctypes
import importlib
import json
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peers_quality
import torch
from common import hide_bars, parser, write_figures
from peers_quality import Model, Quantized, Variant, inputs, linears, put
from quality_model import MEASURES, cell
from safetensors.torch import load_file, save_file
from torch import Tensor

from ternarize.measure.documents import cut_windows, read_documents
from ternarize.measure.evaluate import open_evaluation
from ternarize.measure.language_models import compare_logits, summarize
from ternarize.models.reads import open_tokenizer

SEQ_LEN, MAX_TOKENS, SAMPLES = 512, 8192, 96


@dataclass(frozen=True)
class Checkpoint(Model):
    """A model that is a directory, calibrated on a text of one's own."""

    train: Path = Path()

    def checkpoint(self, data: Path) -> Path:
        return data

    def calibration(self, data: Path) -> Tensor:
        """Windows spread evenly over the text: (samples, seq_len) int64 token ids."""
        tokenizer = open_tokenizer(data)
        windows = cut_windows(read_documents(self.train), tokenizer, self.seq_len)
        return windows[torch.linspace(0, len(windows) - 1, self.samples).long()]


def column_importance(model: Model, data: Path) -> dict[str, Tensor]:
    """Mean squares of the inputs of each linear layer of the blocks, by column: (cols,) float32."""
    network = model.load(data)
    sums: dict[str, Tensor] = {}

    def add(name: str, module: Any, args: tuple[Tensor]) -> None:
        squares = args[0].double().square().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

    for name, layer in linears(model, network):
        layer.register_forward_pre_hook(partial(add, name))
    windows = inputs(model.calibration(data), 1)
    with torch.inference_mode():
        for window in windows:
            network.model(**window, use_cache=False)
    return {name: (each / model.samples / model.seq_len).float() for name, each in sums.items()}


def ggml(
    model: Model, data: Path, variant: Variant, *, library: Path, importance: Path
) -> Quantized:
    """A type of llama.cpp for all matrices, its rounding weighted by the importance of columns.

    library     libggml-base.so
    importance  file that `column_importance` is kept in
    """
    if not importance.exists():
        save_file(column_importance(model, data), importance)
    columns = load_file(importance)
    layers = dict(linears(model, model.load(data)))

    def quantize(name: str) -> tuple[Tensor, int]:
        return ggml_type(library, layers[name].weight.detach(), columns[name], variant.options)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = dict(zip(layers, pool.map(quantize, layers), strict=True))
    weights = {name: weight for name, (weight, _) in found.items()}
    return weights, sum(bits for _, bits in found.values())


def ggml_type(
    library: Path, weight: Tensor, squares: Tensor, options: dict[str, Any]
) -> tuple[Tensor, int]:
    """One matrix (rows, cols) float32 as a type of llama.cpp gives it back, and its stored bits."""
    gguf: Any = importlib.import_module("gguf")
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    floats, numbers = ctypes.POINTER(ctypes.c_float), [ctypes.c_int64] * 3
    quantize.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *numbers, floats]
    kinds = [gguf.GGMLQuantizationType[options[key]] for key in ("type", "else") if key in options]
    fits = weight.shape[1] % gguf.GGML_QUANT_SIZES[kinds[0]][0] == 0
    kind = kinds[0 if fits else -1]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    joined = 1 if weight.shape[1] % block == 0 else 2  # rows
    rows = weight.reshape(len(weight) // joined, -1).contiguous()
    squares = squares.repeat(joined)
    stored = torch.zeros(rows.numel() // block * size, dtype=torch.uint8)
    pointers = [ctypes.cast(each.data_ptr(), floats) for each in (rows, squares)]
    written = quantize(kind, pointers[0], stored.data_ptr(), 0, *rows.shape, pointers[1])
    if written != len(stored):
        sys.exit(f"{kind.name}: {written} bytes were written where {len(stored)} are expected.")
    dense = torch.from_numpy(gguf.dequantize(stored.numpy().reshape(len(rows), -1), kind))
    return dense.reshape(weight.shape), peers_quality.stored_bits(stored)


VARIANTS = [
    *(Variant("HQQ", "model", 128, {"axis": axis}) for axis in (1, 0)),
    *(
        Variant("llama.cpp", "model", 256, {"type": name})
        for name in ("F16", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K")
    ),
    Variant("llama.cpp", "model", 256, {"type": "IQ2_XXS", "else": "IQ4_NL"}),
    Variant("GPTQ", "model", 128, {"sym": False}),
    Variant("GPTQ", "model", 64, {"sym": False}),
    Variant("AutoRound", "model", 64, {"sym": False, "iters": 50, "batch_size": 2}),
    Variant("AutoRound", "model", 128, {"sym": False, "iters": 50, "batch_size": 2}),
    *(Variant("ternary-quant", "model", group_size) for group_size in (0, 128)),
]


def name_of(variant: Variant) -> str:
    """What a row is called, also among the files of WORK."""
    options = [f"{name} {value}" for name, value in variant.options.items()]
    group = f"groups of {variant.group_size}" if variant.group_size else "a group for each row"
    return ", ".join([variant.peer, group, *options])


def make(variant: Variant, args: Namespace) -> None:
    """Quantize into WORK: weights as a peer's decoder gives them, and the row as JSON."""
    os.dup2(2, 1)  # stdout is for the table
    hide_bars()
    model = model_of(args)
    peers = {name: function for name, (_, function) in peers_quality.PEERS.items()}
    importance = args.work / "importance.safetensors"
    peers["llama.cpp"] = partial(ggml, library=args.ggml, importance=importance)
    began = time.perf_counter()
    weights, bits = peers[variant.peer](model, args.model, variant)
    row = {"name": name_of(variant), "bits": bits, "seconds": time.perf_counter() - began}
    put(model, model.load(args.model), weights)  # checks them
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, args.work / f"{row['name']}.safetensors")
    file_of(args, name_of(variant)).write_text(json.dumps(row))


def file_of(args: Namespace, name: str) -> Path:
    return Path(args.work / f"{name}.json")


def model_of(args: Namespace) -> Checkpoint:
    auto_class = "AutoModelForCausalLM"
    return Checkpoint("model", auto_class, "model.layers", SAMPLES, SEQ_LEN, args.train)


def measure(args: Namespace, rows: list[dict[str, Any]]) -> None:
    """Add measures to rows, and to their files: window by window, on one model, in turns."""
    model = model_of(args)
    work = open_evaluation(args.model, None, args.eval, SEQ_LEN, MAX_TOKENS)
    network = model.load(args.model)
    source = {name: layer.weight.data for name, layer in linears(model, network)}
    total = sum(each.numel() for each in network.parameters())
    files = [args.work / f"{row['name']}.safetensors" for row in rows]
    weights = [source, *map(load_file, files)]
    first = max(1, len(work.prefix))
    columns: list[list[list[float]]] = [[] for _ in weights]
    for window in torch.as_tensor(work.ids):
        reference: Tensor | None = None
        for each, column in zip(weights, columns, strict=True):
            count = put(model, network, each)
            with torch.inference_mode():
                logits = network(input_ids=window[None], use_cache=False).logits[0, :-1]
            reference = logits if reference is None else reference
            column.append(compare_logits([logits, reference], window, first))
        print(f"window {len(columns[0])} of {len(work.ids)}", file=sys.stderr)
    source_row = {"name": "source", "bits": 16 * count, "seconds": 0.0}
    for row, column in zip([source_row, *rows], columns, strict=True):
        row |= summarize(torch.tensor(column, dtype=torch.float64).T)
        row["bpw"] = row["bits"] / count
        row["megabytes"] = (row["bits"] / 8 + 2 * (total - count)) / 1e6
        file_of(args, row["name"]).write_text(json.dumps(row))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the measures with their standard errors."""
    heads = ["bpw", "MB", "perplexity", "KL, nats per token", "top-1 agreement", "seconds"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [row["name"], f"{row['bpw']:.5g}", f"{row['megabytes']:.1f}"]
        cells += [cell(row[name], style) for name, style in MEASURES.items()]
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.0f')])} |")
    return "\n".join(lines)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Run in a process of its own: peers patch what they import."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def can_run(variant: Variant, args: Namespace) -> bool:
    """Whether a peer is there; says so where it is not."""
    if variant.peer != "llama.cpp":
        return peers_quality.installed(variant.peer)
    if args.ggml is None:
        print("llama.cpp: skipped without --ggml.")
    return args.ggml is not None


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="checkpoint directory")
    arguments.add_argument("train", type=Path, help="text to calibrate on")
    arguments.add_argument("eval", type=Path, help="text to measure on")
    arguments.add_argument("work", type=Path, help="folder for what the peers make")
    names = [*peers_quality.PEERS, "llama.cpp"]
    arguments.add_argument("--only", nargs="*", choices=names, default=names, help="peers")
    arguments.add_argument("--ggml", type=Path, help="libggml-base.so, for llama.cpp's types")
    args = arguments.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [each for each in VARIANTS if each.peer in args.only and can_run(each, args)]
    for variant in wanted:
        print(f"{name_of(variant)} ...", file=sys.stderr)
        if not file_of(args, name_of(variant)).exists():
            apart(make, variant, args)
    rows = [json.loads(file_of(args, name_of(each)).read_text()) for each in wanted]
    new = [row for row in rows if "perplexity" not in row]
    if new:
        apart(measure, args, new)
    names = ["source", *map(name_of, wanted)]
    rows = [json.loads(file_of(args, name).read_text()) for name in names]
    print(markdown(rows))
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
