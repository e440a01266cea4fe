"""How much of a language model is left: its next words against the source's, on windows of a text.

Positions 2..n of a window count (behind what the tokenizer puts in front, where that is longer than
one token), each predicted from the tokens before it in its window; what a document begins with in
the midst of a window counts like any other token. For the next-token distributions P of the source
and Q of the packed model, and the true token t:

    perplexity        exp(mean of -ln Q(t))
    KL divergence     mean of sum_v P(v) ln(P(v) / Q(v)), nats per token
    top-1 agreement   share of positions where P and Q have the same most likely token

Perplexity says how well the text is predicted, the other two how far the packed model is from its
source, which a lucky text cannot hide. Both models see the same windows side by side, a batch at
a time, so that memory holds the logits of one batch, and differences are paired.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize.measure.figures import Figure, check_numbers, exp, exponential, mean_of
from ternarize.progress import Progress

MAX_BATCH = 16  # windows or lines
LOGITS = 1 << 22  # compared at a time, so that what is made of them stays small


def window_columns(
    models: Sequence[Any],
    windows: Tensor,
    batch_size: int = MAX_BATCH,
    progress: Progress | None = None,
    *,
    first: int = 1,
) -> Tensor:
    """What `compare_logits` gives for each window: (1 or 4, windows) float64.

    models   (packed,) or (packed, source); causal language models, on any device
    windows  (windows, seq_len) int64 token ids
    first    position of a window, from 0, whose token is the first to be predicted

    Raises CheckpointError when logits are not finite.
    """
    per_window: list[list[float]] = []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        logits = [_logits(model, batch) for model in models]
        for index, window in enumerate(batch):
            per_window.append(compare_logits([each[index] for each in logits], window, first))
        if progress is not None:
            so_far = torch.tensor([row[0] for row in per_window], dtype=torch.float64).mean()
            known = f"perplexity {exp(float(so_far)):.2f}"
            progress(len(per_window), len(windows), known, "evaluating")
        del logits  # before the next batch's are made
    columns = torch.tensor(per_window, dtype=torch.float64).T
    check_numbers(columns, models[0], "the logits of window {} are NaN")
    return columns


def summarize(columns: Tensor) -> dict[str, Figure]:
    """The measures of `evaluate` from those of `window_columns`: (1 or 4, windows) float64."""
    measures = {"perplexity": exponential(columns[0])}
    if len(columns) > 1:
        measures["source_perplexity"] = exponential(columns[1])
        measures["perplexity_ratio"] = exponential(columns[0] - columns[1])
        measures["kl_divergence"] = mean_of(columns[2])
        measures["top1_agreement"] = mean_of(columns[3])
    return measures


@torch.inference_mode()
def _logits(model: Any, batch: Tensor) -> Tensor:
    """Logits of all positions but the last, (batch, seq_len - 1, vocabulary)."""
    logits: Tensor = model(input_ids=batch.to(model.device), use_cache=False).logits
    return logits[:, :-1]


@torch.inference_mode()
def compare_logits(logits: Sequence[Tensor], window: Tensor, first: int = 1) -> list[float]:
    """Means over the positions of one window: -ln Q(t) and, with a source, -ln P(t), KL, top-1.

    logits  of one model, or of a model and its source: (seq_len - 1, vocabulary) float each
    window  (seq_len,) int64 token ids
    first   position, from 0, whose token is the first to be predicted

    Returns 1 or 4 numbers; KL in nats.
    """
    device, vocabulary = logits[0].device, logits[0].shape[-1]
    some = max(1, LOGITS // vocabulary)  # rows at a time
    parts = []
    for start in range(first - 1, len(window) - 1, some):
        rows = [each[start : start + some] for each in logits]
        logs = [each.to(device, torch.float32).log_softmax(-1) for each in rows]
        target = window[start + 1 : start + 1 + some, None].to(device)
        values = [-each.gather(-1, target).squeeze(-1) for each in logs]
        if len(logs) > 1:
            q, p = logs
            # a word that the source excludes (logit -inf) adds 0 ln 0 = 0
            values.append(torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1))
            values.append((p.argmax(-1) == q.argmax(-1)).float())
        parts.append(torch.stack(values))
    return [float(each.cpu().double().mean()) for each in torch.cat(parts, 1)]
