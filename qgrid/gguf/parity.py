"""Whether a GGUF file tokenizes and computes as the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qgrid.contracts import Unsupported
from qgrid.gguf import _comparison, _library, _logits, _probes, vocabulary
from qgrid.types import Check

Encode = Callable[[str, bool], list[int]]  # text, whether BOS and EOS are added
_PLAIN = vocabulary.NORMAL
_SHOWN = 40  # characters of a differing string
_TEMPLATE = "tokenizer.chat_template"
_BOUNDS = {"F16": 1e-5, "BF16": 1e-3, "F32": 1e-5}  # llama.cpp rounds activations like weights


def check_tokenizer(file: Path, source: Path) -> tuple[Check, ...]:
    """Ids of more than 1,000 strings by llama.cpp's tokenizer against the checkpoint's.

    Checks: `tokenizer` (plain text), `tokenizer_special` (text with special tokens) and
    `tokenizer_boundaries` (BOS and EOS). Known differences are told and not fatal, for qgrid
    feeds ids, never text:

    * `tokenizer_normalizer`: the checkpoint normalizes text, llama.cpp does not; the other checks
      compare normalized text then;
    * `tokenizer_space` and `tokenizer_special` with the Metaspace form of pieces: the space before
      a text that starts with a space, and behind a special token;
    * `tokenizer_control`: plain tokens that llama.cpp takes for special by their text (`</s>`).
    """
    tokenizer = vocabulary.load_tokenizer(source)
    special = _special_texts(tokenizer)
    plain, around = _probes.strings(special), _probes.strings_with(special)
    with _library.model(file, vocabulary_only=True) as loaded:
        words = _library.vocab(loaded)
        compare = _Comparing(_reference(tokenizer), partial(_library.tokenize, words))
        return (
            *_plain_checks(tokenizer, _normalized(tokenizer, plain), compare, _taken(file, words)),
            _special_check(tokenizer, _normalized(tokenizer, around), compare),
            _boundaries(tokenizer, words),
            *_normalizer_checks(tokenizer, plain, compare),
        )


@dataclass(frozen=True)
class _Comparing:
    """Two tokenizers: text and whether BOS and EOS are added -> ids."""

    reference: Encode
    encode: Encode

    def check(self, name: str, texts: Sequence[str], fatal: bool = True) -> Check:
        """Whether they agree on all texts, and where first they do not."""
        differing = list(_differences(texts, self.reference, self.encode))
        actual = f"{len(texts) - len(differing)} of {len(texts)} alike"
        if differing:
            actual += f"; first difference: {differing[0]}"
        return Check(name, not differing, f"the same ids for {len(texts)} strings", actual, fatal)


def _taken(file: Path, words: Any) -> list[str]:
    """Texts of plain tokens that llama.cpp takes for special all the same."""
    types = _comparison.metadata(file).get("token_type", ())
    return _library.special_texts(words, [i for i, t in enumerate(types) if t == _PLAIN])


def _plain_checks(
    tokenizer: Any, texts: Sequence[str], compare: _Comparing, taken: Sequence[str]
) -> Iterator[Check]:
    """Metaspace puts no second space before a text that starts with one; llama.cpp does."""
    metaspace = _prefix_scheme(tokenizer) in {"first", "always"}
    groups: dict[str, list[str]] = {"tokenizer": []}
    for text in texts:
        if any(token in text for token in taken):
            name = "tokenizer_control"
        else:
            spaced = metaspace and text[:1] in {" ", "▁"}
            name = "tokenizer_space" if spaced else "tokenizer"
        groups.setdefault(name, []).append(text)
    for name, members in groups.items():
        yield compare.check(name, members, fatal=name == "tokenizer")


def _normalizer_checks(
    tokenizer: Any, texts: Sequence[str], compare: _Comparing
) -> Iterator[Check]:
    """How many strings get other ids because llama.cpp does not normalize."""
    if _normalized(tokenizer, texts) != list(texts):
        differing = len(list(_differences(texts, compare.reference, compare.encode)))
        actual = f"llama.cpp leaves it out: {differing} of {len(texts)} strings get other ids"
        actual += " (qgrid feeds ids, so its numbers stand)"
        expected = "text in Unicode's form NFC, as the checkpoint's tokenizer makes it"
        yield Check("tokenizer_normalizer", not differing, expected, actual, fatal=False)


def _prefix_scheme(tokenizer: Any) -> str | None:
    """When Metaspace puts a space before text; None: there is no Metaspace."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    scheme: str | None = getattr(pre_tokenizer, "prepend_scheme", None)
    return scheme


def _special_texts(tokenizer: Any) -> tuple[str, ...]:
    return tuple(sorted(tokenizer.added_tokens_encoder, key=tokenizer.added_tokens_encoder.get))


