"""The plan: widths, legality, baselines, identities, order."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import codec, config, environment, sweep
from qgrid.planning import choices, plan
from qgrid.planning import facts as facts_module
from qgrid.planning.facts import Facts
from qgrid.types import Cell, Choice, DeviceKind, Gpu, Method, PlannedCell
from tests import jobs

Plan = Callable[..., list[PlannedCell]]


def label(cell: PlannedCell) -> str:
    return f"{cell.cell.method.name}{cell.cell.bits}"


def test_the_default_grid_is_nine_cells_and_two_refusals(planned: Plan) -> None:
    cells = planned("method=none,int8,nf4,rtn,gptq,awq", "bits=4,8")
    running = [label(p) for p in cells if p.status is None]
    assert running[0] == "none16"
    assert sorted(running[1:]) == sorted(
        ["int88", "nf44", "rtn4", "rtn8", "gptq4", "gptq8", "awq4", "awq8"]
    )
    refused = {label(p): p for p in cells if p.status is not None}
    assert set(refused) == {"int84", "nf48"}
    assert all(p.status == "unsupported" for p in refused.values())
    assert "has no `bits=8` (has: 4)" in str(refused["nf48"].reason)
    notes = " ".join(cells[0].notes)
    assert "has the one width 16" in notes


def test_a_missing_baseline_is_added_and_comes_first(planned: Plan) -> None:
    cells = planned("method=rtn,gptq", "bits=4", "context=256,512")
    assert [label(p) for p in cells] == ["none16", "none16", "rtn4", "rtn4", "gptq4", "gptq4"]
    assert [p.added for p in cells] == [True, True, False, False, False, False]
    by_id = {p.cell_id: p for p in cells}
    for p in cells[2:]:
        assert by_id[str(p.baseline_cell_id)].cell.context == p.cell.context
    assert len({p.artifact_id for p in cells}) == 3


def test_a_runtime_names_what_its_cells_compare_with(planned: Plan) -> None:
    """GGUF cells with GGUF at 16 bits in the same runtime, never with another format's."""
    cells = planned("method=gguf", "runtime=llama_cpp", "bits=4,8", "kv_cache=auto16,int8")
    baseline, *others = cells
    assert (label(baseline), baseline.added) == ("gguf16", True)
    assert baseline.cell.method.options["type"] == "F16"
    assert baseline.cell.kv_cache.name == "auto16"
    assert {p.baseline_cell_id for p in others} == {baseline.cell_id}
    assert len({p.artifact_id for p in cells}) == 3
    bytes_a_token = {p.cell.kv_cache.name: p.predicted["kv_bytes_per_token"] for p in others}
    assert bytes_a_token["int8"] / bytes_a_token["auto16"] == 8.5 / 16


def test_a_width_and_the_type_it_means_are_one_artifact(planned: Plan) -> None:
    cells = planned("method=gguf", "runtime=llama_cpp", "bits=4")
    named = planned("method=gguf", "runtime=llama_cpp", "method.type=Q4_K_M")
    assert [p.cell_id for p in cells] == [p.cell_id for p in named]
    assert named[1].cell.method.options["type"] == "Q4_K_M"
    assert named[1].cell.calibration is None


def test_an_importance_matrix_makes_the_calibration_count(planned: Plan) -> None:
    _, plain, weighted = planned(
        "method=gguf", "runtime=llama_cpp", "bits=4", "method.imatrix=false,true"
    )
    assert weighted.cell.calibration is not None
    assert plain.artifact_id != weighted.artifact_id


def test_a_runtime_refuses_what_it_does_not_load_or_compute_in(planned: Plan) -> None:
    cells = planned("method=gguf", "bits=4", "runtime=transformers,llama_cpp")
    refused = [p for p in cells if p.status is not None]
    assert [p.cell.runtime.name for p in refused] == ["transformers"]
    assert "does not load `gguf`" in str(refused[0].reason)
    with pytest.raises(plan.EmptyGrid, match=r"has no `runtime.dtype=bfloat16` \(has: float32\)"):
        planned("method=gguf", "runtime=llama_cpp", "runtime.dtype=bfloat16")


def test_duplicates_are_merged(planned: Plan) -> None:
    assert len(planned("method=nf4", "bits=null,4")) == 2


def test_an_empty_grid_names_the_rule(planned: Plan) -> None:
    with pytest.raises(plan.EmptyGrid, match=r"2 by `bits`.*nf4"):
        planned("method=nf4", "bits=2,3")


