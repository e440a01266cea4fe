"""Training by votes: a journal says what was trained, however it was found or broken off."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_train_run import source_of, text_of
from torch import Tensor, nn
from two_processes import Told

from ternarize.convert.run import convert
from ternarize.errors import CheckpointError, FormatError, OutputError, UsageError
from ternarize.measure.step_log import curves_of, log_of
from ternarize.plans.recipe import Recipe, Train
from ternarize.ranks import World
from ternarize.runtime.load import load
from ternarize.sources.packed import open_packed
from ternarize.steps.appender import Appender
from ternarize.steps.base import opened_state
from ternarize.steps.checkpoint import replay
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import (
    MOVED,
    NO_STEP,
    Edit,
    JournalHeader,
    Mark,
    Note,
    Step,
    block_bytes,
    entry_bytes,
    journal_header,
    read_journal,
)
from ternarize.steps.operations import check_digests, compact, edit
from ternarize.steps.replay import Part, Values
from ternarize.train.journals import train_by_gradient, train_by_votes
from ternarize.train.moved import MovedModule, Placement
from ternarize.train.objectives import held_loss, objective
from ternarize.train.probes import by_forwards, by_jvp, gradient, sums_along
from ternarize.train.pursuit import Wanted, dense_steps, placed_steps, single_cell
from ternarize.train.votes import (
    Votes,
    _agreed,
    _mark,
    _mean,
    _pack_alignments,
    _unpack_alignments,
    best_step,
    candidates,
    first_attempt,
    train_votes,
)
from ternarize.trits.base3 import pack

SHAPES = (("first.weight", (24, 16), -1), ("second.weight", (3, 24), 8))
HEADER = JournalHeader(0x123456789ABCDEF0, 1 << 30, SHAPES)
VOTES = Votes("trits", 32, (3, 5), (0.5, 0.1), thrift=0.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24, bias=False)
        self.second = nn.Linear(24, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.layer_norm(self.first(x), (24,)).relu()
        logits: Tensor = self.second(hidden) / 4
        return logits


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def value_of(moved: MovedModule, batch: Any) -> float:
    with torch.no_grad():
        return float(loss(moved.module, batch))


def batch_of(number: int, size: int = 128) -> tuple[Tensor, Tensor]:
    """Points of three clouds that no plane divides."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 16, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()


def batches(number: int) -> tuple[Any, Any]:
    return batch_of(2 * number), batch_of(2 * number + 1)


def started(header: JournalHeader = HEADER) -> MovedModule:
    state = opened_state(header, None, {})
    places = [Placement(part, part.name, torch.ones(part.scales_shape)) for part in state.parts]
    return MovedModule(Net(), places, state)


def trained(
    path: Path, attempts: int, votes: Votes = VOTES, moved: MovedModule | None = None
) -> MovedModule:
    moved = started() if moved is None else moved
    with Appender(path, HEADER) as appender:
        train_votes(moved, loss, batches, appender.journal, appender.append, votes, attempts)
    return moved


def values_of(state: Values) -> dict[str, Tensor]:
    return {**state.trits, **{f"{n} e": v for n, v in state.exponents.items()}}


def assert_same_values(state: Values, other: Values) -> None:
    for name, value in values_of(state).items():
        assert torch.equal(value, values_of(other)[name]), name


# --- from a seed ---


@pytest.mark.parametrize("target", ["trits", "scales"])
def test_a_module_learns_and_its_journal_is_the_whole_model(tmp_path: Path, target: str) -> None:
    votes = Votes(target, 32, (1, 3), (0.5, 0.1), (2, 6))
    moved = trained(tmp_path / "a.steps", 30, votes)
    before, held = started(), batch_of(10_001, 1024)
    assert value_of(moved, held) < value_of(before, held) - (0.2 if target == "trits" else 0)
    journal = read_journal(tmp_path / "a.steps")
    assert {step.target for step in journal.steps} == {TRITS if target == "trits" else SCALES}
    again = opened_state(journal.header, None, {})
    again.apply(journal.steps)
    assert_same_values(again, moved.state)
    assert check_digests(journal, None, {}) == 1


def test_parameters_are_what_the_values_say() -> None:
    moved = started()
    moved.state.exponents["second.weight"].fill_(-32)
    moved.write()
    trits = moved.state.trits
    assert torch.equal(moved.module.get_parameter("first.weight"), trits["first.weight"].float())
    half = trits["second.weight"].float() / 2
    assert torch.equal(moved.module.get_parameter("second.weight"), half)


