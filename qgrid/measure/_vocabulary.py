"""Which token ids the prompts of a timing are drawn from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def text_config(folder: Path) -> dict[str, Any]:
    """`config.json`; where a model is more than text, the part about text."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}


def vocabulary(folder: Path) -> list[int]:
    """Ids of plain text: those of the tokenizer that the model knows, without special tokens.

    A server may treat the others in its own way, or refuse ids that its tokenizer lacks.

    Raises:
        KeyError: neither the checkpoint's `config.json` nor its tokenizer says.
    """
    config = text_config(folder) if (folder / "config.json").is_file() else {}
    known = _known(folder)
    size = int(config["vocab_size"]) if "vocab_size" in config or known is None else None
    special = _named(config) | _added(folder)
    ids = range(size or 0) if known is None else sorted(known)
    return [each for each in ids if each not in special and (size is None or each < size)]


def _known(folder: Path) -> set[int] | None:
    """Ids of the tokenizer's own vocabulary; None where it is not stored as `tokenizer.json`."""
    vocab = _tokenizer(folder).get("model", {}).get("vocab")
    if isinstance(vocab, Mapping):
        return set(vocab.values())
    return set(range(len(vocab))) if isinstance(vocab, list) else None  # a list of pieces: Unigram


def _added(folder: Path) -> set[int]:
    """Tokens that were added to the vocabulary: marks of turns, of the end, of tools."""
    found = {int(token["id"]) for token in _tokenizer(folder).get("added_tokens", ())}
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        decoder = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        found |= {int(number) for number in decoder}
    return found


def _named(config: Mapping[str, Any]) -> set[int]:
    """Special tokens that the model's configuration names."""
    found: set[int] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        found |= {
            each for each in (value if isinstance(value, list) else [value]) if each is not None
        }
    return found


def _tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
