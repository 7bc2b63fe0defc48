"""Text to token ids with explicit special tokens; the same ids go to every runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class NoChatTemplate(ValueError):
    """A slice wants chat prompts, but the tokenizer has no template."""


class TooLong(ValueError):
    """More tokens than the model has positions."""


class Encoder:
    """The tokenizer of a checkpoint folder, and how many positions its model has."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        self.stops = _stops(folder, self._tokenizer.eos_token_id)
        self.bos = self._added_bos()
        self._positions = positions(folder)

    def limit_positions(self, positions: int | None) -> None:
        """Note that an engine takes no more than `positions` tokens; None: as many as the model."""
        known = [each for each in (self._positions, positions) if each is not None]
        self._positions = min(known, default=None)

    def require_positions(self, tokens: int, what: str) -> None:
        """Refuse what is too long for this model, see `require_positions`."""
        require_positions(self._positions, tokens, what)

    def text(self, text: str) -> list[int]:
        """Ids of the text alone, no special token added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def prose(self, text: str, limit: int | None) -> list[int]:
        """Ids of a whole text, tokenized once, with BOS in front where the tokenizer adds one."""
        ids = self.text(text)
        lead = [] if self.bos is None else [self.bos]
        return [*lead, *ids][:limit]

    def prompts(self, messages: Sequence[str], chat: bool) -> list[list[int]]:
        """Ids up to where the reply begins.

        With `chat` the message goes through the chat template, which brings its own special
        tokens; without it the text follows BOS where the tokenizer adds one.

        Raises:
            NoChatTemplate: `chat`, and the tokenizer has no template.
        """
        if not chat:
            lead = [] if self.bos is None else [self.bos]
            return [[*lead, *ids] for ids in self._batch(messages)]
        if not self._tokenizer.chat_template:
            raise NoChatTemplate(
                "the slice has `chat=true`, but the model's tokenizer has no chat template; "
                "set `chat: false` for it"
            )
        return self._batch([self._rendered(message) for message in messages])

    def spelled(self, ids: Sequence[int]) -> str:
        """Text that a server's tokenizer turns into `ids`: special tokens as they are written.

        Without the BOS that the tokenizer puts in front by itself.
        """
        own = list(ids)[1:] if ids and ids[0] == self.bos else list(ids)
        found = self._tokenizer.decode(
            own, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(found)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids without special tokens."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _rendered(self, message: str) -> str:
        turns = [{"role": "user", "content": message}]
        return str(
            self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )

    def _batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return list(found["input_ids"])

    def _added_bos(self) -> int | None:
        """The id that the tokenizer itself puts before a text."""
        bos = self._tokenizer.bos_token_id
        ids = self._tokenizer.encode("a", add_special_tokens=True)
        return int(bos) if bos is not None and ids and ids[0] == bos else None


def require_positions(known: int | None, tokens: int, what: str) -> None:
    """Refuse what a model was not made for: beyond its positions it computes noise.

    Raises:
        TooLong: `tokens` exceed the `known` positions.
    """
    if known is not None and tokens > known:
        raise TooLong(
            f"{what} takes {tokens} tokens, but the model has {known} positions; "
            "shorten it or use another model"
        )


def positions(folder: Path) -> int | None:
    """Positions of the model by its configuration; None where that names none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = config.get("text_config", config)
    found = named.get("max_position_embeddings", named.get("n_positions"))
    return None if found is None else int(found)


def _stops(folder: Path, eos: int | None) -> tuple[int, ...]:
    """Every id that ends a reply: the tokenizer's and those of the generation settings."""
    found = set() if eos is None else {eos}
    settings = folder / "generation_config.json"
    if settings.is_file():
        more = json.loads(settings.read_text()).get("eos_token_id")
        found |= set(more) if isinstance(more, list) else {more} - {None}
    return tuple(sorted(found))
