"""Provenance: everything that a repetition needs, and a fingerprint of its stable part."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qgrid
from qgrid import environment, methods, published, runtimes
from qgrid.envs import locks, wheels
from qgrid.lora import adapters


def test_the_lock_pins_what_matters() -> None:
    locked = environment.locked_versions("main")
    assert locked["torch"] == "2.13.0"
    assert locked["hydra-core"] == "1.3.8"
    assert locked["huggingface_hub"] == locked["huggingface-hub"]
    assert not any("#" in name or " " in name for name in locked)


def test_an_environment_without_a_lock_is_one_sentence() -> None:
    with pytest.raises(environment.UnknownEnvironment, match=r"`vlm` has no lock .*main"):
        environment.locked_versions("vlm")


def test_names_compare_as_package_indexes_compare_them() -> None:
    assert environment.normalized("Huggingface_Hub.x") == "huggingface-hub-x"


def test_provenance_says_what_a_repetition_needs() -> None:
    found = environment.provenance()
    json.dumps(found, allow_nan=False)
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    for key in (
        "fingerprint", "qgrid", "python", "versions", "cpu", "cpu_flags", "cores", "memory_gib",
        "cuda", "driver", "gpus", "not_locked", "host", "os", "kernel", "threads", "git_commit",
        "time", "load_average",
    ):  # fmt: skip
        assert key in found, key
    assert found["threads"]["physical_cores"] >= 1
    assert len(found["load_average"]) == 3


def test_the_list_of_packages_has_all_that_any_choice_declares() -> None:
    """A module's declared packages, and the lists that options, formats and adapters add."""
    declared = {*adapters.PACKAGES}
    for module in _modules(methods, published, runtimes):
        for name in ("SUPPORTS", "LOADS"):
            declared |= set(getattr(getattr(module, name, None), "packages", ()))
        if not module.__name__.startswith("qgrid.runtimes._linears"):  # names to import by
            for name in ("PACKAGES", "_PACKAGES"):
                listed = getattr(module, name, ())
                declared |= set(listed.values() if isinstance(listed, dict) else listed)
    assert {"gptqmodel", "peft", "optimum-quanto", "aqlm"} <= declared
    assert declared - set(environment.PACKAGES) == set()


def _modules(*packages: ModuleType) -> Iterator[ModuleType]:
    for package in packages:
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(found.name)


def test_the_fingerprint_is_of_the_stable_part_only() -> None:
    first, second = environment.provenance(), environment.provenance()
    assert first["fingerprint"] == second["fingerprint"]
    stable = environment.stable_part()
    assert environment.fingerprint(stable) == first["fingerprint"]
    changed = {**stable, "driver": ["999.1"]}
    assert environment.fingerprint(changed) != first["fingerprint"]
    assert not {"time", "load_average", "host", "git_commit", "kernel"} & stable.keys()


def test_a_local_build_tag_is_no_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = environment.locked_versions("main")
    monkeypatch.setattr(
        environment,
        "versions",
        lambda: {"torch": f"{locked['torch']}+cpu", "transformers": "1.0", "unheard-of": "1"},
    )
    expected = f"1.0 (locked {locked['transformers']})"
    assert environment.deviations() == {"transformers": expected}


def test_cuda_is_read_from_torch_s_version_file() -> None:
    torch = pytest.importorskip("torch")
    assert environment.cuda_version() == torch.version.cuda


def test_the_commit_of_the_checkout_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "qgrid"
    package.mkdir()
    monkeypatch.setattr(qgrid, "__file__", str(package / "__init__.py"))
    assert environment.git_commit() is None
    git("init")
    (package / "__init__.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert environment.git_commit() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("2")
    assert environment.git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_thread_settings_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment.threads()
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["usable_cores"] == len(os.sched_getaffinity(0))


def test_a_wheel_is_another_one_for_another_processor_compiler_or_setting() -> None:
    parts = {"requirement": "a==1", "cmake": "-DX=1", **wheels.machine()}
    assert wheels.key(parts) == wheels.key(dict(reversed(parts.items())))
    assert wheels.key(parts).startswith("a-1-")
    keys = {wheels.key({**parts, name: "other"}).rpartition("-")[2] for name in parts}
    assert len(keys) == len(parts)


def test_a_wheel_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGRID_WHEELS", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'small'\nversion = '1'\n[tool.setuptools]\npy-modules = []\n"
    )
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads 0 as: no isolation
    folder = wheels.folder(str(source), "-DX=1")
    built = next(folder.glob("small-1-*.whl"))
    before = built.stat().st_ino
    assert wheels.folder(str(source), "-DX=1") == folder
    assert next(folder.glob("*.whl")).stat().st_ino == before
    assert wheels.folder(str(source), "-DX=2") != folder


