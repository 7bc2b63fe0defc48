"""A changed tokenizer is found, and the part that changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid.weights.fingerprint import difference, fingerprint
from tests import jobs


@pytest.fixture
def copy(tiny_random: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_random, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / file
        stored = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(stored))

    return plant


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def drop_merge(folder: Path) -> None:
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["merges"].pop()
    path.write_text(json.dumps(stored))


SPLIT = {"type": "Whitespace"}
BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [0], "tokens": ["<|pad|>"]}}}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("plant", "parts"),
    [
        (jobs.swap_tokenizer, {"vocab"}),
        (drop_merge, {"merges"}),
        (other_template, {"chat_template"}),
        (edited("tokenizer_config.json", add_bos_token=True), {"boundaries"}),
        (edited("tokenizer_config.json", eos_token="<|user|>"), {"boundaries"}),
        (edited("tokenizer_config.json", pad_token="<|end|>"), {"special_tokens"}),
        (edited("tokenizer.json", pre_tokenizer=SPLIT), {"pre_tokenizer", "encoding"}),
        (edited("tokenizer.json", post_processor=BOS), {"post_processor", "encoding"}),
        (edited("tokenizer.json", added_tokens=[]), {"added_tokens"}),
    ],
)
def test_changed_part_is_named(plant: Callable[[Path], None], parts: set[str], copy: Path) -> None:
    before = fingerprint(copy)
    plant(copy)
    assert parts <= set(difference(before, fingerprint(copy)))


def test_a_token_written_as_an_object_is_the_same_token(copy: Path) -> None:
    before = fingerprint(copy)
    edited("tokenizer_config.json", eos_token={"content": "<|end|>", "special": True})(copy)
    assert fingerprint(copy) == before


def test_without_tokenizer_json_the_bytes_count(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"one")
    before = fingerprint(copy)
    (copy / "tokenizer.model").write_bytes(b"two")
    assert difference(before, fingerprint(copy)) == ["files"]
