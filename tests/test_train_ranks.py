"""Several processes that train one model: the bytes of one, whatever their number."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import calibrating
import pytest
import torch
import training_ranks
from test_calibrate_ranks import launched
from test_train_run import assert_same, source_of, text_of
from torch import Tensor
from two_processes import Told

from ternarize.convert.parts import check_ranks
from ternarize.errors import CheckpointError, UsageError
from ternarize.plans.recipe import Calibrate, Recipe, Train
from ternarize.ranks import World
from ternarize.train import parallel
from ternarize.train.divided import check_divided
from ternarize.train.loop import check_rounds, tokens_at_once
from ternarize.train.parallel import Exchange, Gradients, check_alike


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in the processes."""
    for module, name, value in training_ranks.QUICK:
        monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job(name: str, folder: Path, output: str, **options: Any) -> list[Any]:
    """A training of a tiny model."""
    source, text = folder / name, folder / "text.txt"
    if not source.exists():
        source_of(name, source)
        text_of(text)
    if name in ("vit", "clip", "mixtral", "albert"):
        text = calibrating.data(name, folder, 40)
    return [str(source), str(folder / output), str(text), options]


def launch(folder: Path, count: int, asked: dict[str, Any]) -> list[tuple[int, str]]:
    return launched(folder, count, asked, training_ranks.__file__)


def step_of(output: Path) -> int:
    """How far the state of a broken training is."""
    partial = output.with_name(output.name + ".partial")
    return training_ranks.step_of(partial / ".calibration" / "training")


def noted(folder: Path, count: int, rank: int) -> dict[str, int]:
    """What stood in a process when its last training began."""
    found: dict[str, int] = json.loads((folder / f"asked-{count}.weights-{rank}").read_text())
    return found


def test_two_processes_give_the_bytes_of_one_which_goes_on_when_one_of_them_dies(
    tmp_path: Path,
) -> None:
    """Two rounds in a step; of the second training the second process dies in the third step."""
    jobs = [job("llama", tmp_path, name, steps=6) for name in ("two", "broken")]
    ended = launch(tmp_path, 2, {"jobs": jobs, "die": [1, "add", 6]})
    assert ended[1][0] == -9 and ended[0][0] != 0, ended
    assert "another process: is gone" in ended[0][1]
    assert step_of(tmp_path / "broken") == 2
    training_ranks.trained(jobs[1])
    training_ranks.trained(job("llama", tmp_path, "one", steps=6))
    assert_same(tmp_path / "two", tmp_path / "one")
    assert_same(tmp_path / "broken", tmp_path / "one")


