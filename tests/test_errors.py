"""Errors: four parts, one line."""

import copy
import pickle

import pytest

from ternarize.errors import CheckpointError, TernarizeError

PARTS = ("a.safetensors: lm_head.weight", "3 of 64 weights are NaN", "finite ones", "Repair it")


@pytest.mark.parametrize(
    "parts, line", [(4, "{}: {}; expected {}. {}."), (3, "{}: {}; expected {}."), (2, "{}: {}.")]
)
def test_the_message_is_made_from_the_parts(parts: int, line: str) -> None:
    assert str(TernarizeError(*PARTS[:parts])) == line.format(*PARTS)


def test_an_error_can_do_without_what_was_expected() -> None:
    assert str(TernarizeError("x", "is broken", remedy="Mend it")) == "x: is broken. Mend it."


def test_programs_read_the_parts() -> None:
    error = CheckpointError(*PARTS)
    assert (error.where, error.found, error.expected, error.remedy) == PARTS


def test_an_error_survives_a_pickle_and_a_copy() -> None:
    error = CheckpointError(*PARTS)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is CheckpointError and str(again) == str(error)
        assert again.remedy == error.remedy


def test_what_is_around_its_place_stands_in_front() -> None:
    error = CheckpointError(*PARTS).within("model")
    assert type(error) is CheckpointError and str(error) == "model: " + str(CheckpointError(*PARTS))
    assert error.where == "model: " + PARTS[0]
