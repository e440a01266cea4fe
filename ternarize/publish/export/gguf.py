"""Export to GGUF, the format of llama.cpp, through the package `gguf`.

Ternary tensors go into blocks of ggml (ggml.py) as trits and scales; int8 ones into Q8_0, int4 ones
into Q4_0; kept matrices into a floating-point type; vectors into F32, which llama.cpp wants. Names
and metadata are those that llama.cpp's own converter writes for the same architecture (llama_cpp.py
and gguf_keys.py have them); the vocabulary is written by vocabulary.py.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError, WeightError
from ternarize.files.headers import DTYPES, byte_view
from ternarize.files.llama_cpp import (
    Architecture,
    DeltaNet,
    gguf_part,
    import_gguf,
    rope_factors,
    rope_of,
)
from ternarize.files.outputs import check_free, fresh_output
from ternarize.models.configuration import text_config
from ternarize.progress import Progress
from ternarize.publish.export import vocabulary
from ternarize.publish.export.common import (
    Losses,
    PackedCheckpoint,
    carry,
    carry_or_refit,
    common_scales,
    model_config,
    refit,
)
from ternarize.publish.export.gguf_keys import (
    CONVERTER,
    architecture_of,
    embedding_notes,
    head_dim_of,
    write_keys,
)
from ternarize.publish.export.modelfile import modelfile_of, write_modelfile
from ternarize.trits import ggml
from ternarize.trits.int4 import INT4, unpack_int4
from ternarize.trits.scales import scale_values
from ternarize.trits.ternary import Ternary

KEPT_TYPES = {"f16": "F16", "bf16": "BF16", "f32": "F32", "q8_0": "Q8_0"}
_VECTORS = (".ffn_gate_inp.weight", "token_types.weight", ".ssm_conv1d.weight")
DEFAULT_TYPES = ("tq2_0", "q2_0")  # the first is smaller, faster, and known to older engines
# those that Ollama reads (fs/ggml/type.go, 21 August 2026: it knows no size of the ternary ones)
OLLAMA_TYPES = ("q2_k", "q4_0")
# parts of names -> what is left out with the tensors that have them
_LEFT = {
    r"pooler\.": "the pooler is left out: llama.cpp gives embeddings without it",
    r"visual|vision|modal": "what sees images is left out: llama.cpp has files of their own for it",
    r"mtp\.": "the blocks that predict further tokens (mtp) are left out",
}


@dataclass(frozen=True)
class GgufItem:
    """A tensor of the file: its name there, ggml's type, logical shape, bytes, and how to make it.

    read  returns the bytes, uint8, in the order of the file
    """

    name: str
    type: int
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]


def export_gguf(
    packed: PackedCheckpoint,
    output: Path,
    *,
    kind: str | None = None,
    kept_type: str | None = None,
    tokenizer: bool = True,
    modelfile: bool = False,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed language model as one GGUF file.

    kind              type of ternary tensors, a name of ggml.TYPES; None: the first of
                      DEFAULT_TYPES that holds them all, with a Modelfile of OLLAMA_TYPES
    kept_type         type of kept matrices, a name of KEPT_TYPES; None: as they are
    tokenizer         False writes no vocabulary; such a file can be run on token numbers alone
    modelfile         write an Ollama Modelfile beside it (modelfile.py)
    allow_requantize  ternarize again what the type cannot hold, and measure

    Returns what was written, and what was lost (`Losses.report`). Raises CheckpointError for an
    architecture or a tokenizer that is not known, or a tensor that cannot be carried; UsageError
    where gguf is not installed; OutputError where the file cannot be put.
    """
    gguf = import_gguf()
    if kind is not None and kind not in ggml.TYPES:
        raise UsageError("type", f"{kind!r}", f"one of {', '.join(ggml.TYPES)}")
    if kept_type is not None and kept_type not in KEPT_TYPES:
        raise UsageError("kept type", f"{kept_type!r}", f"one of {', '.join(KEPT_TYPES)}")
    if modelfile and not tokenizer:
        raise UsageError("modelfile", "no tokenizer", "one, whose template it is made of")
    if modelfile:
        check_free(modelfile_of(output))
    config = model_config(packed)
    architecture, config = architecture_of(packed, config), text_config(config)
    asked = kind
    moved = _moved(packed, config, architecture)
    left = [name for name in packed.records if architecture.leaves_out(name)]
    usual = OLLAMA_TYPES if modelfile else DEFAULT_TYPES
    types = usual if asked is None else (asked,)
    kind, losses = _chosen(packed, types, allow_requantize, moved, left)
    losses.stop_unless_allowed(packed, _advice(packed, asked, modelfile))
    writer = gguf.GGUFWriter(None, architecture.name)
    notes: list[str] = []
    if tokenizer:
        notes = vocabulary.write(writer, packed.directory, config.vocab_size)
    else:
        writer.add_tokenizer_model("none")
    notes += embedding_notes(packed) if architecture.encoder else []
    notes += [said for part, said in _LEFT.items() if any(re.search(part, name) for name in left)]
    items = _gguf_items(packed, config, architecture, kind, kept_type, losses, moved)
    total, done = sum(item.nbytes for item in items), 0
    for item in items:
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.void), item.nbytes, item.type)
    write_keys(gguf, writer, packed, config, architecture, kind)
    with fresh_output(packed.directory, output, folder=False) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for item in items:
                data = item.read().numpy()
                assert data.nbytes == item.nbytes, item.name
                writer.write_tensor_data(data)
                done += item.nbytes
                if progress:
                    progress(done, total, item.name, "writing")
        finally:
            writer.close()
    if modelfile:
        notes += write_modelfile(packed.directory, output)
        if kind not in OLLAMA_TYPES:
            notes.append(f"Ollama does not read {kind.upper()}: use {' or '.join(OLLAMA_TYPES)}")
    return {"to": "gguf", "type": kind, "tensors": len(items), "notes": notes, **losses.report()}


