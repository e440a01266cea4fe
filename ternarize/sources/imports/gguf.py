"""Ternary models of llama.cpp and bitnet.cpp: GGUF files, read without trusting them.

    TQ1_0, TQ2_0    256 weights, one float16 scale
    Q2_0            64 weights, one float16 scale; it could say 2 d as well, and is refused where
                    it does
    I2_S            a matrix, one float32 scale; see ggml.py for its layouts, of which the
                    file does not say which it has, so the model's name must: FILE.gguf@x86

Other tensors are decoded by the package `gguf`, or are floats already; they stay dense. Names and
config.json become those of transformers for the architectures in ARCHITECTURES; what a file says of
its architecture that is not known here is refused. In `llama` the rows of q_proj and k_proj come
back into transformers' order (export/gguf.py has the rule).

A file: "GGUF", version u32, tensors u64, keys u64; keys: name, type u32, value; tensors: name,
dimensions u32, their sizes u64 (fastest first), type u32, offset u64; then, aligned, the data.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError, UsageError
from ternarize.files import llama_cpp
from ternarize.files.checkpoint import TensorInfo
from ternarize.files.headers import DTYPE_NAMES, MAX_HEADER, read_bytes
from ternarize.models.skeleton import skeleton_shapes
from ternarize.sources.imports.common import Decode, Imported
from ternarize.sources.imports.vocabulary import tokenizer_files
from ternarize.trits import ggml

# ggml's numbers of floating-point types
_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_TERNARY = {block.id: kind for kind, block in ggml.TYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: ggml's type, (..., rows, cols), and where its bytes are.

    block  weights and bytes of a block of its type
    """

    name: str
    type: int
    shape: tuple[int, ...]
    path: Path
    start: int
    nbytes: int
    block: tuple[int, int]

    def read(self, first: int, last: int) -> Tensor:
        """The bytes of rows [first, last), where rows are whole blocks."""
        weights, nbytes = self.block
        row = self.shape[-1] // weights * nbytes
        return read_bytes(self.path, self.start + first * row, (last - first) * row)


_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


