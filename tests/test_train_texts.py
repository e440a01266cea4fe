"""Texts to train on: how they stream, what is kept apart, and in which order samples come."""

import itertools
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import test_calibration_data
import torch
from test_calibration_data import COMMIT, TEMPLATE, jsonl, tokenizer
from test_calibration_data import hub as hub
from torch import Tensor

from ternarize.calibrate import apart
from ternarize.calibrate.apart import Divided, divide_text, open_training_part
from ternarize.calibrate.samples import Sample
from ternarize.calibrate.texts import Document
from ternarize.errors import UsageError
from ternarize.measure.documents import SEPARATOR, read_documents, stream_documents
from ternarize.train import texts
from ternarize.train.sources import _with_answers
from ternarize.train.texts import (
    IGNORED,
    ahead,
    batch_of,
    kept_apart,
    learnt_in,
    mixed,
    read_mixture,
    repeated,
    tokens_in,
    training_samples,
)

# --- a file of text ------------------------------------------------------------------------------


def at_once(path: Path) -> list[str]:
    """The documents of a file by their definition, from all of its text."""
    documents: list[list[str]] = [[]]
    for line in path.read_text("utf-8").split("\n"):
        if line == SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    return [joined for lines in documents if (joined := "\n".join(lines)).strip()]


@pytest.mark.parametrize("seed", range(40))
def test_documents_that_stream_are_those_of_the_whole_text(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    parts = ["a", "b c", "", "\n", "\n\n", f"\n{SEPARATOR}\n", SEPARATOR, "é", " ", "\r\n", "\r"]
    path = tmp_path / "a.txt"
    path.write_bytes("".join(rng.choice(parts) for _ in range(rng.randrange(30))).encode())
    assert read_documents(path) == at_once(path)
    pieces = list(stream_documents(path, 3))
    joined: list[str] = []
    for piece, begins in pieces:
        joined += [""] if begins else []
        joined[-1] += piece
    for found, wanted in zip(joined, at_once(path), strict=True):
        assert found.split() == wanted.split()  # blank pieces in between are left out
    assert all(len(piece) < 24 for piece, _ in pieces)


def test_a_long_document_is_cut_at_a_blank_line_that_comes_in_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("12345\n67890\n\nabcde\nfghij\nklmno\npqrst\n\nuvw")
    pieces = list(stream_documents(path, 10))
    assert pieces == [
        ("12345\n67890\n\n", True),
        ("abcde\nfghij\nklmno\npqrst\n", False),
        ("\nuvw", False),
    ]


def test_a_file_needs_no_more_memory_than_a_piece_of_it(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for _ in range(64):
            file.write("words and words\n" * 8192)  # one document of 8 MB
        file.write("x" * (1 << 22))  # and a line of 4 MB
    tracemalloc.start()
    total = sum(len(text) for text, _ in stream_documents(path, 1 << 16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 12 << 20 and peak < 1 << 20


def test_a_byte_that_is_no_text_is_named_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"word\n" * 5000 + b"\xff")
    with pytest.raises(UsageError, match="byte 25000 is not UTF-8"):
        read_documents(path)


# --- what is kept apart --------------------------------------------------------------------------


def documents(count: int, words: int = 60) -> list[str]:
    """Documents of words that no other has."""
    return [" ".join(f"w{index}x{at}" for at in range(words)) for index in range(count)]


def write(path: Path, every: list[str]) -> Path:
    path.write_text(f"\n{SEPARATOR}\n".join(every))
    return path


def divided(path: Path | str, **more: Any) -> Divided:
    return divide_text(str(path), more.get("column"), 0, more.get("words"))


def parts(text: Divided) -> dict[str, list[Document]]:
    return {which: list(text.part(which)) for which in ("train", "held", "report")}


def test_every_document_is_in_one_part(tmp_path: Path) -> None:
    every = documents(1000)
    found = parts(divided(write(tmp_path / "a.txt", every)))
    there = {which: {each.text for each in own} for which, own in found.items()}
    assert set().union(*there.values()) == set(every)
    assert sum(map(len, there.values())) == len(every)
    for which in ("held", "report"):
        assert 30 < len(there[which]) < 110  # about 1000 / 16


def test_equal_documents_are_in_one_part_whatever_stands_around_them(tmp_path: Path) -> None:
    every = documents(600)
    first = parts(divided(write(tmp_path / "a.txt", every)))
    again = parts(divided(write(tmp_path / "b.txt", [*reversed(every), *every[:300]])))
    for which in first:
        assert {each.text for each in first[which]} == {each.text for each in again[which]}


def test_a_text_of_few_documents_is_cut_into_sections(tmp_path: Path) -> None:
    every = ["\n\n".join(documents(40, 40)), "\n\n".join(documents(60, 30)[40:])]
    found = parts(divided(write(tmp_path / "a.txt", every)))
    assert all(found.values())
    assert max(len(each.text) for own in found.values() for each in own) <= 400
    whole = sorted(word for own in found.values() for each in own for word in each.text.split())
    assert whole == sorted(" ".join(every).split())
    assert sum(each.begin for own in found.values() for each in own) == 2


def test_a_large_text_streams_by_in_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "SMALL", 10_000)
    monkeypatch.setattr(apart, "LONGEST", 300)
    every = documents(400, 90)
    text = divided(write(tmp_path / "a.txt", every))
    assert text.one_in == apart.ONE_IN[False]
    passes = [list(text.one_pass()) for _ in range(2)]
    assert passes[0] == passes[1]
    assert max(len(each.text) for each in passes[0]) <= 300
    assert [word for each in passes[0] for word in each.text.split()] == " ".join(every).split()
    assert sum(each.begin for each in passes[0]) == len(every)
    held = list(text.part("held"))
    assert 0 < len(held) < len(passes[0]) / 16


def test_a_calibration_before_a_training_reads_what_trains_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", documents(700))
    found = list(open_training_part(str(path), None, 0, None, 1000).stream)
    assert found == list(divided(path).part("train"))


def test_a_text_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no text"):
        divided(write(tmp_path / "a.txt", ["", "  "]))


def test_chats_stay_whole(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE
    long = "w7 " * 1000
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"w{at}"},
                {"role": "assistant", "content": long},
            ]
        }
        for at in range(10, 40)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in chats))
    found = [each for own in parts(divided(path, words=words)).values() for each in own]
    assert len(found) == 30
    for each in found:
        assert each.answers is not None
        ((start, stop),) = each.answers
        assert each.text[start:stop].split() == ["<s>", "assistant", *long.split(), "</s>"]


