"""Attempts: what began and did not end is counted, within one launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgrid.running import attempts
from qgrid.running.attempts import Attempts
from qgrid.running.stopping import Stopped


def test_attempts_that_end_are_not_counted(tmp_path: Path) -> None:
    counted = Attempts("one", 2)
    for _ in range(3):
        with counted.counted(tmp_path):
            pass
    assert counted.given_up(tmp_path) is None


def test_an_error_of_a_cell_is_an_end_of_its_own(tmp_path: Path) -> None:
    counted = Attempts("one", 1)
    with pytest.raises(ValueError, match="why"), counted.counted(tmp_path):
        raise ValueError("why")
    assert attempts.earlier(tmp_path, "one").count == 1  # until its record is written


@pytest.mark.parametrize(
    ("why", "status"), [(attempts.TIME_LIMIT, "timeout"), ("SIGTERM", "crashed")]
)
def test_the_last_end_decides_the_status(tmp_path: Path, why: str, status: str) -> None:
    counted = Attempts("one", 2)
    for reason in ("SIGTERM", why):
        assert counted.given_up(tmp_path) is None
        with pytest.raises(Stopped), counted.counted(tmp_path):
            raise Stopped(reason)
    failure = counted.given_up(tmp_path)
    assert failure is not None
    assert failure.status == status
    assert "2 attempts gave no result" in failure.message
    assert why in failure.message


def test_a_lost_node_says_nothing_and_counts(tmp_path: Path) -> None:
    for _ in range(3):
        attempts.begin(tmp_path, "one")
    (tmp_path / attempts.FILE).open("a").write('{"launch": "one", "ho')  # cut short
    attempts.begin(tmp_path, "one")
    failure = Attempts("one", 4).given_up(tmp_path)
    assert failure is not None
    assert failure.status == "crashed"
    assert "node lost or killed" in failure.message


def test_another_launch_begins_anew(tmp_path: Path) -> None:
    for _ in range(3):
        attempts.begin(tmp_path, "one")
    assert Attempts("two", 1).given_up(tmp_path) is None
    assert Attempts("one", None).given_up(tmp_path) is None
    with Attempts("one", None).counted(tmp_path / "other"):
        pass
    assert not (tmp_path / "other").exists()  # nobody counts
