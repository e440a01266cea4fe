"""What --dry-run --parts foretells, from a configuration alone, beside what is then counted."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from typer.testing import CliRunner

from ternarize.calibrate.ranks import rank_of, share_out
from ternarize.cli.app import app
from ternarize.convert import forecast as forecasts
from ternarize.convert.forecast import experts_of_a_token, forecast, pace_of
from ternarize.plans.layout import TensorPlan
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.ranks import World


def planned(name: str, folder: Path, recipe: Recipe, **sizes: int) -> Any:
    """A plan from the configuration of a tiny model, without weights."""
    config = (tiny_models.CONFIGS | tiny_models.MORE)[name]()
    config.update(sizes)
    config.save_pretrained(folder)
    return make_plan(folder, recipe, config_only=True)


@pytest.mark.parametrize("count", [1, 3])
def test_parts_read_and_write_all_of_it_together(count: int, tmp_path: Path) -> None:
    plan = planned("llama", tmp_path, Recipe("itf"))
    found = forecast(plan, count, bandwidth=1e9)
    assert len(found["ranks"]) == count
    read = sum(row["read_bytes"] for row in found["ranks"])
    assert read == sum(t.info.nbytes for t in plan.tensors if not t.tied_to)
    for row in found["ranks"]:
        assert row["sent_bytes"] == 0 and row["memory_bytes"] == plan.convert_memory(1)
        moved = row["read_bytes"] + row["written_bytes"]
        assert row["transfer_seconds"] == pytest.approx(moved / 1e9)


def calibration(samples: int) -> Recipe:
    return Recipe("gptq", calibrate=Calibrate("x", num_samples=samples, seq_len=512))


@pytest.mark.parametrize("count", [2, 4])
def test_what_is_sent_is_foretold_from_above_and_nearly(count: int, tmp_path: Path) -> None:
    """Against docs/calibration.md, which test_calibrate_ranks.py holds against real processes."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "head_dim": 128}
    plan = planned("llama", tmp_path, calibration(64), **sizes)
    foretold = sum(row["sent_bytes"] for row in forecast(plan, count)["ranks"])
    total = 0
    heads, kv = 4 * 128, 2 * 128
    groups = [(512, [heads, kv, kv]), (heads, [512]), (512, [1408] * 2), (1408, [512])]
    for cols, rows in groups:
        solvers = share_out({at: (r + cols) * cols**2 for at, r in enumerate(rows)}, count)
        for solver in set(solvers.values()):
            own = [r for at, r in enumerate(rows) if solvers[at] == solver]
            chunk = 4 * cols**2 + 8 * cols + 8 + sum(4 * r * cols + 8 * r + 8 for r in own)
            total += chunk * sum(k % count != solver for k in range(8))
            if rank_of(World(0, count), "held", 0) != solver:  # six samples, in one batch
                total += 6 * 512 * 4 * (cols + sum(min(r, 256) for r in own))
    weights = sum(cols * sum(rows) for cols, rows in groups)
    total += (count - 1) * 2 * int(weights * 1.75 / 8)
    assert 2 * total <= foretold <= 1.35 * 2 * total


def test_experts_go_by_the_tokens_that_meet_them_and_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "_seconds", lambda work: 1e-3)  # of a product, on any machine
    plan = planned("mixtral", tmp_path, calibration(16), intermediate_size=1024)
    assert experts_of_a_token(plan.source.config) == 2
    one, two = (forecast(plan, count)["ranks"][0] for count in (1, 2))
    assert one["sent_bytes"] == 0 < two["sent_bytes"]
    assert two["memory_bytes"] < one["memory_bytes"]
    assert (one["sums_bytes"], two["sums_bytes"]) == (4 * 4 * 1024**2, 2 * 4 * 1024**2)
    assert two["processor_seconds"] < 0.8 * one["processor_seconds"]
    assert experts_of_a_token({"text_config": {"num_experts_per_tok": 3}}) == 3
    assert experts_of_a_token({"num_hidden_layers": 3}) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_experts_in_tensors_of_their_own_cost_what_those_of_one_tensor_do(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "_seconds", lambda work: 1e-3)
    apart = planned("mixtral", tmp_path, calibration(16), intermediate_size=1024)
    stacks: dict[str, list[TensorPlan]] = {}
    for t in apart.tensors:
        stacks.setdefault(re.sub(r"experts\.\d+", "experts", t.name), []).append(t)
    joined = [_stacked(name, stack) for name, stack in stacks.items()]
    assert len(apart.tensors) > len(joined)
    whole = replace(apart.shards[0], tensors=tuple(joined))
    plans = apart, replace(apart, shards=[whole])
    one, other = (forecast(plan, count)["ranks"][0] for plan in plans)
    assert one["processor_seconds"] == pytest.approx(other["processor_seconds"])
    assert one["memory_bytes"] == other["memory_bytes"]
    assert one["sent_bytes"] == pytest.approx(other["sent_bytes"], rel=1e-3)


