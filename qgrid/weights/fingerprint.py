"""What a tokenizer does, part by part, so that a swapped one is found and named; no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qgrid import codec
from qgrid.files import sha256
from qgrid.models import TOKENIZER_FILES

PROBES = (
    "Hello, world! It's 1234567890.",
    "  two spaces\n\n\ttab\r\nend ",
    "naïve Zürich 東京 🙂 e\u0301",
    '{"name": "f", "arguments": {"x": -1.5e3}}',
    "def f(x):\n    return x ** 2  # note",
    "<|end|><|user|></s><s>[INST] <|im_start|>",
)
_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_BOUNDARIES = ("add_bos_token", "add_eos_token", "bos_token", "eos_token", "add_prefix_space")
_SPECIAL = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def fingerprint(folder: Path) -> dict[str, str]:
    """Part -> hash of vocab, merges, added and special tokens, chat template, pipeline and more.

    `boundaries` covers BOS and EOS; `encoding` is what the probe strings become. A folder without
    `tokenizer.json` is known by the bytes of its tokenizer files.
    """
    config = _read(folder / "tokenizer_config.json")
    parts = {
        "special_tokens": _special_tokens(folder, config),
        "boundaries": {key: _text(config.get(key)) for key in _BOUNDARIES},
        "chat_template": _chat_template(folder, config),
    }
    if (folder / "tokenizer.json").is_file():
        parts |= _pipeline(folder)
    else:
        present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        parts["files"] = {name: sha256(folder / name) for name in present}
    return {part: codec.digest(value, 64) for part, value in sorted(parts.items())}


def difference(expected: dict[str, str], actual: dict[str, str]) -> list[str]:
    """The parts in which two fingerprints differ."""
    return sorted(p for p in expected.keys() | actual.keys() if expected.get(p) != actual.get(p))


def _pipeline(folder: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    stored = _read(folder / "tokenizer.json")
    model = stored.get("model", {})
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])
    ]
    return {
        "vocab": model.get("vocab"),
        "merges": merges,
        "added_tokens": stored.get("added_tokens"),
        **{part: stored.get(part) for part in _PIPELINE},
        "encoding": [encode(text).ids for text in PROBES],
    }


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    listed = _read(folder / "special_tokens_map.json") | config
    extra = [_text(token) for token in listed.get("additional_special_tokens", [])]
    return {key: _text(listed.get(key)) for key in _SPECIAL} | {"additional": extra}


def _chat_template(folder: Path, config: dict[str, Any]) -> Any:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return _read(folder / "chat_template.json").get("chat_template", config.get("chat_template"))


def _text(token: Any) -> Any:
    """A token that is written as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored
