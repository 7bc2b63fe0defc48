"""The kernel of a llama.cpp engine: what is refused, and what came up, by the library's word."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec, device
from qgrid.contracts import InvalidEngine
from qgrid.gguf import file as gguf_file
from qgrid.gguf.types import BY_NUMBER, FILE_TYPES
from qgrid.planning import baseline
from qgrid.runtimes import _llama_kernels as kernels
from qgrid.runtimes import llama_cpp as runtime
from qgrid.runtimes._llama_figures import ModelFigures
from qgrid.types import Cell, Gpu, Method
from tests.runtimes import random_gguf

MakeCell = Callable[..., Cell]
CUDA = Gpu("h200", "cuda", "H200", "sm_90", 141.0, None, 1)
HERE = Gpu(f"{device.cpu_model()}, 2 cores", "cpu", "", None, 24.0, None, 1)
ELSEWHERE = Gpu("another processor", "cpu", "", None, 24.0, None, 1)
TYPES = {"F16": 16, "Q4_0": 4, "Q8_0": 8, "Q2_K": 2, "Q3_K_S": 3, "Q4_K_M": 4, "IQ4_NL": 4}
ROUNDING = 0.01 * 2**20  # of sizes in the library's log


@pytest.fixture(scope="module")
def files(tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The random model in several types."""
    made = {name: tmp_path_factory.mktemp(name) for name in TYPES}
    source = made["F16"] / runtime.WEIGHTS
    random_gguf.write(source, random_gguf.SMALL)
    for name, folder in made.items():
        shutil.copy(tiny_random / "config.json", folder)
        if name != "F16":
            random_gguf.quantize(source, folder / runtime.WEIGHTS, FILE_TYPES[name].number)
    return made


def library() -> Any:
    import llama_cpp

    return llama_cpp.llama_cpp._lib


def asked(make: MakeCell, name: str, kernel: str, **changes: Any) -> Cell:
    """A cell of a type of file on this machine."""
    method = Method("gguf", {"type": name})
    return make(
        {"kernel": kernel}, **({"method": method, "bits": TYPES[name], "gpu": HERE} | changes)
    )


def observed(folder: Path, cell: Cell) -> dict[str, Any]:
    engine = runtime.load(folder, cell, "float32")
    try:
        return dict(engine.observed())
    finally:
        engine.close()


def repackable(name: str) -> bool:
    """Whether the library says that it has a layout for one of the type's tensors here."""
    has = {"avx2": ("Q4_0", "Q4_K", "IQ4_NL"), "avx512": ("Q2_K",)}
    amx = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
    laid = {kind for flag, kinds in has.items() if _has(flag) for kind in kinds}
    return bool(FILE_TYPES[name].mix & (laid | (set(amx) if _has("amx_int8") else set())))


def _has(feature: str) -> bool:
    return bool(getattr(library(), f"ggml_cpu_has_{feature}")())


@pytest.mark.parametrize("name", list(TYPES))
def test_what_is_told_as_repacked_fills_the_librarys_buffer(
    files: dict[str, Path], llama_cell: MakeCell, name: str
) -> None:
    """Two accounts of one load: its log of tensors, and the sizes of its buffers."""
    seen = observed(files[name], asked(llama_cell, name, "auto"))
    codec.dumps(seen)
    tensors = gguf_file.read(files[name] / runtime.WEIGHTS).tensors
    linears = [t for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) > 1]
    assert sum(each["modules"] for each in seen["linear_kernels"]) == len(linears)
    laid = {each["scheme"] for each in seen["linear_kernels"] if each["kernel"] != "plain"}
    weights = sum(t.nbytes for t in linears if t.type.name in laid)
    buffers = seen["weights_buffers_bytes"]
    held = sum(size for buffer, size in buffers.items() if buffer in ("CPU_REPACK", "AMX"))
    assert held == pytest.approx(weights, abs=ROUNDING)
    assert (seen["kernel"] != "plain") == bool(held) == repackable(name) == seen["repacked"]


@pytest.mark.parametrize("name", list(TYPES))
def test_the_kernel_that_was_asked_for_comes_up_or_is_refused(
    files: dict[str, Path], llama_cell: MakeCell, name: str
) -> None:
    plain = observed(files[name], asked(llama_cell, name, "plain"))
    assert plain["kernel"] == "plain"
    assert {each["kernel"] for each in plain["linear_kernels"]} == {"plain"}
    cell = asked(llama_cell, name, "repack")
    reason = runtime.refusal(cell)
    assert (reason is None) == repackable(name)
    if reason is None:
        assert observed(files[name], cell)["kernel"] in ("repack", "amx")
    else:
        assert f"this file holds {', '.join(sorted(FILE_TYPES[name].mix))}" in reason


