"""How much of a model is left after conversion, measured on a text.

Language models are run on windows of the text (language_models.py), encoders on its lines
(encoders.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.measure.documents import DEFAULT, cut_windows, own_text, read_documents
from ternarize.measure.encoders import compare_lines, encode_lines
from ternarize.measure.language_models import MAX_BATCH, compare_windows
from ternarize.measure.measured import Measured, compute_dtype, shared_tokenizer
from ternarize.models.reads import (
    CAUSAL,
    ENCODER,
    check_ids,
    check_seq_len,
    frame,
    longest_text,
    max_positions,
    names_of,
    vocabulary_size,
)
from ternarize.progress import Progress
from ternarize.trits.ternary import check_device

# Logits of a batch are the largest thing in memory beside the weights: float32, one per word of
# the vocabulary and position.
LOGITS_BYTES = 256 << 20


def evaluate(
    packed: str | Path,
    *,
    source: str | Path | None = None,
    text: str | Path,
    seq_len: int = 256,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    activations: str | None = None,
    head: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a packed checkpoint on a text, against its source where that is given.

    packed       directory or Hub id; an ordinary checkpoint can be measured too
    source       the checkpoint that `packed` was made from; encoders need it
    text         UTF-8 file: documents separated by lines `<|doc|>`; for encoders a text per line.
                 "default": a text that comes with ternarize
    seq_len      tokens of a window; of an encoder's line at most
    max_tokens   use no more than the first tokens of the text
    batch_size   windows or lines at a time; None: what keeps a model's logits in 256 MB
    device       "cpu", "cuda", "auto", ...; None: cpu
    dtype        to compute in; None: float32 on CPU, elsewhere as in the checkpoint
    activations  of the packed model, "none" or "int8"; None: as in the checkpoint
    head         of the packed model, "int8" or None, as in `ternarize.load`
    progress     called after each batch with (windows or lines done, in all, what is known so far,
                 "evaluating")

    Returns plain data: "kind", what was read ("tokens", what windows begin with among them,
    "windows" or "lines", ..., "windows_begin_with": the tokens that every window has in front), and
    measures, each {"value", "standard_error"} (None for a single window):

        causal language models   perplexity; with a source also source_perplexity,
                                 perplexity_ratio, kl_divergence (nats per token), top1_agreement
        encoders                 cosine, with "minimum" and the "minimum_line" where it occurs

    Raises UsageError when the text is too short or an option cannot be used, CheckpointError when
    a model cannot be loaded or evaluated.
    """
    for name, value, least in (
        ("sequence length", seq_len, 2),
        ("max tokens", max_tokens, 1),
        ("batch size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise UsageError(name, f"{value}", f"at least {least}", "Use a larger number")
    dtype = compute_dtype(dtype, device)
    device = device if device == "auto" else check_device(device)
    evaluation = prepare(packed, source, text, seq_len, max_tokens)
    models = evaluation.load(device, dtype, activations, head)
    measures = evaluation.measure(models, batch_size, progress)
    return {
        "kind": evaluation.kind,
        "model": str(packed),
        "source": None if source is None else str(source),
        "text": str(text),
        **evaluation.read(),
        "dtype": str(models[0].dtype)[6:],
        "device": str(models[0].device),
        **measures,
    }


def prepare(
    packed: str | Path,
    source: str | Path | None,
    text: str | Path,
    seq_len: int,
    max_tokens: int | None = None,
) -> "Evaluation":
    """Find the checkpoints and cut the text; no weight is read. Arguments, errors: `evaluate`."""
    checkpoints = [Measured.at(path) for path in (packed, source) if path is not None]
    ours = checkpoints[0]
    for theirs in checkpoints[1:]:
        for of in (_kind_of, _vocabulary_of):
            if of(ours) != of(theirs):
                raise UsageError(
                    theirs.directory,
                    f"is {of(theirs)} and {ours.directory} {of(ours)}",
                    "the model and its source",
                    "Name the source that was converted",
                )
    if ours.kind == ENCODER and source is None:
        found = "is an encoder and measured by the distance to its source"
        raise UsageError(ours.directory, found, "a source", "Name it with --source")
    tokenizer = shared_tokenizer(checkpoints)
    documents = read_documents(own_text() if str(text) == DEFAULT else text)
    where = str(text)
    if ours.kind == CAUSAL:
        check_seq_len(seq_len, min(max_positions(each.config) for each in checkpoints))
        windows = cut_windows(documents, tokenizer, seq_len, max_tokens, where=where)
        check_ids([windows], ours.config, where)
        return Evaluation(checkpoints, tokenizer, windows, frame(tokenizer).prefix, [], seq_len)
    lines = [line for document in documents for line in document.splitlines() if line.strip()]
    length = min(seq_len, *(longest_text(each.config, tokenizer) for each in checkpoints))
    ids = encode_lines(lines, tokenizer, length, max_tokens, where=where)
    return Evaluation(checkpoints, tokenizer, ids, [], lines, length)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` will measure on what, before weights are loaded.

    checkpoints  the packed one, and its source if there is one
    ids          windows (n, seq_len) int64, or the token ids of an encoder's lines
    prefix       tokens that every window begins with
    lines        of the text, for encoders
    """

    checkpoints: list[Measured]
    tokenizer: Any
    ids: Tensor | list[list[int]]
    prefix: list[int]
    lines: list[str]
    seq_len: int

    @property
    def kind(self) -> str:
        """CAUSAL or ENCODER."""
        return self.checkpoints[0].kind

    def read(self) -> dict[str, Any]:
        """What is read, in plain data."""
        if isinstance(self.ids, Tensor):
            return {
                "seq_len": self.seq_len,
                "tokens": self.ids.numel(),
                "windows": len(self.ids),
                "windows_begin_with": names_of(self.prefix, self.tokenizer),
            }
        tokens = sum(map(len, self.ids))
        return {"seq_len": self.seq_len, "tokens": tokens, "lines": len(self.ids)}

    def batch_size(self) -> int:
        """Windows or lines at a time where nobody says how many."""
        if self.kind != CAUSAL:
            return MAX_BATCH
        vocabulary = max(vocabulary_size(each.config) or 1 for each in self.checkpoints)
        return min(max(1, LOGITS_BYTES // (4 * self.seq_len * vocabulary)), MAX_BATCH)

    def load(
        self,
        device: str,
        dtype: torch.dtype | None,
        activations: str | None = None,
        head: str | None = None,
    ) -> list[Any]:
        """The models of the checkpoints; `activations` and `head` are of the packed one."""
        models = [self.checkpoints[0].load(device, dtype, activations, head)]
        return models + [each.load(device, dtype) for each in self.checkpoints[1:]]

    def measure(
        self, models: Sequence[Any], batch_size: int | None, progress: Progress | None
    ) -> dict[str, dict[str, Any]]:
        """The measures of `evaluate`."""
        size = batch_size or self.batch_size()
        if isinstance(self.ids, Tensor):
            first = max(1, len(self.prefix))
            return compare_windows(models, self.ids, size, progress, first=first)
        measures = compare_lines(models, self.ids, self.tokenizer, size, progress)
        measures["cosine"]["minimum_line"] = self.lines[measures["cosine"].pop("at")]
        return measures


def _kind_of(checkpoint: Measured) -> str:
    return f"a {checkpoint.kind}" if checkpoint.kind == CAUSAL else f"an {checkpoint.kind}"


def _vocabulary_of(checkpoint: Measured) -> str:
    return f"of a vocabulary of {vocabulary_size(checkpoint.config)} tokens"