class _Head:
    """The head of a file, read from its start; FormatError where it would go beyond its bounds."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def broken(self, what: str, expected: str) -> FormatError:
        return FormatError(self.path.name, f"{what}", f"{expected}", "Fetch it again")

    def bytes(self, count: int) -> bytes:
        left = min(self.size, MAX_HEADER) - self.at
        if count > left:
            raise self.broken(f"{count} bytes promised at {self.at}", f"at most {left}")
        data = self.file.read(count)
        if len(data) < count:
            raise self.broken(f"it ends at byte {self.at + len(data)}", f"{count} bytes more")
        self.at += count
        return data

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        return int(value)

    def count(self, least: int) -> int:
        """How many things of at least so many bytes follow."""
        found = self.number("Q")
        if found > (self.size - self.at) // least:
            raise self.broken(f"{found} things promised at {self.at}", "as many as fit the file")
        return found

    def string(self) -> str:
        raw = self.bytes(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"a string before byte {self.at} is not UTF-8", "UTF-8") from None

    def value(self, kind: int) -> Any:
        """A scalar or string; arrays are lists of strings or arrays of numpy."""
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.bytes(dtype.itemsize), dtype)[0].item()
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.broken(f"a value of type {kind} at {self.at}", "a type of GGUF")
        inner = self.number("I")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.bytes(self.count(dtype.itemsize) * dtype.itemsize), dtype)
        if inner != _STRING:
            raise self.broken(f"an array of type {inner} at {self.at}", "one of scalars or strings")
        return [self.string() for _ in range(self.count(8))]


def read_gguf(path: Path) -> tuple[dict[str, Any], list[Stored]]:
    """The keys and the tensors of one file, without reading data.

    Every length, count and offset is compared with what the file has before anything is made of it.
    Raises FormatError, or UsageError where the package `gguf` is not installed.
    """
    sizes = {int(kind): size for kind, size in llama_cpp.import_gguf().GGML_QUANT_SIZES.items()}
    sizes |= {block.id: (block.block, block.nbytes) for block in ggml.TYPES.values()}
    sizes[ggml.I2_S_TYPE] = (4, 1)  # and a tail
    with path.open("rb") as file:
        head = _Head(path, file)
        if head.size < 24 or head.bytes(4) != b"GGUF":
            raise head.broken("it does not begin with GGUF", "a GGUF file")
        version = head.number("I")
        if version not in (2, 3):
            raise head.broken(f"version {version}", "2 or 3, in little-endian")
        tensor_count, key_count = head.count(24), head.count(13)
        keys: dict[str, Any] = {}
        for _ in range(key_count):
            key = head.string()
            if key in keys:
                raise head.broken(f"the key {key!r} is there twice", "each once")
            keys[key] = head.value(head.number("I"))
        listed = [_listed(head, path, sizes) for _ in range(tensor_count)]
        alignment = keys.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
            raise head.broken(f"alignment {alignment!r:.40}", "a power of two")
        base, size = -(-head.at // alignment) * alignment, head.size
    tensors = []
    end = 0
    for tensor in sorted(listed, key=lambda each: each.start):
        if tensor.start % alignment or tensor.start < end:
            raise head.broken(
                f"{tensor.name} starts at byte {tensor.start} of the data",
                f"a multiple of {alignment} from {end} on",
            )
        end = tensor.start + tensor.nbytes
        if base + end > size:
            raise head.broken(
                f"{tensor.name} ends at byte {base + end} of {size}", "data up to there"
            )
        tensors.append(replace(tensor, start=base + tensor.start))
    repeated = [name for name, n in Counter(t.name for t in tensors).items() if n > 1]
    if repeated:
        raise head.broken(f"{repeated[0]} is there twice", "each tensor once")
    return keys, tensors


def _listed(head: _Head, path: Path, sizes: Mapping[int, tuple[int, int]]) -> Stored:
    """The next of a file's list of tensors, `start` relative to the data."""
    name = head.string()
    count = head.number("I")
    if not 1 <= count <= 4:
        raise head.broken(f"{name:.80} has {count} dimensions", "one to four")
    shape = tuple(head.number("Q") for _ in range(count))[::-1]
    kind, start = head.number("I"), head.number("Q")
    if kind not in sizes:
        raise head.broken(f"{name:.80} has type {kind}", "a type that `gguf` knows")
    weights, nbytes = sizes[kind]
    numel = math.prod(shape)
    if not 0 < numel < 2**56 or shape[-1] % weights:
        raise head.broken(
            f"{name:.80} has shape {list(shape)}", f"columns that are a multiple of {weights}"
        )
    tail = ggml.I2_S_TAIL if kind == ggml.I2_S_TYPE else 0
    size = numel // weights * nbytes + tail
    return Stored(name, kind, shape, path, start, size, sizes[kind])


_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def _read_all(path: Path) -> tuple[dict[str, Any], list[Stored]]:
    """The keys and tensors of a file, or of all the files of a set that it belongs to."""
    keys, tensors = read_gguf(path)
    total = keys.get("split.count", 1)
    if type(total) is int and total in (0, 1):  # it can be anything, an array too
        return keys, tensors
    match = _PART.fullmatch(path.name)
    if match is None or type(total) is not int or int(match[3]) != total:
        raise FormatError(
            path.name,
            f"is one of {total!r:.20} files",
            "a name that ends in -00001-of-0000N.gguf",
            "Give the files their names again, or merge them",
        )
    tensors, first = [], keys
    for number in range(total):
        part = path.with_name(f"{match[1]}-{number + 1:05d}-of-{total:05d}.gguf")
        if not part.is_file():
            raise CheckpointError(
                path.name, f"{part.name} is missing beside it", remedy="Fetch it too"
            )
        keys, found = read_gguf(part)
        place = keys.get("split.no"), keys.get("split.count")
        if not all(type(each) is int for each in place) or place != (number, total):
            raise FormatError(
                part.name,
                f"says it is file {keys.get('split.no')!r:.20} of {keys.get('split.count')!r:.20}",
                f"{number} of {total}",
                "Fetch it again",
            )
        first = keys if number == 0 else first
        tensors += found
    listed = first.get("split.tensors.count", len(tensors))
    if type(listed) is not int or listed != len(tensors):
        raise FormatError(
            path.name,
            f"{len(tensors)} tensors in {total} files",
            f"{listed!r:.20}",
            "Fetch them again",
        )
    return first, tensors


