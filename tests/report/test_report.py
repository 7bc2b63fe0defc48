from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from qgrid import codec, files, report
from qgrid.report import axes, flat, html, markdown, rows, screen, sheet
from qgrid.store import records
from qgrid.types import Failure, KvCache, Measurement

if TYPE_CHECKING:
    from tests.report.conftest import Sweep

Number = Callable[..., Measurement]
HOSTILE = "<script>alert(1)</script>|\"'`[x](http://e.vil)\n\x1b[31m</script>"


def printed(sweep: Sweep, width: int) -> str:
    out = io.StringIO()
    report.terminal(sweep.planned, sweep.records, Console(file=out, width=width))
    return out.getvalue()


def table(sweep: Sweep) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(flat.render(sweep.planned, sweep.records))))


def line(sweep: Sweep, cell_id: str) -> dict[str, str]:
    return next(each for each in table(sweep) if each["cell_id"] == cell_id)


def shown(sweep: Sweep, method: str, bits: int) -> dict[str, str]:
    built = sheet.build(sweep.planned, sweep.records)
    heads = [" ".join(column.head) for column in built.columns]
    texts = [[text.whole for text in row] for group in built.groups for row in group]
    return next(
        dict(zip(heads, row, strict=True)) for row in texts if row[:2] == [method, str(bits)]
    )


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, qgrid.report, qgrid.report.screen, qgrid.report.html;"
        "print([m for m in ('torch', 'transformers', 'wandb', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_writes_all_three(sweep: Sweep, tmp_path: Path) -> None:
    paths = report.write(tmp_path / "grid", sweep.planned, sweep.records)
    assert sorted(paths) == ["report.html", "table.csv", "table.md"]
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == sorted(paths)


def test_is_a_pure_function_of_records(sweep: Sweep, tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        paths = report.write(tmp_path / name / "grid", sweep.planned, sweep.records)
        texts.append({key: path.read_text() for key, path in paths.items()})
    assert texts[0] == texts[1]


def test_baseline_is_absolute_and_others_are_paired_changes(sweep: Sweep) -> None:
    assert shown(sweep, "none", 16)["arithmetic points"] == "62.0% ±4.3"
    assert shown(sweep, "nf4", 4)["arithmetic points"] == "-2.1 ±2.2"
    assert shown(sweep, "rtn", 4)["arithmetic points"] == "-6.2 ±4.3▼"


def test_baseline_shows_the_noise_floor(sweep: Sweep) -> None:
    assert shown(sweep, "none", 16)["KLD nats"] == "1.3e-04 floor"
    assert shown(sweep, "gptq", 4)["KLD nats"] == "0.0141"


def test_refused_cells_are_rows_with_their_reason(sweep: Sweep) -> None:
    built = sheet.build(sweep.planned, sweep.records)
    status = shown(sweep, "int8", 4)["status"]
    number = re.fullmatch(r"unsupported (\[\d\])", status)
    assert number is not None
    assert "has no `bits=4`" in dict(built.notes)[number[1]]
    assert line(sweep, "cell-nf4-8")["reason"].startswith("method `nf4` has no `bits=8`")


def test_a_reason_that_is_a_note_as_well_is_told_once(sweep: Sweep) -> None:
    failed = sweep.changed("nf4", 4, status="crashed", error=Failure("crashed", "x"), notes=("x",))
    assert re.fullmatch(r"crashed \[\d\]", shown(failed, "nf4", 4)["status"])


def test_planned_cells_without_a_record_are_not_run(sweep: Sweep) -> None:
    text = flat.render(sweep.planned, [])
    statuses = [each["status"] for each in csv.DictReader(io.StringIO(text))]
    assert sorted(set(statuses)) == ["not run", "unsupported"]
    assert "not run" in printed(replace(sweep, records=[]), 100)


def test_an_unpacked_cell_claims_nothing(sweep: Sweep, make_number: Number) -> None:
    fast = make_number("decode_throughput", 300.0, "concurrency=1", low=290.0, high=310.0)
    row = shown(sweep.measured("rtn", 4, fast), "rtn", 4)
    assert row["decode batch 1 tok/s"] == "300†"
    assert row["weights in memory MiB"].endswith("†")
    assert line(sweep, "cell-rtn-4")["decompressed"] == "True"


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (150.0, 147.0, 153.0, "150 1.27x"),
        (120.0, 118.0, 122.0, "120"),
        (86.0, 85.0, 87.0, "86.0 0.73x"),
    ],
)
def test_speedup_is_claimed_only_where_its_interval_excludes_one(
    sweep: Sweep, make_number: Number, value: float, low: float, high: float, text: str
) -> None:
    speed = make_number("decode_throughput", value, "concurrency=1", low=low, high=high)
    assert shown(sweep.measured("nf4", 4, speed), "nf4", 4)["decode batch 1 tok/s"] == text


