"""Frozen types survive JSON; wrong values are named; equal content gives equal ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qgrid import codec
from qgrid.types import Cell, Measurement, Model, Slices, Workload


def test_a_cell_survives_json(make_cell: Callable[..., Cell]) -> None:
    cell = make_cell()
    assert codec.loads(Cell, codec.dumps(cell)) == cell


def test_every_problem_is_named_with_its_key_and_value() -> None:
    value = {"name": "x", "id": 3, "revision": None, "trust_remote_code": False, "alow": True}
    with pytest.raises(codec.InvalidValue) as caught:
        codec.convert(Model, value, "model")
    assert "`model.id=3` should be a valid string" in str(caught.value)
    assert "`model.allow_pickle` is missing" in str(caught.value)
    assert "`model.alow` is not a known key" in str(caught.value)


@pytest.mark.parametrize("text", ["", '{"metric": "' + "x" * 10_000, b"\xff\xfe", "[" * 100_000])
def test_what_is_no_json_is_said_to_be_none_and_not_repeated(text: str | bytes) -> None:
    with pytest.raises(codec.InvalidValue) as caught:
        codec.loads(Measurement, text)
    assert str(caught.value).startswith("not JSON (")
    assert len(str(caught.value)) < 200


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(codec.InvalidValue) as caught:
        codec.convert(Measurement, {"metric": "ppl", "value": "x" * 10_000, "unit": "1"})
    assert str(caught.value).startswith('`value="xxx')
    assert str(caught.value).endswith("should be a valid number")
    assert len(str(caught.value)) < 300


def test_nested_keys_are_named_whole() -> None:
    item = {"path": "x", "scoring": "guess", "chat": True, "limit": None, "max_new_tokens": 8}
    with pytest.raises(codec.InvalidValue, match=r"slices\.items\.mine\.scoring=\"guess\""):
        codec.convert(Slices, {"name": "x", "prose": None, "items": {"mine": item}}, "slices")


@pytest.mark.parametrize("value", [True, "4", 4.5])
def test_a_count_is_a_whole_number_and_nothing_else(value: object) -> None:
    shape = {"name": "x", "prompt_tokens": value, "output_tokens": 1, "concurrency": [1]}
    with pytest.raises(codec.InvalidValue, match=r"workload\.prompt_tokens"):
        codec.convert(Workload, {**shape, "warmup": 2, "repeats": 5}, "workload")


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec.dumps(Measurement("ppl", float("nan"), "1"))


def test_a_digest_ignores_the_order_of_keys_and_sees_every_value() -> None:
    assert codec.digest({"a": 1, "b": (2, 3)}) == codec.digest({"b": [2, 3], "a": 1})
    assert codec.digest({"a": 1}) != codec.digest({"a": 1.5})
    assert len(codec.digest([], 8)) == 8
