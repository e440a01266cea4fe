"""The memory of a training: what a plan says of it, and blocks that run again for less of it."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import calibrating
import pytest
import tiny_models
import torch
from test_train_run import recipe_of, source_of, text_of
from torch import Tensor, nn

from ternarize import qat
from ternarize.calibrate.blocks import Blocks
from ternarize.calibrate.lanes import hidden_of
from ternarize.convert.run import convert
from ternarize.errors import UsageError
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe
from ternarize.train.objectives import objective
from ternarize.train.optimizer import make_optimizer
from ternarize.train.recompute import recompute_blocks
from ternarize.train.run import open_training
from ternarize.train.students import make_pair


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """Of all parameters, and the bytes that the backward pass was kept for besides them."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = hidden_of(model(**inputs)).float().square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())


def prepared(name: str, directory: Path, **sizes: int) -> tuple[nn.Module, list[str]]:
    """A model with latent weights as the trainer has it, and the paths of its blocks."""
    tiny_models.save(name, directory, torch.float32, **sizes)
    model = qat.prepare(tiny_models.build(name, torch.float32, **sizes), group_size=32)
    return model.eval(), calibrating.blocks_of(directory)[1].paths


def break_off(source: Path, output: Path, recipe: Recipe) -> None:
    """Begin a conversion with a training, and end it as by Ctrl-C after two steps."""

    def stop(step: int, figures: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, output, recipe, log=stop)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "whisper", "albert", "mamba"])
def test_gradients_are_the_same_from_less_memory(name: str, tmp_path: Path) -> None:
    model, paths = prepared(name, tmp_path)
    again = copy.deepcopy(model)
    recompute_blocks(again, paths)
    inputs = calibrating.inputs(name, 2)
    expected, whole = gradients(model, inputs)
    found, least = gradients(again, inputs)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):  # sums of several uses in another order
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    assert name != "llama" or all(map(torch.equal, found, expected))
    assert least < whole / 2


def test_what_a_block_keeps_is_what_goes_into_it(tmp_path: Path) -> None:
    kept = []
    for layers in (2, 4):
        model, paths = prepared("llama", tmp_path / str(layers), num_hidden_layers=layers)
        recompute_blocks(model, paths)
        kept.append(gradients(model, calibrating.inputs("llama", 2))[1])
    hidden = 2 * 24 * 64 * 4  # samples, tokens, width, bytes
    assert kept[1] - kept[0] == 2 * hidden


def test_nothing_runs_twice_without_gradients(tmp_path: Path) -> None:
    model, paths = prepared("llama", tmp_path)
    runs: list[int] = []
    model.get_submodule(paths[0] + ".mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    recompute_blocks(model, paths)
    with torch.no_grad():
        model(**calibrating.inputs("llama", 2))
    assert len(runs) == 1
    gradients(model, calibrating.inputs("llama", 2))
    assert len(runs) == 3


def test_a_training_that_was_broken_off_may_go_on_with_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("llama", tmp_path / "source")
    text = text_of(tmp_path / "text.txt", 60)
    recipe = recipe_of(text, steps=3)
    convert(source, tmp_path / "whole", recipe)
    wrapped = list[str]()

    def watched(model: Any, paths: list[str]) -> None:
        wrapped.extend(paths)
        recompute_blocks(model, paths)

    monkeypatch.setattr("ternarize.train.run.recompute_blocks", watched)
    break_off(source, tmp_path / "packed", recipe)
    assert not wrapped
    assert recipe.train is not None
    less = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, recompute=True))
    convert(source, tmp_path / "packed", less)
    assert wrapped == ["model.layers.0", "model.layers.1"]
    one, other = (tmp_path / name / "model.safetensors" for name in ("packed", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_fewer_tokens_at_a_time_can_be_chosen_after_a_break(tmp_path: Path) -> None:
    source, text = source_of("llama", tmp_path / "source"), text_of(tmp_path / "text.txt", 60)
    recipe = recipe_of(text, steps=4)
    whole = convert(source, tmp_path / "whole", recipe)

    break_off(source, tmp_path / "packed", recipe)
    assert recipe.train is not None
    less = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, micro_batch=16))
    record = convert(source, tmp_path / "packed", less)
    looks = [dict(map(tuple, each["training"]["held_out"])) for each in (whole, record)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "adafactor"}, {"objective": "text"}, {"all_weights": True}],
    ids=str,
)
def test_a_plan_says_what_a_training_will_hold(options: dict[str, Any], tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "source", torch.bfloat16)
    text = text_of(tmp_path / "text.txt", 60)
    plan = make_plan(source, recipe_of(text, group_size=-1, **options))
    training = plan.recipe.training
    assert training is not None
    data = open_training(plan)
    blocks = Blocks(plan.source, [t.name for t in plan.tensors if t.ternary])
    tensors = {t.name: t for t in plan.tensors}
    pair = make_pair(blocks, {}, tensors, training, "learned", "none", "cpu")
    groups = [{"params": list(pair.trained().values()), "lr": 1e-3}]
    optimizer = make_optimizer(groups, training.optimizer)
    loss, _ = objective(pair, data.common, 1, 0, 0, 1.0)(data.held[:4])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    models = [model for model in (pair.student, pair.teacher) if model is not None]
    held = [parameter for model in models for parameter in model.parameters()]
    held += [p.grad for p in pair.trained().values() if p.grad is not None]
    held += [v for own in optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
    storages = {s.data_ptr(): s.nbytes() for s in (each.untyped_storage() for each in held)}
    assert sum(storages.values()) == pytest.approx(plan.train_memory(), rel=0.04)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="no repeated blocks"):
        recompute_blocks(tiny_models.build("llama"), [])
