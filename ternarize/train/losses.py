"""Losses over large vocabularies, in pieces, with their gradients.

Nothing of the size tokens x words is held: for some tokens at a time the logits of student and
teacher are worked out from their last hidden states, the loss is added up, and its gradient is
taken back to the student's hidden states at once.

    divergence  mean over tokens of sum_i p_i (log p_i - log q_i),   gradient of the logits q - p
    text        mean over tokens of -log q_(next),                   gradient of the logits q - 1

A step need not look at all words: those that it names count once, and a sample of the others counts
for all of them,

    p_i = w_i exp(l_i) / sum_j w_j exp(l_j),   w = 1, or (others) / (sampled) of a sampled word,

which is importance sampling of the softmax's sum: Bengio and Senecal 2008,
https://doi.org/10.1109/TNN.2007.912312. Source of the loss: knowledge distillation,
https://arxiv.org/abs/1503.02531, at temperature 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

_PIECE, _ON_A_GPU = 256, 2048  # tokens whose logits are in memory at a time
ALL_WORDS = 1 << 16  # a vocabulary of up to so many words is used whole
OTHERS = 8192  # words sampled, at least, from those that a step does not name
MULTIPLE = 1024


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its last hidden states: cap tanh(factor (h W^T + b) / cap).

    weight  (words, n), bias (words,) or None
    cap     0: none
    rows    gives the rows of some words (ids, or None: all), where a weight is rounded whenever it
            is used: `of` asks for them
    """

    weight: Tensor
    bias: Tensor | None = None
    factor: float = 1.0
    cap: float = 0.0
    rows: Callable[[Tensor | None], Tensor] | None = None

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """(tokens, n) -> (tokens, words) float32; products in `dtype`."""
        values = (hidden.to(dtype) @ self.weight.to(dtype).T).to(torch.float32)
        if self.bias is not None:
            values = values + self.bias
        values = values * self.factor if self.factor != 1 else values
        return self.cap * torch.tanh(values / self.cap) if self.cap else values

    def before(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient by h W^T + b of that by logits, (tokens, words)."""
        if self.cap:
            gradient = gradient * (1 - (logits / self.cap).square())
        return gradient * self.factor if self.factor != 1 else gradient

    def of(self, words: "Words") -> "Head":
        """The head for some words alone."""
        if words.ids is None and self.rows is None:
            return self
        some = slice(None) if words.ids is None else words.ids
        bias = None if self.bias is None else self.bias[some]
        weight = self.weight[some] if self.rows is None else self.rows(words.ids)
        return Head(weight, bias, self.factor, self.cap)


@dataclass(frozen=True)
class Words:
    """The words that a step looks at.

    ids         (words,) int64, sorted; None: all
    log_weight  (words,) float32, log w
    """

    ids: Tensor | None = None
    log_weight: Tensor | None = None

    def position(self, tokens: Tensor) -> Tensor:
        """Where tokens stand among the words; they must be among them."""
        return tokens if self.ids is None else torch.searchsorted(self.ids, tokens)


def choose_words(named: Tensor, vocabulary: int, generator: torch.Generator) -> Words:
    """The words of a step: those named, and a sample of the others. All of a small vocabulary.

    named  token ids of any shape and order
    """
    if vocabulary <= ALL_WORDS:
        return Words()
    taken = torch.zeros(vocabulary, dtype=torch.bool)
    taken[named.flatten().cpu()] = True
    others = (~taken).nonzero().flatten()
    # in all a multiple of a number: what products keep for each shape that they have seen would
    # pile up from step to step
    count = OTHERS + -(vocabulary - len(others) + OTHERS) % MULTIPLE
    order = torch.rand(len(others), generator=generator)
    sampled = others[order.topk(min(count, len(others)), sorted=False).indices]
    weight = torch.zeros(vocabulary)
    weight[taken] = 1.0
    weight[sampled] = len(others) / max(1, len(sampled))
    ids = weight.nonzero().flatten()
    return Words(ids.to(named.device), weight[ids].log().to(named.device))


def divergence(
    hidden: Tensor,
    target: Tensor,
    heads: tuple[Head, Head],
    words: Words,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), and how often both find the same word likeliest.

    hidden  (tokens, n) of the student, with gradient; so may be the weight and bias of its head
    target  (tokens, m) of the teacher
    heads   of student and teacher, for `words` (`Head.of`)
    dtype   of the products
    compiled  whether torch compiles what is done to the logits

    Returns two scalars, means over the tokens.
    """
    end = heads[0].weight, heads[0].bias
    return _apply(hidden, *end, target, None, heads, words, dtype, compiled)


def text_loss(
    hidden: Tensor, following: Tensor, head: Head, words: Words, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token (tokens,) int64, and how often it was the likeliest."""
    right = words.position(following)
    return _apply(hidden, head.weight, head.bias, None, right, (head, head), words, dtype, False)


def _apply(*arguments: Any) -> tuple[Tensor, Tensor]:
    loss, same = _InPieces.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss, same


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        following: Tensor | None,
        heads: tuple[Head, Head],
        words: Words,
        dtype: torch.dtype,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        student, teacher = (replace(head, weight=head.weight.to(dtype)) for head in heads)
        towards = _compiled() if compiled else _piece
        loss = hidden.new_zeros((), dtype=torch.float64)
        same = hidden.new_zeros((), dtype=torch.int64)  # a GPU is not waited for
        piece = _PIECE if hidden.device.type == "cpu" else _ON_A_GPU
        slopes = any(ctx.needs_input_grad)
        of_hidden = torch.empty_like(hidden) if slopes else None
        wide = torch.float32  # in which gradients of 16-bit rows are added up, too
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        count = max(1, len(hidden))
        for start in range(0, len(hidden), piece):
            part = slice(start, start + piece)
            logits = student.logits(hidden[part], dtype)
            if target is not None:
                others = teacher.logits(target[part], dtype)
                found = towards(student, logits, others, words.log_weight, dtype)
            else:
                assert following is not None
                found = _piece_of_text(student, logits, following[part], words, dtype)
            loss += found[0]
            same += found[1]
            if of_hidden is None:  # nothing is trained: it is looked at
                continue
            narrow = found[2]
            of_hidden[part] = (narrow @ student.weight).to(hidden.dtype)
            if of_weight is not None:
                of_weight += narrow.T @ hidden[part].to(dtype)
            if of_bias is not None:
                of_bias += narrow.sum(0, dtype=of_bias.dtype)
        for each in (of_hidden, of_weight, of_bias):
            if each is not None:
                each /= count
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        agreement = (same.to(torch.float64) / count).to(torch.float32)
        ctx.mark_non_differentiable(agreement)
        return (loss / count).to(torch.float32), agreement

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        own = [
            each * grads[0].to(each.dtype) if each is not None else None
            for each in ctx.saved_tensors
        ]
        return *own, None, None, None, None, None, None


def _piece(
    head: Head, logits: Tensor, others: Tensor, log_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some tokens' logits and the teacher's: the divergence, float64, how often the likeliest
    word is the same, and the gradient of the divergence by h W^T + b, of `dtype`."""
    log_q, log_p = _log_softmax(logits, log_weight), _log_softmax(others, log_weight)
    likeliest = (log_q == log_q.amax(-1, keepdim=True)) & (log_p == log_p.amax(-1, keepdim=True))
    same = likeliest.any(-1).sum()  # torch finds a place more slowly than a value
    p = log_p.exp()
    each = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0)  # words that a model rules out
    slope = head.before(log_q.exp_().sub_(p), logits)
    return each.sum(-1).sum(dtype=torch.float64), same, slope.to(dtype)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_piece` in fewer passes over what has the size of logits; their number changes each time."""
    return torch.compile(_piece, dynamic=True)


def _piece_of_text(
    head: Head, logits: Tensor, following: Tensor, words: Words, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same towards the next tokens, which are given as places among the words."""
    log_q, right = _log_softmax(logits, words.log_weight), following.unsqueeze(-1)
    found = log_q.gather(-1, right)
    same = (found == log_q.amax(-1, keepdim=True)).sum()
    slope = log_q.exp_()
    slope.scatter_add_(-1, right, -torch.ones_like(right, dtype=slope.dtype))
    return -found.sum(dtype=torch.float64), same, head.before(slope, logits).to(dtype)


def _log_softmax(logits: Tensor, log_weight: Tensor | None) -> Tensor:
    return (logits if log_weight is None else logits + log_weight).log_softmax(-1)
