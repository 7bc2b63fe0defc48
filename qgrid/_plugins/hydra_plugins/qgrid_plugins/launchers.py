"""Hydra's side of the launchers: they receive a plan, never overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from qgrid import config as grid_config
from qgrid import launchers, sweep

SWEEPER = "hydra_plugins.qgrid_plugins.sweeper.GridSweeper"


class GridLauncher(Launcher):
    """The launcher `name` of `qgrid/launchers/` with the options of its YAML."""

    def __init__(self, name: str, **options: Any) -> None:
        self.remote = launchers.module(name).REMOTE
        self._name = name
        self._options = {key: _plain(value) for key, value in options.items()}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Check the options; the plan on disk says everything else.

        Raises:
            config.GridError: another sweeper, which would hand over overrides.
            codec.InvalidValue: an option, its value and what is allowed.
        """
        if config.hydra.sweeper._target_ != SWEEPER:
            raise grid_config.GridError(
                "only qgrid's sweeper makes plans that a launcher can run; use "
                "`hydra/sweeper=qgrid`"
            )
        self._chosen = launchers.choose(self._name, self._options)

    def keep(self, folder: Path) -> None:
        """Write down what was chosen for the sweep in `folder`."""
        launchers.keep(folder, self._chosen)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Launch the sweep whose folder is `job_overrides[0][0]`."""
        folder = Path(job_overrides[0][0])
        code = launchers.launch(folder, self._chosen, sweep.DETACH.get())
        return [JobReturn(_return_value=code, status=JobStatus.COMPLETED)]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