# --- probes ---


@pytest.mark.parametrize("target", [TRITS, SCALES])
@pytest.mark.parametrize("native", [True, False])
def test_tangents_and_one_gradient_say_the_same_of_every_perturbation(
    target: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("ternarize.train.probes.lib", None)
    moved, batch = started(), batch_of(1)
    slopes = moved.slopes(target, gradient(moved, loss, batch)[1])
    step = Step(7, target, 2, 1, 20, (), ())
    one = sums_along(moved, slopes, step)
    other = by_jvp(moved, loss, batch, step)
    assert one.abs().max() > 1e-3
    assert torch.allclose(one, other, atol=1e-5)


def test_forwards_say_nearly_the_same_of_small_moves() -> None:
    moved, batch = started(), batch_of(1, 4096)
    slopes = moved.slopes(SCALES, gradient(moved, loss, batch)[1])
    step = Step(7, SCALES, 1, 1, 12, (), ())
    one = sums_along(moved, slopes, step)
    other = by_forwards(moved, loss, batch, step)
    assert torch.allclose(one, other, atol=0.05 * float(one.abs().max()))


def test_what_is_at_its_limit_counts_for_nothing_in_that_direction() -> None:
    moved = started()
    for trits in moved.state.trits.values():
        trits.fill_(1)
    slopes = {part.name: torch.ones(torch.Size(part.shape).numel()) for part in moved.state.parts}
    found = sums_along(moved, slopes, Step(0, TRITS, 1, 1, 50, (), ()))
    assert bool((found <= 0).all()) and bool((found.sum(1) < -100).all())
    assert torch.allclose(found.sum(1), found.sum(1)[:1], atol=40)


@pytest.mark.parametrize("probe", ["jvp", "forwards"])
def test_no_backward_is_needed_anywhere(
    probe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward")

    monkeypatch.setattr(Tensor, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    votes = Votes("trits", 16, (3,), (0.5, 0.1), probe=probe)
    moved = trained(tmp_path / "a.steps", 8, votes)
    held = batch_of(10_001, 1024)
    assert value_of(moved, held) < value_of(started(), held)


# --- what is taken ---


def test_a_step_is_taken_only_if_it_lowers_the_loss_of_the_other_batch(tmp_path: Path) -> None:
    moved, seen = started(), list[tuple[float, float, bool]]()
    with Appender(tmp_path / "a.steps", HEADER) as appender:
        for number in range(12):
            probed, deciding = batches(number)
            before = value_of(moved, deciding)
            step, after = best_step(moved, loss, probed, deciding, VOTES, number, World())
            if step is not None:
                moved.state.apply([step])
                moved.write()
                appender.append(step)
            assert value_of(moved, deciding) == pytest.approx(after, abs=1e-6)
            seen.append((before, after, step is not None))
    assert all(after < before if taken else after == before for before, after, taken in seen)


def test_trying_leaves_the_values_as_they_were() -> None:
    moved = started()
    best_step(moved, loss, *batches(0), VOTES, 0, World())
    assert_same_values(moved.state, started().state)
    for name, parameter in started().module.named_parameters():
        assert torch.equal(moved.module.get_parameter(name), parameter), name


def test_thrift_takes_steps_of_fewer_perturbations() -> None:
    counts = {}
    for thrift in (0.0, 1.0):
        votes = Votes("trits", 64, (3,), (1.0, 0.5, 0.1, 0.02), thrift=thrift)
        steps = [best_step(started(), loss, *batches(n), votes, n, World())[0] for n in range(6)]
        counts[thrift] = sum(len(step.chosen) for step in steps if step is not None)
    assert 0 < counts[1.0] < counts[0.0]


def test_candidates_go_downhill_on_the_batch_that_is_probed() -> None:
    moved, batch = started(), batch_of(0, 2048)
    slopes = moved.slopes(TRITS, gradient(moved, loss, batch)[1])
    for step in candidates(moved, loss, batch, VOTES, 4, World()):
        changes = sums_along(moved, slopes, step)
        for chosen, sign in zip(step.chosen, step.signs, strict=True):
            assert changes[chosen, 0 if sign > 0 else 1] < 0


def test_without_backward_a_density_stays_until_it_does_not_help(tmp_path: Path) -> None:
    votes = Votes("trits", 8, (2, 4, 6), (0.5,), probe="forwards")
    path = tmp_path / "a.steps"
    trained(path, 40, votes)
    journal = read_journal(path)
    taken = {step.number: step.bits for step in journal.steps}
    vain = 0
    for number in range(40):
        assert taken.get(number, votes.bits[vain % 3]) == votes.bits[vain % 3]
        vain += number not in taken
    assert 1 <= vain < 40 and len(set(taken.values())) > 1


@pytest.mark.parametrize(
    "given",
    [
        {"target": "weights"},
        {"k": 0},
        {"bits": (31,)},
        {"bits": ()},
        {"shares": (1.5,)},
        {"shares": (0.5, 0.0)},
        {"amounts": (0,)},
        {"probe": "guess"},
        {"thrift": 2.0},
        {"exchange": "letters"},
    ],
    ids=str,
)
def test_values_that_nobody_can_mean_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        Votes(**given)


# --- broken off ---


def test_a_training_killed_after_any_record_goes_on_to_the_same_steps(tmp_path: Path) -> None:
    trained(tmp_path / "whole.steps", 12)
    whole = (tmp_path / "whole.steps").read_bytes()
    journal = read_journal(tmp_path / "whole.steps")
    tries = 0
    for cut in range(journal.size - 1, 0, -37):
        path = tmp_path / "cut.steps"
        path.write_bytes(whole[:cut])
        try:
            begun = read_journal(path)
        except FormatError:
            continue  # within the header, which is there whole or not at all
        moved = started()
        moved.state.apply(begun.effective())
        moved.write()
        trained(path, 12, moved=moved)
        assert read_journal(path).steps == journal.steps, cut
        tries += 1
    assert tries > 10


def test_a_training_goes_on_from_what_edits_have_left(tmp_path: Path) -> None:
    path = tmp_path / "a.steps"
    trained(path, 10)
    edit(path, Edit("mask", 2, 4))
    begun, moved = read_journal(path), started()
    moved.state.apply(begun.effective())
    moved.write()
    trained(path, first_attempt(begun) + 5, moved=moved)
    found = read_journal(path)
    again = opened_state(found.header, None, {})
    again.apply(found.effective())
    assert_same_values(again, moved.state)
    assert check_digests(found, None, {}) == 2
    assert [mark.number for mark in found.entries if isinstance(mark, Mark)] == [10, 15]


def test_a_journal_of_another_seed_or_writer_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.steps"
    trained(path, 3)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="another seed or start"):
        Appender(path, JournalHeader(1, 1 << 30, SHAPES))
    with Appender(path, HEADER), pytest.raises(OutputError, match="another process is writing"):
        Appender(path, HEADER)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["a.steps"]


# --- several processes ---

WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
from pathlib import Path
from test_steps_training import HEADER, batch_of, loss, started
from ternarize.steps.appender import Appender
from ternarize.steps.journal import parse_journal, read_journal
from ternarize.ranks import ranks_of_launcher
from ternarize.train.votes import Votes, first_attempt, train_votes

torch.set_num_threads(1)
path, attempts, exchange, die = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
votes = Votes("trits", 64, (3, 5), (0.5, 0.1), thrift=0.0, exchange=exchange)
with ranks_of_launcher() as world:

    def batches(number):
        if world.rank == 1 and number == die:
            os._exit(9)
        at = 2 * (number * world.size + world.rank)
        return batch_of(at, 64), batch_of(at + 1, 64)

    appender = None if world.rank else Appender(path, HEADER)
    begun = parse_journal(world.firsts(path.read_bytes() if appender else b""))
    moved = started()
    moved.state.apply(begun.steps)
    moved.write()
    try:
        train_votes(moved, loss, batches, begun, appender.append if appender else lambda *_: None,
                    votes, attempts, world=world)
    finally:
        if appender:
            appender.__exit__()
    told = dict(digest=moved.state.digest(), sent=sum(world.sent.values()))
    Path(f"{{path}}.{{world.rank}}").write_text(json.dumps(told))
"""


def launch(tmp_path: Path, path: Path, attempts: int, exchange: str, die: int = -1) -> list[int]:
    """Two processes that write one journal; their exit codes."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    port = str(20_000 + os.getpid() % 20_000)
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(path), str(attempts), exchange, str(die)]
        with (tmp_path / f"log{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log)
            )
    return [process.wait(timeout=120) for process in processes]


def test_two_processes_write_one_journal_of_both_their_data(tmp_path: Path) -> None:
    path = tmp_path / "a.steps"
    assert launch(tmp_path, path, 10, "votes", die=6) != [0, 0]
    assert "is gone" in (tmp_path / "log0").read_text()
    assert 0 < len(read_journal(path).steps) <= 6, "what was written before stays"
    assert launch(tmp_path, path, 12, "alignments") == [0, 0], (tmp_path / "log0").read_text()
    told = [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(2)]
    assert told[0]["digest"] == told[1]["digest"] and told[1]["sent"] > 0
    journal = read_journal(path)
    state = opened_state(HEADER, None, {})
    state.apply(journal.steps)
    assert state.digest() == told[0]["digest"]
    held, moved = batch_of(10_001, 1024), started()
    before = value_of(moved, held)
    moved.state.apply(journal.steps)
    moved.write()
    assert value_of(moved, held) < before


def test_votes_are_whole_numbers_and_means_are_of_all() -> None:
    changes = torch.tensor([[1.0, -1.0], [-0.6, 0.25]], dtype=torch.float64)
    for exchange in ("alignments", "votes"):
        assert torch.equal(_agreed(changes, exchange, World()), changes)
    told = _pack_alignments(torch.tensor([[3.5, 1.0], [-1.0, -0.2]], dtype=torch.float64))
    assert len(told) == 4 + 2, "four bits each, and a scale"
    # of this process 7, -7, -4.2 and 1.75 sevenths, rounded; of the other one halves
    mine, theirs = [[1, -1], [-4 / 7, 2 / 7]], [[3.5, 1.0], [-1.0, 0.0]]
    expected = (torch.tensor(mine) + torch.tensor(theirs)) / 2
    found = _agreed(changes, "alignments", Told(told))
    assert torch.allclose(found, expected.double(), atol=1e-6)
    for none in (torch.zeros(3, 2), torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]])):
        assert not _unpack_alignments(_pack_alignments(none), len(none)).any()
    voted = Told(pack(torch.tensor([[-1, 1]], dtype=torch.int8), -1))
    assert _agreed(changes, "votes", voted).tolist() == [[2, -2], [-1, 1]], "-1 and 0 of its own"
    assert _mean(2.5, World()) == 2.5 and _mean(2.5, Told(torch.tensor(0.5))) == 1.5


