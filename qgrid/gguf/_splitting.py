"""How a byte-level BPE tokenizer splits text first, and what llama.cpp calls it.

llama.cpp knows pre-tokenizers by name only, so the name is found from the steps in tokenizer.json.
Only those are listed whose ids were found equal on the strings of the parity check. Tekken's is
not: llama.cpp splits a word before a combining mark where Tekken's regex keeps it whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qgrid.contracts import Unsupported

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = "ByteLevel"
_GPT2 = "ByteLevel with its regex"
_DIGITS = "single digits"

_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    # (steps, whether a word that is a token is taken whole): name
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "smaug-bpe",
    ((_QWEN2, _BYTES), False): "qwen2",
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
}


def name(stored: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a `tokenizer.json`.

    Raises:
        Unsupported: the steps have no equal in llama.cpp, or none is known here.
    """
    found = steps(stored.get("pre_tokenizer"))
    whole = bool(stored["model"].get("ignore_merges", False))
    if (found, whole) not in _NAMES:
        raise Unsupported(
            f"the pre-tokenizer in tokenizer.json ({' then '.join(found)}; ignore_merges={whole}) "
            f"is not among those known in llama.cpp ({', '.join(_NAMES.values())}); "
            "use another method"
        )
    return _NAMES[found, whole]


def steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer, each as a regex or a word; unknown ones as their type."""
    if pre_tokenizer is None:
        return ("none",)
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in steps(part))
    return (_step(pre_tokenizer),)


def _step(part: Mapping[str, Any]) -> str:
    kind = part["type"]
    if kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert", False):
        pattern = part["pattern"]
        return str(pattern.get("Regex", f"Split at {pattern}"))
    if kind == "ByteLevel" and not part.get("add_prefix_space", True):
        return _GPT2 if part.get("use_regex", True) else _BYTES
    if kind == "Digits" and part.get("individual_digits", False):
        return _DIGITS
    return f"{kind} {dict(part)}"
