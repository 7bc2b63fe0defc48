"""A group that does not divide a layer is refused before any work, by every method that has groups.

The methods are those of the registry: a new one with an option `group_size` is held to the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from qgrid import registry
from qgrid.contracts import Unsupported
from qgrid.libraries import loading
from qgrid.types import Cell
from qgrid.weights import artifacts
from tests import jobs
from tests.conftest import write_model, write_tokenizer

GROUP, COLUMNS = 128, 192


def fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(registry.method(name).Options)}


def kinds() -> list[tuple[str, dict[str, Any]]]:
    """Every method with groups, in every format that it has."""
    found = []
    for name in sorted(registry.names("methods")):
        if "group_size" in fields(name):
            formats: tuple[str, ...] = ()
            if "format" in fields(name):
                formats = get_args(get_type_hints(registry.method(name).Options)["format"])
            found += [(name, {"format": each}) for each in formats] or [(name, {})]
    return found


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows of 192 and 448 weights."""
    folder = tmp_path_factory.mktemp("odd")
    shape = {"hidden_size": COLUMNS, "intermediate_size": 448, "num_attention_heads": 3}
    write_model(folder, **shape, num_key_value_heads=3)
    write_tokenizer(folder)
    return folder


def test_there_are_methods_with_groups() -> None:
    assert {"rtn", "gptq", "awq"} <= {name for name, _ in kinds()}


def _has_one_group(said: str, options: Mapping[str, Any]) -> str | None:
    """What a format says that leaves no choice of a group."""
    sentence = f"`method.format={options.get('format')}` has groups of"
    return sentence if said.startswith(sentence) and "; set " in said else None


def _require_advice(said: str) -> None:
    """Layers with their sizes, and two ways out."""
    assert f"`method.group_size={GROUP}` does not divide" in said
    assert "14 layers" in said
    assert f"layers.0.mlp.gate_proj ({COLUMNS}" in said
    ways = said.partition("; use ")[2]
    assert "`method.group_size=64`" in ways
    assert " or `method." in ways


@pytest.mark.parametrize(("name", "options"), kinds())
def test_group_is_refused_with_layers_and_two_ways_out(
    name: str,
    options: Mapping[str, Any],
    odd: Path,
    tmp_path: Path,
    make_cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = registry.method(name)
    bits = module.SUPPORTS.default_bits
    job = jobs.job(make_cell, tmp_path, odd, name, bits, group_size=GROUP, **options)
    said = str(module.refusal(job.planned.cell))
    told = _has_one_group(said, options) or "does not divide"
    if told == "does not divide":
        _require_advice(said)
        divided = jobs.job(make_cell, tmp_path, odd, name, bits, group_size=64, **options)
        assert module.refusal(divided.planned.cell) is None

    def loads(*_: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(loading, "pretrained", loads)
    with pytest.raises(Unsupported, match=told):
        artifacts.build(job)