def test_a_process_that_has_come_to_other_values_ends_all() -> None:
    moved, said = started(), list[Any]()
    _mark(moved, said.append, Told(moved.state.digest()), 7)
    with pytest.raises(CheckpointError, match="rank 1: has other values after attempt 7"):
        _mark(moved, said.append, Told("another"), 7)
    assert said == [Mark(7, moved.state.digest())]


# --- language models ---


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, what it is packed to, and a text."""
    folder = tmp_path_factory.mktemp("llama")
    source = source_of("llama", folder / "source")
    recipe = Recipe("itf", 32, scale_bits=8, head="ternary")
    convert(source, folder / "packed", recipe)
    return source, folder / "packed", text_of(folder / "text.txt")


def training_of(source: Path, text: Path, attempts: int, **more: Any) -> Train:
    given: dict[str, Any] = {"texts": (str(text),), "teacher": str(source), "steps": attempts}
    given |= more
    return Train(batch=256, train_len=16, **given)


@pytest.mark.parametrize("target", ["scales", "trits"])
def test_a_packed_model_is_trained_and_replayed_to_what_was_measured(
    target: str, llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, packed, text = llama
    journal, votes = tmp_path / "a.steps", Votes(target, 64, (4, 8), (0.5, 0.1, 0.02), (4,))
    first = train_by_votes(packed, journal, training_of(source, text, 6), votes)
    again = train_by_votes(packed, journal, training_of(source, text, 12), votes)
    assert again["loss_before"] == pytest.approx(first["loss"], abs=1e-6)
    assert again["steps"] > 0 and again["loss"] != first["loss_before"]
    whole = tmp_path / "whole.steps"
    train_by_votes(packed, whole, training_of(source, text, 12), votes)
    assert read_journal(whole).steps == read_journal(journal).steps
    replay(journal, packed, tmp_path / "replayed")
    other = train_by_votes(
        tmp_path / "replayed", tmp_path / "b.steps", training_of(source, text, 1), votes
    )
    assert other["loss_before"] == pytest.approx(again["loss"], abs=1e-5)
    model, direct = load(tmp_path / "replayed"), load(packed, steps=journal)
    for name, value in model.state_dict().items():
        assert torch.equal(direct.state_dict()[name], value), name


def test_votes_end_where_a_step_does_not_fit_into_the_bytes_and_say_so(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, packed, text = llama
    votes = [Votes("scales", 64, (4,), (0.1,), (4,), nbytes=n) for n in (150, 270, 290)]
    training, journal, whole = training_of(source, text, 40), tmp_path / "a.steps", tmp_path / "b"
    with pytest.raises(UsageError, match=r"--bytes: 150, of which header, digest and 0 steps take"):
        train_by_votes(packed, journal, training, votes[0])
    told = train_by_votes(packed, journal, training, votes[1])
    assert told["attempts"] < 40 and told["not_written"] == "bytes"
    assert told["written"] == told["steps"] == len(read_journal(journal).steps) > 0
    again = train_by_votes(packed, journal, training, votes[1])
    assert (again["written"], again["attempts"]) == (0, told["attempts"])
    assert again["loss_before"] == again["loss"] == pytest.approx(told["loss"], abs=1e-6)
    more = train_by_votes(packed, journal, training, votes[2])
    assert more["written"] > 0 and compact(journal, tmp_path / "small.steps").size <= 290
    train_by_votes(packed, whole, training, votes[2])
    assert read_journal(whole).steps == read_journal(journal).steps


def test_scales_that_gradients_have_found_are_written_as_steps(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, packed, text = llama
    journal, training = tmp_path / "a.steps", training_of(source, text, 8)
    told = train_by_gradient(packed, journal, training, 700, k=64)
    assert told["loss_wanted"] < told["loss_before"] and told["loss"] < told["loss_before"]
    assert compact(journal, tmp_path / "small.steps").size <= 700
    assert told["steps"] == len(read_journal(journal).steps) > 5
    logged = {"written_from": 0}
    logged |= {name: round(told[name], 6) for name in ("loss_before", "loss")}
    logged["upto"] = read_journal(journal).next_number
    log = log_of(journal)
    assert log["written"] == [logged]
    size = sum(row["bytes"] for row in log["steps"])
    losses = logged["loss_before"], logged["loss"]
    assert curves_of(log) == {
        "attempts": [list(zip((0, logged["upto"]), losses, strict=True))],
        "bytes": [list(zip((0, size), losses, strict=True))],
    }
    records = open_packed(packed)
    assert check_digests(read_journal(journal), *records) == 1
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])
    again = train_by_gradient(packed, journal, training, 700, k=64)
    assert again["loss_wanted"] == pytest.approx(told["loss_wanted"], abs=1e-5)
    assert again["loss"] == pytest.approx(told["loss"], abs=0.02 * told["loss_before"])
    more = train_by_gradient(packed, journal, training, 1400, k=64)
    assert more["steps"] > again["steps"] and more["loss_before"] == pytest.approx(again["loss"])


def test_steps_go_where_they_are_wanted_for_few_bits() -> None:
    torch.manual_seed(0)
    state = started().state
    names = {part.name: state.values(part, SCALES).numel() for part in state.parts}
    values = {name: 8 * torch.randn(count) for name, count in names.items()}
    wanted = Wanted(values, {name: torch.rand(count) for name, count in names.items()})
    before = wanted.distance(state)
    distances = {}
    for bits in (100, 300, 900):
        state = started().state
        steps = list(dense_steps(state, wanted, NO_STEP, 0, 64, bits))
        assert 8 * (len(block_bytes(steps)) - 13) < bits + 8
        distances[bits] = wanted.distance(state)
        again = started().state
        again.apply(steps)
        assert_same_values(again, state)
    assert before > distances[100] > distances[300] > distances[900]
    assert distances[900] < 0.1 * before


@pytest.mark.parametrize("target", [TRITS, SCALES])
def test_values_move_one_by_one_where_they_are_wanted_most(target: int) -> None:
    torch.manual_seed(0)
    begun, name = started().state, MOVED[target]
    flat = {part.name: begun.values(part, target).flatten().float() for part in begun.parts}
    spread = {TRITS: 0.4, SCALES: 8.0}[target]
    wanted = Wanted(
        {n: (v + spread * torch.randn(len(v))).clamp(-1.5, 1.5) for n, v in flat.items()}
        if target == TRITS
        else {n: spread * torch.randn(len(v)) for n, v in flat.items()},
        {n: torch.rand(len(v)) for n, v in flat.items()},
    )

    def distance(state: Values) -> float:
        rests = [wanted.values[p.name] - state.values(p, target).flatten() for p in state.parts]
        weights = [wanted.weight[p.name] for p in state.parts]
        return sum(float((w * r * r).sum()) for w, r in zip(weights, rests, strict=True))

    distances = [distance(begun)]
    for bits in (160, 600, 6000):
        state = started().state
        steps = list(placed_steps(state, wanted, name, NO_STEP, 5, 64, bits))
        assert 8 * (len(block_bytes(steps)) - 13) < bits + 8
        assert all(step.target == target and step.number >= 5 for step in steps)
        distances.append(distance(state))
        again = started().state
        again.apply(steps)
        assert_same_values(again, state)
        for part in state.parts:
            before, now = begun.values(part, target), state.values(part, target)
            towards = (wanted.values[part.name].view(now.shape) - before).sign()
            assert bool((((now - before).sign() == towards) | (now == before)).all())
    assert distances[0] > distances[1] >= distances[2] >= distances[3]
    assert distances[3] < (0.01 if target == SCALES else 0.7) * distances[0]
    rounded = {n: v.round().clamp(-1, 1) for n, v in wanted.values.items()}
    if target == TRITS:  # with bits enough all are where they are wanted
        for part in state.parts:
            assert torch.equal(state.trits[part.name].flatten().float(), rounded[part.name])


def test_trits_that_gradients_have_found_are_written_as_steps(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, packed, text = llama
    journal, training = tmp_path / "a.steps", training_of(source, text, 20, lr=0.05)
    told = train_by_gradient(packed, journal, training, 3000, target="trits", k=512)
    assert told["loss_wanted"] < told["loss_before"] and told["loss"] < told["loss_before"]
    small = compact(journal, tmp_path / "small.steps")
    assert small.size <= 3000 and {step.target for step in small.steps} == {TRITS}
    assert check_digests(read_journal(journal), *open_packed(packed)) == 1
    more = train_by_gradient(packed, journal, training_of(source, text, 8), 3400)
    assert more["loss_before"] == pytest.approx(told["loss"], abs=1e-5)
    assert {step.target for step in read_journal(journal).steps} == {TRITS, SCALES}
    replay(journal, packed, tmp_path / "replayed")


def test_what_does_not_help_documents_put_aside_is_not_written(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, packed, text = llama
    journal, training = tmp_path / "a.steps", training_of(source, text, 3, lr=1.0)
    told = train_by_gradient(packed, journal, training, 3000, target="trits")
    assert told["loss_wanted"] > told["loss_before"] == told["loss"]
    assert told["written"] == told["steps"] == 0 and read_journal(journal).steps == []
    assert told["not_written"] == "gain" and log_of(journal)["written"] == []


@pytest.mark.parametrize("helping", [True, False])
def test_of_steps_the_part_that_helps_documents_put_aside_is_written(
    helping: bool, llama: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is wanted helps; what fits into the bytes does not, or only its first quarter."""
    source, packed, text = llama
    good = list[Step]()

    def offered(state: Values, wanted: Wanted, target: str, *behind: Any) -> Iterator[Step]:
        flat = {name: trits.flatten().float() for name, trits in state.trits.items()}
        away = Wanted({n: 2 * flat[n] - v for n, v in wanted.values.items()}, wanted.weight)
        before, number, k, _ = behind
        if helping:
            for step in placed_steps(state, wanted, target, before, number, k, 16_000):
                good.append(step)
                yield step
            before, number = good[-1], good[-1].number + 1
        bad = placed_steps(state, away, target, before, number, k, 1e6)
        yield from itertools.islice(bad, 3 * max(1, len(good)))

    monkeypatch.setattr("ternarize.train.journals.placed_steps", offered)
    journal, training = tmp_path / "a.steps", training_of(source, text, 20, lr=0.05)
    told = train_by_gradient(packed, journal, training, 9000, target="trits", k=512)
    assert told["loss_wanted"] < told["loss_before"]
    assert read_journal(journal).steps == good and told["written"] == len(good)
    if helping:
        assert told["loss"] < told["loss_before"] and told["not_written"] is None
    else:
        assert told["loss"] == told["loss_before"] and told["not_written"] == "gain"
    assert check_digests(read_journal(journal), *open_packed(packed)) == 1


