"""What a model writes of what it hears, beside what was said, and beside its source.

Each recording is heard whole and alone, and written down with the likeliest token each time, until
the model ends the text. What was said and what was written go through a normalizer of Whisper's
evaluation (lower case, no punctuation; the English one also writes numbers and contractions in one
way), and are compared word by word. With e(a, b) the fewest words to be replaced, put in or left
out to make a text a out of a text b:

    word error rate    sum of e(said, written) over the number of words that were said
    word error ratio   that of the packed model over that of its source
    words changed      the same rate with what the source writes in the place of what was said

Standard errors are those of ratios of sums over recordings. Rates above 1 are possible, and common
where a model loops.

Robust Speech Recognition via Large-Scale Weak Supervision, section 4.2 and appendix C:
https://arxiv.org/abs/2212.04356
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.models.whisper import english_normalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ternarize.errors import UsageError
from ternarize.files.json_files import read_json
from ternarize.measure.audio import (
    Recording,
    check_length,
    features_of,
    list_recordings,
    open_extractor,
    read_sound,
)
from ternarize.measure.figures import Figure, ratio_of
from ternarize.measure.measured import Measured, compute_dtype, open_pair, shared_tokenizer
from ternarize.measure.writing import OnlyNumbers, ends_in_loop
from ternarize.models.configuration import in_one_line
from ternarize.models.reads import ENCODER, SPEECH, max_positions
from ternarize.progress import Progress
from ternarize.trits.ternary import check_device

HEARD_TOKENS = 224  # as OpenAI's own decoding has it: half of Whisper's context
BATCH = 8  # recordings
ENGLISH = "en"
SPELLINGS = "normalizer.json"  # British and American, beside Whisper's tokenizer

Normalize = Callable[[str], str]


def evaluate_speech(
    packed: str | Path,
    audio: str | Path,
    *,
    source: str | Path | None = None,
    language: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    activations: str | None = None,
    head: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a packed speech recogniser on a folder of audio files, beside its source.

    packed          directory or Hub id; an ordinary checkpoint can be measured too
    audio           folder, as `list_recordings` reads it; where no file has a transcript, what the
                    source writes is all that is compared with
    source          the checkpoint that `packed` was made from
    language        what is spoken, "en", "de", "german", ...; None: a model of many languages finds
                    it out. Text is normalized as English for "en", otherwise as for any language
    max_new_tokens  written of each recording at most; None: 224, or half of the model's context
    batch_size      recordings at a time; None: 8
    others          as in `evaluate`

    Returns plain data: "kind", "model", "source", "audio", "files", "seconds" of sound, "words"
    (that were said, or that the source wrote), "normalizer", "language" (its code where the models
    were told it, else None), "max_new_tokens", "dtype", "device", "notes"; measures, each {"value",
    "standard_error"}: with transcripts word_error_rate, with a source too source_word_error_rate
    and (unless that is 0) word_error_ratio, with a source words_changed; and "texts", a list of
    {"file", "seconds", "said", "packed", "source"}.

    Raises UsageError when the folder or an option cannot be used, CheckpointError when a model
    cannot be loaded or evaluated.
    """
    for name, value in (("max new tokens", max_new_tokens), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(name, f"{value}", "at least 1", "Use a larger number")
    language = None if language is None else language_code(language)
    dtype = compute_dtype(dtype, device)
    device = device if device == "auto" else check_device(device)
    checkpoints = open_pair(packed, source)
    for each in checkpoints:
        if each.kind != SPEECH:
            article = "an" if each.kind == ENCODER else "a"
            found = f"is {article} {each.kind}, which writes nothing of what it hears"
            raise UsageError(each.directory, found, f"a {SPEECH}", "Measure it on a text (--text)")
    recordings = list_recordings(audio)
    _check_transcripts(audio, recordings, source is not None)
    hearing = _open_hearing(checkpoints, language, max_new_tokens)
    models = [checkpoints[0].load(device, dtype, activations, head)]
    models += [each.load(device, dtype) for each in checkpoints[1:]]
    rows = _transcribe_all(models, recordings, hearing, batch_size or BATCH, progress)
    counted = rows[0]["said"] is not None
    words = [_words(each["said"] if counted else each["source"], hearing) for each in rows]
    total = sum(map(len, words))
    if not total:
        found = "no word is said in it" if counted else "the source hears no word in it"
        raise UsageError(audio, found, "speech", "Name another folder")
    told = language is not None and all(map(_can_be_told, models))
    unheard = f"language {language} chose the normalizer alone: the model cannot be told of it"
    return {
        "kind": SPEECH,
        "model": str(packed),
        "source": None if source is None else str(source),
        "audio": str(audio),
        "files": len(rows),
        "seconds": round(sum(each["seconds"] for each in rows), 2),
        "words": total,
        "normalizer": "English" if language == ENGLISH else "basic",
        "language": language if told else None,
        "max_new_tokens": hearing.new_tokens,
        "dtype": str(models[0].dtype)[6:],
        "device": str(models[0].device),
        "notes": [unheard] if language is not None and not told else [],
        **_measures(rows, hearing),
        "texts": rows,
    }


def _check_transcripts(audio: object, recordings: Sequence[Recording], source: bool) -> None:
    """Raise UsageError where some recordings have no transcript, or none has and no source."""
    without = [each.path for each in recordings if each.said is None]
    if without and (len(without) < len(recordings) or not source):
        raise UsageError(
            audio,
            f"{len(without)} of {len(recordings)} recordings have no transcript, first "
            f"{without[0].name}",
            f"{without[0].with_suffix('.txt').name}, with what is said in it",
            "Add them"
            + ("" if source else ", or compare with what the source writes (--source) alone"),
        )


# --- hearing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hearing:
    """How recordings become words."""

    extractor: Any
    tokenizer: Any
    normalize: Normalize
    new_tokens: int
    language: str | None


def _open_hearing(
    checkpoints: Sequence[Measured], language: str | None, new_tokens: int | None
) -> _Hearing:
    tokenizer = shared_tokenizer(checkpoints)
    extractor = open_extractor(checkpoints[0].directory)
    normalize = normalizer_of(checkpoints, language)
    most = new_tokens or min(new_tokens_of(each.config) for each in checkpoints)
    return _Hearing(extractor, tokenizer, normalize, most, language)


def new_tokens_of(config: Any) -> int:
    """Tokens that a model writes of what it hears at a time: 224, or half of its context."""
    positions: int | None = getattr(config, "max_target_positions", None)
    return min(HEARD_TOKENS, max(1, (positions or max_positions(config)) // 2))


def language_code(language: str) -> str:
    """A language's code of Whisper, from that or its English name: "English" -> "en".

    Raises UsageError where Whisper has none.
    """
    name = language.strip().lower()
    code = TO_LANGUAGE_CODE.get(name, name)
    if code not in TO_LANGUAGE_CODE.values():
        expected = "a language of Whisper's, by code (en, de, ...) or English name"
        raise UsageError("--language", repr(language), expected, "Name another, or leave it out")
    return code


def normalizer_of(checkpoints: Sequence[Measured], language: str | None) -> Normalize:
    """What text goes through before words are compared.

    The English one spells words as the checkpoints' normalizer.json says, if one of them has it.
    """
    normalizers: Any = english_normalizer  # has no annotations
    if language != ENGLISH:
        basic: Normalize = normalizers.BasicTextNormalizer()
        return basic
    tables = (read_json(each.directory / SPELLINGS) for each in checkpoints)
    table = next((each for each in tables if each), {})
    english: Normalize = normalizers.EnglishTextNormalizer(table)
    return english


class _EndLoops(StoppingCriteria):
    """Ends a text that has fallen into a loop, which would go on for as long as it may."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([ends_in_loop(row) for row in input_ids.tolist()]).to(input_ids.device)


@torch.inference_mode()
def write_heard(
    model: Any,
    features: Mapping[str, Tensor],
    new_tokens: int,
    language: str | None = None,
    *,
    end_loops: bool = False,
) -> list[list[int]]:
    """What a model of transformers writes of what it hears, greedily.

    features    what `features_of` gives
    new_tokens  at most
    language    a code, told to models that can be told
    end_loops   a text ends once it has fallen into a loop, in which it is left

    Returns the token ids of each recording: those that the model starts from, then its words,
    without the end token. Raises CheckpointError where the model cannot do it.
    """
    settings = model.generation_config
    told: dict[str, Any] = {}
    if language is not None and _can_be_told(model):
        told = {"language": language, "task": "transcribe"}
    where = type(model).__name__
    with in_one_line(where, "cannot write what it hears", "words", "Check its generation_config"):
        out = model.generate(
            **{name: each.to(model.device, model.dtype) for name, each in features.items()},
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([OnlyNumbers(model)]),
            stopping_criteria=StoppingCriteriaList([_EndLoops()] if end_loops else []),
            **told,
        )
    end = settings.eos_token_id
    fill = {settings.pad_token_id, *(end if isinstance(end, list) else [end])}
    rows: list[list[int]] = out.sequences.tolist()
    for row in rows:
        while len(row) > 1 and row[-1] in fill:
            row.pop()
    return rows


def _can_be_told(model: Any) -> bool:
    """Whether a model takes the language that it is to write."""
    settings = model.generation_config
    return bool(getattr(settings, "lang_to_id", None)) and getattr(
        settings, "is_multilingual", True
    )


def _transcribe_all(
    models: Sequence[Any],
    recordings: Sequence[Recording],
    hearing: _Hearing,
    batch_size: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """What was said in each recording, and what each model writes."""
    rows: list[dict[str, Any]] = []
    rate = hearing.extractor.sampling_rate
    for start in range(0, len(recordings), batch_size):
        batch = recordings[start : start + batch_size]
        sounds = [read_sound(each.path, rate) for each in batch]
        for each, sound in zip(batch, sounds, strict=True):
            check_length(each, sound, hearing.extractor)
        features = features_of(sounds, hearing.extractor)
        texts = {
            name: _texts_of(model, features, hearing)
            for name, model in zip(("packed", "source"), models, strict=False)
        }
        for at, (each, sound) in enumerate(zip(batch, sounds, strict=True)):
            heard = {name: written[at] for name, written in texts.items()}
            seconds = round(len(sound) / rate, 2)
            rows.append({"file": each.name, "seconds": seconds, "said": each.said, **heard})
        if progress is not None:
            progress(len(rows), len(recordings), "", "listening")
    return rows


def _texts_of(model: Any, features: Mapping[str, Tensor], hearing: _Hearing) -> list[str]:
    rows = write_heard(model, features, hearing.new_tokens, hearing.language)
    return [
        hearing.tokenizer.decode(
            row, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()
        for row in rows
    ]


# --- measures -----------------------------------------------------------------------------------


def word_errors(said: Sequence[str], written: Sequence[str]) -> int:
    """The fewest words to be replaced, put in or left out that turn one text into the other.

    https://en.wikipedia.org/wiki/Levenshtein_distance
    """
    row = list(range(len(written) + 1))
    for number, word in enumerate(said, 1):
        before, row[0] = row[0], number
        for at, other in enumerate(written, 1):
            least = min(row[at] + 1, row[at - 1] + 1, before + (word != other))
            before, row[at] = row[at], least
    return row[-1]


def _measures(rows: Sequence[dict[str, Any]], hearing: _Hearing) -> dict[str, Figure]:
    """The measures of this module that can be taken of what was said, and written."""
    words = [
        {
            name: _words(row[name], hearing)
            for name in ("said", "packed", "source")
            if row.get(name) is not None
        }
        for row in rows
    ]
    found: dict[str, Figure] = {}

    def errors(reference: str, written: str) -> Tensor:
        pairs = [(each[reference], each[written]) for each in words]
        return torch.tensor([word_errors(*pair) for pair in pairs], dtype=torch.float64)

    def lengths(reference: str) -> Tensor:
        return torch.tensor([len(each[reference]) for each in words], dtype=torch.float64)

    if "said" in words[0]:
        ours = errors("said", "packed")
        found["word_error_rate"] = ratio_of(ours, lengths("said"))
        if "source" in words[0]:
            theirs = errors("said", "source")
            found["source_word_error_rate"] = ratio_of(theirs, lengths("said"))
            if theirs.any():
                found["word_error_ratio"] = ratio_of(ours, theirs)
    if "source" in words[0] and lengths("source").any():
        found["words_changed"] = ratio_of(errors("source", "packed"), lengths("source"))
    return found


def _words(text: str, hearing: _Hearing) -> list[str]:
    return hearing.normalize(text).split()
