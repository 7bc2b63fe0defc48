"""The reader of GGUF headers against gguf's own, and every way a file can be torn."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from qgrid.gguf import file, quantization
from qgrid.gguf.file import TornFile
from tests.gguf.bare import Sizes, write

TOKENS = ["a", "b c", "é\u0301", "", "🙂"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several tensor types in one file."""
    folder = tmp_path_factory.mktemp("file")
    write(folder / "f16.gguf", Sizes())
    quantization.quantize(folder / "f16.gguf", folder / "model.gguf", "Q3_K_M")
    return folder / "model.gguf"


def write_keys(path: Path) -> None:
    """A file with a value of every kind."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("k.u8", 200)
    writer.add_int8("k.i8", -3)
    writer.add_uint16("k.u16", 60000)
    writer.add_int16("k.i16", -300)
    writer.add_uint32("k.u32", 4_000_000_000)
    writer.add_int32("k.i32", -70_000)
    writer.add_uint64("k.u64", 2**63)
    writer.add_int64("k.i64", -(2**40))
    writer.add_float32("k.f32", 0.5)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_string("k.text", "ü")
    writer.add_array("k.numbers", [1, -2, 3])
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.5] * len(TOKENS))
    writer.add_tensor("vector", np.arange(3, dtype=np.float32))
    writer.add_tensor("cube", np.zeros((2, 3, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tensors_are_those_of_the_reference_reader(quantized: Path) -> None:
    ours = file.read(quantized).tensors
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(quantized).tensors}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].type.name == tensor.tensor_type.name
        assert ours[name].shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (ours[name].nbytes, ours[name].start) == (tensor.n_bytes, tensor.data_offset)


def test_values_of_every_kind(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.gguf")
    wanted = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "k.numbers")
    read = file.read(tmp_path / "keys.gguf", arrays=wanted)
    assert {key: value for key, value in read.metadata.items() if key.startswith("k.")} == {
        "k.u8": 200,
        "k.i8": -3,
        "k.u16": 60000,
        "k.i16": -300,
        "k.u32": 4_000_000_000,
        "k.i32": -70_000,
        "k.u64": 2**63,
        "k.i64": -(2**40),
        "k.f32": 0.5,
        "k.f64": 0.1,
        "k.bool": True,
        "k.text": "ü",
        "k.numbers": (1, -2, 3),
    }
    assert read.metadata["tokenizer.ggml.tokens"] == tuple(TOKENS)
    assert read.metadata["tokenizer.ggml.scores"] == (0.5,) * len(TOKENS)
    assert {name: t.shape for name, t in read.tensors.items()} == {
        "vector": (3,),
        "cube": (2, 3, 4),
    }


def test_arrays_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.gguf")
    read = file.read(tmp_path / "keys.gguf")
    assert "tokenizer.ggml.tokens" not in read.metadata
    assert read.metadata["general.architecture"] == "llama"


def test_file_cut_anywhere_is_torn(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.gguf")
    data = (tmp_path / "keys.gguf").read_bytes()
    last = file.read(tmp_path / "keys.gguf").tensors["cube"]
    cut = tmp_path / "cut.gguf"
    for length in range(0, last.start + last.nbytes, 7):
        cut.write_bytes(data[:length])
        with pytest.raises(TornFile, match=r"cut\.gguf"):
            file.read(cut)


def test_longer_file_is_not_whole_either(quantized: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer.gguf"
    longer.write_bytes(quantized.read_bytes() + bytes(64))
    with pytest.raises(TornFile, match="its header says"):
        file.read(longer)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(0, 0, "no GGUF header"), (4, 9, "GGUF version 9"), (8, 2**40, "header|dimensions")],
)
def test_foreign_header_is_named(
    place: int, value: int, message: str, quantized: Path, tmp_path: Path
) -> None:
    data = bytearray(quantized.read_bytes())
    wide = "<Q" if value > 2**32 else "<I"
    data[place : place + struct.calcsize(wide)] = struct.pack(wide, value)
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(TornFile, match=message):
        file.read(tmp_path / "other.gguf")


def test_unknown_tensor_type_is_named(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.gguf")
    data = bytearray((tmp_path / "keys.gguf").read_bytes())
    info = data.index(b"cube") + len(b"cube") + 4 + 3 * 8
    data[info : info + 4] = struct.pack("<I", 777)
    (tmp_path / "keys.gguf").write_bytes(data)
    with pytest.raises(TornFile, match="tensor cube has the unknown GGUF type 777"):
        file.read(tmp_path / "keys.gguf")


@pytest.mark.parametrize("alignment", [0, 24, "32"])
def test_alignment_that_is_no_power_of_two_is_named(alignment: int | str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "llama")
    add = writer.add_string if isinstance(alignment, str) else writer.add_uint32
    add("general.alignment", alignment)
    writer.add_tensor("vector", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TornFile, match=r"`general\.alignment` is '?(0|24|32)"):
        file.read(tmp_path / "keys.gguf")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"blk.1.attn_q.weight",
            b"blk.0.attn_q.weight",
            "tensor `blk.0.attn_q.weight` comes twice",
        ),
        (b"general.file_type", b"llama.block_count", "key `llama.block_count` comes twice"),
    ],
)
def test_two_of_one_name_are_refused(
    old: bytes, new: bytes, message: str, quantized: Path, tmp_path: Path
) -> None:
    """llama.cpp refuses such a file; here one would hide the other."""
    data = quantized.read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    (tmp_path / "twice.gguf").write_bytes(data.replace(old, new))
    with pytest.raises(TornFile, match=re.escape(message)):
        file.read(tmp_path / "twice.gguf")


def test_tensors_that_share_bytes_are_refused(quantized: Path, tmp_path: Path) -> None:
    data = bytearray(quantized.read_bytes())
    name = b"blk.1.attn_q.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8 + 4
    data[place : place + 8] = struct.pack("<Q", 0)
    (tmp_path / "shared.gguf").write_bytes(data)
    with pytest.raises(TornFile, match=r"tensor blk\.1\.attn_q\.weight begins at byte"):
        file.read(tmp_path / "shared.gguf")


def test_histogram_counts_tensors(quantized: Path) -> None:
    counts = file.read(quantized).histogram()
    assert sum(counts.values()) == len(Sizes().matrices())
    assert counts["Q3_K"] > counts["Q6_K"] == 1
