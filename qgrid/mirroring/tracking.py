"""The W&B mirror of records: a process of its own that costs results nothing; `sync` replays."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import qgrid
from qgrid import redact
from qgrid.mirroring import wandb_run
from qgrid.store import records
from qgrid.types import Record, Settings, Tracking

SECONDS_A_RECORD = 2.0  # what mirroring may cost a cell
REPLAY = "`python -m qgrid sync` replays what is missing"


class Mirror(Protocol):
    """Receives every record that a sweep writes. No method raises."""

    def log(self, record: Record) -> None:
        """Mirror a record that is on disk; returns at once."""

    def close(self) -> None:
        """Wait for what is under way, at most 2 s a record."""


def start(tracking: Tracking, sweep: str, store: Path) -> Mirror:
    """The mirror that a configuration asks for; for `none` one that does nothing.

    It is ready about two seconds after its start, so start it before the first cell runs.
    """
    if tracking.name == "none" or wandb_run.is_disabled():
        return NoMirror()
    if importlib.util.find_spec("wandb") is None:
        say("wandb is not installed, so nothing is mirrored; `pip install wandb`")
        return NoMirror()
    return ProcessMirror(tracking, sweep, store)


def say(sentence: str) -> None:
    """Tell the user."""
    sys.stderr.write(f"qgrid: {sentence}\n")


class NoMirror:
    """Tracking switched off."""

    def log(self, record: Record) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class ProcessMirror:
    """Feeds the mirroring process; never waits for it except when closing."""

    def __init__(self, tracking: Tracking, sweep: str, store: Path) -> None:
        self._store = store
        self._waiting: deque[bytes] = deque()
        self._num_logged = self._num_done = 0
        self._rest = b""
        self._sentences: list[str] = []  # told at the end: a progress bar is running
        (store / "wandb").mkdir(parents=True, exist_ok=True)
        module = "qgrid.mirroring.mirror"
        command = [sys.executable, "-m", module, str(store), sweep, tracking.project]
        with (store / "wandb" / "mirror.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *([] if tracking.entity is None else [tracking.entity])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the controller's to answer
                env={**os.environ, "PYTHONPATH": _python_path()},
                bufsize=0,
            )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def log(self, record: Record) -> None:
        """See `Mirror.log`."""
        path = records.path(self._store.absolute(), record.cell_id)
        self._waiting.append(f"{path}\n".encode())
        self._num_logged += 1
        self._feed()
        self._hear()

    def close(self) -> None:
        """See `Mirror.close`. What is not done by then is killed; `sync` replays it."""
        self._hear()
        missing = self._num_logged - self._num_done
        deadline = time.monotonic() + SECONDS_A_RECORD * missing
        while missing and time.monotonic() < deadline and self._process.poll() is None:
            self._feed()
            self._hear()
            missing = self._num_logged - self._num_done
            time.sleep(0.01)
        self._end()
        for sentence in self._sentences:
            say(sentence)
        missing = self._num_logged - self._num_done
        if missing:
            say(f"{missing} of {self._num_logged} records did not reach W&B in time; {REPLAY}")

    def _feed(self) -> None:
        """Hand over as many paths as the pipe takes; a line is written whole or not at all."""
        assert self._process.stdin is not None
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._waiting:
                if self._process.stdin.write(self._waiting[0]) is None:
                    return
                self._waiting.popleft()

    def _hear(self) -> None:
        """Read what the process has answered so far."""
        assert self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while chunk := self._process.stdout.read(65536):
                self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "done":
                self._num_done += 1
            elif word == "say":
                self._sentences.append(rest)

    def _end(self) -> None:
        """End the process and W&B's own below it; nothing it still does is needed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._hear()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _python_path() -> str:
    """The folder that holds this very package, before what is there already."""
    folder = str(Path(qgrid.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


# --- replaying -----------------------------------------------------------------------------------


def sync(store: Path, sweep: str | None) -> int:
    """Replay the records of a sweep, or of all, into W&B; what is there already is skipped.

    Returns:
        0; 1 when W&B did not take a record.
    """
    if importlib.util.find_spec("wandb") is None:
        say("`sync` needs wandb: `pip install wandb`")
        return 1
    mode = wandb_run.wanted_mode()
    written = total = 0
    for folder, record in _recorded(store, sweep):
        tracking = _tracking(folder)
        total += 1
        try:
            written += wandb_run.mirror(record, folder.name, tracking, store, mode)
        except Exception as error:  # noqa: BLE001 - wandb raises many kinds
            say(f"W&B did not take `{record.cell_id}`: {redact.text(str(error))}")
            return 1
    say(_result(written, total, mode, store))
    return 0


def _result(written: int, total: int, mode: wandb_run.Mode, store: Path) -> str:
    before = f", {total - written} were there before" if total > written else ""
    if mode == "online":
        return f"{written} of {total} records sent to W&B{before}"
    return (
        f"offline: {written} of {total} records written to {store / 'wandb'}{before}; "
        "after `wandb login` the same command sends them"
    )


def _recorded(store: Path, sweep: str | None) -> Iterator[tuple[Path, Record]]:
    """Each record once, with the folder of the latest sweep that holds its cell."""
    from qgrid.sweep import read_plan

    plans = sorted(
        (store / "sweeps").glob(f"{sweep if sweep is not None else '*'}/plan.jsonl"),
        key=lambda path: path.stat().st_mtime_ns,
        reverse=True,
    )
    seen: set[str] = set()
    for plan in plans:
        cells = [each for each in read_plan(plan) if each.cell_id not in seen]
        seen |= {each.cell_id for each in cells}
        for record in records.read_all(store, cells).values():
            yield plan.parent, record


def _tracking(folder: Path) -> Tracking:
    """Where a sweep's runs go: what its settings say, else the default project."""
    from qgrid import codec

    with contextlib.suppress(OSError, codec.InvalidValue):
        text = (folder / "settings.json").read_text(encoding="utf-8")
        return codec.loads(Settings, text).tracking
    return Tracking("wandb", "qgrid", None)
