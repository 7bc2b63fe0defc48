"""Columns of quality against the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qgrid.metrics import METRICS
from qgrid.report import compare, numbers, rows
from qgrid.report.columns import (
    FELL,
    FLOOR,
    Column,
    Text,
    Tone,
    has,
    hint,
    nothing,
    number,
    plain,
)
from qgrid.report.rows import Row


def build(every: Sequence[Row]) -> list[Column]:
    """Perplexity, divergence, then a column a slice."""
    fell = {row.planned.cell_id: row.fallen for row in every}
    scores = [
        Column(
            "quality",
            (*name.split("_"), "points"),
            f"Accuracy of slice `{name}`: share of the baseline's items answered right, then the "
            "paired change in points.",
            _score(name, fell),
        )
        for name in rows.slices(every)
    ]
    return [
        *plain(every, "quality", "ppl", ("ppl",)),
        *_divergence(every),
        *plain(every, "quality", "kld_topk_mean", ("KLD", "top-k", "nats")),
        *_same_top(every),
        *scores,
    ]


def _divergence(every: Sequence[Row]) -> list[Column]:
    """KL divergence; of a baseline the noise floor that its compute dtype alone makes."""

    def of(row: Row) -> Text:
        measured, floor = row.get("kld_mean"), row.get("kld_floor")
        if measured is not None:
            return Text(number(measured), hint=hint(measured))
        if floor is not None:
            return Text(number(floor), "faint", hint(floor), tail=FLOOR)
        return nothing(row)

    title = METRICS["kld_mean"].definition
    shown = has(every, "kld_mean") or has(every, "kld_floor")
    return [Column("quality", ("KLD", "nats"), title, of)] if shown else []


def _same_top(every: Sequence[Row]) -> list[Column]:
    def of(row: Row) -> Text:
        measured = row.get("same_top_p")
        return nothing(row) if measured is None else Text(numbers.percent(measured.value))

    title = METRICS["same_top_p"].definition
    return [Column("quality", ("same", "top"), title, of)] if has(every, "same_top_p") else []


def _score(name: str, fell: dict[str, list[str]]) -> Callable[[Row], Text]:
    """The accuracy of a baseline; of any other cell its paired change."""

    def of(row: Row) -> Text:
        accuracy, change = row.get("accuracy", name), row.get("accuracy_delta", name)
        if row.is_baseline or change is None:
            if accuracy is None:
                return nothing(row)
            half = numbers.plus_minus(compare.half_width(accuracy))
            return Text(numbers.percent(accuracy.value), hint=hint(accuracy), tail=half)
        half = numbers.plus_minus(compare.half_width(change))
        told = hint(change) + (f"; accuracy {accuracy.value:.4f}" if accuracy else "")
        has_fallen = name in fell[row.planned.cell_id]
        tone: Tone = "fell" if has_fallen else ""
        return Text(numbers.points(change.value), tone, told, half + (FELL if has_fallen else ""))

    return of
