"""Documents as three sets of samples: which ones, and what a sample of a kind of model is.

What calibration sees decides what survives it, so three things are kept apart from the start: the
samples that make the statistics, those that choose between results (damping, when to stop), and
those that give the figures that are printed and choose nothing; about 8 : 1 : 1. A document is in
one set only. A text of too few documents for that is cut at blank lines into sections, which is
said in the notes. Samples are spread evenly over the documents of a set, one at a random place in
each of as many equal stretches. Random numbers come from Python's Mersenne Twister, which all
platforms share.

A sample is what the model was made for:

    causal language model   a window of seq_len tokens, cut out of joined documents as in
                            measure.evaluate: documents and windows begin with what the tokenizer
                            itself puts in front of a text
    encoder                 a text of 8 to seq_len tokens between the tokenizer's special tokens:
                            whole sentences, as many as fit a length drawn log-uniformly, because
                            encoders meet single sentences as often as paragraphs
    encoder-decoder         a window for the encoder between the tokenizer's special tokens, and
                            the tokens that follow it for the decoder, behind those that the
                            tokenizer puts in front, shifted right behind decoder_start_token_id
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize.calibrate.texts import Document
from ternarize.errors import CheckpointError, UsageError
from ternarize.measure.documents import cut
from ternarize.models.reads import CAUSAL, ENCODER, beginning, encode_line, frame
from ternarize.plans.recipe import Calibrate

Sample = dict[str, Tensor]  # arguments of forward, without the batch dimension
Cut = Callable[[Sequence[Document]], Sequence[Any]]
Finish = Callable[[Any], Sample]
LEAST = 4  # samples, below which statistics mean nothing
SHORTEST_TEXT = 8  # tokens of an encoder's sample
SHARES = (0.8, 0.1, 0.1)
SCARCE = (0.5, 0.25, 0.25)  # where a tenth of the text makes no sample
LEAST_SECTION = 400  # characters


# --- three sets ---------------------------------------------------------------------------------


def wanted_sizes(num_samples: int) -> tuple[int, int, int]:
    """Samples of the three sets that are asked for."""
    other = max(1, round(num_samples / 10))
    return num_samples, other, other


def portion(count: int, calibration: Calibrate, what: str) -> tuple[int, int, int]:
    """Sizes of three sets of `count` samples that have no documents; UsageError for too few."""
    sizes = wanted_sizes(calibration.num_samples)
    if count < sum(sizes):
        other = max(1, count // 10)
        sizes = count - 2 * other, other, other
    least = min(LEAST, calibration.num_samples)
    if sizes[0] < least:
        raise UsageError(
            calibration.dataset,
            f"{count} {what}",
            f"at least {least + 2}, of which one is held out and one reported on",
            "Give more",
        )
    return sizes


def divide(
    calibration: Calibrate,
    documents: Sequence[Document],
    seq_len: int,
    cut: Cut,
    finish: Finish,
    rng: random.Random,
) -> tuple[list[list[Sample]], list[str]]:
    """Samples of three sets of documents, and notes; by sections where documents are too few.

    cut, finish  as `cutter` gives them

    Raises UsageError when there are fewer than 4 samples beside one for each other set.
    """
    wanted = wanted_sizes(calibration.num_samples)
    least = (min(LEAST, calibration.num_samples), 1, 1)
    counts = [0, 0, 0]
    cut_up = ["too few documents to keep the sets apart: cut into sections"]
    for parts, notes, shares in (
        (documents, [], SHARES),
        (documents, [], SCARCE),
        (sections(documents), cut_up, SHARES),
        (sections(documents), cut_up, SCARCE),
    ):
        pools = [cut(part) for part in _split(parts, shares)]
        counts = [len(pool) for pool in pools]
        enough = all(have >= need for have, need in zip(counts, least, strict=True))
        # few documents of unequal length can leave most of the text to the small sets
        if enough and (notes or counts[0] >= min(wanted[0], sum(counts) / 2)):
            sets = [
                [finish(pool[at]) for at in _spread(len(pool), number, rng)]
                for pool, number in zip(pools, wanted, strict=True)
            ]
            return sets, notes
    raise UsageError(
        calibration.dataset,
        f"makes {counts[0]} samples of {seq_len} tokens, {counts[1]} held out and {counts[2]} to "
        "report on",
        f"at least {least[0]}, 1 and 1",
        "Give a longer text, or use shorter samples (--seq-len)",
    )


def _split(documents: Sequence[Document], shares: Sequence[float]) -> list[list[Document]]:
    """Each document to the set that has the least of its share, by characters."""
    sets: list[list[Document]] = [[], [], []]
    sizes = [0, 0, 0]
    for document in documents:
        at = min(range(3), key=lambda index: sizes[index] / shares[index])
        sets[at].append(document)
        sizes[at] += len(document.text)
    return sets


def sections(documents: Sequence[Document]) -> list[Document]:
    """Documents cut into pieces of about a fortieth of them all, and of a paragraph at least."""
    size = max(LEAST_SECTION, sum(len(document.text) for document in documents) // 40)
    return [
        Document(piece, document.begin and not index)
        for document in documents
        for index, piece in enumerate(cut_text(document.text, size))
    ]


def cut_text(text: str, size: int) -> list[str]:
    """A text cut into pieces of at most `size` characters, at blank lines, lines or words."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > size:
        for mark in ("\n\n", "\n", " ", ""):
            end = text.rfind(mark, start + size // 2, start + size) + len(mark)
            if end > start + size // 2 or not mark:
                break
        end = min(max(end, start + 1), start + size)
        pieces.append(text[start:end])
        start = end
    return [piece for piece in [*pieces, text[start:]] if piece.strip()]


def _spread(total: int, count: int, rng: random.Random) -> list[int]:
    """`count` of `total` places in random order, one in each of `count` equal stretches."""
    count = min(count, total)
    edges = [index * total // count for index in range(count + 1)]
    places = [rng.randrange(*pair) for pair in zip(edges, edges[1:], strict=False)]
    rng.shuffle(places)
    return places


# --- from text to samples -----------------------------------------------------------------------


def cutter(
    kind: str, seq_len: int, config: Any, tokenizer: Any, rng: random.Random
) -> tuple[Cut, Finish]:
    """How documents are cut for a kind of model, and how a piece becomes a sample.

    Raises UsageError where seq_len has no room for special tokens, CheckpointError where a decoder
    has no token to begin with.
    """
    if kind == CAUSAL:
        return (
            lambda documents: _windows(documents, tokenizer, seq_len),
            lambda ids: {"input_ids": torch.tensor(ids)},
        )
    prefix, suffix = frame(tokenizer)
    special = len(prefix) + len(suffix)
    body = seq_len - special
    if body < 1:
        raise UsageError(
            "sequence length",
            f"{seq_len}",
            f"more than the tokenizer's {special} special tokens",
            "Use a larger number (--seq-len)",
        )
    if kind == ENCODER:
        return (
            lambda documents: _texts(documents, tokenizer, body, rng),
            lambda text: {"input_ids": torch.tensor(encode_line(text, tokenizer, seq_len))},
        )
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise CheckpointError(
            "config.json",
            "has no decoder_start_token_id",
            "the token that the model's decoder begins with",
            "Add it, or give .safetensors samples",
        )

    inside = len(prefix) + body  # of the encoder's window, before what stands behind

    def pair(ids: list[int]) -> Sample:
        target = prefix + ids[inside:]
        return {
            "input_ids": torch.tensor(ids[:inside] + suffix),
            "decoder_input_ids": torch.tensor([start, *target[:-1]]),
        }

    both = inside + seq_len - len(prefix)
    return lambda documents: _windows(documents, tokenizer, both), pair


def _windows(documents: Sequence[Document], tokenizer: Any, seq_len: int) -> list[list[int]]:
    """Windows of joined documents without overlap, as measure.evaluate cuts them."""
    begin = beginning(tokenizer)
    texts = [document.text for document in documents]
    if not texts:
        return []
    ids: list[int] = []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for document, row in zip(documents, encoded, strict=True):
        ids += begin if document.begin else []
        ids += row
    return cut(ids, frame(tokenizer).prefix, seq_len)


# ends of sentences; a line break inside a sentence is followed by a small letter
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n\s*\n|\n(?=\s*[^a-z\s])")


def _texts(
    documents: Sequence[Document], tokenizer: Any, body: int, rng: random.Random
) -> list[str]:
    """Documents cut into texts of whole sentences, of log-uniform lengths up to `body` tokens.

    Lengths are in characters, by the mean that a token has here: every text is tokenized when it
    has been chosen, and cut to length then.
    """
    beginnings = [document.text[:2000] for document in documents[:256]]
    tokens = sum(
        len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in beginnings
    )
    per_token = sum(map(len, beginnings)) / max(1, tokens)
    shortest = min(SHORTEST_TEXT, body)
    longest = max(1, int(body * per_token))
    texts: list[str] = []
    for document in documents:
        ends = [match.end() for match in _SENTENCE_END.finditer(document.text)]
        spans = zip([0, *ends], [*ends, len(document.text)], strict=True)
        sentences = [piece for a, b in spans for piece in cut_text(document.text[a:b], longest)]
        at = 0
        while at < len(sentences):
            target = shortest * (body / shortest) ** rng.random() * per_token
            joined = sentences[at]
            at += 1
            while at < len(sentences) and len(joined) + len(sentences[at]) <= target:
                joined += sentences[at]
                at += 1
            texts.append(joined.strip())
    return [text for text in texts if text]
