"""Leases with real processes: one owner each, taken over when it is dead, and only then."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qgrid.store import leases
from tests import faults

HOLD = """
import sys, time
from pathlib import Path
from qgrid.store import leases
with leases.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

# Enters the same room again and again; says so when it meets somebody who lives.
ENTER = """
import os, sys, time
from pathlib import Path
from qgrid.store import leases
folder, room, log = (Path(each) for each in sys.argv[1:4])
while True:
    with leases.held(folder):
        try:
            inside = int(room.read_text() or 0)
        except FileNotFoundError:
            inside = 0
        if inside and Path(f"/proc/{inside}").exists():
            print("met", inside, flush=True)
        room.write_text(str(os.getpid()))
        time.sleep(0.002)
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\\n")
        room.unlink()
    time.sleep(0.05)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lease until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def stranger(folder: Path) -> Path:
    """A lease of an owner whose process numbers mean nothing here."""
    folder.mkdir(parents=True)
    owner = {"token": "t", "host": "far", "boot": "other", "pid": os.getpid(), "started": "1"}
    (folder / "1").write_text(json.dumps(owner) + "\n")
    return folder / "1"


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    folder = leases.of(tmp_path, "cells", "a")
    first = leases.attempt(folder)
    assert first is not None
    assert leases.attempt(folder) is None
    owner = leases.owner(folder)
    assert owner is not None
    assert owner.pid == os.getpid()
    first.release()
    assert leases.owner(folder) is None
    assert leases.is_released(folder)
    second = leases.attempt(folder)
    assert second is not None
    assert len(list(folder.iterdir())) == 1
    with pytest.raises(leases.Lost):
        first.check()
    second.check()
    first.release()  # of what is not its own any more
    assert leases.attempt(folder) is None


def test_who_is_killed_is_followed_at_once(tmp_path: Path) -> None:
    folder = leases.of(tmp_path, "cells", "a")
    process = holder(folder)
    assert leases.attempt(folder) is None
    process.kill()
    process.wait()
    taken = leases.attempt(folder)
    assert taken is not None
    taken.check()


def test_a_process_of_the_same_number_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leases.of(tmp_path, "cells", "a")
    assert leases.attempt(folder) is not None
    file = folder / "1"
    owner = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(owner | {"started": "12"}) + "\n")  # this process began later
    assert leases.attempt(folder) is not None


def test_a_silent_owner_of_another_machine_is_believed_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(leases.SECONDS, "0.5")
    folder = leases.of(tmp_path, "cells", "a")
    file = stranger(folder)
    old = time.time() - 1e6
    os.utime(file, (old, old))  # a clock elsewhere says nothing
    assert leases.attempt(folder) is None
    begin = time.monotonic()
    with leases.held(folder) as lease:
        assert time.monotonic() - begin >= 0.5
        lease.check()
    assert not file.exists()


def test_an_owner_of_another_machine_that_beats_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(leases.SECONDS, "0.4")
    folder = leases.of(tmp_path, "cells", "a")
    lease = leases.Lease(stranger(folder), "t")
    before = lease.file.stat().st_size
    for _ in range(12):
        assert leases.attempt(folder) is None
        time.sleep(0.1)
        lease.beat()
    assert lease.file.stat().st_size == before + 12
    time.sleep(0.1)
    assert leases.attempt(folder) is None  # seen to change since
    time.sleep(0.5)
    assert leases.attempt(folder) is not None


def test_a_process_beats_for_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(leases.SECONDS, "0.5")
    process = holder(leases.of(tmp_path, "cells", "a"))
    file = leases.of(tmp_path, "cells", "a") / "1"
    size = file.stat().st_size
    faults.wait_for(lambda: file.stat().st_size > size + 2, "three beats")
    process.kill()
    process.wait()


def test_a_view_that_is_out_of_date_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leases.of(tmp_path, "cells", "a")
    held = [leases.attempt(folder)]
    for _ in range(4):
        assert held[-1] is not None
        held[-1].release()
        held.append(leases.attempt(folder))  # number 5 counts now
    monkeypatch.setattr(leases, "_highest", lambda each: 0)  # as of an old listing
    assert leases.attempt(folder) is None
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["5"]
    assert held[-1] is not None
    held[-1].check()


def test_waiting_ends_when_told(tmp_path: Path) -> None:
    folder = leases.of(tmp_path, "cells", "a")
    assert leases.attempt(folder) is not None

    def stop() -> None:
        raise InterruptedError("told to")

    with pytest.raises(InterruptedError), leases.held(folder, stop):
        raise AssertionError


@pytest.mark.slow
def test_processes_that_are_killed_at_random_never_meet(tmp_path: Path) -> None:
    folder, room, log = (
        leases.of(tmp_path, "artifacts", "a"),
        tmp_path / "room",
        tmp_path / "log",
    )
    command = [sys.executable, "-c", ENTER, str(folder), str(room), str(log)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    rng = random.Random(0)
    running = [start() for _ in range(4)]
    said = ""
    for _ in range(12):
        entered = log.stat().st_size if log.exists() else 0
        faults.wait_for(
            lambda e=entered: log.exists() and log.stat().st_size > e, "somebody to enter"
        )
        time.sleep(rng.uniform(0.0, 0.05))
        victim = running.pop(rng.randrange(len(running)))
        victim.kill()
        said += victim.communicate()[0]
        running.append(start())
    for process in running:
        process.kill()
        said += process.communicate()[0]
    assert said == ""
    assert len(set(log.read_text().split())) > 4


def test_a_process_that_proc_hides_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's where `/proc` is mounted with `hidepid`."""
    folder = leases.of(tmp_path, "cells", "a")
    held = leases.attempt(folder)
    assert held is not None
    owner = json.loads(held.file.read_text().splitlines()[0])
    held.file.write_text(json.dumps(owner | {"pid": 2**22 + 1}) + "\n")  # nothing of it in /proc

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert leases.attempt(folder) is None
    assert leases.owner(folder) is not None
    monkeypatch.undo()
    assert leases.owner(folder) is None
    assert leases.attempt(folder) is not None


def test_a_file_that_goes_stale_while_it_is_read_changes_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system when another machine removes it."""
    folder = leases.of(tmp_path, "cells", "a")
    held = leases.attempt(folder)
    assert held is not None

    def stale(file: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    assert leases.attempt(folder) is None
    assert leases.owner(folder) is None
    assert not leases.is_released(folder)
    monkeypatch.undo()
    held.check()