def test_bits_and_a_scheme_that_disagree_are_an_error(planned: Plan) -> None:
    with pytest.raises(plan.WidthConflict, match="disagree"):
        planned("method=rtn", "method.scheme=W4A16", "bits=8")
    assert label(planned("method=rtn", "method.scheme=W8A16")[1]) == "rtn8"


def test_a_kv_cache_that_the_runtime_lacks_is_refused(planned: Plan) -> None:
    cells = planned("method=rtn", "kv_cache=auto16,int5")
    refused = [p for p in cells if p.status == "unsupported"]
    assert len(refused) == 1
    assert "no `kv_cache=int5`" in str(refused[0].reason)


def test_a_card_too_small_does_not_fit(planned: Plan) -> None:
    cells = planned("method=none", "gpu=h100", "context=512,1048576", "gpu.memory_gib=0.1")
    assert sorted(str(p.status) for p in cells) == ["None", "does_not_fit"]


def test_a_length_beyond_the_model_is_refused(planned: Plan) -> None:
    cells = planned("method=none", "context=4096,4097")
    assert [p.status for p in cells] == [None, "unsupported"]
    assert "takes 4096 tokens" in str(cells[1].reason)
    refused = planned("method=none", "workload.prompt_tokens=128,4096")[-1]
    assert "workload.prompt_tokens" in str(refused.reason)


def test_a_model_whose_sizes_are_named_otherwise_is_planned_without_figures(
    planned: Plan, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 64}')
    cells = planned("method=none", "model=hf", f"model.id={tmp_path}")
    assert [(p.status, p.predicted) for p in cells] == [(None, {})]


IDS = ("artifact_id", "quality_id", "cell_id")


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("workload.repeats=9", {"cell_id"}),
        ("runtime.threads=1", {"cell_id"}),
        ("context=256", {"quality_id", "cell_id"}),
        ("runtime.dtype=bfloat16", {"quality_id", "cell_id"}),
        ("slices.prose.tokens=100", {"quality_id", "cell_id"}),
        ("method.group_size=64", set(IDS)),
        ("bits=8", set(IDS)),
        ("calibration.samples=7", set(IDS)),
        ("seed=1", set(IDS)),
        ("gpu=h100", {"quality_id", "cell_id"}),
        ("tracking=none", set()),
    ],
)
def test_each_key_changes_only_the_ids_it_touches(
    planned: Plan, override: str, changed: set[str]
) -> None:
    before = planned("method=gptq", "bits=4")[-1]
    width = [] if override.startswith("bits") else ["bits=4"]
    after = planned("method=gptq", *width, override)[-1]
    assert {name for name in IDS if getattr(before, name) != getattr(after, name)} == changed


def test_the_seed_is_no_part_of_an_uncalibrated_artifact(planned: Plan) -> None:
    first, second = planned("method=rtn", "seed=0")[-1], planned("method=rtn", "seed=1")[-1]
    assert first.artifact_id == second.artifact_id
    assert first.quality_id != second.quality_id


def test_content_of_a_slice_is_part_of_the_quality_id(planned: Plan, tmp_path: Path) -> None:
    ids = []
    for answer in ("a", "b"):
        path = tmp_path / "mine.jsonl"
        line = (
            f'{{"id": "1", "level": 1, "prompt": "x", "choices": ["a", "b"], "answer": "{answer}"}}'
        )
        path.write_text(line + "\n")
        ids.append(planned("method=none", f"slices.items.arithmetic.path={path}")[0].quality_id)
    assert ids[0] != ids[1]


def test_a_plan_survives_its_file(planned: Plan, tmp_path: Path, compose: config.Compose) -> None:
    cells = planned("method=rtn,awq", "bits=4,3")
    settings = replace(choices.settings(compose([]).values), out=str(tmp_path))
    assert sweep.read_plan(sweep.write_plan(cells, settings)) == cells


def test_planning_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from qgrid.__main__ import main; "
        f"code = main(['plan', 'method=rtn,gptq', 'bits=2,4', 'out={tmp_path}']); "
        "heavy = {'torch', 'transformers', 'wandb', 'numpy', 'datasets', 'llmcompressor'}; "
        "assert code == 0, code; assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 cells" in done.stdout


def test_choice_is_what_the_plan_takes() -> None:
    assert {"bits", "seed", "context"} <= set(Choice.__dataclass_fields__)


