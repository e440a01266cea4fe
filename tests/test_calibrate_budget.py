"""Bits spent by measured sensitivity: within the budget, and where they matter."""

from itertools import groupby
from pathlib import Path

import calibrating
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ternarize.calibrate import budget
from ternarize.calibrate.budget import Offer, _hull, _spend, allocate, count_forms
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import UsageError
from ternarize.files.headers import DTYPES
from ternarize.measure.report import inspect
from ternarize.plans.layout import Plan, TensorPlan
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe
from ternarize.plans.rules import check_fused

Curve = list[tuple[int, float]]


def choices(*pairs: tuple[int, float]) -> list[Offer]:
    return [Offer((), bits, harm) for bits, harm in pairs]


def curve(found: list[Offer]) -> Curve:
    return [(choice.bits, choice.harm) for choice in found]


def test_choices_that_cost_more_and_harm_more_are_left_out() -> None:
    given_choices = choices((10, 5.0), (12, 6.0), (14, 2.0), (14, 3.0), (20, 2.0))
    assert curve(_hull(given_choices)) == [(10, 5.0), (14, 2.0)]


def test_choices_above_the_line_of_their_neighbours_are_left_out() -> None:
    # from 10 to 30 bits the straight line passes (20, 5.0): 6.0 lies above it, 4.0 below
    assert curve(_hull(choices((10, 10.0), (20, 6.0), (30, 0.0)))) == [(10, 10.0), (30, 0.0)]
    assert len(_hull(choices((10, 10.0), (20, 4.0), (30, 0.0)))) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.001, 10)), min_size=1, max_size=8))
def test_a_hull_falls_ever_less_steeply(pairs: Curve) -> None:
    found = curve(_hull(choices(*pairs)))
    assert found[0] == min(pairs)
    assert found[-1][1] == min(harm for _, harm in pairs)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(found[:-1], found[1:], strict=True)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)


def test_bits_go_to_the_step_that_saves_the_most_harm_for_each() -> None:
    steep, flat = choices((10, 9.0), (20, 1.0)), choices((10, 3.0), (20, 2.0))
    taken, least = _spend([flat, steep], 30)
    assert least == 20
    assert curve(taken) == [(10, 3.0), (20, 1.0)]
    assert curve(_spend([flat, steep], 40)[0]) == [(20, 2.0), (20, 1.0)]
    assert curve(_spend([flat, steep], 29)[0]) == [(10, 3.0), (10, 9.0)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 60), st.floats(0.001, 10)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 200),
)
def test_the_budget_is_kept(matrices: list[Curve], budget: int) -> None:
    taken, least = _spend([_hull(choices(*pairs)) for pairs in matrices], budget)
    assert sum(choice.bits for choice in taken) <= max(budget, least)
    assert least == sum(min(bits for bits, _ in pairs) for pairs in matrices)


# --- of a model ---------------------------------------------------------------------------------


def bits_per_weight(tensors: list[TensorPlan]) -> float:
    ternary = [t for t in tensors if t.ternary]
    nbytes = sum(
        DTYPES[dtype].itemsize * torch.Size(shape).numel()
        for t in ternary
        for _, dtype, shape in t.stored()
    )
    return 8 * nbytes / sum(t.info.numel for t in ternary)


def spend(work: Plan, name: str, target: float) -> list[TensorPlan]:
    found = allocate(work.source, work.tensors, [calibrating.inputs(name, 2)], target)
    check_fused((t.choice, t.form) for t in found)
    assert [t.name for t in found] == [t.name for t in work.tensors]
    assert [t for t in found if not t.ternary] == [t for t in work.tensors if not t.ternary]
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(
        calibrating.save("llama", tmp_path_factory.mktemp("llama") / "source"), Recipe()
    )


