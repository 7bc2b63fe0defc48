"""A sweep from its composed grid to its end: plan it, write the plan, hand it to a launcher."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import codec, commands, config
from qgrid.files import HashCache, write_atomic
from qgrid.planning import choices, plan
from qgrid.planning.facts import Facts
from qgrid.running import launch
from qgrid.store import glance
from qgrid.types import PlannedCell, Settings

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from hydra.plugins.launcher import Launcher

OVERRIDES: ContextVar[tuple[str, ...]] = ContextVar("OVERRIDES", default=())  # of the grid
COMMAND: ContextVar[tuple[str, ...]] = ContextVar("COMMAND", default=())  # as it was given
DETACH: ContextVar[bool] = ContextVar("DETACH", default=False)  # set by `--detach`
PLAN_ONLY: ContextVar[bool] = ContextVar("PLAN_ONLY", default=False)  # set by `qgrid plan`


def run(
    compose: config.Compose,
    overrides: Sequence[Sequence[Override]],
    launcher: Launcher,
) -> None:
    """Plan the joined grids; print them for `qgrid plan`, else launch and exit with the code."""
    grids = [config.expand(compose, each) for each in overrides]
    for grid in grids:
        _refuse_swept_settings(grid)
    settings = choices.settings(grids[0].fixed)
    if any(choices.settings(grid.fixed) != settings for grid in grids):
        raise config.GridError(
            "`hydra.sweeper.grids` lists axes of cells; what is the same for all cells, such as "
            "`out` or `name`, goes beside `hydra`"
        )
    remote = getattr(launcher, "remote", False)
    planned = planned_cells(itertools.chain.from_iterable(grids), Path(settings.out), remote)
    if PLAN_ONLY.get():
        from qgrid.report import plan_table

        print(plan_table.render(planned))  # noqa: T201
        return
    from qgrid.reproduction import sweep_lock

    folder = folder_of(planned, settings)
    _refuse_another_plan(folder, planned)
    keep = getattr(launcher, "keep", None)
    if keep is not None:
        keep(folder)  # before the plan: what is killed in between is resumed where it belongs
    sweep_lock.keep_command(folder, COMMAND.get())
    write_plan(planned, settings)
    returned = launcher.launch([[str(folder)]], 0)
    raise SystemExit(max(int(each.return_value) for each in returned))


def planned_cells(
    grid: Iterable[Mapping[str, Any]], out: Path, remote: bool = False
) -> list[PlannedCell]:
    """The plan of a composed grid; content hashes are remembered in `out`.

    `remote`: other machines will run it, so that `gpu=auto` is refused.
    """
    reader = choices.Reader()
    facts = Facts(HashCache(out / "hashes.json"), remote)
    return plan.build((reader.choice(each) for each in grid), facts)


def folder_of(planned: Sequence[PlannedCell], settings: Settings) -> Path:
    """The folder of a sweep; without a name it is its plan's hash."""
    name = settings.name
    if name is None:
        name = f"grid-{codec.digest([p.cell_id for p in planned], 8)}"
    return Path(settings.out).absolute() / "sweeps" / name


def _refuse_another_plan(folder: Path, planned: Sequence[PlannedCell]) -> None:
    """A sweep that runs keeps its plan: its tables and its lock are written from it."""
    if not launch.is_running(folder):
        return
    try:
        running = [cell.cell_id for cell in read_plan(folder / "plan.jsonl")]
    except (FileNotFoundError, codec.InvalidValue):
        return
    if running != [cell.cell_id for cell in planned]:
        raise config.GridError(
            f"sweep `{folder.name}` runs with another plan ({len(running)} cells); give this one "
            f"another `name`, or end that one by `{commands.command('cancel', folder)}`"
        )


def write_plan(planned: Sequence[PlannedCell], settings: Settings) -> Path:
    """Write `plan.jsonl` and `settings.json` of a sweep; the plan's file."""
    folder = folder_of(planned, settings)
    launch.planned_anew(folder)
    write_atomic(folder / "settings.json", codec.dumps(settings, indent=2))
    write_atomic(folder / "plan.jsonl", "".join(f"{codec.dumps(p)}\n" for p in planned))
    return folder / "plan.jsonl"


def read_plan(plan_file: Path) -> list[PlannedCell]:
    """The cells of a written plan, in order.

    Raises:
        FileNotFoundError, codec.InvalidValue: the message names the file.
    """
    lines = glance.plan_lines(plan_file)
    try:
        return [codec.loads(PlannedCell, line) for line in lines]
    except codec.InvalidValue as error:
        raise codec.InvalidValue(
            f"{plan_file}: {error}; give the grid's command again, which writes it anew"
        ) from None


def run_cells(
    plan_file: str, cell_ids: Sequence[str] | None = None, slots: int | None = None
) -> int:
    """Run cells of a written plan (None: all) here and print their table; the exit code.

    `slots`: how many at once; None: as the devices of this machine say.
    """
    from qgrid.running import controller
    from qgrid.running import slots as places
    from qgrid.store import leases

    folder = Path(plan_file).parent
    settings = codec.read(Settings, folder / "settings.json")
    cells = read_plan(Path(plan_file))
    if cell_ids is not None:
        cells = [planned for planned in cells if planned.cell_id in set(cell_ids)]
    part = controller.Part(launch.new_id(), places.find(cells, slots))
    (folder / launch.LAUNCHES / part.launch).mkdir(parents=True)
    with leases.held(leases.of(folder.parents[1], "launches", part.launch)):
        code = controller.run(cells, settings, folder, part)
    return conclude(folder, code)


def conclude(folder: Path, code: int) -> int:
    """Write what a launch leaves beside its records, where it can; the exit code of the command."""
    from qgrid import report
    from qgrid.reproduction import sweep_lock
    from qgrid.running import controller
    from qgrid.store import place, records

    if code == controller.STORE_FAILED:
        return 1
    if code == controller.UNREADABLE:
        return code
    store, planned = folder.parents[1], read_plan(folder / "plan.jsonl")
    try:
        found = list(records.read_all(store, planned).values())
        sweep_lock.write(folder, planned, found)
        if code != controller.INTERRUPTED:
            report.show(folder, planned, found)
    except OSError as error:
        if not place.is_unwritable(error):
            raise
        sys.stdout.write(f"{place.sentence(error)}\n")
        return 1
    return code


def _refuse_swept_settings(grid: config.Grid) -> None:
    constant = {field.name for field in fields(Settings)} | {"sweeps"}
    for axis in grid.axes:
        if axis.key in constant:
            raise config.GridError(
                f"`{axis.overrides[0]},…` cannot be swept: `{axis.key}` is the same for all cells; "
                "give one value"
            )