def test_a_format_that_a_runtime_lacks_names_one_that_loads_it(planned: Plan) -> None:
    with pytest.raises(plan.EmptyGrid, match=r"does not load `gguf`.* or `runtime=llama_cpp`"):
        planned("method=gguf", "bits=4")
    with pytest.raises(plan.EmptyGrid, match=r"has no `kv_cache=int2` \(has: auto16, int8"):
        planned("method=gguf", "bits=4", "runtime=llama_cpp", "kv_cache=int2")


def test_a_gpu_that_is_too_old_is_refused_by_its_capability(planned: Plan) -> None:
    old = ("gpu=t4", "gpu.capability=sm_70", "bits=8")
    *_, int8 = planned("method=none,int8", *old)
    assert int8.status == "unsupported"
    assert int8.reason == (
        "method `int8` needs a GPU of compute capability 7.5 or more; `gpu=t4` has 7.0"
    )
    assert planned("method=int8", "gpu=t4")[-1].status is None
    kernel = ("method=gptq", "method.format=gptq", "bits=4", "runtime.kernel=marlin,machete")
    on_t4 = {p.cell.runtime.options["kernel"]: p.reason for p in planned(*kernel, "gpu=t4")}
    assert on_t4["marlin"] is None
    assert on_t4["machete"] == (
        "`runtime.kernel=machete` needs a GPU of compute capability 9.0 or more; `gpu=t4` has 7.5"
    )


def test_what_a_method_says_of_a_device_is_asked_for_each(
    facts: Facts, make_cell: Callable[..., Cell]
) -> None:
    method = Method("torchao", jobs.options("torchao", scheme="float8_dynamic"))
    cell = make_cell(method=method, bits=8)
    for name, capability in (("t4", "sm_75"), ("a100", "sm_80")):
        gpu = Gpu(name, "cuda", name, capability, 40.0, None, 1)
        said = str(facts.objection("refusal", replace(cell, gpu=gpu)))
        assert f"`gpu={name}` has" in said


def test_a_base_that_is_quantized_itself_is_refused(
    planned: Plan, tmp_path: Path, tiny_random: Path
) -> None:
    base = shutil.copytree(tiny_random, tmp_path / "base")
    told = json.loads((base / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(told))
    with pytest.raises(plan.EmptyGrid, match=r"is already quantized \(bitsandbytes\); give the 16"):
        planned("model=hf", f"model.id={base}", "method=rtn")


def test_how_a_cluster_finds_a_card_is_in_no_id(planned: Plan, facts: Facts) -> None:
    """The ids of stores from before these keys stay what they were."""
    gpu = planned("method=none", "gpu=h100")[0].cell.gpu
    assert gpu.gres == "h100"
    known = ("name", "kind", "match", "capability", "memory_gib", "bandwidth_gb_s", "count")
    assert facts.device(gpu) == codec.digest({name: getattr(gpu, name) for name in known})
    plain, moved = (
        planned("method=none,rtn", "bits=4", "gpu=h100", f"gpu.gres={gres}", f"gpu.constraint={of}")
        for gres, of in (("null", "null"), ("nvidia_h100_80gb", "nvlink"))
    )
    assert [p.cell.gpu.gres for p in moved] == ["nvidia_h100_80gb"] * 2
    ids = ("cell_id", "artifact_id", "quality_id", "baseline_cell_id")
    for before, after in zip(plain, moved, strict=True):
        assert [getattr(before, key) for key in ids] == [getattr(after, key) for key in ids]


def test_the_library_of_a_quantized_cache_is_part_of_its_quality_alone(
    planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids() -> dict[str, str]:
        cells = planned("method=rtn", "kv_cache=auto16,int8")
        return {each.cell.kv_cache.name: each.quality_id for each in cells if not each.added}

    def other(name: str, kind: DeviceKind) -> dict[str, str]:
        return {**locked(name, kind), "hqq": "9.9"}

    before, locked = ids(), environment.locked_versions
    facts_module.locked.cache_clear()
    monkeypatch.setattr(environment, "locked_versions", other)
    after = ids()
    facts_module.locked.cache_clear()
    assert before["auto16"] == after["auto16"]
    assert before["int8"] != after["int8"]


def test_a_hub_that_does_not_answer_leaves_a_cell_to_run_again(planned: Plan) -> None:
    (cell,) = planned("method=prequantized", "method.path=acme/model-gptq")
    assert cell.status == "crashed"
    assert "run again when it can be" in str(cell.reason)
