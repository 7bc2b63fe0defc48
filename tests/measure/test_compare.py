"""Paired changes between two cells."""

from __future__ import annotations

from typing import Any

import pytest

from qgrid import stats
from qgrid.measure import compare

Line = dict[str, Any]


def lines(right: list[int], graded: list[float], documents: list[str | None]) -> list[Line]:
    return [
        {"slice": "s", "id": str(i), "document": d, "correct": bool(c), "answer_logprob": g}
        for i, (c, g, d) in enumerate(zip(right, graded, documents, strict=True))
    ]


def changes(cell: list[Line], base: list[Line]) -> dict[str, Any]:
    return {m.metric: m for m in compare.paired(cell, base)}


def test_changes_come_from_pairs() -> None:
    base = lines([1] * 60 + [0] * 40, [-1.0] * 100, [None] * 100)
    cell = lines([0] * 7 + [1] * 53 + [1] * 2 + [0] * 38, [-1.5] * 50 + [-1.0] * 50, [None] * 100)
    found = changes(cell, base)
    assert found["accuracy_delta"].value == pytest.approx(-0.05)
    interval = stats.newcombe_paired(both=53, only_first=2, only_second=7, neither=38)
    assert (found["accuracy_delta"].low, found["accuracy_delta"].high) == interval
    assert (found["flips_worse"].value, found["flips_better"].value) == (7, 2)
    assert found["mcnemar_p"].value == stats.mcnemar(7, 2)
    graded = found["answer_logprob_delta"]
    assert graded.value == pytest.approx(-0.25)
    assert graded.low < -0.25 < graded.high < 0
    assert {m.slice for m in found.values()} == {"s"}
    assert {m.n for m in found.values()} == {100}


def test_no_flips_is_still_an_interval() -> None:
    same = lines([1] * 50 + [0] * 50, [-1.0] * 100, [None] * 100)
    found = changes(same, same)["accuracy_delta"]
    assert found.value == 0
    assert found.low < 0 < found.high


def test_no_flips_among_documents_is_still_an_interval() -> None:
    documents: list[str | None] = [f"d{i // 10}" for i in range(100)]
    same = lines([1] * 50 + [0] * 50, [-1.0] * 100, documents)
    found = changes(same, same)["accuracy_delta"]
    assert found.value == 0
    assert found.low < 0 < found.high


def test_documents_are_drawn_whole() -> None:
    documents: list[str | None] = [f"d{i // 10}" for i in range(100)]
    base = lines([1] * 100, [-1.0] * 100, documents)
    cell = lines([0] * 20 + [1] * 80, [-1.0] * 100, documents)
    wide = changes(cell, base)["accuracy_delta"]
    alone: list[str | None] = [None] * 100
    narrow = changes(
        lines([0] * 20 + [1] * 80, [-1.0] * 100, alone), lines([1] * 100, [-1.0] * 100, alone)
    )["accuracy_delta"]
    assert wide.value == narrow.value == pytest.approx(-0.2)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_single_document_claims_no_certainty() -> None:
    one: list[str | None] = ["d"] * 20
    base = lines([1] * 20, [-1.0] * 20, one)
    found = changes(lines([0] * 3 + [1] * 17, [-1.5] * 20, one), base)
    for metric in ("accuracy_delta", "answer_logprob_delta"):
        assert (found[metric].stderr, found[metric].low, found[metric].high) == (None, None, None)


def test_order_does_not_matter_but_every_item_must_be_in_both() -> None:
    base = lines([1, 0, 1], [-1.0, -2.0, -3.0], [None] * 3)
    assert changes(base[::-1], base)["answer_logprob_delta"].value == 0
    with pytest.raises(compare.Unpaired, match="item `2` of slice `s` has a baseline result only"):
        compare.paired(base[:2], base)
    with pytest.raises(compare.Unpaired, match="item `2` of slice `s` has no baseline result"):
        compare.paired(base, base[:2])
