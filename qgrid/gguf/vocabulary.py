"""The vocabulary of a tokenizer as a GGUF file keeps it, and which ones cannot be kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qgrid.contracts import Unsupported
from qgrid.gguf import _pieces, _splitting

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_SPECIAL = ("bos", "eos", "unk", "pad")
_PROCESSORS = frozenset({"ByteLevel", "TemplateProcessing", "Sequence"})


@dataclass(frozen=True)
class Vocabulary:
    """Everything that llama.cpp needs to tokenize."""

    model: Literal["gpt2", "llama"]  # byte-level BPE, or SentencePiece-style pieces
    pre: str  # llama.cpp's name of the pre-tokenizer
    tokens: tuple[str, ...]  # by id, padded to the rows of the embedding
    types: tuple[int, ...]
    merges: tuple[str, ...]  # "left right"; of byte-level BPE
    scores: tuple[float, ...]  # by id; of SentencePiece-style pieces
    special: Mapping[str, int]  # bos, eos, unk, pad, where there is one
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    normalizer: str | None  # a step that llama.cpp does not have: text must come normalized


def read(source: Path, rows: int) -> Vocabulary:
    """The vocabulary of a checkpoint's tokenizer as transformers runs it.

    `rows` of the embedding; ids without a token are filled up.

    Raises:
        Unsupported: llama.cpp has no such tokenizer; the part is named.
    """
    tokenizer = load_tokenizer(source)
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    refuse(stored, rows)
    add_bos, add_eos = boundaries(tokenizer)
    special = {part: getattr(tokenizer, f"{part}_token_id") for part in _SPECIAL}
    given = {part: int(number) for part, number in special.items() if number is not None}
    template = tokenizer.chat_template
    return of_stored(
        stored,
        rows,
        special=given,
        boundaries=(add_bos, add_eos),
        chat_template=template if isinstance(template, str) else None,
    )


def load_tokenizer(source: Path) -> Any:
    """The checkpoint's tokenizer in transformers; foreign code is not run.

    Raises:
        Unsupported: it is not one of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise Unsupported(
            f"the tokenizer is {type(tokenizer).__name__}, which has no tokenizer.json; "
            "use another method"
        )
    return tokenizer


def of_stored(
    stored: Mapping[str, Any],
    rows: int,
    special: Mapping[str, int],
    boundaries: tuple[bool, bool],
    chat_template: str | None,
) -> Vocabulary:
    """The vocabulary of a `tokenizer.json` that `refuse` let pass."""
    pieces = _is_pieces(stored)
    tokens, types = _tokens(stored, rows, special.get("unk"))
    merges = _merges(stored)
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _splitting.name(stored),
        tokens=tokens,
        types=types,
        merges=() if pieces else tuple(" ".join(pair) for pair in merges),
        scores=_pieces.scores(tokens, merges) if pieces else (),
        special=special,
        add_bos=boundaries[0],
        add_eos=boundaries[1],
        add_space_prefix=pieces and _pieces.adds_prefix(stored),
        chat_template=chat_template,
        normalizer=None if pieces else _normalizer(stored),
    )


def refuse(stored: Mapping[str, Any], rows: int) -> None:
    """Look for what llama.cpp cannot do in a `tokenizer.json`.

    Raises:
        Unsupported: names the part.
    """
    kind = stored["model"].get("type")
    if kind != "BPE":
        raise Unsupported(f"the tokenizer model is {kind}; a GGUF file is made of BPE only")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if stored["model"].get(key):
            raise Unsupported(f"the tokenizer has `{key}`, which llama.cpp does not know")
    if _is_pieces(stored):
        _pieces.refuse(stored, _merges(stored))
    else:
        _splitting.name(stored)
        _normalizer(stored)
    _refuse_added(stored)
    _refuse_processor(stored.get("post_processor"))
    highest = max(number for number in _ids(stored).values())
    if highest >= rows:
        raise Unsupported(
            f"the tokenizer has the id {highest} and the embedding {rows} rows; resize the model"
        )


