"""The launchers: they receive cell ids, never overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from qgrid import config as grid_config
from qgrid import sweep

SWEEPER = "hydra_plugins.qgrid_plugins.sweeper.GridSweeper"


class LocalLauncher(Launcher):
    """Runs the cells of a plan one after the other on this machine."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Nothing to prepare: the plan on disk says everything.

        Raises:
            config.GridError: another sweeper, which would hand over overrides.
        """
        if config.hydra.sweeper._target_ != SWEEPER:
            raise grid_config.GridError(
                "only qgrid's sweeper makes plans that a launcher can run; use "
                "`hydra/sweeper=qgrid`"
            )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the plan in `job_overrides[0][0]` for the cell ids in the rest of that list."""
        results: list[Any] = []
        for plan_file, *cell_ids in job_overrides:
            code = sweep.run_cells(plan_file, cell_ids)
            results.append(JobReturn(_return_value=code, status=JobStatus.COMPLETED))
        return results
