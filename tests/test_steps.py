"""Journals used: replayed on their base, loaded, edited, joined, and the commands that do it.

What a replay gives is compared with formats/reference_steps.py, which shares no code with it.
"""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import reference_steps as theirs
import tiny_models
import torch
from filelock import FileLock
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import ternarize
from ternarize.cli.app import app
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import DigestError, FormatError, OutputError, UsageError
from ternarize.files.headers import DTYPES, read_header
from ternarize.files.names import RECORD
from ternarize.files.outputs import fresh_output
from ternarize.files.sums import SUMS, listed, sha256
from ternarize.measure.report import inspect
from ternarize.plans.recipe import Recipe
from ternarize.publish.card import make_card
from ternarize.sources.packed import open_packed
from ternarize.steps import appender as appender_module
from ternarize.steps import checkpoint as checkpoint_module
from ternarize.steps.appender import Appender
from ternarize.steps.base import base_digest, opened_state, parts_of_base, replayed
from ternarize.steps.checkpoint import replay, replayed_rows, write_rows
from ternarize.steps.coding import set_width
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import (
    MAGIC,
    NO_STEP,
    Edit,
    Journal,
    JournalEntry,
    JournalHeader,
    Mark,
    Note,
    Step,
    bits_in_block,
    read_journal,
)
from ternarize.steps.operations import (
    BLOCK_BYTES,
    bits_left,
    check_digests,
    compact,
    compact_size,
    difference,
    edit,
    fork,
    merge,
)
from ternarize.steps.replay import Values
from ternarize.steps.start import LONGEST_PART

GOLDEN = Path(reference.__file__).parent / "golden"
# dense, of experts, transposed, rotated, with scales of all types, in shards
OF_GOLDEN = "groups rows tensor experts stacked-experts transposed rotation scale-types".split()
MADE = {
    "planes": ("llama", Recipe("itf", 32, scale_bits=8, planes=("*down_proj*", "*.v_proj*"))),
    "tied": ("llama_tied", Recipe("twn", 64)),
}
BASES = [*OF_GOLDEN, *MADE]
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
TENSORS = (("a", (24, 40), -1), ("b", (2, 8, 33), 16), ("c", (16, 20), 0))
SEED = JournalHeader(0x1234, 1 << 30, TENSORS)
WALK = [
    Step(0, TRITS, 3, 1, 40, (2, 7, 39), (1, -1, 1)),
    Step(1, SCALES, 1, 3, 20, (0, 1, 5), (1, 1, -1)),
    Step(3, TRITS, 4, 1, 9, (4,), (-1,)),
    Step(4, SCALES, 2, 7, 9, (0, 8), (-1, 1)),
    Step(7, TRITS, 2, 1, 300, (0, 150, 299), (1, 1, 1)),
]


def written(path: Path, header: JournalHeader, *entries: JournalEntry) -> Path:
    with Appender(path, header) as appender:
        for entry in entries:
            appender.append(entry)
    return path


def of_base(path: Path, base: Path, *entries: JournalEntry) -> Path:
    return written(path, JournalHeader(99, base=base_digest(open_packed(base)[1])), *entries)


def state_of(journal: Journal, upto: int | None = None) -> Values:
    state = opened_state(journal.header, None, {})
    state.apply(journal.effective(upto))
    return state