def test_several_forecasts_are_of_one_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second would find the machine half as fast."""
    measured = iter([1.0, 2.0])
    monkeypatch.setattr(forecasts, "_seconds", lambda work: next(measured))
    plan = planned("llama", tmp_path, Recipe("itf"))
    pace = pace_of(plan)
    rows = [forecast(plan, 2, pace=pace, threads=threads)["ranks"][0] for threads in (1, 4)]
    assert rows[0]["processor_seconds"] == 4 * rows[1]["processor_seconds"]
    twice = forecast(plan, 2)["ranks"][0]
    assert twice["processor_seconds"] == 2 * rows[0]["processor_seconds"]


def _stacked(name: str, tensors: list[TensorPlan]) -> TensorPlan:
    """The tensors of some experts as one."""
    first, count = tensors[0], len(tensors)
    if count == 1:
        return first
    info = replace(first.info, name=name, shape=(count, *first.info.shape))
    return replace(first, info=info, shape=(count, *first.shape))


def test_a_plan_without_a_ternary_tensor_in_a_block_has_a_forecast(tmp_path: Path) -> None:
    plan = planned("llama", tmp_path, calibration(16))
    bare = replace(plan, shards=plan.shards[:0])
    (row,) = forecast(bare, 1)["ranks"]
    assert row["memory_bytes"] == row["processor_seconds"] == 0


def test_the_command_says_it_for_each_process(tmp_path: Path) -> None:
    planned("llama", tmp_path / "m", Recipe("itf"))
    words = ["convert", str(tmp_path / "m"), str(tmp_path / "o"), "--dry-run", "--parts", "3"]
    shown = CliRunner().invoke(app, [*words, "--bandwidth", "2.5"])
    assert shown.exit_code == 0, shown.output
    assert "at 2.5 GB/s" in shown.output and "processes" in shown.output
    table = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["forecast"]
    assert len(table["ranks"]) == 3 and "transfer_seconds" not in table["ranks"][0]
    fitted = CliRunner().invoke(app, [*words, "--dataset", "default"])
    assert fitted.exit_code == 0 and "2 to 3" in fitted.output
    assert "are sums over the samples" in fitted.output.splitlines()[-1]


def test_a_plan_that_is_refused_has_no_forecast_and_a_stream_is_not_cut(tmp_path: Path) -> None:
    planned("llama", tmp_path / "m", Recipe("itf"))
    words = ["convert", str(tmp_path / "m"), str(tmp_path / "o"), "--dry-run", "--parts", "3"]
    for more in ([], ["--dataset", "default"]):
        found = CliRunner().invoke(app, [*words, *more, "--keep", ".*", "--json"])
        assert found.exit_code == 1 and "forecast" not in json.loads(found.stdout)
    ranks = json.loads(CliRunner().invoke(app, [*words, "--stream", "--json"]).stdout)["forecast"]
    assert [bool(row["read_bytes"]) for row in ranks["ranks"]] == [True, False, False]  # one file


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "2"], "--dry-run"),
        (["--dry-run", "--bandwidth", "1"], "--parts N"),
        (["--dry-run", "--parts", "2", "--bandwidth", "0"], "above 0"),
        (["--dry-run", "--parts", "2", "--bandwidth", "nan"], "above 0"),
        (["--dry-run", "--parts", "2", "--dataset", "default", "--distill", "3"], "and --distill"),
        (["--dry-run", "--parts", "2", "--dataset", "default", "--reconstruct", "3"], "--reconstr"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_foretold_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["convert", "examples/tiny-llama", str(tmp_path / "o"), *words])
    assert found.exit_code == 2 and said in found.output and found.output.count("\n") == 1
