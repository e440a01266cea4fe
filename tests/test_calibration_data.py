"""Calibration samples: what is read, how it is cut, that sets are apart, and what is refused."""

import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from ternarize.calibrate.data import Samples, read
from ternarize.calibrate.samples import _windows
from ternarize.calibrate.texts import Document, draw
from ternarize.errors import CheckpointError, UsageError
from ternarize.measure import documents
from ternarize.models.reads import CAUSAL, ENCODER, ENCODER_DECODER, TENSORS, kind_of
from ternarize.plans.recipe import Calibrate

Fast: Any = transformers.PreTrainedTokenizerFast
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
)


def tokenizer(
    *, bos: bool = True, framed: bool = False, size: int = 160, around: str = "<s> $A </s>"
) -> Any:
    """Ids 0, 1, 2, 3 are <pad>, <s>, </s>, user; `w7` is 7, other words are `w4`.

    framed: a text stands in `around`: between <s> and </s>, as BERT's between [CLS] and [SEP].
    """
    names = ["<pad>", "<s>", "</s>", "user", *(f"w{index}" for index in range(4, size))]
    words = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, "w4"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        special = [(name, names.index(name)) for name in around.split() if name != "$A"]
        words.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    begin = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {}
    return Fast(tokenizer_object=words, pad_token="<pad>", **begin)


def get(
    dataset: str | Path,
    model: str = "llama",
    *,
    words: Any = None,
    generate: Any = None,
    batch_size: int = 3,
    **options: Any,
) -> Samples:
    """Samples for a tiny model; 10 of 8 tokens where nothing else is said."""
    config = tiny_models.CONFIGS[model]()
    if words is None:
        words = tokenizer(framed=model in ("bert", "bert_classifier"))
    return read(
        Calibrate(str(dataset), **{"num_samples": 10, "seq_len": 8, **options}),
        config=config,
        model_class=getattr(transformers, (config.architectures or [""])[0]),
        tokenizer=words if words != "none" else None,
        generate=generate,
        batch_size=batch_size,
    )


def document(index: int, length: int = 20) -> str:
    """Words that no other document has, up to 140 of them."""
    return " ".join([f"w{10 + index}"] * length)


DOCUMENTS = [document(index) for index in range(30)]
DIGEST = "601e4ac148e7c101"  # of 10 samples of 8 of their tokens


def text(path: Path, documents: list[str]) -> Path:
    path.write_text("\n<|doc|>\n".join(documents), encoding="utf-8")
    return path


def rows(batches: list[dict[str, Tensor]], name: str = "input_ids") -> list[list[int]]:
    return [row for batch in batches for row in batch[name].tolist()]


def sources(batches: list[dict[str, Tensor]]) -> set[int]:
    """Which documents the tokens come from."""
    return {token - 10 for row in rows(batches) for token in row if token >= 10}


def all_ids(samples: Samples) -> list[list[int]]:
    return rows(samples.batches) + rows(samples.heldout) + rows(samples.report)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return text(tmp_path / "text.txt", DOCUMENTS)


# --- readers ------------------------------------------------------------------------------------


def write(path: Path, documents: list[str]) -> Path:
    table = [{"text": each, "n": 1} for each in documents]
    if path.suffix == ".txt":
        return text(path, documents)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.name == "strings.json":
        path.write_text(json.dumps(documents))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(table), path, row_group_size=7)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "strings.json", "a.parquet"])
def test_every_form_of_file_gives_the_same_samples(tmp_path: Path, file: Path, name: str) -> None:
    expected, found = get(file), get(write(tmp_path / name, DOCUMENTS))
    assert found.digest == expected.digest
    assert all_ids(found) == all_ids(expected)
    assert found.description["dataset"] == name


