"""Cells of serving engines in the report: loads, pools, failures, users, cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qgrid import report
from qgrid.report import load_plot, load_table, markdown, rows, sheet
from qgrid.types import Measurement
from tests.report.conftest import LEVELS
from tests.report.reading import about, marks, shown

if TYPE_CHECKING:
    from tests.report.conftest import Sweep

Number = Callable[..., Measurement]
MIB = 2**20


def test_loads_are_in_order_and_named(served: Sweep) -> None:
    built = sheet.build(served.planned, served.records)
    parts = rows.loads(built.rows, "output_throughput")
    assert parts == [*(f"concurrency={users}" for users in LEVELS), "rate=4"]
    assert [rows.load_name(part) for part in parts[-2:]] == ["batch 16", "4 req/s"]
    assert rows.load("rate=0.5") == rows.Load(True, 0.5)
    assert rows.load("extraction") is rows.load("rate=fast") is None


def test_of_many_loads_the_table_shows_the_first_and_the_last(served: Sweep) -> None:
    heads = list(shown(served, "nf4", 4))
    assert [head for head in heads if head.startswith("decode")] == [
        "decode batch 1 tok/s",
        "decode batch 16 tok/s",
    ]
    assert [head for head in heads if head.startswith(("output", "goodput"))] == [
        "output batch 16 tok/s",
        "output 4 req/s tok/s",
        "goodput batch 16 req/s",
        "goodput 4 req/s req/s",
    ]


def test_an_open_loop_claims_no_gain(served: Sweep, make_number: Number) -> None:
    """What comes is what was sent: a ratio would be about the sender."""
    for method, bits, value in (("none", 16, 90.0), ("nf4", 4, 120.0)):
        near = {"low": value - 1, "high": value + 1}
        part = make_number("output_throughput", value, "rate=4", **near)
        served = served.measured(method, bits, part)
    row = shown(served, "nf4", 4)
    assert row["output 4 req/s tok/s"].whole == "120"
    assert row["output batch 16 tok/s"].tail.endswith("x")


def test_users_of_an_unstable_curve_are_marked(served: Sweep, make_number: Number) -> None:
    shaky = served.measured("nf4", 4, make_number("timing_cv", 0.3, "concurrency=2"))
    assert shown(shaky, "nf4", 4)["most users"].whole == "~≥16"
    assert shown(shaky, "nf4", 4)["knee users"].whole == "~4"
    assert shown(shaky, "none", 16)["knee users"].whole == "4"


def test_users_say_where_they_are_a_lower_bound(served: Sweep) -> None:
    assert shown(served, "none", 16)["most users"].whole == "16"
    assert shown(served, "nf4", 4)["most users"].whole == "≥16"
    assert shown(served, "nf4", 4)["knee users"].whole == "4"
    assert "≥" in marks(served)
    assert not any("users" in head for head in shown_heads_of_plain(served))


def shown_heads_of_plain(sweep: Sweep) -> list[str]:
    """Heads of a sweep in which nobody measured users."""
    kept = [
        replace(
            record,
            measurements=tuple(
                m for m in record.measurements if m.metric not in ("knee_concurrency", "max_users")
            ),
        )
        for record in sweep.records
    ]
    built = sheet.build(sweep.planned, kept)
    return [" ".join(column.head) for column in built.columns]


def test_failed_requests_are_told_with_the_first_error(served: Sweep, make_number: Number) -> None:
    assert not about(served, "failed")
    failed = served.measured(
        "nf4",
        4,
        make_number("failed_requests", 3.0, "concurrency=8", n=40),
        make_number("failed_requests", 9.0, "rate=4", n=160),
    )  # beside 40 requests at each of the five concurrencies
    failures = {
        "rate=4": {"status": {"requests": 9, "first": "the server answered 503"}},
        "concurrency=8": {"reset": {"requests": 3, "first": "the connection was reset."}},
    }
    told = failed.observing("nf4", 4, failures=failures, given_up=["rate=4"])
    assert about(told, "12 of") == [
        "nf4 at 4 bits: 12 of 360 requests failed (3 at batch 8, 9 at 4 req/s); the first: the "
        "connection was reset."
    ]
    assert about(told, "given up") == [
        "nf4 at 4 bits: 4 req/s was given up, for all of its requests failed, twice in a row."
    ]
    assert about(failed, "12 of 360 requests failed (3 at batch 8, 9 at 4 req/s).")


def test_items_without_an_answer_are_told(sweep: Sweep, make_number: Number) -> None:
    some, none = (make_number("failed_items", count, "code", n=100) for count in (4.0, 0.0))
    (told,) = about(sweep.measured("nf4", 4, some), "no answer")
    assert told.startswith("nf4 at 4 bits: 4 of 100 items of `code` got no answer")
    assert not about(sweep.measured("nf4", 4, none), "no answer")
    windows = sweep.observing("nf4", 4, windows=32, failed_windows={"3": "silence", "9": "silence"})
    (told,) = about(windows, "no answer")
    assert told.startswith("nf4 at 4 bits: 2 of 32 windows of prose")
    alone = sweep.observing("nf4", 4, left_out_of_baseline={"prose": "no log-probabilities"})
    (told,) = about(alone, "left out")
    assert told == "nf4 at 4 bits: prose of the baseline was left out: no log-probabilities."


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"client_is_the_limit": ["concurrency=16"]}, "at batch 16 the load generator itself"),
        ({"cached_prompt_tokens": 1280}, "1,280 prompt tokens came from the server's cache"),
        ({"wrong_length": 2}, "2 requests gave another number of tokens"),
        ({"several_tokens_a_chunk": 7}, "7 answers came several tokens at a time"),
    ],
)
def test_what_flatters_a_load_is_told(served: Sweep, seen: dict[str, Any], words: str) -> None:
    assert not about(served, words)
    assert len(about(served.observing("nf4", 4, **seen), words)) == 1


def test_a_pool_is_a_setting_and_its_peak_no_need(sweep: Sweep, make_number: Number) -> None:
    pool = sweep.measured(
        "nf4",
        4,
        make_number("kv_pool_bytes", 1024.0 * MIB),
        make_number("activation_peak_bytes", 64.0 * MIB),
        make_number("reserved_bytes", 1100.0 * MIB),
        make_number("max_concurrency", 37.5),
        make_number("peak_memory_bytes", 1234.0 * MIB),
    )
    row = shown(pool, "nf4", 4)
    assert row["KV pool GiB"].text == "1.00"
    assert row["activa- tions MiB"].text == "64.00"
    assert row["all reserved GiB"].text == "1.07‡"
    assert row["requests in pool"].text == "37.5"
    assert row["peak memory MiB"].text == "-"
    assert shown(pool, "none", 16)["peak memory MiB"].text != "-"
    assert "‡" in marks(pool)
    assert "‡" not in marks(sweep)
    assert "KV pool GiB" not in shown(sweep, "nf4", 4)


def test_a_served_model_has_empty_places_for_what_nobody_knows(
    sweep: Sweep, make_number: Number, tmp_path: Path
) -> None:
    """No weights, so no size, no bits, no KL divergence over the vocabulary."""
    cost = make_number("usd_per_million_output_tokens", 2.75)
    known = tuple(
        m
        for m in sweep.record("nf4", 4).measurements
        if not m.metric.endswith(("_bytes", "per_weight")) and not m.metric.startswith("kld")
    )
    bound = make_number("kld_topk_mean", 0.0123, low=0.011, high=0.0135, n=4096)
    served = sweep.changed("nf4", 4, measurements=(*known, cost, bound), artifact={}, checks=())
    row = shown(served, "nf4", 4)
    assert [row[head].text for head in ("size MiB", "of the linears", "KLD nats")] == ["-"] * 3
    assert row["KLD top-k nats"].text == "0.0123"
    assert row["USD a million out"].text == "2.75"
    paths = report.write(tmp_path / "grid", served.planned, served.records)
    assert "2.75" in paths["table.md"].read_text()


# --- the section about loads ----------------------------------------------------------------------


def test_no_section_without_a_curve(sweep: Sweep, tmp_path: Path) -> None:
    assert load_table.build(sheet.build(sweep.planned, sweep.records).rows) is None
    paths = report.write(tmp_path / "grid", sweep.planned, sweep.records)
    assert "Loads" not in paths["table.md"].read_text()
    assert 'id="loads"' not in paths["report.html"].read_text()


def test_the_table_of_loads_holds_every_load_of_cells_with_a_curve(served: Sweep) -> None:
    table = load_table.build(sheet.build(served.planned, served.records).rows)
    assert table is not None
    assert [group[0][0].text for group in table.groups] == ["none at 16 bits", "nf4 at 4 bits"]
    for group in table.groups:
        assert [line[1].text for line in group] == [
            *(f"batch {users}" for users in LEVELS),
            "4 req/s",
        ]
    knee = [line[1].tail for line in table.groups[1]]
    assert knee == ["", "", "◆", "", "≥○", ""]
    assert not any(head.startswith("failed") for head in table.heads)
    index = table.heads.index("output tok/s")
    value = served.record("nf4", 4)
    exact = next(
        m.value
        for m in value.measurements
        if (m.metric, m.slice) == ("output_throughput", "concurrency=4")
    )
    assert float(table.groups[1][2][index].text) == pytest.approx(exact, rel=0.01)


def test_failures_have_a_column_where_there_are_any(served: Sweep, make_number: Number) -> None:
    failed = served.measured("nf4", 4, make_number("failed_requests", 3.0, "concurrency=8", n=40))
    table = load_table.build(sheet.build(failed.planned, failed.records).rows)
    assert table is not None
    index = table.heads.index("failed requests")
    assert [line[index].text for line in table.groups[1]][3:5] == ["3 of 40", "0 of 40"]


def test_markdown_has_the_loads_below_the_surprises(served: Sweep) -> None:
    built = sheet.build(served.planned, served.records)
    text = markdown.render("grid", built, [], load_table.build(built.rows))
    section = text.partition("## Loads")[2]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * (len(LEVELS) + 1)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {lines[0].count("|")}


def test_the_plot_has_the_points_of_the_curve(served: Sweep) -> None:
    built = sheet.build(served.planned, served.records)
    text = load_plot.render(built.rows, with_library=False)
    assert 'id="loads"' in text
    assert len(text) < 40_000  # the library comes once a page
    assert text.count("diamond") >= 2
    flat_ones = [row for row in built.rows if not load_table.has_curve(row)]
    assert len(flat_ones) >= 8
    assert load_plot.render(flat_ones, with_library=False) == ""


def test_the_page_holds_the_library_once(served: Sweep, tmp_path: Path) -> None:
    text = report.write(tmp_path / "grid", served.planned, served.records)["report.html"]
    page = text.read_text()
    assert 'id="loads"' in page
    assert 'id="parallel"' in page
    assert len(page) < 6_000_000
