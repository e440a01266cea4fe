"""A folder of speech: its audio files, what is said in them, and how a model hears them.

    speech/
      first.wav          .wav, .flac, .ogg or .mp3, in folders below it as well
      first.txt          what is said in it, UTF-8: the same name; may be missing

Channels are averaged, and another rate than the model's is brought to it by soxr. How sound becomes
numbers is up to the feature extractor that lies beside a model (preprocessor_config.json).
"""

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ternarize.errors import CheckpointError, UsageError, first_line
from ternarize.measure.documents import reading
from ternarize.models.configuration import in_one_line, usable

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")


class Recording(NamedTuple):
    """An audio file.

    name  its path below the folder, with / between folders
    said  what is said in it; None where no file beside it says so
    """

    path: Path
    name: str
    said: str | None


def list_recordings(folder: str | Path) -> list[Recording]:
    """The audio files below a folder, sorted by name, with their transcripts.

    Raises UsageError where there are none, or a transcript cannot be read or is of two files.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        found = "is a file" if root.exists() else "no such folder"
        raise UsageError(folder, found, "a folder of audio files", "Check the path")
    paths: list[Path] = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(place, name) for name in names if Path(name).suffix.lower() in AUDIO]
    if not paths:
        kinds = ", ".join(AUDIO)
        raise UsageError(folder, f"holds no {kinds} file", "some speech", "Name another folder")
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    shared = Counter(path.with_suffix(".txt") for path in paths)
    for transcript, audio in shared.items():
        if audio > 1 and transcript.is_file():
            found = f"has the name of {audio} recordings"
            raise UsageError(transcript, found, "one recording of it", "Rename the others")
    return [Recording(path, path.relative_to(root).as_posix(), _said_in(path)) for path in paths]


def _said_in(path: Path) -> str | None:
    """The transcript beside an audio file."""
    transcript = path.with_suffix(".txt")
    if not transcript.is_file():
        return None
    with reading(transcript, "what is said, as text"):
        return transcript.read_text("utf-8-sig").strip()


def read_sound(path: Path, rate: int) -> Tensor:
    """What an audio file sounds like: (samples,) float32 at `rate` samples a second, -1 to 1.

    Raises UsageError where it cannot be read, or holds no sound.
    """
    soundfile, soxr = _reader("soundfile", path), _reader("soxr", path)
    try:
        with path.open("rb") as file:
            sound, own = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        why = first_line(getattr(error, "error_string", None) or error)
        raise UsageError(
            path,
            f"cannot be read as audio ({why})",
            f"a {path.suffix.lower()} file",
            "Repair it, or leave it out",
        ) from None
    mono = sound.mean(axis=1)
    if own != rate and len(mono):
        mono = soxr.resample(mono, own, rate)
    found = torch.from_numpy(mono).float()
    if not len(found) or not found.isfinite().all():
        what = "has NaN or infinite numbers" if len(found) else "holds no sound"
        raise UsageError(path, what, "speech", "Repair it, or leave it out")
    return found


def _reader(name: str, where: object) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: without the library that it wraps
        raise UsageError(
            where,
            f"audio is read with soundfile and soxr, and {name} cannot be imported",
            "it",
            "Run pip install 'ternarize[audio]'",
        ) from None


def open_extractor(directory: Path) -> Any:
    """The feature extractor of a checkpoint; raises CheckpointError when it has none."""
    if not any((directory / name).is_file() for name in EXTRACTOR_FILES):
        raise CheckpointError(
            directory,
            "no feature extractor, without which nothing is heard",
            EXTRACTOR_FILES[0],
            "Copy it from the source of the model",
        )
    with usable(directory / EXTRACTOR_FILES[0]):
        auto: Any = transformers.AutoFeatureExtractor  # has no annotations
        found = auto.from_pretrained(directory, trust_remote_code=False)
        if not isinstance(getattr(found, "sampling_rate", None), int):
            raise ValueError(f"{type(found).__name__} has no sampling rate")
    return found


def longest_sound(extractor: Any) -> int | None:
    """Samples that a model hears at a time; None where its extractor does not say."""
    found: int | None = getattr(extractor, "n_samples", None)
    return found


def check_length(recording: Recording, sound: Tensor, extractor: Any) -> None:
    """Raise UsageError for a recording that is longer than what a model hears at a time."""
    most, rate = longest_sound(extractor), extractor.sampling_rate
    if most is not None and len(sound) > most:
        raise UsageError(
            recording.path,
            f"is {len(sound) / rate:.1f} s long",
            f"at most {most / rate:g} s, which the model hears at a time",
            "Cut it and its transcript, or leave it out",
        )


def features_of(sounds: Sequence[Tensor], extractor: Any) -> dict[str, Tensor]:
    """What a model is given to hear: float32 tensors by name, a row for each sound.

    Raises CheckpointError where the extractor fails, or gives rows of different lengths.
    """
    rows = [each.numpy() for each in sounds]
    where = type(extractor).__name__
    with in_one_line(where, "fails on a recording", "features of it", "Use another recording"):
        given = extractor(rows, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {name: given[name].to(torch.float32) for name in extractor.model_input_names[:1]}
