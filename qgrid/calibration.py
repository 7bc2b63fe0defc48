"""Calibration text: what identifies it, and the seeded draw of token rows.

`sampling` says how documents become rows of `length` tokens:

* `packed`: documents in seeded order, joined and cut into `samples` rows;
* `windows`: of `samples` documents drawn with replacement among those longer than `length`, one
  window each, at random (GPTQ's protocol for C4; the same draws as its own script);
* `short`: `samples` documents of at most `length` tokens in seeded order, joined and cut: fewer
  rows than samples, the rest dropped (AWQ's protocol for the Pile);
* `documents`: `samples` documents in seeded order, each cut after `length` tokens: rows of
  different lengths (llm-compressor's protocol for chats).

A document is a text, or a list of messages that goes through the model's chat template.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import codec, models
from qgrid.calibration_texts import BadCalibration, Document, Source, source
from qgrid.files import sha256

if TYPE_CHECKING:
    from qgrid.files import HashCache
    from qgrid.types import Calibration


Rows = tuple[tuple[int, ...], ...]
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Drawn:
    """Rows of token ids, equally many but for `documents`, and what the manifest keeps."""

    rows: Rows
    summary: dict[str, Any]


def calibration_identity(calibration: Calibration, cache: HashCache | None) -> dict[str, Any]:
    """What of a calibration enters the artifact id: its content, not its name or place."""
    drawn = {"samples": calibration.samples, "length": calibration.length, **_rule(calibration)}
    if calibration.path is not None:
        path = models.resource(calibration.path)
        content = cache.sha256(path) if cache else sha256(path)
        return {"sha256": content, "text_field": calibration.text_field, **drawn}
    return {
        "dataset": _data_set(str(calibration.dataset), cache),
        "revision": calibration.revision,
        "split": calibration.split,
        "text_field": calibration.text_field,
        **drawn,
    }


def _data_set(name: str, cache: HashCache | None) -> str:
    """A hub's name as it is; a local folder by the content of its files."""
    folder = Path(name.partition(":")[0]).expanduser()
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [[str(p.relative_to(folder)), cache.sha256(p) if cache else sha256(p)] for p in files]
    return codec.digest(told, 64)


def _rule(calibration: Calibration) -> dict[str, Any]:
    """How rows are drawn, as far as it is not the default: ids from before these keys stay."""
    keys = ("sampling", "seed", "data_files")
    found = {key: getattr(calibration, key) for key in keys}
    return {key: value for key, value in found.items() if value not in (None, "packed")}


def draw(calibration: Calibration, tokenizer: Any, seed: int) -> Drawn:
    """Rows of token ids as the calibration's `sampling` says; its own seed goes before `seed`.

    Raises:
        BadCalibration: no source, no such field, no chat template, or too little text.
    """
    own = seed if calibration.seed is None else calibration.seed
    documents, encode = source(calibration), _Encoder(calibration, tokenizer)
    rows = _SAMPLINGS[calibration.sampling](calibration, documents, encode, own)
    return Drawn(rows, _summary(calibration, own, encode.used.hexdigest()))


