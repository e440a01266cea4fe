"""The two models of a training: a teacher that stays, and a student that learns.

Both are loaded by transformers from the source. What the student does not train it shares with the
teacher: an embedding of 168 million weights is in memory once. The teacher's matrices stay in the
dtype of the source and are widened when they are used; a processor without fast 16-bit products
computes in float32, all others in bfloat16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ternarize.calibrate.blocks import Blocks
from ternarize.calibrate.solved import SolvedBlocks
from ternarize.errors import CheckpointError, UsageError
from ternarize.models.configuration import open_config, usable
from ternarize.models.reads import CAUSAL, kind_of, vocabulary_size
from ternarize.models.skeleton import model_end
from ternarize.plans.layout import TensorPlan
from ternarize.plans.recipe import Train
from ternarize.qat.modules import Qat, latent_modules
from ternarize.qat.prepare import begin, insert
from ternarize.qat.rounding import Form
from ternarize.train.losses import Head

CLOSE = 1e-3  # of logits from hidden states, relative to their size, in float32


@dataclass
class Pair:
    """Student and teacher, and how their outputs are compared.

    teacher  None where the text itself is the objective
    kind     of the model, as models/reads.py has them
    heads    of student and teacher, where logits can be made of hidden states piece by piece
    dtype    of products
    """

    student: Any
    teacher: Any
    kind: str
    heads: tuple[Head, Head] | None
    dtype: torch.dtype
    vocabulary: int

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


def fast_dtype(device: str) -> torch.dtype:
    """In which products are fast: bfloat16 on GPUs and on CPUs with AMX or AVX-512 BF16."""
    if device != "cpu":
        return torch.bfloat16
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def make_pair(
    blocks: Blocks,
    solved: SolvedBlocks | None,
    tensors: Mapping[str, TensorPlan],
    training: Train,
    scale: str,
    activations: str,
    device: str,
) -> Pair:
    """Load both models; the student's ternary weights begin where calibration has left them.

    tensors  the plan's ternary tensors that are to be trained, by name
    scale    of latent weights: "learned", or "absmean" as BitNet b1.58 has it

    Raises CheckpointError for a model that cannot be run, UsageError for a teacher that knows other
    words.
    """
    directory = blocks.source.directory
    dtype = fast_dtype(device)
    student = _open(directory, device)
    teacher: Any = None
    if training.objective == "distill":
        teacher = _open(training.teacher or directory, device)
        _check_words(student, teacher, training.teacher)
        if training.teacher is None:
            _share(student, teacher)
    _make_ternary(student, blocks, solved, tensors, scale, activations, dtype)
    _choose_trained(student, training.all_weights, dtype)
    for model in (student, teacher):
        if model is not None:
            _widen(model, dtype)
    kind = kind_of(type(student), student.config)
    pair = Pair(student, teacher, kind, None, dtype, vocabulary_size(student.config) or 0)
    if kind == CAUSAL:
        pair.heads = _heads(pair)
    return pair


def _open(where: Any, device: str) -> Any:
    config = open_config(where)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        raise CheckpointError(
            where,
            f"architectures {config.architectures}; training runs the model",
            f"a class of transformers {transformers.__version__}",
            "Convert it without training",
        )
    with usable(Path(where)):
        model = model_class.from_pretrained(where, dtype="auto").to(device)
    return model.eval().requires_grad_(False)


def _check_words(student: Any, teacher: Any, name: str | None) -> None:
    sizes = [vocabulary_size(model.config) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            name or "teacher",
            f"knows {sizes[1]} words, and the model {sizes[0]}",
            "the same vocabulary",
            "Name another teacher, or train on the texts (--objective text)",
        )


def _share(student: Any, teacher: Any) -> None:
    """Let the student have the teacher's tensors, until it gets some of its own."""
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    for name, parameter in student.named_parameters(remove_duplicate=False):
        parameter.data = theirs[name].data


def _make_ternary(
    student: Any,
    blocks: Blocks,
    solved: SolvedBlocks | None,
    tensors: Mapping[str, TensorPlan],
    scale: str,
    activations: str,
    dtype: torch.dtype,
) -> None:
    """Give the student latent weights, and the vectors that calibration has fitted."""
    stored: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for path in blocks.paths if solved is not None else ():
        parts = solved.parts(path)  # type: ignore[union-attr]
        stored |= {f"{path}.{n}": planes[0] for n, planes in parts.stored.items()}
        vectors |= {f"{path}.{n}": value for n, value in parts.vectors.items()}
    forms: dict[str, Form] = {}
    for name, plan in tensors.items():
        for parameter in blocks.places[name].parameters:
            forms[parameter] = Form(
                plan.group_size,
                plan.choice.transposed,
                *plan.rotation,
                scale=scale,
                estimator="ste" if scale == "absmean" else "clipped",
                scale_dtype=plan.scale_dtype,
            )
    own = dict(student.named_parameters(remove_duplicate=False))
    insert(student, forms, activations)
    for name in forms:
        weight = own[name].detach()
        begin(student, name, weight, stored=stored.get(name))
    for name, value in vectors.items():
        own[name].data = value.to(own[name].device)
    for _, module in latent_modules(student):
        module.compute_dtype = dtype


def _choose_trained(student: Any, all_weights: bool, dtype: torch.dtype) -> None:
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
    """Mixed into a linear layer or embedding that is kept in 16 bits and used in 32."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if isinstance(self, nn.Embedding):
            rows = nn.functional.embedding(input, weight).to(torch.float32)
            return rows * getattr(self, "embed_scale", 1)
        return nn.functional.linear(input, weight.to(torch.float32), self.bias)  # type: ignore[arg-type]


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Let a model compute in float32, its frozen matrices staying as they are stored."""
    if dtype != torch.float32:
        return
    for module in model.modules():
        weight = module._parameters.get("weight")
        plain = type(module) is nn.Linear or isinstance(module, nn.Embedding)
        narrow = weight is not None and weight.dtype in (torch.bfloat16, torch.float16)
        if narrow and plain and not isinstance(module, Qat):
            module.__class__ = type(f"Widened{type(module).__name__}", (Widened, type(module)), {})
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
        head = Head(module.weight, module.bias, float(factor), float(cap))
        ids = torch.arange(8, device=module.weight.device)[None] % max(1, pair.vocabulary)
        with torch.no_grad(), pair.autocast():
            whole = model(input_ids=ids, use_cache=False).logits[0].float()
            pieces = head.logits(pair.hidden(model, {"input_ids": ids})[0], pair.dtype)
        size = float(whole.abs().max())
        loose = CLOSE if pair.dtype == torch.float32 else 0.05
        if not torch.allclose(whole, pieces, atol=loose * size, rtol=0):
            return None
        found.append(head)
    return found[0], found[1]