@dataclass(frozen=True)
class _Moves:
    """Where the rows and columns of an exported tensor come from; None: from where they are.

    run  columns that stay together
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    run: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor if self.columns is None else tensor[:, self.columns]

    def fits(self, block: int) -> bool:
        """Whether blocks of so many columns stay whole."""
        columns = self.columns
        return columns is None or self.run % block == 0 or len(columns) == block

    def ternary(self, found: Ternary) -> Ternary:
        """The same of trits and scales, in blocks that stay whole."""
        scales, size = found.scales if self.rows is None else found.scales[self.rows], 1
        if self.columns is not None:
            size = found.group_size
            scales = scales[:, self.columns[::size] // size]
        return Ternary(self(found.trits), scales, found.group_size)


_STILL = _Moves()


def _moved(packed: PackedCheckpoint, config: Any, architecture: Architecture) -> dict[str, _Moves]:
    """The tensors whose rows or columns have another order in a file."""
    found = {}
    for name in packed.records:
        if architecture.permuted and (order := _order(name, config)) is not None:
            found[name] = _Moves(order)
        new = architecture.to_llama_cpp(name) if architecture.linear else None
        if new is not None:
            heads = DeltaNet.of(config.to_dict())
            moves = _Moves(*heads.order(gguf_part(new)), heads.dim)
            if moves.rows is not None or moves.columns is not None:
                found[name] = moves
    return found


def _chosen(
    packed: PackedCheckpoint,
    types: Sequence[str],
    allow_requantize: bool,
    moved: Mapping[str, _Moves],
    left: Collection[str],
) -> tuple[str, Losses]:
    """Of some types one for ternary tensors, and what is lost in it: if none holds them, the first.

    left  names of those that the file does not have
    """
    ternary = [n for n, r in packed.records.items() if r.kind == "ternary" and n not in left]
    tried = []
    for each in types:
        losses = Losses(each.upper(), allow_requantize)
        for name in ternary:
            block = ggml.TYPES[each].block
            if not moved.get(name, _STILL).fits(block):
                run = moved[name].run
                losses.add(f"heads of {run} columns in another order than llama.cpp's", name)
            else:
                losses.add(carry(packed, name, block, torch.float16)[1], name)
        tried.append((each, losses))
        if not losses.reasons:
            return each, losses
    return tried[0]


def _advice(packed: PackedCheckpoint, asked: str | None, modelfile: bool) -> str:
    """asked  the type of ternary tensors, if one was named"""
    ternary = [r for r in packed.records.values() if r.kind == "ternary"]
    plain = all(r.planes == 1 and not r.rotation[0] for r in ternary)
    smaller = "q4_0" if modelfile or asked == "q2_k" else "q2_0"  # blocks
    larger = asked is not None and ggml.TYPES[asked].block > ggml.TYPES[smaller].block
    other = f"Use --type {smaller}, or convert" if plain and larger else "Convert"
    return f"{other} the source with --for llama.cpp, which chooses what such a file holds."


def _gguf_items(
    packed: PackedCheckpoint,
    config: Any,
    architecture: Architecture,
    kind: str,
    kept_type: str | None,
    losses: Losses,
    moved: Mapping[str, _Moves],
) -> list[GgufItem]:
    items = []
    factors = None
    if not architecture.learned:
        factors = rope_factors(rope_of(config), head_dim_of(config))
    if factors is not None:
        shape, read = tuple(factors.shape), partial(byte_view, factors)
        number = ggml.FLOATS["F32"]
        items.append(GgufItem("rope_freqs.weight", number, shape, factors.nbytes, read))
    stacks: dict[str, dict[int, GgufItem]] = {}
    for name in packed.records:
        # buffers of old checkpoints: frequencies, which the metadata says, and masks
        if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue
        if architecture.leaves_out(name):
            continue
        # one matrix for each expert here, one tensor of all of a layer there
        expert = re.fullmatch(r"(.+\.experts\.)(\d+)(\.\w+\.weight)", name)
        new = architecture.to_llama_cpp(f"{expert[1]}{{}}{expert[3]}" if expert else name)
        if new is None:
            raise CheckpointError(
                packed.checkpoint.tensors[name].file,
                f"{name} has no name in llama.cpp's architecture {architecture.name}",
                f"a plain {architecture.model_class}",
                CONVERTER,
            )
        if architecture.is_shifted(name):
            items.append(_shifted_norm(packed, name, new, losses))
            continue
        moves = moved.get(name, _STILL)
        if new.endswith(".ssm_a"):
            items.append(_decay(packed, name, new, moves))
            continue
        turned = architecture.turned and new.startswith("blk.")
        item = _item(packed, name, new, moves, kind, kept_type, losses, turned=turned)
        if expert is None:
            items.append(item)
        else:
            stacks.setdefault(new, {})[int(expert[2])] = item
    items += [_stack(packed, config, new, found) for new, found in stacks.items()]
    return items


def _shifted_norm(packed: PackedCheckpoint, name: str, new: str, losses: Losses) -> GgufItem:
    """The weights of a norm that multiplies by 1 + w, as llama.cpp has them: 1 + w in float32."""
    shape = packed.info(name)[1]

    def read() -> Tensor:
        weight = packed.kept(name).to(torch.float32)
        losses.measure(name, weight, (weight + 1) - 1)
        return byte_view(weight + 1)

    return GgufItem(new, ggml.FLOATS["F32"], shape, math.prod(shape) * 4, read)


def _decay(packed: PackedCheckpoint, name: str, new: str, moves: _Moves) -> GgufItem:
    """How fast states decay, as it is multiplied: -exp(A), computed in float32 as everywhere."""
    shape = packed.info(name)[1]

    def read() -> Tensor:
        return byte_view(moves(-packed.kept(name).to(torch.float32).exp()).contiguous())

    return GgufItem(new, ggml.FLOATS["F32"], shape, math.prod(shape) * 4, read)


def _stack(
    packed: PackedCheckpoint, config: Any, name: str, experts: dict[int, GgufItem]
) -> GgufItem:
    """The matrices of all experts, one behind the other."""
    count = config.num_local_experts
    parts = [experts[number] for number in sorted(experts)]
    if sorted(experts) != list(range(count)) or len({(p.type, p.shape) for p in parts}) > 1:
        raise CheckpointError(
            f"{packed.directory}: {name}",
            f"{len(experts)} experts of {count}, in {len({p.type for p in parts})} types",
            "all of them in one",
            "Convert the source without --keep of single experts",
        )
    return GgufItem(
        name,
        parts[0].type,
        (count, *parts[0].shape),
        sum(part.nbytes for part in parts),
        lambda: torch.cat([part.read().flatten() for part in parts]),
    )


def _order(name: str, config: Any) -> Tensor | None:
    """Where each row of the exported tensor comes from; None for the rows as they are."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module)
    if heads is None:
        return None
    rows = torch.arange(heads * head_dim_of(config))
    return rows.view(heads, 2, -1).transpose(1, 2).flatten()