def test_a_directory_is_read_as_one_text(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write(folder / "a.txt", DOCUMENTS[:10])
    write(folder / "deep" / "b.jsonl", DOCUMENTS[10:])
    write(folder / ".hidden" / "c.txt", ["w4 " * 500])
    (folder / "README.md").write_text("not a text of this set")
    found = get(folder)
    assert found.digest == get(file).digest
    assert found.description["files"] == ["a.txt", "deep/b.jsonl"]
    assert found.description["notes"] == ["1 files of other kinds than text were not read"]
    assert str(tmp_path) not in json.dumps(found.description)


def test_a_named_column_is_read(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": each, "text": "w5"}) + "\n" for each in DOCUMENTS))
    found = get(path, text_column="body")
    assert found.digest == get(file).digest
    assert found.description["text_column"] == "body"


def test_messages_go_through_the_chat_template_and_text_does_not(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"w{at} w{at} w{at} w{at}"}]})
            + "\n"
            for at in range(10, 110)
        )
    )
    found = get(path, words=words, seq_len=7)
    # the template's <s> is the only one: a sample is one conversation, whole
    for row in all_ids(found):
        assert row == [1, 3, row[2], row[2], row[2], row[2], 2]
    plain = get(text(tmp_path / "a.txt", DOCUMENTS), words=words)
    assert not any(3 in row for row in all_ids(plain))


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "w5"}]}\n')
    with pytest.raises(UsageError, match="chat.jsonl: line 1, messages: .* no chat template"):
        get(path)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"role": "system", "content": "w5"}], "chat template refuses the messages .no system"),
        ([{"from": "user", "value": "w5"}], "expected objects with `role`"),
        (["w5"], "expected objects with `role`"),
    ],
)
def test_messages_that_the_template_cannot_take_are_refused(
    tmp_path: Path, messages: list[Any], what: str
) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(UsageError, match=what):
        get(path, words=words)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"", "has no text"),
        ("a.txt", b"<|doc|>\n \n<|doc|>\n", "has no text"),
        ("a.txt", b"w5 \xff w6", "byte 3 is not UTF-8"),
        ("a.txt", b"w5" + bytes(100), "document 1 has NUL"),
        ("a.jsonl", b"", "has no text"),
        ("a.jsonl", b'{"text": "w5"}\n\n{"text": \n', "a.jsonl: line 3: is not JSON"),
        ("a.jsonl", b'{"text": "w5"}\n{"text": "\xff"}\n', "line 2: byte 10 is not UTF-8"),
        ("a.jsonl", b'{"body": "w5"}\n', "line 1: has body; expected either `text` or `messages`"),
        ("a.jsonl", b'{"text": "w5", "messages": []}\n', "line 1: has text and messages"),
        ("a.jsonl", b'{"text": 5}\n', "line 1, text: is a number; expected a text"),
        ("a.jsonl", b'["w5"]\n', "line 1: is a list; expected an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1, text: .* half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1: is not JSON"),
        ("a.json", b'{"text": "w5"}', "holds an object; expected a list"),
        ("a.json", b'["w5", 5]', "entry 2: is a number"),
        ("a.json", b'["w5"', "a.json: is not JSON"),
        ("a.csv", b"text\nw5\n", "no kind of file that can be read"),
        ("a.safetensors", b"\x00" * 20, "cannot be read as safetensors"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=what) as caught:
        get(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    with pytest.raises(UsageError, match="a.parquet: pyarrow cannot read it") as caught:
        get(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="has no column 'body' but text, n"):
        get(write(tmp_path / "b.parquet", DOCUMENTS), text_column="body")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=re.escape("pip install 'ternarize[data]'")):
        get(tmp_path / "a.parquet")


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(UsageError, match="line 1: has no column 'body' but text, n"):
        get(path, text_column="body")
    with pytest.raises(UsageError, match="text without columns"):
        get(write(tmp_path / "a.txt", DOCUMENTS), text_column="body")


@pytest.mark.parametrize("name", ["absent.txt", "./absent", "/absent/a.jsonl", "a b", ""])
def test_a_path_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such file|holds no"):
        get(name)


def test_a_directory_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("w5")
    with pytest.raises(UsageError, match="holds no .txt"):
        get(tmp_path)


def test_records_without_text_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": each}) for each in ["", None, *DOCUMENTS]]
    path.write_text("\n".join(lines))
    assert get(path).description["notes"] == ["2 records without text were left out"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 0),
        ("num_samples", 2**31),
        ("seq_len", 1),
        ("seq_len", 10**400),
        ("reconstruct", -1),
        ("reconstruct", 10**400),
        ("distill", 2**31),
    ],
)
def test_numbers_out_of_range_are_refused(file: Path, name: str, value: Any) -> None:
    with pytest.raises(
        UsageError, match=f"^{name.replace('_', ' ')}: {str(value)[:60]}; expected "
    ):
        get(file, **{name: value})


