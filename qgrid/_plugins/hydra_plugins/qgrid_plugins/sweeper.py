"""The sweeper: hands the composed grid to the plan, and the plan's cells to the launcher."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from qgrid import config as grid_config
from qgrid import sweep


class GridSweeper(Sweeper):
    """Hydra's entry into `qgrid.sweep`.

    `params` are the axes of a committed grid. Where one product does not say it, `grids` lists
    further axes: a product of `params` with each of them, joined.
    """

    def __init__(self, params: dict[str, Any] | None, grids: list[dict[str, Any]] | None) -> None:
        self.params = params
        self.grids = grids
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra offers; act later."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if isinstance(self.launcher, BasicLauncher):
            raise grid_config.GridError(
                "`hydra/launcher=basic` runs overrides, not the cells of a plan; "
                "use `hydra/launcher=local`"
            )

    def sweep(self, arguments: list[str]) -> Any:
        """Plan the grid of `arguments` and launch it (or print it, for `qgrid plan`)."""
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        loader = self.hydra_context.config_loader
        asked = [*arguments, *sweep.OVERRIDES.get()]
        grids = [
            grid_config.parse(asked, {**(self.params or {}), **axes}, loader)
            for axes in (self.grids or [{}])
        ]
        return sweep.run(grid_config.composer(loader, self.config), grids, self.launcher)