def _reference(tokenizer: Any) -> Encode:
    def encode(text: str, add_special: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=add_special)["input_ids"]
        return ids

    return encode


def _normalized(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The texts as the checkpoint's NFC step makes them."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if type(normalizer).__name__ != "NFC":
        return list(texts)
    return [normalizer.normalize_str(text) for text in texts]


def _differences(texts: Sequence[str], reference: Encode, encode: Encode) -> Iterator[str]:
    for text in texts:
        for add_special in (False, True):
            expected, found = reference(text, add_special), encode(text, add_special)
            if expected != found:
                place = next(
                    (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
                    min(len(expected), len(found)),
                )
                near = f"{found[place : place + 3]} instead of {expected[place : place + 3]}"
                yield f"{text[:_SHOWN]!r} has {near} from token {place}"
                break


def _special_check(tokenizer: Any, texts: Sequence[str], compare: _Comparing) -> Check:
    """Special tokens in the text; behind one, llama.cpp and Metaspace disagree about a space."""
    known = _prefix_scheme(tokenizer) in {"first", "always"}
    return compare.check("tokenizer_special", texts, fatal=not known)


def _boundaries(tokenizer: Any, words: Any) -> Check:
    """BOS, EOS and whether they are added: by id, as far as the checkpoint has them."""
    import llama_cpp

    add_bos, add_eos = vocabulary.boundaries(tokenizer)
    expected: dict[str, Any] = {"add_bos": add_bos, "add_eos": add_eos}
    found: dict[str, Any] = {
        "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(words)),
        "add_eos": bool(llama_cpp.llama_vocab_get_add_eos(words)),
    }
    for part in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{part}_token_id")
        if number is not None:
            expected[part] = number
            found[part] = getattr(llama_cpp, f"llama_vocab_{part}")(words)
    return Check("tokenizer_boundaries", expected == found, _listed(expected), _listed(found))


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def check_vocabulary(file: Path, source: Path) -> Check:
    """The vocabulary stored in a file against the tokenizer of `source`, part by part.

    For files that others made. Tokens by id, types, merges or the order of scores, pre-tokenizer,
    BOS and EOS; every part that differs is named with its first place.
    """
    stored = _comparison.metadata(file)
    expected = "the tokenizer of the base model"
    try:
        base = vocabulary.read(source, _rows(stored, source))
    except Unsupported as error:
        # such a tokenizer has no parts to compare; its ids are compared all the same
        return Check("vocabulary", False, expected, f"not done: {error}", fatal=False)
    found = list(_comparison.differences(stored, base))
    return Check("vocabulary", not found, expected, "; ".join(found) or "the same")


def check_chat_template(file: Path, source: Path) -> Check:
    """The chat template stored in a file against the one of `source`; never fatal."""
    base = vocabulary.load_tokenizer(source).chat_template
    found = _comparison.metadata(file).get(_TEMPLATE)
    actual = "the same" if found == base else ("none" if found is None else "another one")
    return Check("chat_template", found == base, "that of the base model", actual, fatal=False)


def _rows(stored: Mapping[str, Any], source: Path) -> int:
    """Rows of the larger embedding: a file may leave the unused end of it without tokens."""
    from qgrid import models

    return max(len(stored.get("tokens", ())), int(models.architecture(source)["vocab"]))


def check_logits(file: Path, source: Path, trust_remote_code: bool = False) -> Check:
    """Mean KL(transformers || llama.cpp) in nats a token, over some hundred tokens of prose.

    Transformers computes in fp32 with the weights rounded as the file stores them, so only
    arithmetic differs: llama.cpp rounds activations to 16 bits. A deep model with sharp
    distributions may exceed the bound by that alone; it is then held against the KL of
    transformers' own 16-bit arithmetic. Not done, and not fatal, where the free memory does not
    hold both models.
    """
    dtype = _logits.stored_dtype(file)
    bound = _BOUNDS.get(dtype)
    expected = f"mean KL <= {bound:g} nats" if bound else f"a file of {', '.join(_BOUNDS)}"
    if bound is None:
        return Check("logits", False, expected, f"not done for {dtype}", fatal=False)
    lacking = _logits.lacking_memory(file, source)
    if lacking is not None:
        return Check("logits", False, expected, f"not done: {lacking}", fatal=False)
    found = _logits.compare(file, source, dtype, bound, trust_remote_code)
    actual = f"mean KL {found.divergence:.3g} nats over {found.tokens} tokens"
    if found.arithmetic is None:
        return Check("logits", found.divergence <= bound, expected, actual)
    expected += f", or {found.arithmetic:.3g} as transformers has in 16 bits"
    return Check("logits", found.divergence <= found.arithmetic, expected, actual)