def test_large_numbers_are_taken() -> None:
    most = 2**31 - 1
    Calibrate(num_samples=most, seq_len=most, reconstruct=most, distill=most)


def test_samples_longer_than_the_model_can_take_are_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="sequence length: 65; .* the model's 64 positions"):
        get(file, seq_len=65)
    assert get(file, seq_len=None, num_samples=4).description["seq_len"] == 64


def test_text_needs_the_tokenizer_of_the_model(file: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        get(file, words="none")
    with pytest.raises(CheckpointError, match="expected 0 to 159, the model's vocabulary"):
        get(text(file, [f"w{at} " * 20 for at in range(170, 200)]), words=tokenizer(size=200))


# --- the sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
@pytest.mark.parametrize("seed", range(5))
def test_no_document_is_in_two_sets(file: Path, model: str, seed: int) -> None:
    found = get(file, model, seed=seed)
    sets = [sources(each) for each in (found.batches, found.heldout, found.report)]
    assert all(sets)
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(sets[0]) > len(sets[1]) + len(sets[2])


def test_equal_documents_count_once(tmp_path: Path) -> None:
    once = text(tmp_path / "once.txt", DOCUMENTS)
    thrice = text(tmp_path / "thrice.txt", DOCUMENTS + DOCUMENTS[::-1] + DOCUMENTS)
    assert get(once).digest == get(thrice).digest


def test_samples_are_spread_over_all_documents(tmp_path: Path) -> None:
    """100 documents, of which 80 calibrate: 40 samples meet most of them, also the last ones."""
    path = text(tmp_path / "a.txt", [document(index, 31) for index in range(100)])
    met = sources(get(path, num_samples=40, seq_len=32).batches)
    assert len(met) >= 40
    assert sum(index >= 50 for index in met) > 10 < sum(index < 50 for index in met)


def test_the_seed_chooses(file: Path) -> None:
    found = [get(file, seed=seed) for seed in (0, 1, 0)]
    assert found[0].digest == found[2].digest != found[1].digest
    assert sources(found[0].heldout) != sources(found[1].heldout) or (
        sources(found[0].batches) != sources(found[1].batches)
    )


def test_another_process_chooses_the_same(file: Path) -> None:
    code = (
        "import sys; from test_calibration_data import get; "
        "print(*(get(sys.argv[1], model).digest for model in ('llama', 'bert')))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(file)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [get(file, model).digest for model in ("llama", "bert")]


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_the_digest_depends_on_the_text_and_not_on_batches(file: Path, model: str) -> None:
    before = get(file, model)
    assert get(file, model, batch_size=7).digest == before.digest
    assert before.description["digest"] == before.digest
    text(file, [each.replace("w1", "w2") for each in DOCUMENTS])
    assert get(file, model).digest != before.digest


def test_few_documents_are_cut_into_sections(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("\n\n".join(" ".join(f"w{10 + at}" for _ in range(20)) for at in range(100)))
    found = get(path)
    assert found.description["notes"] == [
        "too few documents to keep the sets apart: cut into sections"
    ]
    # every paragraph has its own word, and a section ends with a paragraph
    sets = [sources(each) for each in (found.batches, found.heldout, found.report)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_too_little_text_is_used_up_and_said_so(tmp_path: Path) -> None:
    found = get(text(tmp_path / "a.txt", DOCUMENTS), num_samples=500)
    # 30 documents of 21 tokens make 78 windows of 8
    assert 50 <= found.description["samples"] == len(rows(found.batches)) < 78
    sizes = [found.description[name] for name in ("samples", "heldout_samples", "report_samples")]
    assert found.description["notes"] == [
        "500 samples were asked for; the data make {} to calibrate on, {} to choose by and {} to "
        "report on".format(*sizes)
    ]


def test_hardly_any_text_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes . samples of 8 tokens, .* at least 4, 1 and 1"):
        get(text(tmp_path / "a.txt", ["w5 " * 30]))


def test_a_large_stream_keeps_what_is_drawn_and_no_more() -> None:
    """What is kept depends on the documents alone, not on the order in which they come."""
    stream = [Document(f"{index} " * 50) for index in range(1000)]
    kept, empty = draw(stream, 0, 5000)
    again, _ = draw(stream[::-1] + stream, 0, 5000)
    assert (kept, empty) == (again, 0)
    assert 5000 <= sum(len(each.text) for each in kept) < 5300
    numbers = [int(each.text.split()[0]) for each in kept]
    assert min(numbers) < 200 and max(numbers) > 800


# --- what a sample is ---------------------------------------------------------------------------


def test_windows_of_a_language_model_begin_documents_with_bos(file: Path) -> None:
    found = get(file, seq_len=21)  # a document of 20 words and its <s>
    for row in all_ids(found):
        assert row == [1] + [row[1]] * 20
    assert [set(batch) for batch in found.batches] == [{"input_ids"}] * 4
    assert [len(batch["input_ids"]) for batch in found.batches] == [3, 3, 3, 1]
    assert found.tokens == found.description["tokens"] == 210


def test_no_bos_is_made_up(file: Path) -> None:
    ids = {token for row in all_ids(get(file, words=tokenizer(bos=False))) for token in row}
    assert min(ids) >= 10


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
def test_every_window_begins_with_what_the_tokenizer_puts_in_front(file: Path, around: str) -> None:
    words = tokenizer(framed=True, around=around)
    found = get(file, words=words, num_samples=50, seq_len=8)
    assert found.description["windows_begin_with"] == ["<s>"]
    for row in all_ids(found):
        assert row[0] == 1 and 2 not in row and row.count(1) <= 2
        # a document of 20 words begins once in 21 tokens, and a window that it begins with once
        assert all(token >= 10 or before != 1 for before, token in itertools.pairwise(row))
    every = _windows([Document(each) for each in DOCUMENTS], words, 8)
    used = [token for row in every for token in row if token >= 10]
    text_ids = [token for each in DOCUMENTS for token in words(each).input_ids if token >= 10]
    assert used == text_ids[: len(used)] and len(text_ids) - len(used) < 7


def test_a_tokenizer_that_puts_nothing_in_front_keeps_the_windows_as_they_are(file: Path) -> None:
    found = get(file)
    assert found.description["windows_begin_with"] == []
    assert found.first == 1
    assert any(row[0] != 1 for row in all_ids(found))
    # the very samples of earlier versions: a record's digest can be had again
    assert found.digest.startswith(DIGEST)


def test_what_counts_as_predicted_begins_behind_what_a_window_begins_with(file: Path) -> None:
    found = get(file, words=tokenizer(framed=True, around="<s> user $A"), num_samples=4)
    assert found.first == 2
    assert {tuple(row[:2]) for row in all_ids(found)} == {(1, 3)}


def test_sections_of_a_document_begin_windows_as_all_do(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("\n\n".join(" ".join(f"w{10 + at}" for _ in range(20)) for at in range(100)))
    found = get(path, words=tokenizer(framed=True))
    assert found.description["notes"] == [
        "too few documents to keep the sets apart: cut into sections"
    ]
    assert {row[0] for row in all_ids(found)} == {1}
    assert sum(row.count(1) for row in all_ids(found)) == len(all_ids(found))


@pytest.mark.parametrize("begun", [True, False])
def test_a_chat_template_that_writes_the_first_token_is_not_given_another(
    tmp_path: Path, begun: bool
) -> None:
    words = tokenizer(framed=True)
    words.chat_template = TEMPLATE if begun else TEMPLATE.replace("<s> ", "")
    path = tmp_path / "chat.jsonl"
    turns = [[{"role": "user", "content": f"w{at} " * 4}] for at in range(10, 110)]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    found = get(path, words=words, seq_len=7)
    if begun:  # a sample is one conversation, whole
        for row in all_ids(found):
            assert row == [1, 3, row[2], row[2], row[2], row[2], 2]
    else:  # in the midst of the text the template's own words stand alone
        assert all(row[0] == 1 and 1 not in row[1:] for row in all_ids(found))


def test_an_encoder_and_its_decoder_read_their_texts_between_special_tokens(tmp_path: Path) -> None:
    documents = [" ".join(f"w{10 + (7 * d + at) % 140}" for at in range(13)) for d in range(60)]
    found = get(text(tmp_path / "a.txt", documents), "t5", words=tokenizer(framed=True))
    assert found.description["windows_begin_with"] == ["<s>"]
    for batch in found.batches:
        for row, target in zip(*(batch[name].tolist() for name in batch), strict=True):
            assert (row[0], row[-1], target[:2]) == (1, 2, [0, 1])
            assert len(row) == len(target) == 8
            assert row[1] != 1  # a document begins with the window, not once more behind it


def test_texts_of_an_encoder_are_framed_and_padding_is_masked(tmp_path: Path) -> None:
    lines = [" ".join([f"w{10 + index}"] * (3 + index % 5)) + " w5.\n" for index in range(140)]
    path = text(tmp_path / "a.txt", ["".join(lines[at : at + 7]) for at in range(0, 140, 7)])
    found = get(path, "bert", num_samples=20, seq_len=24)
    lengths = set()
    for batch in found.batches + found.heldout + found.report:
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            lengths.add(length)
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert row[0] == 1 and row[length - 1] == 2 and not row[length:].any()
            assert row[:length].all()
            assert length <= 24
    assert min(lengths) < 12 < 16 < max(lengths)  # from sentences to paragraphs
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in found.batches)


def test_the_decoder_gets_what_follows_shifted_right(tmp_path: Path) -> None:
    documents = [" ".join(f"w{10 + (7 * d + at) % 140}" for at in range(40)) for d in range(30)]
    found = get(text(tmp_path / "a.txt", documents), "t5", words=tokenizer(bos=False))
    for batch in found.batches:
        assert set(batch) == {"input_ids", "decoder_input_ids"}
        for row, target in zip(*(batch[name].tolist() for name in batch), strict=True):
            assert target[0] == 0 and len(row) == len(target) == 8
            joined = row + target[1:]
            steps = [(b - a) % 140 for a, b in zip(joined, joined[1:], strict=False)]
            assert steps.count(1) >= 13  # all, but where one document ends


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("llama", CAUSAL),
        ("mamba", CAUSAL),
        ("gemma3", CAUSAL),  # reads images too, and text alone
        ("bert", ENCODER),
        ("bert_classifier", ENCODER),
        ("t5", ENCODER_DECODER),
        ("whisper", TENSORS),
        ("vit", TENSORS),
        ("clip", TENSORS),  # runs on pairs only
    ],
)
def test_what_a_model_reads_is_told_from_its_class(model: str, kind: str) -> None:
    config = tiny_models.CONFIGS[model]()
    assert kind_of(getattr(transformers, (config.architectures or [""])[0]), config) == kind


def test_a_decoder_whose_config_denies_it_is_a_language_model() -> None:
    config = transformers.GPTNeoXConfig()
    assert config.is_decoder is False
    assert kind_of(transformers.GPTNeoXForCausalLM, config) == CAUSAL


@pytest.mark.parametrize("name", ["llama", "bert", "bert_classifier", "t5"])
def test_models_run_on_their_samples(file: Path, name: str) -> None:
    model = tiny_models.build(name, torch.float32)
    found = get(file, name)
    for batch in found.batches + found.heldout + found.report:
        with torch.inference_mode():
            assert model(**batch)[0].isfinite().all()


# --- the model's own text, and the package's ----------------------------------------------------


def own_text(prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
    more = torch.randint(4, 160, (len(prompt), length - prompt.shape[1]), generator=generator)
    return torch.cat([prompt, more], dim=1)


def test_a_model_writes_its_own_samples() -> None:
    prompts: list[list[int]] = []

    def generate(prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
        prompts.extend(prompt.tolist())
        return own_text(prompt, length, generator)

    found = get("self", generate=generate)
    ids = [tuple(row) for row in all_ids(found)]
    assert len(set(ids)) == len(ids) == 12  # 10 and one for each other set
    assert {row[0] for row in ids} == {1}
    assert {len(prompt) for prompt in prompts} == {1, 2}
    assert min(prompt[1] for prompt in prompts if len(prompt) == 2) > 2  # no special token
    assert found.description["dataset"] == "self"
    assert found.digest == get("self", generate=own_text).digest
    assert found.digest != get("self", generate=own_text, seed=1).digest


def test_own_text_begins_as_windows_do() -> None:
    prompts: list[list[int]] = []

    def generate(prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
        prompts.extend(prompt.tolist())
        return own_text(prompt, length, generator)

    words = tokenizer(framed=True, around="user <s> $A </s>")
    found = get("self", generate=generate, words=words)
    assert {tuple(prompt[:2]) for prompt in prompts} == {(3, 1)}
    assert {len(prompt) for prompt in prompts} == {2, 3}
    assert found.description["windows_begin_with"] == ["user", "<s>"]
    assert get("self", generate=own_text).description["windows_begin_with"] == ["<s>"]
    with pytest.raises(UsageError, match="sequence length: 2; expected more than the 2 tokens"):
        get("self", generate=generate, words=words, seq_len=2)


def test_own_text_needs_no_bos_and_no_tokenizer() -> None:
    config = tiny_models.CONFIGS["llama"]()
    config.bos_token_id = None
    samples = read(
        Calibrate("self", 8, 8),
        config=config,
        model_class=transformers.LlamaForCausalLM,
        tokenizer=None,
        generate=own_text,
        batch_size=4,
    )
    assert len({row[0] for row in all_ids(samples)}) > 4


def test_a_model_that_always_writes_the_same_is_refused() -> None:
    def generate(prompt: Tensor, length: int, generator: torch.Generator) -> Tensor:
        return torch.full((len(prompt), length), 5)

    with pytest.raises(UsageError, match="self: 1 different texts were written"):
        get("self", generate=generate)


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_own_text_of_a_model_that_writes_none_is_refused(model: str) -> None:
    with pytest.raises(UsageError, match="writes no text of its own; .*--dataset.*default"):
        get("self", model, generate=own_text)


def test_the_default_text_needs_nothing() -> None:
    found = get("default", num_samples=100)
    assert found.description["samples"] == 100
    assert "files" not in found.description
    every = documents.read_documents(documents.own_text())
    assert len(every) >= 250
    assert sum(map(len, every)) > 250_000
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("model", ["vit", "whisper", "clip"])
def test_models_that_do_not_read_text_ask_for_tensors(model: str) -> None:
    with pytest.raises(UsageError, match="does not read text alone; expected a .safetensors file"):
        get("default", model, words="none")
    with pytest.raises(UsageError, match="^speach: no file or folder has this name, and "):
        get("speach", model, words="none")


# --- tensors ------------------------------------------------------------------------------------


def test_images_come_from_a_safetensors_file(tmp_path: Path) -> None:
    pixels = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_file({"pixel_values": pixels}, tmp_path / "a.safetensors")
    found = get(tmp_path / "a.safetensors", "vit", words="none")
    every = torch.cat(
        [each["pixel_values"] for each in found.batches + found.heldout + found.report]
    )
    places = [int((pixels == row).flatten(1).all(1).nonzero()) for row in every]
    assert len(set(places)) == len(places) == 12 and places != sorted(places)
    assert (found.tokens, found.description["seq_len"]) == (0, None)
    pixels[places[0]] += 1
    save_file({"pixel_values": pixels}, tmp_path / "a.safetensors")
    assert get(tmp_path / "a.safetensors", "vit", words="none").digest != found.digest
    with torch.inference_mode():
        tiny_models.build("vit", torch.float32)(**found.batches[0])


def test_sound_comes_with_what_the_decoder_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    generator = torch.Generator().manual_seed(0)
    sound = {"input_features": torch.randn(12, 16, 64, generator=generator)}
    save_file(sound, path)
    with pytest.raises(UsageError, match="expected decoder_input_ids too"):
        get(path, "whisper", words="none")
    ids = torch.randint(3, 160, (12, 6), generator=generator)
    save_file({**sound, "decoder_input_ids": ids}, path)
    found = get(path, "whisper", words="none")
    assert found.tokens == 60
    with torch.inference_mode():
        tiny_models.build("whisper", torch.float32)(**found.batches[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_numbers_of_any_dtype_are_brought_to_that_of_the_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    pixels = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"pixel_values": pixels}, tmp_path / "a.safetensors")
    save_file({"pixel_values": pixels.float()}, tmp_path / "b.safetensors")
    found = get(tmp_path / "a.safetensors", "vit", words="none")
    for batch in found.batches + found.heldout + found.report:
        assert batch["pixel_values"].dtype == torch.float32
    with torch.inference_mode():
        tiny_models.build("vit", torch.float32)(**found.batches[0])
    # the same numbers are the same samples
    assert found.digest == get(tmp_path / "b.safetensors", "vit", words="none").digest


def test_integers_stay_as_they_are(tmp_path: Path) -> None:
    ids = torch.arange(160).view(20, 8) % 140 + 3
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    found = get(tmp_path / "a.safetensors", words="none")
    assert all(batch["input_ids"].dtype == torch.int64 for batch in found.batches)
    assert found.description["windows_begin_with"] == []


def test_rows_that_are_fewer_than_asked_for_are_all_accounted_for(tmp_path: Path) -> None:
    save_file({"input_ids": torch.arange(64).view(8, 8) + 3}, tmp_path / "a.safetensors")
    found = get(tmp_path / "a.safetensors", words="none", num_samples=8)
    assert found.description["notes"] == [
        "8 samples were asked for; the data make 6 to calibrate on, 1 to choose by and 1 to report "
        "on"
    ]


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({}, "no tensors; expected arguments of ViTForImageClassification.forward .pixel_values"),
        ({"pixels": torch.zeros(9, 3)}, "tensor 'pixels'; expected arguments"),
        ({"pixel_values": torch.eye(9) * torch.nan}, "row 0 of pixel_values has NaN"),
        ({"pixel_values": torch.eye(9).double() * 1e40}, "row 0 .* float32 does not hold"),
        ({"pixel_values": torch.zeros(9, 3)}, "1 different rows; expected at least 6"),
        ({"pixel_values": torch.tensor(1.0)}, "0 different rows"),
        (
            {"pixel_values": torch.eye(9), "labels": torch.zeros(8)},
            "8 rows in labels and 9 in pixel_values",
        ),
    ],
)
def test_tensors_that_cannot_be_used_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], what: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=what):
        get(tmp_path / "a.safetensors", "vit", words="none")


# --- the Hub ------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """A loopback Hub with the dataset user/name."""

    files: dict[str, bytes] = {}

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        prefix = f"/datasets/user/name/resolve/{COMMIT}/"
        if path.startswith("/api/datasets/user/name"):
            siblings = [{"rfilename": name} for name in self.files]
            raw = json.dumps({"id": "user/name", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(prefix) and path[len(prefix) :] in self.files:
            raw = self.files[path[len(prefix) :]]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(raw)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """What the loopback Hub has; tests put their files there."""
    _Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield _Hub.files
    server.shutdown()
    server.server_close()
    thread.join()


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": each}) + "\n" for each in documents).encode()


def test_a_hub_dataset_is_read_at_its_revision(
    hub: dict[str, bytes], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub["data/train-0.jsonl"] = jsonl(DOCUMENTS[:15])
    hub["data/train-1.jsonl"] = jsonl(DOCUMENTS[15:])
    hub["data/test-0.jsonl"] = jsonl(["w5 " * 500])
    hub["README.md"] = b"about"
    found = get("user/name")
    assert found.digest == get(file).digest
    assert found.description["dataset"] == f"user/name@{COMMIT}"
    assert sorted(found.description["files"]) == ["data/train-0.jsonl", "data/train-1.jsonl"]
    # what has been fetched is there without network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert get(f"user/name@{COMMIT}").digest == found.digest


def test_a_hub_dataset_of_several_folders_needs_the_name_of_one(
    hub: dict[str, bytes], file: Path
) -> None:
    hub["en/train.jsonl"] = jsonl(DOCUMENTS)
    hub["fr/train.jsonl"] = jsonl(["w5 " * 500])
    with pytest.raises(UsageError, match=r"text in 2 folders \(en, fr\); expected one"):
        get("user/name")
    assert get("user/name/en").digest == get(file).digest
    with pytest.raises(UsageError, match="0 files, none of them .txt"):
        get("user/name/de")


@pytest.mark.usefixtures("hub")
def test_a_dataset_that_the_hub_does_not_have_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="the Hub did not give it as a dataset") as caught:
        get("user/absent")
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_without_network_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="the Hub did not give it as a dataset") as caught:
        get("user/name")
    assert "\n" not in str(caught.value)


def test_samples_cannot_be_changed(file: Path) -> None:
    samples = get(file)
    with pytest.raises(dataclasses.FrozenInstanceError):
        samples.digest = ""  # type: ignore[misc]