def test_a_data_set_of_the_hub_is_read_at_the_revision_that_was_found_first(
    hub: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = documents(300)
    hub["train-0.jsonl"], hub["train-1.jsonl"] = jsonl(every[:150]), jsonl(every[150:])
    monkeypatch.setattr(apart, "SMALL", 1000)
    text = divided("user/name")
    assert text.name == f"user/name@{COMMIT}"
    asked: list[str] = []
    answer = test_calibration_data._Hub._answer

    def listening(self: Any, body: bool) -> None:
        asked.append(self.path)
        answer(self, body)

    monkeypatch.setattr(test_calibration_data._Hub, "_answer", listening)
    assert {each.text for each in text.one_pass()} == set(every)
    questions = [path for path in asked if path.startswith("/api/")]
    assert questions and all(COMMIT in path for path in questions)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert {each.text for each in text.one_pass()} == set(every)


# --- samples -------------------------------------------------------------------------------------


def cut(every: list[Document]) -> list[str]:
    """A word is a piece."""
    return [word for each in every for word in each.text.split()]


def finish(word: str) -> Sample:
    index, _, at = word[1:].partition("x")
    return {"input_ids": torch.tensor([int(index), int(at)])}


def names(samples: Iterator[Sample], count: int) -> list[tuple[int, ...]]:
    return [tuple(each["input_ids"].tolist()) for each in itertools.islice(samples, count)]


@pytest.fixture
def text(tmp_path: Path) -> Divided:
    return divided(write(tmp_path / "a.txt", documents(400, 5)))


def test_samples_come_in_an_order_of_the_seed_and_each_pass_has_another(text: Divided) -> None:
    size = sum(len(cut([each])) for each in text.part("train"))
    found = names(training_samples(text, cut, finish, 7), 2 * size)  # type: ignore[arg-type]
    first, second = found[:size], found[size:]
    assert sorted(first) == sorted(second) and first != second
    assert first != sorted(first)
    again = names(training_samples(text, cut, finish, 7), 2 * size)  # type: ignore[arg-type]
    assert again == found
    other = names(training_samples(text, cut, finish, 8), size)  # type: ignore[arg-type]
    assert other != first and sorted(other) == sorted(first)


def test_no_sample_that_trains_is_of_a_document_that_is_kept_apart(text: Divided) -> None:
    train = {index for index, _ in names(training_samples(text, cut, finish, 0), 3000)}  # type: ignore[arg-type]
    held, report = (
        {int(each["input_ids"][0]) for each in kept_apart(text, part, cut, finish, 50, 2)}  # type: ignore[arg-type]
        for part in ("held", "report")
    )
    assert train and held and report
    assert not train & held and not train & report and not held & report


def test_a_stretch_is_shuffled_at_a_time(text: Divided, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "STRETCH", 200)
    found = [index for index, _ in names(training_samples(text, cut, finish, 0), 300)]  # type: ignore[arg-type]
    assert max(abs(one - other) for one, other in itertools.pairwise(found)) < 40
    assert found != sorted(found)


@pytest.mark.parametrize("part", ["held", "report"])
def test_what_is_kept_apart_is_asked_for_in_one_line_where_there_is_none(
    part: str, tmp_path: Path
) -> None:
    one_in = 1 if part == "report" else 2**40  # all choose, or none does
    text = Divided("a.txt", [], [], one_in, lambda: iter([Document("w1x1")]))
    with pytest.raises(UsageError, match="makes no sample of documents that are kept apart") as it:
        kept_apart(text, part, cut, finish, 1, 2)  # type: ignore[arg-type]
    assert "\n" not in str(it.value) and "--train-len" in str(it.value)


def test_a_text_that_makes_no_sample_to_train_on_is_refused(text: Divided) -> None:
    with pytest.raises(UsageError, match="makes no sample to train on"):
        next(training_samples(text, lambda _: [], finish, 0))


def test_samples_as_they_are_come_in_another_order_each_time() -> None:
    every = [{"input_ids": torch.tensor([index, 0])} for index in range(20)]
    found = names(repeated(every, 3), 40)
    assert sorted(found[:20]) == sorted(found[20:]) and found[:20] != found[20:]


def test_samples_made_ahead_come_in_order_and_so_does_what_breaks_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def samples() -> Iterator[Sample]:
        for index in range(5):
            yield {"input_ids": torch.tensor([index, 0])}
        raise UsageError("text.txt", "is gone")

    monkeypatch.setattr(texts, "AHEAD", 2)
    with ahead(samples()) as found:
        assert [int(next(found)["input_ids"][0]) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(UsageError, match="is gone"):
            next(found)


def test_no_sample_is_made_any_longer_once_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "AHEAD", 1)
    with ahead(repeated([{"input_ids": torch.tensor([1, 0])}], 0)) as found:
        next(found)
    assert "samples" not in [thread.name for thread in threading.enumerate()]


# --- mixtures ------------------------------------------------------------------------------------


def test_a_mixture_is_read(tmp_path: Path) -> None:
    odd = tmp_path / "a=2.txt"
    odd.write_text("")
    (tmp_path / "b=3").write_text("")
    given = ["a.txt", "b.txt=0.25", "user/name=2", str(odd), str(tmp_path / "b=3")]
    found = [(each.name, each.weight) for each in read_mixture(given)]
    assert found == [
        ("a.txt", 1),
        ("b.txt", 0.25),
        ("user/name", 2),
        (str(odd), 1),
        (str(tmp_path / "b=3"), 1),
    ]


@pytest.mark.parametrize("given", ["a.txt=0", "a.txt=-1", "a.txt=inf", "a.txt=nan"])
def test_a_weight_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="expected a number above 0"):
        read_mixture([given])


