"""The threads of a launch: one a slot, each taking units until none is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from qgrid.running.pipeline import Pipeline
from qgrid.running.schedule import Queue, Unit
from qgrid.running.slots import Slot
from qgrid.running.stopping import Interrupted, Stop, Stopped, deferred

_LOOK = 0.5  # seconds until signals are answered that the kernel gave to another thread


def work(
    slots: Sequence[Slot],
    queue: Queue,
    open_pipeline: Callable[[Slot], Pipeline],
    perform: Callable[[Unit, Pipeline], bool],
    stop: Stop,
) -> None:
    """Bring all units of the queue to their end; `perform` says whether it did.

    Raises:
        Interrupted: a signal ended it, or whatever a slot raised first; every slot has ended.
    """
    errors: list[BaseException] = []
    ended = threading.Semaphore(0)

    def run(slot: Slot) -> None:
        pipeline = open_pipeline(slot)
        try:
            while (unit := queue.take()) is not None:
                if perform(unit, pipeline):
                    queue.done(unit)
                else:
                    queue.defer(unit)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again below, in the main thread
            errors.append(error)
            stop.set(f"another slot ended with {type(error).__name__}")
        finally:
            pipeline.close()
            ended.release()

    with deferred(stop) as signals:
        for slot in slots:
            threading.Thread(target=run, args=(slot,), daemon=True).start()
        for _ in slots:
            while not ended.acquire(timeout=_LOOK):
                pass
    if errors:
        raise errors[0]
    if signals:
        raise Interrupted(signals[0])
