"""Speech: folders of audio, word error rates, calibration and training on what a model hears."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import ternarize
from ternarize.calibrate.pipeline import quality_of, samples_of
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, UsageError
from ternarize.measure.audio import list_recordings, read_sound
from ternarize.measure.figures import ratio_of
from ternarize.measure.speech import evaluate_speech, word_errors, write_heard
from ternarize.plans.recipe import Calibrate, Recipe, Train
from ternarize.train.sources import data_of

soundfile = pytest.importorskip("soundfile", reason="needs ternarize[audio]")

HF: Any = transformers  # has few annotations
RATE = 16000
SPECIAL = ["<pad>", "<|start|>", "<|end|>", "<|en|>", "<|transcribe|>"]
LAST = "<|notimestamps|>"  # behind it Whisper has nothing but time stamps
START, END, LANGUAGE = 1, 2, [3, 4, 159]


def word_tokenizer() -> Any:
    """Ids 0 to 4 and 159 are special, the word `w7` is id 7."""
    names = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), 159)), LAST]
    words = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, "w6"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(name, special=True) for name in (*SPECIAL, LAST)])
    return HF.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|start|>", eos_token="<|end|>", pad_token="<pad>"
    )


def save_recogniser(
    directory: Path, seed: int = 0, told: bool = True, dtype: torch.dtype = torch.float32
) -> Path:
    """A tiny Whisper that hears a second at a time.

    told  it starts from language, task and no time stamps, as Whisper of many languages does
    """
    tiny_models.save("whisper", directory, dtype, seed)
    word_tokenizer().save_pretrained(directory)
    extractor = HF.WhisperFeatureExtractor(
        feature_size=16, chunk_length=1, hop_length=250, n_fft=400
    )
    extractor.save_pretrained(directory)
    settings: dict[str, Any] = {"decoder_start_token_id": START, "eos_token_id": END}
    if told:
        settings |= {"lang_to_id": {"<|en|>": 3}, "task_to_id": {"transcribe": 4}}
        settings |= {"no_timestamps_token_id": 159, "is_multilingual": True, "task": "transcribe"}
    config = HF.GenerationConfig(pad_token_id=0, max_length=32, **settings)
    config.save_pretrained(directory)
    return directory


def sound(seed: int, seconds: float, rate: int = RATE) -> Any:
    """Some tones with noise, (samples,) float32."""
    rng = np.random.default_rng(seed)
    at = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * f * at) for f in rng.uniform(100, 3000, 3))
    return (0.2 * tones + 0.02 * rng.standard_normal(len(at))).astype("float32")


def speech(
    folder: Path, number: int, seconds: float = 0.3, said: bool = True, seed: int = 0
) -> Path:
    """Recordings of tones, each with a transcript of three words."""
    folder.mkdir(parents=True)
    for at in range(number):
        soundfile.write(folder / f"{at:02}.wav", sound(100 * seed + at, seconds), RATE)
        if said:
            (folder / f"{at:02}.txt").write_text(f"w{20 + at} w7 w{40 + at}\n")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_recogniser(tmp_path_factory.mktemp("speech") / "source")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    convert(source, source.parent / "packed", Recipe("itf", group_size=32))
    return source.parent / "packed"


@pytest.fixture
def all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model writes one word over and over, of which windows would be left out."""
    monkeypatch.setattr("ternarize.calibrate.speech._repeats", lambda *_: False)


# --- a folder of audio --------------------------------------------------------------------------


def test_recordings_are_found_with_what_is_said_beside_them(tmp_path: Path) -> None:
    folder = speech(tmp_path / "audio", 2)
    (folder / "01.txt").unlink()
    (folder / "deep").mkdir()
    soundfile.write(folder / "deep" / "a.FLAC", sound(0, 0.1), RATE, format="FLAC")
    (folder / "deep" / "a.txt").write_bytes("\ufeff  Ähm, w7. \n".encode())
    (folder / ".hidden").mkdir()
    soundfile.write(folder / ".hidden" / "b.wav", sound(0, 0.1), RATE)
    (folder / "notes.pdf").write_bytes(b"x")
    assert [(each.name, each.said) for each in list_recordings(folder)] == [
        ("00.wav", "w20 w7 w40"),
        ("01.wav", None),
        ("deep/a.FLAC", "Ähm, w7."),
    ]


