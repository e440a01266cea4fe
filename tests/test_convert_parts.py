"""A conversion by several processes, each with a part of it: the bytes of one that is in one piece.

Here the processes take turns; tests/campaigns/parts.py kills them while they work side by side.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from filelock import FileLock
from hub import Hub
from safetensors.torch import load_file, save_file
from test_campaign_kill import campaign, needs_linux
from test_convert import digest_of
from test_hub import client, hub, sharded  # noqa: F401
from typer.testing import CliRunner

from ternarize.cli.app import app
from ternarize.cli.convert import part_of_text
from ternarize.convert import parts, workplace
from ternarize.convert import run as pipeline
from ternarize.convert.journal import State
from ternarize.convert.run import convert
from ternarize.convert.tensor import Change, convert_tensor
from ternarize.convert.workplace import JOURNAL
from ternarize.errors import OutputError, UsageError, WeightError
from ternarize.files.names import INDEX, SAFETENSORS
from ternarize.files.outputs import write_at
from ternarize.files.sums import SUMS
from ternarize.plans.parts import names_of_parts, part_table
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "tied": ("llama_tied", {}),
    "moe": ("mixtral", {"max_shard_size": "100KB"}),
    "shards": ("llama", {"max_shard_size": "18KB"}),
}


EMBEDDING = "model.embed_tokens"


class Break(Exception):
    """A process that dies."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, str]]]:
    """A source of some kind, and the digests of what it becomes in one piece."""
    known: dict[str, tuple[Path, dict[str, str]]] = {}

    def make(kind: str) -> tuple[Path, dict[str, str]]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            name, options = KINDS[kind]
            tiny_models.save(name, folder / "source", **options)
            convert(folder / "source", folder / "whole")
            known[kind] = folder / "source", digest_of(folder / "whole")
        return known[kind]

    return make


@pytest.fixture
def dense(made: Any) -> tuple[Path, dict[str, str]]:
    found: tuple[Path, dict[str, str]] = made("dense")
    return found


