"""What a language model writes by itself: whether it loops, ends, repeats itself, and is right.

Perplexity and divergence are taken on a text that is given, token after token; a model can be good
at that, and once it reads its own words fall into a loop. So it writes after prompts, always the
likeliest token (without the penalties for repetition that its generation_config may ask for: they
would hide what is measured), until it ends the text itself or has written `new_tokens`. Of the
texts that it has written, without the end token:

    loops            share that end in a loop: for some n the last max(16, 3 n) tokens are the same
                     n tokens over and over (the last time perhaps not to their end)
    zlib ratio       bytes of all of them, joined by line breaks in the order of the prompts, in
                     UTF-8, deflated by zlib at level 9, over those before. The less, the more they
                     repeat themselves and each other. It falls with the length of what is
                     deflated: compare models on the same prompts
    stopped          share that the model ended itself within its tokens
    distinct 4-grams share of the 4-grams of tokens of a text that differ from one another, the mean
                     over texts of at least 4 tokens (1 - seq-rep-4 of
                     https://arxiv.org/abs/1908.04319, section 6)
    right answers    share of texts with the right answer, of the prompts that have one. After a
                     `prompt` the text has to begin with it: the answer is how the text goes on, and
                     by rambling on most short answers would be found sooner or later. In a chat it
                     may stand anywhere: the turn is a sentence around it, and ends. In both as
                     whole words or numbers; case and kinds of white space do not count

Prompts are run together with those of the same length only, so that none is padded and every
architecture reads it as it would alone.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ternarize.errors import UsageError
from ternarize.measure.figures import Figure, check_numbers, mean_of
from ternarize.measure.prompts import Prompt, cut_prompts, read_prompts
from ternarize.progress import Progress
from ternarize.runtime.generate import CONTEXT_TOKENS, NEW_TOKENS, greedy_settings

LOOP_TOKENS, LOOP_TIMES = 16, 3  # a loop's end has at least so many tokens, and turns
NGRAM = 4  # tokens
PROMPTS, PROMPT_TOKENS = 32, 32  # where nobody says how many, and how long


@dataclass(frozen=True)
class Writing:
    """What models are to write in an evaluation.

    prompts         file of prompts, as `read_prompts` takes it; None: cut them from the text
    number          of prompts at most; None: 32 of a text, all of a file
    prompt_tokens   of each that is cut from a text; None: 32
    max_new_tokens  written after each at most; None: 128, or the room that the model's context has
    """

    prompts: str | Path | None = None
    number: int | None = None
    prompt_tokens: int | None = None
    max_new_tokens: int | None = None


class Written(NamedTuple):
    """What a model wrote after a prompt: tokens without the end token, and the text of them."""

    ids: list[int]
    text: str
    stopped: bool


def choose_prompts(
    writing: Writing, texts: Sequence[tuple[str, Sequence[str]]], tokenizer: Any
) -> list[Prompt]:
    """The prompts that are asked for: of a file, or of texts, as many from each.

    texts  name and documents of each

    Raises UsageError where there are none, or a number cannot be used.
    """
    for name, value in (
        ("num-prompts", writing.number),
        ("prompt-tokens", writing.prompt_tokens),
        ("max-new-tokens", writing.max_new_tokens),
    ):
        if value is not None and value < 1:
            raise UsageError(name, f"{value}", "at least 1", "Use a larger number")
    if writing.prompts is not None:
        return read_prompts(writing.prompts, tokenizer, writing.number)
    number, length = writing.number or PROMPTS, writing.prompt_tokens or PROMPT_TOKENS
    prompts: list[Prompt] = []
    for at, (name, documents) in enumerate(texts):
        share = (at + 1) * number // len(texts) - at * number // len(texts)
        prompts += cut_prompts(documents, tokenizer, share, length, where=name) if share else []
    return prompts


def room_to_write(prompts: Sequence[Prompt], asked: int | None, context: int) -> int:
    """Tokens to write after each prompt; raises UsageError where the context has no room for them.

    asked    how many; None: 128, or what there is room for
    context  positions of the model
    """
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    room = context - len(longest.ids)
    if room < (asked or 1):
        raise UsageError(
            longest.where,
            f"has a prompt of {len(longest.ids)} tokens, and {asked or 1} are to be written",
            f"at most the model's context of {context} together",
            "Shorten it (--prompt-tokens), or ask for fewer new tokens (--max-new-tokens)",
        )
    return asked or min(NEW_TOKENS, room)


def write_after(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
    stage: str = "writing",
) -> list[Written]:
    """What a causal language model of transformers writes after each prompt, greedily.

    new_tokens  at most, after each
    batch_size  prompts of one length at a time, at most
    progress    called after each batch with (prompts done, in all, "", stage)

    Raises CheckpointError when logits are not numbers.
    """
    settings = greedy_settings(model, new_tokens)
    if settings.eos_token_id is None:  # a checkpoint may say in its tokenizer alone how texts end
        settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
    end = settings.eos_token_id
    ends = set(end if isinstance(end, list) else [end])

    def length(at: int) -> int:
        return len(prompts[at].ids)

    written: dict[int, Written] = {}
    for _, same in groupby(sorted(range(len(prompts)), key=length), length):
        places = list(same)
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            rows = _continue(model, [prompts[at].ids for at in batch], settings)
            for at, row in zip(batch, rows, strict=True):
                whole = next((n for n, token in enumerate(row) if token in ends), None)
                ids = row[:whole]
                text = _text_of(ids, prompts[at].ids, tokenizer)
                written[at] = Written(ids, text, stopped=whole is not None)
            if progress is not None:
                progress(len(written), len(prompts), "", stage)
    return [written[at] for at in range(len(prompts))]


class OnlyNumbers(LogitsProcessor):
    """Refuses logits that are NaN, of which generate takes any token."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_numbers(scores.T, self.model, "the logits of text {} of a batch are NaN")
        return scores


