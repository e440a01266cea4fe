"""A checkpoint whose rotation is folded into its weights: it computes the same, in another basis.

What goes from layer to layer of a pre-norm decoder is read by matrices behind a norm, and written
by others. With an orthogonal R, the norm without its gain commutes with it, norm(R^T x) =
R^T norm(x), since the mean of squares is the same; so R goes into the weights, and the gain g too:

    embedding                E R            x' = R^T x is what goes on
    reads (q, k, v, gate, up, router, head)    W diag(g) R,  and the norm's own gain is 1
    writes (o, down)         R^T W,  R^T b

The heads of values are mixed by attention, number by number, so that an orthogonal H for all of
them goes into the rows of v and out of the columns of o:

    v    H^T W, H^T b (of each head)        o    W H (of each head)

R and H are those of trits/rotation.py, signs and a block Hadamard matrix, in blocks of the largest
power of two that divides the width. Nothing of them is left for run time. The inputs of down come
out of a product that does not commute with a rotation, and stay as they are.

A head that is tied to the embedding has the gain of the last norm, which the embedding has not: it
becomes a tensor of its own. Norms on what is written (Gemma 3) stand between R^T W and the sum, and
do not commute with R: there only the heads of values are rotated.

QuaRot, https://arxiv.org/abs/2404.00456, section 4; SpinQuant, https://arxiv.org/abs/2405.16406.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import CheckpointError, WeightError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.llama_cpp import EXPORTED
from ternarize.models.configuration import config_from
from ternarize.sources.imports.common import Imported
from ternarize.trits.rotation import signs, turn

_LARGEST = 256  # block: as many rows of a matrix are read to give one of them
_ROWS = 1 << 20  # weights turned at a time, in whole blocks of rows
_HEAD_WEIGHT = "lm_head.weight"
# by the names that llama.cpp has for them: a norm -> what reads behind it
_HEAD = "output"
_READS = {
    "attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "ffn_norm": ("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"),
    "output_norm": (_HEAD,),
}
_WRITES = ("attn_output", "ffn_down", "ffn_down_exps")
_VALUES = ("attn_v", "attn_qkv")
_OF_HEADS = ("attn_q_norm", "attn_k_norm")  # which see queries and keys alone
_BEHIND = ("post_attention_norm", "post_ffw_norm")  # norms on what is written
_KNOWN = {*_READS, *sum(_READS.values(), ()), *_WRITES, *_OF_HEADS, *_BEHIND, "token_embd"}


@dataclass(frozen=True)
class Turn:
    """What becomes of a tensor: W -> B^T W diag(g) A, with A on its columns and B on its rows.

    tensor   of the checkpoint as it is stored
    gain     name of the norm whose gains g multiply the columns; "": 1
    columns  (signs, block) of A; None: as they are
    rows     (signs, block) of B, which turns the last rows, as many as there are signs; None: none
    ones     it is a norm whose gain has gone elsewhere
    """

    tensor: str
    gain: str = ""
    columns: tuple[Tensor, int] | None = None
    rows: tuple[Tensor, int] | None = None
    ones: bool = False


@dataclass
class Folded(Checkpoint):
    """A checkpoint with the weights of another that are turned.

    raw    as it is stored
    turns  tensor -> what becomes of it; all others are as they are

    Dtypes are those of the source. What is turned is read in float32, so that it is rounded once.
    """

    raw: Checkpoint | None = None
    turns: dict[str, Turn] = field(default_factory=dict, repr=False)
    _gains: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, buffer: Tensor | None = None
    ) -> Tensor:
        """As `Checkpoint.read`, but what is turned is float32, whatever its dtype.

        Sums are in float64, in one order on all machines. Raises WeightError, which names the
        tensor of the source, where one is not finite.
        """
        assert self.raw is not None
        if name not in self.turns:
            return self.raw.read(name, start, stop, buffer)
        how, info = self.turns[name], self.tensors[name]
        stop = info.numel if stop is None else stop
        if how.ones:
            return torch.ones(stop - start)
        cols = info.shape[-1] if len(info.shape) > 1 else info.numel
        first, last, total = start // cols, -(-stop // cols), info.numel // cols
        still, block = total, 1
        if how.rows is not None:
            still, block = total - len(how.rows[0]), how.rows[1]
        found = torch.empty(last - first, cols)
        for low, high in _ranges(first, last, still, block, max(1, _ROWS // cols)):
            weight = self._columns(how, low, high, cols)
            if how.rows is not None and low >= still:
                sign = how.rows[0][low - still : high - still]
                weight = turn(weight.mT.contiguous(), sign, block).mT
            there = slice(max(low, first), min(high, last))
            found[there.start - first : there.stop - first] = weight[there.start - low :][
                : there.stop - there.start
            ]
        return found.view(-1)[start - first * cols : stop - first * cols]

    def _columns(self, how: Turn, low: int, high: int, cols: int) -> Tensor:
        """Rows [low, high) of W diag(g) A, float64."""
        weight = self._finite(how.tensor, low * cols, high * cols).view(-1, cols)
        if how.gain:
            if how.gain not in self._gains:
                self._gains[how.gain] = self._finite(how.gain, 0, None)
            weight = weight * self._gains[how.gain]
        return weight if how.columns is None else turn(weight, *how.columns)

    def _finite(self, name: str, start: int, stop: int | None) -> Tensor:
        assert self.raw is not None
        found = self.raw.read(name, start, stop).to(torch.float64)
        if not bool(found.isfinite().all()):
            raise WeightError(
                f"{self.raw.tensors[name].file}: {name}",
                "has weights that are NaN or infinite",
                "finite ones",
                "Repair the source",
            )
        return found

    def memory(self) -> int:
        """Bytes that reading a piece takes beside it: a block of rows, in float64, four times."""
        wide = [
            how.rows[1] * self.tensors[name].shape[-1]
            for name, how in self.turns.items()
            if how.rows is not None
        ]
        return 32 * max(_ROWS, *wide, 0)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        assert self.raw is not None
        return self.raw.stored_bytes


def _ranges(first: int, last: int, still: int, block: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover [first, last): from `still` on they are whole blocks."""
    while first < min(last, still):
        end = min(first + step, last, still)
        yield first, end
        first = end
    while first < last:
        low = first - (first - still) % block
        high = min(low + max(block, step // block * block), last + (still - last) % block)
        yield low, high
        first = high


def folded(source: Checkpoint, seed: int) -> Folded:
    """The checkpoint with a rotation in its weights, of a model that has place for one.

    seed  of the signs

    Raises CheckpointError for an architecture of which that is not known, or a tensor that is no
    part of it; UsageError where the package gguf, whose names say what a tensor is, is not there.
    """
    config = source.config or {}
    name = (config.get("architectures") or ["none"])[0]
    known = [n for n, kind in EXPORTED.items() if n.endswith("ForCausalLM") and not kind.linear]
    if name not in known or isinstance(source, Imported):
        found = source.format if isinstance(source, Imported) else f"architecture {name}"
        raise CheckpointError(
            source.directory,
            f"{found}, of which it is not known how a rotation folds into its weights (--fold)",
            f"a checkpoint in floating point of {', '.join(known)}",
            "Leave out --fold",
        )
    roles, own = _roles(source, name), config_from(config)
    turns = _turns_of_heads(roles, own, seed + 1)
    notes, tensors = list(source.notes), dict(source.tensors)
    behind = next((each for each, role in roles.items() if _part(role) in _BEHIND), None)
    if behind is not None:
        notes.append(
            "the heads of values are rotated, and not what goes from layer to layer: norms on what "
            f"is added to it ({behind}) do not commute with a rotation"
        )
    else:
        if own.tie_word_embeddings:
            config = {**config, "tie_word_embeddings": False}
        # a head that is stored with values of its own is not tied, whatever the config says
        if own.tie_word_embeddings and _HEAD_WEIGHT not in tensors:
            embedding = next(each for each, role in roles.items() if _part(role) == "token_embd")
            tensors[_HEAD_WEIGHT] = replace(tensors[embedding], name=_HEAD_WEIGHT)
            roles[_HEAD_WEIGHT] = f"{_HEAD}.weight"
            turns[_HEAD_WEIGHT] = Turn(embedding)
            notes.append(
                "the output head and the token embedding, tied in the source, are two tensors, "
                "since the gain of the last norm is in the head alone: "
                f"{tensors[embedding].nbytes / 1e6:.2f} MB more, unless --head makes it less"
            )
        _turn_stream(source, roles, turns, own.hidden_size, seed)
    shared = {each.name: getattr(source, each.name) for each in fields(Checkpoint)}
    changed = {"config": config, "tensors": tensors, "notes": notes}
    turns = {each: how for each, how in turns.items() if how != Turn(each)}
    return Folded(**{**shared, **changed}, raw=source, turns=turns)


def _roles(source: Checkpoint, name: str) -> dict[str, str]:
    """Tensor -> what llama.cpp calls it; CheckpointError for one that is no part of the model."""
    architecture, roles = EXPORTED[name], {}
    for each, info in source.tensors.items():
        if each.endswith(".rotary_emb.inv_freq"):  # of old checkpoints; the class computes it
            continue
        role = architecture.to_llama_cpp(
            re.sub(r"(\.experts\.)\d+(\.\w+\.weight)$", r"\1{}\2", each)
        )
        if role is None or _part(role) not in _KNOWN or role.endswith("attn_qkv.bias"):
            raise CheckpointError(
                f"{info.file}: {each}",
                "is no tensor of which it is known how a rotation goes through it (--fold)",
                f"those of a plain {name}",
                "Leave out --fold",
            )
        roles[each] = role
    return roles


def _part(role: str) -> str:
    """blk.3.attn_q.weight -> attn_q"""
    return role.split(".")[-2]


def _block(width: int) -> int:
    """The largest power of two that divides a width, at most _LARGEST."""
    return min(width & -width, _LARGEST)


def _turns_of_heads(roles: Mapping[str, str], config: Any, seed: int) -> dict[str, Turn]:
    """The turns of what makes the heads of values, and of what reads them."""
    heads, turns = config.num_attention_heads, {each: Turn(each) for each in roles}
    sign = signs(getattr(config, "head_dim", None) or config.hidden_size // heads, seed)
    made = sign.repeat(config.num_key_value_heads), _block(len(sign))
    for each, role in roles.items():
        bias = role.endswith(".bias")
        if _part(role) in _VALUES:
            turns[each] = Turn(each, columns=made) if bias else Turn(each, rows=made)
        elif _part(role) == "attn_output" and not bias:
            turns[each] = Turn(each, columns=(sign.repeat(heads), _block(len(sign))))
    return turns


def _turn_stream(
    source: Checkpoint, roles: Mapping[str, str], turns: dict[str, Turn], width: int, seed: int
) -> None:
    """Add to the turns those of what goes from layer to layer."""
    stream = signs(width, seed), _block(width)
    norms = {role: each for each, role in roles.items() if _part(role) in _READS}
    for each, role in roles.items():
        part, bias = _part(role), role.endswith(".bias")
        norm = next((norm for norm, readers in _READS.items() if part in readers), "")
        if part in _READS:
            turns[each] = replace(turns[each], ones=True)
        elif norm and not bias:
            gain = norms.get(role.replace(f"{part}.weight", f"{norm}.weight"))
            if gain is None:
                raise CheckpointError(
                    source.directory,
                    f"lacks the norm before {each}",
                    "every weight of the model",
                    "Complete the checkpoint",
                )
            turns[each] = replace(turns[each], gain=gain, columns=stream)
        elif part == "token_embd" or (part in _WRITES and bias):
            turns[each] = replace(turns[each], columns=stream)
        elif part in _WRITES:
            turns[each] = replace(turns[each], rows=stream)