def test_sound_is_one_channel_at_the_rate_of_the_model(tmp_path: Path) -> None:
    """A tone of 440 Hz stays one, whatever rate and number of channels it is stored in."""
    for rate, kind in ((8000, "wav"), (44100, "flac"), (48000, "ogg"), (16000, "mp3")):
        at = np.arange(rate) / rate
        tone = 0.5 * np.sin(2 * np.pi * 440 * at)
        path = tmp_path / f"{rate}.{kind}"
        soundfile.write(path, np.stack([tone, tone / 2], 1), rate)
        found = read_sound(path, RATE)
        assert found.dtype == torch.float32 and found.ndim == 1
        assert abs(len(found) - RATE) <= RATE * 0.1  # mp3 is filled up to whole frames
        strength = torch.fft.rfft(found[:RATE]).abs()
        assert abs(int(strength.argmax()) * RATE / min(RATE, len(found)) - 440) < 2
        assert float(found.abs().max()) == pytest.approx(0.375, rel=0.05)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda f: (f / "00.wav").write_bytes(b"RIFFxxxx"), "00.wav: cannot be read as audio"),
        (lambda f: (f / "00.wav").write_bytes(b""), "00.wav: cannot be read as audio"),
        (lambda f: soundfile.write(f / "00.wav", sound(0, 0), RATE), "00.wav: holds no sound"),
        (
            lambda f: soundfile.write(f / "00.wav", sound(0, 1) * np.nan, RATE, subtype="FLOAT"),
            "00.wav: has NaN or infinite numbers",
        ),
        (lambda f: soundfile.write(f / "00.wav", sound(0, 1.5), RATE), "00.wav: is 1.5 s long"),
        (lambda f: (f / "00.txt").write_bytes(b"\xff"), "00.txt: byte 0 is not UTF-8"),
        (
            lambda f: soundfile.write(f / "00.flac", sound(0, 0.1), RATE),
            "00.txt: has the name of 2 recordings",
        ),
        (lambda f: (f / "00.txt").unlink(), "1 of 8 recordings have no transcript, first 00.wav"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, packed: Path, spoil: Any, what: str
) -> None:
    folder = speech(tmp_path / "audio", 8)
    spoil(folder)
    with pytest.raises(UsageError, match=what) as caught:
        evaluate_speech(packed, folder)
    assert "\n" not in str(caught.value)


def test_a_missing_reader_is_named_with_the_extra(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(UsageError, match=r"soxr cannot be imported; .*pip install 'ternarize\[au"):
        evaluate_speech(packed, speech(tmp_path / "audio", 1))


# --- word error rates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "written", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a b c", "a c", 1),
        ("a b c", "a b b c", 1),
        ("a b c", "", 3),
        ("", "a", 1),
        ("s i t t i n g", "k i t t e n", 3),
        ("a b", "b a", 2),
    ],
)
def test_word_errors_are_the_fewest_changes(said: str, written: str, errors: int) -> None:
    assert word_errors(said.split(), written.split()) == errors


SHORT = st.lists(st.sampled_from("abc"), max_size=6)


@given(SHORT, SHORT)
def test_word_errors_agree_with_their_recursive_definition(a: list[str], b: list[str]) -> None:
    def fewest(x: Sequence[str], y: Sequence[str]) -> int:
        if not x or not y:
            return len(x) + len(y)
        same = fewest(x[1:], y[1:]) + (x[0] != y[0])
        return min(same, fewest(x[1:], y) + 1, fewest(x, y[1:]) + 1)

    assert word_errors(a, b) == word_errors(b, a) == fewest(a, b)


def test_a_ratio_of_sums_has_the_error_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 20, (4000, 60), generator=generator).double()
    errors = (words * torch.rand(4000, 60, generator=generator, dtype=torch.float64)).round()
    ratios = errors.sum(1) / words.sum(1)
    found = ratio_of(errors[0], words[0])
    assert found["value"] == pytest.approx(float(ratios[0]))
    assert found["standard_error"] == pytest.approx(float(ratios.std()), rel=0.25)
    assert ratio_of(errors[0, :1], words[0, :1])["standard_error"] is None