def test_texts_are_mixed_by_their_weights() -> None:
    streams = [(itertools.repeat({"input_ids": torch.tensor([at])}), at) for at in (1, 2, 5)]
    found = [each[0] for each in names(mixed(streams, 0), 8000)]
    for at in (1, 2, 5):
        assert found.count(at) == pytest.approx(1000 * at, rel=0.1)
    streams = [(itertools.repeat({"input_ids": torch.tensor([at])}), at) for at in (1, 2, 5)]
    assert [each[0] for each in names(mixed(streams, 0), 8000)] == found


# --- chats and batches ---------------------------------------------------------------------------


def test_of_a_chat_the_answers_alone_are_learnt() -> None:
    words = tokenizer()
    text = "<s> user </s> <s> assistant w20 w21 </s> <s> user w11 </s> <s> assistant w22 </s>"
    answers = [(text.index("w20"), text.index(" <s> user w11")), (text.index("w22"), len(text))]
    cut, finish = _with_answers(words, 8)
    (first, second) = map(finish, cut([Document(text, False, tuple(answers))]))
    learnt = [each["labels"].tolist() for each in (first, second)]
    assert [token for row in learnt for token in row if token != IGNORED] == [20, 21, 2, 22, 2]
    for each in (first, second):
        own = each["labels"] != IGNORED
        assert torch.equal(each["labels"][own], each["input_ids"][own])
    assert [learnt_in(each) for each in (first, second)] == [3, 2]