def batches(rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Neighbours of one length, as many at a time as make some thousand tokens."""
    for length, alike in groupby(rows, key=len):
        size, part = max(1, _BATCH_TOKENS // length), list(alike)
        for first in range(0, len(part), size):
            yield part[first : first + size]


def _summary(calibration: Calibration, seed: int, digest: str) -> dict[str, Any]:
    return {
        "source": calibration.path or calibration.dataset,
        "revision": calibration.revision,
        "sha256": digest,  # of the text that was drawn, in order
        "samples": calibration.samples,
        "length": calibration.length,
        "sampling": calibration.sampling,
        "seed": seed,
    }


# --- from documents to rows ----------------------------------------------------------------------


class _Encoder:
    """Token ids of a document; `used` is the hash of all that gave some."""

    def __init__(self, calibration: Calibration, tokenizer: Any) -> None:
        self._calibration = calibration
        self._tokenizer = tokenizer
        self.used = hashlib.sha256()

    def __call__(self, document: Document, strip: bool = False) -> list[int]:
        """The ids, with what the tokenizer puts around a text; a chat's template has it already."""
        text = document.strip() if isinstance(document, str) and strip else document
        options = {}
        if not isinstance(text, str):
            text, options = self._chat(text), {"add_special_tokens": False}
        self._latest = text
        ids: list[int] = list(self._tokenizer(text, **options)["input_ids"])
        return ids

    def take(self) -> None:
        """Count the document that was encoded last among those that were used."""
        self.used.update(self._latest.encode())

    def _chat(self, messages: Sequence[dict[str, Any]]) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise BadCalibration(
                f"`calibration={self._calibration.name}` holds chats in "
                f"`{self._calibration.text_field}`, and the model has no chat template; choose a "
                "calibration of plain text"
            )
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))


def _packed(calibration: Calibration, documents: Source, encode: _Encoder, seed: int) -> Rows:
    wanted = calibration.samples * calibration.length
    ids: list[int] = []
    for document in documents.shuffled(seed):
        if len(ids) >= wanted:
            break
        ids += encode(document)
        encode.take()
    if len(ids) < wanted:
        raise BadCalibration(
            f"`calibration={calibration.name}` holds {len(ids)} tokens, its samples x length ask "
            f"for {calibration.samples} x {calibration.length} = {wanted}; lower "
            "`calibration.samples` or `calibration.length`, or give more text"
        )
    return _cut(ids, calibration.length)[: calibration.samples]


def _windows(calibration: Calibration, documents: Source, encode: _Encoder, seed: int) -> Rows:
    rng, length = random.Random(seed), calibration.length
    rows: list[tuple[int, ...]] = []
    short: set[int] = set()
    while len(rows) < calibration.samples:
        number = rng.randint(0, len(documents) - 1)
        ids = [] if number in short else encode(documents[number])
        if len(ids) <= length:
            short.add(number)
            if len(short) == len(documents):
                raise _too_few(calibration, f"longer than {length} tokens", len(rows))
            continue
        encode.take()
        begin = rng.randint(0, len(ids) - length - 1)
        rows.append(tuple(ids[begin : begin + length]))
    return tuple(rows)


def _short(calibration: Calibration, documents: Source, encode: _Encoder, seed: int) -> Rows:
    ids: list[int] = []
    taken = 0
    for document in documents.shuffled(seed):
        found = encode(document, strip=True)
        if found and len(found) <= calibration.length:
            encode.take()
            ids += found
            taken += 1
        if taken == calibration.samples:
            break
    rows = _cut(ids, calibration.length)
    if taken < calibration.samples or not rows:
        raise _too_few(calibration, f"of at most {calibration.length} tokens", taken)
    return rows


def _documents(calibration: Calibration, documents: Source, encode: _Encoder, seed: int) -> Rows:
    rows: list[tuple[int, ...]] = []
    for document in documents.shuffled(seed):
        if len(rows) == calibration.samples:
            break
        if ids := encode(document)[: calibration.length]:
            encode.take()
            rows.append(tuple(ids))
    if len(rows) < calibration.samples:
        raise _too_few(calibration, "with any token", len(rows))
    return tuple(rows)


def _cut(ids: Sequence[int], length: int) -> Rows:
    return tuple(tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length))


def _too_few(calibration: Calibration, kind: str, found: int) -> BadCalibration:
    return BadCalibration(
        f"`calibration={calibration.name}` has {found} documents {kind}, too few for "
        f"`calibration.samples={calibration.samples}` with "
        f"`calibration.sampling={calibration.sampling}`; lower `calibration.samples` or give "
        "more text"
    )


_SAMPLINGS: dict[str, Callable[[Calibration, Source, _Encoder, int], Rows]] = {
    "packed": _packed,
    "windows": _windows,
    "short": _short,
    "documents": _documents,
}
