"""Kernels in the report: the column, slow and other ones, what they make of the same weights."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qgrid.report import flat, sheet
from qgrid.types import Check, Failure, Measurement
from tests.report.reading import about, marks, shown

if TYPE_CHECKING:
    from tests.report.conftest import Sweep

Number = Callable[..., Measurement]


def test_the_kernel_is_a_column_with_all_modules_as_its_hint(sweep: Sweep) -> None:
    assert "kernel" not in shown(sweep, "nf4", 4)
    linears = [
        {"modules": 12, "method": "ggml", "scheme": "Q4_K", "kernel": "repack 8x8", "dtype": "q8"},
        {"modules": 2, "method": "ggml", "scheme": "Q6_K", "kernel": "plain", "dtype": None},
    ]
    told = sweep.observing("nf4", 4, kernel="mixed", linear_kernels=linears)
    place = shown(told, "nf4", 4)["kernel"]
    assert place.whole == "mixed"
    assert place.hint == "12 x Q4_K by repack 8x8 (ggml, q8); 2 x Q6_K by plain (ggml)"
    assert shown(told, "none", 16)["kernel"].whole == "-"
    line = next(
        each
        for each in csv.DictReader(io.StringIO(flat.render(told.planned, told.records)))
        if each["cell_id"] == "cell-nf4-4"
    )
    assert line["kernel"] == "mixed"


def test_a_name_of_a_kernel_brings_no_legend(sweep: Sweep) -> None:
    """Marks are looked for in figures: a name may hold an x or a tilde."""
    bare = replace(sweep, records=[replace(r, measurements=()) for r in sweep.records])
    told = bare.observing("nf4", 4, kernel="exllama~slow")
    assert not {"x", "~", "slow"} & marks(told)


def test_a_slow_kernel_is_flagged_in_table_and_surprises(sweep: Sweep) -> None:
    sentence = "`awq` without marlin reads weights ten times slower; use `awq_marlin`"
    slow = sweep.observing("nf4", 4, kernel="awq", slow_kernel=sentence)
    assert shown(slow, "nf4", 4)["kernel"].whole == "awq slow"
    assert "slow" in marks(slow)
    assert about(slow, "ten times") == [f"nf4 at 4 bits: {sentence}."]
    assert "slow" not in marks(sweep.observing("nf4", 4, kernel="awq"))


def test_quality_and_speed_of_different_kernels_are_told(sweep: Sweep) -> None:
    """Each dtype may have a kernel of its own."""
    old = sweep.record("nf4", 4).observed
    speed, quality = ({**old["speed"], "kernel": name} for name in ("torch_aten", "torch"))
    seen = {**old, "speed": speed, "quality": quality}
    told = about(sweep.changed("nf4", 4, observed=seen), "quality was measured with")
    assert "`torch`, speed with `torch_aten`" in told[0]
    same = {**seen, "quality": speed}
    assert not about(sweep.changed("nf4", 4, observed=same), "quality was measured with")


def test_another_kernel_than_asked_is_shown_even_of_an_invalid_cell(sweep: Sweep) -> None:
    check = Check("kernel", False, "repacked layers", "0 of 28 linear layers repacked")
    cell = sweep.record("nf4", 4).cell
    asked = replace(cell.runtime, options={**cell.runtime.options, "kernel": "repack"})
    planned = [
        replace(p, cell=replace(p.cell, runtime=asked)) if p.cell == cell else p
        for p in sweep.planned
    ]
    broken = sweep.changed(
        "nf4",
        4,
        status="invalid",
        checks=(check,),
        measurements=(),
        observed={},
        error=Failure("invalid", "another kernel"),
    )
    built = sheet.build(planned, broken.records)
    index = [column.head[0] for column in built.columns].index("kernel")
    found = {row[index].whole for group in built.groups for row in group}
    assert "not repack ≠" in found
    assert "≠" in {mark for mark, _ in built.notes}


def kernels(sweep: Sweep, plain: str = "plain", other: str = "repack") -> Sweep:
    """Two cells of one artifact that differ in nothing but the kernel."""
    found, made = [], []
    for planned in sweep.planned:
        if planned.cell_id != "cell-nf4-4":
            found.append(planned)
            continue
        for kernel in (plain, other):
            options = {**planned.cell.runtime.options, "kernel": kernel}
            own = replace(planned.cell.runtime, options=options)
            cell = replace(planned.cell, runtime=own)
            found.append(replace(planned, cell_id=f"cell-{kernel}", cell=cell))
            old = sweep.record("nf4", 4)
            speed = {**old.observed["speed"], "kernel": kernel}
            made.append(
                replace(
                    old,
                    cell_id=f"cell-{kernel}",
                    cell=cell,
                    observed={**old.observed, "speed": speed},
                )
            )
    others = [record for record in sweep.records if record.cell_id != "cell-nf4-4"]
    every = [
        replace(p, cell=replace(p.cell, runtime=replace(p.cell.runtime, options=_auto(p))))
        if "kernel" not in p.cell.runtime.options
        else p
        for p in found
    ]
    return type(sweep)(every, [*others, *made])


def _auto(planned: Any) -> dict[str, Any]:
    return {**planned.cell.runtime.options, "kernel": "auto"}


def with_speed(sweep: Sweep, cell_id: str, *measured: Measurement) -> Sweep:
    old = next(record for record in sweep.records if record.cell_id == cell_id)
    by_key = {(m.metric, m.slice): m for m in (*old.measurements, *measured)}
    new = replace(old, measurements=tuple(by_key.values()))
    return type(sweep)(sweep.planned, [new if each is old else each for each in sweep.records])


def test_other_kernels_on_the_same_weights_are_compared(sweep: Sweep, make_number: Number) -> None:
    pair = kernels(sweep)
    assert about(pair, "instead of") == [
        "nf4 at 4 bits (transformers kernel=repack): the kernel `repack` instead of `plain` on the "
        "same weights: no difference in speed that these timings can tell."
    ]
    fast = make_number("decode_throughput", 208.0, "concurrency=1", low=206.0, high=210.0)
    (told,) = about(with_speed(pair, "cell-repack", fast), "instead of")
    found = re.search(r"decode batch 1 (\S+)x \((\S+) to (\S+)\)\.$", told)
    assert found is not None
    ratio, low, high = map(float, found.groups())
    assert ratio == 2.0
    assert 206 / (104 * 1.012) - 0.01 < low < 2.0 < high < 210 / (104 * 0.985) + 0.01


def test_an_unstable_timing_compares_no_kernels(sweep: Sweep, make_number: Number) -> None:
    parts = ("concurrency=1", "concurrency=4")
    fast = [make_number("decode_throughput", 400.0, part, low=398.0, high=402.0) for part in parts]
    unstable = [make_number("timing_cv", 0.2, part) for part in parts]
    pair = with_speed(kernels(sweep), "cell-repack", *fast, *unstable[:1])
    (told,) = about(pair, "instead of")
    assert "batch 1 " not in told
    assert "decode batch 4 1.46x" in told
    assert not about(with_speed(pair, "cell-repack", *unstable), "instead of")


def test_cells_that_differ_in_more_than_the_kernel_are_not_compared(sweep: Sweep) -> None:
    pair = kernels(sweep)
    longer = [
        replace(p, cell=replace(p.cell, context=2048)) if p.cell_id == "cell-repack" else p
        for p in pair.planned
    ]
    assert about(pair, "instead of")
    assert not about(type(sweep)(longer, pair.records), "instead of")
    assert not about(kernels(sweep, "plain", "plain"), "instead of")
