"""A launcher's life: submit, wait for the records, submit again what vanished, print the tables."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qgrid import codec, commands
from qgrid import sweep as sweeps
from qgrid.running import controller, stopping
from qgrid.running import launch as launches
from qgrid.running.controller import INTERRUPTED, UNREADABLE
from qgrid.running.progress import Progress
from qgrid.slurm import client, given_up, script, submissions
from qgrid.slurm.ends import Ends
from qgrid.slurm.options import Options
from qgrid.slurm.queue import Look
from qgrid.slurm.submissions import Submission
from qgrid.slurm.submitting import Sweep, submit
from qgrid.slurm.wanted import Wanted
from qgrid.store import leases, place, records
from qgrid.store.aside import readable
from qgrid.types import PlannedCell, Settings

REFUSED = 2  # exit code: Slurm takes no job as it was asked
LOOKS = 2  # that must miss a task before it counts as gone: a record may show late


def run(folder: Path, options: Options, detach: bool) -> int:
    """Bring the cells of a sweep to records; `detach`: return once they are submitted.

    Returns:
        0; 1 when a cell ended in a failure, none is ok, some have no record, or the store cannot be
        written to; 2 when Slurm refuses a job or a record cannot be read; 130 when interrupted:
        the jobs go on.
    """
    status, resume, cancel = (
        commands.command(verb, folder) for verb in ("status", "resume", "cancel")
    )
    try:
        with _interruptible():
            watch = Watch(folder, options)
            watch.begin(detach)
            if detach:
                _print(f"`{status}` tells how far it is; `{resume}` waits")
                return 0
            watch.wait()
    except KeyboardInterrupt:
        _print(
            f"the jobs go on without this command: `{status}` tells how far they are, `{resume}` "
            f"waits again, `{cancel}` ends them"
        )
        return sweeps.conclude(folder, INTERRUPTED)
    except OSError as error:
        if not place.is_unwritable(error):
            raise
        _print(place.sentence(error))
        return 1
    except (client.SlurmError, script.UnsafeValue, records.UnreadableRecord) as error:
        print(f"qgrid: {error}", file=sys.stderr)  # noqa: T201
        return UNREADABLE if isinstance(error, records.UnreadableRecord) else REFUSED
    return watch.finish()


class Watch:
    """One launcher at work. Whoever launches beside it joins its launch and waits, too."""

    def __init__(self, folder: Path, options: Options) -> None:
        submissions.check(folder)
        settings = codec.read(Settings, folder / "settings.json")
        planned = tuple(sweeps.read_plan(folder / "plan.jsonl"))
        self._sweep = Sweep(folder, planned, settings, options, client.cluster())
        self._progress = Progress(planned)
        self._waiting: dict[str, PlannedCell] = {}  # cells without their record, by id
        self._missed: Counter[str] = Counter()  # looks that found neither task nor record
        self._cancelled: set[str] = set()
        self._kept = 0  # good records of cells that could not be measured again
        self._said = ""

    def begin(self, detach: bool) -> None:
        """Submit what is neither done nor queued; refuse what the plan refuses.

        Raises:
            client.SlurmError: an array was refused, and nothing is under way that may make room for
                it later; with `detach` nobody would submit it then.
        """
        sweep = self._sweep
        with leases.held(sweep.lease):
            seen = sweep.look()
            self._ends = Ends(sweep.cluster.memory_seconds, seen)
            joined = seen.live_launches()
            self._launch = joined[-1] if joined else launches.new_id()
            self._wanted = Wanted(sweep.folder, sweep.settings, self._launch)
            self._refuse()
            readable(sweep.store, sweep.planned, self._progress.line)
            cells = self._wanted.cells(sweep.planned)
            self._waiting = {each.cell_id: each for each in cells}
            live = seen.live_cells()
            new = [each for each in cells if each.cell_id not in live]
            submitted: list[Submission] = []
            try:
                for each in submit(sweep, self._wanted, seen, self._launch, new) if new else ():
                    submitted.append(each)
            except client.SlurmError as error:
                self._announce(len(cells) - len(new), submitted)
                if detach or not (submitted or joined):
                    raise
                self._tell(f"{error}; asking again")
            else:
                self._announce(len(cells) - len(new), submitted)

    def wait(self) -> None:
        """Until every cell has its record, or nothing is left that could bring it one."""
        self._progress.open(len(self._waiting))
        try:
            while self._waiting:
                seen = self._look()
                self._settle({} if seen is None else seen.latest(self._launch))
                if seen is not None and self._waiting:
                    self._say(seen)
                    self._ends.see(seen)
                    if not self._goes_on(seen):
                        break
                if self._waiting:
                    time.sleep(self._sweep.options.poll_seconds)
        finally:
            self._progress.close()
        if self._cancelled:
            self._progress.line(f"{len(self._cancelled)} cells were cancelled in the queue")

    def finish(self) -> int:
        """Write and print the tables; the exit code."""
        sweep = self._sweep
        try:
            found = records.read_all(sweep.store, sweep.planned)
        except records.UnreadableRecord as error:
            _print(str(error))
            return UNREADABLE
        ended = [each for each in sweep.planned if each.cell_id in found]
        judged = controller.Sweep(ended, sweep.settings, sweep.folder, self._progress)
        judged.records = found
        code = judged.verdict()
        without = len(sweep.planned) - len(ended)
        if without:
            resume = commands.command("resume", sweep.folder)
            line = f"{without} cells have no record; `{resume}` goes on"
            self._progress.line(line)
        is_whole = not (without or self._kept or self._cancelled)
        return sweeps.conclude(sweep.folder, code if is_whole else 1)

    def _refuse(self) -> None:
        """Write the records of cells that the plan refuses: they need no machine."""
        refused = [each for each in self._sweep.planned if each.status is not None]
        if refused:
            part = controller.Part(self._launch)
            sweep = self._sweep
            quiet = Progress(refused, io.StringIO())
            controller.Sweep(refused, sweep.settings, sweep.folder, quiet, part).run()

    def _announce(self, queued: int, submitted: Sequence[Submission]) -> None:
        cells = sum(len(task.cells) for each in submitted for task in each.tasks)
        builds = sum(len(task.builds) for each in submitted for task in each.tasks)
        left = len(self._waiting) - cells - queued
        words = {
            "done before or refused": len(self._sweep.planned) - len(self._waiting),
            "queued already": queued,
            "submitted": cells,
            "not submitted": left,
        }
        counted = ", ".join(f"{count} {word}" for word, count in words.items() if count)
        self._progress.line(f"{len(self._sweep.planned)} cells: {counted}")
        if submitted:
            jobs = ", ".join(str(each.job) for each in submitted)
            made = f", {builds} artifacts first" if builds else ""
            self._progress.line(f"launch {self._launch}: jobs {jobs}{made}")

    def _look(self) -> Look | None:
        """The queue; None, with a line, while Slurm does not answer."""
        try:
            return self._sweep.look()
        except client.SlurmError as error:  # it did when this launcher began
            self._tell(f"{error}; asking again")
            return None

    def _settle(self, tasks: Mapping[str, tuple[Submission, client.TaskState]]) -> None:
        """Tell of each record that has come, and wait for it no more; `tasks`: the last by cell."""
        for cell_id, planned in list(self._waiting.items()):
            submission_state = tasks.get(cell_id)
            ended = submission_state is not None and submission_state[1].state == "COMPLETED"
            # a task that says all is done may have found the record of another launch good
            if self._wanted.needs(planned) and not (ended and self._wanted.has_record(planned)):
                continue
            del self._waiting[cell_id]
            record = records.read(self._sweep.store, cell_id)
            if record is not None:
                self._progress.end(planned, record, ran=False)

    def _goes_on(self, seen: Look) -> bool:
        """Submit again what vanished; False when nothing is left to wait for."""
        live, last = seen.live_cells(), seen.latest(self._launch)
        gone = []
        for cell_id, planned in list(self._waiting.items()):
            if cell_id in live:
                self._missed.pop(cell_id, None)
            elif cell_id in last and self._ends.is_cancelled(last[cell_id][1]):
                self._cancelled.add(cell_id)
                del self._waiting[cell_id]
            else:
                self._missed[cell_id] += 1
                if self._missed[cell_id] >= LOOKS:
                    gone.append(planned)
        if gone:
            try:
                self._again()
            except client.SlurmError as error:
                if not seen.live_launches() and not isinstance(error, client.Silent):
                    raise
                self._tell(f"{error}; asking again")
        return bool(self._waiting)

    def _again(self) -> None:
        """Submit what vanished once more, and give up what was submitted often enough."""
        sweep = self._sweep
        with leases.held(sweep.lease):
            seen = sweep.look()
            live, last = seen.live_cells(), seen.latest(self._launch)
            times = Counter(
                cell
                for each in seen.submitted
                if each.launch == self._launch and each.job is not None
                for task in each.tasks
                for cell in task.cells
            )
            again = []
            for cell_id, planned in list(self._waiting.items()):
                if cell_id in live or self._missed[cell_id] < LOOKS:
                    continue
                if not self._wanted.needs(planned):  # it came meanwhile
                    continue
                if times[cell_id] < sweep.options.attempts:
                    again.append(planned)
                else:
                    self._give_up(planned, last.get(cell_id))
            self._missed.clear()
            if again:
                self._progress.line(f"{len(again)} cells ended without a record; submitted again")
                for each in submit(sweep, self._wanted, seen, self._launch, again):
                    self._progress.line(f"launch {self._launch}: job {each.job}")

    def _give_up(
        self, planned: PlannedCell, last: tuple[Submission, client.TaskState] | None
    ) -> None:
        """Write the record of a cell whose tasks all ended without one; a good one stays."""
        failure = given_up.why(self._sweep.folder, self._launch, planned, last)
        if not self._wanted.has_good_record(planned):
            given_up.write(self._sweep.store, self._launch, planned, failure)
            return
        label = self._progress.label(planned)
        self._progress.line(f"{label} keeps its earlier record: {failure.message}")
        self._kept += 1
        del self._waiting[planned.cell_id]

    def _say(self, seen: Look) -> None:
        """A line when what the rest waits for has changed."""
        live = [state for *_, state in seen.tasks() if seen.is_live(state)]
        waiting = {state.reason for state in live if state.state == "PENDING"} - {"", "None"}
        running = any(state.state == "RUNNING" for state in live)
        if waiting and not running:
            self._tell(f"{len(live)} tasks wait in the queue: {', '.join(sorted(waiting))}")

    def _tell(self, text: str) -> None:
        """Print a line, unless it is the one that was printed last."""
        if text != self._said:
            self._said = text
            self._progress.line(text)


def _interruptible() -> contextlib.AbstractContextManager[None]:
    """SIGTERM and a lost terminal end the wait as Ctrl-C does; not the latter under `nohup`."""
    is_alone = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = (signal.SIGTERM,) if is_alone else (signal.SIGTERM, signal.SIGHUP)
    return stopping.on_signal(stopping.interrupt, numbers)


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201