def test_another_kernel_than_the_one_asked_for_is_invalid(
    files: dict[str, Path], llama_cell: MakeCell
) -> None:
    """A file whose type no option tells cannot be refused; the engine can."""
    cell = llama_cell({"kernel": "repack"}, method=Method("prequantized", {}), gpu=HERE)
    assert runtime.refusal(cell) is None
    if repackable("F16"):
        pytest.skip("this processor has a layout for F16")
    with pytest.raises(
        kernels.WrongKernel, match=r"kernel=repack` was asked .* 0 of 14 linear"
    ) as failed:
        runtime.load(files["F16"], cell, "float32")
    assert issubclass(kernels.WrongKernel, InvalidEngine)  # of which the stage makes `invalid`
    (check,) = failed.value.checks
    assert (check.name, check.ok, check.fatal) == ("kernel", False, True)


def test_kernels_that_cannot_be_had_are_refused(llama_cell: MakeCell) -> None:
    refusals = {
        "unknown to llama.cpp (has: auto, repack, plain); did you mean `repack`?": asked(
            llama_cell, "Q4_0", "repacked"
        ),
        "`gpu=h200` has kernels of its own": asked(llama_cell, "Q4_0", "plain", gpu=CUDA),
        "this file holds Q5_K, Q6_K": dataclasses.replace(
            asked(llama_cell, "Q4_K_M", "repack"), method=Method("gguf", {"type": "Q5_K_M"})
        ),
    }
    if _has("amx_int8") or _has("neon"):
        del refusals["this file holds Q5_K, Q6_K"]
    for words, cell in refusals.items():
        assert words in str(runtime.refusal(cell))
    assert runtime.refusal(asked(llama_cell, "Q4_0", "auto", gpu=CUDA)) is None


def test_for_another_processor_only_types_without_any_layout_are_refused(
    llama_cell: MakeCell,
) -> None:
    assert runtime.refusal(asked(llama_cell, "Q8_0", "repack", gpu=ELSEWHERE)) is None
    assert "holds F16" in str(runtime.refusal(asked(llama_cell, "F16", "repack", gpu=ELSEWHERE)))


def test_cells_of_all_kernels_share_a_baseline_of_the_librarys_choice(llama_cell: MakeCell) -> None:
    cells = [asked(llama_cell, "Q4_0", kernel) for kernel in kernels.KERNELS]
    bases = [baseline.of(cell) for cell in cells]
    assert bases[0] == bases[1] == bases[2]
    assert bases[0].runtime.options["kernel"] == "auto"
    assert runtime.refusal(bases[0]) is None


def test_activations_are_the_librarys() -> None:
    class Traits(ctypes.Structure):
        _fields_ = (
            ("from_float", ctypes.c_void_p),
            ("vec_dot", ctypes.c_void_p),
            ("vec_dot_type", ctypes.c_int),
        )

    own = library()
    own.ggml_get_type_traits_cpu.restype = ctypes.POINTER(Traits)
    own.ggml_type_name.restype = ctypes.c_char_p
    checked = 0
    for number, kind in BY_NUMBER.items():
        traits = own.ggml_get_type_traits_cpu(number).contents
        if traits.vec_dot is not None:
            assert own.ggml_type_name(traits.vec_dot_type).decode() == kernels.activations(kind)
            checked += 1
    assert checked >= 20


def test_layers_on_a_gpu_have_its_kernels(files: dict[str, Path]) -> None:
    """As a build with CUDA logs it: the first of two layers stays on the processor."""
    header = gguf_file.read(files["Q4_0"] / runtime.WEIGHTS)
    laid = {"blk.0.attn_q.weight": "q4_0_8x8", "blk.0.ffn_up.weight": "amx"}
    figures = ModelFigures({}, 0, 0, 2, 1, {"CUDA0": "H200"}, {0: "CPU", 1: "CUDA0"}, laid)
    found = kernels.modules(header, figures)
    counts = {each["kernel"]: each["modules"] for each in found}
    assert counts == {"cuda": 7, "plain": 5, "repack q4_0_8x8": 1, "amx": 1}
    assert kernels.name(found) == "cuda+repack+amx"
    assert {each["dtype"] for each in found} == {"q8_0", "of the backend's choice"}
