"""The threads of a launch: one a slot, each taking units until none is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from qgrid.pipeline import Pipeline
from qgrid.schedule import Queue, Unit
from qgrid.slots import Slot
from qgrid.stopping import Stop, Stopped, undisturbed


def work(
    slots: Sequence[Slot],
    queue: Queue,
    open_pipeline: Callable[[Slot], Pipeline],
    perform: Callable[[Unit, Pipeline], bool],
    stop: Stop,
) -> None:
    """Bring all units of the queue to their end; `perform` says whether it did.

    Raises:
        Whatever a slot or a signal raised first, once every slot has ended.
    """
    errors: list[BaseException] = []
    ended = threading.Semaphore(0)  # a thread whose `join` was interrupted passes for ended

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

    for slot in slots:
        threading.Thread(target=run, args=(slot,), daemon=True).start()
    waiting = len(slots)
    try:
        while waiting:
            ended.acquire()
            waiting -= 1
    except BaseException as error:
        stop.set(str(error))
        with undisturbed():
            while waiting:
                ended.acquire()
                waiting -= 1
        raise
    if errors:
        raise errors[0]
