"""The report as a browser shows it: the plot is drawn and nothing is fetched."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qgrid import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None, reason="chromium is missing; run `make test-system`"
    ),
]
FLAGS = ("--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader")


def test_the_parallel_coordinates_are_drawn_offline(sweep: Any, tmp_path: Path) -> None:
    page = report.write(tmp_path, sweep.planned, sweep.records)["report.html"]
    done = subprocess.run(
        [
            "chromium",
            *FLAGS,
            "--enable-unsafe-swiftshader",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=8000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    titles = done.stdout.count('class="axis-title"')
    assert titles >= 6
    for axis in ("method", "bits", "KLD", "mean accuracy"):
        assert f'data-unformatted="{axis}' in done.stdout