def test_batches_have_their_own_columns(sweep: Sweep) -> None:
    row = shown(sweep, "none", 16)
    assert row["decode batch 1 tok/s"] == "118"
    assert row["decode batch 4 tok/s"] == "311"


def test_an_unstable_timing_is_marked(sweep: Sweep, make_number: Number) -> None:
    unstable = sweep.measured("none", 16, make_number("timing_cv", 0.08, "concurrency=1"))
    assert shown(unstable, "none", 16)["decode batch 1 tok/s"] == "~118"


def test_a_timing_that_others_disturbed_claims_no_gain(sweep: Sweep, make_number: Number) -> None:
    """Repeats agree when a neighbour is steadily in the way; the ratio would be the neighbour's."""
    assert "x" in shown(sweep, "nf4", 4)["decode batch 1 tok/s"]
    for method, bits in (("none", 16), ("nf4", 4)):
        busy = sweep.measured(method, bits, make_number("busy_elsewhere", 0.9))
        assert "x" not in shown(busy, "nf4", 4)["decode batch 1 tok/s"]
        assert shown(busy, method, bits)["decode batch 1 tok/s"].startswith("~")


def test_only_varying_axes_have_columns(sweep: Sweep) -> None:
    assert list(rows.groups(sweep.planned, sweep.records)[0][0].labels) == ["method", "bits"]
    small = replace(sweep.planned[2].cell, kv_cache=KvCache("int4", 4), context=2048)
    options = replace(small.method, options={"group_size": 32})
    more = replace(sweep.planned[2], cell_id="other", cell=replace(small, method=options))
    labels = rows.groups([*sweep.planned, more], sweep.records)[0][-1].labels
    assert list(labels) == ["method", "bits", "kv_cache", "context"]
    found = {each.labels["method"] for each in rows.groups([*sweep.planned, more], [])[0]}
    assert {"nf4 group_size=null", "nf4 group_size=32"} <= found


def test_what_most_choices_share_goes_without_saying(sweep: Sweep) -> None:
    cell = sweep.planned[2].cell
    asked: list[dict[str, Any]] = [
        {},
        {"group_size": 64},
        {"symmetric": False},
        {"group_size": None},
        {"batch": 0},
    ]
    usual = {"group_size": 128, "symmetric": True, "batch": 1}
    cells = [replace(cell, method=replace(cell.method, options=usual | each)) for each in asked]
    assert [each["method"] for each in axes.labels(cells)] == [
        "nf4", "nf4 group_size=64", "nf4 symmetric=false", "nf4 group_size=null", "nf4 batch=0",
    ]  # fmt: skip
    kept = replace(cell, method=replace(cell.method, options={"keep": {"layers.0.*": 8}}))
    assert axes.labels([kept])[0]["method"] == 'nf4 keep={"layers.0.*": 8}'
    switched = [replace(cell, method=replace(cell.method, options={"on": on})) for on in (0, 0, 1)]
    assert [each["method"] for each in axes.labels(switched)] == [
        "nf4 on=0",
        "nf4 on=0",
        "nf4 on=1",
    ]


def test_a_divergence_below_zero_is_drawn_as_the_least(sweep: Sweep, make_number: Number) -> None:
    """Rounding makes one of a cell that computes the same a little less than 0."""
    less = sweep.measured("nf4", 4, make_number("kld_mean", -1e-9))
    assert 'id="parallel"' in html.render("less", sheet.build(less.planned, less.records), [])


def test_rows_of_another_setting_form_a_group(sweep: Sweep) -> None:
    others = [
        replace(
            each,
            cell_id=f"{each.cell_id}-2048",
            baseline_cell_id=each.baseline_cell_id and f"{each.baseline_cell_id}-2048",
            cell=replace(each.cell, context=2048),
        )
        for each in sweep.planned
    ]
    mixed = [each for pair in zip(others, sweep.planned, strict=True) for each in pair]
    grouped = rows.groups(mixed, sweep.records)
    assert [{row.labels["context"] for row in group} for group in grouped] == [{"2048"}, {"512"}]
    assert all(group[0].is_baseline for group in grouped)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140, 160, 300])
