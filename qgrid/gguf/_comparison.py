"""The vocabulary inside a GGUF file against a checkpoint's tokenizer, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from qgrid.gguf import file as gguf_file
from qgrid.gguf import vocabulary
from qgrid.gguf.vocabulary import Vocabulary

_PREFIX = "tokenizer.ggml."
_ARRAYS = tuple(_PREFIX + part for part in ("tokens", "token_type", "merges", "scores"))
_SAME_SPLITTING = (  # names under which llama.cpp splits text alike
    frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"}),
    frozenset({"smaug-bpe", "dbrx"}),
    frozenset({"qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"}),
    frozenset({"gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4"}),
    frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}),
)
_ADDS_BOS = _SAME_SPLITTING[0] | {"tekken"}  # unless the file says otherwise
_PARSED = frozenset({vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.USER_DEFINED})


def metadata(file: Path) -> Mapping[str, Any]:
    """The tokenizer's keys of a file without their common prefix, arrays included."""
    found = gguf_file.read(file, arrays=_ARRAYS).metadata
    return {
        key.removeprefix(_PREFIX): value
        for key, value in found.items()
        if key.startswith("tokenizer.")
    }


def differences(stored: Mapping[str, Any], base: Vocabulary) -> Iterator[str]:
    """One sentence for each part in which they differ, with the first place."""
    if stored.get("model") != base.model:
        yield f"tokenizer model {stored.get('model')} instead of {base.model}"
        return
    yield from _splitting(str(stored.get("pre", "default")), base)
    yield from _tokens(stored.get("tokens", ()), base)
    yield from _types(stored.get("token_type", ()), base)
    if base.model == "llama":
        yield from _order(stored.get("scores", ()), base)
    else:
        yield from _first("merge", stored.get("merges", ()), base.merges)
    yield from _boundaries(stored, base)


def _splitting(pre: str, base: Vocabulary) -> Iterator[str]:
    if base.model == "llama" or pre == base.pre:
        return
    if not any({pre, base.pre} <= names for names in _SAME_SPLITTING):
        yield f"pre-tokenizer {pre} instead of {base.pre}"


def _tokens(found: Sequence[str], base: Vocabulary) -> Iterator[str]:
    """Ids that the tokenizer does not use may have any text, and be missing at the end."""
    used = [i for i, kind in enumerate(base.types) if kind != vocabulary.UNUSED]
    if used and used[-1] >= len(found):
        yield f"{len(found)} tokens instead of at least {used[-1] + 1}"
        return
    for number in used:
        if found[number] != base.tokens[number]:
            yield f"another token at {number}: {found[number]!r} instead of {base.tokens[number]!r}"
            return


def _types(found: Sequence[int], base: Vocabulary) -> Iterator[str]:
    """Whether a token is recognized in text as a whole, which its type decides."""
    for number, (kind, expected) in enumerate(zip(found, base.types, strict=False)):
        if expected != vocabulary.UNUSED and (kind in _PARSED) != (expected in _PARSED):
            name = repr(base.tokens[number])
            yield f"another type of token {number} ({name}): {kind} instead of {expected}"
            return


def _first(what: str, found: Sequence[str], expected: Sequence[str]) -> Iterator[str]:
    for place, (a, b) in enumerate(zip(found, expected, strict=False)):
        if a != b:
            yield f"another {what} at {place}: {a!r} instead of {b!r}"
            return
    if len(found) != len(expected):
        yield f"{len(found)} {what}s instead of {len(expected)}"


def _order(scores: Sequence[float], base: Vocabulary) -> Iterator[str]:
    """Only the order of scores matters, and only among tokens that a merge makes."""
    if len(scores) < len(base.scores):
        yield f"{len(scores)} scores instead of {len(base.scores)}"
        return
    ranked = sorted(vocabulary.merged(base), key=lambda number: -base.scores[number])
    for before, after in pairwise(ranked):
        if scores[before] <= scores[after]:
            names = f"{base.tokens[before]!r} does not score above {base.tokens[after]!r}"
            yield f"another order of scores at {after}: {names}"
            return


def _boundaries(stored: Mapping[str, Any], base: Vocabulary) -> Iterator[str]:
    """BOS and EOS; where the file does not say whether BOS is added, llama.cpp's default."""
    default = base.model == "llama" or stored.get("pre") in _ADDS_BOS
    added = bool(stored.get("add_bos_token", default))
    if added != base.add_bos:
        yield f"add_bos_token {added} instead of {base.add_bos}"
    if bool(stored.get("add_eos_token", False)) != base.add_eos:
        yield f"add_eos_token {not base.add_eos} instead of {base.add_eos}"
    for part in ("bos", "eos"):
        if part in base.special and stored.get(f"{part}_token_id") != base.special[part]:
            found = stored.get(f"{part}_token_id", "none")
            yield f"{part} token {found} instead of {base.special[part]}"
