"""What multiplies by each matrix: llama.cpp's plain routines, its repacked layouts, or a GPU.

Repacking interleaves the rows of a matrix for the vector or matrix instructions of a processor
while it is loaded. Only some types have such a layout, and which depends on the processor: the
tables are those of `ggml_repack_get_optimal_repack_type` and of the AMX buffers in 0.3.36 of
llama-cpp-python.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from qgrid import device
from qgrid.contracts import InvalidEngine
from qgrid.gguf.types import FILE_TYPES, TensorType
from qgrid.types import Check

if TYPE_CHECKING:
    from qgrid.gguf.file import Header
    from qgrid.runtimes._llama_figures import ModelFigures
    from qgrid.types import Cell

AUTO, REPACK, PLAIN = "auto", "repack", "plain"
KERNELS = (AUTO, REPACK, PLAIN)
_AMX = "amx"
# Instruction of the processor, as /proc/cpuinfo names it -> types with a layout for it.
_LAYOUTS = {
    "avx2": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "avx512f": ("Q2_K",),
    "amx_int8": ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
    "asimddp": ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"),
    "vxe": ("Q4_0",),
}
_ANY = frozenset(name for names in _LAYOUTS.values() for name in names)
_WITH_SUMS = ("Q4_1", "Q5_1")  # types with a minimum: their activations carry sums of blocks
_SUPERBLOCK = 256


class WrongKernel(InvalidEngine):
    """Another kernel came up than the one that was asked for; `checks` holds the verdict."""

    def __init__(self, kernel: str, check: Check) -> None:
        super().__init__(
            f"`runtime.kernel={kernel}` was asked for, but llama.cpp came up with {check.actual}; "
            "use `runtime.kernel=auto` or another type"
        )
        self.checks = (check,)


def uses_layouts(kernel: str) -> bool:
    """Whether the library may lay weights out anew; its own choice is to do so."""
    return kernel != PLAIN


def refusal(cell: Cell, kernel: str) -> str | None:
    """Why this kernel cannot be had, where the cell alone tells."""
    if kernel not in KERNELS:
        near = difflib.get_close_matches(kernel, KERNELS, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"`runtime.kernel={kernel}` is unknown to llama.cpp (has: {_list(KERNELS)}){hint}"
    if kernel != AUTO and cell.gpu.kind != "cpu":
        return (
            f"`runtime.kernel={kernel}` is about a processor's memory, and `gpu={cell.gpu.name}` "
            "has kernels of its own; use `runtime.kernel=auto`"
        )
    types = _planned_types(cell)
    if kernel != REPACK or types is None or types & _repackable(cell):
        return None
    return (
        f"`runtime.kernel=repack` needs weights of a type that llama.cpp can lay out for this "
        f"processor ({_list(sorted(_repackable(cell)))}); this file holds {_list(sorted(types))}; "
        "use `runtime.kernel=plain` or another type"
    )


def _planned_types(cell: Cell) -> frozenset[str] | None:
    """Types that linear layers may have, where an option names the type of the file."""
    kind = FILE_TYPES.get(str(cell.method.options.get("type")))
    return None if kind is None else kind.mix


def _repackable(cell: Cell) -> frozenset[str]:
    """Types with a layout for the cell's processor; for any, where it is not this machine's."""
    model = device.cpu_model()
    fields = device.cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", fields.get("features", ""))).split())
    if not flags or not cell.gpu.name.startswith(model):
        return _ANY
    return frozenset(name for flag in flags & _LAYOUTS.keys() for name in _LAYOUTS[flag])


def modules(header: Header, figures: ModelFigures) -> list[dict[str, Any]]:
    """`linear_kernels` of the decoder: how many matrices of a type each kernel multiplies by.

    `scheme` is how a matrix is stored, `dtype` what activations are rounded to before.
    """
    found = Counter(
        (tensor.type, _kernel(name, figures))
        for name, tensor in header.tensors.items()
        if name.startswith("blk.") and len(tensor.shape) > 1
    )
    return [
        {
            "modules": count,
            "method": "ggml",
            "scheme": kind.name,
            "kernel": kernel,
            "dtype": activations(kind) if _is_processors(kernel) else "of the backend's choice",
        }
        for (kind, kernel), count in found.most_common()
    ]


def name(linear_kernels: Collection[dict[str, Any]]) -> str:
    """The short name of what multiplies: `plain` is left out where some matrices are repacked."""
    counts: Counter[str] = Counter()
    for each in linear_kernels:
        counts[_family(each["kernel"])] += each["modules"]
    families = [family for family, _ in counts.most_common()]
    told = [family for family in families if family != PLAIN or len(families) == 1]
    return "+".join(told) or "none"


def check(kernel: str, linear_kernels: Collection[dict[str, Any]]) -> Check:
    """What was asked for against what the library laid out."""
    total = sum(each["modules"] for each in linear_kernels)
    laid = sum(
        each["modules"] for each in linear_kernels if _family(each["kernel"]) in (REPACK, _AMX)
    )
    wanted = {AUTO: "llama.cpp's choice", REPACK: "repacked layers", PLAIN: "no repacked layer"}
    return Check(
        "kernel",
        ok={AUTO: True, REPACK: laid > 0, PLAIN: laid == 0}[kernel],
        expected=wanted[kernel],
        actual=f"{laid} of {total} linear layers repacked",
    )


def activations(kind: TensorType) -> str:
    """The type that llama.cpp rounds activations to on a processor, by ggml's name."""
    if kind.block == 1:
        return kind.name.lower()
    if kind.block == _SUPERBLOCK:
        return "q8_K"
    return "q8_1" if kind.name in _WITH_SUMS else "q8_0"


def _kernel(tensor: str, figures: ModelFigures) -> str:
    """The family, and the layout where there is one: `repack q4_K_8x8`, `amx`, `plain`, `cuda`."""
    layer = int(tensor.split(".")[1])
    place = figures.layer_devices.get(layer, "CPU").rstrip("0123456789").lower()
    if place != "cpu":
        return place
    layout = figures.repacked.get(tensor)
    if layout is None:
        return PLAIN
    return layout if layout == _AMX else f"{REPACK} {layout}"


def _is_processors(kernel: str) -> bool:
    return _family(kernel) in (PLAIN, REPACK, _AMX)


def _family(kernel: str) -> str:
    """`repack` of `repack q4_K_8x8`."""
    return kernel.partition(" ")[0]


def _list(names: Collection[str]) -> str:
    return ", ".join(names) or "none"
