"""GGUF files: ternary models of llama.cpp and bitnet.cpp, and others.

    TQ1_0, TQ2_0    256 weights, one float16 scale
    Q2_0            64 weights, one float16 scale; it could say 2 d as well, and is refused where
                    it does
    I2_S            a matrix, one float32 scale; see ggml.py for its layouts, of which the
                    file does not say which it has, so the model's name must: FILE.gguf@x86

Other tensors are decoded by the package `gguf`, or are floats already; they stay dense. Names and
config.json become those of transformers, for the architectures of gguf_config.py; what else a file
holds is refused. Rows of q_proj and k_proj come back into transformers' order (see llama_cpp.py).
A file without ternary weights is an ordinary model in another form: what is decoded is ternarized.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternarize.errors import CheckpointError, FormatError, UsageError
from ternarize.files.checkpoint import TensorInfo
from ternarize.files.gguf import GgufTensor, read_gguf_files
from ternarize.files.headers import DTYPE_NAMES, broken_file, read_bytes
from ternarize.files.llama_cpp import POOLING, Architecture, DeltaNet, gguf_part, import_gguf
from ternarize.models.skeleton import skeleton_shapes
from ternarize.sources.imports.common import Decode, Imported
from ternarize.sources.imports.gguf_config import gguf_config, not_known, pooling, pooling_note
from ternarize.sources.imports.vocabulary import tokenizer_files
from ternarize.trits import ggml

_NOT_ROUNDED = (
    "llama.cpp rounds activations to 8 bits in blocks of 256; whether the model was trained with "
    "rounded activations the file does not say: they are not rounded here unless --activations "
    "int8 asks for it"
)
_POOLING_FOLDER = "1_Pooling"


def open_gguf(path: Path, layout: str | None = None, alone: bool = True) -> Imported:
    """A GGUF file, or the set of files that it belongs to, as a checkpoint of logical tensors.

    layout  of weights in I2_S, a name of ggml.I2_S
    alone   the small files beside it are not the model's

    Nothing but heads is read, and the scales of I2_S. Raises FormatError
    for what is broken, CheckpointError for what cannot be brought in exactly, UsageError where the
    package `gguf` is not installed or the layout of I2_S is missing.
    """
    keys, stored = read_gguf_files(path)
    arch, config = gguf_config(path.name, keys, {tensor.name: tensor for tensor in stored})
    kinds = {tensor.ternary for tensor in stored if tensor.ternary}
    _check_types(path.name, kinds, layout)
    whole = {name: shape for name, (_, shape) in skeleton_shapes(config).items()}
    expected = {name: shape for name, shape in whole.items() if not arch.leaves_out(name)}
    names = arch.to_transformers(expected)
    tensors: dict[str, TensorInfo] = {}
    decode: dict[str, Decode] = {}
    group_sizes: dict[str, int] = {}
    for tensor in stored:
        for logical in _logical(tensor, names, arch, config, layout):
            name, dtype = logical.name, DTYPE_NAMES[logical.dtype]
            tensors[name] = TensorInfo(name, dtype, logical.shape, tensor.path.name)
            decode[name] = logical.rows
            if logical.group_size is not None:
                group_sizes[name] = logical.group_size
    _check_whole(path, expected, tensors)
    files, notes = tokenizer_files(path.name, keys, config["vocab_size"])
    mode = pooling(keys) if arch.encoder else None
    if mode is not None:
        files |= _modules(mode, config["hidden_size"])
    notes += pooling_note(keys, mode is not None)
    notes += _rounding(stored)
    int8 = "i2_s" in kinds or arch.int8
    if kinds and not int8:
        notes.append(_NOT_ROUNDED)
    types = ", ".join(sorted(kind.upper() for kind in kinds)) or "no ternary weights"
    return Imported(
        path.parent,
        config,
        sorted({tensor.path.name for tensor in stored}),
        tensors,
        format=f"GGUF, {types}" + (f" as on {layout}" if layout else ""),
        scale=f"weight = scale * trit, a scale for each {'tensor' if layout else 'block'}",
        decode=decode,
        group_sizes=group_sizes,
        activations="int8" if int8 else "none",
        ternary_ends=set(group_sizes),
        alone=alone,
        made=files,
        notes=notes,
    )


def _modules(mode: str, width: int) -> dict[str, bytes]:
    """The files by which sentence-transformers knows how an encoder makes embeddings.

    mode   of pooling, one of POOLING
    width  of an embedding
    """
    kinds = {"": "Transformer", _POOLING_FOLDER: "Pooling"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    table = {"word_embedding_dimension": width, POOLING[mode][1]: True}
    return {
        "modules.json": json.dumps(modules, indent=2).encode(),
        f"{_POOLING_FOLDER}/config.json": json.dumps(table, indent=2).encode(),
    }


def _check_types(where: str, kinds: set[str], layout: str | None) -> None:
    """Raise unless a layout is named exactly where weights are in I2_S."""
    if "i2_s" in kinds and layout is None:
        raise UsageError(
            where,
            "has weights in I2_S, which bitnet.cpp writes in three layouts without saying which",
            "one",
            f"Name {where}@x86 (most files), {where}@arm, or {where}@rows (x86 without "
            "ACT_PARALLEL)",
        )
    if layout and "i2_s" not in kinds:
        raise UsageError(where, "has no weights in I2_S", remedy=f"Leave out @{layout}")


def _rounding(stored: list[GgufTensor]) -> list[str]:
    """A note of the tensors that are rounded, and not ternary, if there are any."""
    rounded = Counter(t.type for t in stored if t.dtype is None and t.ternary is None)
    kinds = import_gguf().GGMLQuantizationType
    counts = ", ".join(
        f"{count} tensors in {kinds(number).name}" for number, count in rounded.items()
    )
    note = f"rounded in the file, and taken as they are decoded, in float32: {counts}"
    return [note] if counts else []


@dataclass(frozen=True)
class _Logical:
    """A tensor by its name in transformers, how its rows are read, and its groups if ternary."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Decode
    group_size: int | None


