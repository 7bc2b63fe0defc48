"""Whether a GGUF file computes with the sizes and constants of its base's `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isclose
from typing import Any

from qgrid.gguf import _decoder
from qgrid.gguf.file import Header
from qgrid.types import Check

_TOLERANCE = 1e-5  # relative; a file keeps single precision
_ROPE_TABLE = "rope_freqs.weight"
_DEFAULT_ROPE_BASE = 10000.0  # llama.cpp's, where a file has no such key


def check_constants(header: Header, config: Mapping[str, Any]) -> Check:
    """Architecture, sizes, norm and rotary constants are those of the base.

    Raises:
        Unsupported: an architecture that the converter does not know.
    """
    wrong = list(_differences(header, _decoder.read(config)))
    found = "; ".join(wrong) if wrong else "the same"
    return Check("constants", not wrong, "those of the base model's config.json", found)


def _differences(header: Header, decoder: _decoder.Decoder) -> Iterator[str]:
    stored = header.metadata
    name = stored.get("general.architecture")
    if name != decoder.architecture.name:
        yield f"architecture is {name}, not {decoder.architecture.name}"
        return
    defaults = {
        "attention.head_count_kv": stored.get(f"{name}.attention.head_count"),
        "rope.freq_base": _DEFAULT_ROPE_BASE,
    }
    for key, wanted in _wanted(decoder).items():
        found = stored.get(f"{name}.{key}", defaults.get(key))
        if not isinstance(found, int | float):
            yield f"{key} is missing"
        elif not isclose(found, wanted, rel_tol=_TOLERANCE):
            yield f"{key} is {found:g}, not {wanted:g}"
    yield from _rope_differences(header, decoder, f"{name}.rope.scaling.type")


def _wanted(decoder: _decoder.Decoder) -> dict[str, float]:
    """What decides the arithmetic, by GGUF key without the architecture's name."""
    return {
        "block_count": decoder.layers,
        "embedding_length": decoder.hidden,
        "feed_forward_length": decoder.intermediate,
        "attention.head_count": decoder.heads,
        "attention.head_count_kv": decoder.kv_heads,
        "attention.layer_norm_rms_epsilon": decoder.norm_eps,
        "rope.freq_base": decoder.rope_theta,
    }


def _rope_differences(header: Header, decoder: _decoder.Decoder, key: str) -> Iterator[str]:
    scaling = header.metadata.get(key, "none")
    if scaling != "none":
        yield f"rope.scaling.type is {scaling}, not none"
    if (_ROPE_TABLE in header.tensors) != (decoder.rope is not None):
        kept, wanted = ("none", "one") if decoder.rope is not None else ("one", "none")
        yield f"the table of stretched rotary frequencies: {kept}, not {wanted}"
