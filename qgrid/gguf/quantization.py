"""llama.cpp's quantizer: which types it would write, and the file that it writes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid.gguf import file as gguf_file
from qgrid.gguf import log
from qgrid.gguf.types import FILE_TYPES

if TYPE_CHECKING:
    import numpy as np

    Importance = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]

_DRY_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\w+), size = .*?(?:\((\w+)\))?$"
)
_FAULTS = ("did not find weights for", "is different from tensor size")
# The embedding and the head are read whole or not at all: no importance is collected for them.
_WITHOUT_IMPORTANCE = ("token_embd.weight", "output.weight")


class QuantizationFailed(RuntimeError):
    """The quantizer refused or failed, or wrote something else than it had announced."""


def plan_types(
    source: Path, file_type: str, importance: Importance | None = None
) -> dict[str, str]:
    """The type that the quantizer would give each tensor of `source`, by its own dry run.

    Raises:
        QuantizationFailed: the library's error.
    """
    said = _run(source, None, file_type, importance, threads=1)
    found = {m[1]: (m[3] or m[2]).upper() for line in said if (m := _DRY_LINE.match(line))}
    stored = gguf_file.read(source).tensors.keys()
    if found.keys() != stored:
        raise QuantizationFailed(
            f"the dry run of `method.type={file_type}` named {len(found)} of {len(stored)} tensors"
        )
    return found


def quantize(
    source: Path,
    out: Path,
    file_type: str,
    importance: Importance | None = None,
    threads: int = 1,
) -> dict[str, str]:
    """Write `source`, a 16- or 32-bit GGUF file, as `file_type`; returns the types by tensor.

    `out` appears whole or not at all. `importance` holds the mean square of each input channel by
    tensor.

    Raises:
        QuantizationFailed: the library's error, or types other than its dry run's.
    """
    planned = plan_types(source, file_type, importance)
    aside = out.with_name(f".{out.name}.part")
    try:
        said = _run(source, aside, file_type, importance, threads)
        _require_importance(said)
        written = {n: t.type.name for n, t in gguf_file.read(aside).tensors.items()}
        _require_planned(planned, written, file_type)
        aside.rename(out)
    finally:
        aside.unlink(missing_ok=True)
    return written


def _require_importance(said: list[str]) -> None:
    """The library goes on without the importance of a layer that it cannot find."""
    faults = [line for line in said if any(fault in line for fault in _FAULTS)]
    faults = [line for line in faults if not line.endswith(_WITHOUT_IMPORTANCE)]
    if faults:
        raise QuantizationFailed(f"the importance matrix does not fit the model: {faults[0]}")


def _require_planned(planned: Mapping[str, str], written: Mapping[str, str], name: str) -> None:
    wrong = [n for n in planned.keys() | written.keys() if planned.get(n) != written.get(n)]
    if wrong:
        first = min(wrong)
        raise QuantizationFailed(
            f"`method.type={name}`: {first} was written as {written.get(first)}, the dry run "
            f"said {planned.get(first)} ({len(wrong)} such tensors)"
        )


def _run(
    source: Path,
    out: Path | None,
    file_type: str,
    importance: Importance | None,
    threads: int,
) -> list[str]:
    """Call the quantizer (a dry run without `out`); the lines that it logged."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type].number
    params.nthread = threads
    params.dry_run = out is None
    kept = _entries(importance) if importance is not None else None
    if kept is not None:
        params.imatrix = ctypes.cast(kept, type(params.imatrix))
    target = "" if out is None else str(out)
    with log.captured() as said:
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), target.encode(), ctypes.byref(params)
        )
    if code != 0:
        why = said.problems() or "llama.cpp gave no reason"
        raise QuantizationFailed(f"`method.type={file_type}`: {why}")
    return said.lines


def _entries(importance: Importance) -> ctypes.Array[Any]:
    """The importance as the library takes it, ended by an entry without a name."""
    import llama_cpp
    import numpy as np

    entry = llama_cpp.llama_model_imatrix_data
    entries: ctypes.Array[Any] = (entry * (len(importance) + 1))()
    for place, (name, values) in zip(entries, importance.items(), strict=False):
        flat = np.ascontiguousarray(values, dtype=np.float32)
        place.name = name.encode()
        place.data = (ctypes.c_float * flat.size).from_buffer_copy(flat.tobytes())
        place.size = flat.size
    return entries