def test_a_packed_model_is_measured_beside_its_source(
    tmp_path: Path, source: Path, packed: Path
) -> None:
    """Against a restatement: generate of transformers, and texts compared word by word."""
    folder = speech(tmp_path / "audio", 5)
    (folder / "00.txt").write_text("W20, w7 w40!")  # capitals and points do not count
    found = evaluate_speech(packed, folder, source=source, batch_size=2)
    extractor = HF.WhisperFeatureExtractor.from_pretrained(source)
    tokenizer = word_tokenizer()
    loaded: dict[str, Any] = {
        "packed": ternarize.load(packed, dtype=torch.float32),
        "source": HF.WhisperForConditionalGeneration.from_pretrained(source),
    }
    errors = dict.fromkeys([*loaded, "changed"], 0)
    written_words = 0
    for at, row in enumerate(found["texts"]):
        given_features = extractor(
            soundfile.read(folder / row["file"])[0], sampling_rate=RATE, return_tensors="pt"
        ).input_features.float()
        said = f"w{20 + at} w7 w{40 + at}".split()
        for name, model in loaded.items():
            out = model.generate(given_features, max_new_tokens=16)
            assert row[name] == tokenizer.decode(out[0], skip_special_tokens=True)
            errors[name] += word_errors(said, row[name].split())
        errors["changed"] += word_errors(row["source"].split(), row["packed"].split())
        written_words += len(row["source"].split())
    assert (found["files"], found["words"], found["seconds"]) == (5, 15, 1.5)
    assert found["word_error_rate"]["value"] == pytest.approx(errors["packed"] / 15)
    assert found["source_word_error_rate"]["value"] == pytest.approx(errors["source"] / 15)
    ratio = errors["packed"] / errors["source"]
    assert found["word_error_ratio"]["value"] == pytest.approx(ratio)
    assert found["words_changed"]["value"] == pytest.approx(errors["changed"] / written_words)
    assert errors["changed"] > 0


def test_a_model_is_equal_to_itself_and_needs_no_transcripts(tmp_path: Path, source: Path) -> None:
    folder = speech(tmp_path / "audio", 3, said=False)
    with pytest.raises(UsageError, match="3 of 3 recordings have no transcript.*--source"):
        evaluate_speech(source, folder)
    found = evaluate_speech(source, folder, source=source)
    assert found["words_changed"] == {"value": 0.0, "standard_error": 0.0}
    assert "word_error_rate" not in found and found["normalizer"] == "basic"


def test_english_spellings_come_from_the_checkpoint(tmp_path: Path) -> None:
    from ternarize.measure.measured import Measured
    from ternarize.measure.speech import normalizer_of

    measured = [Measured.at(save_recogniser(tmp_path / "model"))]
    assert normalizer_of(measured, "en")("Don't colour Twenty-one!") == "do not colour 21"
    assert normalizer_of(measured, None)("Don't, Löwe!").split() == ["don", "t", "löwe"]
    (tmp_path / "model" / "normalizer.json").write_text('{"colour": "color"}')
    assert normalizer_of(measured, "en")("colour") == "color"


def test_a_language_is_one_by_any_of_its_names_and_recorded_where_it_was_told(
    tmp_path: Path, source: Path
) -> None:
    folder = speech(tmp_path / "audio", 1)
    found = evaluate_speech(source, folder, language="English", max_new_tokens=8)
    assert (found["language"], found["normalizer"], found["notes"]) == ("en", "English", [])
    deaf = save_recogniser(tmp_path / "deaf", told=False)
    found = evaluate_speech(deaf, folder, language="EN", max_new_tokens=8)
    assert (found["language"], found["normalizer"]) == (None, "English")
    shown = run("eval", deaf, "--audio", folder, "--language", "EN", "--max-new-tokens", 8)
    assert found["notes"][0] in " ".join(shown.split()) and "cannot be told" in found["notes"][0]


# --- calibration and training -------------------------------------------------------------------