def _is_pieces(stored: Mapping[str, Any]) -> bool:
    return bool(stored["model"].get("byte_fallback"))


def _normalizer(stored: Mapping[str, Any]) -> str | None:
    """The step before splitting; only NFC is known, which most text has already."""
    step = stored.get("normalizer")
    kind = step["type"] if step else None
    if kind not in {None, "NFC"}:
        raise Unsupported(
            f"the tokenizer has the normalizer {kind}; GGUF files are made with none or NFC"
        )
    return str(kind) if kind else None


def _refuse_added(stored: Mapping[str, Any]) -> None:
    for token in stored.get("added_tokens", ()):
        strips = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
        if strips:
            raise Unsupported(
                f"the added token `{token['content']}` has {' and '.join(strips)}, which a GGUF "
                "file cannot keep; use another method"
            )


def _refuse_processor(processor: Mapping[str, Any] | None) -> None:
    kind = processor["type"] if processor else "ByteLevel"
    if kind not in _PROCESSORS:
        raise Unsupported(
            f"the tokenizer has the post-processor {kind}; GGUF files are made with "
            f"{', '.join(sorted(_PROCESSORS))}"
        )
    for part in processor.get("processors", ()) if processor else ():
        _refuse_processor(part)


def _ids(stored: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, added tokens included."""
    added = {token["content"]: token["id"] for token in stored.get("added_tokens", ())}
    return {**stored["model"]["vocab"], **added}


def _tokens(
    stored: Mapping[str, Any], rows: int, unknown: int | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Text and type by id; an id without a token gets a name that no token has."""
    by_id = {number: text for text, number in _ids(stored).items()}
    types = {number: _plain_type(text, stored) for number, text in by_id.items()}
    for token in stored.get("added_tokens", ()):
        special = token["special"]
        types[token["id"]] = CONTROL if special else USER_DEFINED
        by_id[token["id"]] = token["content"] if special else token["content"].replace("▁", " ")
    if unknown is not None and _is_pieces(stored):
        types[unknown] = UNKNOWN
    for number in range(rows):
        by_id.setdefault(number, f"[PAD{number}]")
    texts = tuple(by_id[number] for number in range(rows))
    _refuse_texts(texts)
    return texts, tuple(types.get(number, UNUSED) for number in range(rows))


def _refuse_texts(texts: Sequence[str]) -> None:
    """llama.cpp ends the process when two tokens have one text, and a text at a zero byte."""
    cut = [text for text in texts if not text or "\0" in text]
    if cut:
        raise Unsupported(f"the tokenizer has the token {cut[0]!r}, which a GGUF file cannot keep")
    if len(set(texts)) != len(texts):
        twin = next(text for text in texts if texts.count(text) > 1)
        raise Unsupported(f"the tokenizer has two tokens `{twin}`; llama.cpp wants them distinct")


def _plain_type(text: str, stored: Mapping[str, Any]) -> int:
    return BYTE if _is_pieces(stored) and _pieces.is_byte(text) else NORMAL


def _merges(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ") if isinstance(m, str) else m for m in stored["model"]["merges"])
    return [(left, right) for left, right in pairs]


def merged(vocabulary: Vocabulary) -> list[int]:
    """The ids of a SentencePiece-style vocabulary that merging can make."""
    return [i for i, score in enumerate(vocabulary.scores) if score > _pieces.UNREACHED]


def boundaries(tokenizer: Any) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text, as seen on one.

    Raises:
        Unsupported: something else is put around it.
    """
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            after = [tokenizer.eos_token_id] if eos else []
            if ids == before + bare + after:
                return bos, eos
    raise Unsupported(
        f"the tokenizer makes {ids} of `{text}`, {bare} without special tokens; a GGUF file knows "
        "BOS before and EOS after only"
    )


def write(vocabulary: Vocabulary, writer: GGUFWriter) -> None:
    """Add all keys of the vocabulary to a GGUF file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    for part, number in vocabulary.special.items():
        getattr(writer, f"add_{part}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
