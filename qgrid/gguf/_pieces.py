"""SentencePiece-style vocabularies (Llama 2, Mistral) that tokenizer.json keeps as BPE with bytes.

llama.cpp joins neighbours whenever the joined text is a token, best score first; `tokenizers`
joins the pairs listed as merges, first in the list first. Both give the same ids where the list
has every split of every token and the splits of one token stand together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qgrid.contracts import Unsupported

SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNREACHED = -1e6  # below the score of every token that a merge makes


def is_byte(text: str) -> bool:
    """Whether a token stands for one byte, `<0x0A>`."""
    return bool(_BYTE.fullmatch(text))


def refuse(stored: Mapping[str, Any], merges: Sequence[tuple[str, str]]) -> None:
    """Look for what llama.cpp's SentencePiece-style tokenizer cannot do.

    Raises:
        Unsupported: names the part.
    """
    if stored["model"].get("ignore_merges"):
        raise Unsupported("the tokenizer has `ignore_merges` and bytes; llama.cpp has not both")
    vocab = stored["model"]["vocab"]
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise Unsupported(
            f"the tokenizer falls back to bytes and has no token <0x{missing[0]:02X}>; complete it"
        )
    _refuse_steps(stored)
    added = {token["content"] for token in stored.get("added_tokens", ())}
    _refuse_merges([text for text in vocab if text not in added and not is_byte(text)], merges)


def _refuse_steps(stored: Mapping[str, Any]) -> None:
    known = {"Prepend", "Replace"}
    steps = [step["type"] for step in _normalizers(stored)]
    if not set(steps) <= known:
        raise Unsupported(
            f"the tokenizer has the normalizers {', '.join(steps)}; only {', '.join(known)} of "
            f"`{SPACE}` are known in a SentencePiece-style one"
        )
    pre = stored.get("pre_tokenizer")
    if pre is not None and (pre["type"] != "Metaspace" or pre.get("split", True)):
        raise Unsupported(
            f"the tokenizer has the pre-tokenizer {pre['type']} (split={pre.get('split')}); only "
            "Metaspace without splitting is known in a SentencePiece-style one"
        )
    if pre is None and "Replace" not in steps:
        raise Unsupported(f"the tokenizer does not write spaces as `{SPACE}`; use another method")


def _normalizers(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    normalizer = stored.get("normalizer")
    if not normalizer:
        return []
    return list(normalizer.get("normalizers", [normalizer]))


def adds_prefix(stored: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    pre = stored.get("pre_tokenizer")
    if pre is not None and pre.get("prepend_scheme", "always") != "never":
        return True
    return any(step["type"] == "Prepend" for step in _normalizers(stored))


def _refuse_merges(texts: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
    """Check that joining by token and joining by listed pair are the same."""
    listed, known = set(merges), set(texts)
    for text in texts:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            parts = all(part in known or len(part) == 1 for part in (left, right))
            if parts and (left, right) not in listed:
                raise Unsupported(
                    f"the tokenizer has the token `{text}` and no merge of `{left}` and "
                    f"`{right}`; llama.cpp would merge them; use another method"
                )
    _refuse_scattered(merges)


def _refuse_scattered(merges: Sequence[tuple[str, str]]) -> None:
    finished: set[str] = set()
    current = ""
    for left, right in merges:
        if left + right in finished:
            raise Unsupported(
                f"the merges that make `{left + right}` do not stand together in tokenizer.json; "
                "llama.cpp knows one rank a token; use another method"
            )
        if left + right != current:
            finished.add(current)
            current = left + right


def scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    """A score by id: the earlier a token is merged, the higher."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return tuple(-float(ranks[text]) if text in ranks else UNREACHED for text in tokens)
