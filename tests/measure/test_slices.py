"""Reading slices, choosing items, identity."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qgrid.files import HashCache
from qgrid.measure import slices as slice_files
from qgrid.measure.slices import InvalidSlice, Item
from qgrid.types import Prose, Slice, Slices


def items_of(levels: int, each: int) -> list[Item]:
    return [
        Item(f"{level}-{i}", level, "", "a", (), None, None)
        for level in range(levels)
        for i in range(each)
    ]


def test_a_limit_spreads_evenly_over_levels() -> None:
    chosen = slice_files.choose(items_of(5, 20), 33, seed=0)
    counts = Counter(item.level for item in chosen)
    assert sum(counts.values()) == 33
    assert set(counts.values()) == {6, 7}


def test_a_smaller_limit_is_the_beginning_of_a_larger() -> None:
    few, many = (slice_files.choose(items_of(3, 9), n, seed=1) for n in (6, 15))
    assert many[:6] == few


def test_the_seed_alone_decides_the_order() -> None:
    items = items_of(3, 9)
    assert slice_files.choose(items, None, 2) == slice_files.choose(items, None, 2)
    assert slice_files.choose(items, None, 2) != slice_files.choose(items, None, 3)
    assert set(slice_files.choose(items, None, 2)) == set(items)


def test_items_of_a_document_stay_together() -> None:
    items = [
        Item(f"{d}-{i}", d % 2, "", "a", (), f"d{d}", None) for d in range(6) for i in range(4)
    ]
    chosen = [item.document for item in slice_files.choose(items, 14, seed=0)]
    assert list(dict.fromkeys(chosen)) == [
        d for i, d in enumerate(chosen) if d != chosen[i - 1] or not i
    ]
    assert sorted(Counter(chosen).values()) == [2, 4, 4, 4]


def test_a_document_precedes_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    lines = [
        {"document": "d", "text": "The text."},
        {"id": "1", "level": 2, "prompt": "Ask?", "answer": "x", "document": "d"},
        {"id": "2", "prompt": "Other?", "answer": "y"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    first, second = slice_files.read(path)
    assert first.message == "The text.\n\nAsk?"
    assert (first.level, first.document) == (2, "d")
    assert (second.message, second.level, second.document) == ("Other?", 0, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "s.jsonl, line 1: not JSON"),
        ("[]", "should be a JSON object, is list"),
        ('{"id": "1", "prompt": "p"}', "`answer` should be text, is None"),
        ('{"id": 1, "prompt": "p", "answer": "a"}', "`id` should be text, is 1"),
        ('{"id": "1", "prompt": "p", "answer": "a", "labels": []}', "`labels` is not a key"),
        ('{"id": "1", "prompt": "p", "answer": "a", "document": "d"}', "no line with its text"),
        (
            '{"id": "1", "prompt": "p", "answer": "a", "choices": ["b", "c"]}',
            "not among the choices",
        ),
        ('{"id": "1", "prompt": "p", "answer": "a", "choices": ["a", "a"]}', "appears twice"),
        ('{"id": "1", "prompt": "p", "answer": "a", "choices": "abc"}', "list of texts, is 'abc'"),
        ('{"id": "1", "prompt": "p", "answer": "a", "choices": null}', "list of texts, is None"),
        ('{"id": "1", "prompt": "p", "answer": "a", "choices": ["a", 1]}', "list of texts, is"),
        ('{"id": "1", "prompt": "p", "answer": "a", "choices": ["a", ""]}', "a choice is empty"),
        ('{"id": "1", "prompt": "p", "answer": ""}', "`answer` is empty"),
        ('{"id": "1", "prompt": "p", "answer": "a", "level": "hard"}', "`level` should be a whole"),
        ('{"id": "1", "prompt": "p", "answer": "a", "level": 1.5}', "number, is 1.5"),
        ('{"id": "1", "prompt": "p", "answer": "a", "schema": "int"}', "`schema` should be a JSON"),
        ('{"id": "1", "prompt": "p", "answer": "a", "document": ["d"]}', "no line with its text"),
        ('{"text": "Of no document."}', "line 1: `document` should be text, is None"),
        ('{"document": "d", "text": 7}', "`text` should be text, is 7"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidSlice, match=message):
        slice_files.read(path)


def test_repeated_ids_and_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"id": "1", "prompt": "p", "answer": "a"}\n' * 2)
    with pytest.raises(InvalidSlice, match="line 2: id `1` is used twice"):
        slice_files.read(path)
    path.write_text("\n")
    with pytest.raises(InvalidSlice, match="holds no items"):
        slice_files.read(path)


def test_scoring_by_choice_needs_choices(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"id": "1", "prompt": "p", "answer": "a"}\n')
    with pytest.raises(InvalidSlice, match="item `1` has fewer than two choices"):
        slice_files.load("s", Slice(str(path), "choice", True, None, 4), 0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"answer": "one"}, "the answer of item `1` is not JSON"),
        ({"answer": "1", "schema": {"type": "number?"}}, "schema of item `1` is not a JSON Schema"),
    ],
)
def test_scoring_by_json_needs_json(tmp_path: Path, item: dict[str, str], message: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"id": "1", "prompt": "p", **item}))
    with pytest.raises(InvalidSlice, match=message):
        slice_files.load("s", Slice(str(path), "json", True, None, 4), 0)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 as they are, and other readers take them for line ends."""
    path = tmp_path / "s.jsonl"
    item = {"id": "1", "prompt": "a\u2028b\x85c", "answer": "a"}
    path.write_text(json.dumps(item, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert slice_files.read(path)[0].message == "a\u2028b\x85c"


def test_identity_follows_the_content_not_the_place(tmp_path: Path) -> None:
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.jsonl").write_text(text)
        (tmp_path / folder / "p.txt").write_text("prose")
    cache = HashCache(tmp_path / "hashes.json")

    def identity(folder: str) -> dict[str, str]:
        root = tmp_path / folder
        one = Slice(str(root / "s.jsonl"), "exact", True, None, 4)
        return slice_files.identity(
            Slices("x", Prose(str(root / "p.txt"), None, "gptq"), {"s": one}), cache
        )

    assert set(identity("a")) == {"items.s", "prose"}
    assert identity("a") == identity("b")
    assert identity("a")["items.s"] != identity("c")["items.s"]
    assert identity("a")["prose"] == identity("c")["prose"]


def test_identity_imports_no_model_library() -> None:
    code = (
        "import sys, qgrid.measure.slices; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