ROWS = {"num_samples": 32, "batch": 1024, "micro_batch": 280, "train_len": None}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", ROWS),
    "images": ("vit", ROWS),
    "two towers": ("clip", ROWS),
    "one block over and over": ("albert", ROWS),
    "encoder": ("bert", {}),
    "encoder-decoder": ("t5", {"batch": 128}),  # whose samples are of twice as many tokens
    "experts met by few": ("switch", {"batch": 128}),
    "blocks that share weights": ("zamba2", {}),
    "text": ("llama", {"objective": "text", "all_weights": True, "micro_batch": 20}),
    "ends": ("llama_tied", {"head": "int8", "embeddings": "int8", "recompute": True}),
    "factored": ("gpt2", {"optimizer": "adafactor", "group_size": 0}),
    "nothing": ("llama", {"from_scratch": True, "objective": "text", "lr": 0.01}),
    "calibrated": ("gemma3_text", {"num_samples": 8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(count: int, tmp_path: Path) -> None:
    """Of four or five micro-batches three processes leave one alone in the last round."""
    for number in (count, 1):
        names = ((own, f"{own}-{number}") for own in KINDS)
        jobs = [job(KINDS[own][0], tmp_path, output, **KINDS[own][1]) for own, output in names]
        ended = launch(tmp_path, number, {"jobs": jobs})
        assert [code for code, _ in ended] == [0] * number, ended
    for own in KINDS:
        assert_same(tmp_path / f"{own}-{count}", tmp_path / f"{own}-1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "steps"),
    [
        ([0, "add", 6], None),
        ([1, "take", 3], 2),
        ([1, "held", 2], 2),
        ([2, "held", 1], None),
        ([0, "save", 1], None),
    ],
    ids=str,
)
def test_another_number_of_processes_goes_on_to_the_same_bytes(
    dies: list[Any], steps: int | None, tmp_path: Path
) -> None:
    """Of three one dies, then of two; one ends it. steps: of the state that is left, if one is."""
    whole, broken = (job("llama", tmp_path, name) for name in ("whole", "broken"))
    training_ranks.trained(whole)
    ended = launch(tmp_path, 3, {"jobs": [broken], "die": dies})
    assert ended[dies[0]][0] == -9 and ended[0][0] != 0, ended
    if steps is not None:
        assert step_of(tmp_path / "broken") == steps
    ended = launch(tmp_path, 2, {"jobs": [broken], "die": [1, "take", 3]})
    assert ended[1][0] == -9 and ended[0][0] != 0, ended
    assert step_of(tmp_path / "broken") == (steps or 0) + 2
    training_ranks.trained(broken)
    assert_same(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_starts_a_training_again(tmp_path: Path) -> None:
    own = job("llama", tmp_path, "packed")
    asked = tmp_path / "asked-2.json"
    asked.write_text(json.dumps({"jobs": [own], "die": [1, "take", 3]}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "--max-restarts=1", training_ranks.__file__, str(asked)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert noted(tmp_path, 2, 0)["step"] == 2, "what began last went on from a state"
    training_ranks.trained(job("llama", tmp_path, "whole"))
    assert_same(tmp_path / "packed", tmp_path / "whole")


def command(job: list[Any], *more: str) -> list[str]:
    """The same on the command line, eight steps."""
    source, output, text, _ = job
    given = "--method itf --group-size 32 --train-len 16 --batch 64 --micro-batch 16 --steps 8"
    return ["train", source, output, "--texts", text, *given.split(), *more]


@pytest.mark.slow
def test_the_first_process_alone_speaks(tmp_path: Path) -> None:
    own = job("llama", tmp_path, "packed")
    words = command(own, "--report-to", "tensorboard")
    ended = launch(tmp_path, 2, {"cli": words, "die": [1, "take", 3]})
    assert [code for code, _ in ended] == [1, -9], ended
    (line,) = (line for line in ended[0][1].splitlines() if line.startswith("error:"))
    assert "another process: is gone" in line and "Traceback" not in ended[0][1]
    asked = {"cli": [*words, "--shard"], "die": [1, "take", 3], "signal": signal.SIGTERM}
    ended = launch(tmp_path, 2, asked)
    assert [code for code, _ in ended] == [130, 1], ended
    assert ended[0][1].strip() == "interrupted; the same command goes on from here"
    assert step_of(tmp_path / "packed") == 5, "three more than the two of which a state was"
    asked = {"cli": command(job("llama", tmp_path, "few"), "--batch", "16")}
    few = launch(tmp_path, 2, asked)
    assert [code for code, _ in few] == [2, 1], "one micro-batch"
    assert few[0][1].count("error:") == 1 and "--batch 32" in few[0][1]
    assert "error:" not in few[1][1]
    ended = launch(tmp_path, 2, {"cli": words})
    assert [code for code, _ in ended] == [0, 0], ended
    assert "trained on" in ended[0][1] and ended[1][1] == ""


# --- blocks that are divided ----------------------------------------------------------------------


def looks(output: Path) -> list[float]:
    """The held-out losses of a training."""
    record = json.loads((output / "ternarize.json").read_text())
    return [loss for _, loss in record["training"]["held_out"]]


def near(expected: list[float]) -> Any:
    """Within what sums in another order change; losses stand there with six decimals."""
    return pytest.approx(expected, rel=1e-5, abs=1.5e-6)


def test_two_processes_have_a_half_of_the_blocks_each_and_train_as_one(tmp_path: Path) -> None:
    """In the fifth step one dies: the state of the fourth goes on in one, which has all of it."""
    divided = job("llama", tmp_path, "divided", steps=6, shard=True)
    ended = launch(tmp_path, 2, {"jobs": [divided], "die": [1, "add", 10], "save_every": -1})
    assert ended[1][0] == -9 and ended[0][0] != 0, ended
    assert "another process: is gone" in ended[0][1]
    assert step_of(tmp_path / "divided") == 4
    alone = [job("llama", tmp_path, name, steps=6) for name in ("divided", "whole")]
    assert launch(tmp_path, 1, {"jobs": alone})[0][0] == 0
    whole = noted(tmp_path, 1, 0)
    assert whole["own"] == whole["all"]
    for here in (noted(tmp_path, 2, rank) for rank in range(2)):
        assert here["own"] < 0.53 * here["all"], "what does not divide by two is small"
        assert here["held"] < 0.7 * whole["held"]
    found, expected = looks(tmp_path / "divided"), looks(tmp_path / "whole")
    assert found == near(expected)
    assert found[-1] < 0.99 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_any_model_is_divided(count: int, tmp_path: Path) -> None:
    kinds = [own for own in KINDS if own not in ("factored", "nothing")]
    for number in (count, 1):
        jobs = []
        for own in kinds:
            name, how = KINDS[own]
            shared = {"shard": True} if number > 1 else {}
            jobs.append(job(name, tmp_path, f"{own}-{number}", **how, **shared))
        ended = launch(tmp_path, number, {"jobs": jobs})
        assert [code for code, _ in ended] == [0] * number, ended
    for own in kinds:
        found, expected = looks(tmp_path / f"{own}-{count}"), looks(tmp_path / f"{own}-1")
        assert found == near(expected), own


@pytest.mark.slow
def test_a_divided_training_goes_on_with_another_number_and_whole_and_back(tmp_path: Path) -> None:
    whole = job("llama", tmp_path, "whole", steps=8)
    training_ranks.trained(whole)
    broken = job("llama", tmp_path, "broken", steps=8)
    parts = [*broken[:3], {**broken[3], "shard": True}]
    for count, own, steps in ((2, broken, 2), (3, parts, 4), (2, parts, 6)):
        asked = {"jobs": [own], "die": [1, "take", 3], "save_every": -1}
        ended = launch(tmp_path, count, asked)
        assert ended[1][0] == -9 and ended[0][0] != 0, ended
        assert step_of(tmp_path / "broken") == steps
    ended = launch(tmp_path, 2, {"jobs": [parts]})
    assert [code for code, _ in ended] == [0, 0], ended
    found = looks(tmp_path / "broken")
    # a trit that falls the other way is seen in a model this small
    assert found == pytest.approx(looks(tmp_path / "whole"), rel=1e-3)


# --- what goes from one process to another ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_the_traffic_is_what_the_documents_say(count: int, tmp_path: Path) -> None:
    """docs/training.md: of four micro-batches a step, in so many rounds."""
    own = job("llama", tmp_path, "packed", steps=3)
    assert [code for code, _ in launch(tmp_path, count, {"jobs": [own]})] == [0] * count
    sent: Counter[str] = Counter()
    for rank in range(count):
        sent += Counter(json.loads((tmp_path / f"asked-{count}.{rank}").read_text()))
    weights = noted(tmp_path, count, 0)["all"]
    pieces, rest = divmod(weights, 10_000)
    shares = pieces * -(-10_000 // count) + -(-rest // count)
    assert sent["gradients"] == 3 * (4 + count) * (count - 1) * shares * 4


def test_weights_go_in_pieces_and_each_once() -> None:
    pieces = list(parallel._pieces([25_000, 3, 7_000, 0, 8_000]))
    assert [sum(s.last - s.first for s in piece) for piece in pieces] == [10_000] * 4 + [3]
    found = {(s.at, k) for piece in pieces for s in piece for k in range(s.first, s.last)}
    assert len(found) == 40_003


# --- what several processes do not do -----------------------------------------------------------


def test_a_process_that_has_come_to_other_weights_ends_all() -> None:
    weights = {"a": torch.tensor([1.0, 2.0])}
    bits = [int(weights["a"].view(torch.int32).sum())]
    exchange = Exchange(None, torch.device("cpu"))
    Gradients(Told(bits), weights, exchange).check_same(7)
    with pytest.raises(CheckpointError, match="rank 1: has other weights after step 7"):
        Gradients(Told([bits[0] + 1]), weights, exchange).check_same(7)


def test_a_process_with_another_teacher_is_refused() -> None:
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    said: list[Any] = []

    class Hearing(World):
        def all(self, value: Any, kind: str = "words") -> list[Any]:
            said.append(value)
            return [said[0], value]

    world = Hearing(1, 2)
    check_alike(world, [one], torch.float32)
    check_alike(world, [one], torch.float32)
    with pytest.raises(UsageError, match="rank 1: has another teacher or start"):
        check_alike(world, [other], torch.float32)


def test_one_process_leaves_gradients_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    (2 * weight).sum().backward()  # type: ignore[no-untyped-call]
    gradients = Gradients(World(), {"a": weight})
    assert gradients.add("said") == ["said"]
    gradients.take()
    assert isinstance(weight.grad, Tensor) and weight.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("count", "options", "length", "said"),
    [
        (2, {}, 256, None),
        (3, {}, 256, "--batch 6144"),
        (4, {"micro_batch": 1024}, 256, None),
        (4, {"micro_batch": 1024}, 2048, "which is 2 micro-batches.*--batch 8192"),
        (4, {"micro_batch": 64, "batch": 512}, 256, "which is 2 micro-batches.*--batch 1024"),
        (1, {"batch": 8}, 256, None),
    ],
)
def test_each_process_has_a_micro_batch(
    count: int, options: dict[str, Any], length: int, said: str | None
) -> None:
    """By the samples that there are, whether --train-len says how long they are or not."""
    given = Train(steps=1, **options), tokens_at_once("cpu"), count
    samples = [{"input_ids": torch.zeros(length)}] * 3
    if said is None:
        check_rounds(*given, samples)
        return
    with pytest.raises(UsageError, match=f"torchrun: {count} processes.*{said}"):
        check_rounds(*given, samples)


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (1, {}, "--shard: one process; expected several.*torchrun"),
        (2, {"optimizer": "adafactor"}, "with --optimizer adafactor"),
        (2, {"compile": True}, "with --compile"),
    ],
)
def test_blocks_are_not_always_divided(count: int, options: dict[str, Any], said: str) -> None:
    check_divided(Train(steps=1, **options), count)
    with pytest.raises(UsageError, match=said):
        check_divided(Train(steps=1, shard=True, **options), count)


def test_a_training_is_for_several_processes_and_the_one_of_distill_is_not() -> None:
    check_ranks(Recipe("itf", train=Train(("x",), steps=3)), 2)
    check_ranks(Recipe("gptq", train=Train(("x",), steps=3), calibrate=Calibrate("x")), 2)
    with pytest.raises(UsageError, match="--distill.*ternarize train"):
        check_ranks(Recipe("gptq", calibrate=Calibrate("x", distill=3)), 2)
    with pytest.raises(UsageError, match="--parts: 2 processes, and a training"):
        check_ranks(Recipe("itf", train=Train(("x",), steps=3)), 2, "--parts")
