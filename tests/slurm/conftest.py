"""A cluster for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.drills import trivial
from tests.slurm import cluster


@pytest.fixture
def layout() -> cluster.Layout:
    """How the cluster is laid out; a test that wants it otherwise parametrizes `layout`."""
    return cluster.PLAIN


@pytest.fixture
def slurm(layout: cluster.Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[cluster.Slurm]:
    """A real Slurm; processes that the test starts speak with it and know trivial cells."""
    reason = cluster.missing()
    if reason is not None:
        pytest.skip(reason)
    trivial.install(monkeypatch)
    with cluster.running(layout) as started:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, started.environment[name])
        monkeypatch.setenv(
            "TMPDIR", str(started.folder)
        )  # other timings of this machine do not wait
        yield started