@pytest.mark.usefixtures("all_windows")
def test_a_conversion_is_calibrated_on_speech(tmp_path: Path, source: Path) -> None:
    folder = speech(tmp_path / "audio", 12, said=False)
    calibrate = Calibrate(str(folder), num_samples=8, rotation=16)
    record = convert(
        source, tmp_path / "packed", Recipe("gptq", group_size=32, calibrate=calibrate)
    )
    data = record["calibration"]["data"]
    assert (data["dataset"], data["samples"], data["recordings"]) == ("audio", 8, 12)
    assert data["windows_begin_with"] == [
        "<|start|>",
        "<|en|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    assert set(record["calibration"]["quality"]) >= {"perplexity", "kl_divergence"}
    assert record["calibration"]["uncalibrated"] == 0
    assert str(tmp_path) not in json.dumps(record)
    found = evaluate_speech(tmp_path / "packed", folder, source=source)
    assert found["words_changed"]["value"] < 1


def test_a_window_without_words_is_no_error_and_a_set_of_them_is_refused_at_once(
    tmp_path: Path, source: Path
) -> None:
    folder = speech(tmp_path / "audio", 10)
    for path in folder.glob("*.txt"):
        path.write_text("")
    with pytest.raises(UsageError, match="the 8 samples to calibrate on have no words"):
        samples_of(source, Calibrate(str(folder), num_samples=8), trained=False)
    model = HF.WhisperForConditionalGeneration.from_pretrained(source)
    ids = torch.tensor([[START, *LANGUAGE, 0], [START, *LANGUAGE, 7]])
    batch = {
        "input_features": torch.randn(2, 16, 64),
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    }
    with torch.no_grad():
        output = model(**batch)
    found = quality_of(type(model), model.config, [(batch, output, output)], 4)
    expected = -float(output.logits[1, 3].log_softmax(-1)[7])
    assert found["perplexity"]["value"] == pytest.approx(np.exp(expected), rel=1e-5)
    assert found["kl_divergence"]["value"] == 0


def test_a_length_of_samples_is_not_ignored(tmp_path: Path, source: Path) -> None:
    folder = speech(tmp_path / "audio", 8)
    with pytest.raises(UsageError, match="64 tokens, and .* is a folder of speech"):
        samples_of(source, Calibrate(str(folder), num_samples=8, seq_len=64), trained=False)


@pytest.mark.usefixtures("all_windows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_what_the_source_hears_and_writes(
    tmp_path: Path, source: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype that is fast on a processor, which is one of the two."""
    monkeypatch.setattr("ternarize.calibrate.speech.fast_dtype", lambda device: dtype)
    folder = speech(tmp_path / "audio", 10, said=False)
    samples = samples_of(source, Calibrate(str(folder), num_samples=8), trained=False)
    model = HF.WhisperForConditionalGeneration.from_pretrained(source, dtype=dtype)
    assert samples.first == 4  # behind the tokens that all start from
    tokens = 0
    for batch in samples.batches:
        written = model.generate(batch["input_features"].to(dtype), max_new_tokens=16).tolist()
        rows = zip(
            batch["decoder_input_ids"], batch["decoder_attention_mask"], written, strict=True
        )
        for ids, mask, row in rows:
            length = int(mask.sum())
            tokens += length
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            row = [token for token in row if token not in (0, END)]
            assert ids[:length].tolist() == [START, *LANGUAGE, *row]
            assert not ids[length:].any()
    assert tokens == samples.tokens
    assert (
        samples.digest
        == samples_of(source, Calibrate(str(folder), num_samples=8), trained=False).digest
    )


def test_windows_in_which_the_source_repeats_itself_are_left_out(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that end in a loop, and those that zlib makes much smaller; and it is said."""
    written = iter([[10, 11] * 8, [30] * 14 + [50, 51], *([7, at, 8] for at in range(60, 100))])

    def write(model: Any, features: Any, new_tokens: int, **how: Any) -> list[list[int]]:
        assert how == {"end_loops": True}
        return [[START, *LANGUAGE, *next(written)] for _ in features["input_features"]]

    monkeypatch.setattr("ternarize.calibrate.speech.write_heard", write)
    folder = speech(
        tmp_path / "audio", 12, seconds=0.6, said=False
    )  # two are too long for one window
    samples = samples_of(source, Calibrate(str(folder), num_samples=8), trained=False)
    ids = [b["decoder_input_ids"] for b in samples.batches + samples.heldout + samples.report]
    assert torch.cat(ids)[:, 4:].tolist() == [[7, at, 8] for at in range(60, 70)]
    assert samples.description["windows_left_out"] == 2
    note = "2 of 12 windows are left out: in them the source repeats itself"
    assert note in samples.description["notes"]
    written = iter([[12] * 16, *([7, at, 8] for at in range(60, 100))])
    assert data_of(source, Train(texts=(str(folder),), steps=1)).about["windows_left_out"] == 1
    written = iter([[12] * 16] * 7 + [[7, at, 8] for at in range(60, 65)])
    with pytest.raises(UsageError, match="5 windows of speech, and 7 in which the source repeats"):
        samples_of(source, Calibrate(str(folder), num_samples=8), trained=False)


def test_a_text_is_broken_off_in_a_loop_where_that_is_asked_for(source: Path) -> None:
    model = HF.WhisperForConditionalGeneration.from_pretrained(source)
    norm = model.model.decoder.layer_norm
    with torch.no_grad():
        norm.weight.zero_()  # whatever it hears, it writes w7
        norm.bias.copy_(100 * model.proj_out.weight[7])
    features = {"input_features": torch.randn(2, 16, 64)}
    assert write_heard(model, features, 24) == [[START, *LANGUAGE, *[7] * 24]] * 2
    assert write_heard(model, features, 24, end_loops=True) == [[START, *LANGUAGE, *[7] * 16]] * 2


@pytest.mark.parametrize("told", [True, False])
def test_transcripts_take_the_place_of_the_sources_words(tmp_path: Path, told: bool) -> None:
    model = save_recogniser(tmp_path / "model", told=told)
    folder = speech(tmp_path / "audio", 10)
    samples = samples_of(model, Calibrate(str(folder), num_samples=8), trained=False)
    said = {each.said for each in list_recordings(folder)}
    tokenizer = word_tokenizer()
    seen = set()
    for batch in samples.batches + samples.heldout + samples.report:
        for ids, mask in zip(
            batch["decoder_input_ids"], batch["decoder_attention_mask"], strict=True
        ):
            row = ids[: int(mask.sum())].tolist()
            if told:
                assert row[:4] == [START, *LANGUAGE]
            assert row[0] == START
            seen.add(tokenizer.decode(row, skip_special_tokens=True))
    assert seen == said  # each in one set, and once


def test_recordings_are_joined_where_there_are_more_than_windows(
    tmp_path: Path, source: Path
) -> None:
    folder = speech(tmp_path / "audio", 30, seconds=0.1)
    samples = samples_of(source, Calibrate(str(folder), num_samples=6), trained=False)
    words = [
        int(mask.sum()) - 4
        for batch in samples.batches + samples.heldout + samples.report
        for mask in batch["decoder_attention_mask"]
    ]
    assert len(words) == 8 and sum(words) == 3 * samples.description["recordings"]
    assert samples.description["recordings"] > 8 and max(words) > 3
    assert all(count % 3 == 0 for count in words)


@pytest.mark.usefixtures("all_windows")
def test_long_recordings_without_transcripts_are_cut(tmp_path: Path, source: Path) -> None:
    folder = speech(tmp_path / "audio", 1, seconds=9.5, said=False)
    samples = samples_of(source, Calibrate(str(folder), num_samples=8), trained=False)
    assert samples.description["samples"] == 8
    (folder / "00.txt").write_text("w7")
    with pytest.raises(UsageError, match="is 9.5 s long; expected at most 1 s"):
        samples_of(source, Calibrate(str(folder), num_samples=8), trained=False)


@pytest.mark.parametrize(
    ("number", "spoil", "what"),
    [
        (2, lambda f: None, "2 windows of speech; expected at least 6"),
        (9, lambda f: (f / "00.txt").write_text("w7 " * 40), "a transcript has 40 tokens"),
        (9, lambda f: (f / "00.wav").write_bytes(b"?"), "00.wav: cannot be read as audio"),
    ],
)
def test_speech_that_calibrates_nothing_is_refused(
    tmp_path: Path, source: Path, number: int, spoil: Any, what: str
) -> None:
    folder = speech(tmp_path / "audio", number)
    spoil(folder)
    with pytest.raises(UsageError, match=what):
        samples_of(source, Calibrate(str(folder), num_samples=8), trained=False)


@pytest.mark.parametrize(
    ("missing", "what"),
    [("preprocessor_config.json", "no feature extractor"), ("tokenizer", "no tokenizer")],
)
def test_a_source_that_lacks_a_part_is_refused(tmp_path: Path, missing: str, what: str) -> None:
    model = save_recogniser(tmp_path / "model")
    for path in model.glob(f"{missing}*"):
        path.unlink()
    folder = speech(tmp_path / "audio", 8)
    with pytest.raises(CheckpointError, match=what):
        samples_of(model, Calibrate(str(folder), num_samples=8), trained=False)


@pytest.mark.usefixtures("all_windows")
def test_a_model_is_trained_on_speech_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, as it is where that is fast, and from FP16, as Whisper is published."""
    for module in ("students", "run"):
        monkeypatch.setattr(f"ternarize.train.{module}.fast_dtype", lambda device: torch.bfloat16)
    source = save_recogniser(tmp_path / "source", dtype=torch.float16)
    folder = speech(tmp_path / "audio", 12, said=False)
    train = Train(texts=(str(folder),), steps=2, batch=512, lr=0.01)
    record = convert(source, tmp_path / "packed", Recipe("itf", group_size=32, train=train))
    found = record["training"]
    assert found["steps"] == 2 and found["held_out"][-1][1] < found["held_out"][0][1]
    assert "kl_divergence" in found["quality"]


# --- what users do ------------------------------------------------------------------------------


def test_a_pipeline_transcribes(tmp_path: Path) -> None:
    """With Whisper's own tokenizer, which pipelines need: letters, and pairs of them."""
    packed = tmp_path / "packed"
    convert(save_recogniser(tmp_path / "model"), packed, Recipe("itf", group_size=32))
    letters = [*"abcdefghijkl", "\u0120"]
    pairs = [(a, b) for a in letters[:12] for b in letters[:12]][: 159 - 5 - len(letters)]
    names = [*SPECIAL, *letters, *("".join(each) for each in pairs), LAST]
    vocabulary = {name: at for at, name in enumerate(names)}
    tokenizer = HF.WhisperTokenizer(
        vocabulary, pairs, unk_token="a", bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, LAST]})
    tokenizer.save_pretrained(packed)
    pipe: Any = HF.pipeline("automatic-speech-recognition", model=str(packed), dtype="float32")
    heard = sound(3, 0.3)
    (text,) = pipe(heard, generate_kwargs={"num_beams": 1, "max_new_tokens": 16}).values()
    folder = tmp_path / "audio"
    folder.mkdir()
    soundfile.write(folder / "a.wav", heard, RATE, subtype="FLOAT")
    (folder / "a.txt").write_text("w7")
    (row,) = evaluate_speech(packed, folder)["texts"]
    assert text.strip() == row["packed"] and row["packed"]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if not code else result.stderr


