"""The two models of a training: a teacher that stays, and a student that learns.

Both are loaded by transformers from the source. What the student does not train it shares with the
teacher: an embedding of 168 million weights is in memory once. The teacher's matrices stay in the
dtype of the source and are widened when they are used; a processor without fast 16-bit products
computes in float32, all others in bfloat16.

Of a head and an embedding that will be in 8 or 4 bits the student has the numbers, and learns their
scales; with all weights, latent weights as of ternary matrices. Whatever it is, a latent head or
embedding is rounded in the rows that a step looks up, and in the words that its loss looks at.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn

from ternarize.calibrate.blocks import Blocks
from ternarize.calibrate.solved import Solved, form_of, read_numbers, read_solved, sum_planes
from ternarize.errors import CheckpointError, UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.container import ROUNDED, as_source
from ternarize.measure.measured import fast_dtype
from ternarize.models.configuration import class_of, open_config, usable
from ternarize.models.reads import CAUSAL, kind_of, vocabulary_size
from ternarize.models.skeleton import model_end
from ternarize.plans.layout import TensorPlan, logical
from ternarize.plans.recipe import Train
from ternarize.qat.modules import Qat, latent_modules
from ternarize.qat.prepare import begin, begin_numbers, insert
from ternarize.qat.rounding import Form
from ternarize.sources.checkpoint import locate
from ternarize.train.attention import widen_attention
from ternarize.train.losses import Head, Words
from ternarize.trits.base3 import BASE3
from ternarize.trits.rotation import unrotate

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
CLOSE = 1e-3  # of logits from hidden states, relative to their size, in float32


@dataclass
class Pair:
    """Student and teacher, and how their outputs are compared.

    teacher  None where the text itself is the objective
    kind     of the model, as models/reads.py has them
    heads    of student and teacher, where logits can be made of hidden states piece by piece
    dtype    of products
    compiled whether torch compiles the loss
    """

    student: Any
    teacher: Any
    kind: str
    heads: tuple[Head, Head] | None
    dtype: torch.dtype
    vocabulary: int
    compiled: bool = False

    @classmethod
    def of(cls, student: Any, teacher: Any, dtype: torch.dtype) -> Self:
        """The pair of two models, with their heads if logits can be made piece by piece."""
        kind = kind_of(type(student), student.config)
        pair = cls(student, teacher, kind, None, dtype, vocabulary_size(student.config) or 0)
        if kind == CAUSAL:
            pair.heads = _heads(pair)
        return pair

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name; a parameter under one name."""
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}

    def hidden(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states of a model with heads, (batch, length, n)."""
        inputs = {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask")}
        with self.autocast():
            output: Tensor = model.base_model(**inputs, use_cache=False)[0]
        return output

    def autocast(self) -> torch.autocast:
        device = next(self.student.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)


def make_pair(
    blocks: Blocks,
    begun: Mapping[str, Solved],
    tensors: Mapping[str, TensorPlan],
    training: Train,
    scale: str,
    activations: str,
    device: str,
    dtype: torch.dtype | None = None,
) -> Pair:
    """Load both models; the student's weights begin where they were left.

    begun    tensors by name -> where calibration, or an earlier training, has put them
    tensors  the plan's, by name; of those to be trained the choice says ternary
    scale    of latent weights: "learned", or "absmean" as BitNet b1.58 has it
    dtype    of products; None: what is fast on the device

    Raises CheckpointError for a model that cannot be run, UsageError for a teacher that knows other
    words.
    """
    directory = blocks.source.directory
    dtype = dtype or fast_dtype(device)
    student = open_model(directory, device)
    teacher: Any = None
    if training.objective == "distill":
        teacher = open_model(teacher_folder(directory, training), device)
        if training.teacher is None:
            _share(student, teacher)
    _make_latent(student, blocks, begun, tensors, scale, activations, dtype, training.all_weights)
    _choose_trained(student, training.all_weights)
    for model in (student, teacher):
        if model is not None:
            widen(model, dtype)
            if dtype != torch.float32 and device == "cpu":
                widen_attention(model)
    return Pair.of(student, teacher, dtype)


def teacher_folder(directory: Path, training: Train) -> Path:
    """The folder of a training's teacher; raises UsageError where it knows other words."""
    if training.teacher is None:
        return directory
    folder = locate(training.teacher)
    sizes = [vocabulary_size(open_config(each)) for each in (directory, folder)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            training.teacher,
            f"knows {sizes[1]} words, and the model {sizes[0]}",
            "the same vocabulary",
            "Name another teacher, or train on the texts (--objective text)",
        )
    return folder


def open_model(where: Path, device: str) -> Any:
    """The model of a dense checkpoint, in its own dtype, that nothing trains yet."""
    config = open_config(where)
    model_class: Any = class_of(config)
    if model_class is None:
        raise CheckpointError(
            where,
            f"architectures {config.architectures}; training runs the model",
            f"a class of transformers {transformers.__version__}",
            "Convert it without training",
        )
    with usable(where):
        model = model_class.from_pretrained(where, dtype="auto").to(device)
    return model.eval().requires_grad_(False)


def _share(student: Any, teacher: Any) -> None:
    """Let the student have the teacher's tensors, until it gets some of its own."""
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    for name, parameter in student.named_parameters(remove_duplicate=False):
        parameter.data = theirs[name].data


def _make_latent(
    student: Any,
    blocks: Blocks,
    begun: Mapping[str, Solved],
    tensors: Mapping[str, TensorPlan],
    scale: str,
    activations: str,
    dtype: torch.dtype,
    all_weights: bool,
) -> None:
    """Give the student latent weights, and the others the values that they will have."""
    packed = {n: t for n, t in tensors.items() if t.packed and not t.tied_to and t.planes == 1}
    ternary = {name: plan for name, plan in packed.items() if plan.ternary}
    stored, dense = _values(blocks, begun, ternary)
    own = dict(student.named_parameters(remove_duplicate=False))
    estimator = "ste" if scale == "absmean" else "clipped"
    forms: dict[str, Form] = {}
    begins: dict[str, TensorPlan] = {}
    tied: dict[int, list[str]] = {}
    for name, parameter in own.items():
        tied.setdefault(id(parameter), []).append(name)
    for plan in packed.values():
        form = replace(form_of(plan), estimator=estimator)
        form = replace(form, scale=scale) if plan.ternary else form
        for name in blocks.places[plan.name].parameters:
            begins[name] = plan
            forms |= dict.fromkeys(tied[id(own[name])], form)
    insert(student, forms, activations)
    for name, plan in begins.items():
        weight = own[name].detach()
        if plan.ternary:
            begin(student, name, weight, stored=stored.get(name))
        else:
            numbers = _numbers_of_end(blocks.source, plan, begun.get(plan.name))
            begin_numbers(student, name, *numbers, weight if all_weights else None)
    for name, value in dense.items():
        own[name].data = value.to(own[name].device)
    for _, module in latent_modules(student):
        module.compute_dtype = dtype


def _values(
    blocks: Blocks, begun: Mapping[str, Solved], ternary: Mapping[str, TensorPlan]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By parameter, in its orientation: s t of what is trained, and what the others are.

    s t is in the space of the file; others are what the model multiplies by: sums of planes,
    vectors that were fitted.
    """
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, (packed, record) in begun.items():
        if record.shape is None:
            dense[name] = packed.read(name).reshape(packed.tensors[name].shape).to(torch.float32)
            continue
        if record.codec != BASE3:
            continue
        planes = [t.dequantize(torch.float32) for t in read_solved(packed, name, record)]
        total = sum_planes(planes)
        if name not in ternary and record.rotation[0]:
            total = unrotate(total, *record.rotation)
        (stored if name in ternary else dense)[name] = as_source(total, record)
    return blocks.as_parameters(stored), blocks.as_parameters(dense)


def _numbers_of_end(
    source: Checkpoint, plan: TensorPlan, begun: Solved | None
) -> tuple[Tensor, Tensor]:
    """The numbers of a head or embedding in 8 or 4 bits, int8 (rows, cols), and its scales.

    Those that it has got before, or what a conversion makes of the source.
    """
    if begun is not None:
        return read_numbers(begun[0], plan.name, begun[1])
    needed, encode = ROUNDED[plan.choice.codec]
    dtype = torch.float16

    def pieces() -> Iterator[Tensor]:
        return (logical(source.read(plan.name, *piece), plan) for piece in plan.pieces())

    for piece in pieces():
        dtype = torch.promote_types(dtype, needed(piece, plan.group_size))
    parts = [encode(piece, plan.group_size, dtype) for piece in pieces()]
    return torch.cat([q for q, _ in parts]), torch.cat([scales for _, scales in parts])


def _choose_trained(student: Any, all_weights: bool) -> None:
    """Latent weights, scales and vectors are trained, in float32; other matrices if asked for."""
    latents = {
        id(module._parameters[leaf])
        for _, module in latent_modules(student)
        for leaf in module.forms
    }
    for name, parameter in student.named_parameters():
        if not parameter.is_floating_point():
            continue
        if all_weights or parameter.ndim == 1 or id(parameter) in latents or "_log_scale" in name:
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)


class Widened(nn.Module):
    """Mixed into a linear layer or embedding that is kept in 16 bits and used in 32.

    Whoever reads the weight, the module or a model's own code, gets it in float32.
    """

    @property
    def weight(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.to(torch.float32)


class WidenedRows(Widened):
    """The same of an embedding: of the rows that are looked up alone."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        rows = nn.functional.embedding(input, weight).to(torch.float32)
        return rows * getattr(self, "embed_scale", 1)


def widen(model: Any, dtype: torch.dtype) -> None:
    """Let a model compute in float32, its frozen matrices staying as they are stored.

    In another dtype, which autocast sees to, only torch's norms are made wide: theirs can be no
    narrower than an input that comes of two 16-bit dtypes.
    """
    if dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, NORMS):
                module.float()
        return
    for module in model.modules():
        weight = module._parameters.get("weight")
        plain = type(module) is nn.Linear or isinstance(module, nn.Embedding)
        narrow = weight is not None and weight.dtype in (torch.bfloat16, torch.float16)
        if narrow and plain and not isinstance(module, Qat):
            looks_up = type(module) is nn.Embedding or hasattr(module, "embed_scale")
            mixin = WidenedRows if looks_up else Widened
            module.__class__ = type(f"Widened{type(module).__name__}", (mixin, type(module)), {})
            if module._parameters.get("bias") is not None:
                module.bias.data = module.bias.data.float()
        else:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.float32)


