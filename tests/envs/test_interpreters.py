"""What runs in another interpreter: it sees qgrid and plugins, and tells where it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qgrid
from qgrid import environment
from qgrid.envs.builds import Build
from qgrid.planning import facts
from qgrid.running import endings, interpreters, processes
from qgrid.running.worker import FINGERPRINT
from qgrid.store import records
from qgrid.types import DeviceKind, Job, MethodSupport
from qgrid.verbs import doctor
from qgrid.weights import verification
from tests import faults
from tests.envs.conftest import KIND, NAME, forget

TOLD = {FINGERPRINT: "f00d"}


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faulty plugin, as if it were installed here: no variable tells another python of it."""
    faults.install(monkeypatch)
    monkeypatch.delenv("PYTHONPATH")


def test_an_environment_that_is_not_built_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QGRID_ENVS", str(tmp_path))
    with pytest.raises(processes.UnknownInterpreter, match=r"run `python -m qgrid setup vllm`"):
        processes.interpreter("vllm", KIND)
    with pytest.raises(processes.UnknownInterpreter, match=r"no environment `vlm` .*has: .*vllm"):
        processes.interpreter("vlm")
    assert processes.interpreter("main") == sys.executable


def test_a_stage_runs_in_another_interpreter_and_says_so(
    built: Build, plugins: None, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    planned = faults.planned(faults.cell(model, "raise", runtime="light"))
    out, store = tmp_path / "out", tmp_path / "store"
    artifact = store / "artifacts" / planned.artifact_id
    job = Job("artifact", planned, str(artifact), None, str(out), str(store))
    records.save(out / "job.json", job)
    worker = processes.Worker(NAME, tmp_path / "worker.log", TOLD, ("bitsandbytes",))
    try:
        ended = worker.run(out / "job.json", faults.SECONDS)
        assert worker._process is not None
        running = Path(f"/proc/{worker._process.pid}/cmdline").read_bytes().split(b"\0")[0]
    finally:
        worker.close()
    assert running == os.fsencode(built.interpreter)
    result = endings.result("artifact", ended, out, faults.SECONDS)
    assert result.failure is not None
    assert "cannot reach" in result.failure.message  # the plugin's method ran: it was found
    told = result.environment
    assert told["environment"] == NAME
    assert told["lock"] == NAME
    assert told["python"] == built.python
    assert "versions" in told
    assert told["fingerprint"] == "f00d"


def test_another_interpreter_sees_qgrid_and_plugins_and_nothing_else(
    built: Build, plugins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGRID_SMALL_2", "of the user")
    own = interpreters.variables(NAME, tmp_path, KIND)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"qgrid", "qgrid_faults", "qgrid_plugins-1.dist-info"} <= names
    assert not {"conf", "tests", "torch", "transformers"} & names
    code = (
        "import os, sys, qgrid; from qgrid import environment, registry\n"
        "print(qgrid.__file__); print(sorted(registry.names('runtimes'))); "
        "print(environment.current()); print(os.environ['QGRID_SMALL'])"
    )
    command = [str(built.interpreter), "-c", code]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    file, runtimes, current, variable = done.stdout.splitlines()
    assert file == str(tmp_path / "qgrid" / "__init__.py")
    assert {"faulty", "light", "transformers"} <= set(eval(runtimes))
    assert current == NAME
    assert variable == "from the recipe"
    assert own["QGRID_SMALL_2"] == "of the user"
    assert own["PATH"].startswith(str(built.folder / "bin"))


def test_a_user_s_variable_wins_over_the_recipe_s(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGRID_SMALL", "of the user")
    own = interpreters.variables(NAME, tmp_path, KIND)
    assert own["QGRID_SMALL"] == "of the user"


def test_packages_on_the_user_s_python_path_are_not_those_of_another_environment(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    (other / "qgrid_small-9.9.dist-info").mkdir(parents=True)
    (other / "qgrid_small-9.9.dist-info" / "METADATA").write_text("Name: qgrid-small\nVersion: 9.9")
    (other / "qgrid_small.py").write_text("VERSION = '9.9'\n")
    monkeypatch.setenv("PYTHONPATH", str(other))
    shown = tmp_path / "shown"
    shown.mkdir()
    code = (
        "import importlib.metadata as found, qgrid, qgrid_small; "
        "print(qgrid_small.VERSION, found.version('qgrid-small'))"
    )
    done = subprocess.run(
        [str(built.interpreter), "-c", code],
        env=interpreters.variables(NAME, shown, KIND),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1.0", "1.0"]
    assert str(other) in interpreters.variables("main", None)["PYTHONPATH"]


def test_what_a_worker_was_shown_is_removed_and_qgrid_is_not(built: Build, tmp_path: Path) -> None:
    worker = processes.Worker(NAME, tmp_path / "worker.log", TOLD)
    assert worker._shown is not None
    shown = Path(worker._shown.name)
    assert (shown / "qgrid").samefile(Path(qgrid.__file__).parent)
    worker._shown.cleanup()
    assert not shown.exists()
    assert Path(qgrid.__file__).is_file()
    assert processes.Worker("main", tmp_path / "worker.log", TOLD)._shown is None


def test_what_is_missing_is_told_with_the_command_that_builds_it(
    built: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forget()
    assert facts.missing(("qgrid-small",), NAME, KIND) is None
    lacking = "needs torch, which `small` does not lock"
    assert facts.missing(("qgrid-small", "torch"), NAME, KIND) == lacking
    monkeypatch.setenv("QGRID_ENVS", str(tmp_path))
    forget()
    told = facts.missing(("qgrid-small",), NAME, KIND)
    assert told == "needs the environment `small`; run `python -m qgrid setup small`"
    elsewhere: DeviceKind = "cuda" if KIND == "cpu" else "cpu"
    assert facts.missing(("vllm",), "vllm", elsewhere) is None  # that machine's to know
    assert "no environment `smal` to build" in str(facts.missing((), "smal", KIND))


def test_planning_with_another_environment_imports_nothing_heavy(built: Build) -> None:
    code = (
        "import sys; from qgrid.planning import facts; from qgrid.verbs import doctor; "
        f"assert facts.missing(('qgrid-small',), {NAME!r}, {KIND!r}) is None; "
        "doctor.render({}); "
        "heavy = {'torch', 'transformers', 'numpy', 'qgrid_small'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packages_that_are_not_as_locked_are_told(built: Build) -> None:
    support = MethodSupport((4,), 4, {4: "x"}, ("qgrid-small",), False, environment=NAME)
    forget()
    assert verification.check_environment(support).ok
    assert verification.versions(support)["qgrid-small"] == "1.0"
    assert "qgrid-small 1.0; all packages as locked" in doctor.render({})
    stored = built.site / "qgrid_small-1.0.dist-info" / "METADATA"
    text = stored.read_text()
    try:
        stored.write_text(text.replace("Version: 1.0", "Version: 0.9"))
        forget()
        check = verification.check_environment(support)
        assert (check.ok, check.fatal) == (False, False)
        assert check.actual == "qgrid-small 0.9 (locked 1.0)"
        assert "not as locked: qgrid-small 0.9 (locked 1.0)" in doctor.render({})
    finally:
        stored.write_text(text)
        forget()


def test_a_stub_is_locked_too(built: Build) -> None:
    assert environment.locked_versions(NAME, KIND)["small-stub"] == "3.0+cpu"
