"""Speech as samples: recordings joined to windows, and the words that the decoder is given.

A recogniser hears a window of some length, Whisper's of 30 seconds, and what is shorter is filled
up with silence. Sentences alone would be calibrated on silence for the most part, so recordings are
joined, a pause between them, up to a length that is drawn for each window, between nothing (one
recording alone, as it is heard later) and all of it; fewer where the folder would make less than
FEWEST windows. A recording without a transcript that is longer than a window is cut into several,
which need not be in one set.

The source writes down what it hears, in the dtype in which products are fast. Windows in which it
repeats itself are left out: no good example of what to write, and long ones. As Whisper's own
decoding has it, that is a text which zlib makes more than REPEATED times smaller; or one that ends
in a loop (measure.writing), where it is broken off. Where all recordings of a window have
transcripts, those take the place of its words, behind the same tokens that it starts from
(language, task): they depend on what is heard. Decoders get all but the end token, filled up to
one length, with a mask.

Robust Speech Recognition via Large-Scale Weak Supervision, section 4.5:
https://arxiv.org/abs/2212.04356
"""

import hashlib
import random
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ternarize.calibrate.samples import Sample, portion, wanted_sizes
from ternarize.errors import UsageError
from ternarize.measure.audio import (
    Recording,
    check_length,
    features_of,
    list_recordings,
    longest_sound,
    open_extractor,
    read_sound,
)
from ternarize.measure.measured import fast_dtype
from ternarize.measure.speech import BATCH, new_tokens_of, write_heard
from ternarize.measure.writing import ends_in_loop
from ternarize.models.configuration import usable
from ternarize.models.reads import hears, no_tokenizer
from ternarize.plans.recipe import Calibrate

PAUSE = 0.25  # seconds between recordings of a window
FEWEST = 64  # windows, below which recordings are not joined
REPEATED = 2.4  # bytes of a text over those of it deflated
LEFT_OUT = "windows_left_out"  # how many are, in the record
STARTS = 8  # tokens, among which are those that a model starts from


@dataclass(frozen=True)
class Ear:
    """A source that hears, loaded when it is first asked to."""

    directory: Path
    model_class: Any
    tokenizer: Any
    extractor: Any

    @cached_property
    def model(self) -> Any:
        """The source, in the dtype in which this processor is fast."""
        with usable(self.directory):
            found = self.model_class.from_pretrained(self.directory, dtype=fast_dtype("cpu"))
        return found.eval()

    def write(self, features: dict[str, Tensor], new_tokens: int) -> list[list[int]]:
        """What the source writes of each row, to where it loops: what it starts from, and words."""
        return write_heard(self.model, features, new_tokens, end_loops=True)


def ear_for(dataset: str, directory: Path, model_class: Any, tokenizer: Any) -> Ear | None:
    """The source as it hears a data set; None where that is no folder, or the source hears nothing.

    Raises CheckpointError where it has no feature extractor, or no tokenizer.
    """
    if not hears(model_class) or not Path(dataset).expanduser().is_dir():
        return None
    if tokenizer is None:
        raise no_tokenizer(directory)
    return Ear(directory, model_class, tokenizer, open_extractor(directory))


class SpeechSamples(NamedTuple):
    """Three sets of samples; the tokens that all of them start from; how the record tells them."""

    sets: list[list[Sample]]
    starts: list[int]
    length: int
    notes: list[str]
    more: dict[str, Any]


class _Window(NamedTuple):
    """Sound of a window, (samples,) float32, what is said in it, if that is known; its files."""

    sound: Tensor
    said: str | None
    names: list[str]


# features of a window, the tokens that its words start from, and its words
_Row = tuple[dict[str, Tensor], list[int], list[int]]


def read_speech(calibration: Calibrate, ear: Ear, rng: random.Random) -> SpeechSamples:
    """Samples of a folder of audio files: the features, decoder_input_ids and their mask.

    Recordings are taken in the order of SHA-256(seed, file), equal ones once, so that of two that
    read a folder the one that asks for fewer windows has the first of the other's. Windows in which
    the source repeats itself are left out, and the next ones taken. Raises UsageError where they
    cannot be read, are too few, or a transcript is longer than what the model writes.
    """
    recordings = _in_order(calibration)
    wanted = sum(wanted_sizes(calibration.num_samples))
    heard = _windows(recordings, min(wanted, FEWEST), ear.extractor, rng)
    windows: list[_Window] = []
    rows: list[_Row] = []
    repeated = 0
    while some := list(islice(heard, min(BATCH, wanted - len(rows)))):
        for window, row in zip(some, _rows_of(some, ear, calibration.dataset), strict=True):
            if window.said is None and _repeats(row[2], ear.tokenizer):
                repeated += 1
                continue
            windows.append(window)
            rows.append(row)
    notes, also = [], ""
    if repeated:
        itself = "the source repeats itself"
        notes = [f"{repeated} of {len(rows) + repeated} windows are left out: in them {itself}"]
        also = f", and {repeated} in which {itself}"
    sizes = portion(len(rows), calibration, f"windows of speech{also}")
    windows, rows = windows[: sum(sizes)], rows[: sum(sizes)]
    length = max(len(starts) + len(words) for _, starts, words in rows)
    samples = iter([_sample(*row, length, ear.tokenizer.pad_token_id or 0) for row in rows])
    more = {
        "recordings": len({name for each in windows for name in each.names}),
        "windows_with_transcripts": sum(each.said is not None for each in windows),
        **({LEFT_OUT: repeated} if repeated else {}),
    }
    starts = _common([starts for _, starts, _ in rows])
    return SpeechSamples(
        [[next(samples) for _ in range(size)] for size in sizes], starts, length, notes, more
    )


