"""The error tree: codes, places, hints."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgert import errors

CODES = {
    "EdgertError": 1,
    "ConfigError": 2,
    "FormatError": 3,
    "CapacityError": 4,
    "PlanError": 4,
    "DeviceError": 5,
    "MeasurementError": 5,
    "BackendError": 5,
    "LinkError": 6,
    "LinkTimeout": 6,
    "Cancelled": 130,
}


def test_every_error_is_an_edgert_error_with_a_known_code() -> None:
    found = {
        name: error.exit_code
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, errors.EdgertError)
    }
    assert found == CODES


def test_format_error_names_file_offset_and_tensor() -> None:
    error = errors.FormatError("bad", path=Path("a.gguf"), offset=4096, tensor="x", hint="copy it")
    assert str(error) == "a.gguf, offset 4,096, tensor x: bad"
    assert (error.path, error.offset, error.tensor) == (Path("a.gguf"), 4096, "x")
    assert error.hint == "copy it"


def test_capacity_error_keeps_both_sides() -> None:
    error = errors.CapacityError("no", needed_bytes=2, available_bytes=1)
    assert (error.needed_bytes, error.available_bytes, error.hint) == (2, 1, None)


def test_errors_can_be_caught_by_kind() -> None:
    with pytest.raises(errors.DeviceError):
        raise errors.MeasurementError("slow")
    with pytest.raises(errors.LinkError):
        raise errors.LinkTimeout("late")