_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SUB_NORM = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}


# {} is the number of an expert
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Architecture:
    """What transformers calls an architecture of llama.cpp.

    names     of the tensors of a block, beyond those that all have
    config    what its config.json says and its file does not
    permuted  rows of q_proj and k_proj are reordered in files
    int8      was trained with activations rounded to int8
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    config: Mapping[str, Any]
    permuted: bool = False
    int8: bool = False


_BITNET = Architecture("bitnet", "BitNetForCausalLM", _SUB_NORM, {"hidden_act": "relu2"}, int8=True)
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", {}, {}, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", {}, {}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _QK_NORM, {}),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", _EXPERTS | _SHARED, {"norm_topk_prob": False}
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _EXPERTS | _QK_NORM, {"norm_topk_prob": True}
    ),
    # BitNet b1.58 2B4T, and what bitnet.cpp's converters call it
    "bitnet-b1.58": _BITNET,
    "bitnet-25": _BITNET,
}
_MIXTURE = Architecture("mixtral", "MixtralForCausalLM", _MIXTRAL, {}, permuted=True)


# keys of an architecture that say nothing about what the model computes, or what is known from the
# tensors
_IDLE = {
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.causal",
    # transformers applies none of these windows unless a config.json asks for it
    "attention.sliding_window",
}


class _Keys:
    """Keys of the architecture, which remembers those that were asked for."""

    def __init__(self, where: str, architecture: str, keys: Mapping[str, Any]) -> None:
        self.where = where
        prefix = architecture + "."
        self.keys = {
            key[len(prefix) :]: value for key, value in keys.items() if key.startswith(prefix)
        }
        self.asked = set(_IDLE)

    def wrong(self, what: str, expected: str) -> CheckpointError:
        return CheckpointError(
            self.where,
            f"{what}; this import knows {expected}",
            remedy="Take the model from its maker's checkpoint",
        )

    def get(self, key: str, default: Any, kind: type = int) -> Any:
        """A number, or the default where the file does not say."""
        self.asked.add(key)
        value = self.keys.get(key, default)
        if value is default:
            return value
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or (kind is not str and not 0 <= value < 2**31):
            raise self.wrong(f"{key} {str(value)!r:.40}", "one number of a usual size")
        return kind(value)

    def need(self, key: str, kind: type = int) -> Any:
        value = self.get(key, None, kind)
        if value is None:
            raise self.wrong(f"no {key}", "files that say it")
        return value

    def close(self) -> None:
        unknown = sorted(set(self.keys) - self.asked)
        if unknown:
            shown = str(self.keys[unknown[0]])
            raise self.wrong(f"{unknown[0]} {shown:.40}", "no such key for this architecture")


def _config(
    keys: _Keys, arch: Architecture, tensors: Mapping[str, Stored], common: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of a file: its keys, and what its tensors are there and how large."""
    hidden, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    layers = keys.need("block_count")
    if not 0 < layers <= len(tensors) or not heads:
        raise keys.wrong(f"{layers} blocks of {heads} heads", "as many as there are tensors")
    head_dim = keys.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise keys.wrong(f"{key} {keys.keys[key]}", f"{head_dim}, as that of the keys")
    config: dict[str, Any] = {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "vocab_size": _shape(keys, tensors, "token_embd.weight")[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        **arch.config,
    }
    # the file has it in float32
    config["rms_norm_eps"] = float(np.format_float_positional(np.float32(config["rms_norm_eps"])))
    if arch.model_type == "qwen2_moe":
        del config["head_dim"]
    dense = keys.get("feed_forward_length", None)
    experts = keys.get("expert_count", 0)
    if experts:
        used, size = keys.need("expert_used_count"), keys.get("expert_feed_forward_length", None)
        each = _shape(keys, tensors, "blk.0.ffn_gate_exps.weight")[-2]
        if each != (size or each):
            raise keys.wrong(f"experts of {each} features", f"{size}, as the file says")
        name = "num_local_experts" if arch is _MIXTURE else "num_experts"
        config |= {name: experts, "num_experts_per_tok": used}
        config |= {"intermediate_size" if arch is _MIXTURE else "moe_intermediate_size": each}
        if arch is not _MIXTURE:
            config |= {"intermediate_size": dense or each, "decoder_sparse_step": 1}
            config |= {"mlp_only_layers": []}
        shared = keys.get("expert_shared_feed_forward_length", None)
        if arch.model_type == "qwen2_moe":
            found = _shape(keys, tensors, "blk.0.ffn_gate_shexp.weight")[0]
            if found != (shared or found):
                raise keys.wrong(f"a shared expert of {found} features", f"{shared}")
            config["shared_expert_intermediate_size"] = found
    else:
        config["intermediate_size"] = dense or _shape(keys, tensors, "blk.0.ffn_gate.weight")[0]
    if arch.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    config["rope_parameters"] = _rope(keys, config, tensors)
    for name in ("bos", "eos", "padding"):
        number = common.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int and number < config["vocab_size"]:
            config[f"{'pad' if name == 'padding' else name}_token_id"] = number
    embedding = tensors["token_embd.weight"].type
    config["dtype"] = str(_FLOATS.get(embedding, torch.float32)).removeprefix("torch.")
    keys.close()
    return config


def _shape(keys: _Keys, tensors: Mapping[str, Stored], name: str) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) < 2:
        raise keys.wrong(f"no matrix {name}", "files that have it")
    return tensors[name].shape