def digest_of(path: Path, upto: int | None = None) -> str:
    return state_of(read_journal(path), upto).digest()


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed checkpoints by name."""
    found = {name: GOLDEN / name for name in OF_GOLDEN}
    for name, (model, recipe) in MADE.items():
        folder = tmp_path_factory.mktemp(name)
        tiny_models.save(model, folder / "source", max_shard_size="100KB")
        convert(folder / "source", folder / "packed", recipe)
        found[name] = folder / "packed"
    return found


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    """A journal from its seed, with notes and a digest in the middle and at the end."""
    path = tmp_path / "walk.steps"
    middle = state_of(Journal("", SEED, tuple(WALK[:3]))).digest()
    last = state_of(Journal("", SEED, tuple(WALK))).digest()
    notes = [Note({"attempt": step.number, "loss": 1.5}) for step in WALK]
    entries = [each for pair in zip(WALK, notes, strict=True) for each in pair]
    return written(path, SEED, *entries[:6], Mark(4, middle), *entries[6:], Mark(9, last))


# --- replayed on a base -------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_a_replay_is_a_checkpoint_as_the_specification_has_it(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, out = bases[name], tmp_path / "out"
    path = of_base(tmp_path / "my.steps", base, *WALK, Edit("negate", 4, 4))
    about = replay(path, base, out)
    assert (about["steps"], about["perturbations"]) == (5, 12)
    journal = {"sha256": sha256(path), "upto": None}
    assert json.loads((out / RECORD).read_text())["steps"] == {**about, "journal": journal}
    assert verify(out)["listed"] == len(listed(out))

    expected = theirs.replay(theirs.read_journal(path.read_bytes()), theirs.read_base(base))
    moved, before, after = list(expected.parts()), files_of(base), reference.decode(out)
    assert expected.base is not None and moved
    for tensor, trits, exponents, _ in moved:
        found = after[tensor]
        assert isinstance(found, reference.Ternary)
        assert (found.trits == trits).all(), tensor
        stored = load_tensor(out, f"{tensor}_scale")
        scales = expected.scales(tensor, exponents, trits)
        assert stored.view(torch.uint8).numpy().tobytes() == scales, tensor
    assert any((t != expected.base.tensors[n].trits).any() for n, t, _, _ in moved)
    # all else is as it was
    ours = {each for n, *_ in moved for each in (n, f"{n}_scale")}
    for tensor in open_packed(base)[0].tensors.keys() - ours:
        was, now = (load_tensor(folder, tensor) for folder in (base, out))
        assert torch.equal(was.view(torch.uint8), now.view(torch.uint8)), tensor
    assert files_of(base) == before
    assert files_of(out).keys() == before.keys()


def test_what_is_told_of_a_replay_is_true_of_its_own_trits(packed: Path, tmp_path: Path) -> None:
    path, out = of_base(tmp_path / "my.steps", packed, *WALK[:3]), tmp_path / "out"
    replay(path, packed, out, upto=3)
    before, after = inspect(packed), inspect(out)
    assert after["totals"]["sparsity"] != before["totals"]["sparsity"]
    tensors, rows = reference.decode(out), [r for r in after["tensors"] if r["kind"] == "ternary"]
    for row in rows:
        assert (row["method"], row["relative_error"]) == ("steps", None)
        tensor = tensors[row["name"]]
        assert isinstance(tensor, reference.Ternary)
        assert abs(row["sparsity"] - (tensor.trits == 0).mean()) < 1e-6
    with pytest.raises(FormatError, match="moved by the steps of a journal; .* Verify its base"):
        verify(out, EXAMPLE)
    said = make_card(out, "user/tiny")
    assert f"Then 2 steps, those below 3, of a journal with SHA-256 {sha256(path)}" in said
    assert "--source" not in said and "squared error" not in said
    assert "verify user/tiny --source" in make_card(packed, "user/tiny")
    # and once more
    second = of_base(tmp_path / "second.steps", out, WALK[3])
    replay(second, out, tmp_path / "again")
    said = make_card(tmp_path / "again", "user/tiny")
    assert said.index(sha256(path)) < said.index(
        f"Then 1 steps of a journal with SHA-256 {sha256(second)}"
    )


def test_what_no_step_has_moved_keeps_its_figures(tmp_path: Path) -> None:
    base = GOLDEN / "groups"
    replay(of_base(tmp_path / "my.steps", base), base, tmp_path / "out")
    records = [json.loads((each / RECORD).read_text()) for each in (base, tmp_path / "out")]
    assert records[0] == records[1]


def test_what_comes_in_the_place_of_a_replay_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = GOLDEN / "rows", tmp_path / "out"
    path = of_base(tmp_path / "my.steps", base, *WALK)

    def late(*given: Any) -> Any:
        out.mkdir()
        return replayed(*given)

    monkeypatch.setattr(checkpoint_module, "replayed", late)
    with pytest.raises(OutputError, match="out: exists already"):
        replay(path, base, out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["my.steps", "out"]
    with pytest.raises(OutputError, match="inside the model"):
        replay(path, base, base / "out")


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flock(*_: Any, **__: Any) -> None:
        raise NotImplementedError("flock")

    base = GOLDEN / "rows"
    path = of_base(tmp_path / "my.steps", base, *WALK)
    monkeypatch.setattr("filelock.FileLock.acquire", no_flock)
    with pytest.raises(OutputError, match="out.partial: is on a file system that has no locks"):
        replay(path, base, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["my.steps"]


def test_what_a_killed_replay_has_left_goes_away_and_nothing_else(tmp_path: Path) -> None:
    base, out = GOLDEN / "rows", tmp_path / "out"
    path, partial = of_base(tmp_path / "my.steps", base, *WALK), tmp_path / "out.partial"
    with fresh_output(base, out, folder=True) as place:
        (place / "model.safetensors").write_bytes(b"half")
        with pytest.raises(OutputError, match="out.partial: another process is writing here"):
            replay(path, base, out)
        shutil.copytree(partial, tmp_path / "killed")
    shutil.rmtree(out)
    (tmp_path / "killed").rename(partial)
    (partial / "mine").touch()
    with pytest.raises(OutputError, match=r"no unfinished result .mine.; .* Move it away"):
        replay(path, base, out)
    assert (partial / "whole" / "model.safetensors").read_bytes() == b"half"
    (partial / "mine").unlink()
    replay(path, base, out)
    assert verify(out)["listed"] and not partial.exists()
    shutil.rmtree(out)
    (partial / "whole").mkdir(parents=True)  # without the lock, which comes first
    with pytest.raises(OutputError, match="no unfinished result .whole."):
        replay(path, base, out)


def load_tensor(folder: Path, name: str) -> torch.Tensor:
    packed, _ = open_packed(folder)
    return packed.read(name)


@pytest.mark.parametrize("name", BASES)
def test_rows_are_those_of_the_whole(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[name]
    path = of_base(tmp_path / "my.steps", base, *WALK)
    for part in parts_of_base(open_packed(base)[1])[::3]:
        trits, scales = replayed_rows(path, base, part.name)
        replayed = theirs.replay(theirs.read_journal(path.read_bytes()), theirs.read_base(base))
        whole = next(t for n, t, _, _ in replayed.parts() if n == part.name)
        assert trits.numpy().tobytes() == whole.tobytes()
        count = len(trits)
        for first, stop in ((0, 1), (count // 2, count), (count - 1, count)):
            few = replayed_rows(path, base, part.name, (first, stop))
            assert torch.equal(few[0], trits[first:stop])
            assert torch.equal(few[1], scales[first:stop])


def test_a_replay_without_steps_is_the_base(tmp_path: Path) -> None:
    base = GOLDEN / "groups"
    path = of_base(tmp_path / "my.steps", base, *WALK)
    assert replay(path, base, tmp_path / "out", upto=0)["steps"] == 0
    for name, data in files_of(base).items():
        if name not in (RECORD, SUMS):
            assert (tmp_path / "out" / name).read_bytes() == data, name
    replay(path, base, tmp_path / "three", upto=3)
    shorter = of_base(tmp_path / "shorter.steps", base, *WALK[:2])
    replay(shorter, base, tmp_path / "shorter")
    for file in open_packed(base)[0].files:
        assert (tmp_path / "three" / file).read_bytes() == (
            tmp_path / "shorter" / file
        ).read_bytes()


def test_folders_of_a_base_come_along_whatever_is_in_them(tmp_path: Path) -> None:
    base = Path(shutil.copytree(GOLDEN / "rows", tmp_path / "base"))
    (base / "2_Dense").mkdir()
    for name in ("model.safetensors", "config.json"):
        (base / "2_Dense" / name).write_bytes(b"of a module")
    (base / SUMS).unlink()
    replay(of_base(tmp_path / "my.steps", base, WALK[0]), base, tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == files_of(base).keys()
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes() == b"of a module"


def test_another_base_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    base, other = GOLDEN / "groups", GOLDEN / "rows"
    path, out = of_base(tmp_path / "my.steps", base, *WALK), tmp_path / "out"
    one_line = r"my.steps: begins from the base [0-9a-f]{12}\.\.\., and this one is [0-9a-f]{12}"
    for use in (
        lambda: replay(path, other, out),
        lambda: replayed_rows(path, other, "any"),
        lambda: ternarize.load(other, steps=path),
        lambda: check_digests(read_journal(path), *open_packed(other)),
    ):
        with pytest.raises(UsageError, match=one_line):
            use()
    with pytest.raises(UsageError, match="begins from a packed checkpoint; .* with --base"):
        replay(path, None, out)
    with pytest.raises(UsageError, match="begins from a seed, and not from a packed checkpoint"):
        replay(written(tmp_path / "seed.steps", SEED), base, out)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))
    out.mkdir()
    with pytest.raises(OutputError, match="out: exists already"):
        replay(path, base, out)


def test_a_damaged_base_is_refused(tmp_path: Path) -> None:
    base = Path(shutil.copytree(GOLDEN / "rows", tmp_path / "base"))
    path = of_base(tmp_path / "my.steps", base, *WALK)
    packed, records = open_packed(base)
    part = parts_of_base(records)[0]
    info = packed.tensors[f"{part.name}_scale"]
    data = bytearray((base / info.file).read_bytes())
    data[info.start] ^= 1
    (base / info.file).write_bytes(data)
    for use in (
        lambda: replay(path, base, tmp_path / "out"),
        lambda: replayed_rows(path, base, part.name, (0, 1)),
        lambda: check_digests(read_journal(path), *open_packed(base)),
    ):
        with pytest.raises(DigestError, match=re.escape(part.name)):
            use()
    assert not (tmp_path / "out").exists()


def test_a_model_loaded_with_steps_is_that_of_the_replay(tmp_path: Path) -> None:
    base = GOLDEN / "groups"
    path = of_base(tmp_path / "my.steps", base, *WALK)
    replay(path, base, tmp_path / "out")
    tokens = torch.arange(1, 9)[None]
    loaded = [
        ternarize.load(base, steps=path, dtype=torch.float32),
        ternarize.load(tmp_path / "out", dtype=torch.float32),
        ternarize.load(base, steps=path, dtype=torch.float32, dequantize=True),
        ternarize.load(base, dtype=torch.float32),
    ]
    with torch.no_grad():
        ours, replayed, dense, before = (model(tokens).logits for model in loaded)
    assert torch.equal(ours, replayed) and not torch.equal(ours, before)
    assert torch.allclose(ours, dense, atol=1e-4)


# --- from a seed --------------------------------------------------------------------------------


def test_a_start_from_a_seed_is_written_in_the_container_format(walk: Path, tmp_path: Path) -> None:
    replay(walk, None, tmp_path / "w.safetensors")
    expected = theirs.replay(theirs.read_journal(walk.read_bytes()))
    found = reference.decode(tmp_path / "w.safetensors")
    header = read_header(tmp_path / "w.safetensors")
    for entry in header.entries.values():
        assert (header.data_start + entry.start) % DTYPES[entry.dtype].itemsize == 0
    assert found.keys() == {name for name, _, _ in TENSORS}
    for name, trits, exponents, size in expected.parts():
        tensor = found[name]
        assert isinstance(tensor, reference.Ternary)
        assert (tensor.trits == trits).all() and tensor.group_size == size
        used = tensor.scales != 0
        assert (tensor.scales == theirs.factors(exponents))[used].all()
        few = replayed_rows(walk, None, name, (3, 9))
        assert few[0].numpy().tobytes() == trits.reshape(-1, trits.shape[-1])[3:9].tobytes()
    write_rows(walk, None, "b", (7, 9), tmp_path / "rows.safetensors", upto=4)
    rows = load_file(tmp_path / "rows.safetensors")
    assert rows["b"].shape == (2, 33) and rows["b_scale"].shape == (2, 3)
    with pytest.raises(OutputError, match="w.safetensors: exists already"):
        replay(walk, None, tmp_path / "w.safetensors")


# --- edits, forks, merges, blocks ---------------------------------------------------------------


def test_masking_the_last_steps_is_the_model_before_them(walk: Path) -> None:
    before = digest_of(walk, 4)
    assert edit(walk, Edit("mask", 4, 8)) == [[4, 7]]
    assert digest_of(walk) == before
    assert edit(walk, Edit("restore", 7, 7)) == [[7]] and digest_of(walk) != before
    assert check_digests(read_journal(walk), None, {}) == 2  # as it was, in front of the edits


def test_a_step_turned_round_goes_the_other_way(walk: Path) -> None:
    edit(walk, Edit("negate", 1, 1))
    turned = state_of(read_journal(walk), 3).exponents["a"]
    edit(walk, Edit("restore", 0, 9))
    straight = state_of(read_journal(walk), 3).exponents["a"]
    assert torch.equal(turned, -straight) and bool(straight.any())


def test_of_several_edits_all_are_appended_or_none(walk: Path) -> None:
    before = walk.read_bytes()
    with pytest.raises(UsageError, match="has no step from 8 to 9"):
        edit(walk, Edit("mask", 1, 1), Edit("negate", 8, 9))
    assert walk.read_bytes() == before
    assert edit(walk, Edit("mask", 1, 1), Edit("negate", 4, 8)) == [[1], [4, 7]]


def test_the_latest_of_edits_that_overlap_counts(walk: Path) -> None:
    journal, rng = read_journal(walk), random.Random(0)
    for _ in range(200):
        edits = []
        for _ in range(rng.randrange(6)):
            first, last = sorted(rng.choices(range(10), k=2))
            edits.append(Edit(rng.choice(("mask", "negate", "restore")), first, last))
        found = replace(journal, entries=(*edits, *journal.steps))
        for step, operation in zip(found.steps, found.edited, strict=True):
            latest = [e.operation for e in edits if e.first <= step.number <= e.last][-1:]
            assert [operation or "restore"] == (latest or ["restore"])


def test_a_journal_that_is_full_is_not_written_on(
    walk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appender_module, "MOST_STEPS", len(WALK) + 1)
    with Appender(walk, SEED) as appender:
        appender.append(Step(20, TRITS, 3, 1, 9, (1,), (1,)))
        before = walk.read_bytes()
        with pytest.raises(OutputError, match="has .* steps; expected fewer"):
            appender.append(Step(21, TRITS, 3, 1, 9, (1,), (1,)))
    assert walk.read_bytes() == before


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_name_that_is_none_of_a_file_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match="exists already; expected a new name"):
        Appender(name, SEED)


def test_a_lock_that_cannot_be_taken_is_left_to_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    lock = tmp_path / "my.steps.lock"
    lock.touch()
    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(OutputError, match="my.steps: cannot be made .Permission denied"):
        Appender(tmp_path / "my.steps", SEED)
    assert lock.exists()


def test_an_edit_concerns_no_step_that_comes_later(walk: Path) -> None:
    edit(walk, Edit("mask", 5, 1000))
    later = Step(20, TRITS, 3, 1, 9, (1,), (1,))
    with Appender(walk, SEED) as appender:
        appender.append(later)
    assert [step.number for step in read_journal(walk).effective()] == [0, 1, 3, 4, 20]
    with pytest.raises(UsageError, match="has no step from 8 to 19, but steps from 0 to 20"):
        edit(walk, Edit("mask", 8, 19))
    with pytest.raises(UsageError, match="'drop'; expected one of mask, negate, restore"):
        edit(walk, Edit("drop", 0, 1))


def test_a_fork_is_the_first_steps_and_goes_on_by_itself(walk: Path, tmp_path: Path) -> None:
    with Appender(walk, SEED) as appender:  # as a writer may
        appender.append(Edit("mask", 3, 1 << 20))
    new = fork(walk, tmp_path / "new.steps", 4)
    assert [step.number for step in new.steps] == [0, 1, 3] and new.size < walk.stat().st_size
    assert digest_of(tmp_path / "new.steps") == digest_of(walk, 4)
    assert not any(isinstance(each, Note) for each in new.entries)
    with Appender(tmp_path / "new.steps", SEED) as appender:
        appender.append(WALK[4])
    assert 7 in [step.number for step in read_journal(tmp_path / "new.steps").effective()]
    assert check_digests(read_journal(tmp_path / "new.steps"), None, {}) == 1
    with pytest.raises(OutputError, match="new.steps: exists already"):
        fork(walk, tmp_path / "new.steps")


def test_a_compact_journal_says_the_same_in_fewer_bytes(walk: Path, tmp_path: Path) -> None:
    edit(walk, Edit("mask", 1, 1))
    small = compact(walk, tmp_path / "small.steps")
    journal = read_journal(walk)
    assert small.steps == journal.steps and small.effective() == journal.effective()
    assert small.size < journal.size * 2 / 3
    assert check_digests(small, None, {}) == 1
    assert compact(tmp_path / "small.steps", tmp_path / "again.steps").size == small.size


def test_bits_that_are_left_are_those_of_a_compact_journal(tmp_path: Path) -> None:
    """With steps of another seed, which stand alone, between others, and edits."""
    others = [replace(step, number=10 + step.number, seed=5, drawn=step.number) for step in WALK]
    edits = [Edit("mask", number, number) for number in range(6)]
    path = written(tmp_path / "my.steps", SEED, *WALK, *others, *edits)
    left, before, number = bits_left(read_journal(path), 1000), others[-1], 20
    with Appender(path, SEED) as appender:
        while (left := left - bits_in_block(replace(WALK[0], number=number), before)) >= 0:
            before, number = replace(WALK[0], number=number), number + 1
            appender.append(before)
        appender.append(Mark(number, "0" * 64))
    assert 970 < compact(path, tmp_path / "small.steps").size <= 1000


def test_bytes_hold_many_small_steps_and_large_ones_in_blocks_of_their_size(tmp_path: Path) -> None:
    before, steps = NO_STEP, list[Step]()
    left = bits_left(Journal("", SEED), 20_000)
    while True:
        step = Step(len(steps), TRITS, 10, 1, 128, (len(steps) % 128,), (1,))
        left -= bits_in_block(step, before)
        if left < 0:
            break
        steps.append(step)
        before = step
    path = written(tmp_path / "small.steps", SEED)
    with Appender(path, SEED) as appender:
        appender.append(*steps, Mark(len(steps), "0" * 64))
    made = compact(path, tmp_path / "compact.steps")
    assert 19_900 < made.size == compact_size(read_journal(path)) <= 20_000
    assert made.steps == steps, "in more than one block"
    k = (1 << 16) - 1  # the largest step there can be, at the end of a block, fits a record
    most = max(set_width(k, m) + m for m in range(43_000, 44_400, 200))
    assert most + 4 * 65 + 33 < most * 1.01  # with all that stands before a choice
    assert most * 1.01 / 8 + BLOCK_BYTES < LONGEST_PART


def test_two_journals_are_joined_behind_what_they_have_in_common(
    walk: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new.steps"
    fork(walk, new, 4)
    own = [Step(5, SCALES, 1, 2, 30, (3, 4), (1, -1)), Step(6, TRITS, 1, 1, 30, (9,), (1,))]
    with Appender(new, SEED) as appender:
        for step in own:
            appender.append(step)
    edit(new, Edit("mask", 6, 6))
    found = difference(walk, new)
    assert tuple(found.values()) == (3, 2, 2)
    both = merge(walk, new, tmp_path / "both.steps")
    numbers = [(step.number, step.seed, step.drawn) for step in both.steps]
    assert numbers == [(n, None, None) for n in (0, 1, 3, 4, 7)] + [(9, SEED.seed, 5)]
    said = ok("verify", tmp_path / "both.steps")
    assert said == "ok: 6 steps, 1 digests match, none is of the last 1 steps\n"
    state = state_of(read_journal(walk))
    state.apply(own[:1])
    assert digest_of(tmp_path / "both.steps") == state.digest()
    edit(new, Edit("mask", 3, 3))  # of a step that both have: the first one's edits count
    again = merge(walk, new, tmp_path / "again.steps")
    assert [step.number for step in again.steps][:3] == [0, 1, 3]
    # steps of another seed keep it
    other = written(tmp_path / "other.steps", JournalHeader(5, 1 << 30, TENSORS), WALK[0])
    with pytest.raises(UsageError, match="begins otherwise than"):
        merge(walk, other, tmp_path / "none.steps")  # another seed is another start
    base = GOLDEN / "rows"
    digest = base_digest(open_packed(base)[1])
    first, second = (
        written(tmp_path / f"{seed}.steps", JournalHeader(seed, base=digest), WALK[0])
        for seed in (1, 2)
    )
    joined = merge(first, second, tmp_path / "joined.steps")
    assert [(s.number, s.seed, s.drawn) for s in joined.steps] == [(0, None, None), (1, 2, 0)]
    assert compact(tmp_path / "joined.steps", tmp_path / "small.steps").steps == joined.steps


def test_another_digest_than_the_steps_give_is_found(walk: Path) -> None:
    with Appender(walk, SEED) as appender:
        appender.append(Mark(9, "0" * 64))
    with pytest.raises(DigestError, match=r"the steps below 9 give the digest [0-9a-f]{12}"):
        check_digests(read_journal(walk), None, {})


# --- the commands -------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["steps", *map(str, arguments)])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: object) -> str:
    """What a command says on stderr, in one line, of a use that is wrong."""
    result = run(*arguments)
    assert result.exit_code in (1, 2) and not result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_commands_of_a_journal_from_its_seed(walk: Path, tmp_path: Path) -> None:
    assert ok("verify", walk) == "ok: 5 steps, 2 digests match\n"
    table: dict[str, Any] = json.loads(ok("log", walk, "--json"))
    assert [row["step"] for row in table["steps"]] == [0, 1, 3, 4, 7] and table["attempts"] == 9
    shown = ok("log", walk)
    assert "scales by 7" in shown and "2 of 9" in shown and "1.5000" in shown
    assert "5 steps of 9 attempts" in shown and "from its seed" in shown
    out = tmp_path / "w.safetensors"
    assert ok("replay", walk, out) == f"{out}: 5 steps, 12 perturbations\n"
    ok("replay", walk, tmp_path / "b.safetensors", "--tensor", "b", "--rows", "2:4", "--upto", 3)
    assert load_file(tmp_path / "b.safetensors")["b"].shape == (2, 33)
    new, both = tmp_path / "new.steps", tmp_path / "both.steps"
    assert ok("fork", walk, new, "--upto", 4).startswith(f"{new}: 3 steps, ")
    assert ok("diff", walk, new) == "3 steps in common, then 2 and 0\n"
    assert ok("edit", walk, "--mask", "3:8", "--negate", 0) == "mask: 3 steps\nnegate: 1 steps\n"
    shown = ok("log", walk)
    assert shown.count("masked") == 3 and shown.count("negated") == 1
    assert ok("merge", walk, new, both).startswith(f"{both}: 2 steps, ")
    small = json.loads(ok("compact", walk, tmp_path / "small.steps", "--json"))
    assert small["steps"] == 5 and small["bytes"] < walk.stat().st_size
    walk.write_bytes(walk.read_bytes() + b"\x0c\x00\x00")
    assert "3 bytes at the end are of a record that was not written whole" in ok("log", walk)


def test_wrong_uses_of_the_commands_end_in_one_line(walk: Path, tmp_path: Path) -> None:
    out, missing = tmp_path / "out", tmp_path / "missing.steps"
    text = tmp_path / "text"
    text.write_text("no journal")
    of_rows = of_base(tmp_path / "rows.steps", GOLDEN / "rows")
    huge = written(tmp_path / "huge.steps", JournalHeader(1, 0, (("h", (1 << 28, 1 << 29), 0),)))
    for words, said in (
        (("verify", missing), "missing.steps: cannot be read"),
        (("verify", walk, "--base", GOLDEN / "rows"), "begins from a seed"),
        (("log", text), f"expected {MAGIC!r}"),
        (("replay", walk, out, "--rows", "0:2"), "--rows: without --tensor"),
        (("replay", walk, out, "--tensor", "a", "--rows", "2:1"), "two rising numbers"),
        (("replay", walk, out, "--tensor", "a", "--rows", "0:25"), "0:25; expected some of the 24"),
        (("replay", walk, out, "--tensor", "z"), "'z' is not moved by steps"),
        (("replay", of_rows, out, "--tensor", "a"), "Name it with --base"),
        (("replay", of_rows, out), "Name it with --base"),
        (("verify", of_rows), "begins from a packed checkpoint"),
        (("replay", huge, out), "memory"),
        (("edit", walk), "nothing; expected --mask"),
        (("edit", walk, "--mask", "9:12"), "has no step from 9 to 11"),
        (("edit", walk, "--mask", "1", "--repair", 2), "without --base and --texts"),
        (("fork", walk, walk), "walk.steps: exists already"),
        (("merge", walk, missing, out), "missing.steps: cannot be read"),
        (("diff", walk, text), "no journ"),
        (("compact", walk, text), "text: exists already"),
        (("train", GOLDEN / "rows", out, "--texts", "x", "--seed", -1), "seed: -1"),
        (
            ("train", GOLDEN / "rows", out, "--texts", "x", "--by", "votes", "--lr", 1),
            "--lr: by votes",
        ),
    ):
        assert said in refused(*words), words
    assert run("replay", walk, out, "--upto", -1).exit_code == 2
    before = walk.read_bytes()
    assert read_journal(walk).edits == [] and walk.read_bytes() == before
    assert not out.exists()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "packed"
    convert(EXAMPLE, path, Recipe("itf"))
    return path


def test_generate_with_steps_writes_what_the_replayed_model_writes(
    packed: Path, tmp_path: Path
) -> None:
    hard = Step(0, SCALES, 0, 60, 1, (0,), (1,))
    path = of_base(tmp_path / "my.steps", packed, hard)
    ok("replay", path, tmp_path / "replayed", "--base", packed)
    assert ok("verify", path, "--base", packed).startswith("1 steps, no digest")
    words = ["--prompt", "The function returns", "--max-new-tokens", "8", "-q"]

    def said(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["generate", *map(str, arguments), *words])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    ours = said(packed, "--steps", path)
    assert ours == said(tmp_path / "replayed") != said(packed)
    wrong = CliRunner().invoke(
        app, ["generate", str(packed), "--steps", str(tmp_path / "absent.steps"), *words]
    )
    assert wrong.exit_code == 1 and "absent.steps: cannot be read" in wrong.stderr
