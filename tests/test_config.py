"""Composition: choices combined equal Hydra's own composition; wrong input is one sentence."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from qgrid import codec, config, registry
from qgrid.planning import choices


def grid(compose: config.Compose, *overrides: str) -> config.Grid:
    return config.expand(compose, config.parse(overrides, None))


def test_combined_choices_equal_composing_each_cell(compose: config.Compose) -> None:
    axes = [
        "method=rtn,gptq,nf4",
        "bits=4,8",
        "gpu=h100,l4",
        "workload.repeats=5,7",
        "context=512,1024",
    ]
    combined = grid(compose, "seed=3", *axes)
    assert combined.whole is None
    assert len(combined) == 48
    every = list(zip(combined, combined.overrides(), strict=True))
    for values, overrides in every[::7]:
        assert values == compose(["seed=3", *overrides]).values


def test_a_group_and_a_key_inside_it_are_swept_together(compose: config.Compose) -> None:
    combined = list(grid(compose, "method=rtn,gptq", "method.group_size=64,128"))
    found = [(c["method"]["name"], c["method"]["group_size"]) for c in combined]
    assert found == list(itertools.product(["rtn", "gptq"], [64, 128]))


def test_a_file_that_writes_elsewhere_is_composed_cell_by_cell(
    compose: config.Compose, searchpath: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "workload").mkdir()
    text = (config.root("conf") / "workload" / "demo.yaml").read_text()
    body = "".join(f"  {line}\n" for line in text.splitlines())
    sly = f"# @package _global_\ncalibration:\n  samples: 3\nworkload:\n{body}"
    (tmp_path / "workload" / "sly.yaml").write_text(sly)
    searchpath.append(tmp_path)
    with pytest.warns(UserWarning, match="writes under `calibration`"):
        combined = grid(compose, "workload=demo,sly", "seed=0,1")
    assert [c["calibration"]["samples"] == 3 for c in combined] == [False, False, True, True]


def test_an_interpolation_across_swept_keys_is_composed_cell_by_cell(
    compose: config.Compose,
) -> None:
    with pytest.warns(UserWarning, match=r"`calibration` holds \$\{context\}"):
        combined = grid(compose, "calibration.length='${context}'", "context=128,256")
    assert [c["calibration"]["length"] for c in combined] == [128, 256]


def test_every_group_file_writes_only_under_its_own_key(compose: config.Compose) -> None:
    base = compose([]).raw
    conf = config.root("conf")
    groups = [p.name for p in conf.iterdir() if p.is_dir() and p.name != "hydra"]
    assert len(groups) == 9
    for group in groups:
        for file in (conf / group).glob("*.yaml"):
            composed = compose([f"{group}={file.stem}"]).raw
            changed = {key for key in composed if composed[key] != base.get(key)}
            assert changed <= {group}, file


def test_every_shipped_choice_is_valid(compose: config.Compose) -> None:
    conf = config.root("conf")
    for file in sorted(conf.glob("*/*.yaml")):
        if file.parent.name in {"hydra", "tracking"} or "???" in file.read_text():
            continue  # `???` is for the user to give
        values = compose([f"{file.parent.name}={file.stem}"]).values
        choice = choices.Reader().choice(values)
        assert getattr(choice, file.parent.name).name == file.stem


def test_files_and_yaml_name_the_same_methods_and_runtimes() -> None:
    for kind, folder in (("methods", "method"), ("runtimes", "runtime")):
        yaml = {p.stem for p in (config.root("conf") / folder).glob("*.yaml")}
        assert yaml == set(registry.names(kind))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.group_size=four", ["method.group_size", "four", "integer"]),
        ("+method.group_sise=4", ["method.group_sise", "not a known key"]),
        ("bits=four", ["bits=four", "whole number"]),
        ("context=0", ["context=0", "1 or more"]),
        ("runtime.dtype=fp8", ["runtime.dtype", "fp8", "float32"]),
        ("workload.repeats=true", ["workload.repeats", "true", "integer"]),
        ("workload.repeats=0", ["workload.repeats=0", "greater than 0"]),
        ("calibration.samples=-1", ["calibration.samples=-1", "greater than 0"]),
        ("slices.items.code.limit=0", ["slices.items.code.limit=0", "greater than 0"]),
        ("method.name=gptqq", ["gptqq", "did you mean `gptq`"]),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(
    compose: config.Compose, override: str, words: list[str]
) -> None:
    values = compose(["method=rtn", override]).values
    with pytest.raises((codec.InvalidValue, registry.UnknownName)) as caught:
        choices.Reader().choice(values)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_secret_in_a_configuration_is_refused_before_it_is_written(
    compose: config.Compose,
) -> None:
    address = "'https://alice:wonderland1@example.org/model'"
    values = compose(["model=hf", f"model.id={address}"]).values
    with pytest.raises(codec.InvalidValue, match=r"`model\.id` holds a secret") as caught:
        choices.Reader().choice(values)
    assert "wonderland1" not in str(caught.value)
    values = compose([f"tracking.entity={address}"]).values
    with pytest.raises(codec.InvalidValue, match="`tracking` holds a secret"):
        choices.settings(values)


@pytest.mark.parametrize("asked", ["rerun=oom,stale", "rerun=[oom,stale]"])
def test_statuses_to_repeat_are_a_list_and_no_axis(compose: config.Compose, asked: str) -> None:
    assert choices.settings(grid(compose, asked).fixed).rerun == ("oom", "stale")
    assert choices.settings(grid(compose, "rerun=oom").fixed).rerun == ("oom",)


def test_committed_axes_are_replaced_by_the_command_line() -> None:
    merged = config.parse(["bits=3"], {"method": "rtn,gptq", "bits": "4,8"})
    assert [item.input_line for item in merged] == ["method=rtn,gptq", "bits=3"]


def test_a_committed_axis_may_be_null(compose: config.Compose) -> None:
    overrides = config.parse(["method=rtn"], {"method.group_size": None})
    (one,) = config.expand(compose, overrides)
    assert one["method"]["group_size"] is None


def test_patterns_of_layers_may_be_given_and_swept(compose: config.Compose) -> None:
    line = "method.keep=null,{model.layers.0.*:8,lm_head:16}"
    grid = config.expand(compose, config.parse(["method=rtn", line], None))
    kept = [choices.Reader().choice(each).method.options["keep"] for each in grid]
    assert kept == [None, {"model.layers.0.*": 8, "lm_head": 16}]


def test_a_choice_is_read_without_composing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.defaults()["method"] == "none"
    assert config.choice("method", "rtn")["name"] == "rtn"
    assert config.scalars().keys() >= {"bits", "context", "limits"}
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("name: mine\n")
    monkeypatch.setenv("QGRID_CONFIG_DIR", str(tmp_path))
    assert config.choice("method", "mine") == {"name": "mine"}
    with pytest.raises(FileNotFoundError):
        config.choice("method", "absent")


def test_a_continuous_sweep_is_refused() -> None:
    with pytest.raises(config.GridError, match="needs listed values"):
        config.expand(lambda _: config.Composed({}, {}), config.parse(["seed=interval(0,1)"], None))
