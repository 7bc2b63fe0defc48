"""Single layers in a width of their own: what is stored, what is refused, what the record shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import registry
from qgrid.running import assembly
from qgrid.types import Cell, Job, PlannedCell
from qgrid.weights import artifacts, widths
from qgrid.weights.artifacts import BadArtifact
from tests import jobs

FIRST = "model.layers.0.*"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def make(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Callable[..., Job]:
    def run(method: str, bits: int, keep: dict[str, int], **changes: Any) -> Job:
        return jobs.job(make_cell, tmp_path, tiny_random, method, bits, keep=keep, **changes)

    return run


@pytest.mark.parametrize(
    ("method", "bits", "keep"),
    [
        ("rtn", 4, {FIRST: 8, DOWN: 2, "lm_head": 16, "model.layers.1.mlp.*": 16}),
        ("gptq", 3, {FIRST: 8, DOWN: 16}),
        ("awq", 4, {FIRST: 8, DOWN: 16}),
        ("nf4", 4, {FIRST: 16}),
        ("int8", 8, {DOWN: 16}),
        ("fp8", 8, {FIRST: 16}),
        ("smoothquant", 8, {DOWN: 16}),
    ],
)
def test_layers_have_the_widths_that_are_asked_for(
    method: str, bits: int, keep: dict[str, int], make: Callable[..., Job]
) -> None:
    job = make(method, bits, keep)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    manifest = artifacts.load_manifest(Path(job.artifact))
    asked = {name: widths.of(bits, {"keep": keep}, name) for name in manifest.modules}
    assert len(set(asked.values())) > 1
    for name, state in manifest.modules.items():
        assert asked[name] <= state.bits < asked[name] + 0.5
        assert state.method == ("none" if asked[name] == 16 else method)
    assert len(result.observed["module_bits"]) >= len(set(asked.values()))
    assert sum(result.observed["module_bits"].values()) == 14


def test_a_layer_that_was_not_kept_is_caught(
    make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widths, "others", lambda *_: {})
    with pytest.raises(BadArtifact, match=r"`bits`.*layers\.0\.mlp\.down_proj has 4\.\d+ bits"):
        artifacts.build(make("rtn", 4, {DOWN: 8}))


def test_the_longest_pattern_counts() -> None:
    options = {"keep": {"*": 2, "model.layers.0.*": 8, "model.layers.0.mlp.*": 16}}
    assert widths.of(4, options, "model.layers.1.mlp.up_proj") == 2
    assert widths.of(4, options, "model.layers.0.self_attn.q_proj") == 8
    assert widths.of(4, options, "model.layers.0.mlp.up_proj") == 16
    assert widths.of(4, {}, "model.layers.0.mlp.up_proj") == 4


@pytest.mark.parametrize(
    ("method", "bits", "keep", "said"),
    [
        ("rtn", 4, {FIRST: 5}, r"`model\.layers\.0\.\*` 5 bits, which `rtn` cannot \(has: 2, 3"),
        ("nf4", 4, {FIRST: 8}, r"8 bits, which `nf4` cannot \(has: 4, 16\)"),
        ("rtn", 4, {"lm_head": 8}, r"`lm_head` 8 bits, which `rtn` cannot \(has: 16\)"),
        ("rtn", 4, {"model.layer.0.*": 8}, "matches none of the 14 linear layers"),
        ("rtn", 4, {"*": 8}, "leaves no layer at `bits=4`"),
        ("fp8", 8, {"model.layers.9.*": 16}, "matches none"),
    ],
)
def test_what_cannot_be_kept_is_said_before_any_work(
    method: str, bits: int, keep: dict[str, int], said: str, make: Callable[..., Job]
) -> None:
    import re

    own: Any = registry.method(method)
    assert re.search(said, own.refusal(make(method, bits, keep).planned.cell) or "")


@pytest.mark.parametrize("method", ["rtn", "autoround"])
def test_groups_need_not_divide_what_is_left_out(method: str, make: Callable[..., Job]) -> None:
    own: Any = registry.method(method)
    refused = own.refusal(make(method, 4, {}, group_size=512).planned.cell)
    assert "does not divide the columns of 12 layers" in refused
    keep = {"*": 16, "model.layers.*.mlp.down_proj": 4}  # whose columns are 512
    assert own.refusal(make(method, 4, keep, group_size=512).planned.cell) is None


def test_what_keeps_nothing_is_one_cell_with_the_default(
    planned: Callable[..., list[PlannedCell]],
) -> None:
    _, plain = planned("method=rtn", "bits=4")
    assert plain.cell.method.options["keep"] is None
    for nothing in ("{}", "{lm_head:16}"):
        _, same = planned("method=rtn", "bits=4", f"method.keep={nothing}")
        assert (same.cell_id, same.cell) == (plain.cell_id, plain.cell)
        assert [note for note in same.notes if "`method.keep`" in note]
    assert not [note for note in plain.notes if "keep" in note]
    first = "model.layers.0.*"
    _, some = planned("method=rtn", "bits=4", f"method.keep={{{first}:8}}")
    _, more = planned("method=rtn", "bits=4", f"method.keep={{{first}:8,lm_head:16}}")
    assert some.cell_id == more.cell_id != plain.cell_id
    assert not [note for note in some.notes if "keep" in note]


def test_memory_is_planned_with_the_layers_that_are_kept(make: Callable[..., Job]) -> None:
    """A random model of two equal layers: one at 16 bits, one at 4."""
    cell = make("rtn", 4, {FIRST: 16}).planned.cell
    assert widths.mean(cell, float) == pytest.approx(10)
    assert widths.mean(make("rtn", 4, {}).planned.cell, float) == 4


def test_what_was_left_out_is_listed_with_its_reason(make: Callable[..., Job]) -> None:
    """In the manifest and the record; a random model whose head is its embedding."""
    job = make("rtn", 4, {FIRST: 16, DOWN: 8})
    artifacts.build(job)
    manifest = artifacts.load_manifest(Path(job.artifact))
    head = "the output head is the embedding, which `rtn` leaves as it is"
    assert manifest.modules_skipped == {
        FIRST: "`method.keep` leaves 6 layers at 16 bits",
        "lm_head": head,
    }
    assert assembly.artifact_summary(manifest)["modules_skipped"] == manifest.modules_skipped