def _in_order(calibration: Calibrate) -> list[Recording]:
    places: dict[bytes, Recording] = {}
    for each in list_recordings(calibration.dataset):
        sha = hashlib.sha256(f"{calibration.seed}\n".encode())
        try:
            sha.update(each.path.read_bytes())
        except OSError as error:
            found = f"cannot be read ({error.strerror})"
            raise UsageError(each.path, found, "an audio file", "Check it") from None
        places.setdefault(sha.digest(), each)
    return [places[key] for key in sorted(places)]


def _windows(
    recordings: Sequence[Recording], fewest: int, extractor: Any, rng: random.Random
) -> Iterator[_Window]:
    """Recordings joined, or cut, to what a model hears at a time."""
    most, rate = longest_sound(extractor), extractor.sampling_rate
    spare = max(0, len(recordings) - fewest)  # that need not be windows of their own
    pause = torch.zeros(round(PAUSE * rate))
    waiting: deque[tuple[Recording, Tensor]] = deque()
    left = iter(recordings)

    def following() -> tuple[Recording, Tensor] | None:
        if not waiting and (each := next(left, None)) is not None:
            waiting.append((each, read_sound(each.path, rate)))
        return waiting[0] if waiting else None

    while (first := following()) is not None:
        waiting.popleft()
        recording, sound = first
        if most is not None and len(sound) > most and recording.said is None:
            yield from (_Window(part, None, [recording.name]) for part in torch.split(sound, most))
            continue
        check_length(recording, sound, extractor)
        parts, said, names = [sound], [recording.said], [recording.name]
        target = rng.random() * (most or 0)
        while spare and (another := following()) is not None:
            together = sum(map(len, parts)) + len(pause) + len(another[1])
            if together > target:
                break
            waiting.popleft()
            parts += [pause, another[1]]
            said.append(another[0].said)
            names.append(another[0].name)
            spare -= 1
        known = [each for each in said if each is not None]
        words = " ".join(known) if len(known) == len(said) else None
        yield _Window(torch.cat(parts), words, names)


def _rows_of(windows: Sequence[_Window], ear: Ear, dataset: str) -> Iterator[_Row]:
    features = features_of([each.sound for each in windows], ear.extractor)
    most = new_tokens_of(ear.model.config)
    known = all(each.said is not None for each in windows)
    written = ear.write(features, min(STARTS, most) if known else most)
    for at, (window, row) in enumerate(zip(windows, written, strict=True)):
        starts, words = _apart(row, ear.tokenizer)
        if window.said is not None:
            words = _ids_of(window.said, words, ear.tokenizer)
            if len(words) > most:
                raise UsageError(
                    dataset,
                    f"a transcript has {len(words)} tokens ({window.said[:40]!r} ...)",
                    f"at most {most} in what the model hears at a time",
                    "Repair it",
                )
        yield {name: each[at] for name, each in features.items()}, starts, words


def _apart(row: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a model starts from, which is no text, and its words."""
    at = 1
    while at < len(row) and not tokenizer.decode([row[at]], skip_special_tokens=True).strip():
        at += 1
    return row[:at], row[at:]


def _repeats(words: list[int], tokenizer: Any) -> bool:
    """Whether a text of the source repeats itself: it ends in a loop, or zlib finds it so."""
    text = tokenizer.decode(words, skip_special_tokens=True).strip().encode()
    return ends_in_loop(words) or len(text) > REPEATED * len(zlib.compress(text))


def _ids_of(said: str, words: list[int], tokenizer: Any) -> list[int]:
    """A transcript in tokens, behind a space where the source's own words are."""
    spaced = not words or tokenizer.decode(words[:1]).startswith(" ")
    text = " " + said if spaced and said else said
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _common(starts: Sequence[list[int]]) -> list[int]:
    """The tokens that all begin with."""
    found: list[int] = []
    for column in zip(*starts, strict=False):
        if len(set(column)) > 1:
            break
        found.append(column[0])
    return found


def _sample(
    features: dict[str, Tensor], starts: list[int], words: list[int], length: int, pad: int
) -> Sample:
    ids = torch.full((length,), pad)
    row = torch.tensor(starts + words)
    ids[: len(row)] = row
    mask = (torch.arange(length) < len(row)).long()
    return {**features, "decoder_input_ids": ids, "decoder_attention_mask": mask}
