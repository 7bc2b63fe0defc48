"""NaN and infinities in stored floats, whatever the file and the type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qgrid.gguf.types import TENSOR_TYPES
from qgrid.weights import finite
from qgrid.weights.finite import nonfinite

BLOCKS = sorted(name for name, kind in TENSOR_TYPES.items() if kind.scales)


def write_blocks(path: Path, name: str, blocks: np.ndarray[Any, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", blocks, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", BLOCKS)
def test_scales_of_quantized_blocks(name: str, tmp_path: Path) -> None:
    kind = TENSOR_TYPES[name]
    # Codes with all bits set would be NaN if they were floats: they must not be counted.
    blocks = np.full((3, 4 * kind.nbytes), 0xFF, np.uint8).reshape(12, kind.nbytes)
    for place in kind.scales:
        blocks[:, place : place + 2] = 0
    write_blocks(tmp_path / "good.gguf", name, blocks.reshape(3, -1))
    assert nonfinite(tmp_path / "good.gguf") == {}
    for number, place in enumerate(kind.scales):
        blocks[5 + number, place : place + 2] = np.frombuffer(np.float16("inf").tobytes(), np.uint8)
    write_blocks(tmp_path / "bad.gguf", name, blocks.reshape(3, -1))
    assert nonfinite(tmp_path / "bad.gguf") == {"w": len(kind.scales)}


@pytest.mark.parametrize(("name", "nan"), [("F32", 0x7FC00000), ("F16", 0x7E00), ("BF16", 0x7FC0)])
def test_plain_tensors_of_a_gguf_file(name: str, nan: int, tmp_path: Path) -> None:
    width = np.uint32 if name == "F32" else np.uint16
    values = np.zeros((4, 8), width)
    values[2, 3] = nan
    write_blocks(tmp_path / "w.gguf", name, values.view(np.uint8))
    assert nonfinite(tmp_path / "w.gguf") == {"w": 1}


def test_chunks_count_as_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = np.zeros((5, 7 * 18), np.uint8).reshape(35, 18)
    blocks[::2, :2] = np.frombuffer(np.float16("nan").tobytes(), np.uint8)
    write_blocks(tmp_path / "w.gguf", "Q4_0", blocks.reshape(5, -1))
    monkeypatch.setattr(finite, "_CHUNK_BYTES", 4 * 18 + 1)
    assert nonfinite(tmp_path / "w.gguf") == {"w": 18}


def test_safetensors_with_an_infinity(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    bad = torch.zeros(3, 5, dtype=torch.bfloat16)
    bad[1, 2] = float("-inf")
    tensors = {"bad": bad, "codes": torch.full((9,), -1, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert nonfinite(tmp_path / "model.safetensors") == {"bad": 1}
