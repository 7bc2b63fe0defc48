"""The report as a browser shows it: the plot is drawn and nothing is fetched."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qgrid import report
from tests.report.conftest import LEVELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None, reason="chromium is missing; run `make test-system`"
    ),
]
FLAGS = ("--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader")


def drawn(sweep: Any, folder: Path) -> str:
    """The page as it is after its scripts ran, without any network."""
    page = report.write(folder, sweep.planned, sweep.records)["report.html"]
    done = subprocess.run(
        [
            "chromium",
            *FLAGS,
            "--enable-unsafe-swiftshader",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=8000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_parallel_coordinates_are_drawn_offline(sweep: Any, tmp_path: Path) -> None:
    page = drawn(sweep, tmp_path)
    assert page.count('class="axis-title"') >= 6
    for axis in ("method", "bits", "KLD", "mean accuracy"):
        assert f'data-unformatted="{axis}' in page


def test_the_curves_of_loads_are_drawn_beside_them(served: Any, tmp_path: Path) -> None:
    """Two cells in two plots: a line each, a point a concurrency."""
    page = drawn(served, tmp_path)
    assert page.count('class="axis-title"') >= 6
    assert page.count('class="trace scatter') == 4
    assert page.count('class="point"') == 4 * len(LEVELS)
    for title in ("output throughput [tok/s]", "time to first token [ms]"):
        assert f'data-unformatted="{title}"' in page
