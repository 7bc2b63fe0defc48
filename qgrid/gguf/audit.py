"""Whether a GGUF file is of the type that it should be: by its tensors, not by its name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qgrid import phrases
from qgrid.gguf import layers, mix
from qgrid.gguf.file import Header, Stored
from qgrid.gguf.types import BY_FILE_TYPE, FILE_TYPES, FileType
from qgrid.types import Check
from qgrid.weights import inspection

_BASE_SHARE = 0.5  # of the linear weights: gate, up, query and key always have the base type
_FILE_TYPE = "general.file_type"


def check_types(
    header: Header, file_type: FileType, names: Mapping[str, str], accepted: bool
) -> Check:
    """Every linear layer has a type that the quantizer's mix for `file_type` knows.

    `names` maps the layers to their tensors. `actual` always shows the true types and bits;
    `accepted` makes a fault one that is only shown.
    """
    wrong = faults(header, file_type, names)
    expected = f"{file_type.name}: linear layers as {', '.join(sorted(file_type.mix))}"
    shown = described(header, names)
    if wrong:
        shown += f": {phrases.first(wrong)}"
    return Check("types", not wrong, expected, shown, fatal=not accepted)


def faults(header: Header, file_type: FileType, names: Mapping[str, str]) -> list[str]:
    """What speaks against `file_type`, a phrase each."""
    told = stated(header)
    wrong = [] if told == file_type else [f"the file calls itself {_name(header)}"]
    stored = {module: header.tensors.get(tensor) for module, tensor in names.items()}
    for module, tensor in stored.items():
        if tensor is None or tensor.type.name not in file_type.mix:
            wrong.append(f"{module} is {'missing' if tensor is None else tensor.type.name}")
    held = [tensor for tensor in stored.values() if tensor is not None]
    total = sum(tensor.num_weights for tensor in held)
    base = sum(t.num_weights for t in held if t.type.name == file_type.base)
    if total and base < _BASE_SHARE * total:
        wrong.append(f"only {base / total:.0%} of the linear weights are {file_type.base}")
    return wrong


def stated(header: Header) -> FileType | None:
    """The type that the file calls itself; None for one that qgrid does not know."""
    number = header.metadata.get(_FILE_TYPE)
    return BY_FILE_TYPE.get(number) if isinstance(number, int) else None


def _name(header: Header) -> str:
    told = stated(header)
    return f"type number {header.metadata.get(_FILE_TYPE)}" if told is None else told.name


def described(header: Header, names: Mapping[str, str]) -> str:
    """Types of the linear layers and of the rest with counts, and the file's bits per weight."""
    linear = set(names.values())
    inside = Counter(t.type.name for n, t in header.tensors.items() if n in linear)
    beside = Counter(t.type.name for n, t in header.tensors.items() if n not in linear)
    told = f"{_counts(inside)} in linear layers, {_counts(beside)} beside them"
    return f"{told}, {_bits(list(header.tensors.values())):.4g} bits a weight in all"


def _counts(types: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in types.most_common()) or "nothing"


def _bits(tensors: Sequence[Stored]) -> float:
    total = sum(tensor.num_weights for tensor in tensors)
    return 8 * sum(tensor.nbytes for tensor in tensors) / total if total else 0.0


def misfits(source: Path, file_type: FileType, imatrix: bool) -> dict[str, tuple[int, str]]:
    """Linear layers of a checkpoint that the quantizer would store as another type than meant.

    Layer -> columns and the type it would get. Reads `config.json` and headers only.

    Raises:
        Unsupported: an architecture that the converter does not know.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    linears = inspection.decoder_linears(inspection.read_headers(source))
    names = {m: t for m, t in layers.tensors_of(config).items() if m in linears}
    columns = {tensor: linears[module][1] for module, tensor in names.items()}
    instead = mix.fallbacks(file_type, shape(config), columns, imatrix)
    return {m: (columns[t], instead[t]) for m, t in names.items() if t in instead}


def fitting(source: Path, file_type: FileType, imatrix: bool) -> FileType | None:
    """The type nearest in width to `file_type` that every layer can be stored as."""
    others = [t for t in FILE_TYPES.values() if imatrix or not t.needs_imatrix]
    others.sort(key=lambda t: abs(t.bits_per_weight - file_type.bits_per_weight))
    return next((t for t in others if not misfits(source, t, imatrix)), None)


def shape(config: Mapping[str, object]) -> mix.Shape:
    """What of a `config.json` decides the quantizer's mix."""
    heads = int(str(config["num_attention_heads"]))
    given = config.get("num_key_value_heads")
    keys = heads if given is None else int(str(given))
    return mix.Shape(int(str(config["num_hidden_layers"])), heads, keys)
