"""`python -m qgrid setup`: what it builds, lists and prunes, and what it does not understand."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from qgrid import __main__, device
from qgrid.envs import builds, construct, recipes, setup
from qgrid.envs.screen import Screen
from tests.envs.conftest import KIND, NAME, Write


def run(*arguments: str) -> str:
    told = io.StringIO()
    assert setup.main([*arguments, "--device", KIND], Screen(told)) == 0
    return told.getvalue()


@pytest.mark.slow
def test_build_list_and_prune(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    run()
    assert "not built; run `python -m qgrid setup small" in capsys.readouterr().out
    told = run(NAME)
    assert f"building `small` for {KIND} from small.txt: 1 packages" in told
    first = builds.find(recipes.recipe(NAME, KIND))
    assert first is not None
    assert told.splitlines()[-1].startswith(f"`small` is ready: {first.interpreter}, ")
    assert "built in" in told
    assert "built before; its lock has not changed" in run(NAME)
    run()
    assert f"built: {first.interpreter}" in capsys.readouterr().out

    write(version="2.0")
    assert "1 earlier builds are kept" in run(NAME)
    assert "1 earlier builds removed" in run(NAME, "--prune")
    assert not first.folder.exists()
    assert builds.find(recipes.recipe(NAME, KIND)) is not None


@pytest.mark.slow
def test_arguments_of_pip_are_for_what_goes_first(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(first=["qgrid-small"])
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(construct.NotBuilt, match=r"pip finds no qgrid-small==1\.0"):
        run(NAME)
    monkeypatch.setenv("TORCH_ARGS", f"--find-links '{tmp_path / 'wheels'}'")
    assert "is ready" in run(NAME)


def test_arguments_after_two_dashes_replace_those_of_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_ARGS", "--index-url 'a b'")
    assert setup.parsed(["x"]).first_args == ("--index-url", "a b")
    assert setup.parsed(["x", "--", "--pre"]).first_args == ("--pre",)


def test_the_device_is_this_machine_s_unless_it_is_named() -> None:
    assert setup.parsed(["x"]).kind == device.describe().kind
    assert setup.parsed(["x", "--device", "cuda"]).kind == "cuda"
    assert setup.parsed([]).environment is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "b"], "takes .NAME."),
        (["a", "--force"], "--force"),
        (["a", "--device"], "cpu or cuda, got `None`"),
        (["a", "--device", "tpu"], "got `tpu`"),
        (["main"], "`main` is the environment that qgrid itself runs in"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], words: str) -> None:
    with pytest.raises(setup.WrongSetup, match=words):
        setup.main(arguments, Screen(io.StringIO()))


def test_the_command_line_ends_in_one_sentence(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(gib=1e9)
    assert __main__.main(["setup", "nothing"]) == 2
    assert "no environment `nothing` to build (has: small, vllm)" in capsys.readouterr().err
    assert __main__.main(["setup", NAME, "--device", KIND]) == 1
    assert "QGRID_ENVS" in capsys.readouterr().err


def test_a_recipe_for_every_device_that_has_a_lock() -> None:
    for name in recipes.names():
        for kind in ("cpu", "cuda"):
            recipe = recipes.recipe(name, kind)
            assert set(recipe.first) <= recipe.pins.keys()
            assert set(recipe.told) <= recipe.contents().keys()
            assert not any("+" in version for version in recipe.pins.values())
            assert not recipe.stubs.keys() & recipe.pins.keys()
