"""In the place of transformers where cells are trivial: the tokenizer, which needs no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer

for _name in (  # what the warm parent imports ahead
    "modeling_utils",
    "generation.utils",
    "models.auto.modeling_auto",
    "models.auto.tokenization_auto",
    "models.llama.modeling_llama",
):
    _parts = _name.split(".")
    for _end in range(1, len(_parts) + 1):
        _whole = ".".join([__name__, *_parts[:_end]])
        sys.modules[_whole] = ModuleType(_whole)


class AutoTokenizer:
    """The part of a fast tokenizer that measuring uses."""

    bos_token_id: int | None = None
    chat_template: str | None = None

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos_token_id: int | None = self._tokenizer.token_to_id(config["eos_token"])

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> AutoTokenizer:
        return cls(Path(folder))

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}
