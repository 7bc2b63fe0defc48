from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from qgrid.metrics import METRICS
from qgrid.mirroring import workspace


@pytest.fixture(autouse=True)
def _logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def sections() -> list[dict[str, Any]]:
    """The sections of the spec that would be sent."""
    spec = workspace.build("someone", "qgrid")._spec["spec"]
    found = spec["section"]["panelBankConfig"]["sections"]
    return [each for each in found if each["panels"]]


def test_panel_has_every_axis(sections: list[dict[str, Any]]) -> None:
    panel = sections[0]["panels"][0]
    assert panel["viewType"] == "Parallel Coordinates Plot"
    assert [column["accessor"] for column in panel["config"]["columns"]] == [
        "config:method.value.name",
        "config:bits.value",
        "summary:size_on_disk_bytes",
        "summary:resident_weights_bytes",
        "summary:decode_throughput_concurrency_1_tok_per_s",
        "summary:kld_mean_nats",
        "summary:accuracy_delta_worst_ratio",
        "summary:accuracy_mean_ratio",
    ]


def test_axes_are_written_by_the_mirror(sections: list[dict[str, Any]]) -> None:
    columns = sections[0]["panels"][0]["config"]["columns"]
    names = [
        each["accessor"].partition(":")[2] for each in columns if "summary" in each["accessor"]
    ]
    assert all(re.match("|".join((*METRICS, "accuracy_mean")), name) for name in names)


def test_only_measured_cells_are_shown() -> None:
    made = workspace.build("someone", "qgrid")
    assert (made.entity, made.project, made.name) == ("someone", "qgrid", "qgrid")
    assert "status" in str(made._spec["spec"]["section"]["runSets"][0]["filters"])


def test_saving_asks_for_a_login(capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.main([]) == 1
    assert "`wandb login`" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nonsense"], ["project="], ["--help"], ["team=x"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.main(arguments) == 2
    assert "takes [project=NAME] [entity=NAME]" in capsys.readouterr().err


def test_an_unreachable_server_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    monkeypatch.setattr(workspace, "save", _refused)
    assert workspace.main(["entity=someone"]) == 1
    assert capsys.readouterr().err.startswith("qgrid: W&B did not take the workspace")


def _refused(*_: Any) -> str:
    raise ConnectionRefusedError("connection refused")
