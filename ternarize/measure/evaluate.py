"""How much of a model is left after conversion, measured on a text.

Language models. The text is split into documents at lines `<|doc|>`; each begins with what the
tokenizer itself puts in front of a text (its prefix: Gemma's `<bos>`; where it puts nothing, with
the bos token, or eos where there is none); all are joined and cut into windows of `seq_len` tokens
without overlap, and what is left over at the end is not used. Every window begins with the prefix:
one that begins in the midst of a document has it in front of the next seq_len - len(prefix) tokens,
one that begins with a document has its own. A model that parks its attention on the first token
is not itself without it. Positions 2..n of a window count (behind the prefix, where that is longer
than one token), each predicted from the tokens before it in its window; what a document begins with
in the midst of a window counts like any other token. For the next-token distributions P of the
source and Q of the packed model, and the true token t:

    perplexity        exp(mean of -ln Q(t))
    KL divergence     mean of sum_v P(v) ln(P(v) / Q(v)), nats per token
    top-1 agreement   share of positions where P and Q have the same most likely token

Perplexity says how well the text is predicted, the other two how far the packed model is from its
source, which a lucky text cannot hide. Both models see the same windows side by side, a batch at
a time, so that memory holds the logits of one batch, and differences are paired.

Encoders. Each line of the text is embedded: the last hidden states, averaged over the attention
mask. Reported is the cosine between the embeddings of source and packed model.

Tokens of a window depend on each other, so standard errors are those of a mean over windows (or
lines), not over tokens; that of the perplexity follows by the delta method, exp(m) se(m). They
say how far another text of the same kind may lie, not how far another kind of text may.
"""

import importlib
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.json_files import read_config
from ternarize.models.configuration import config_from
from ternarize.models.places import locate as locate_tensors
from ternarize.progress import Progress
from ternarize.runtime.load import load, usable
from ternarize.sources.checkpoint import locate
from ternarize.sources.imports import find_gguf, open_source
from ternarize.sources.imports.common import Imported
from ternarize.trits.ternary import check_device

SEPARATOR = "<|doc|>"
DEFAULT = "default"  # the text that comes with the package, in place of a file
CAUSAL, ENCODER = "causal language model", "encoder"
SUPPORTED = "causal language models and text encoders can be evaluated"


# Logits of a batch are the largest thing in memory beside the weights: float32, one per word of
# the vocabulary and position.
LOGITS_BYTES = 256 << 20
MAX_BATCH = 16
CHUNK = 1 << 22  # logits compared at a time, so that what is made of them stays small
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)
Model = Any  # transformers' annotations do not describe its own models' methods


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
    dtype = _dtype(dtype, device)
    device = device if device == "auto" else check_device(device)
    work = prepare(packed, source, text, seq_len, max_tokens)
    models = work.load(device, dtype, activations, head)
    measures = work.measure(models, batch_size, progress)
    return {
        "kind": work.kind,
        "model": str(packed),
        "source": None if source is None else str(source),
        "text": str(text),
        **work.read(),
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
) -> "Work":
    """Find the checkpoints and cut the text; no weight is read. Arguments, errors: `evaluate`."""
    checkpoints = [_Checkpoint.at(path) for path in (packed, source) if path is not None]
    ours = checkpoints[0]
    if len({checkpoint.kind for checkpoint in checkpoints}) > 1:
        theirs = checkpoints[1]
        raise UsageError(
            theirs.directory,
            f"is a {theirs.kind} ({theirs.model_class.__name__}) and {ours.directory} a "
            f"{ours.kind} ({ours.model_class.__name__})",
            "the model and its source",
            "Name the source that was converted",
        )
    if ours.kind == ENCODER and source is None:
        raise UsageError(
            ours.directory,
            f"is an encoder ({ours.model_class.__name__}), which is measured by the distance to "
            "its source",
            "a source",
            "Name it with --source",
        )
    _check_vocabularies(checkpoints)
    tokenizer = _shared_tokenizer(checkpoints)
    documents = read_documents(own_text() if str(text) == DEFAULT else text)
    where = str(text)
    if ours.kind == CAUSAL:
        check_seq_len(seq_len, min(max_positions(each.config) for each in checkpoints))
        windows = cut_windows(documents, tokenizer, seq_len, max_tokens, where=where)
        _check_ids(windows, ours, where)
        return Work(checkpoints, tokenizer, windows, frame(tokenizer).prefix, [], seq_len)
    lines = [line for document in documents for line in document.splitlines() if line.strip()]
    length = min(seq_len, *(longest_text(each.config, tokenizer) for each in checkpoints))
    ids = _encode_lines(lines, tokenizer, length, max_tokens, where=where)
    return Work(checkpoints, tokenizer, ids, [], lines, length)