def test_no_line_of_a_table_is_wider_than_the_terminal(sweep: Sweep, width: int) -> None:
    text = printed(sweep, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert len(re.findall(r"^ awq +4 ", text, re.MULTILINE)) == text.count("method  bits")


def test_a_terminal_narrower_than_a_column_shows_all_the_same(sweep: Sweep) -> None:
    built = sheet.build(sweep.planned, sweep.records)
    shown_columns = [i for part in screen.layout(built, 20) for i in part]
    assert sorted(set(shown_columns)) == list(range(len(built.columns)))


def test_width_decides_the_number_of_tables(sweep: Sweep) -> None:
    built = sheet.build(sweep.planned, sweep.records)
    assert [len(screen.layout(built, width)) for width in (300, 150)] == [1, 2]
    shown_columns = {i for part in screen.layout(built, 100) for i in part}
    assert shown_columns == set(range(len(built.columns)))


def test_csv_keeps_everything(sweep: Sweep) -> None:
    whole = sweep.measured(
        "nf4", 4, Measurement("kld_mean", 0.1 + 0.2, "nats", None, 1 / 3, 7, 0.1, 0.7)
    )
    found = line(whole, "cell-nf4-4")
    assert float(found["kld_mean [nats]"]) == 0.1 + 0.2
    assert float(found["kld_mean stderr [nats]"]) == 1 / 3
    assert found["kld_mean n [1]"] == "7"
    for measured in whole.record("nf4", 4).measurements:
        where = "" if measured.slice is None else f"/{measured.slice}"
        name = f"{measured.metric}{where} [{measured.unit}]"
        assert float(found[name]) == measured.value
    assert found["cell.method.name"] == "nf4"
    assert found["cell.slices.items.code.limit"] == "100"
    assert len(table(whole)) == len(whole.planned)


def test_hostile_names_stay_text(sweep: Sweep, tmp_path: Path) -> None:
    cell = sweep.planned[3].cell
    planned = list(sweep.planned)
    planned[3] = replace(planned[3], cell=replace(cell, method=replace(cell.method, name=HOSTILE)))
    broken = sweep.changed(
        "rtn",
        8,
        error=Failure("crashed", HOSTILE),
        environment={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    paths = report.write(tmp_path / HOSTILE.replace("/", "_"), planned, broken.records)
    parser = Elements()
    parser.feed(paths["report.html"].read_text())
    benign = Elements()
    plain = report.write(tmp_path / "grid", sweep.planned, sweep.records)
    benign.feed(plain["report.html"].read_text())
    assert parser.num_scripts == benign.num_scripts
    assert "<script>alert" not in "".join(parser.scripts)
    assert parser.links == []
    assert not re.search(r"(?<!\\)\]\(http|<", paths["table.md"].read_text())
    out = io.StringIO()
    report.terminal(planned, broken.records, Console(file=out, width=100))
    assert "\x1b[31m" not in out.getvalue()


def test_formulas_in_the_csv_are_text(sweep: Sweep) -> None:
    broken = sweep.changed("rtn", 8, error=Failure("crashed", "=cmd|' /C calc'!A0"))
    assert line(broken, "cell-rtn-8")["reason"].startswith("'=")


def test_page_loads_nothing(sweep: Sweep, tmp_path: Path) -> None:
    text = report.write(tmp_path / "grid", sweep.planned, sweep.records)["report.html"].read_text()
    parser = Elements()
    parser.feed(text)
    assert parser.links == []
    assert "parcoords" in text
    assert "Parallel" not in parser.title
    assert "a processor" in text


def test_page_without_any_measured_cell(sweep: Sweep, tmp_path: Path) -> None:
    paths = report.write(tmp_path / "grid", sweep.planned, [])
    assert "not run" in paths["report.html"].read_text()
    assert report.write(tmp_path / "empty", [], [])["table.md"].exists()


def test_markdown_rows_have_as_many_places_as_the_head(sweep: Sweep) -> None:
    text = markdown.render("grid", sheet.build(sweep.planned, sweep.records), [])
    counts = {len(re.findall(r"(?<!\\)\|", each)) for each in text.splitlines() if each[:1] == "|"}
    assert len(counts) == 1


def store(sweep: Sweep, folder: Path) -> None:
    """The plan and the records of a sweep as a run leaves them."""
    plan = "".join(codec.dumps(each) + "\n" for each in sweep.planned)
    files.write_atomic(folder / "sweeps" / "grid" / "plan.jsonl", plan)
    for each in sweep.records:
        records.write(folder, each)


def test_reporting_needs_no_model_library(sweep: Sweep, tmp_path: Path) -> None:
    store(sweep, tmp_path)
    code = (
        "import sys; from pathlib import Path; from qgrid import report;"
        f"code = report.rewrite(Path({str(tmp_path)!r}), None);"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_rewrite_reads_the_store(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(sweep, tmp_path)
    assert report.rewrite(tmp_path, "grid") == 0
    assert (tmp_path / "sweeps" / "grid" / "report.html").is_file()
    assert "gptq" in capsys.readouterr().out
    assert report.rewrite(tmp_path, None) == 0
    assert report.rewrite(tmp_path, "other") == 2
    assert "has: grid" in capsys.readouterr().err


class Elements(HTMLParser):
    """Scripts, addresses that a browser would fetch, and the title of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.num_scripts = 0
        self.links: list[str] = []
        self.title = ""
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.num_scripts += tag == "script"
        self.links += [str(value) for key, value in attrs if key in {"src", "href", "action"}]

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script" and len(data) < 1_000_000:  # plotly itself is larger
            self.scripts.append(data)
        if self._open == "title":
            self.title += data