def _logical(
    tensor: GgufTensor,
    names: Mapping[str, str],
    arch: Architecture,
    config: Mapping[str, Any],
    layout: str | None,
) -> Iterator[_Logical]:
    """What a stored tensor is in transformers: itself, each of its experts, or nothing."""
    if tensor.name == "rope_freqs.weight":
        return
    if tensor.name not in names:
        what = f"{tensor.name:.80} is not known in this architecture"
        raise not_known(tensor.path.name, what, f"a plain {arch.model_class}")
    name, kind = names[tensor.name], tensor.name.split(".")[-2]
    in_blocks = torch.float32 if tensor.ternary in (None, "i2_s") else torch.float16
    dtype, shape = tensor.dtype or in_blocks, tensor.shape
    base = _decoder(tensor, layout)
    group_size = None  # of vectors and floats; those of I2_S are whole
    if len(shape) > 1 and tensor.ternary:
        group_size = 0 if tensor.ternary == "i2_s" else tensor.block[0]
    if "{}" in name:
        count = config.get("num_experts", config.get("num_local_experts"))
        if len(shape) != 3 or shape[0] != count:
            raise _misshapen(tensor, f"{count} experts")
        for expert in range(shape[0]):
            rows = _shifted(base, expert * shape[1])
            yield _Logical(name.format(expert), shape[1:], dtype, rows, group_size)
        return
    if arch.linear and len(shape) < 3:
        yield _of_delta_net(tensor, arch, config, _Logical(name, shape, dtype, base, group_size))
        return
    if kind == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    if len(shape) > 2:
        raise _misshapen(tensor, "a matrix or a vector")
    if arch.permuted and kind in ("attn_q", "attn_k"):
        dim = config["head_dim"]
        heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
        if shape[0] != heads * dim:
            raise _misshapen(tensor, f"{heads} heads of {dim}")
        base = _halves(base, dim) if len(shape) == 2 else _halves_of_bias(base, dim)
    if arch.turned and len(shape) > 1 and tensor.name.startswith("blk."):
        base, shape = _turned(base, shape[0]), shape[::-1]
    if arch.is_shifted(name):
        dtype, base = torch.float32, _less_one(base)
    yield _Logical(name, shape, dtype, base, group_size)


def _of_delta_net(
    tensor: GgufTensor, arch: Architecture, config: Mapping[str, Any], stored: _Logical
) -> _Logical:
    """A tensor of a model some of whose layers are gated delta nets.

    stored  the same as the file has it
    """
    part, heads, shape = gguf_part(tensor.name), DeltaNet.of(config), tensor.shape
    orders = heads.order(part)
    for order, have in zip(orders, (shape[0], shape[-1]), strict=True):
        if order is not None and len(order) != have:
            raise _misshapen(tensor, f"{heads.values} heads of values, {heads.keys} of keys")
    rows, columns = (None if order is None else order.argsort() for order in orders)
    base, group_size = stored.rows, stored.group_size
    if rows is not None:
        base = _reordered(base, rows) if len(shape) > 1 else _columns(base, rows)
    if columns is not None:
        base = _columns(base, columns)
        group_size = group_size and math.gcd(group_size, heads.dim)
    if part == "ssm_conv1d":  # of one channel each
        shape = (shape[0], 1, *shape[1:])
    if part == "ssm_a":
        return _Logical(stored.name, shape, torch.float32, _logarithm(tensor, base), None)
    if arch.is_shifted(stored.name):
        return _Logical(stored.name, shape, torch.float32, _less_one(base), None)
    return _Logical(stored.name, shape, stored.dtype, base, group_size)


def _misshapen(tensor: GgufTensor, expected: str) -> FormatError:
    return broken_file(tensor.path, f"{tensor.name} has shape {list(tensor.shape)}", expected)