@dataclass(frozen=True)
class Work:
    """What `evaluate` will measure on what, before weights are loaded.

    checkpoints  the packed one, and its source if there is one
    ids          windows (n, seq_len) int64, or the token ids of an encoder's lines
    prefix       tokens that every window begins with
    lines        of the text, for encoders
    """

    checkpoints: "list[_Checkpoint]"
    tokenizer: Any
    ids: "Tensor | list[list[int]]"
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
    ) -> list[Model]:
        """The models of the checkpoints; `activations` and `head` are of the packed one."""
        models = [self.checkpoints[0].load(device, dtype, activations, head)]
        return models + [each.load(device, dtype) for each in self.checkpoints[1:]]

    def measure(
        self, models: Sequence[Model], batch_size: int | None, progress: Progress | None
    ) -> dict[str, dict[str, Any]]:
        """The measures of `evaluate`."""
        size = batch_size or self.batch_size()
        if isinstance(self.ids, Tensor):
            first = max(1, len(self.prefix))
            return compare_windows(models, self.ids, size, progress, first=first)
        measures = _compare_lines(models, self.ids, self.tokenizer, size, progress)
        measures["cosine"]["minimum_line"] = self.lines[measures["cosine"].pop("at")]
        return measures


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file: what stands between lines `<|doc|>`, without empty ones.

    The line break before a separator belongs to it. Raises UsageError when the file cannot be read
    as UTF-8.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            path, f"byte {error.start} is not UTF-8", "a text file", "Convert it to UTF-8"
        ) from None
    except OSError as error:
        raise UsageError(
            path, f"cannot be read ({error.strerror or error})", "a text file", "Check the path"
        ) from None
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line == SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    return [joined for lines in documents if (joined := "\n".join(lines)).strip()]


def cut_windows(
    documents: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    max_tokens: int | None = None,
    *,
    where: str = "text",
) -> Tensor:
    """Tokenize documents and cut them into (windows, seq_len) token ids, int64.

    max_tokens  of the joined documents that are used; what is put in front of windows is not among
                them

    Raises UsageError when there are too few tokens for one window.
    """
    begin, prefix = beginning(tokenizer), frame(tokenizer).prefix
    ids: list[int] = []
    for document in documents:
        ids += begin
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    ids = ids[:max_tokens]
    windows = cut(ids, prefix, seq_len)
    if not windows:
        raise UsageError(
            where,
            f"{len(ids)} tokens are used",
            f"at least one window of {seq_len}",
            "Give a longer text or more tokens, or use shorter windows (--seq-len)",
        )
    return torch.tensor(windows, dtype=torch.int64)


def cut(ids: Sequence[int], prefix: Sequence[int], seq_len: int) -> list[list[int]]:
    """Cut joined documents into windows of seq_len tokens, each of which begins with `prefix`.

    Every token is in one window, in order, but for what is left over at the end. Where the next
    token belongs to a prefix that stands in the text, the window begins with that one alone.

    Example: cut([1, 5, 6, 7, 1, 8, 9], [1], 3) -> [[1, 5, 6], [1, 7, 1], [1, 8, 9]]

    Raises UsageError when a window has no room for more than the prefix.
    """
    check_room(seq_len, prefix)
    own, at = len(prefix), 0
    windows: list[list[int]] = []
    while True:
        for before in range(own):  # tokens of a standing prefix that the last window has
            start = at - before
            if start >= 0 and list(ids[start : start + own]) == list(prefix):
                at = start + own
                break
        if len(ids) - at < seq_len - own:
            return windows
        windows.append([*prefix, *ids[at : at + seq_len - own]])
        at += seq_len - own


def check_room(seq_len: int, prefix: Sequence[int]) -> None:
    """Raise UsageError for windows that have no room for more than what they begin with."""
    if seq_len <= len(prefix):
        raise UsageError(
            "sequence length",
            f"{seq_len}",
            f"more than the {len(prefix)} tokens that the tokenizer puts in front of a text",
            "Use a larger number (--seq-len)",
        )


