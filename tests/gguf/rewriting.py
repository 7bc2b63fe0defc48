"""A GGUF file written again with other metadata or other tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

Keys = dict[str, Any]
Tensors = dict[str, tuple["np.ndarray[Any, Any]", GGMLQuantizationType]]


def rewritten(
    file: Path,
    out: Path,
    change: Callable[[Keys], Any] = dict,
    change_tensors: Callable[[Tensors], Any] = dict,
) -> Path:
    """The same file after both have changed what they got."""
    reader = GGUFReader(file)
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: field.contents() for name, field in keys.items()}
    change(values)
    writer = GGUFWriter(out, values["general.architecture"])
    for name, value in values.items():
        if name == "general.architecture" or value is None:
            continue
        if name in keys:
            kinds = keys[name].types
            sub = kinds[1] if len(kinds) > 1 else None
            writer.add_key_value(name, value, kinds[0], sub_type=sub)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint16(name, value)
        else:
            writer.add_string(name, value)
    tensors = {t.name: (t.data, GGMLQuantizationType(t.tensor_type)) for t in reader.tensors}
    change_tensors(tensors)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def set_key(name: str, value: Any) -> Callable[[Keys], Any]:
    """A change of one key; None leaves it out."""
    return lambda keys: keys.update({name: value})