def break_after(count: int) -> Callable[..., None]:
    """Progress after which, at the tensor of that number, the process dies."""
    seen = 0

    def progress(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise Break

    return progress


def converted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is converted from now on."""
    calls, real = Counter[str](), convert_tensor

    def counting(*args: Any) -> Any:
        calls[args[1].name] += 1
        return real(*args)

    monkeypatch.setattr(pipeline, "convert_tensor", counting)
    return calls


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# --- the same bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param(kind, n, marks=[] if (kind, n) in fast else pytest.mark.slow)
        for fast in [(("dense", 2), ("tied", 2), ("moe", 2), ("shards", 3))]
        for kind in KINDS
        for n in (1, 2, 3, 7)
    ],
)
def test_any_number_of_parts_gives_the_bytes_of_one_piece(
    kind: str, count: int, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = made(kind)
    calls = converted(monkeypatch)
    for index in range(count, 0, -1):
        convert(source, tmp_path / "packed", part=(index, count))
    assert set(calls.values()) == {1}
    convert(source, tmp_path / "packed", finish=True)
    assert set(calls.values()) == {1}  # nothing is left for the last step
    assert digest_of(tmp_path / "packed") == expected
    assert os.listdir(tmp_path) == ["packed"]


def test_what_a_part_has_done_stays_done_whatever_the_number_of_parts(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = dense
    output = tmp_path / "packed"
    with pytest.raises(Break):
        convert(source, output, progress=break_after(3), threads=1)  # alone, before all others
    for part, after in (((1, 2), 2), ((2, 3), 2), ((2, 3), 1)):
        with pytest.raises(Break):
            convert(source, output, part=part, progress=break_after(after), threads=1)
    journals = tmp_path.rglob(JOURNAL)
    lines = [json.loads(line) for path in journals for line in path.read_text().splitlines()]
    done = {line["name"] for line in lines if "name" in line}
    assert len(done) == 3 + 2 + 2 + 1
    calls = converted(monkeypatch)
    for part in ((1, 2), (2, 2)):
        convert(source, output, part=part)
    convert(source, output, finish=True)
    assert set(calls.values()) == {1} and not done & calls.keys()
    assert len(calls) + len(done) == len(make_plan(source).tensors)
    assert digest_of(output) == expected


def test_a_finish_before_any_part_leaves_nothing_behind(dense: Any, tmp_path: Path) -> None:
    source, _ = dense
    with pytest.raises(OutputError, match="Run --part I/N, each of N"):
        convert(source, tmp_path / "packed", Recipe("twn"), finish=True)
    assert not list(tmp_path.iterdir())


def test_without_finish_the_rest_is_converted_here(dense: Any, tmp_path: Path) -> None:
    source, expected = dense
    convert(source, tmp_path / "packed", part=(2, 3))
    convert(source, tmp_path / "packed")
    assert digest_of(tmp_path / "packed") == expected
    assert os.listdir(tmp_path) == ["packed"]


def test_parts_of_different_disks_are_copied_together(made: Any, tmp_path: Path) -> None:
    """A large file that was cut, and machines that know nothing of each other."""
    source, expected = made("dense")
    for index in (1, 2, 3):
        theirs = Path(shutil.copytree(source, tmp_path / f"source-{index}"))  # and its times
        convert(theirs, tmp_path / f"disk-{index}" / "packed", part=(index, 3))
    for index in (1, 2, 3):
        there = tmp_path / f"disk-{index}" / "packed.partial"
        shutil.copytree(there, tmp_path / "packed.partial", dirs_exist_ok=True)
    convert(source, tmp_path / "packed", finish=True)
    assert digest_of(tmp_path / "packed") == expected


def test_what_needs_another_layout_in_one_part_is_the_same_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert without 8-bit scales; those of its parameter, in other parts, have none either."""
    source, recipe = tmp_path / "source", Recipe(scale_bits=8)
    tiny_models.save("mixtral", source, dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"] *= 1e-7
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "whole", recipe)
    for index in (1, 2, 3):
        convert(source, tmp_path / "packed", recipe, part=(index, 3))
    calls = converted(monkeypatch)
    convert(source, tmp_path / "packed", recipe, finish=True)
    assert calls  # again, with the scales of the others
    assert all("layers.0" in name and name[-9:] in ("w1.weight", "w3.weight") for name in calls)
    assert digest_of(tmp_path / "packed") == digest_of(tmp_path / "whole")


def test_layouts_that_several_parts_ask_for_give_the_same_in_any_order(made: Any) -> None:
    plan = make_plan(made("moe")[0], Recipe(scale_bits=8))
    experts = [t.name for t in plan.tensors if "layers.0" in t.name and t.name[-9:-7] == "w1"]
    finer, wide = Change(experts[0], 64, "U8"), Change(experts[1], 128, "F32")
    layouts = []
    for order in ((finer, wide), (wide, finer)):
        state = State(list(plan.shards), set())
        for change in order:
            state.take(change)
        layouts.append({t.name: (t.group_size, t.scale_dtype) for t in state.tensors})
    assert layouts[0] == layouts[1]
    found = [layouts[0][name] for name in experts]
    assert found == [(64, "F16"), (128, "F32"), (128, "F16"), (128, "F16")]


# --- who does what -----------------------------------------------------------------------------


def test_parts_get_whole_files_the_largest_first_and_cut_one_where_a_share_is_too_large(
    made: Any,
) -> None:
    plan = make_plan(made("shards")[0])
    stored = {t.name: t.info.nbytes for t in plan.tensors}
    files = {t.name: t.info.file for t in plan.tensors}
    for count in (1, 2, 3, 7, 50):  # at last more than there are tensors
        for cut in (True, False):
            held = names_of_parts(plan, count, cut=cut)
            assert len(held) == count
            assert Counter(name for names in held for name in names) == Counter(list(stored))
            owners = Counter(file for names in held for file in {files[n] for n in names})
            if not cut:
                assert set(owners.values()) == {1}
            elif count <= 3:
                loads = [sum(stored[n] for n in names) for names in held]
                assert max(loads) <= 1.1 * sum(loads) / count
    one = make_plan(made("dense")[0])  # a single file
    assert [len(names) > 0 for names in names_of_parts(one, 3, cut=False)] == [True, False, False]
    assert all(names_of_parts(one, 3, cut=True))


def test_a_part_says_what_it_reads_and_writes(dense: Any, tmp_path: Path) -> None:
    source, _ = dense
    tables = [convert(source, tmp_path / "packed", part=(i, 2)) for i in (1, 2)]
    assert tables[0] == part_table(make_plan(source), (1, 2), cut=True)
    assert sum(each["source_bytes"] for each in tables) == make_plan(source).source.stored_bytes
    for index, table in enumerate(tables, 1):
        place = tmp_path / "packed.partial" / ".parts" / f"{index}-of-2"
        sizes = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        assert table["packed_bytes"] == sizes


# --- breaks, disks, mistakes -------------------------------------------------------------------


def test_nothing_is_put_together_before_all_parts_have_ended(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = dense
    convert(source, tmp_path / "packed", part=(1, 3))
    with pytest.raises(Break):
        convert(source, tmp_path / "packed", part=(2, 3), progress=break_after(2), threads=1)
    before = digest_of(tmp_path / "packed.partial")
    wrong = r"of \d+ tensors are not converted yet, .* Run --part 2/3, 3/3 with the same options"
    with pytest.raises(OutputError, match=wrong):
        convert(source, tmp_path / "packed", finish=True)
    after = digest_of(tmp_path / "packed.partial")
    assert {name: after[name] for name in before if name != JOURNAL} | {JOURNAL: ""} == before | {
        JOURNAL: ""
    }
    for index in (2, 3):
        convert(source, tmp_path / "packed", part=(index, 3))
    place = tmp_path / "packed.partial" / ".parts" / "3-of-3"
    with FileLock(f"{place}.lock"):  # one that is late
        for finish in (True, False):
            with pytest.raises(OutputError, match="3-of-3: another conversion is writing here"):
                convert(source, tmp_path / "packed", finish=finish)
        with pytest.raises(OutputError, match="3-of-3: another"):  # one that is started twice
            convert(source, tmp_path / "packed", part=(3, 3))
    monkeypatch.setattr(workplace, "WAIT", 0)
    with (
        FileLock(tmp_path / "packed.partial.lock"),
        pytest.raises(OutputError, match="packed.partial: another conversion"),
    ):
        convert(source, tmp_path / "packed", part=(3, 3))
    convert(source, tmp_path / "packed", finish=True)
    assert digest_of(tmp_path / "packed") == expected


def test_bytes_of_a_part_that_are_lost_are_asked_for_again(dense: Any, tmp_path: Path) -> None:
    source, expected = dense
    for index in (1, 2):
        convert(source, tmp_path / "packed", part=(index, 2))
    flip(tmp_path / "packed.partial" / ".parts" / "2-of-2" / "model.safetensors")
    with pytest.raises(OutputError, match=r"1 of \d+ tensors are not .* Run --part 2/2 with"):
        convert(source, tmp_path / "packed", finish=True)
    convert(source, tmp_path / "packed", part=(2, 2))
    convert(source, tmp_path / "packed", finish=True)
    assert digest_of(tmp_path / "packed") == expected


@pytest.mark.parametrize(("step", "times"), [("_copy", 0), ("rmtree", 0)])
def test_putting_together_is_broken_off_and_goes_on(
    step: str, times: int, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = dense
    for index in (1, 2):
        convert(source, tmp_path / "packed", part=(index, 2))
    where: Any = shutil if step == "rmtree" else parts
    calls, real, left = converted(monkeypatch), getattr(where, step), [times]

    def dying(*args: Any) -> Any:
        if not left[0]:
            raise Break
        left[0] -= 1
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, step, dying)
        with pytest.raises(Break):
            convert(source, tmp_path / "packed", finish=True)
    convert(source, tmp_path / "packed", part=(1, 2))  # who is started again finds it done
    convert(source, tmp_path / "packed", finish=True)
    assert digest_of(tmp_path / "packed") == expected and not calls


def test_a_full_disk_keeps_what_a_part_has_done(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = dense
    calls = 0

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        write_at(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_at", full)
        with pytest.raises(OutputError, match="No space left .* the same command again"):
            convert(source, tmp_path / "packed", part=(1, 2), threads=1)
    for index in (1, 2):
        convert(source, tmp_path / "packed", part=(index, 2))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(parts, "reserve", full)
    with pytest.raises(OutputError, match="No space left .* the same command again"):
        convert(source, tmp_path / "packed", finish=True)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="free; the result needs"):
        convert(source, tmp_path / "other", part=(1, 2))
    monkeypatch.undo()
    convert(source, tmp_path / "packed", finish=True)
    assert digest_of(tmp_path / "packed") == expected
    assert sorted(os.listdir(tmp_path)) == ["packed"]


def test_a_part_that_fails_takes_nothing_from_others_and_leaves_nothing(
    dense: Any, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(dense[0], tmp_path / "source"))
    names = names_of_parts(make_plan(source), 2, cut=True)
    tensors = load_file(source / "model.safetensors")
    tensors[sorted(names[1])[0]].view(-1)[0] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError):
        convert(source, tmp_path / "packed", part=(2, 2))
    assert os.listdir(tmp_path) == ["source"]
    convert(source, tmp_path / "packed", part=(1, 2))
    with pytest.raises(WeightError):
        convert(source, tmp_path / "packed", part=(2, 2))
    assert os.listdir(tmp_path / "packed.partial" / ".parts") == ["1-of-2"]


def test_parts_of_other_options_are_not_mixed_and_a_mistaken_one_is_in_nobodys_way(
    dense: Any, tmp_path: Path
) -> None:
    source, expected = dense
    convert(source, tmp_path / "packed", part=(1, 2))
    for more in ({"part": (2, 2)}, {"finish": True}, {}):
        with pytest.raises(OutputError, match="1-of-2: holds an unfinished .* with other options"):
            convert(source, tmp_path / "packed", Recipe("twn"), **more)
    convert(source, tmp_path / "packed", part=(2, 2))
    convert(source, tmp_path / "packed", finish=True)
    assert digest_of(tmp_path / "packed") == expected


def test_a_folder_of_somebody_elses_gets_no_parts(dense: Any, tmp_path: Path) -> None:
    (tmp_path / "packed.partial").mkdir()
    (tmp_path / "packed.partial" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="is no unfinished conversion"):
        convert(dense[0], tmp_path / "packed", part=(1, 2))
    assert os.listdir(tmp_path / "packed.partial") == ["mine"]


def test_who_comes_when_all_is_done_is_told_so(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = dense

    def die(*_: Any) -> None:
        raise Break

    convert(source, tmp_path / "packed", part=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tidy", die)
        with pytest.raises(Break):
            convert(source, tmp_path / "packed", finish=True)
    assert convert(source, tmp_path / "packed", part=(1, 1))["part"] == [1, 1]
    convert(source, tmp_path / "packed", finish=True)
    assert digest_of(tmp_path / "packed") == expected
    with pytest.raises(OutputError, match="have been put together, nothing is left to do"):
        convert(source, tmp_path / "packed", part=(1, 1))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"part": (0, 2)}, "--part: 0/2; expected I/N with 1 <= I <= N"),
        ({"part": (3, 2)}, "--part: 3/2"),
        ({"part": (1, 100_000)}, "N <= 99999"),
        ({"part": (1, 2), "finish": True}, "one of the two"),
        ({"part": (1, 2), "recipe": Recipe("gptq", calibrate=Calibrate())}, "Leave out --part, or"),
        (
            {"finish": True, "recipe": Recipe("gptq", calibrate=Calibrate())},
            "Leave out --finish, or",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(tmp_path / "source", tmp_path / "packed", **more)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@needs_linux
def test_parts_that_are_killed_are_completed_to_the_same_bytes(tmp_path: Path) -> None:
    """A small sample of tests/campaigns/parts.py."""
    options = ("--sources", "tied", "--count", "3", "--every", "29")
    random, boundary = campaign("parts", tmp_path / "out.json", *options)
    assert random["passed"] == random["tried"] and random["killed"] == 3
    assert boundary["passed"] == boundary["tried"] == boundary["killed"] >= 6


# --- from the Hub ------------------------------------------------------------------------------


def test_a_part_fetches_its_own_files_alone(
    client: Hub,  # noqa: F811
    sharded: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    client.put("user/source", {path.name: path.read_bytes() for path in sharded.iterdir()})
    index = json.loads((sharded / (SAFETENSORS + INDEX)).read_text())["weight_map"]
    names, ends = set(index.values()), {index[f"{end}.weight"] for end in ("lm_head", EMBEDDING)}
    for number in (1, 2):
        before = {name: client.requests("GET", f"resolve/.*{name}") for name in names}
        table = convert("user/source", tmp_path / "packed", part=(number, 2), stream=True)
        asked = {name: client.requests("GET", f"resolve/.*{name}") - before[name] for name in names}
        own = {each["file"] for each in table["files"]}
        # of all files the header; whole, its own, and the two that hold copies of one tensor
        whole = {name for name in names if asked[name] > 2}
        assert own and whole == own | ends
        place = tmp_path / "packed.partial" / ".parts" / f"{number}-of-2"
        assert place.is_dir() and not (place / ".source").exists()
    convert("user/source", tmp_path / "packed", finish=True, stream=True)
    convert(sharded, tmp_path / "expected")
    for path in (tmp_path / "expected").iterdir():
        if path.name not in ("ternarize.json", SUMS):  # the record names the Hub
            assert (tmp_path / "packed" / path.name).read_bytes() == path.read_bytes()


def test_a_commit_of_the_hub_is_the_same_whenever_it_came(
    client: Hub,  # noqa: F811
    sharded: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    client.put("user/source", {path.name: path.read_bytes() for path in sharded.iterdir()})
    convert("user/source", tmp_path / "packed", part=(1, 2))
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        os.utime(path, ns=(1, 1))  # as on another machine
    convert("user/source", tmp_path / "packed", part=(2, 2))
    convert("user/source", tmp_path / "packed", finish=True)


# --- on the command line -----------------------------------------------------------------------

ARRAY = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}
TASKS = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ("2/3", {"RANK": "0", "WORLD_SIZE": "2"}, (2, 3)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "2"}, (1, 2)),
        ("auto", {"RANK": "3", "WORLD_SIZE": "4", **TASKS}, (4, 4)),
        ("auto", {"SLURM_PROCID": "4", "SLURM_NTASKS": "5"}, (5, 5)),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_MAX": "9", **TASKS}, (3, 3)),
        ("auto", TASKS, (1, 1)),
        ("auto", {}, "neither RANK and WORLD_SIZE nor"),
        ("auto", {"RANK": "1"}, "neither RANK and WORLD_SIZE nor"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_MAX": "10"}, "even steps"),
        (
            "auto",
            {**ARRAY, "SLURM_ARRAY_TASK_MAX": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            "an array of 3 jobs with 2 tasks each",
        ),
        ("2", {}, "I/N, or auto"),
        ("1/-2", {}, "I/N, or auto"),
    ],
)
def test_a_part_is_what_is_said_or_on_demand_what_a_launcher_says(
    text: str, variables: dict[str, str], expected: tuple[int, int] | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            part_of_text(text, variables)
    else:
        assert part_of_text(text, variables) == expected


def test_parts_on_the_command_line(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = dense
    words = ["convert", str(source), str(tmp_path / "packed")]

    def run(*more: str) -> Any:
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == 0, done.output
        return done

    planned = json.loads(run("--part", "1/2", "--dry-run", "--json").stdout)["part"]
    assert not list(tmp_path.glob("packed*"))
    assert "part 1/2: " in run("--part", "1/2", "--dry-run").stdout
    done = run("--part", "1/2", "--json")
    assert json.loads(done.stdout) == {"output": str(tmp_path / "packed"), **planned}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("--part", "auto")
    assert done.stdout.startswith("part 2/2: ") and "--finish" in done.stderr
    run("--finish", "--quiet")
    assert digest_of(tmp_path / "packed") == expected
