"""A built wheel holds everything: `qgrid` plans a grid from any folder without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, unpacked as `pip install` would place it."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # a copy: setuptools leaves a `build` folder beside the sources
    for name in ("qgrid", "conf", "sweeps"):
        shutil.copytree(ROOT / name, sources / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*build, "-w", str(folder), str(sources)], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    site = folder / "site"
    with zipfile.ZipFile(next(folder.glob("qgrid-*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def test_a_plan_from_any_folder(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qgrid", "plan", "+sweeps=demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "14 cells: 12 run, 2 unsupported" in done.stdout


def test_the_wheel_holds_the_model_and_the_console_script(installed: Path) -> None:
    assert (installed / "qgrid" / "demo" / "model" / "model.safetensors").stat().st_size < 16e6
    assert (installed / "qgrid" / "demo" / "slices" / "manifest.json").is_file()
    assert (installed / "qgrid" / "envs" / "main.txt").is_file()
    entry = next(installed.glob("qgrid-*.dist-info")) / "entry_points.txt"
    assert "qgrid = qgrid.__main__:main" in entry.read_text()


def test_the_sources_are_the_installed_ones(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import qgrid; print(qgrid.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.strip() == str(installed / "qgrid" / "__init__.py")