def _decoder(tensor: GgufTensor, layout: str | None) -> Decode:
    """How rows of a stored tensor, with those of all experts behind each other, are read."""
    dtype, kind = tensor.dtype, tensor.ternary
    if dtype is not None:
        return lambda first, last: (
            tensor.read(first, last).view(dtype).view(last - first, tensor.shape[-1])
        )
    if kind == "i2_s":
        assert layout is not None
        return _i2_s(tensor, layout)
    return _by_gguf(tensor) if kind is None else _blocks(tensor, kind)


def _blocks(tensor: GgufTensor, kind: str) -> Decode:
    def decode(first: int, last: int) -> Tensor:
        data = tensor.read(first, last).view(-1, ggml.TYPES[kind].nbytes)
        digits, d = ggml.decode_blocks(data, kind)
        _check_digits(digits, tensor)
        return ((digits.to(torch.int8) - 1) * d[:, None]).view(last - first, -1)

    return decode


def _by_gguf(tensor: GgufTensor) -> Decode:
    """The rows of a type that is not ternary, as the package `gguf` decodes them."""
    module = import_gguf()
    kind = module.GGMLQuantizationType(tensor.type)
    try:
        module.dequantize(np.zeros((1, tensor.block[1]), np.uint8), kind)
    except NotImplementedError:
        raise CheckpointError(
            tensor.path.name,
            f"{tensor.name} is {kind.name}, which the package gguf cannot decode",
            "a type that it can",
            "Requantize that tensor, to F16 for instance",
        ) from None

    def decode(first: int, last: int) -> Tensor:
        rows = tensor.read(first, last).view(last - first, -1).numpy()
        return torch.from_numpy(module.dequantize(rows, kind).astype(np.float32, copy=False))

    return decode


def _check_digits(digits: Tensor, tensor: GgufTensor) -> None:
    if bool((digits == 3).any()):
        raise CheckpointError(
            tensor.path.name,
            f"{tensor.name} has weights of two scales, which are no trits",
            "-1, 0 and +1 times a scale",
            "It is no ternary model, or it is damaged",
        )


def _i2_s(tensor: GgufTensor, layout: str) -> Decode:
    rows, cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    block, together = ggml.I2_S[layout]
    if cols % block or rows % together:
        raise CheckpointError(
            tensor.path.name,
            f"{tensor.name} is {list(tensor.shape)}",
            f"columns that {block} divides and rows that {together} does, in I2_S as on {layout}",
            "Name another layout",
        )
    tail = read_bytes(tensor.path, tensor.start + rows * cols // 4, 4)
    scale = float(tail.view(torch.float32))

    def decode(first: int, last: int) -> Tensor:
        low, high = first // together * together, -(-last // together) * together
        digits = ggml.decode_i2_s(tensor.read(low, high), layout, cols)[first - low : last - low]
        _check_digits(digits, tensor)
        return (digits.to(torch.float32) - 1) * scale

    return decode


def _shifted(base: Decode, offset: int) -> Decode:
    return lambda first, last: base(first + offset, last + offset)


def _turned(base: Decode, rows: int) -> Decode:
    """Rows of a matrix that is stored with `rows` rows, which are columns here."""
    return lambda first, last: base(0, rows)[:, first:last].t().contiguous()


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


def _reordered(base: Decode, order: Tensor) -> Decode:
    """Row k is row order[k] of what is stored; neighbours there are read together."""

    def decode(first: int, last: int) -> Tensor:
        wanted = order[first:last]
        ends = [*((wanted.diff() != 1).nonzero().flatten() + 1).tolist(), len(wanted)]
        begins = [0, *ends[:-1]]
        runs = [(int(wanted[a]), int(wanted[b - 1]) + 1) for a, b in zip(begins, ends, strict=True)]
        return torch.cat([base(a, b) for a, b in runs])

    return decode


def _columns(base: Decode, order: Tensor) -> Decode:
    return lambda first, last: base(first, last)[:, order]


def _logarithm(tensor: GgufTensor, base: Decode) -> Decode:
    """A of the -exp(A) that is stored."""

    def decode(first: int, last: int) -> Tensor:
        found = base(first, last).to(torch.float32)
        if not bool((found < 0).all()):
            raise _misshapen(tensor, "numbers below 0, of states that decay")
        return (-found).log()

    return decode


def _less_one(base: Decode) -> Decode:
    return lambda first, last: base(first, last).to(torch.float32) - 1


def _check_whole(
    path: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> None:
    """Raise FormatError unless a file has the tensors that are expected, so shaped."""
    for name in sorted(expected.keys() | tensors.keys()):
        found = tensors[name].shape if name in tensors else None
        if expected.get(name) != found:
            wanted = list(expected[name]) if name in expected else "no such tensor"
            raise broken_file(
                path,
                f"{name} {'is missing' if found is None else f'is {list(found)}'}",
                f"{wanted}, by what the file says of its architecture",
            )