class Frame(NamedTuple):
    """The ids that a tokenizer itself puts before and behind a text."""

    prefix: list[int]
    suffix: list[int]


PROBES = ("a", "the", "1", ".")  # texts that hardly a tokenizer has no token for


def frame(tokenizer: Any) -> Frame:
    """What a tokenizer puts around a text: BERT's [CLS] and [SEP], Gemma's <bos> and nothing.

    It is told from what one gives for a short text with and without special tokens; where the text
    itself comes out in other tokens with them, from the mask that says which tokens are special.

    Raises CheckpointError where neither tells.
    """
    for probe in PROBES:
        bare = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        whole = tokenizer(probe, return_special_tokens_mask=True, verbose=False)
        full, mask = whole["input_ids"], whole["special_tokens_mask"]
        if bare == full:
            return Frame([], [])
        length = len(bare)
        places = [at for at in range(len(full)) if bare and full[at : at + length] == bare]
        if len(places) == 1:
            return Frame(full[: places[0]], full[places[0] + length :])
        text = [at for at, special in enumerate(mask) if not special]
        if bare and text and len(full) > len(text) == text[-1] - text[0] + 1:
            return Frame(full[: text[0]], full[text[-1] + 1 :])
    raise CheckpointError(
        type(tokenizer).__name__,
        f"gives {full} for {probe!r}, and {bare} without special tokens",
        "to see which of them it puts before a text and which behind",
        "Repair the tokenizer",
    )


def beginning(tokenizer: Any) -> list[int]:
    """What a document begins with: the tokenizer's prefix, or else bos, or eos without that."""
    prefix = frame(tokenizer).prefix
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return prefix or [token for token in (bos, eos) if token is not None][:1]