def _rope(keys: _Keys, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """rope_parameters: the base, and how positions are scaled."""
    base = keys.get("rope.freq_base", 10000.0, float)
    base = float(np.format_float_positional(np.float32(base)))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    kind = keys.get("rope.scaling.type", "none", str)
    factor = keys.get("rope.scaling.factor", None, float)
    factor = keys.get("rope.scale_linear", None, float) if factor is None else factor
    original = keys.get("rope.scaling.original_context_length", None)
    if "rope_freqs.weight" in tensors:
        if kind != "none":
            raise keys.wrong(f"factors of frequencies and scaling {kind}", "one of both")
        return _llama3(keys, config, rope, tensors["rope_freqs.weight"])
    if kind in ("none", "linear") and factor in (None, 1.0):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        more = {"rope_type": "yarn", "factor": factor}
        return rope | more | {"original_max_position_embeddings": original}
    raise keys.wrong(f"scaling of positions {kind!r:.40} by {factor}", "none, linear, yarn, llama3")


def _llama3(
    keys: _Keys, config: Mapping[str, Any], rope: dict[str, Any], stored: Stored
) -> dict[str, Any]:
    """The rope of Llama 3.1 whose factors the file has: the original context is tried out.

    The factors do not change where both frequency factors and the context are multiplied alike, so
    those of all published models are taken: 1 and 4.
    """
    half = config["head_dim"] // 2
    if stored.type != 0 or stored.shape != (half,):
        raise keys.wrong(f"rope_freqs of shape {list(stored.shape)}", f"{half} numbers of F32")
    found = stored.read(0, 1).view(torch.float32)
    rope = rope | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["factor"] = float(found.max())
    for power in range(4, 24):
        rope["original_max_position_embeddings"] = 1 << power
        made = llama_cpp.rope_factors(rope, 2 * half)
        if made is not None and torch.allclose(made, found, rtol=1e-5, atol=0):
            return rope
    raise keys.wrong("factors of frequencies", "those of Llama 3.1's rule")


def open_gguf(path: Path, layout: str | None = None, alone: bool = True) -> Imported:
    """A GGUF file, or the set of files that it belongs to, as a checkpoint of logical tensors.

    layout  of weights in I2_S, a name of ggml.I2_S
    alone   the small files beside it are not the model's

    Nothing but heads is read, and the scales of I2_S. Raises FormatError
    for what is broken, CheckpointError for what cannot be brought in exactly, UsageError where the
    package `gguf` is not installed or the layout of I2_S is missing.
    """
    keys, stored = _read_all(path)
    by_name = {tensor.name: tensor for tensor in stored}
    if len(by_name) != len(stored):
        raise FormatError(path.name, "a tensor is in two of its files", remedy="Fetch them again")
    named = keys.get("general.architecture")
    if not isinstance(named, str) or named not in ARCHITECTURES:
        raise CheckpointError(
            path.name,
            f"architecture {str(named)!r:.60}",
            f"one of {', '.join(ARCHITECTURES)}",
            "Take the model from its maker's checkpoint",
        )
    lookup = _Keys(path.name, named, keys)
    arch = ARCHITECTURES[named]
    if named == "llama" and lookup.get("expert_count", 0):
        arch = _MIXTURE
    config = _config(lookup, arch, by_name, keys)
    if not any(_is_ternary(tensor) for tensor in stored):
        raise CheckpointError(
            path.name,
            "has no weights in TQ1_0, TQ2_0, Q2_0 or I2_S",
            "some",
            "Convert an ordinary model from its maker's checkpoint",
        )
    i2_s = any(tensor.type == ggml.I2_S_TYPE for tensor in stored)
    if i2_s and layout is None:
        raise UsageError(
            path.name,
            "has weights in I2_S, which bitnet.cpp writes in three layouts without saying which",
            "one",
            f"Name {path.name}@x86 (most files), {path.name}@arm, or {path.name}@rows (x86 "
            "without ACT_PARALLEL)",
        )
    if layout and not i2_s:
        raise UsageError(path.name, "has no weights in I2_S", remedy=f"Leave out @{layout}")
    tensors: dict[str, TensorInfo] = {}
    decode: dict[str, Decode] = {}
    group_sizes: dict[str, int] = {}
    rounded: Counter[str] = Counter()
    for tensor in stored:
        if tensor.name == "rope_freqs.weight":
            continue
        for logical in _logical(tensor, arch, config, path.name, layout):
            tensors[logical.name] = TensorInfo(
                logical.name, DTYPE_NAMES[logical.dtype], logical.shape, tensor.path.name
            )
            decode[logical.name] = logical.rows
            if logical.group_size is not None:
                group_sizes[logical.name] = logical.group_size
        if tensor.type not in _FLOATS and not _is_ternary(tensor):
            rounded[llama_cpp.import_gguf().GGMLQuantizationType(tensor.type).name] += 1
    _check_whole(path.name, config, tensors)
    files, notes = tokenizer_files(path.name, keys, config["vocab_size"])
    if rounded:
        counts = ", ".join(f"{count} tensors in {kind}" for kind, count in rounded.items())
        notes.append(f"rounded in the file, and kept as they are decoded, in float32: {counts}")
    int8 = i2_s or arch.int8
    if not int8:
        notes.append(
            "llama.cpp rounds activations to 8 bits in blocks of 256; whether the model was "
            "trained with rounded activations the file does not say: they are not rounded here "
            "unless --activations int8 asks for it"
        )
    kinds = {_TERNARY.get(t.type, "i2_s").upper() for t in stored if _is_ternary(t)}
    return Imported(
        path.parent,
        config,
        sorted({tensor.path.name for tensor in stored}),
        tensors,
        format=f"GGUF, {', '.join(sorted(kinds))}" + (f" as on {layout}" if layout else ""),
        scale=f"weight = scale * trit, a scale for each {'tensor' if i2_s else 'block'}",
        decode=decode,
        group_sizes=group_sizes,
        activations="int8" if int8 else "none",
        ternary_ends=set(group_sizes),
        alone=alone,
        made=files,
        notes=notes,
    )


@dataclass(frozen=True)
class _Logical:
    """A tensor by its name in transformers, how its rows are read, and its groups if ternary."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Decode
    group_size: int | None


def _is_ternary(tensor: Stored) -> bool:
    return tensor.type in _TERNARY or tensor.type == ggml.I2_S_TYPE


def _logical(
    tensor: Stored, arch: Architecture, config: Mapping[str, Any], where: str, layout: str | None
) -> list[_Logical]:
    """What a stored tensor is in transformers: itself, or each of its experts."""
    name, kind = _named(tensor, arch, where)
    dtype = torch.float16 if tensor.type in _TERNARY else _FLOATS.get(tensor.type, torch.float32)
    shape = tensor.shape
    permuted = arch.permuted and kind in ("attn_q", "attn_k")
    base = _decoder(tensor, layout, where)
    group_size = None  # of vectors and floats; those of I2_S are whole
    if len(shape) > 1 and _is_ternary(tensor):
        group_size = 0 if layout and tensor.type == ggml.I2_S_TYPE else tensor.block[0]
    if "{}" in name:
        if len(shape) != 3:
            raise FormatError(where, f"{tensor.name} has shape {list(shape)}", "experts")
        count = config.get("num_experts", config.get("num_local_experts"))
        if shape[0] != count:
            raise FormatError(
                where, f"{tensor.name} has {shape[0]} experts", f"{count}", "Fetch it again"
            )
        return [
            _Logical(
                name.format(expert),
                shape[1:],
                dtype,
                _shifted(base, expert * shape[1]),
                group_size,
            )
            for expert in range(shape[0])
        ]
    if kind == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    if len(shape) > 2:
        raise FormatError(where, f"{tensor.name} has shape {list(shape)}", "a matrix or a vector")
    if permuted:
        dim = config["head_dim"]
        heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
        if shape[0] != heads * dim:
            raise FormatError(
                where,
                f"{tensor.name} has shape {list(shape)}",
                f"{heads} heads of {dim}",
                "Fetch it again",
            )
        base = _halves(base, dim) if len(shape) == 2 else _halves_of_bias(base, dim)
    return [_Logical(name, shape, dtype, base, group_size)]


def _named(tensor: Stored, arch: Architecture, where: str) -> tuple[str, str]:
    """The name in transformers, and what it is called in a block there."""
    match = re.fullmatch(r"(?:blk\.(\d{1,5})\.)?([a-z_]+)\.(weight|bias)", tensor.name)
    table = _TOP if match and match[1] is None else {**_BLOCK, **arch.names}
    if match is None or match[2] not in table:
        raise CheckpointError(
            where,
            f"{tensor.name:.80} is not known in this architecture",
            f"a plain {arch.model_class}",
            "Take the model from its maker's checkpoint",
        )
    prefix = "" if match[1] is None else f"model.layers.{int(match[1])}."
    return f"{prefix}{table[match[2]]}.{match[3]}", match[2]


def _decoder(tensor: Stored, layout: str | None, where: str) -> Decode:
    """How rows of a stored tensor, with those of all experts behind each other, are read."""
    if tensor.type in _FLOATS:
        dtype = _FLOATS[tensor.type]
        return lambda first, last: (
            tensor.read(first, last).view(dtype).view(last - first, tensor.shape[-1])
        )
    if tensor.type in _TERNARY:
        kind = _TERNARY[tensor.type]

        def ternary(first: int, last: int) -> Tensor:
            data = tensor.read(first, last).view(-1, ggml.TYPES[kind].nbytes)
            digits, d = ggml.decode(data, kind)
            _check_digits(digits, tensor, where)
            return ((digits.to(torch.int8) - 1) * d[:, None]).view(last - first, -1)

        return ternary
    if tensor.type == ggml.I2_S_TYPE:
        assert layout is not None
        return _i2_s(tensor, layout, where)
    module = llama_cpp.import_gguf()
    kind = module.GGMLQuantizationType(tensor.type)
    try:
        module.dequantize(np.zeros((1, tensor.block[1]), np.uint8), kind)
    except NotImplementedError:
        raise CheckpointError(
            where,
            f"{tensor.name} is {kind.name}, which the package gguf cannot decode",
            "a type that it can",
            "Requantize that tensor, to F16 for instance",
        ) from None

    def rounded(first: int, last: int) -> Tensor:
        rows = tensor.read(first, last).view(last - first, -1).numpy()
        return torch.from_numpy(module.dequantize(rows, kind).astype(np.float32, copy=False))

    return rounded


def _check_digits(digits: Tensor, tensor: Stored, where: str) -> None:
    if bool((digits == 3).any()):
        raise CheckpointError(
            where,
            f"{tensor.name} has weights of two scales, which are no trits",
            "-1, 0 and +1 times a scale",
            "It is no ternary model, or it is damaged",
        )


def _i2_s(tensor: Stored, layout: str, where: str) -> Decode:
    rows, cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    block, together = ggml.I2_S[layout]
    if cols % block or rows % together:
        raise CheckpointError(
            where,
            f"{tensor.name} is {list(tensor.shape)}",
            f"columns that {block} divides and rows that {together} does, in I2_S as on {layout}",
            "Name another layout",
        )
    tail = read_bytes(tensor.path, tensor.start + rows * cols // 4, 4)
    scale = float(tail.view(torch.float32))

    def decode(first: int, last: int) -> Tensor:
        low, high = first // together * together, -(-last // together) * together
        digits = ggml.decode_i2_s(tensor.read(low, high), layout, cols)[first - low : last - low]
        _check_digits(digits, tensor, where)
        return (digits.to(torch.float32) - 1) * scale

    return decode


def _shifted(base: Decode, offset: int) -> Decode:
    return lambda first, last: base(first + offset, last + offset)


def _halves(base: Decode, dim: int) -> Decode:
    """Rows whose heads are (dim / 2, 2) as heads of (2, dim / 2)."""

    def decode(first: int, last: int) -> Tensor:
        low, high = first // dim, -(-last // dim)
        heads = base(low * dim, high * dim)
        rows = heads.view(high - low, dim // 2, 2, -1).transpose(1, 2).reshape(heads.shape)
        return rows[first - low * dim : last - low * dim]

    return decode


def _halves_of_bias(base: Decode, dim: int) -> Decode:
    return lambda first, last: (
        base(first, last).view(-1, dim // 2, 2).transpose(1, 2).reshape(1, -1)
    )


def _check_whole(where: str, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise FormatError unless a checkpoint of this config.json has these tensors, so shaped."""
    expected = {name: shape for name, (_, shape) in skeleton_shapes(config).items()}
    for name in sorted(expected.keys() | tensors.keys()):
        found = tensors[name].shape if name in tensors else None
        if expected.get(name) != found:
            raise FormatError(
                where,
                f"{name} {'is missing' if found is None else f'is {list(found)}'}",
                f"{list(expected[name]) if name in expected else 'no such tensor'}, by what the "
                "file says of its architecture",
                "Fetch it again",
            )
