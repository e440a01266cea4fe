"""How much of a model is left after conversion, measured on texts and on what it writes.

Language models are run on windows of the text (language_models.py), and may write after prompts
(writing.py); encoders are run on its lines (encoders.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.measure.documents import DEFAULT, cut_windows, own_text, read_documents
from ternarize.measure.encoders import encode_lines, line_cosines, summarize_cosines
from ternarize.measure.language_models import MAX_BATCH, summarize, window_columns
from ternarize.measure.measured import Measured, compute_dtype, open_pair, shared_tokenizer
from ternarize.measure.prompts import Prompt
from ternarize.measure.writing import Writing, choose_prompts, compare_writing, room_to_write
from ternarize.models.reads import (
    CAUSAL,
    ENCODER,
    SPEECH,
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

Paths = str | Path | Sequence[str | Path]


def evaluate(
    packed: str | Path,
    *,
    source: str | Path | None = None,
    text: Paths = (),
    writing: Writing | None = None,
    seq_len: int = 256,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    activations: str | None = None,
    head: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a packed checkpoint on texts, against its source where that is given.

    packed       directory or Hub id; an ordinary checkpoint can be measured too
    source       the checkpoint that `packed` was made from; encoders need it
    text         UTF-8 file: documents separated by lines `<|doc|>`; for encoders a text per line.
                 "default": a text that comes with ternarize. Or several of them
    writing      what language models are to write after prompts; None: nothing
    seq_len      tokens of a window; of an encoder's line at most
    max_tokens   use no more than the first tokens of each text (prompts are cut from all of it)
    batch_size   windows, lines or prompts at a time; None: what keeps a model's logits in 256 MB,
                 and 16 prompts
    device       "cpu", "cuda", "auto", ...; None: cpu
    dtype        to compute in; None: float32 on CPU, elsewhere as in the checkpoint
    activations  of the packed model, "none" or "int8"; None: as in the checkpoint
    head         of the packed model, "int8" or None, as in `ternarize.load`
    progress     called after each batch with (windows, lines or prompts done, in all, what is known
                 so far, "evaluating" or "writing (packed)", "writing (source)")

    Returns plain data: "kind", "text" (a name, or a list of them), what was read ("tokens", what
    windows begin with among them, "windows" or "lines", ..., "windows_begin_with": the tokens that
    every window has in front), and measures, each {"value", "standard_error"} (None for a single
    window), over all that was read:

        causal language models   perplexity; with a source also source_perplexity,
                                 perplexity_ratio, kl_divergence (nats per token), top1_agreement
        encoders                 cosine, with "minimum" and the "minimum_line" where it occurs

    Of several texts, "texts" is a list of the same for each. With `writing`, "writing" is what
    `compare_writing` returns. Without a text, which may be where `writing` has prompts of its own,
    only that is measured.

    Raises UsageError when a text is too short or an option cannot be used, CheckpointError when
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
    evaluation = open_evaluation(packed, source, text, seq_len, max_tokens, writing)
    models = evaluation.load(device, dtype, activations, head)
    measures = evaluation.measure(models, batch_size, progress)
    if evaluation.prompts:
        measures["writing"] = evaluation.write(models, batch_size, progress)
    names = [str(each) for each in _several(text)]
    return {
        "kind": evaluation.kind,
        "model": str(packed),
        "source": None if source is None else str(source),
        "text": names if len(names) > 1 else "".join(names) or None,
        **evaluation.read(),
        "dtype": str(models[0].dtype)[6:],
        "device": str(models[0].device),
        **measures,
    }


def open_evaluation(
    packed: str | Path,
    source: str | Path | None,
    text: Paths,
    seq_len: int,
    max_tokens: int | None = None,
    writing: Writing | None = None,
) -> "Evaluation":
    """Find the checkpoints, cut texts and prompts; no weight is read.

    Arguments, errors: `evaluate`.
    """
    checkpoints = _checkpoints(packed, source)
    ours, names = checkpoints[0], [str(each) for each in _several(text)]
    if not names and (writing is None or writing.prompts is None):
        raise UsageError("text", "none is given", "at least one, or prompts", "Name a text")
    if writing is not None and ours.kind != CAUSAL:
        found = f"is an {ours.kind}, which writes nothing"
        raise UsageError(ours.directory, found, f"a {CAUSAL}", "Measure it on a text alone")
    tokenizer = shared_tokenizer(checkpoints)
    texts = [(name, read_documents(own_text() if name == DEFAULT else name)) for name in names]
    cut = _cut_windows if ours.kind == CAUSAL else _cut_lines
    evaluation = cut(texts, checkpoints, tokenizer, seq_len, max_tokens)
    if writing is None:
        return evaluation
    prompts = choose_prompts(writing, texts, tokenizer)
    for each in prompts:
        check_ids([torch.tensor(each.ids)], ours.config, each.where)
    context = min(max_positions(each.config) for each in checkpoints)
    new_tokens = room_to_write(prompts, writing.max_new_tokens, context)
    return replace(evaluation, prompts=prompts, new_tokens=new_tokens)


def _checkpoints(packed: str | Path, source: str | Path | None) -> list[Measured]:
    """A model, and its source if there is one, of which texts say something."""
    checkpoints = open_pair(packed, source)
    ours = checkpoints[0]
    if ours.kind == SPEECH:
        found = f"is a {SPEECH}, which reads no text"
        raise UsageError(ours.directory, found, "a folder of audio files", "Name it with --audio")
    if ours.kind == ENCODER and source is None:
        found = "is an encoder and measured by the distance to its source"
        raise UsageError(ours.directory, found, "a source", "Name it with --source")
    return checkpoints


def _several(text: Paths) -> list[str | Path]:
    return [text] if isinstance(text, str | Path) else list(text)


def _cut_windows(
    texts: Sequence[tuple[str, list[str]]],
    checkpoints: list[Measured],
    tokenizer: Any,
    seq_len: int,
    max_tokens: int | None,
) -> "Evaluation":
    """Texts, by name, as windows, none of which holds two of them."""
    parts = []
    for name, documents in texts:
        check_seq_len(seq_len, min(max_positions(each.config) for each in checkpoints))
        windows = cut_windows(documents, tokenizer, seq_len, max_tokens, where=name)
        check_ids([windows], checkpoints[0].config, name)
        parts.append((name, windows))
    ids = torch.cat([windows for _, windows in parts]) if parts else torch.empty(0, seq_len)
    sizes = [(name, len(windows)) for name, windows in parts]
    prefix = frame(tokenizer).prefix
    return Evaluation(checkpoints, tokenizer, ids, prefix, [], seq_len, sizes)


def _cut_lines(
    texts: Sequence[tuple[str, list[str]]],
    checkpoints: list[Measured],
    tokenizer: Any,
    seq_len: int,
    max_tokens: int | None,
) -> "Evaluation":
    """Texts, by name, as lines for an encoder."""
    length = min(seq_len, *(longest_text(each.config, tokenizer) for each in checkpoints))
    ids: list[list[int]] = []
    used: list[str] = []
    sizes = []
    for name, documents in texts:
        lines = [line for each in documents for line in each.splitlines() if line.strip()]
        rows = encode_lines(lines, tokenizer, length, max_tokens, where=name)
        ids += rows
        used += lines[: len(rows)]
        sizes.append((name, len(rows)))
    return Evaluation(checkpoints, tokenizer, ids, [], used, length, sizes)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` will measure on what, before weights are loaded.

    checkpoints  the packed one, and its source if there is one
    ids          windows (n, seq_len) int64, or the token ids of an encoder's lines
    prefix       tokens that every window begins with
    lines        of the texts, for encoders
    sizes        (name, windows or lines) of each text, in the order in which `ids` has them
    prompts      that the models are to write after, new_tokens at most
    """

    checkpoints: list[Measured]
    tokenizer: Any
    ids: Tensor | list[list[int]]
    prefix: list[int]
    lines: list[str]
    seq_len: int
    sizes: list[tuple[str, int]]
    prompts: Sequence[Prompt] = ()
    new_tokens: int = 0

    @property
    def kind(self) -> str:
        """CAUSAL or ENCODER."""
        return self.checkpoints[0].kind

    def read(self, start: int = 0, end: int | None = None) -> dict[str, Any]:
        """What is read, in plain data; or a part of the windows or lines."""
        ids = self.ids[start:end]
        if not self.sizes:
            return {}
        if isinstance(ids, Tensor):
            return {
                "seq_len": self.seq_len,
                "tokens": ids.numel(),
                "windows": len(ids),
                "windows_begin_with": names_of(self.prefix, self.tokenizer),
            }
        return {"seq_len": self.seq_len, "tokens": sum(map(len, ids)), "lines": len(ids)}

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
    ) -> dict[str, Any]:
        """The measures of `evaluate`, and those of each text where there are several."""
        if not self.sizes:
            return {}
        size = batch_size or self.batch_size()
        if isinstance(self.ids, Tensor):
            first = max(1, len(self.prefix))
            columns = window_columns(models, self.ids, size, progress, first=first)
        else:
            columns = line_cosines(models, self.ids, self.tokenizer, size, progress)[None]

        def measures_of(start: int, end: int) -> dict[str, Any]:
            some = columns[:, start:end]
            if isinstance(self.ids, Tensor):
                return dict(summarize(some))
            return summarize_cosines(some[0], self.lines[start:end])

        measures = measures_of(0, len(self.ids))
        if len(self.sizes) > 1:
            places = pairwise(accumulate((count for _, count in self.sizes), initial=0))
            measures["texts"] = [
                {"text": name, **self.read(*place), **measures_of(*place)}
                for (name, _), place in zip(self.sizes, places, strict=True)
            ]
        return measures

    def write(
        self, models: Sequence[Any], batch_size: int | None, progress: Progress | None
    ) -> dict[str, Any]:
        """What the models write after the prompts, and its measures."""
        size = batch_size or MAX_BATCH
        return compare_writing(
            models, self.prompts, self.tokenizer, self.new_tokens, size, progress
        )