def test_wheel_of_other_settings_is_not_pips_own_cached_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip remembers what it built of a source, whatever the settings were."""
    inside = tmp_path / "small-1"
    inside.mkdir()
    (inside / "setup.py").write_text(
        "import os, setuptools\n"
        "setuptools.setup(name='small', version='1', description=os.environ['CMAKE_ARGS'])\n"
    )
    (inside / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: small\nVersion: 1\n")
    with tarfile.open(tmp_path / "small-1.tar.gz", "w:gz") as archive:
        archive.add(inside, "small-1")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    for name, value in {
        "QGRID_WHEELS": tmp_path / "cache",
        "PIP_CACHE_DIR": tmp_path / "pip",
        "PIP_FIND_LINKS": tmp_path,
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }.items():
        monkeypatch.setenv(name, str(value))
    for settings in ("-DX=1", "-DX=2"):
        (wheel,) = wheels.folder("small==1", settings).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            told = content.read("small-1.dist-info/METADATA").decode()
        assert f"Summary: {settings}\n" in told


def test_make_installs_another_wheel_for_other_settings(tmp_path: Path) -> None:
    """A stand-in for Python notes what it is called with; nothing is installed."""
    log, venv = tmp_path / "log", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\necho "$CMAKE_ARGS|$*" >> {log}\n'
        'case "$*" in *envs.wheels) echo /wheels/of-$CMAKE_ARGS;; esac\n'
    )
    python.chmod(0o755)

    def make(*settings: str) -> list[str]:
        log.write_text("")
        outer = {"CMAKE_ARGS", "MAKEFLAGS", "MAKEOVERRIDES"}  # of the `make test` that runs this
        plain = {name: value for name, value in os.environ.items() if name not in outer}
        command = ["make", f"VENV={venv}", f"{venv}/main.stamp", *settings]
        root = Path(qgrid.__file__).parents[1]
        subprocess.run(command, cwd=root, env=plain, check=True, capture_output=True)
        return [line for line in log.read_text().splitlines() if "wheels" in line]

    def forced(settings: str) -> str:
        options = "-q --no-deps --force-reinstall"
        return f"{settings}|-m pip install {options} /wheels/of-{settings}/*.whl"

    assert forced("") in make()
    assert make() == []
    assert forced("-DX=1") in make("CMAKE_ARGS=-DX=1")
    assert make("CMAKE_ARGS=-DX=1") == make() == []
    (venv / "main.stamp").unlink()  # as when a locked version changes
    assert any(line.endswith("/wheels/of--DX=1/*.whl") for line in make())


def test_make_replaces_an_environment_whose_python_changed(tmp_path: Path) -> None:
    """Its stamps say that all is installed, but nothing is where another Python looks."""
    log, venv, python = tmp_path / "log", tmp_path / "venv", tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\n'
        f'case "$*" in *venv*) mkdir -p {venv}/bin && cp {python} {venv}/bin/python;; esac\n'
    )
    python.chmod(0o755)
    root = Path(qgrid.__file__).parents[1]
    command = ["make", f"VENV={venv}", f"PYTHON={python}", f"{venv}/dev.stamp"]

    def made() -> str:
        log.write_text("")
        plain = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        subprocess.run(command, cwd=root, env=plain, check=True, capture_output=True)
        return log.read_text()

    everything = ("-m venv --clear", "editable_mode=compat -e .", "envs/dev.txt")
    first, second = made(), made()
    assert all(step in first for step in everything)
    assert not any(step in second for step in everything)
    for broken in ("#!/bin/sh\nexit 1\n", "#!/nonexistent/python\n"):
        (venv / "bin" / "python").write_text(broken)  # no pip, as after `venv` was interrupted
        again = made()
        assert all(step in again for step in everything), again


def test_a_wheel_that_cannot_be_kept_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QGRID_WHEELS", "/dev/null/wheels")
    monkeypatch.setattr(sys, "argv", ["wheels"])
    assert wheels.main() == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("set QGRID_WHEELS to a folder") == len(wheels.SOURCES)


def test_every_package_built_from_sources_is_pinned() -> None:
    locked = environment.locked_versions("main")
    assert wheels.SOURCES.keys() <= locked.keys()


def test_what_does_not_come_as_sources_is_installed_as_usual() -> None:
    rest = [line for line in wheels.rest() if not line.startswith("#")]
    pinned = {line.partition("==")[0] for line in rest}
    assert not pinned & wheels.SOURCES.keys()
    assert len(rest) + len(wheels.SOURCES) == len(locks.pins("main", "cpu"))
    assert "torch==2.13.0" in rest
