"""Whether a GGUF file computes with the sizes and constants of its base's `config.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import isclose
from pathlib import Path

from qgrid.gguf import _decoder
from qgrid.gguf import file as gguf_file
from qgrid.gguf.file import Header
from qgrid.types import Check

_TOLERANCE = 1e-5  # relative; a file keeps single precision
_ROPE_TABLE = "rope_freqs.weight"
_ROPE_FACTORS = ("scaling.factor", "scale_linear", "scaling.attn_factor")
_DEFAULT_ROPE_BASE = 10000.0  # llama.cpp's, where a file has no such key


def check_constants(file: Path, source: Path) -> Check:
    """Architecture, sizes, norm and rotary constants are those of the base in `source`.

    Raises:
        Unsupported: an architecture that the converter does not know.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    wrong = list(_differences(gguf_file.read(file), _decoder.read(config)))
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
    yield from _rope_differences(header, decoder, f"{name}.rope.")


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


def _rope_differences(header: Header, decoder: _decoder.Decoder, prefix: str) -> Iterator[str]:
    """llama.cpp scales by a factor also where the file names no type: its default is linear."""
    kind = header.metadata.get(f"{prefix}scaling.type", "linear")
    if kind not in {"none", "linear"}:
        yield f"rope.scaling.type is {kind}, not none"
    for key in _ROPE_FACTORS:
        factor = header.metadata.get(f"{prefix}{key}", 1)
        if factor not in (0, 1):  # 0 is llama.cpp's word for none
            yield f"rope.{key} is {factor}, not 1"
    if (_ROPE_TABLE in header.tensors) != (decoder.rope is not None):
        kept, wanted = ("none", "one") if decoder.rope is not None else ("one", "none")
        yield f"the table of stretched rotary frequencies: {kept}, not {wanted}"
