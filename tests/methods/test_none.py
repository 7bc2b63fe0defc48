"""Unquantized weights in every floating-point type, and which of them is the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgrid import config
from qgrid.contracts import Unsupported
from qgrid.files import HashCache
from qgrid.methods import none
from qgrid.planning import baseline, choices, plan
from qgrid.planning.facts import Facts
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Job, Method
from qgrid.weights import artifacts, inspection
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.runtimes.passes import plain

Build = Callable[..., Job]


@pytest.fixture
def planned(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Build:
    """The job of a cell whose options are resolved as the plan does it."""

    def job(dtype: str, source: Path = tiny_random) -> Job:
        bits = 32 if dtype == "float32" else 16
        made = jobs.job(make_cell, tmp_path, source, "none", bits, dtype=dtype)
        method = Method("none", none.resolved(bits, {"dtype": dtype}))
        cell = replace(made.planned.cell, method=method)
        return replace(made, planned=replace(made.planned, cell=cell))

    return job


@pytest.mark.parametrize(
    ("dtype", "stored", "linked"),
    [("auto", "BF16", True), ("bfloat16", "BF16", True), ("float16", "F16", False)],
)
def test_sixteen_bits_are_linked_or_cast(
    dtype: str, stored: str, linked: bool, planned: Build, tiny_random: Path
) -> None:
    job = planned(dtype)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks if check.fatal), result.checks
    folder = Path(job.artifact)
    assert (folder / "model.safetensors").is_symlink() == linked
    contents = inspection.inspect(folder)
    assert contents.format == "safetensors-16bit"
    assert contents.dtypes.keys() == {stored}
    assert result.observed["module_methods"] == {"none": 14}
    before, after = load_file(tiny_random / "model.safetensors"), load_file(_weights(folder))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.to(after[name].dtype))


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_thirty_two_bits_are_stored_and_run(planned: Build, tiny_random: Path) -> None:
    from transformers import AutoModelForCausalLM

    job = planned("float32")
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert "reload" in {check.name for check in result.checks}
    contents = inspection.inspect(Path(job.artifact))
    assert contents.format == "safetensors-32bit"
    assert (contents.bits_per_weight, contents.linear_bits_per_weight) == (32, 32)
    loaded = runtime.load(Path(job.artifact), job.planned.cell, "float32")
    seen = loaded.observed()
    assert seen["stores_in"] == {"float32": 14}
    assert [each["scheme"] for each in seen["linear_kernels"]] == ["W32A32"]
    ids = list(range(40))
    found = next(loaded.score([ids], [39])).logprobs
    loaded.close()
    model = AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float32).eval()
    assert float((found - plain(model, ids)[:-1]).abs().max()) < 1e-4


def test_wider_checkpoints_become_bf16_unless_asked_otherwise(
    planned: Build, tmp_path: Path, tiny_random: Path
) -> None:
    from transformers import AutoModelForCausalLM

    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float32).save_pretrained(wide)
    write_tokenizer(wide)
    for dtype, stored in (("auto", "BF16"), ("float32", "F32")):
        job = planned(dtype, wide)
        artifacts.build(job)
        assert inspection.inspect(Path(job.artifact)).dtypes.keys() == {stored}
        assert _weights(Path(job.artifact)).is_symlink() == (dtype == "float32")


def test_what_fp16_cannot_hold_is_named(planned: Build, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    write_model(folder)
    write_tokenizer(folder)
    stored = load_file(_weights(folder))
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(stored, _weights(folder), metadata={"format": "pt"})
    with pytest.raises(Unsupported) as caught:
        artifacts.build(planned("float16", folder))
    said = str(caught.value)
    assert "at most 65504, which 1 tensor exceeds: model.layers.1.mlp.up_proj.weight;" in said
    assert "use `method.dtype=bfloat16`" in said
    artifacts.build(planned("bfloat16", folder))  # followed


def test_a_weight_that_is_no_number_is_not_too_large(planned: Build, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    write_model(folder)
    write_tokenizer(folder)
    stored = load_file(_weights(folder))
    stored["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(stored, _weights(folder), metadata={"format": "pt"})
    with pytest.raises(
        artifacts.BadArtifact, match=r"`finite`.*1 in model\.layers\.1\.mlp\.up_proj"
    ):
        artifacts.build(planned("float16", folder))


def test_baseline_is_what_is_stored_at_sixteen_bits(make_cell: Callable[..., Cell]) -> None:
    usual = make_cell(method=Method("none", none.resolved(16, {"dtype": "auto"})))
    assert baseline.of(usual) == usual
    for dtype, bits in (("float16", 16), ("float32", 32)):
        options = none.resolved(bits, {"dtype": dtype})
        assert baseline.of(make_cell(method=Method("none", options), bits=bits)) == usual


def test_each_type_is_one_cell_of_all_widths(compose: config.Compose, tmp_path: Path) -> None:
    axes = ("method=none", "method.dtype=auto,float16,float32", "bits=4,16,32")
    reader, facts = choices.Reader(), Facts(HashCache(tmp_path / "hashes.json"))
    grid = config.expand(compose, config.parse(axes, None))
    cells = plan.build((reader.choice(values) for values in grid), facts)
    assert [each.status for each in cells] == [None] * 3
    assert sorted(each.cell.bits for each in cells) == [16, 16, 32]
    (base,) = [each for each in cells if each.baseline_cell_id is None]
    assert base.cell.method.options == {}
    assert {each.baseline_cell_id for each in cells if each is not base} == {base.cell_id}
    wide = next(each for each in cells if each.cell.bits == 32)
    assert "`none` has the one width 32; `bits=4` gives the same cell" in wide.notes
    assert wide.predicted["weight_bytes"] == 2 * base.predicted["weight_bytes"]