def _heads(pair: Pair) -> tuple[Head, Head] | None:
    """The heads of both, if hidden states and they give what the models give."""
    found = []
    for model in (pair.student, pair.teacher or pair.student):
        module, config = model_end(model, "head"), model.config.get_text_config()
        if not isinstance(module, nn.Linear) or model.base_model is model:
            return None
        factor = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1
        )
        cap = getattr(config, "final_logit_softcapping", None) or 0.0
        weight = module._parameters["weight"]
        assert weight is not None
        rows = partial(_rows_of, module) if isinstance(module, Qat) else None
        head = Head(weight, module.bias, float(factor), float(cap), rows)
        ids = torch.arange(8, device=weight.device)[None] % max(1, pair.vocabulary)
        with torch.no_grad(), pair.autocast():
            whole = model(input_ids=ids, use_cache=False).logits[0].float()
            pieces = head.of(Words()).logits(pair.hidden(model, {"input_ids": ids})[0], pair.dtype)
        size = float(whole.abs().max())
        loose = CLOSE if pair.dtype == torch.float32 else 0.05
        if not torch.allclose(whole, pieces, atol=loose * size, rtol=0):
            return None
        found.append(head)
    return found[0], found[1]


def _rows_of(head: Qat, ids: Tensor | None) -> Tensor:
    """The rows of a latent head for some words, or for all."""
    return head.rounded("weight") if ids is None else head.rows("weight", ids)
