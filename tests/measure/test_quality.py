"""The quality stage as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec
from qgrid.measure import answers, compare, loading, quality
from qgrid.measure.encoding import TooLong
from qgrid.measure.loading import fits_beside
from qgrid.metrics import METRICS
from qgrid.types import Cell, Job, KvCache, Slices

MakeJob = Callable[..., Job]


def test_a_cell_and_its_baseline(
    tiny_random: Path,
    noisy: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    slices: Slices,
) -> None:
    cell = make_cell(slices=slices)
    base_job = make_job("quality", cell, tiny_random, tiny_random)
    cell_job = make_job("quality", cell, noisy, tiny_random)
    base, found = quality.measure(base_job), quality.measure(cell_job)
    for result in (base, found):
        codec.dumps(result)
        for each in result.measurements:
            assert each.unit == METRICS[each.metric].unit
            assert each.low is None or each.high is None or each.low <= each.value <= each.high
    metrics = {m.metric for m in found.measurements}
    assert {"ppl", "kld_mean", "kld_p999", "same_top_p", "ln_ppl_ratio", "accuracy"} <= metrics
    assert "kld_floor" not in metrics
    assert {m.metric for m in base.measurements} == {
        "ppl",
        "kld_floor",
        "accuracy",
        "answer_logprob",
    }

    items = [_items(job) for job in (cell_job, base_job)]
    assert [each["id"] for each in items[0]] == [each["id"] for each in items[1]]
    assert {each["slice"] for each in items[0]} == set(slices.items)
    accuracy = {m.slice: m.value for m in found.measurements if m.metric == "accuracy"}
    before = {m.slice: m.value for m in base.measurements if m.metric == "accuracy"}
    for change in compare.paired(*items):
        if change.metric == "accuracy_delta":
            assert abs(change.value - (accuracy[change.slice] - before[change.slice])) < 1e-12


def test_the_same_stage_twice_gives_the_same_bytes(
    tiny_random: Path,
    noisy: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    slices: Slices,
) -> None:
    job = make_job("quality", make_cell(slices=slices), noisy, tiny_random)
    first, items = quality.measure(job), (Path(job.out) / "items.jsonl").read_bytes()
    second = quality.measure(job)
    assert first.measurements == second.measurements
    assert items == (Path(job.out) / "items.jsonl").read_bytes()


@pytest.mark.parametrize("beside", [True, False])
def test_what_hardly_reads_the_quantized_cache_is_said(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    slices: Slices,
    monkeypatch: pytest.MonkeyPatch,
    beside: bool,
) -> None:
    """A window of 128 is read in two pieces; the items of `choice` are shorter than one."""
    items = {name: slices.items[name] for name in ("choice", "exact") if beside}
    cell = make_cell(slices=replace(slices, items=items), kv_cache=KvCache("int8", 8))
    monkeypatch.setattr(quality, "fits_beside", lambda *_: beside)
    result = quality.measure(make_job("quality", cell, tiny_random, tiny_random))
    shares = result.observed["kv_rows_quantized"]
    assert shares["prose"] == 63 / 127  # the row of the first token of the second piece and on
    if not beside:  # the cell's engine is another one then
        return
    assert shares["choice"] == 0
    assert shares["exact"] > 0.4  # three of the four tokens of a reply, and the answer's none
    (check,) = [each for each in result.checks if each.name == "kv_rows"]
    assert (check.ok, check.fatal) == (False, False)
    assert check.actual == "0 % of `choice`"
    plain = make_job("quality", replace(cell, kv_cache=KvCache("auto16", 16)), tiny_random)
    assert "kv_rows_quantized" not in quality.measure(plain).observed


def test_slices_without_prose(
    tiny_random: Path, make_cell: Callable[..., Cell], make_job: MakeJob, slices: Slices
) -> None:
    only = Slices("x", None, {"choice": slices.items["choice"]})
    result = quality.measure(make_job("quality", make_cell(slices=only), tiny_random))
    assert {m.metric for m in result.measurements} == {"accuracy", "answer_logprob"}


def test_the_seed_changes_the_order(
    tiny_random: Path, make_cell: Callable[..., Cell], make_job: MakeJob, slices: Slices
) -> None:
    only = Slices("x", None, {"choice": slices.items["choice"]})
    orders = []
    for seed in (0, 1):
        job = make_job("quality", make_cell(slices=only, seed=seed), tiny_random)
        quality.measure(job)
        orders.append([each["id"] for each in _items(job)])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_baseline_fits_beside_the_engine_that_is_loaded(
    tiny_random: Path, make_cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = 512 * 256 + 5 * 256 + 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 256 * 512)
    monkeypatch.setattr(loading, "_free_bytes", lambda _: 6 * parameters)
    assert fits_beside(tiny_random, make_cell(), "float32")
    monkeypatch.setattr(loading, "_free_bytes", lambda _: 5 * parameters)
    assert not fits_beside(tiny_random, make_cell(), "float32")
    assert fits_beside(tiny_random, make_cell(), "bfloat16")


def test_a_baseline_that_fits_alone_still_has_its_floor(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    slices: Slices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job("quality", make_cell(slices=Slices("x", slices.prose, {})), tiny_random)
    beside = {m.metric: m.value for m in quality.measure(job).measurements}
    monkeypatch.setattr(quality, "fits_beside", lambda *_: False)
    apart = {m.metric: m.value for m in quality.measure(job).measurements}
    assert apart["ppl"] == beside["ppl"]
    assert apart["kld_floor"] == pytest.approx(beside["kld_floor"], rel=0.05)


def test_a_context_beyond_the_positions_is_refused(
    tiny_random: Path, make_cell: Callable[..., Cell], make_job: MakeJob, slices: Slices
) -> None:
    cell = make_cell(slices=Slices("x", slices.prose, {}), context=4097)
    with pytest.raises(TooLong, match=r"`context=4097` takes 4097 tokens.* has 4096 positions"):
        quality.measure(make_job("quality", cell, tiny_random))


def test_a_slice_too_long_for_the_model_is_left_out_and_the_rest_counts(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    make_job: MakeJob,
    slices: Slices,
    tmp_path: Path,
) -> None:
    item = {"id": "x", "prompt": "red " * 5000, "choices": ["red", "blue"], "answer": "red"}
    (tmp_path / "long.jsonl").write_text(json.dumps(item) + "\n")
    long = replace(slices.items["choice"], path=str(tmp_path / "long.jsonl"))
    both = Slices("x", None, {"long": long, "choice": slices.items["choice"]})
    result = quality.measure(make_job("quality", make_cell(slices=both), tiny_random))
    assert {m.slice for m in result.measurements} == {"choice"}
    assert "has 4096 positions" in result.observed["left_out"]["long"]


def test_a_reply_that_holds_line_ends_is_one_line(tmp_path: Path) -> None:
    reply = answers.Answered("s", "1", 0, None, False, -1.0, "a\x85b\u2028c")
    quality._write_items(tmp_path, [reply])
    (line,) = (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["reply"] == reply.reply


def _items(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(job.out) / "items.jsonl").read_text().splitlines()]
