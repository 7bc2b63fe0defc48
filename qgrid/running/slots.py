"""Worker slots of this machine: one for each group of cards, or as cores and memory allow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qgrid import device
from qgrid.types import PlannedCell

_HOST_BYTES = 2 << 30  # of a stage's process beside the weights: libraries and logits
_LOADING = 1.5  # a checkpoint is in memory twice for a while, part by part


@dataclass(frozen=True)
class Slot:
    """What one worker has to itself. `cores`: None where it shares all of them."""

    cores: tuple[int, ...] | None = None
    cards: tuple[str, ...] = ()  # uuids


def find(planned: Sequence[PlannedCell], wanted: int | None = None) -> tuple[Slot, ...]:
    """The slots for these cells on this machine.

    With cards, a slot has as many as the largest cell takes, and an equal share of the cores.
    Without, as many slots as the cores and the memory hold of the largest cell; one that takes all
    physical cores, which is the default, has the machine to itself.
    """
    cells = [each for each in planned if each.status is None]
    cores = _usable_cores()
    cards = _cards()
    if cards:
        size = max((each.cell.gpu.count for each in cells), default=1)
        count = max(1, len(cards) // size)
    else:
        count = min(_by_cores(cells), _by_memory(cells))
    if wanted is not None:
        count = min(wanted, count) if cards else wanted
    count = max(1, min(count, len(cores), len(cells)))
    if count == 1:
        return (Slot(None, tuple(cards)),)
    share, each_cards = len(cores) // count, len(cards) // count
    return tuple(
        Slot(
            tuple(cores[number * share : (number + 1) * share]),
            tuple(cards[number * each_cards : (number + 1) * each_cards]),
        )
        for number in range(count)
    )


def _usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cards() -> list[str]:
    seen = device.visible(device.query(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [card["uuid"] for card in seen]


def _by_cores(cells: Sequence[PlannedCell]) -> int:
    widest = max((device.compute_threads(each.cell.runtime.threads) for each in cells), default=1)
    return max(1, device.num_cores() // widest)


def _by_memory(cells: Sequence[PlannedCell]) -> int:
    weights = max((each.predicted.get("total_bytes", 0.0) for each in cells), default=0.0)
    return max(1, int(device.memory_bytes() // (_LOADING * weights + _HOST_BYTES)))