def _item(
    packed: PackedCheckpoint,
    name: str,
    new: str,
    moves: _Moves,
    kind: str,
    kept_type: str | None,
    losses: Losses,
    *,
    turned: bool,
) -> GgufItem:
    """turned  a matrix that is kept is [in, out] (what is packed is [out, in], as files have it)"""
    record = packed.records[name]
    dtype, shape = packed.info(name)
    if record.kind == "ternary" and shape[-1] % ggml.TYPES[kind].block == 0:
        block = ggml.TYPES[kind]

        def ternary() -> Tensor:
            if moves.fits(block.block):
                found = moves.ternary(carry_or_refit(packed, name, block.block, torch.float16))
            else:
                found = refit(moves(packed.dense(name)), block.block, torch.float16)
            if any(name in names for names in losses.reasons.values()):
                losses.measure(name, moves(packed.dense(name)), found.dequantize())
            return ggml.encode_blocks(found, kind)

        nbytes = math.prod(shape) // block.block * block.nbytes
        return GgufItem(new, block.id, shape, nbytes, ternary)
    if record.kind not in ("ternary", "kept") and _integers(packed, name) is not None:
        four = record.codec == INT4
        q4_0 = ggml.TYPES["q4_0"]
        number, size = (q4_0.id, q4_0.nbytes) if four else (ggml.Q8_0, ggml.Q8_0_NBYTES)

        def integers() -> Tensor:
            found = _integers(packed, name)
            assert found is not None
            values, scales = map(moves, found)
            encode = ggml.encode_q4_0 if four else ggml.encode_q8_0
            return encode(values, scales)

        nbytes = math.prod(shape) // ggml.Q8_0_BLOCK * size
        return GgufItem(new, number, shape, nbytes, integers)
    turned = turned and record.shape is None and len(shape) > 1
    return _float_item(packed, name, new, torch.t if turned else moves, kept_type, losses)


