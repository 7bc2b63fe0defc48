"""The W&B workspace of a project: parallel coordinates over cost and quality, built offline."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from qgrid import redact
from qgrid.metrics import METRICS
from qgrid.mirroring import wandb_run

NAME = "qgrid"
PROJECT = "qgrid"
MOST_RUNS = 500  # of a panel; the default of 10 would hide most of a grid
ALONE = "concurrency=1"


def main(arguments: Sequence[str]) -> int:
    """Save the workspace: `qgrid workspace [project=NAME] [entity=NAME]`; the exit code."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    wrong = [argument for argument in arguments if argument.partition("=")[0] not in _KEYS]
    if wrong or not all(given.values()):
        allowed = "[project=NAME] [entity=NAME]"
        return _say(f"`qgrid workspace` takes {allowed}, got `{' '.join(arguments)}`", 2)
    if importlib.util.find_spec("wandb_workspaces") is None:
        return _say("`workspace` needs wandb-workspaces: `pip install wandb-workspaces`", 1)
    if not wandb_run.is_logged_in():
        return _say("saving a workspace needs a login: run `wandb login` first", 1)
    try:
        return _say(f"saved: {save(given.get('entity'), given.get('project', PROJECT))}", 0)
    except Exception as error:  # noqa: BLE001 - wandb raises many kinds
        return _say(f"W&B did not take the workspace: {redact.text(str(error))}", 1)


_KEYS = ("project", "entity")


def save(entity: str | None, project: str) -> str:
    """Save the workspace and return its address; without an entity it is the user's default.

    Raises:
        wandb.Error: W&B cannot be reached or refuses.
    """
    if entity is None:
        import wandb

        entity = str(wandb.Api(overrides={"base_url": wandb_run.server()}).default_entity)
    return str(build(entity, project).save().url)


def build(entity: str, project: str) -> Any:
    """The `wandb_workspaces.workspaces.Workspace`; needs no network."""
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces import workspaces

    overview = workspaces.Section(
        name="Cost and quality",
        panels=[_parallel(panels), _scatter(panels)],
        is_open=True,
        layout_settings=workspaces.SectionLayoutSettings(columns=1, rows=2),
    )
    measured = workspaces.RunsetSettings(filters="SummaryMetric('status') == 'ok'")
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[overview],
        settings=workspaces.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=measured,
    )


def _parallel(panels: Any) -> Any:
    """Method, bits, size, memory, tok/s and quality, a line a run."""
    columns = [
        _column(panels, panels.Config("method.name"), "method"),
        _column(panels, panels.Config("bits"), "bits"),
        _column(panels, _metric(panels, "size_on_disk_bytes"), "size [bytes]"),
        _column(panels, _metric(panels, "resident_weights_bytes"), "memory [bytes]"),
        _column(panels, _metric(panels, "decode_throughput", ALONE), "decode [tok/s]"),
        _column(panels, _metric(panels, "kld_mean"), "KLD [nats]", log=True),
        _column(panels, panels.SummaryMetric("accuracy_delta_worst_ratio"), "worst slice change"),
        _column(panels, panels.SummaryMetric("accuracy_mean_ratio"), "mean accuracy"),
    ]
    return panels.ParallelCoordinatesPlot(
        title="Which one to ship",
        columns=columns,
        layout=panels.Layout(x=0, y=0, w=24, h=12),
    )


def _scatter(panels: Any) -> Any:
    return panels.ScatterPlot(
        title="Size against divergence",
        x=_metric(panels, "size_on_disk_bytes"),
        y=_metric(panels, "kld_mean"),
        log_y=True,
        layout=panels.Layout(x=0, y=12, w=24, h=10),
    )


def _column(panels: Any, metric: Any, title: str, log: bool | None = None) -> Any:
    return panels.ParallelCoordinatesPlotColumn(metric, display_name=title, log=log)


def _metric(panels: Any, metric: str, part: str | None = None) -> Any:
    """The key under which the mirror writes a metric."""
    return panels.SummaryMetric(wandb_run.key(metric, part, METRICS[metric].unit))


def _say(sentence: str, code: int) -> int:
    sys.stderr.write(f"qgrid: {sentence}\n")
    return code
