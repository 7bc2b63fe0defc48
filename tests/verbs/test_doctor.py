"""`doctor` really runs what it says works, and says why the rest does not."""

from __future__ import annotations

import dataclasses

import pytest

from qgrid import commands, environment, registry
from qgrid.methods import int8
from qgrid.planning import facts
from qgrid.verbs import doctor, trials


@pytest.mark.slow
def test_what_works_was_tried_and_what_was_not_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = dataclasses.replace(int8.SUPPORTS, packages=("no-such-library",))
    monkeypatch.setattr(int8, "SUPPORTS", absent)
    names = ["rtn", "int8", "gguf", "prequantized", "openai", "llama_cpp", "transformers"]
    assert doctor.main(names) == 0
    told = capsys.readouterr()
    lines = {line.split()[0]: line for line in told.out.splitlines() if line.strip()}
    for name in ("rtn", "llama_cpp", "transformers"):
        assert "works here" in lines[name]
    assert "works here (4 bits in `llama_cpp`)" in lines["gguf"]
    assert "needs no-such-library; run `pip install no-such-library`" in lines["int8"]
    assert "not tried: `method.path` has no value" in lines["prequantized"]
    assert "not tried: `runtime.base_url` has no value" in lines["openai"]
    assert "awq" not in lines
    assert "rtn 4-bit transformers: artifact" in told.err  # it was run


@pytest.mark.slow
def test_a_method_that_fails_is_told_as_it_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_SETTINGS", {**trials._SETTINGS, "limits": SHORT})
    assert doctor.main(["rtn"]) == 1
    line = next(each for each in capsys.readouterr().out.splitlines() if each.startswith("rtn"))
    assert "fails here (4 bits in `transformers`): timeout" in line


SHORT = {"artifact": 0.001, "quality": 600.0, "speed": 600.0}


def test_what_cannot_work_here_alone_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["aqlm", "prequantized", "served"]) == 0
    out = capsys.readouterr().out
    assert "qgrid does not train AQLM codebooks" in out
    assert out.count("not tried: ") == 2


def test_a_method_that_needs_a_gpu_names_its_capability(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = dataclasses.replace(int8.SUPPORTS, needs_gpu=True, capability="sm_89")
    monkeypatch.setattr(int8, "SUPPORTS", needs)
    wanted = "needs a GPU of compute capability 8.9 or more"
    assert doctor.main(["int8", "--quick"]) == 0
    assert wanted in capsys.readouterr().out
    assert doctor.main(["int8"]) == 0  # refused before any work
    assert wanted in capsys.readouterr().out


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(commands.WrongCommand, match=r"got `gtpq` \(has: .*gptq"):
        doctor.main(["gtpq"])


def test_a_version_that_is_known_to_corrupt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (("bitsandbytes==0.48.0", "reads stored 8-bit checkpoints wrongly"),)
    assert facts.broken(known) is None
    facts.broken.cache_clear()
    monkeypatch.setattr(environment, "installed", lambda names, *_: dict.fromkeys(names, "0.48.0"))
    pin = environment.locked_versions("main")["bitsandbytes"]
    assert facts.broken(known) == (
        "does not use bitsandbytes 0.48.0, which reads stored 8-bit checkpoints wrongly; "
        f"install bitsandbytes=={pin}"
    )
    facts.broken.cache_clear()


def test_what_is_known_to_corrupt_can_be_read() -> None:
    from packaging.requirements import Requirement

    declared = [each.SUPPORTS for each in registry.working("methods").values()]
    declared += [each.LOADS for each in registry.working("runtimes").values()]
    known = [pair for each in declared for pair in each.broken]
    assert known
    for requirement, why in known:
        assert Requirement(requirement).specifier
        assert not why.endswith(".")
