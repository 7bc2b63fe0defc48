"""What tests of a whole store share: a copy of one that a sweep made, and what changed in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qgrid import codec
from qgrid.__main__ import main
from qgrid.store import leases, records
from qgrid.types import PlannedCell
from tests.drills import running, trivial

GRID = [trivial.choice(bits, load=load) for bits in (8, 4) for load in (0, 1)]
HOLD = (
    "import sys, time, pathlib; from qgrid.store import leases; "
    "lease = leases.attempt(pathlib.Path(sys.argv[1])); print(lease is not None, flush=True); "
    "time.sleep(600)"
)


@dataclass(frozen=True)
class Made:
    """A store with one finished sweep of trivial cells: three artifacts, six records."""

    store: Path
    cells: tuple[PlannedCell, ...]

    @property
    def folder(self) -> Path:
        """The sweep's."""
        return self.store / "sweeps" / "trivial"

    @property
    def cell(self) -> PlannedCell:
        """One that is compared with a baseline."""
        return next(each for each in self.cells if each.baseline_cell_id is not None)

    @property
    def record(self) -> Path:
        return records.path(self.store, self.cell.cell_id)

    @property
    def artifact(self) -> Path:
        return self.store / "artifacts" / self.cell.artifact_id

    @property
    def quality(self) -> Path:
        return self.store / "quality" / self.cell.quality_id

    def copy(self, store: Path) -> Made:
        """The same in another place."""
        shutil.copytree(self.store, store)
        return Made(store, self.cells)

    def finish(self) -> int:
        """Run the sweep again; the exit code."""
        return running.finish(self.folder)

    def statuses(self) -> set[str]:
        found = records.read_all(self.store, self.cells)
        assert found.keys() == {each.cell_id for each in self.cells}
        return {record.status for record in found.values()}


def install(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    """Trivial cells, in processes that wait for no other test's timings: locks are temporary."""
    trivial.install(monkeypatch)
    temporary.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))


def original(temporary: Path) -> Made:
    """A store for a module of tests, which copy it."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, temporary / "tmp")
        return make(temporary / "store")


def make(store: Path) -> Made:
    """Run a sweep of trivial cells to its end."""
    folder, cells = trivial.write(GRID, store)
    assert running.finish(folder) == 0, (folder / "drill.log").read_text()
    return Made(store, tuple(cells))


def verb(name: str, store: Path, *flags: str) -> int:
    """Run a verb on a store, as the command line does; the exit code."""
    return main([name, f"out={store}", *flags])


def contents(store: Path) -> dict[str, bytes | None]:
    """Everything in a store but its leases, with the bytes of files."""
    return {
        str(path.relative_to(store)): path.read_bytes() if path.is_file() else None
        for path in sorted(store.rglob("*"))
        if path.relative_to(store).parts[0] != "leases"
    }


@contextmanager
def holder(lease: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lease until the block ends, or it is killed."""
    command = [sys.executable, "-c", HOLD, str(lease)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def held_by_the_dead(lease: Path) -> None:
    """A lease whose owner was killed."""
    with holder(lease):
        pass


def held_elsewhere(lease: Path) -> Path:
    """A lease of another machine; its file."""
    lease.mkdir(parents=True)
    owner = leases.Owner("token", "elsewhere", "another boot", 1, "1")
    (lease / "1").write_text(codec.dumps(owner) + "\n")
    return lease / "1"


def run(folder: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A written sweep in a process of its own that leaves no file but what qgrid writes."""
    return subprocess.run(
        trivial.command(folder),
        cwd=cwd,
        env=trivial.variables(**variables),
        capture_output=True,
        text=True,
        timeout=running.SECONDS,
    )


def cut(file: Path) -> Path:
    """Take the last bytes of a file away."""
    file.write_bytes(file.read_bytes()[:-10])
    return file


@contextmanager
def small_disk(place: Path, size_kib: int) -> Iterator[Path]:
    """A file system of its own; skips the test where nobody may mount one."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k,mode=755", "qgrid-test", str(place)]
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a small disk: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """A small disk that cannot be written to for the length of a block."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def fill(disk: Path, leave_kib: int) -> Path:
    """A file that takes all room of a disk but some; it may be removed again."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave_kib * 1024)
    return ballast
