"""The config and the tokenizer of a published checkpoint against those of its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import phrases
from qgrid.types import Check

# Of no matter for the numbers, or of generation, which takes the tokenizer's.
_FREE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_TOKENS = frozenset(
    {"vocab", "merges", "encoding", "files"}
)  # parts that decide what a text becomes


def check_config(folder: Path, base: Path) -> Check:
    """What the two configs, filled in by the library, say of the architecture."""
    from transformers import AutoConfig

    told, expected = (
        AutoConfig.from_pretrained(each, trust_remote_code=False).to_dict()
        for each in (folder, base)
    )
    wrong = [
        f"{key} is {_short(told.get(key))}, not {_short(expected.get(key))}"
        for key in sorted(told.keys() | expected.keys())
        if key not in _FREE and told.get(key) != expected.get(key)
    ]
    return _check("config", wrong, "the base model's architecture", "the same")


def check_tokenizer(actual: Mapping[str, str], expected: Mapping[str, str]) -> tuple[Check, Check]:
    """Fingerprints of the two tokenizers; only one that gives other tokens is fatal.

    The artifact gets the base's, so that another template or another special token changes nothing.
    """
    parts = {p for p in actual.keys() | expected.keys() if actual.get(p) != expected.get(p)}
    fatal, noted = sorted(parts & _TOKENS), sorted(parts - _TOKENS)
    goal = "the base model's"
    others = _check("chat_template", [f"another {part}" for part in noted], goal, goal)
    return (
        _check("vocabulary", [f"another {part}" for part in fatal], goal, goal),
        replace(others, fatal=False),
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(name: str, wrong: list[str], expected: str, good: str) -> Check:
    return Check(name, not wrong, expected, phrases.first(wrong) if wrong else good)
