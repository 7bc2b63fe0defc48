"""The config and the tokenizer of a published checkpoint against those of its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import phrases
from qgrid.published import Claims
from qgrid.types import Check

# Of no matter for the numbers, or of generation, which takes the tokenizer's.
_FREE = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "pad_token_id", "quantization_config", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
# Keys that no architecture declares: what tools say of themselves, of training, of how to load and
# to generate. Any other key could be read by a model's code (`getattr(config, ...)`), so that a
# value of it has to be the base's; one that says nothing (null, false, empty) is the same as none.
_OF_TOOLS = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "attn_implementation", "auto_map",
    "do_sample", "max_length", "max_new_tokens", "min_length", "model_max_length", "model_name",
    "num_beams", "onnx", "quantization", "repetition_penalty",
    "temperature", "tokenizer_class", "top_k", "top_p", "torchscript",
})  # fmt: skip
_TOOLS = ("unsloth_", "axolotl_", "mergekit_")
_TOKENS = frozenset(
    {"vocab", "merges", "encoding", "files"}
)  # parts that decide what a text becomes


def check_config(folder: Path, base: Path) -> Check:
    """What the two configs, filled in by the library, say of the architecture."""
    from transformers import AutoConfig

    goal = "the base model's architecture"
    try:
        told = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - validation raises what it likes
        said = str(error).strip().split("\n")[0]
        return _check("config", [f"transformers does not read it ({_short(said)})"], goal, "")
    expected = AutoConfig.from_pretrained(base, trust_remote_code=False)
    declared = type(expected)().to_dict().keys()
    wrong, further = [], []
    for key, (found, wanted) in _differing(told.to_dict(), expected.to_dict()).items():
        if key not in declared and (key in _OF_TOOLS or key.startswith(_TOOLS)):
            further.append(key)
        else:
            wrong.append(f"{key} is {_short(found)}, not {_short(wanted)}")
    good = f"the same; of no effect: {', '.join(further)}" if further else "the same"
    return _check("config", wrong, goal, good)


def _differing(
    told: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """What the two say, by key, where it is not the same and matters."""
    found, wanted = Claims(told), Claims(expected)
    return {
        key: (told.get(key), expected.get(key))
        for key in sorted(told.keys() | expected.keys())
        if key not in _FREE
        and told.get(key) != expected.get(key)
        and ((key in told and key in expected) or found.has(key) or wanted.has(key))
    }


def check_tokenizer(actual: Mapping[str, str], expected: Mapping[str, str]) -> tuple[Check, Check]:
    """Fingerprints of the two tokenizers; only one that gives other tokens is fatal.

    The artifact gets the base's, so that another template or another special token changes nothing.
    """
    parts = {p for p in actual.keys() | expected.keys() if actual.get(p) != expected.get(p)}
    fatal, noted = sorted(parts & _TOKENS), sorted(parts - _TOKENS)
    goal = "the base model's"
    others = _check("chat_template", [f"another {part}" for part in noted], goal, goal)
    return (
        _check("vocabulary", [f"another {part}" for part in fatal], goal, goal),
        replace(others, fatal=False),
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(name: str, wrong: list[str], expected: str, good: str) -> Check:
    return Check(name, not wrong, expected, phrases.first(wrong) if wrong else good)