@torch.inference_mode()
def _continue(model: Any, prompts: list[list[int]], settings: Any) -> list[list[int]]:
    """The tokens that follow prompts of one length; behind an end token any may stand."""
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        logits_processor=LogitsProcessorList([OnlyNumbers(model)]),
    )
    rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return rows


def _text_of(ids: list[int], prompt: list[int], tokenizer: Any) -> str:
    """The text of tokens behind others: alone, many tokenizers drop the space of the first."""
    context = prompt[-CONTEXT_TOKENS:]
    before, whole = (
        tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for each in (context, context + ids)
    )
    text: str = whole[len(before) :]
    return text


# --- measures -----------------------------------------------------------------------------------


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether for some n the last max(16, 3 n) tokens repeat the same n tokens."""
    for n in range(1, len(ids) // LOOP_TIMES + 1):
        tail = ids[-max(LOOP_TOKENS, LOOP_TIMES * n) :]
        if len(ids) >= LOOP_TOKENS and tail[n:] == tail[:-n]:
            return True
    return False


def distinct_ngrams(ids: Sequence[int]) -> float:
    """Share of the 4-grams of at least 4 tokens that differ from one another."""
    ngrams = [tuple(ids[at : at + NGRAM]) for at in range(len(ids) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams)


def is_right(text: str, prompt: Prompt) -> bool:
    """Whether a text holds an answer of its prompt: at its start, of a chat anywhere."""
    words = _plain(text)
    for answer in map(_plain, prompt.answers):
        found = re.compile(re.escape(answer) + r"(?!\w|[.,]\d)")
        if found.match(words):
            return True
        if prompt.chat and re.search(r"(?<!\w)(?<!\d[.,])" + found.pattern, words):
            return True
    return False


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def measures_of_written(
    written: Sequence[Written], prompts: Sequence[Prompt], new_tokens: int
) -> dict[str, Figure]:
    """The measures of this module, of what one model wrote after each of some prompts.

    Left out are those that nothing could be measured by: loops where fewer tokens than one takes
    may be written, right answers where no prompt has one.
    """
    figures = {}
    if new_tokens >= LOOP_TOKENS:
        figures["loops"] = _mean([ends_in_loop(each.ids) for each in written])
    raw = "\n".join(each.text for each in written).encode()
    if raw.strip():
        figures["zlib_ratio"] = {
            "value": len(zlib.compress(raw, 9)) / len(raw),
            "standard_error": None,
        }
    figures["stopped"] = _mean([each.stopped for each in written])
    shares = [distinct_ngrams(each.ids) for each in written if len(each.ids) >= NGRAM]
    if shares:
        figures["distinct_4grams"] = _mean(shares)
    pairs = zip(written, prompts, strict=True)
    right = [is_right(each.text, prompt) for each, prompt in pairs if prompt.answers]
    if right:
        figures["right_answers"] = _mean(right)
    return figures


def _mean(values: Sequence[float]) -> Figure:
    return mean_of(torch.tensor(values, dtype=torch.float64))


def compare_writing(
    models: Sequence[Any],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What one model, or a model and its source, write after the same prompts.

    models  (packed,) or (packed, source)
    others  as of `write_after`

    Returns {"prompts", "max_new_tokens", "packed": its measures, "source": its measures, "texts": a
    list of {"prompt", "where", "answers", "packed", "source"}}, in which the models have "text",
    "tokens", "stopped", "loops" and, where there are answers, "right".
    """
    figures: dict[str, Any] = {}
    texts: list[dict[str, Any]] = [
        {"prompt": each.text, "where": each.where, "answers": list(each.answers)}
        for each in prompts
    ]
    for name, model in zip(("packed", "source"), models, strict=False):
        stage = f"writing ({name})"
        written = write_after(model, prompts, tokenizer, new_tokens, batch_size, progress, stage)
        figures[name] = measures_of_written(written, prompts, new_tokens)
        for row, each, prompt in zip(texts, written, prompts, strict=True):
            row[name] = {
                "text": each.text,
                "tokens": len(each.ids),
                "stopped": each.stopped,
                "loops": ends_in_loop(each.ids),
            }
            if prompt.answers:
                row[name]["right"] = is_right(each.text, prompt)
    return {"prompts": len(prompts), "max_new_tokens": new_tokens, **figures, "texts": texts}