def names_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The tokens of some ids as the vocabulary writes them."""
    names: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    return names


def own_text() -> Path:
    """The text that comes with the package, to calibrate on and to measure with."""
    return Path(__file__).with_name("default.txt")


def compare_windows(
    models: Sequence[Model],
    windows: Tensor,
    batch_size: int = MAX_BATCH,
    progress: Progress | None = None,
    *,
    first: int = 1,
) -> dict[str, dict[str, Any]]:
    """Measures of one model, or of a model and its source, on the same windows.

    models   (packed,) or (packed, source); causal language models, on any device
    windows  (windows, seq_len) int64 token ids
    first    position of a window, from 0, whose token is the first to be predicted

    Returns the measures of `evaluate`. Raises CheckpointError when logits are not finite.
    """
    per_window: list[list[float]] = []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        logits = [_logits(model, batch) for model in models]
        for index, window in enumerate(batch):
            per_window.append(compare_logits([each[index] for each in logits], window, first))
        if progress is not None:
            so_far = torch.tensor([row[0] for row in per_window], dtype=torch.float64).mean()
            known = f"perplexity {_exp(float(so_far)):.2f}"
            progress(len(per_window), len(windows), known, "evaluating")
        del logits  # before the next batch's are made
    columns = torch.tensor(per_window, dtype=torch.float64).T
    if columns.isnan().any():
        window = int(columns.isnan().any(0).nonzero()[0])
        raise CheckpointError(
            type(models[0]).__name__,
            f"the logits of window {window} are NaN in {str(models[0].dtype)[6:]}",
            "finite ones",
            "Compute in another dtype (--dtype float32), or verify the checkpoint",
        )
    return summarize(columns)


def summarize(columns: Tensor) -> dict[str, dict[str, Any]]:
    """The measures of `evaluate` from rows of `compare_logits`: (2 or 4, windows) float64."""
    measures = {"perplexity": _exponential(columns[0])}
    if len(columns) > 1:
        measures["source_perplexity"] = _exponential(columns[1])
        measures["perplexity_ratio"] = _exponential(columns[0] - columns[1])
        measures["kl_divergence"] = _mean(columns[2])
        measures["top1_agreement"] = _mean(columns[3])
    return measures


@torch.inference_mode()
def _logits(model: Model, batch: Tensor) -> Tensor:
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
    some = max(1, CHUNK // vocabulary)  # rows at a time
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


def _mean(values: Tensor) -> dict[str, float | None]:
    """Mean of independent values (n,) float64, and its standard error s / sqrt(n)."""
    error = None if len(values) < 2 else float(values.std(correction=1)) / math.sqrt(len(values))
    return {"value": float(values.mean()), "standard_error": error}


def _exponential(values: Tensor) -> dict[str, float | None]:
    """exp(mean), and its standard error exp(mean) se(mean) by the delta method."""
    mean = _mean(values)
    value, error = _exp(mean["value"] or 0.0), mean["standard_error"]
    return {"value": value, "standard_error": None if error is None else value * error}


def _exp(value: float) -> float:
    """exp that is infinite where math.exp overflows: a collapsed model can be that bad."""
    return math.exp(value) if value < 709 else math.inf


def evaluate_tasks(
    packed: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    activations: str | None = None,
) -> dict[str, Any]:
    """Run tasks of the lm-evaluation-harness on a packed language model.

    packed        directory or Hub id; an ordinary checkpoint can be measured too
    tasks         names of its tasks or groups, e.g. ["arc_easy", "piqa"]; most fetch their data
    include_path  directory with tasks of your own (.yaml)
    limit         use no more than the first examples of each task
    batch_size    examples at a time; None: 1
    others        as in `evaluate`

    Returns {"kind", "model", "harness": its version, "dtype", "device", "limit", "tasks": {task:
    {metric: {"value", "standard_error"}}}}.

    Raises UsageError where the harness is not installed or knows no such task, CheckpointError when
    the model cannot be loaded, or the data of a task cannot be had.

    https://github.com/EleutherAI/lm-evaluation-harness
    """
    for name, value in (("limit", limit), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(name, f"{value}", "at least 1", "Use a larger number")
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UsageError(include_path, "no such directory", "one with tasks", "Check it")
    try:
        harness = importlib.import_module("lm_eval")
        models = importlib.import_module("lm_eval.models.huggingface")
        task_list = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UsageError(
            "--tasks",
            f"the lm-evaluation-harness cannot be imported ({error})",
            "it",
            "Run pip install 'ternarize[lm-eval]'",
        ) from None
    include = None if include_path is None else str(Path(include_path).expanduser())
    known = task_list.TaskManager(include_path=include)
    for task in tasks:
        if not known.match_tasks([task]):
            raise UsageError(
                "--tasks",
                f"{task!r} is no task of lm_eval {harness.__version__}",
                "one of `lm_eval ls tasks`, or of --include-path",
                "Check the name",
            )
    checkpoint = _Checkpoint.at(packed)
    if checkpoint.kind != CAUSAL:
        raise UsageError(
            checkpoint.directory, f"is an {checkpoint.kind}", f"a {CAUSAL} to run tasks on"
        )
    tokenizer = _shared_tokenizer([checkpoint])
    device = device if device == "auto" else check_device(device)
    model = checkpoint.load(device, _dtype(dtype, device), activations)
    wrapped = models.HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size or 1,
        max_length=min(max_positions(checkpoint.config), int(tokenizer.model_max_length)),
    )
    try:
        found = harness.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=known, limit=limit, log_samples=False
        )
    except (OSError, ValueError) as error:  # what loaders of data sets raise
        first = re.sub(r"\s+", " ", str(error)).strip()[:200]
        raise CheckpointError(
            f"--tasks {','.join(tasks)}",
            f"cannot be run ({type(error).__name__}: {first})",
            "its data in the cache or on the network",
            "Check both",
        ) from error
    return {
        "kind": CAUSAL,
        "model": str(packed),
        "harness": harness.__version__,
        "dtype": str(model.dtype)[6:],
        "device": str(model.device),
        "limit": limit,
        "tasks": {task: _metrics(row) for task, row in found["results"].items()},
    }


def _metrics(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc,none": x, "acc_stderr,none": y, ...} -> {"acc": {"value": x, "standard_error": y}}."""
    metrics = {}
    for key, value in row.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = row.get(f"{metric}_stderr,{kept}")
            error = float(error) if isinstance(error, (int, float)) else None
            name = metric if kept == "none" else f"{metric} ({kept})"
            metrics[name] = {"value": float(value), "standard_error": error}
    return metrics


