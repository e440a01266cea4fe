"""The loop of a training: what a step has, whether it was broken off before it or not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_run import assert_same, recipe_of, source_of, text_of

from ternarize.convert.run import convert
from ternarize.qat import schedule
from ternarize.train import loop


def test_a_training_with_zeros_that_ends_right_behind_a_look_goes_on_to_the_same_bytes(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look is at the exact share of zeros, the steps are with that of a sample."""
    monkeypatch.setattr(loop, "LOOKS", 2)
    monkeypatch.setattr(schedule, "SAMPLED", 64)
    source, text = source_of("llama", tmp_path / "source"), text_of(tmp_path / "text.txt", 60)
    recipe = dataclasses.replace(recipe_of(text, steps=4), zeros=0.7)
    convert(source, tmp_path / "whole", recipe)
    step = loop._step

    def broken(job: Any, progressed: Any, *rest: Any) -> Any:
        if progressed.step == 2:
            raise KeyboardInterrupt
        return step(job, progressed, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_step", broken)
        convert(source, tmp_path / "broken", recipe)
    convert(source, tmp_path / "broken", recipe)
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_after_a_break_there_are_gradients(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who trains in a notebook may go on in the same process."""

    def broken(*_: Any) -> Any:
        torch.set_grad_enabled(False)  # as where a signal comes at the end of a no_grad
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_step", broken)
    source, text = source_of("llama", tmp_path / "source"), text_of(tmp_path / "text.txt", 60)
    try:
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "packed", recipe_of(text, steps=4))
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_what_short_samples_are_filled_up_with_counts_for_a_part() -> None:
    lengths = [3, 30, 4, 9, 8, 5]
    samples = [{"input_ids": torch.zeros(n, dtype=torch.int64)} for n in lengths]
    parts = [[len(each["input_ids"]) for each in part] for part in loop.in_parts(samples, 16)]
    assert parts == [[3, 4, 5], [8], [9], [30]]  # 15 positions; 2 of 8 and 9 would be 18
    alike = [{"input_ids": torch.zeros(8, dtype=torch.int64)} for _ in range(5)]
    assert [len(part) for part in loop.in_parts(alike, 16)] == [2, 2, 1]
