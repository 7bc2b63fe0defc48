"""The rules of `reproduced | drifted`, each at its edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qgrid.metrics import METRICS
from qgrid.reproduction import judgement
from qgrid.reproduction.judgement import Circumstances, Outcome
from qgrid.reproduction.lock import (
    Answers,
    Composition,
    Inputs,
    Lock,
    LockedArtifact,
    LockedCell,
    Parts,
    Row,
)
from qgrid.types import Limits, Status

EXACT = Circumstances(exact=True, elsewhere=False)
LOAD = "concurrency=4"


def locked(
    rows: Sequence[Row] = (),
    status: Status | None = "ok",
    files: dict[str, str] | None = None,
    slices: dict[str, Answers] | None = None,
    **versions: str,
) -> tuple[Lock, LockedCell]:
    composition = Composition("m", "x", 4, "r", "g", "k", None, "s", "w", 64, 0)
    cell = LockedCell(composition, "artifact", "quality", None, False, status, None, tuple(rows))
    empty: dict[str, Any] = {}
    lock = Lock(
        schema="qgrid.lock/1",
        name="test",
        command=None,
        commits=(),
        verify="cached",
        limits=Limits(1.0, 1.0, 1.0),
        changed=(),
        pins=empty,
        environments=empty,
        inputs=Inputs(empty, empty, empty, empty),
        parts=Parts(empty, empty, empty, empty, empty, empty, empty, empty),
        cells={"cell": cell},
        qualities={} if slices is None else {"quality": slices},
        artifacts={}
        if files is None
        else {"artifact": LockedArtifact("f", files, {}, None, versions)},
    )
    return lock, cell


def outcome(old: Row, new: Row, given: Circumstances = EXACT, *more: Row) -> Outcome:
    """The verdict about one row; `more` stands beside it in both runs."""
    verdicts = judgement.cell(locked([old, *more]), locked([new, *more]), given)
    return next(each.outcome for each in verdicts if each.metric == old.metric)


def row(metric: str, value: float, spread: float | None = None, where: str | None = LOAD) -> Row:
    low, high = (None, None) if spread is None else (value - spread, value + spread)
    return Row(metric, where, value, low, high, 5)


def test_quality_and_sizes_are_exact_where_the_runtime_is() -> None:
    for metric in ("ppl", "accuracy", "flips_worse", "size_on_disk_bytes", "kv_bytes_per_token"):
        old = row(metric, 3.5, 0.5, None)
        assert outcome(old, old) == "reproduced"
        assert outcome(old, old._replace(value=3.5000000000000004)) == "drifted"
        assert outcome(old, old._replace(n=4)) == "drifted"


def test_a_number_that_drifted_inside_its_interval_says_so() -> None:
    verdicts = [
        judgement.cell(locked([row("ppl", 3.5, 0.5)]), locked([row("ppl", new, 0.5)]), EXACT)[-1]
        for new in (3.6, 4.6)
    ]
    assert [each.why for each in verdicts] == ["inside the recorded interval", None]


def test_a_runtime_that_is_not_deterministic_is_held_to_its_interval() -> None:
    loose = replace(EXACT, exact=False)
    old = row("ppl", 3.5, 0.5)
    assert outcome(old, row("ppl", 3.99, 0.1), loose) == "reproduced"
    assert outcome(old, row("ppl", 4.01, 0.9), loose) == "drifted"
    assert outcome(row("kld_p90", 0.1), row("kld_p90", 0.2), loose) == "not judged"
    assert outcome(row("kld_p90", 0.1), row("kld_p90", 0.1), loose) == "reproduced"


@pytest.mark.parametrize("cv", [0.0, 0.02, 0.1])
def test_timings_agree_when_their_intervals_are_no_further_apart_than_runs_are(cv: float) -> None:
    varied = row("timing_cv", cv)
    margin = max(0.05, 2 * cv)
    old = row("decode_throughput", 100.0, 10.0)  # up to 110
    edge = 110.0 * (1 + margin)  # where the other interval may begin
    for value, expected in (
        (100.0, "reproduced"),
        (edge + 4.9, "reproduced"),
        (edge + 5.1, "drifted"),
    ):
        new = row("decode_throughput", value, 5.0)
        assert outcome(old, new, EXACT, varied) == expected
        assert outcome(new, old, EXACT, varied) == expected  # slower as faster


def test_a_timing_is_not_judged_when_it_cannot_be() -> None:
    old, new = row("ttft_ms", 10.0, 1.0), row("ttft_ms", 50.0, 1.0)
    assert outcome(old, new) == "drifted"
    assert outcome(old, new, replace(EXACT, elsewhere=True)) == "not judged"
    assert outcome(old, new, EXACT, row("busy_elsewhere", 0.2, None, None)) == "not judged"
    assert outcome(old, new, EXACT, row("busy_elsewhere", 0.05, None, None)) == "drifted"
    assert outcome(row("ttft_p99_ms", 1.0), row("ttft_p99_ms", 9.0)) == "not judged"
    assert outcome(row("goodput", 0.0, 0.0), row("goodput", 9.0, 0.1)) == "not judged"


def test_the_noise_of_one_load_is_not_that_of_another() -> None:
    noisy = row("timing_cv", 0.5, None, "concurrency=1")
    old, new = row("ttft_ms", 10.0, 1.0), row("ttft_ms", 14.0, 1.0)
    assert outcome(old, new, EXACT, noisy) == "drifted"
    assert outcome(old, new, EXACT, noisy._replace(slice=LOAD)) == "reproduced"


def test_memory_is_near() -> None:
    def peak(value: float) -> Row:
        return row("peak_memory_bytes", value, None, None)

    gib = float(2**30)
    assert outcome(peak(10 * gib), peak(10.49 * gib)) == "reproduced"
    assert outcome(peak(10 * gib), peak(10.51 * gib)) == "drifted"
    assert outcome(peak(1e6), peak(1e6 + (16 << 20))) == "reproduced"
    assert outcome(peak(1e6), peak(1e6 + (17 << 20))) == "drifted"
    assert outcome(peak(1e6), peak(9e9), replace(EXACT, elsewhere=True)) == "not judged"
    users = row("max_concurrency", 10.0), row("max_concurrency", 12.0)
    assert outcome(*users) == "drifted"  # no floor of bytes


def test_every_metric_is_judged_or_is_a_circumstance() -> None:
    for name, metric in METRICS.items():
        same = outcome(row(name, 2.0, 0.1), row(name, 2.0, 0.1))
        assert same == ("not judged" if metric.again == "any" else "reproduced"), name
        other = outcome(row(name, 2.0, 0.1), row(name, 2e9, 0.1))
        assert other == ("not judged" if metric.again == "any" else "drifted"), name
    assert sum(metric.again == "any" for metric in METRICS.values()) < 10
    assert not any(metric.is_timing and metric.again != "same" for metric in METRICS.values())


def test_numbers_that_come_or_go_are_told() -> None:
    ppl, extra = row("ppl", 3.0, 0.1, None), row("accuracy", 0.5, 0.1, "code")
    gone = judgement.cell(locked([ppl, extra]), locked([ppl]), EXACT)
    assert [(v.metric, v.outcome) for v in gone[1:]] == [
        ("ppl", "reproduced"),
        ("accuracy", "drifted"),
    ]
    more = judgement.cell(locked([ppl]), locked([ppl, extra]), EXACT)
    assert [(v.metric, v.outcome) for v in more[1:]] == [
        ("ppl", "reproduced"),
        ("accuracy", "not judged"),
    ]
    load = row("merged_first_tokens", 0.4)
    quiet = judgement.cell(locked([load]), locked([]), EXACT)
    assert [(v.metric, v.outcome) for v in quiet[1:]] == [("merged_first_tokens", "not judged")]
    crashed = judgement.cell(locked([ppl]), locked([], "crashed"), EXACT)
    assert [(v.metric, v.outcome, v.old, v.new) for v in crashed] == [
        ("status", "drifted", "ok", "crashed")
    ]


def test_a_finding_that_is_no_number_is_reproduced_too() -> None:
    assert [
        v.outcome for v in judgement.cell(locked(status="oom"), locked(status="oom"), EXACT)
    ] == ["reproduced"]
    assert judgement.cell(locked(status=None), locked(), EXACT) == []


def test_bytes_of_the_artifact_are_compared_and_what_made_them_named() -> None:
    old = locked(files={"a": "1", "b": "2"}, torch="2.13")
    same = judgement.cell(old, locked(files={"a": "1", "b": "2"}, torch="2.14"), EXACT)
    assert [(v.metric, v.outcome) for v in same[1:]] == [("files", "reproduced")]
    other = judgement.cell(old, locked(files={"a": "1", "b": "3", "c": "4"}, torch="2.14"), EXACT)
    assert other[1].outcome == "drifted"
    assert str(other[1].why) == "2 of 3 have other bytes: b, c (made with torch 2.13 -> 2.14)"


def test_items_are_compared_one_by_one() -> None:
    first = {"code": Answers(2, "d1", "2", "AAAABBBB")}
    second = {"code": Answers(2, "d2", "3", "AAAACCCC")}
    verdict = judgement.cell(locked(slices=first), locked(slices=second), EXACT)[1]
    assert (verdict.metric, verdict.slice, verdict.outcome) == ("items", "code", "drifted")
    assert verdict.why == "1 of 2 items differ, 1 of them in being right"
    assert (
        judgement.cell(locked(slices=first), locked(slices=first), EXACT)[1].outcome == "reproduced"
    )
    loose = replace(EXACT, exact=False)
    assert (
        judgement.cell(locked(slices=first), locked(slices=second), loose)[1].outcome
        == "not judged"
    )
