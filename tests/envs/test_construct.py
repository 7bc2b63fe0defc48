"""Real builds of a small environment: once, again for another lock, never half."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qgrid.envs import builds, construct
from qgrid.envs.builds import Build
from qgrid.envs.recipes import Recipe
from qgrid.envs.screen import Screen
from tests import faults
from tests.envs.conftest import KIND, Write


def build(recipe: Recipe) -> tuple[Build, bool, str]:
    told = io.StringIO()
    made, now = construct.build(recipe, (), Screen(told))
    return made, now, told.getvalue()


def failure(recipe: Recipe) -> str:
    with pytest.raises(construct.NotBuilt) as raised:
        build(recipe)
    assert builds.find(recipe) is None
    assert not builds.folder_of(recipe).exists()
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


def ask(made: Build, code: str) -> str:
    command = [str(made.interpreter), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_an_environment_is_built_once_and_anew_for_another_lock(write: Write) -> None:
    recipe = write()
    assert builds.find(recipe) is None
    first, now, told = build(recipe)
    assert now
    assert "virtual environment" in told
    assert "/1" in told  # counted
    assert ask(first, "import qgrid_small; print(qgrid_small.VERSION)") == "1.0"
    assert first.versions() | {"qgrid-small": "1.0", "small-stub": "3.0+cpu"} == first.versions()
    stub = "from importlib.metadata import version; print(version('small-stub'))"
    assert ask(first, stub) == "3.0+cpu"
    assert first.bytes == construct._size(first.folder) - _blocks(first.folder / builds.MARKER)

    again, now, told = build(recipe)
    assert (again, now, told) == (first, False, "")

    changed = write(version="2.0")
    assert builds.find(changed) is None
    second, now, _ = build(changed)
    assert now
    assert ask(second, "import qgrid_small; print(qgrid_small.VERSION)") == "2.0"
    assert builds.others(changed) == [first.folder]
    assert builds.find(write()) == first  # the old one is there still


def _blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.slow
def test_what_a_killed_build_left_is_not_whole_and_is_removed(write: Write) -> None:
    recipe = write()
    code = (
        "import sys; from qgrid.envs import construct, recipes\n"
        "from qgrid.envs.screen import Screen\n"
        "construct._prove = lambda site: print('here', flush=True) or sys.stdin.read()\n"
        "construct.build(recipes.recipe('small', sys.argv[1]), (), Screen())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, KIND], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.communicate()
    folder = builds.folder_of(recipe)
    assert (folder / "bin" / "python").exists()
    assert builds.find(recipe) is None
    left = folder / "left"
    left.touch()
    _, now, told = build(recipe)
    assert now
    assert "interrupted" in told
    assert not left.exists()


def start_proof() -> tuple[subprocess.Popen[str], int]:
    """A build in another process, and the process of its proof, which takes for ever."""
    code = (
        "import sys; from qgrid.envs import construct, recipes\n"
        "from qgrid.envs.screen import Screen\n"
        "construct.build(recipes.recipe('small', sys.argv[1]), (), Screen())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, KIND], stderr=subprocess.PIPE, text=True
    )
    proofs: list[int] = []

    def proving() -> bool:
        proofs[:] = [pid for pid in _children(process.pid) if "time.sleep" in _command(pid)]
        return bool(proofs)

    faults.wait_for(proving, "the proof")
    return process, proofs[0]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(write: Write) -> None:
    recipe = write(check="import time; time.sleep(600)")
    process, proof = start_proof()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert "KeyboardInterrupt" in told
    assert not builds.folder_of(recipe).exists()
    assert not faults.is_alive(proof)


def test_what_a_killed_build_has_started_keeps_the_next_waiting(write: Write) -> None:
    recipe = write(check="import time; time.sleep(600)")
    process, proof = start_proof()
    process.kill()
    process.communicate()
    path = builds.folder_of(recipe)
    with path.with_name(f"{path.name}.lock").open("a") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(proof, signal.SIGKILL)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def test_a_second_process_waits_and_finds_what_the_first_built(write: Write) -> None:
    write()
    code = (
        "import sys; from qgrid.envs import construct, recipes\n"
        "from qgrid.envs.screen import Screen\n"
        "print(construct.build(recipes.recipe('small', sys.argv[1]), (), Screen())[1])"
    )
    command = [sys.executable, "-c", code, KIND]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [process.communicate() for process in processes]
    assert sorted(told.strip() for told, _ in ends) == ["False", "True"]


@pytest.mark.slow
def test_an_environment_whose_python_is_gone_is_built_again(write: Write) -> None:
    recipe = write()
    made, _, _ = build(recipe)
    made.interpreter.unlink()
    assert builds.find(recipe) is None
    assert build(recipe)[1]


def test_a_proof_that_fails_is_one_sentence_with_its_reason(write: Write) -> None:
    sentence = failure(write(check="raise ImportError('libsmall.so is missing')"))
    assert "was installed and does not work: ImportError: libsmall.so is missing" in sentence
    log = Path(sentence.rpartition("log: ")[2].rstrip(")"))
    assert "Traceback" in log.read_text()


def test_a_package_that_no_index_has_is_one_sentence(write: Write) -> None:
    sentence = failure(write(version="9.9", made=False))
    assert "pip finds no qgrid-small==9.9 for this Python and machine" in sentence


def test_no_network_is_one_sentence(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(version="9.9", made=False)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")  # it tells of each
    assert "pip cannot reach its package index" in failure(recipe)


def test_a_full_disk_is_one_sentence(write: Write) -> None:
    assert "needs about 1e+09 GiB" in failure(write(gib=1e9))


def test_a_disk_that_fills_up_is_one_sentence(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log may be empty then: what is free after the failure tells."""
    recipe = write(check="raise SystemExit(1)")
    assert "does not work: it says nothing" in failure(recipe)
    monkeypatch.setattr(construct, "FULL_BYTES", 2**60)
    sentence = failure(recipe)
    assert f"no space left in {builds.home()} or {tempfile.gettempdir()}; make room" in sentence


