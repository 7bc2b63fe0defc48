"""The launcher's YAML: what it may say, and the sentence for what it may not."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from qgrid import codec, config, launchers
from qgrid.slurm.options import Options

FILE = config.root("conf") / "hydra" / "launcher" / "slurm.yaml"


def chosen(**options: Any) -> Options:
    found: Options = codec.convert(Options, options, "hydra.launcher")
    return found


def test_the_yaml_has_every_option_with_its_default() -> None:
    said = yaml.safe_load(Path(FILE).read_text())
    options = {key: value for key, value in said.items() if key not in {"_target_", "name"}}
    assert set(options) == {field.name for field in fields(Options)}
    assert chosen(**options) == Options()


def test_what_is_chosen_survives_the_disk() -> None:
    options = {"account": "a", "extra": ["reservation=night"], "setup": ["module load x"]}
    plain = launchers.choose("slurm", options)
    assert launchers.choose("slurm", plain.options) == plain
    assert chosen(**plain.options).setup == ("module load x",)


@pytest.mark.parametrize("key", ["account", "partition", "qos"])
@pytest.mark.parametrize(
    "value", ["a b", "a\nb", "$(id)", "`id`", "a;b", 'a"b', "a'b", "-x", "", "a#b", "a\\b", "ü"]
)
def test_names_are_names(key: str, value: str) -> None:
    with pytest.raises(codec.InvalidValue, match=rf"`hydra.launcher.{key}=.*should be letters"):
        chosen(**{key: value})


@pytest.mark.parametrize("value", ["gpu&ib", "[rack1|rack2]", "(a|b)&c", "gpu*2", "a_b-c.d"])
def test_slurms_own_signs_between_features(value: str) -> None:
    assert chosen(constraint=value).constraint == value


@pytest.mark.parametrize("value", ["a b", "a;b", "$x", "a\n#SBATCH", "--x", "a'b"])
def test_other_signs_are_none_of_features(value: str) -> None:
    with pytest.raises(codec.InvalidValue, match=r"hydra\.launcher\.constraint"):
        chosen(constraint=value)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("wrap=id", "does not write itself"),
        ("--array=0-3", "does not write itself"),
        ("output=/etc/x", "does not write itself"),
        ("outp=/etc/x", "does not write itself"),
        ("Bad=1", "long argument"),
        ("-x=1", "long argument"),
        ("", "long argument"),
        ("mail-user=", "without blanks"),
        ("mail-user=a b", "without blanks"),
        ("mail-user=$(id)", "without blanks"),
        ("comment\n#SBATCH --wrap=x", "long argument"),
        ("reservation=x\n#SBATCH --wrap=x", "without blanks"),
    ],
)
def test_further_arguments_are_checked(extra: str, said: str) -> None:
    with pytest.raises(codec.InvalidValue, match=said):
        chosen(extra=[extra])


def test_further_arguments_with_and_without_dashes() -> None:
    extra = ["--reservation=night", "exclude=n[1-3],m4", "contiguous"]
    assert chosen(extra=extra).extra == ("reservation=night", "exclude=n[1-3],m4", "contiguous")


def test_set_up_lines_are_the_users_own_but_lines() -> None:
    lines = ["module load cuda", 'export X="a b" && source "$HOME/x"']
    assert chosen(setup=lines).setup == tuple(lines)
    with pytest.raises(codec.InvalidValue, match="one printable line"):
        chosen(setup=["a\nb"])


def test_a_secret_does_not_go_into_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(codec.InvalidValue, match="without a secret"):
        chosen(setup=["export HF_TOKEN=hf_abcdefghijklmnopqrstuv"])
    monkeypatch.setenv("CLUSTER_PASSWORD", "correct-horse-battery")
    with pytest.raises(codec.InvalidValue, match="without a secret"):
        chosen(setup=["login correct-horse-battery"])


@pytest.mark.parametrize("key", ["minutes", "cpus", "attempts", "throttle", "cells_per_task"])
def test_counts_are_positive(key: str) -> None:
    for value in (0, -1, "4", 1.5):
        with pytest.raises(codec.InvalidValue, match=f"hydra.launcher.{key}"):
            chosen(**{key: value})


def test_a_typo_is_named() -> None:
    with pytest.raises(codec.InvalidValue, match=r"`hydra\.launcher\.acount` is not a known key"):
        chosen(acount="a")
