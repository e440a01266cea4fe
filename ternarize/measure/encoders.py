"""How near the embeddings of a packed encoder are to its source's.

Each line of a text is embedded: the last hidden states, averaged over the attention mask. Reported
is the cosine between the embeddings of source and packed model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.measure.figures import check_numbers, mean_of
from ternarize.models.reads import encode_line, longest_text
from ternarize.progress import Progress


def embed(
    model: Any, tokenizer: Any, lines: Sequence[str], *, seq_len: int = 256, batch_size: int = 32
) -> Tensor:
    """Embed texts: mean of the last hidden states over the attention mask, of length 1.

    lines    any texts, cut to `seq_len` tokens (or what the model can take)

    Returns (lines, hidden) float32 on CPU.

    Sentence-BERT, section 3, strategy MEAN: https://arxiv.org/abs/1908.10084
    """
    length = min(seq_len, longest_text(model.config, tokenizer))
    ids = [encode_line(line, tokenizer, length) for line in lines]
    parts = [
        _embed(model, ids[start : start + batch_size], tokenizer)
        for start in range(0, len(ids), batch_size)
    ]
    return torch.cat(parts) if parts else torch.empty(0, model.config.hidden_size)


@torch.inference_mode()
def _embed(model: Any, ids: Sequence[list[int]], tokenizer: Any) -> Tensor:
    padded, mask = pad(ids, tokenizer)
    output = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device))
    return pool(output.last_hidden_state.float().cpu(), mask)


def pad(rows: Sequence[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids (n, longest) int64 and their attention mask, 0 behind the end of a row."""
    longest = max(1, *map(len, rows))
    padding = tokenizer.pad_token_id or 0  # masked, so any id will do
    ids = [row + [padding] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the attention mask (of everything, without one), of length 1.

    hidden  (n, length, hidden) float, or (n, hidden) of what is no sequence
    mask    (n, length), 1 where a token counts; one of another shape is not of these and left out

    Returns (n, hidden), in the dtype of `hidden`.
    """
    if mask is None or hidden.shape[:2] != mask.shape:
        mean = hidden.flatten(1) if hidden.ndim < 3 else hidden.mean(1).flatten(1)
    else:
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def line_cosines(
    models: Sequence[Any],
    ids: Sequence[list[int]],
    tokenizer: Any,
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    """Cosine of the embeddings by two models of the same lines, (lines,) float64."""
    parts: list[Tensor] = []
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        ours, theirs = (_embed(model, batch, tokenizer).double() for model in models)
        # 1 - |a - b|^2 / 2: exactly 1 for equal embeddings, where a . b carries a rounding
        parts.append(1 - (ours - theirs).square().sum(-1) / 2)
        if progress is not None:
            done = start + len(batch)
            known = f"cosine {float(torch.cat(parts).mean()):.4f}"
            progress(done, len(ids), known, "evaluating")
    cosines = torch.cat(parts)
    check_numbers(cosines, models[0], "embedding {} is NaN")
    return cosines


def summarize_cosines(cosines: Tensor, lines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The measures of `evaluate` from the cosines of some lines, (lines,) float64."""
    at = int(cosines.argmin())
    least = {"minimum": float(cosines[at]), "minimum_line": lines[at]}
    return {"cosine": {**mean_of(cosines), **least}}


def encode_lines(
    lines: Sequence[str], tokenizer: Any, length: int, max_tokens: int | None, *, where: str
) -> list[list[int]]:
    """Token ids of the first lines, up to `max_tokens` in all; raises UsageError when none."""
    rows: list[list[int]] = []
    total = 0
    for line in lines:
        row = encode_line(line, tokenizer, length)
        total += len(row)
        if max_tokens is not None and total > max_tokens:
            break
        rows.append(row)
    if not rows:
        raise UsageError(
            where,
            "no line to embed within "
            f"{'its end' if max_tokens is None else f'{max_tokens} tokens'} ({len(lines)} lines "
            "with text)",
            "at least one",
            "Give a longer text or more tokens",
        )
    return rows
