"""What a GGUF file and the installed llama.cpp are: types of matrices, versions, features."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qgrid.contracts import InvalidEngine
from qgrid.gguf.types import PLAIN

if TYPE_CHECKING:
    from qgrid.gguf.file import Header
    from qgrid.types import Cell


def require_types(header: Header, cell: Cell) -> None:
    """Compare how the linear layers are stored with what the cell asks for.

    Raises:
        InvalidEngine: a quantized cell whose layers are all 16-bit, or the reverse.
    """
    found = linears(header)
    seen = ", ".join(f"{count} x {name}" for name, count in found.items())
    quantized = found.keys() - PLAIN
    if cell.bits >= 16 and quantized:
        raise InvalidEngine(f"16-bit weights were asked for, but the engine holds {seen}")
    if cell.bits < 16 and not quantized:
        raise InvalidEngine(
            f"method `{cell.method.name}` with `bits={cell.bits}` was asked for, "
            f"but the engine holds {seen}"
        )


def linears(header: Header) -> Counter[str]:
    """Types of the matrices in the decoder's blocks."""
    return Counter(
        tensor.type.name
        for name, tensor in header.tensors.items()
        if name.startswith("blk.") and len(tensor.shape) > 1
    )


def unread_table(header: Header) -> int:
    """Bytes of an embedding table of its own, of which one token reads one row."""
    if "output.weight" not in header.tensors or "token_embd.weight" not in header.tensors:
        return 0
    return header.tensors["token_embd.weight"].nbytes


def file_type(header: Header) -> str:
    """llama.cpp's name of the file type, such as `Q4_K - Medium`."""
    import llama_cpp

    number = header.metadata.get("general.file_type")
    if number is None:
        return "not told"
    name = llama_cpp.llama_ftype_name(int(number))
    return name.decode() if name else str(number)


def library() -> dict[str, Any]:
    """The library's version, and its backends with what each was built to use."""
    import llama_cpp

    told = llama_cpp.llama_print_system_info().decode()
    features = [part.strip() for part in told.split("|") if part.strip()]
    return {
        "backend": [part.removesuffix(" = 1") for part in features],
        "llama_cpp": llama_cpp.llama_version().decode(),
        "llama_cpp_python": version("llama-cpp-python"),
    }
