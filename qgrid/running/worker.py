"""The worker: a warm parent that only imports, and a forked child for each stage.

`python -m qgrid.running.worker` reads the path of a job file as a line of JSON and writes
`started PID` and `ended PID CODE` on stdout. The parent computes nothing and never touches a GPU: a
child forked from a process that has computed would hang in its first parallel region. The child
runs the stage, writes `result.json` into the job's folder and its output into `log.txt` beside it.
`python -m qgrid.running.worker --job FILE` runs one stage in a process of its own, where there is
no fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import NoReturn

from qgrid import codec
from qgrid.environment import own_part
from qgrid.running import preload
from qgrid.store import records
from qgrid.store.leases import LAUNCH
from qgrid.types import Failure, Job, StageResult

CAN_FORK = sys.platform == "linux"  # macOS has fork, but its own libraries do not survive it
FINGERPRINT = "QGRID_FINGERPRINT"  # the controller's environment fingerprint, for the results
PR_SET_PDEATHSIG = 1
OOM_SCORE = "800"  # the kernel kills the stage before the controller

SETTINGS = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not start CUDA
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    # Threads that spin long at a barrier stop each other on a busy machine; threads that sleep at
    # once halve the speed of small steps. So: sleep, after some microseconds.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "5000",
}


def main(arguments: Sequence[str]) -> int:
    """Serve jobs until stdin ends, or run the one of `--job FILE`."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if list(arguments[:1]) == ["--job"]:
        _and_exit(lambda: run_alone(Path(arguments[1])))
    _Server(arguments).serve()
    return 0


def run_job(path: Path) -> None:
    """Run the stage of a job file and write its `result.json`."""
    job = codec.loads(Job, path.read_bytes())
    if job.cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    before = len(sys.modules)
    start = time.perf_counter()
    try:
        from qgrid.running import stages

        result = stages.run(job)
    except MemoryError:
        result = StageResult(job.stage, failure=Failure("oom", "The stage ran out of memory."))
    seconds = time.perf_counter() - start
    environment = {
        **result.environment,
        **own_part(),
        "fingerprint": os.environ.get(FINGERPRINT),
        "launch": os.environ.get(LAUNCH),
        "baseline": None if job.baseline is None else Path(job.baseline).name,
        "stage_seconds": seconds,
        "imported": _newest_packages(len(sys.modules) - before),
    }
    records.save_result(Path(job.out) / "result.json", replace(result, environment=environment))


