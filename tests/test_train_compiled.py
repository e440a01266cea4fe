"""`train --compile`: blocks that torch compiles, for shorter steps."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import calibrating
import pytest
import tiny_models
import torch
from test_train_recompute import break_off, gradients, prepared
from test_train_run import recipe_of, source_of, text_of

from ternarize.convert.run import convert
from ternarize.errors import UsageError
from ternarize.train.compiled import compile_blocks


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs are traced as for a compiler, and run as they are; says how many."""
    graphs: list[int] = []

    def run(graph: Any, inputs: object) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, backend=run, **options))
    torch._dynamo.reset()
    return graphs


def test_gradients_are_the_same(tmp_path: Path, traced: list[int]) -> None:
    model, paths = prepared("llama", tmp_path, num_hidden_layers=4)
    inputs = calibrating.inputs("llama", 2)
    expected, _ = gradients(model, inputs)
    expected = [each.clone() for each in expected]
    model.zero_grad()
    compile_blocks([model], paths, "cpu")
    found, _ = gradients(model, inputs)
    assert len(traced) == 2, "the trial, and the blocks: one graph for all"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_that_was_broken_off_may_go_on_compiled(
    recompute: bool, tmp_path: Path, traced: list[int]
) -> None:
    source, text = source_of("llama", tmp_path / "source"), text_of(tmp_path / "text.txt", 60)
    recipe = recipe_of(text, steps=3)
    whole = convert(source, tmp_path / "whole", recipe)

    break_off(source, tmp_path / "packed", recipe)
    assert not traced
    assert recipe.train is not None
    train = dataclasses.replace(recipe.train, compile=True, recompute=recompute)
    record = convert(source, tmp_path / "packed", dataclasses.replace(recipe, train=train))
    assert traced
    looks = [dict(map(tuple, each["training"]["held_out"])) for each in (whole, record)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
def test_compiled_for_real_a_training_ends_alike(tmp_path: Path) -> None:
    source, text = source_of("llama", tmp_path / "source"), text_of(tmp_path / "text.txt", 60)
    recipe = recipe_of(text, steps=3)
    whole = convert(source, tmp_path / "whole", recipe)
    assert recipe.train is not None
    train = dataclasses.replace(recipe.train, compile=True)
    record = convert(source, tmp_path / "packed", dataclasses.replace(recipe, train=train))
    looks = [dict(map(tuple, each["training"]["held_out"])) for each in (whole, record)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-3)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="no repeated blocks"):
        compile_blocks([tiny_models.build("llama")], [], "cpu")


def test_where_nothing_can_be_compiled_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(UsageError, match="for cpu: No working C\\+\\+ compiler found") as caught:
        compile_blocks([tiny_models.build("llama")], ["model.layers.0"], "cpu")
    assert "leave --compile out" in str(caught.value)