def embed(
    model: Model, tokenizer: Any, lines: Sequence[str], *, seq_len: int = 256, batch_size: int = 32
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
def _embed(model: Model, ids: Sequence[list[int]], tokenizer: Any) -> Tensor:
    longest = max(1, *map(len, ids))
    padding = tokenizer.pad_token_id or 0  # masked, so any id will do
    padded = torch.tensor([row + [padding] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    output = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device))
    return pool(output.last_hidden_state.float().cpu(), mask)


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


def _compare_lines(
    models: Sequence[Model],
    ids: Sequence[list[int]],
    tokenizer: Any,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Cosine of the embeddings by two models of the same lines; "at" is where it is smallest."""
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
    if cosines.isnan().any():
        raise CheckpointError(
            type(models[0]).__name__,
            f"embedding {int(cosines.isnan().nonzero()[0])} is NaN",
            "finite ones",
            "Compute in another dtype (--dtype float32), or verify the checkpoint",
        )
    at = int(cosines.argmin())
    return {"cosine": {**_mean(cosines), "minimum": float(cosines[at]), "at": at}}


def encode_line(line: str, tokenizer: Any, length: int) -> list[int]:
    """Token ids of a text with the tokenizer's special tokens, cut to `length` of them in all."""
    ids: list[int] = tokenizer(line, truncation=True, max_length=length)["input_ids"]
    return ids


def _encode_lines(
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


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint, packed or ordinary, before its weights are loaded."""

    directory: Path
    config: Any
    model_class: Any
    kind: str
    packed: bool
    read: Checkpoint | None = None  # what reads its tensors where transformers cannot by itself

    @staticmethod
    def at(model: str | Path) -> "_Checkpoint":
        """Find a checkpoint and what can be measured of it; raises CheckpointError."""
        directory, table, read = _look(model)
        if table is None:
            raise CheckpointError(
                directory,
                "no config.json",
                "a Hugging Face checkpoint",
                "Copy config.json from the source of the model",
            )
        with usable(directory / "config.json"):
            if read is not None:  # without the quantization that it is stored in
                config = config_from(table)
            else:
                config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        known = [
            name
            for name in config.architectures or []
            if inspect.isclass(getattr(transformers, name, None))
            and issubclass(getattr(transformers, name), transformers.PreTrainedModel)
        ]
        if not known:
            raise CheckpointError(
                directory / "config.json",
                f"architectures {config.architectures}",
                f"a model class of transformers {transformers.__version__}",
                "Code that comes with a checkpoint is not run here; install the version that has "
                "the class",
            )
        model_class = getattr(transformers, known[0])
        kind = _kind(model_class, config)
        return _Checkpoint(directory, config, model_class, kind, _is_packed(table), read)

    def load(
        self,
        device: str,
        dtype: torch.dtype | None,
        activations: str | None = None,
        head: str | None = None,
    ) -> Model:
        """The model in eval mode; an ordinary checkpoint must have every weight."""
        if self.packed:
            return load(
                self.directory, device=device, dtype=dtype, activations=activations, head=head
            )
        if head is not None:
            raise UsageError(
                "head",
                f"{head!r}, but {self.directory} is not packed",
                "a packed checkpoint",
                "Leave head out",
            )
        options: dict[str, Any] = {"device_map": device} if device == "auto" else {}
        source = self.read
        if source is not None:  # as what it decodes to: not all such formats run everywhere
            options["config"] = self.config
            options["state_dict"] = {
                name: source.read(name).view(info.shape) for name, info in source.tensors.items()
            }
        with usable(self.directory):
            model, info = self.model_class.from_pretrained(
                self.directory if source is None else None,
                dtype=dtype or "auto",
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
        # transformers fills what is missing with random numbers; only a pooler is not used here
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name.split("."))
        if missing:
            raise CheckpointError(
                self.directory,
                f"{len(missing)} weights are missing, first {missing[0]}",
                f"all of {self.model_class.__name__}",
                "Complete the checkpoint",
            )
        if isinstance(source, Imported) and source.activations == "int8":
            for place in locate_tensors(model, source.group_sizes).values():
                for parameter in place.parameters:
                    module = model.get_submodule(parameter.rpartition(".")[0])
                    module.register_forward_pre_hook(_rounded)
        return model if device == "auto" else model.to(device)


def config_if_measured(model: str | Path) -> Any | None:
    """The configuration of a model that `evaluate` measures; None of any other.

    That is a causal language model or a text encoder of transformers, with a tokenizer.
    """
    try:
        checkpoint = _Checkpoint.at(model)
    except CheckpointError:
        return None
    return checkpoint.config if _has_tokenizer(checkpoint) else None


def _look(model: str | Path) -> tuple[Path, dict[str, Any] | None, Checkpoint | None]:
    """Directory and config.json of a checkpoint, and what reads it if transformers cannot."""
    if find_gguf(model) is None:
        directory = locate(model)
        table = read_config(directory)
        if table is None or _is_packed(table):
            return directory, table, None
    # without weights it is found out later, and by whom it concerns
    source = open_source(model, config_only=True)
    foreign = isinstance(source, Imported) or source.names_changed
    return source.directory, source.config, source if foreign else None


def _is_packed(table: dict[str, Any]) -> bool:
    how = table.get("quantization_config")
    return isinstance(how, dict) and how.get("quant_method") == "ternarize"


def _rounded(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round the input of a layer to int8 per token: BitNet b1.58, equation 4 of BitNet's paper.

    https://arxiv.org/abs/2310.11453
    """
    x = inputs[0].float()
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return ((x * scale).round().clamp(-128, 127).div(scale).to(inputs[0].dtype), *inputs[1:])


def _kind(model_class: Any, config: Any) -> str:
    """What is measured of a model, from its class alone: no list of architectures.

    The arguments of `forward` tell: who generates from token ids alone is a language model, who
    takes token ids and has no task head (no labels) is an encoder.
    """
    takes = inspect.signature(model_class.forward).parameters
    name = model_class.__name__
    if "decoder_input_ids" in takes:
        what = "an encoder-decoder model, not yet supported"
    elif "input_ids" not in takes:
        what = "a model of images or audio"
    elif model_class.can_generate():
        # BERT's language-model head on an encoder that also looks ahead
        if getattr(config.get_text_config(), "is_decoder", True) is not False:
            return CAUSAL
        what = "a language-model head on an encoder that sees the words it predicts"
    elif "labels" not in takes and "pixel_values" not in takes:
        return ENCODER
    else:
        what = "a model with another head, or of several modalities"
    raise CheckpointError(
        name, f"is {what}; {SUPPORTED}", remedy="Measure it with the tools of its own task"
    )


def open_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a checkpoint; raises CheckpointError when it has none that can be used."""
    directory = Path(directory)
    with usable(directory / "tokenizer.json"):
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _has_tokenizer(checkpoint: _Checkpoint) -> bool:
    return any((checkpoint.directory / name).exists() for name in TOKENIZER_FILES)


def _shared_tokenizer(checkpoints: Sequence[_Checkpoint]) -> Any:
    """The tokenizer of the first checkpoint that has one, usually the packed model's own copy."""
    for checkpoint in checkpoints:
        if _has_tokenizer(checkpoint):
            return open_tokenizer(checkpoint.directory)
    raise CheckpointError(
        checkpoints[0].directory,
        "no tokenizer",
        "tokenizer.json or the like",
        "Copy it from the source of the model",
    )


def vocabulary_size(config: Any) -> int | None:
    """Words that a model knows; None where its configuration does not say."""
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size


def max_positions(config: Any) -> int:
    """Positions that a model was made for; 2**30 where its configuration says no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit or 1 << 30


def longest_text(config: Any, tokenizer: Any) -> int:
    """Tokens of the longest text; RoBERTa has two positions more than that, the tokenizer knows."""
    return min(max_positions(config), int(tokenizer.model_max_length))


def _check_vocabularies(checkpoints: Sequence[_Checkpoint]) -> None:
    sizes = [vocabulary_size(checkpoint.config) for checkpoint in checkpoints]
    if len(set(sizes)) > 1:
        raise UsageError(
            checkpoints[1].directory,
            f"vocabulary of {sizes[1]} tokens, and {checkpoints[0].directory} has {sizes[0]}",
            "the same",
            "Name the source that was converted",
        )


def check_seq_len(seq_len: int, limit: int) -> None:
    """Raise UsageError for samples of more tokens than a model has positions."""
    if seq_len > limit:
        raise UsageError(
            "sequence length",
            f"{seq_len}",
            f"at most the model's {limit} positions",
            f"Use --seq-len {limit}",
        )


def _check_ids(windows: Tensor, checkpoint: _Checkpoint, where: str) -> None:
    size, largest = vocabulary_size(checkpoint.config), int(windows.max())
    if size is not None and largest >= size:
        raise CheckpointError(
            checkpoint.directory,
            f"its tokenizer gives token {largest} for {where}",
            f"tokens below the model's {size}",
            "Copy the tokenizer that belongs to the model",
        )


def _dtype(dtype: str | torch.dtype | None, device: str | None) -> torch.dtype | None:
    if dtype is None:
        return torch.float32 if device in (None, "cpu") else None
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError("dtype", f"{dtype!r}", "one of float32, float16, bfloat16")
    return found