class _Server:
    """The warm parent: waits for jobs and children, imports ahead while nothing is being timed."""

    def __init__(self, ahead: Sequence[str]) -> None:
        self._ahead = list(ahead)  # distributions to import before a job asks for them
        self._children: dict[int, str] = {}  # pid -> stage
        self._buffer = b""
        self._controller = os.getppid()
        self._commands, self._reports = _private_streams()
        self._wakeups, writer = os.pipe()
        for end in (self._wakeups, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controller decides what Ctrl-C ends
        signal.signal(signal.SIGTERM, self._stop)

    def serve(self) -> None:
        """Answer jobs until the controller closes stdin or dies."""
        die_with(self._controller, signal.SIGTERM)
        self._import(preload.BASE)
        with selectors.DefaultSelector() as selector:
            selector.register(self._commands, selectors.EVENT_READ)
            selector.register(self._wakeups, selectors.EVENT_READ)
            while True:
                events = selector.select(0 if self._may_import() else None)
                if not events:
                    self._import([self._ahead.pop(0)])
                for key, _ in events:
                    if key.fd == self._wakeups:
                        self._reap()
                    else:
                        self._receive()

    def _may_import(self) -> bool:
        """Only beside a stage whose time does not count, so that nobody is disturbed."""
        stages = set(self._children.values())
        return bool(self._ahead) and bool(stages) and "speed" not in stages

    def _receive(self) -> None:
        chunk = os.read(self._commands, 65536)
        if not chunk:
            self._stop()
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            self._start(Path(json.loads(line)))

    def _start(self, path: Path) -> None:
        stage, distributions = preload.needs(path)
        self._import(distributions)
        if not self._is_heard():  # a stage begun now would be killed amidst its work
            self._stop()
        if CAN_FORK:
            pid = self._fork(path)
        else:
            command = [sys.executable, "-m", "qgrid.running.worker", "--job", str(path)]
            pid = subprocess.Popen(command, start_new_session=True).pid
        self._children[pid] = stage
        self._report(f"started {pid}")

    def _fork(self, path: Path) -> int:
        gc.collect()
        gc.freeze()  # the child's collector leaves the shared pages alone
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        return _and_exit(lambda: self._child(path, parent))

    def _child(self, path: Path, parent: int) -> None:
        """The life of a forked child: a session of its own that ends with the parent."""
        signal.set_wakeup_fd(-1)
        os.setsid()
        die_with(parent, signal.SIGKILL)
        for descriptor in (self._commands, self._reports, self._wakeups):
            os.close(descriptor)
        if _gpu_was_touched():
            command = [sys.executable, "-m", "qgrid.running.worker", "--job", str(path)]
            os.execv(sys.executable, command)  # noqa: S606 - the same program, afresh
        run_alone(path)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeups, 4096)
        for pid in list(self._children):
            # The group is killed before its leader is reaped, while its number is still its own.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            kill_group(pid)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            del self._children[pid]
            self._report(f"ended {pid} {code}")

    def _is_heard(self) -> bool:
        """Whether the controller still reads what is reported."""
        poll = select.poll()
        poll.register(self._reports, 0)
        return not poll.poll(0)

    def _report(self, line: str) -> None:
        try:
            os.write(self._reports, f"{line}\n".encode())
        except BrokenPipeError:
            self._stop()

    def _import(self, distributions: Sequence[str]) -> None:
        """Import what the distributions' stages need; whatever fails is the child's to report."""
        for distribution in distributions:
            if distribution in self._ahead:
                self._ahead.remove(distribution)
            for module in preload.MODULES.get(distribution, (distribution,)):
                if module in sys.modules or not _is_here(module):
                    continue
                die_with(self._controller, signal.SIGKILL)  # a hung import answers no other
                try:
                    importlib.import_module(module)
                except Exception:  # noqa: BLE001 - any library may fail in any way
                    traceback.print_exc()
                die_with(self._controller, signal.SIGTERM)

    def _stop(self, *_: object) -> NoReturn:
        for pid in self._children:
            kill_group(pid)
        os._exit(0)


def die_with(parent: int, number: signal.Signals) -> None:
    """Ask the kernel to send `number` to this process when its parent ends, however it ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it was already gone
        os._exit(1)


def kill_group(pid: int) -> None:
    """Kill a child and everything that it started; a child that is gone is no error."""
    for kill in (os.killpg, os.kill):  # the second for one that has not made its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _private_streams() -> tuple[int, int]:
    """Descriptors of stdin and stdout that nothing else in this process can reach."""
    commands, reports = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return commands, reports


def run_alone(path: Path) -> None:
    """Run a job in this process, its output in a log beside its result."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminated)
    _log_to(Path(json.loads(path.read_bytes())["out"]) / "log.txt")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    run_job(path)


def _and_exit(run: Callable[[], None]) -> NoReturn:
    """Run and end the process: a child must never return into its parent's loop or clean up."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - the process ends here; the log keeps the reason
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _terminated(_: int, __: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinds: half-built folders are removed


def _log_to(file: Path) -> None:
    """Send stdout, stderr and the stack of a crash to `file`; SIGUSR1 writes the stack as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


def _gpu_was_touched() -> bool:
    """Whether an import started CUDA in the parent, so that this fork of it cannot use CUDA."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda._is_in_bad_fork())


def _is_here(module: str) -> bool:
    """Whether this environment has the package of a module: a job may use one of another's."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _newest_packages(count: int) -> list[str]:
    """Packages of the `count` modules imported last, to see what a child still had to import.

    Only their names are touched: looking at all would copy thousands of pages from the parent.
    """
    newest = islice(reversed(sys.modules), max(0, count))
    return sorted({module.partition(".")[0] for module in newest})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