def test_the_command_line_measures_speech(tmp_path: Path, source: Path, packed: Path) -> None:
    folder = speech(tmp_path / "audio", 4)
    command = ("eval", packed, "--source", source, "--audio", folder, "--language", "en")
    shown = run(*command, "--examples", 1)
    for words in ("word error rate", "source word error rate", "word error ratio", "words changed"):
        assert words in shown
    # English numbers stand apart: w 20
    assert "4 recordings, 0.0 minutes, 24 words, English normalizer, float32 on cpu" in shown
    assert "00.wav: w20 w7 w40\n  source: " in shown and "01.wav" not in shown
    found = json.loads(run(*command, "--json"))
    assert len(found["texts"]) == 4 and found["kind"] == "speech recogniser"
    bound = (*command, "--min-quality", "words_changed=0")
    assert "words_changed: " in run(*bound, code=1)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--audio", "AUDIO", "--text", "default"], "both of --text and --audio"),
        (["--audio", "AUDIO", "--tasks", "piqa"], "both of --audio and --tasks"),
        (["--text", "default", "--language", "en"], "--language: is for --audio"),
        (["--text", "default"], "is a speech recogniser, which reads no text"),
        (["--audio", "EMPTY"], "holds no .wav, .flac, .ogg, .mp3 file"),
        (["--audio", "NOWHERE"], "no such folder"),
        (["--audio", "AUDIO", "--min-quality", "perplexity=3"], "a number for one of word_error_r"),
        (["--audio", "AUDIO", "--language", "xx"], "--language: 'xx'; expected a language of Whis"),
        (["--audio", "AUDIO", "--language", "de"], "cannot write what it hears"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, packed: Path, options: list[str], what: str
) -> None:
    speech(tmp_path / "AUDIO", 1)
    (tmp_path / "EMPTY").mkdir()
    words = [str(tmp_path / each) if each.isupper() else each for each in options]
    said = run("eval", packed, *words, code=1 if "de" in words else 2)
    assert what in " ".join(said.split())


def test_a_model_that_hears_nothing_is_refused(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "llama", torch.float32)
    with pytest.raises(
        UsageError, match="is a causal language model, which writes nothing of what"
    ):
        evaluate_speech(tmp_path / "llama", speech(tmp_path / "audio", 1))
