"""Weights that were tuned on the grid of a GGUF type, stored as that type.

auto-round 0.15.1 writes GGUF with a converter that has no tokenizer but sentencepiece's for a
Llama: the file comes from qgrid's own, and the codes and scales go into it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgrid import device
from qgrid.contracts import Unsupported
from qgrid.gguf import audit, blocks, convert, layers, parity, quantization
from qgrid.gguf import file as gguf_file
from qgrid.gguf.types import FILE_TYPES
from qgrid.methods import _checkpoint
from qgrid.types import Cell, Check
from qgrid.weights import inspection

BITS = tuple(blocks.TYPES)
_FILE = "model.gguf"


def refusal(options: Mapping[str, Any], source: Path | None) -> str | None:
    """Why the options or the checkpoint do not fit a GGUF type; None if they do."""
    if options["group_size"] != blocks.BLOCK or not options["symmetric"]:
        return (
            f"`method.format=gguf` has groups of {blocks.BLOCK} without zero points; set "
            f"`method.group_size={blocks.BLOCK}` and `method.symmetric=true`"
        )
    return None if source is None else convert.refusal(source)


def write(cell: Cell, source: Path, out: Path, tuned: Any) -> tuple[Check, ...]:
    """Write `model.gguf` with the packed layers of `tuned` into `out`; what is right about it.

    Embedding and head are rounded by llama.cpp to the same type.
    """
    file, whole = out / _FILE, out / ".source.gguf"
    threads = cell.runtime.threads
    try:
        convert.convert(source, whole, _checkpoint.stored_dtype(source))
        cores = device.num_cores() if threads is None else threads
        quantization.quantize(whole, file, blocks.TYPES[cell.bits], None, cores)
    finally:
        whole.unlink(missing_ok=True)
    found = _codes(tuned, cell.bits)
    lacking = inspection.decoder_linears(inspection.read_headers(source)).keys() - found.keys()
    if lacking:  # llama.cpp's own rounding would stay, under another name
        raise Unsupported(
            f"auto-round gave no codes for {len(lacking)} layers ({min(lacking)}); use "
            "`method.format=compressed-tensors`"
        )
    blocks.write(file, source, cell.bits, found)
    _checkpoint.copy_configs(source, out)
    kind = FILE_TYPES[blocks.TYPES[cell.bits]]
    return (
        audit.check_types(gguf_file.read(file), kind, layers.places(source), accepted=False),
        *parity.check_tokenizer(file, source),
    )


def _codes(tuned: Any, bits: int) -> dict[str, blocks.Codes]:
    """What the library packed for compressed-tensors, unpacked."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    found = {}
    for name, module in tuned.named_modules():
        if hasattr(module, "weight_packed"):
            shape = module.weight_shape.tolist()
            values = unpack_from_int32(module.weight_packed.cpu(), bits, shape)
            scales = module.weight_scale.cpu().half()
            found[name] = blocks.Codes(values.numpy(), scales.numpy())
    return found
