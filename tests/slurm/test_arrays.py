"""Which arrays a grid becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from qgrid.slurm import arrays
from qgrid.slurm.arrays import Array, Terms
from qgrid.slurm.options import Options
from qgrid.slurm.script import Resources, UnsafeValue
from qgrid.types import Cell, Gpu, Limits, PlannedCell

H100 = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1, gres="h100")
L4 = Gpu("l4", "cuda", "L4", "sm_89", 24.0, 300.0, 1, gres="l4", constraint="rack1|rack2")
CPU = Gpu("cpu", "cpu", "", None, 8.0, None, 1)
LIMITS = Limits(600.0, 1200.0, 300.0)
Make = Callable[..., Cell]


@dataclass
class Known:
    """Estimates by the number that ends an id; None for the rest."""

    seconds: dict[str, float] = field(default_factory=dict)
    builds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def measuring_seconds(self, planned: PlannedCell) -> float | None:
        return self.seconds.get(planned.cell_id)

    def build_seconds(self, planned: PlannedCell) -> float | None:
        return self.builds.get(planned.artifact_id)

    def memory_bytes(self, planned: PlannedCell) -> float | None:
        return self.memory.get(planned.cell_id)


@pytest.fixture
def planned(make_cell: Make) -> Callable[..., PlannedCell]:
    def make(number: int, gpu: Gpu = CPU, base: int | None = 0, artifact: int | None = None) -> Any:
        made = number if artifact is None else artifact
        cell = make_cell(gpu=gpu)
        baseline = None if base is None else f"c{base}"
        return PlannedCell(f"c{number}", f"a{made}", f"q{number}", baseline, cell, False)

    return make


def terms(known: Known | None = None, size: int = 1001, **options: Any) -> Terms:
    return Terms(Known() if known is None else known, LIMITS, Options(**options), size)


def cells_of(array: Array) -> list[str]:
    return [cell for task in array.tasks for cell in task.cells]


def test_three_waves_each_after_what_it_uses(planned: Callable[..., PlannedCell]) -> None:
    cells = [
        planned(0, H100, None),
        planned(1, H100),
        planned(10, L4, None),
        planned(2, L4, 10, artifact=1),
    ]
    made = arrays.plan(cells, [cells[0], cells[1], cells[2]], terms())
    kinds = [(each.wave, each.resources.gres, each.after) for each in made]
    assert kinds == [
        ("builds", "gpu:h100:1", ()),
        ("builds", "gpu:l4:1", ()),
        ("baselines", "gpu:h100:1", (0,)),
        ("baselines", "gpu:l4:1", (1,)),
        ("cells", "gpu:h100:1", (0, 2)),
        ("cells", "gpu:l4:1", (0, 3)),  # its artifact is made on the other card
    ]
    assert [task.builds for task in made[0].tasks] == [("a0",), ("a1",)]


def test_every_cell_and_every_build_once(planned: Callable[..., PlannedCell]) -> None:
    cells = [planned(number, (H100, L4, CPU)[number % 3], None if number < 3 else number % 3)
             for number in range(100)]  # fmt: skip
    made = arrays.plan(cells, cells, terms(size=7, cells_per_task=3))
    found = [cell for array in made for cell in cells_of(array)]
    built = [build for array in made for task in array.tasks for build in task.builds]
    assert sorted(found) == sorted(each.cell_id for each in cells)
    assert sorted(built) == sorted(each.artifact_id for each in cells)
    assert max(len(array.tasks) for array in made) <= 7
    assert all(place < number for number, array in enumerate(made) for place in array.after)


def test_what_is_asked_of_the_cluster(planned: Callable[..., PlannedCell]) -> None:
    threads = replace(planned(1).cell.runtime, threads=6)
    cpu = replace(planned(1), cell=replace(planned(1).cell, runtime=threads))
    pair = planned(2, replace(H100, count=2, gres=None))
    assert arrays.asks(cpu, terms()) == Resources(None, None, 6, None, 0)
    assert arrays.asks(pair, terms()).gres == "gpu:2"  # any card; checked when it starts
    assert arrays.asks(planned(3, L4), terms()).constraint == "rack1|rack2"
    both = arrays.asks(planned(3, L4), terms(constraint="ib&ssd", cpus=9, memory_gib=5))
    assert both == Resources("gpu:l4:1", "(rack1|rack2)&ib&ssd", 9, 5, 0)


def test_memory_comes_from_records_in_classes(planned: Callable[..., PlannedCell]) -> None:
    known = Known(memory={"c1": 1.0 * 2**30, "c2": 1.2 * 2**30, "c3": 20.0 * 2**30})
    asked = [arrays.asks(planned(number), terms(known)).memory_gib for number in (1, 2, 3, 4)]
    assert asked == [4, 4, 32, None]


@pytest.mark.parametrize("word", ["h100 --uid=0", "x\n#SBATCH --wrap=id", "$(id)", "-x", ""])
def test_a_hostile_card_is_refused(planned: Callable[..., PlannedCell], word: str) -> None:
    for changed in (replace(H100, gres=word), replace(H100, constraint=word)):
        with pytest.raises(UnsafeValue, match=r"gpu\.(gres|constraint)"):
            arrays.plan([planned(1, changed)], [], terms())


def test_time_is_that_of_like_cells_with_room(planned: Callable[..., PlannedCell]) -> None:
    known = Known(seconds={"c1": 600.0, "c2": 30000.0})
    made = arrays.plan([planned(1), planned(2), planned(3)], [], terms(known))
    limits = {cells_of(array)[0]: array.resources.minutes for array in made}
    # 120 s + 2 x 600 s; 120 s + 2 x 30000 s; both qualities and the timing at their limits
    assert limits == {"c1": 30, "c2": 1440, "c3": 60}
    fixed = arrays.plan([planned(1), planned(2), planned(3)], [], terms(known, minutes=7))
    assert {array.resources.minutes for array in fixed} == {7}


def test_short_cells_share_a_task_and_unknown_ones_do_not(
    planned: Callable[..., PlannedCell],
) -> None:
    cells = [planned(number) for number in range(1, 11)]
    known = Known(seconds={each.cell_id: 200.0 for each in cells[:6]})
    made = arrays.plan(cells, [], terms(known))
    sizes = sorted(len(task.cells) for array in made for task in array.tasks)
    assert sizes == [1, 1, 1, 1, 3, 3]  # 3 x 200 s are worth a start


def test_the_longest_task_comes_first(planned: Callable[..., PlannedCell]) -> None:
    known = Known(seconds={"c1": 900.0, "c2": 1000.0, "c3": 950.0})
    made = arrays.plan([planned(1), planned(2), planned(3)], [], terms(known))
    assert [cells_of(array) for array in made] == [["c2", "c3", "c1"]]


def test_arrays_are_cut_evenly(planned: Callable[..., PlannedCell]) -> None:
    cells = [planned(number) for number in range(1, 11)]
    made = arrays.plan(cells, [], terms(size=4))
    assert [len(array.tasks) for array in made] == [4, 4, 2]
    assert len(arrays.plan(cells, [], terms(size=1))) == 10