def test_plain_text_is_learnt_whole_behind_its_beginning() -> None:
    words = tokenizer(framed=True, around="<s> $A")
    cut, finish = _with_answers(words, 6)
    (only,) = map(finish, cut([Document("w10 w11 w12 w13 w14")]))
    assert only["input_ids"].tolist() == [1, 10, 11, 12, 13, 14]
    assert only["labels"].tolist() == [IGNORED, 10, 11, 12, 13, 14]


def test_a_chat_without_answers_that_can_be_told_is_refused() -> None:
    cut, _ = _with_answers(tokenizer(), 6)
    with pytest.raises(UsageError, match="no answer can be told apart in it"):
        cut([Document("<s> user w10 </s>", False, ())])


def test_samples_of_different_lengths_are_filled_up_and_masked() -> None:
    one: dict[str, Tensor] = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])}
    two = {name: torch.tensor([7, 8, 9]) for name in one}
    batch = batch_of([one, two], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["labels"].tolist() == [[5, 6, IGNORED], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert "attention_mask" not in batch_of([one, one], 0)


def test_samples_count_for_their_tokens_and_for_what_is_no_text() -> None:
    image = {"pixel_values": torch.zeros(3, 8, 8)}
    assert tokens_in(image) == texts.OTHER_TOKENS
    assert batch_of([image, image], 0)["pixel_values"].shape == (2, 3, 8, 8)
    both = {"input_ids": torch.zeros(5), "decoder_input_ids": torch.zeros(3)}
    assert tokens_in(both) == 8
    heard = {"input_features": torch.zeros(4, 9), "decoder_input_ids": torch.zeros(3)}
    assert tokens_in(heard) == 3 + texts.OTHER_TOKENS
