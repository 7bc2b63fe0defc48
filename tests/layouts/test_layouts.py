"""Families of stored layers: each knows its own by names and dtypes, and leaves others alone."""

from __future__ import annotations

import struct

import pytest

from qgrid import layouts
from qgrid.runtimes import _linears
from qgrid.types import Tensor

SHAPE = struct.pack("<2q", 6, 8)


def parts(**dtypes: str) -> dict[str, Tensor]:
    """Tensors of 6 x 8 by name; a double underscore is a dot."""
    return {name.replace("__", "."): Tensor(each, (6, 8), 48) for name, each in dtypes.items()}


HQQ = parts(W_q="U8", scale="F16", zero="F16", shape="I64")
BYTES = {"weight._data": "I8", "weight._scale": "BF16"}
PACKED = {"weight._data._data": "U8", "weight._scale": "BF16", "weight._shift": "BF16"}


@pytest.mark.parametrize(
    ("held", "name", "known"),
    [
        (HQQ, "hqq", True),
        (parts(**BYTES), "quanto-int", True),
        (parts(**BYTES | {"weight._data": "F8_E4M3"}), "quanto-float", True),
        (parts(**BYTES | {"weight._data": "F8_E5M2"}), "quanto-float", True),
        (parts(**PACKED, shape="I64"), "quanto-int", True),
        (parts(**PACKED), "quanto-int", False),  # as the library itself saves it
        (parts(_weight_qdata="I8", _weight_scale="F32"), "torchao-int8", True),
        (parts(_weight_qdata="F8_E4M3", _weight_scale="F32"), "torchao-float8", True),
        (parts(weight="BF16"), "16bit", False),
        (parts(W_q="U8", scale="F16"), "missing", False),
        (parts(scale="F16", zero="F16"), "missing", False),
    ],
)
def test_format_and_shape(held: dict[str, Tensor], name: str, known: bool) -> None:
    assert layouts.format_of(held) == name
    assert layouts.shape(held, lambda _: SHAPE) == ((6, 8) if known else None)


@pytest.mark.parametrize(("name", "shape"), [("scales", (6,)), ("qweight", (8,)), ("qzeros", (8,))])
def test_native_layers_of_other_shapes_have_none(name: str, shape: tuple[int, ...]) -> None:
    held = parts(qweight="I32", scales="F16", qzeros="I32")
    held[name] = Tensor(held[name].dtype, shape, 0)
    assert layouts.shape(held, lambda _: SHAPE) is None


@pytest.mark.parametrize(
    ("scales", "name"), [("U8", "mxfp4"), ("F8_E8M0", "mxfp4"), ("F8_E4M3", "nvfp4")]
)
def test_four_bit_floats_are_told_by_their_scales(scales: str, name: str) -> None:
    held = parts(weight_packed="U8", weight_scale=scales)
    assert layouts.format_of(held) == f"{name}-pack-quantized"
    assert layouts.shape(held, lambda _: SHAPE) == (6, 16)  # two in a byte


def test_codes_may_be_called_floats() -> None:
    state = "a.q_proj.weight.quant_state.bitsandbytes__nf4"
    assert layouts.codes(["a.q_proj.weight", state, "a.norm.weight"]) == {"a.q_proj.weight"}


def test_only_one_family_takes_a_layer() -> None:
    for held in (HQQ, parts(**BYTES), parts(_weight_qdata="I8", _weight_scale="F32")):
        found = [family for family in layouts._families() if family.format_of(held) is not None]
        assert len(found) == 1


def test_every_format_of_these_files_is_one_that_is_loaded() -> None:
    told = [name for family in layouts._families() for name in family.FORMATS]
    assert "hqq" in told
    assert set(told) <= set(_linears.formats())
