"""Calibration text: a seeded draw, identified by its content."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid.calibration import BadCalibration, calibration_identity, draw
from qgrid.files import HashCache
from tests import jobs


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} of many; "}) + "\n" for i in range(50)))
    return path


def test_draw_has_the_asked_shape_and_depends_on_the_seed_alone(lines: Path) -> None:
    wanted = jobs.calibration(lines)
    first, again, other = (draw(wanted, Letters(), seed) for seed in (1, 1, 2))
    assert [len(row) for row in first.rows] == [64] * 8
    assert first == again
    assert first.rows != other.rows
    assert first.summary["sha256"] != other.summary["sha256"]
    assert first.summary | {"sha256": ""} == {
        "source": str(lines), "revision": None, "sha256": "", "samples": 8, "length": 64, "seed": 1,
    }  # fmt: skip


def test_plain_text_is_drawn_by_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join("abcdefgh" * 10 for _ in range(20)))
    assert len(draw(jobs.calibration(path), Letters(), 0).rows) == 8


def test_data_set_is_shuffled_by_the_seed(lines: Path) -> None:
    folder = lines.parent / "set"
    folder.mkdir()
    lines.rename(folder / "train.jsonl")
    wanted = replace(jobs.calibration(lines), path=None, dataset=str(folder))
    first, other = draw(wanted, Letters(), 1), draw(wanted, Letters(), 2)
    assert len(first.rows) == 8
    assert first.rows != other.rows


def test_too_little_text_says_how_much(lines: Path) -> None:
    with pytest.raises(
        BadCalibration, match=r"ask for 8 x 640 = 5120; lower `calibration.samples`"
    ):
        draw(jobs.calibration(lines, length=640), Letters(), 0)


def test_missing_field_names_those_that_are_there(lines: Path) -> None:
    with pytest.raises(
        BadCalibration, match=r"`calibration.text_field=body` .* line 1 \(has: text\)"
    ):
        draw(jobs.calibration(lines, text_field="body"), Letters(), 0)


def test_no_source_at_all() -> None:
    with pytest.raises(BadCalibration, match="neither `path` nor `dataset`"):
        draw(replace(jobs.calibration(Path("x")), path=None), Letters(), 0)


def test_identity_is_content_and_shape(lines: Path, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    wanted = jobs.calibration(lines)
    first = calibration_identity(wanted, cache)
    renamed = lines.with_name("other.jsonl")
    lines.rename(renamed)
    assert calibration_identity(replace(wanted, path=str(renamed), name="b"), cache) == first
    assert calibration_identity(replace(wanted, path=str(renamed), samples=9), cache) != first
    renamed.write_text(renamed.read_text() + "\n")
    assert calibration_identity(replace(wanted, path=str(renamed)), None) != first
    hub = replace(wanted, path=None, dataset="org/set", revision="abc")
    assert calibration_identity(hub, None)["revision"] == "abc"
