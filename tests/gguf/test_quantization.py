"""llama.cpp's quantizer: what it says, what it writes, and nothing left when it fails."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from qgrid.gguf import file, quantization
from qgrid.gguf.quantization import QuantizationFailed
from qgrid.gguf.types import FILE_TYPES
from tests.gguf.bare import Sizes, write
from tests.gguf.listening import listening

SIZES = Sizes(layers=8, intermediate=256, heads=2, kv_heads=1, head_dim=128)
# Relative error of normally distributed weights. Two bits leave about a third; each further bit
# halves it. The error of BF16 is that of weights that F16 holds to three more bits.
BANDS = {
    "Q2_K": (0.27, 0.33),
    "Q3_K": (0.135, 0.165),
    "Q4_0": (0.08, 0.092),
    "Q4_K": (0.065, 0.077),
    "Q5_K": (0.033, 0.039),
    "Q6_K": (0.016, 0.0195),
    "Q8_0": (0.0048, 0.006),
    "IQ2_XS": (0.29, 0.36),
    "IQ3_S": (0.15, 0.18),
    "IQ4_NL": (0.07, 0.082),
    "IQ4_XS": (0.07, 0.083),
    "F16": (0.0, 0.0),
    "BF16": (0.0014, 0.002),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "f16.gguf"
    write(path, SIZES)
    return path


@pytest.fixture(scope="module")
def importance() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """A few channels of every layer are driven a hundred times as strongly."""
    random = np.random.default_rng(1)
    return {
        name: np.where(random.random(columns) < 0.1, 100.0, 1.0).astype(np.float32)
        for name, columns in SIZES.linears().items()
    }


def decoded(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for tensor in gguf.GGUFReader(path).tensors:
        yield tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type)


def relative_errors(path: Path, source: Path) -> dict[str, float]:
    whole = dict(decoded(source))
    return {
        name: float(np.linalg.norm(values - whole[name]) / np.linalg.norm(whole[name]))
        for name, values in decoded(path)
        if name.startswith("blk.")
    }


@pytest.mark.parametrize("name", sorted(FILE_TYPES))
def test_file_is_what_the_dry_run_said_and_near_the_weights(
    name: str, source: Path, importance: Any, tmp_path: Path
) -> None:
    given = importance if FILE_TYPES[name].needs_imatrix else None
    planned = quantization.plan_types(source, name, given)
    written = quantization.quantize(source, tmp_path / "out.gguf", name, given, threads=2)
    header = file.read(tmp_path / "out.gguf")
    assert planned == written == {n: t.type.name for n, t in header.tensors.items()}
    assert header.metadata["general.file_type"] == FILE_TYPES[name].number
    for tensor, error in relative_errors(tmp_path / "out.gguf", source).items():
        low, high = BANDS[written[tensor]]
        assert low <= error <= high, (tensor, written[tensor])


def test_importance_lowers_the_error_of_channels_that_matter(
    source: Path, importance: Any, tmp_path: Path
) -> None:
    quantization.quantize(source, tmp_path / "plain.gguf", "Q4_K_M")
    quantization.quantize(source, tmp_path / "weighted.gguf", "Q4_K_M", importance)
    whole = dict(decoded(source))
    plain, weighted = (
        sum(
            float((((values - whole[name]) ** 2) * importance[name]).sum())
            for name, values in decoded(tmp_path / f"{kind}.gguf")
            if name in importance
        )
        for kind in ("plain", "weighted")
    )
    assert weighted < 0.9 * plain


def test_threads_change_no_byte(source: Path, tmp_path: Path) -> None:
    for threads in (1, 2):
        quantization.quantize(source, tmp_path / f"{threads}.gguf", "Q5_K_M", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_missing_importance_is_the_librarys_own_word(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationFailed, match=r"IQ2_XS.*requires an importance matrix"):
        quantization.quantize(source, tmp_path / "out.gguf", "IQ2_XS")
    assert list(tmp_path.iterdir()) == []


def test_failure_on_the_way_leaves_nothing(source: Path, importance: Any, tmp_path: Path) -> None:
    short = dict(importance) | {"blk.7.ffn_up.weight": np.ones(3, np.float32)}
    with pytest.raises(QuantizationFailed, match=r"imatrix size 3 .*blk\.7\.ffn_up"):
        quantization.quantize(source, tmp_path / "out.gguf", "Q4_K_M", short)
    assert list(tmp_path.iterdir()) == []


def test_layer_without_importance_is_no_success(
    source: Path, importance: Any, tmp_path: Path
) -> None:
    fewer = {name: values for name, values in importance.items() if "blk.3.attn_q" not in name}
    with pytest.raises(QuantizationFailed, match=r"did not find weights for blk\.3\.attn_q"):
        quantization.quantize(source, tmp_path / "out.gguf", "Q4_K_M", fewer)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_importance_is_refused(source: Path, importance: Any, tmp_path: Path) -> None:
    bad = dict(importance) | {"blk.0.attn_q.weight": np.full(256, np.nan, np.float32)}
    with pytest.raises(QuantizationFailed, match="non-finite"):
        quantization.quantize(source, tmp_path / "out.gguf", "Q4_K_M", bad)


def test_quantized_source_is_refused(source: Path, tmp_path: Path) -> None:
    quantization.quantize(source, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(QuantizationFailed, match="requantizing"):
        quantization.quantize(tmp_path / "q8.gguf", tmp_path / "out.gguf", "Q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["q8.gguf"]


def test_log_is_collected_not_printed_and_put_back(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with listening() as said:
        quantization.plan_types(source, "Q4_K_M")
        assert said == []
        llama_cpp.llama_model_quantize(
            b"/nowhere", b"", ctypes.byref(llama_cpp.llama_model_quantize_default_params())
        )
        assert said
    assert capfd.readouterr().err == ""