def test_more_bits_are_spent_the_more_there_are(llama: Plan) -> None:
    spent = []
    for target in (2.0, 2.3, 3.0, 16.0):
        found = spend(llama, "llama", target)
        spent.append(bits_per_weight(found))
        assert spent[-1] <= target
    assert spent == sorted(spent)
    assert len(set(spent)) == len(spent)
    assert {t.planes for t in found if t.ternary} == {2}
    assert sum(count_forms(found).values()) == sum(t.ternary for t in llama.tensors)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are large enough that tables of frequencies pay."""
    source = tmp_path_factory.mktemp("wide") / "source"
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}
    tiny_models.save("llama", source, torch.float32, **sizes)
    return source


def test_below_the_bits_of_base_3_there_are_more_zeros(
    wide: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "SAMPLES", 1)
    data = calibrating.data("llama", tmp_path)
    zeros = []
    for target in (0.8, 1.3):
        bits = {"scale_bits": 6, "codec": "rans", "target_bpw": target}
        packed = tmp_path / f"packed-{target}"
        record = convert(wide, packed, calibrating.recipe(data, num_samples=8, **bits))
        totals = inspect(packed)["totals"]
        assert 0.85 * target < totals["ternary_bpw"] <= 1.01 * target
        zeros.append(totals["sparsity"])
        forms = record["calibration"]["forms"]
        assert sum(forms.values()) == 7 and any("% zeros" in form for form in forms)
        assert verify(packed, wide)["source_compared"]
    assert zeros[0] > zeros[1] + 0.1


def test_with_bits_enough_no_zeros_are_asked_for(wide: Path) -> None:
    work = make_plan(wide, Recipe())
    batches = [calibrating.inputs("llama", 2)]
    found = allocate(work.source, work.tensors[:4], batches, 2.2, coded=True)
    assert {t.zeros for t in found if t.ternary} == {None}


def test_less_than_zeros_can_give_is_refused(wide: Path) -> None:
    work = make_plan(wide, Recipe())
    with pytest.raises(UsageError, match=r"0\.2; this model takes at least 0\.\d+ bits"):
        allocate(work.source, work.tensors[:4], [calibrating.inputs("llama", 2)], 0.2, coded=True)


def test_less_than_the_least_is_refused(llama: Plan) -> None:
    with pytest.raises(UsageError, match=r"1\.6; this model takes at least 1\.\d+ bits"):
        spend(llama, "llama", 1.6)


def test_a_sensitive_matrix_gets_more_bits_than_its_like(tmp_path: Path) -> None:
    directory = calibrating.save("llama", tmp_path / "source")
    like, sensitive = (f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1))
    calibrating.change(directory, sensitive, lambda w: w * 8)
    work = make_plan(directory, Recipe())
    spent = []
    for target in (2.1, 2.3):
        found = {t.name: t for t in spend(work, "llama", target)}
        spent.append([bits_per_weight([found[name]]) for name in (like, sensitive)])
    assert all(more >= less for less, more in spent)
    assert any(more > less for less, more in spent)


def test_the_stages_of_a_conversion_are_told_one_after_the_other(tmp_path: Path) -> None:
    source, data = (
        calibrating.save("llama", tmp_path / "source"),
        calibrating.data("llama", tmp_path),
    )
    recipe = calibrating.recipe(data, num_samples=8, target_bpw=2.2)
    calls: list[tuple[int, int, str, str]] = []
    convert(source, tmp_path / "packed", recipe, progress=lambda *call: calls.append(call))
    stages = [key for key, _ in groupby(stage for _, _, _, stage in calls)]
    assert stages == ["measuring sensitivity", "calibrating", "packing"]
    assert all(0 <= done <= total for done, total, _, _ in calls)
    calls.clear()
    verify(tmp_path / "packed", source, progress=lambda *call: calls.append(call))
    assert {stage for _, _, _, stage in calls} == {"verifying"}


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "gpt_oss"])
def test_tensors_of_one_parameter_share_a_form(name: str, tmp_path: Path) -> None:
    work = make_plan(calibrating.save(name, tmp_path / "source"), Recipe())
    found = spend(work, name, 2.6)  # check_fused is in `spend`
    assert 1.6 < bits_per_weight(found) <= 2.6
    forms = {(t.group_size, t.planes) for t in found if t.ternary}
    assert len(forms) > 1