def _float_item(
    packed: PackedCheckpoint,
    name: str,
    new: str,
    rows: Callable[[Tensor], Tensor],
    kept_type: str | None,
    losses: Losses,
) -> GgufItem:
    """A tensor that is kept, or that no block can hold, of which nothing is lost in float32."""
    record = packed.records[name]
    dtype, shape = packed.info(name)
    own = dtype if record.shape is None and dtype in ggml.FLOATS else "F32"
    target = KEPT_TYPES.get(kept_type or "", own)
    if new.endswith(".ssm_conv1d.weight"):
        shape = (shape[0], shape[-1])  # of one channel each
    stored, shape = shape, shape[::-1] if rows is torch.t else shape
    # llama.cpp wants vectors, routers and small convolutions in F32, and a row of the types
    if record.shape is None and (len(shape) < 2 or new.endswith(_VECTORS)):
        target = "F32"

    def read() -> Tensor:
        dense = packed.kept(name) if record.shape is None else packed.dense(name)
        return _encode_kept(packed, name, rows(dense.view(stored)).contiguous(), target, losses)

    if target != "Q8_0":
        nbytes = math.prod(shape) * DTYPES[target].itemsize
        return GgufItem(new, ggml.FLOATS[target], shape, nbytes, read)
    if shape[-1] % ggml.Q8_0_BLOCK:
        raise CheckpointError(
            packed.checkpoint.tensors[name].file,
            f"{name} has {shape[-1]} columns",
            "a multiple of 32, which Q8_0 needs",
            "Use --kept-type f16",
        )
    nbytes = math.prod(shape) // ggml.Q8_0_BLOCK * ggml.Q8_0_NBYTES
    return GgufItem(new, ggml.Q8_0, shape, nbytes, read)


def _integers(packed: PackedCheckpoint, name: str) -> tuple[Tensor, Tensor] | None:
    """An int8 or int4 tensor, and the scales of its blocks in Q8_0 or Q4_0; None where it cannot be
    carried."""
    record = packed.records[name]
    assert record.shape is not None
    values, scales = packed.stored(name)
    if record.codec == INT4:
        values = unpack_int4(values, record.shape[-1], record.group_size)
    if values.dim() != 2 or values.shape[-1] % ggml.Q8_0_BLOCK:
        return None
    wide = scale_values(scales, torch.float64)
    found = common_scales(Ternary(values, wide, record.group_size), ggml.Q8_0_BLOCK)
    if found is None or not torch.equal(found.to(torch.float16).to(torch.float64), found):
        return None
    return values, found


def _encode_kept(
    packed: PackedCheckpoint, name: str, dense: Tensor, target: str, losses: Losses
) -> Tensor:
    """The bytes of a floating-point tensor in `target`, measured where that rounds."""
    if target == "Q8_0":
        gguf = import_gguf()
        kind = gguf.GGMLQuantizationType.Q8_0
        data = gguf.quantize(dense.to(torch.float32).numpy(), kind)
        losses.measure(name, dense, torch.from_numpy(gguf.dequantize(data, kind)))
        return torch.from_numpy(data).flatten()
    cast = dense.to(DTYPES[target])
    if bool(cast.isinf().any()):
        raise WeightError(
            packed.checkpoint.tensors[name].file,
            f"{name} has weights beyond {target}",
            "at most 65504",
            "Use --kept-type bf16 or f32",
        )
    losses.measure(name, dense, cast)
    return byte_view(cast)