@pytest.mark.parametrize("named", [True, False], ids=["named", "as older versions wrote it"])
def test_a_coding_that_was_broken_off_stays_where_another_target_is_trained(
    named: bool, llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, packed, text = llama
    journal, training = tmp_path / "a.steps", training_of(source, text, 8)
    told = train_by_gradient(packed, journal, training, 700, k=64)
    whole = read_journal(journal)
    kept = list(whole.entries[: len(whole.steps) // 2])
    assert kept[0] == Note({"coded_from": 0, "target": "scales"})
    if not named:
        kept[0] = Note({"coded_from": 0})
    journal.write_bytes(journal_header(whole.header) + b"".join(map(entry_bytes, kept)))
    begun = read_journal(journal)
    assert 0 < len(begun.steps) < len(whole.steps)
    more = train_by_gradient(packed, journal, training_of(source, text, 1), 900, target="trits")
    assert more["loss_before"] < told["loss_before"] - 0.3 * (told["loss_before"] - told["loss"])
    found = read_journal(journal)
    assert found.entries[: len(kept)] == begun.entries
    assert Note({"coded_from": begun.next_number, "target": "trits"}) in found.entries
    assert check_digests(found, *open_packed(packed)) == 1


def test_a_run_that_ends_before_its_losses_are_known_writes_nothing(
    llama: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, packed, text = llama
    journal, training = tmp_path / "a.steps", training_of(source, text, 4)
    looks = 0

    def looked(*given: Any) -> float:
        nonlocal looks
        looks += 1
        if looks == 7:  # before, what is wanted, four beginnings, and what became of it
            raise KeyboardInterrupt
        return held_loss(*given)

    monkeypatch.setattr("ternarize.train.session.held_loss", looked)
    with pytest.raises(KeyboardInterrupt):
        train_by_gradient(packed, journal, training, 700, k=64)
    assert read_journal(journal).entries == ()
    told = train_by_gradient(packed, journal, training, 700, k=64)
    steps, *others = told["steps"], log_of(journal)["written"]
    assert steps > 4 and others == [
        [
            {
                "written_from": 0,
                "loss_before": round(told["loss_before"], 6),
                "loss": round(told["loss"], 6),
                "upto": read_journal(journal).next_number,
            }
        ]
    ]
    whole = read_journal(journal)
    kept = whole.entries[: 1 + steps]  # the digest, and notes behind it, were not written
    journal.write_bytes(journal_header(whole.header) + b"".join(map(entry_bytes, kept)))
    again = train_by_gradient(packed, journal, training, 240, k=64)
    assert again["written"] == 0 and again["not_written"] == "before"
    assert again["steps"] == steps and log_of(journal)["written"][0]["written_from"] == 0


@pytest.mark.parametrize("target", [TRITS, SCALES])
def test_a_step_that_is_too_large_is_cut_down(target: int) -> None:
    name = MOVED[target]
    begun = started().state
    flat = {part.name: begun.values(part, target).flatten().float() for part in begun.parts}
    wanted = Wanted(
        {n: torch.where(v > 0, v - 1, v + 1) for n, v in flat.items()},
        {n: torch.ones_like(v) for n, v in flat.items()},
    )
    for bits in (70, 80, 200):
        state = started().state
        steps = list(placed_steps(state, wanted, name, NO_STEP, 0, 1 << 12, bits))
        assert steps and 8 * (len(block_bytes(steps)) - 13) < bits + 8
        assert sum(len(step.chosen) for step in steps) >= 1
    ended = placed_steps(started().state, wanted, name, NO_STEP, 0, 1 << 12, 50)
    with pytest.raises(StopIteration) as end:
        next(ended)
    assert end.value.value is True, "for want of bits"
    state = started().state
    for part in state.parts:
        state.values(part, target).copy_(
            wanted.values[part.name].view_as(state.values(part, target))
        )
    ended = placed_steps(state, wanted, name, NO_STEP, 0, 64, 500)
    with pytest.raises(StopIteration) as end:
        next(ended)
    assert end.value.value is False, "all are where they are wanted"


def test_gradients_take_one_process_a_rate_and_the_source(
    llama: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, packed, text = llama
    journal, training = tmp_path / "a.steps", training_of(source, text, 1)
    for target, rate in (("scales", 0.0), ("scales", 33.0), ("trits", 1.5), ("trits", math.nan)):
        with pytest.raises(UsageError, match=r"--lr: .*; expected above 0, and (32|1) at most"):
            train_by_gradient(packed, journal, training, 3000, target=target, rate=rate)
    with monkeypatch.context() as patched:
        for name, value in {"RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
            patched.setenv(name, value)
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="torchrun: by gradient"):
            train_by_gradient(packed, journal, training, 3000)
    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.is_initialized", lambda: True)
        patched.setattr("torch.distributed.get_world_size", lambda: 2)
        with pytest.raises(UsageError, match="torchrun: by gradient"):
            train_by_gradient(packed, journal, training, 3000)
    assert not journal.exists()
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    save_file(
        {n: torch.randn(t.shape, generator=generator).to(t) * t.std() for n, t in tensors.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        UsageError, match=r"--teacher: its weights, rounded, are 0\.3\d of the trits"
    ):
        train_by_gradient(packed, journal, training_of(other, text, 1), 3000, target="trits")
    fast = train_by_gradient(packed, journal, training_of(source, text, 2), 700, k=64, rate=8.0)
    assert fast["attempts"] == 2


def test_very_many_scales_move_one_by_one(
    llama: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, packed, text = llama
    monkeypatch.setattr("ternarize.train.journals.DENSE_EXPONENTS", 1)
    pairs = list[Any]()

    def noted(pair: Any, *how: Any) -> Any:
        pairs.append(pair)
        return objective(pair, *how)

    monkeypatch.setattr("ternarize.train.session.objective", noted)
    told = train_by_gradient(packed, tmp_path / "a.steps", training_of(source, text, 8), 900, k=512)
    assert told["loss"] < told["loss_before"]
    kept = [pair.known for pair in pairs if hasattr(pair, "known")]
    assert [len(each) for each in kept] == [2], "held-out samples, and no batch of the eight"
    steps = read_journal(tmp_path / "a.steps").steps
    assert (
        len({step.bits for step in steps}) == 1
        and compact(tmp_path / "a.steps", tmp_path / "b.steps").size <= 900
    )


def test_more_values_than_one_direction_can_tell_apart_are_refused() -> None:
    part = Part("w", (1 << 16, 1 << 15), -1, 0, 0)
    state = Values(1, [part], {"w": torch.zeros(1, dtype=torch.int8)})
    state.trits["w"] = torch.zeros(1, dtype=torch.int8).expand(1 << 16, 1 << 15)
    with pytest.raises(UsageError, match=f"the trits of the base: are {1 << 31}; expected at most"):
        single_cell(state, "trits")


def test_a_text_itself_can_be_learnt_and_without_backward(
    llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, packed, text = llama
    for probe in ("jvp", "forwards"):
        votes = Votes("scales", 4, (4,), (0.5,), (8,), probe=probe)
        training = Train(texts=(str(text),), objective="text", steps=2, batch=64, train_len=16)
        told = train_by_votes(packed, tmp_path / f"{probe}.steps", training, votes)
        assert told["attempts"] == 2 and told["loss"] <= told["loss_before"] + 0.05


def test_what_cannot_be_trained_is_refused(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, packed, text = llama
    votes, journal = Votes("scales", 4, (4,)), tmp_path / "a.steps"
    with pytest.raises(UsageError, match="Name the source with --teacher"):
        train_by_votes(packed, journal, training_of(source, text, 1, teacher=None), votes)
    alone = training_of(source, text, 1, teacher=None, objective="text")
    with pytest.raises(UsageError, match="without the weights that .* was made of"):
        train_by_gradient(packed, journal, alone, 3000, target="trits")
    assert read_journal(journal).steps == []
    journal.unlink()
    for given in ({"target": "weights"}, {"k": 1 << 16}):
        with pytest.raises(UsageError, match=next(iter(given))):
            train_by_gradient(packed, journal, alone, 3000, **given)
    source_of("mixtral", tmp_path / "experts")
    convert(tmp_path / "experts", tmp_path / "moe", Recipe("itf", 32))
    training = training_of(tmp_path / "experts", text, 1)
    with pytest.raises(UsageError, match="fused with others"):
        train_by_votes(tmp_path / "moe", journal, training, votes)
    assert not journal.exists()
