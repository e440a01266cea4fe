"""Journals that are a whole model, from their seed on: drawn, trained, replayed, published."""

import hashlib
import json
import math
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import reference_steps as theirs
import tiny_models
import torch
from test_train_run import source_of, text_of
from typer.testing import CliRunner

from ternarize.cli.app import app
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, OutputError, SelectionError, UsageError
from ternarize.measure.report import inspect
from ternarize.plans.recipe import Train
from ternarize.publish.hub import push
from ternarize.runtime.load import load
from ternarize.sources.packed import open_packed
from ternarize.steps.appender import Appender
from ternarize.steps.base import base_digest
from ternarize.steps.checkpoint import replay, replayed_rows
from ternarize.steps.generator import SCALES
from ternarize.steps.journal import JournalHeader, Step, journal_header, parse_journal, read_journal
from ternarize.steps.operations import compact, compact_size, fork, merge
from ternarize.steps.start import LONGEST_PART, model_bytes
from ternarize.train.drawn import drawn_header
from ternarize.train.journals import train_by_gradient, train_by_votes
from ternarize.train.votes import Votes


def folder_of(name: str, folder: Path) -> Path:
    """A configuration and a tokenizer, without weights."""
    source_of(name, folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder to draw a model of, and a text."""
    folder = tmp_path_factory.mktemp("drawn")
    return folder_of("llama_tied", folder / "config"), text_of(folder / "text.txt")


def training_of(text: Path, steps: int) -> Train:
    return Train(texts=(str(text),), objective="text", steps=steps, batch=256, train_len=16)


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    lines = result.stderr.strip().splitlines()
    assert result.exit_code in (1, 2) and len(lines) == 1, result.output
    return lines[0]


def test_a_model_trained_from_a_seed_is_what_its_journal_makes(
    given: tuple[Path, Path], tmp_path: Path
) -> None:
    config, text = given
    journal, seed = tmp_path / "a.steps", 0xFEDCBA9876543210
    start = drawn_header(config, seed, 32)
    how: dict[str, Any] = {"seed": seed, "start": start}
    votes = Votes("trits", 64, (4, 6), (0.5, 0.1))
    told = [train_by_votes(config, journal, training_of(text, 4), votes, **how)]
    for target, rate, size, steps in (("scales", 20.0, 1500, 6), ("trits", 0.1, 4000, 12)):
        more = how | {"target": target, "k": 512, "rate": rate}
        told.append(train_by_gradient(config, journal, training_of(text, steps), size, **more))
    for before, after in zip(told, told[1:], strict=False):
        assert after["loss_before"] == pytest.approx(before["loss"], abs=1e-6)
        assert after["written"] > 0 and after["loss"] < after["loss_before"]
    assert told[2]["compact_bytes"] == compact_size(read_journal(journal)) <= 4000

    # once replayed, it is the model that was measured, for who knows the journal and the tokenizer
    out = tmp_path / "replayed"
    assert replay(journal, config, out)["missing"] == []
    again = train_by_votes(
        out, tmp_path / "b.steps", training_of(text, 1), Votes("scales", 8, (2,))
    )
    assert again["loss_before"] == pytest.approx(told[2]["loss"], abs=1e-5)
    assert verify(out)["listed"] > 3 and inspect(out)["totals"]["int8_parameters"] == 0
    direct, model = load(config, steps=journal), load(out)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in direct.state_dict().items())

    # and for who has the specification alone
    read = theirs.read_journal(journal.read_bytes())
    state = theirs.replay(read)
    assert read.model is not None
    found = reference.decode(out)
    for name, trits, exponents, _ in state.parts():
        tensor = found.pop(name)
        assert isinstance(tensor, reference.Ternary) and (tensor.trits == trits).all()
        assert tensor.scales.astype("<f4").tobytes() == state.scales(name, exponents, trits)
    for name, shape, value in read.model.constants:
        kept = found.pop(name)
        assert isinstance(kept, reference.Kept) and kept.shape == shape
        assert kept.data == struct.pack("<f", value) * math.prod(shape)
    assert not found
    few, _ = replayed_rows(journal, config, read.tensors[-1][0], (1, 3))
    assert (few.numpy() == trits[1:3]).all()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3_text", "qwen3", "phi3"])
def test_products_keep_the_variance_of_their_inputs(name: str, tmp_path: Path) -> None:
    config = folder_of(name, tmp_path / "config")
    header = drawn_header(config, 5, 16)
    assert header.model is not None and header.zeros is not None
    assert {value for _, _, value in header.model.constants} <= {0, 1}
    (tmp_path / "a.steps").write_bytes(journal_header(header))
    replay(tmp_path / "a.steps", config, tmp_path / "out")
    model = load(tmp_path / "out", dequantize=True, dtype=torch.float32)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            energy = module.weight.detach().square().sum(-1).mean()
            assert 0.8 < float(energy) < 1.25, path
    ids = torch.randint(3, 140, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert 0.3 < float(logits.std()) < 2 and float(loss) < math.log(logits.shape[-1]) + 2


def test_what_is_neither_drawn_nor_said_is_refused_by_its_name(tmp_path: Path) -> None:
    for name, said in (
        ("mixtral", r"experts.*is no matrix of a linear layer or an embedding by itself"),
        ("gpt2", r"h\.0\.attn\.c_attn\.weight: .* of a Conv1D begins as neither zeros nor ones"),
    ):
        config = folder_of(name, tmp_path / name)
        with pytest.raises(SelectionError, match=said):
            drawn_header(config, 0, 32)
    config = folder_of("llama", tmp_path / "llama")
    (config / "train.txt").write_text("what is trained on")
    told = drawn_header(config, 0, 32).model
    assert told is not None and "train.txt" not in told.files
    before = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(before | {"rope_theta": float("inf")}))
    with pytest.raises(CheckpointError, match="not finite"):
        drawn_header(config, 0, 32)
    shutil.rmtree(config)
    tiny_models.save("llama", config)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        drawn_header(config, 0, 32)


def test_the_commands_of_a_model_from_its_seed(given: tuple[Path, Path], tmp_path: Path) -> None:
    config, text = given
    journal, out = tmp_path / "a.steps", tmp_path / "out"
    words = ["steps", "train", config, journal, "--from-scratch", "--texts", text, "--seed", 3]
    words += ["--batch", 256, "--train-len", 16, "-q"]
    by_votes = ["--by", "votes", "--target", "trits", "--perturbations", 64]
    said = run(*words, *by_votes, "--attempts", 2)
    assert " once compact; loss on held-out documents " in said
    run(*words, *by_votes, "--attempts", 4)
    assert "another seed or start" in refused(*words, *by_votes, "--group-size", 16)
    assert "--group-size: of a packed" in refused(*words[:4], *words[5:], "--group-size", 16)
    assert run("steps", "verify", journal).startswith("ok: ")
    assert "from its seed, a whole LlamaForCausalLM of " in run("steps", "log", journal)

    said = run("steps", "replay", journal, out)
    assert "without " in said and "tokenizer.json" in said and "with --base" in said
    assert load(out).config.architectures == ["LlamaForCausalLM"]
    shutil.rmtree(out)
    run("steps", "replay", journal, out, "--base", config)
    ours = run("generate", config, "--steps", journal, "--prompt", "w7", "-q")
    assert ours == run("generate", out, "--prompt", "w7", "-q") and len(ours) > 4

    assert run("steps", "edit", journal, "--mask", "0:4").startswith("mask: ")
    repair = ["--mask", 0, "--repair", 1, "--base", config, "--texts", text, "-q"]
    assert "held-out documents" in run("steps", "edit", journal, *repair)
    header = read_journal(journal).header
    for made in (
        fork(journal, tmp_path / "fork.steps", 3),
        merge(journal, tmp_path / "fork.steps", tmp_path / "both.steps"),
        compact(journal, tmp_path / "small.steps"),
    ):
        assert made.header == header == drawn_header(config, 3, 128)

    other = tmp_path / "other"
    shutil.copytree(config, other)
    (other / "tokenizer.json").write_text("{}")
    for command in (["replay", journal, tmp_path / "x"], ["verify", journal]):
        line = refused("steps", *command, "--base", other)
        assert "tokenizer.json: is another than the model was trained with" in line
    (other / "tokenizer.json").unlink()
    assert "is not there" in refused("steps", "verify", journal, "--base", other)
    with pytest.raises(OutputError, match="exists already"):
        replay(journal, config, out)


def test_cards_say_what_a_model_from_its_seed_needs(
    given: tuple[Path, Path], tmp_path: Path
) -> None:
    config, _ = given
    with Appender(tmp_path / "a.steps", drawn_header(config, 3, 32)) as appender:
        appender.append(Step(0, SCALES, 2, 5, 4, (0,), (1,)))
    card = push(tmp_path / "a.steps", "user/steps", dry_run=True)["card_text"]
    digest = hashlib.sha256((config / "tokenizer.json").read_bytes()).hexdigest()
    assert f"- `tokenizer.json`, SHA-256 {digest}" in card and "base_model" not in card
    assert "ternarize steps replay user/steps replayed --base FOLDER" in card
    named = push(tmp_path / "a.steps", "user/steps", base_model="user/words", dry_run=True)
    assert "replayed --base user/words" in named["card_text"]
    replay(tmp_path / "a.steps", config, tmp_path / "out")
    card = push(tmp_path / "out", "user/model", dry_run=True)["card_text"]
    assert "the seed 0000000000000003 gives" in card and "from a seed alone" in card
    # a journal that moves it on is told behind that
    packed, records = open_packed(tmp_path / "out")
    with Appender(tmp_path / "b.steps", JournalHeader(0, base=base_digest(records))) as appender:
        appender.append(Step(0, SCALES, 2, 5, 4, (1,), (1,)))
    replay(tmp_path / "b.steps", tmp_path / "out", tmp_path / "on")
    card = push(tmp_path / "on", "user/model", dry_run=True)["card_text"]
    assert "from a seed alone" in card
    assert card.index("the seed 0000000000000003 gives") < card.index("Then 1 steps of a journal")


def test_tensors_from_a_seed_have_no_base(given: tuple[Path, Path], tmp_path: Path) -> None:
    header = drawn_header(given[0], 3, 32)
    (tmp_path / "model.steps").write_bytes(journal_header(header))
    (tmp_path / "plain.steps").write_bytes(journal_header(replace(header, model=None)))
    replay(tmp_path / "model.steps", given[0], tmp_path / "out")
    with pytest.raises(UsageError, match="begins from a seed"):
        replay(tmp_path / "plain.steps", tmp_path / "out", tmp_path / "x")


def test_a_model_that_swells_is_refused(given: tuple[Path, Path]) -> None:
    header = drawn_header(given[0], 3, 32)
    assert header.model is not None
    plain = model_bytes(header.tensors, header.model)
    whole = journal_header(header)
    text = zlib.decompress(plain[4:-4]) + b" " * LONGEST_PART
    stream = zlib.compress(text)
    head = len(stream).to_bytes(4, "little") + stream
    data = whole.removesuffix(plain) + head + zlib.crc32(head).to_bytes(4, "little")
    with pytest.raises(reference.Invalid, match="model-not-json"):
        theirs.read_journal(data)
    with pytest.raises(Exception, match="its model cannot be read"):
        parse_journal(data)
