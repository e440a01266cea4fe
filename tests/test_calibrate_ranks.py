"""Several processes that calibrate together: the bytes of one, whatever their number."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import calibrating
import calibrating_ranks
import pytest
import torch
from calibrating import digests

from ternarize.calibrate.pipeline import join
from ternarize.calibrate.ranks import CHUNKS, rank_of, share_out
from ternarize.convert.parts import check_ranks
from ternarize.errors import UsageError
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.ranks import World, ranks_of_launcher


@pytest.fixture(autouse=True)
def _quick(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the processes."""
    for module, name, value in calibrating_ranks.QUICK:
        monkeypatch.setattr(module, name, value)


def job(name: str, folder: Path, output: str, **options: Any) -> list[Any]:
    """A conversion of a tiny model: 20 batches of 24 tokens, 16 of which calibrate."""
    source = folder / name
    if not source.exists():
        calibrating.save(name, source)
        calibrating.data(name, folder)
    data = folder / f"{name}-data.safetensors"
    return [str(source), str(folder / output), str(data), options]


def launched(
    folder: Path, count: int, asked: dict[str, Any], script: str = calibrating_ranks.__file__
) -> list[tuple[int, str]]:
    """Run a script in so many processes; of each its exit code, and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    file = folder / f"asked-{count}.json"
    file.write_text(json.dumps(asked))
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with (folder / f"log-{rank}").open("w") as log:
            command = [sys.executable, script, str(file)]
            env = {**os.environ, **place}
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, (folder / f"log-{rank}").read_text()) for rank, code in enumerate(codes)]


def solved_blocks(output: Path) -> list[str]:
    partial = output.with_name(output.name + ".partial")
    return sorted(p.name for p in (partial / ".calibration").glob("*.safetensors"))


def test_two_processes_give_the_bytes_of_one_which_goes_on_when_one_of_them_dies(
    tmp_path: Path,
) -> None:
    """Experts and biases together; then one of the two dies in the second block of a model."""
    jobs = [job("gpt_oss", tmp_path, "gpt-oss-2"), job("llama", tmp_path, "broken")]
    ended = launched(tmp_path, 2, {"jobs": jobs, "die": [1, 4]})
    assert ended[1][0] == 9 and ended[0][0] != 0, ended
    assert "another process: is gone" in ended[0][1]
    assert solved_blocks(tmp_path / "broken") == ["00000-00000.safetensors"]
    calibrating_ranks.converted(jobs[1])
    for output, own in (("broken", "llama"), ("gpt-oss-2", "gpt_oss")):
        calibrating_ranks.converted(job(own, tmp_path, "alone-" + own))
        assert digests(tmp_path / output) == digests(tmp_path / f"alone-{own}"), own


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_bytes_do_not_depend_on_the_number_of_processes(count: int, tmp_path: Path) -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [
        *(("mixtral", {}), ("whisper", {}), ("bert_classifier", {}), ("albert", {}), ("t5", {})),
        *(("llama", {"target_bpw": 2.2}), ("gpt2", {"rotation": 0, "group_size": 0})),
    ]
    jobs = [job(name, tmp_path, f"{name}-{count}", **options) for name, options in kinds]
    ended = launched(tmp_path, count, {"jobs": jobs})
    assert [code for code, _ in ended] == [0] * count, ended
    for name, options in kinds:
        calibrating_ranks.converted(job(name, tmp_path, f"{name}-1", **options))
        assert digests(tmp_path / f"{name}-{count}") == digests(tmp_path / f"{name}-1"), name


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1, 2])
def test_another_number_of_processes_goes_on_to_the_same_bytes(dies: int, tmp_path: Path) -> None:
    """Of three one dies, first in the first block and then in the second; two end it."""
    whole, broken = (job("llama", tmp_path, name) for name in ("whole", "broken"))
    calibrating_ranks.converted(whole)
    ended = launched(tmp_path, 3, {"jobs": [broken], "die": [dies, 1]})
    assert ended[dies][0] == 9 and 0 not in [code for code, _ in ended], ended
    assert not solved_blocks(tmp_path / "broken")
    ended = launched(tmp_path, 2, {"jobs": [broken], "die": [dies % 2, 4]})
    assert solved_blocks(tmp_path / "broken") == ["00000-00000.safetensors"]
    ended = launched(tmp_path, 2, {"jobs": [broken]})
    assert [code for code, _ in ended] == [0, 0], ended
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_the_first_process_alone_speaks(tmp_path: Path) -> None:
    source, output, data, _ = job("llama", tmp_path, "packed")
    command = ["convert", source, output, "--dataset", data, "--group-size", "32"]
    command += ["--rotation", "16", "--num-samples", "16"]
    ended = launched(tmp_path, 2, {"cli": command, "die": [1, 4]})
    assert [code for code, _ in ended] == [1, 9]
    (line,) = (line for line in ended[0][1].splitlines() if line.startswith("error:"))
    assert "another process: is gone" in line and "Traceback" not in ended[0][1]
    bad = launched(tmp_path, 2, {"cli": [*command, "--text-column", "text"]})
    assert [code for code, _ in bad] == [1, 1] and bad[1][1] == "", "other options"
    assert bad[0][1].count("error:") == 1
    ended = launched(tmp_path, 2, {"cli": command})
    assert [code for code, _ in ended] == [0, 0]
    assert "calibrated on" in ended[0][1] and ended[1][1] == ""
    again = launched(tmp_path, 2, {"cli": command})
    assert [code for code, _ in again] == [1, 1], "the output is there"
    assert again[0][1].startswith("error:") and again[1][1] == ""


# --- what goes from one process to another ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_the_traffic_is_what_the_documents_say(count: int, tmp_path: Path) -> None:
    """docs/calibration.md, for a model of two blocks; samples are of 24 tokens, one in a batch."""
    kind = job("llama", tmp_path, "packed")
    assert [code for code, _ in launched(tmp_path, count, {"jobs": [kind]})] == [0] * count
    sent: Counter[str] = Counter()
    for rank in range(count):
        sent += Counter(json.loads((tmp_path / f"asked-{count}.{rank}").read_text()))
    hidden, inner, kv = 64, 136, 32
    groups = [(hidden, [hidden, kv, kv]), (hidden, [hidden]), (hidden, [inner] * 2)]
    groups.append((inner, [hidden]))
    sums = tokens = 0
    held = 2  # batches
    for cols, rows in groups:
        solvers = share_out({at: (r + cols) * cols**2 for at, r in enumerate(rows)}, count)
        for solver in set(solvers.values()):
            own = [r for at, r in enumerate(rows) if solvers[at] == solver]
            numbers = cols**2 + 2 * cols + sum(r * cols + 2 * r for r in own)
            each = 4 * numbers + 8 * (1 + len(own))
            sums += each * sum(chunk % count != solver for chunk in range(CHUNKS))
            rest = 24 * 4 * (cols + sum(min(r, 256) for r in own))
            holders = [rank_of(World(0, count), "held", at) for at in range(held)]
            tokens += rest * sum(holder != solver for holder in holders)
    assert sent["sums"] == 2 * sums
    assert sent["tokens"] == 2 * tokens
    weights = sum(cols * sum(rows) for cols, rows in groups)
    assert 0 < sent["solved"] < 2 * (count - 1) * weights


def test_the_largest_go_first_and_to_who_has_least() -> None:
    costs = {"q": 4, "k": 1, "v": 1, "gate": 9, "up": 9}
    assert share_out(costs, 2) == {"q": 0, "k": 1, "v": 1, "gate": 0, "up": 1}
    assert share_out(costs, 1) == dict.fromkeys(costs, 0)
    assert list(share_out(costs, 3)) == list(costs)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
def test_each_batch_has_one_process_and_chunks_do_not_depend_on_their_number(size: int) -> None:
    world = World(0, size)
    for kind in ("train", "held", "report"):
        shares = Counter(rank_of(world, kind, index) for index in range(48))
        assert set(shares) <= set(range(size)) and sum(shares.values()) == 48
    held = [rank_of(world, "train", index) for index in range(3 * CHUNKS)]
    assert held[:CHUNKS] == held[CHUNKS : 2 * CHUNKS] == [k % size for k in range(CHUNKS)]


# --- what several processes do not do -----------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe("itf"), "--part auto"),
        (Recipe("gptq", calibrate=Calibrate("x", reconstruct=3)), "--reconstruct"),
        (Recipe("gptq", calibrate=Calibrate("x", distill=3)), "--distill"),
    ],
    ids=["data", "reconstruct", "distill"],
)
def test_what_is_not_built_for_several_is_refused_by_name(recipe: Recipe, said: str) -> None:
    check_ranks(recipe, 1)
    with pytest.raises(UsageError, match=said) as caught:
        check_ranks(recipe, 2)
    assert str(caught.value).startswith("torchrun: 2 processes")


def test_a_process_that_others_do_not_know_of_is_alone() -> None:
    world = World()
    with world.agreed():
        assert world.all(3) == [3] and world.firsts(4) == 4
    with pytest.raises(UsageError, match="x: y"), world.agreed():
        raise UsageError("x", "y")
    assert not world.sent


def test_a_process_with_weights_of_another_training_is_refused(tmp_path: Path) -> None:
    """Names, forms and options are the same; the weights of one tensor are not."""
    said: list[Any] = []

    class Hearing(World):
        def firsts(self, value: Any, kind: str = "words") -> Any:
            said.append(value)
            return said[0]

        def all(self, value: Any, kind: str = "words") -> list[Any]:
            return [value]

    def tuned(name: str) -> Path:
        source = calibrating.save("llama", tmp_path / name)
        calibrating.change(source, "model.layers.1.mlp.up_proj.weight", lambda t: t + 1e-3)
        return source

    sources = [calibrating.save("llama", tmp_path / name) for name in ("one", "same")]
    recipe = Recipe("gptq", calibrate=Calibrate("x"))
    for rank, source in enumerate(sources):
        assert join(make_plan(source, recipe), Hearing(rank, 2))
    with pytest.raises(UsageError, match="rank 1: has another source"):
        join(make_plan(tuned("tuned"), recipe), Hearing(1, 2))


def test_a_group_that_the_caller_has_made_is_used_and_stays(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with ranks_of_launcher() as world:
            assert (world.rank, world.size) == (0, 1)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
