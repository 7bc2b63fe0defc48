"""The text of a lock, read by PyYAML's own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qgrid.reproduction import yaml_text

STRINGS = [
    "", "a: b", "- x", "# no comment", "null", "yes", "1e5", "0x1f", "12:30:00", "2026-11-21",
    "~", "'", '"', "a\nb", "a\tb", "\x00", "\x7f", "\x85", "\u2028", "\ufeff", "é 東 🙂", "{a}",
    "[x]", "!tag", "&a", "*a", "%TAG", "$(rm -rf /)", "\\", " padded ",
]  # fmt: skip
NUMBERS = [0.0, 1.0, -2.5, 1e-05, 7.756814617666696e-05, 1e16, 1e22, 1.5e300, 5e-324, 3, -7, 2**60]


def test_every_scalar_comes_back_as_it_was_with_its_type() -> None:
    data: dict[str, Any] = {
        "strings": STRINGS,
        "numbers": NUMBERS,
        "others": [None, True, False],
        "keys": {text: number for number, text in enumerate(STRINGS)},
    }
    back = yaml.safe_load(yaml_text.dumps(data))
    assert back == data
    assert list(map(type, back["numbers"])) == list(map(type, NUMBERS))
    assert list(map(type, back["others"])) == [type(None), bool, bool]


def test_nesting_and_empty_containers_come_back() -> None:
    data = {
        "empty": {"list": [], "mapping": {}},
        "nested": {"a": {"b": [{"c": [1, [2, []]]}, {}, []]}},
        "rows": [["metric" * 30, None, 0.5], ["x", "y", 1.0]],
        "long": {f"key_{'x' * 20}_{n}": n for n in range(9)},
        "order": {"z": 1, "a": 2},
    }
    back = yaml.safe_load(yaml_text.dumps(data))
    assert back == data
    assert list(back["order"]) == ["z", "a"]


def test_a_row_is_a_line_and_the_same_data_are_the_same_bytes() -> None:
    data = {"rows": [["m" * 150, None, 0.5]], "pins": {"torch": "2.13.0"}}
    text = yaml_text.dumps(data)
    assert f'  - ["{"m" * 150}", null, 0.5]' in text.splitlines()
    assert text == yaml_text.dumps({"rows": (("m" * 150, None, 0.5),), "pins": data["pins"]})


def test_what_is_no_number_is_refused() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            yaml_text.dumps({"value": value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- a\n", "should hold a mapping"),
        ("a: !!python/object:os.x {}", "tag"),
        ("a: &x [1]\nb: [*x, *x]\n", "anchors"),
        ("a: &x [*x]\n", "anchors"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(yaml_text.InvalidYaml, match=words) as error:
        yaml_text.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
