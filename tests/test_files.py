"""No torn file, no half folder, one holder of a lock, hashes remembered only while they hold."""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qgrid import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "record.json"
    files.write_atomic(target, "old")
    with pytest.raises(TypeError):
        files.write_atomic(target, 3)  # type: ignore[arg-type]
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with pytest.raises(RuntimeError), files.built_aside(target) as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.built_aside(target) as aside:
        (aside / "whole").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["whole"]


def test_a_folder_is_replaced_in_the_end_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "artifact"

    def build(name: str) -> None:
        with files.built_aside(target) as aside:
            (aside / name).write_text("x")

    build("first")
    with pytest.raises(RuntimeError), files.built_aside(target):
        assert [p.name for p in target.iterdir()] == ["first"]
        raise RuntimeError
    rename, moved = Path.rename, []

    def second_fails(self: Path, to: Path) -> Path:
        moved.append(to)
        if len(moved) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        build("second")
    monkeypatch.undo()
    assert [p.name for p in target.iterdir()] == ["first"]
    target.rename(files.before(target))  # as a process leaves it that ends between the renames
    files.put_back(target)
    assert [p.name for p in target.iterdir()] == ["first"]
    build("third")
    files.put_back(target)
    assert [p.name for p in target.iterdir()] == ["third"]
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


HOLD = "import sys, time; from pathlib import Path; from qgrid import files\n" + (
    "with files.locked(Path(sys.argv[1]), shared=sys.argv[2] == 'shared'):\n"
    "    print('held', flush=True); time.sleep(60)\n"
)


def holder(path: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_lock_is_freed_when_its_holder_is_killed(tmp_path: Path) -> None:
    first = holder(tmp_path / "lock", "alone")
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    second = holder(tmp_path / "lock", "alone")
    time.sleep(0.5)
    assert second.poll() is None
    os.kill(first.pid, signal.SIGKILL)
    assert second.stdout is not None
    assert second.stdout.readline() == "held\n"
    second.kill()


def test_shared_holders_stand_together(tmp_path: Path) -> None:
    both = [holder(tmp_path / "lock", "shared") for _ in range(2)]
    for each in both:
        assert each.stdout is not None
        assert each.stdout.readline() == "held\n"
        each.kill()


def test_a_remembered_hash_is_dropped_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    cache = files.HashCache(tmp_path / "hashes.json")
    for content in (b"one", b"two"):
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        assert cache.sha256(file) == hashlib.sha256(content).hexdigest()
    again = files.HashCache(tmp_path / "hashes.json")
    stat = file.stat()
    with file.open("r+b") as handle:
        handle.write(b"xxx")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert again.sha256(file) == hashlib.sha256(b"two").hexdigest()  # same size, time and inode
    assert again.sha256(file, fresh=True) == hashlib.sha256(b"xxx").hexdigest()


def test_a_torn_hash_cache_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_text("{")
    (tmp_path / "file").write_text("x")
    cache = files.HashCache(tmp_path / "hashes.json")
    assert cache.sha256(tmp_path / "file") == files.sha256(tmp_path / "file")


def test_a_cache_of_the_user_s_own_wherever_home_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/xdg")
    assert files.user_cache("QGRID_X", "x") == Path("/of/xdg/qgrid/x")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/of/home")
    assert files.user_cache("QGRID_X", "x") == Path("/of/home/.cache/qgrid/x")
    monkeypatch.delenv("HOME")

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    found = files.user_cache("QGRID_X", "x")
    assert found == files.machine_locks().parent / "qgrid" / "x"
    monkeypatch.setenv("QGRID_X", "named")
    assert files.user_cache("QGRID_X", "x") == Path.cwd() / "named"