def test_a_file_that_cannot_be_written_is_one_sentence(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "qgrid.json")

    recipe = write()
    monkeypatch.setattr(builds, "mark", full)
    assert "No space left on device: 'qgrid.json'" in failure(recipe)


def test_a_sentence_holds_no_password_of_an_index(write: Write) -> None:
    code = "raise SystemExit('ERROR: 403 of https://user:pass-word@index.example/simple')"
    sentence = failure(write(check=code))
    assert "403 of https://[redacted]@index.example" in sentence


def test_another_python_is_one_sentence(write: Write) -> None:
    assert "is for Python 3.7, and this is" in failure(write(python=["3.7"]))


def test_a_place_that_cannot_be_written_is_one_sentence(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write()
    monkeypatch.setenv("QGRID_ENVS", "/dev/null/envs")
    with pytest.raises(
        construct.NotBuilt, match=r"/dev/null/envs .Not a directory.; set QGRID_ENVS"
    ):
        build(recipe)


def test_a_torch_for_another_device_is_refused_before_the_rest(
    write: Write, tmp_path: Path
) -> None:
    recipe = write()
    made = Build(tmp_path / "env", "3.11.7", 0, 0.0)
    (made.site / "torch").mkdir(parents=True)
    site = construct._Site(recipe, made, Screen(io.StringIO()), tmp_path / "log", 0)
    version = made.site / "torch" / "version.py"
    builds_of_torch = {"cpu": "None", "cuda": "'13.0'"}
    for kind, cuda in builds_of_torch.items():
        version.write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda}\n")
        if kind == KIND:
            construct._check_torch(site)
            continue
        advice = rf"needs one for {KIND}; .*setup small -- --index-url URL"
        with pytest.raises(construct.NotBuilt, match=advice):
            construct._check_torch(site)
