"""quanto in every width: what is stored, decoded by hand, and what the runtime computes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qgrid import registry
from qgrid.libraries import quanto_library
from qgrid.methods import quanto
from qgrid.types import Cell, Method
from qgrid.weights import artifacts, inspection, widths
from tests import jobs
from tests.methods import checkpoints, decoding
from tests.methods.checkpoints import MODEL, Made

FLOATS = ("float8", "float8_e5m2")
CASES = [*((bits, "int") for bits in (2, 4, 8)), *((8, weights) for weights in FLOATS)]


@pytest.mark.parametrize(("bits", "weights"), CASES)
def test_every_width_is_what_it_says(
    bits: int, weights: str, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, "quanto", bits, weights=weights)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {"quanto": 14}
    bare = inspection.inspect(Path(job.artifact))  # without its base
    whole = inspection.inspect(tiny_random)
    assert bare.format == ("quanto-int" if weights == "int" else "quanto-float")
    assert (bare.shapes, bare.num_parameters) == (whole.shapes, whole.num_parameters)
    for name, state in bare.modules.items():
        exact = quanto.stored_bits(bits, {"weights": weights}, *bare.shapes[name])
        assert state.bits == pytest.approx(exact, rel=1e-9)
    wide = bare.modules["model.layers.0.mlp.down_proj"].bits
    assert wide == pytest.approx(bits + (16 / 512 if bits == 8 else 32 / 128), abs=0.003)


def test_layers_have_the_widths_that_are_asked_for(
    tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    keep = {"model.layers.0.*": 8, "*.down_proj": 2, "model.layers.1.mlp.up_proj": 16}
    job = jobs.job(make_cell, tmp_path, tiny_random, "quanto", 4, keep=keep)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    manifest = artifacts.load_manifest(Path(job.artifact))
    asked = {name: widths.of(4, {"keep": keep}, name) for name in manifest.modules}
    assert set(asked.values()) == {2, 4, 8, 16}
    assert all(
        asked[name] <= each.bits < asked[name] + 0.3 for name, each in manifest.modules.items()
    )


@pytest.mark.parametrize(("bits", "weights"), CASES)
def test_weights_are_off_by_what_rounding_makes_and_logits_are_theirs(
    bits: int, weights: str, made: Made
) -> None:
    """Integers: evenly spread errors of the group's or the row's own range (`expected_error`).

    At 8 bits scales in bf16 put up to 2^-9 of each weight on top. Floats: a relative error of up to
    2^-4 (E4M3) or 2^-3 (E5M2) of each weight, 2.3 to 2.8 % overall, and twice that.
    """
    folder, cell = made("quanto", bits, weights=weights)
    error = decoding.error(folder, MODEL)
    if weights == "int":
        expected = decoding.expected_error(MODEL, bits, None if bits == 8 else 128)
        assert 0.97 < error / expected < 1.05
    else:
        middle = 0.0255 if weights == "float8" else 0.051
        assert 0.9 * middle < error < 1.1 * middle
    found, seen = checkpoints.scored((folder, cell))
    reference = checkpoints.plainly(decoding.unquantized(MODEL, folder))
    assert float((found - reference).abs().max()) < 1e-4
    kind = "int" if weights == "int" else "float"
    assert seen["stores_in"] == seen["computes_in"] == {f"quanto-{kind}": 35}
    told = {"modules": 35, "method": "quanto", "scheme": f"W{bits}A16"}
    assert seen["linear_kernels"] == [told | {"kernel": "quanto-unpacked", "dtype": "float32"}]


def test_fewer_bits_are_further_from_16(made: Made) -> None:
    def apart(bits: int, weights: str = "int") -> float:
        return checkpoints.divergence(checkpoints.scored(made("quanto", bits, weights=weights))[0])

    assert apart(2) > 3 * apart(4) > 9 * apart(8) > 0
    assert apart(8) < apart(8, "float8") < apart(8, "float8_e5m2") < apart(4)


@pytest.mark.parametrize(
    ("bits", "kernel"), [(2, "quanto-unpacked"), (4, "quanto-int4pack"), (8, "quanto-int8pack")]
)
def test_bf16_takes_the_kernels_of_torch_and_holds_what_is_stored(
    bits: int, kernel: str, made: Made
) -> None:
    """int8 in bf16 ended the process where the weight lay in memory as it lies in the file."""
    folder, cell = made("quanto", bits, weights="int")
    found, seen = checkpoints.scored((folder, cell), "bfloat16")
    assert [(each["kernel"], each["dtype"]) for each in seen["linear_kernels"]] == [
        (kernel, "bfloat16")
    ]
    exact = checkpoints.divergence(checkpoints.scored((folder, cell))[0])
    assert abs(checkpoints.divergence(found) - exact) < 1e-3 + 0.02 * exact
    data = sum(inspection.inspect(folder).dtypes.values())
    assert seen["weights_bytes"] == pytest.approx(data, rel=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_librarys_own_class_loads_the_folder(bits: int, made: Made) -> None:
    """With 8 bits it must not compute: it leaves weights where they lie in the file, and torch's
    product of bf16 and int8 ends the process on those.
    """
    folder, _ = made("quanto", bits, weights="int")
    quanto_library.library()
    from optimum.quanto import QuantizedModelForCausalLM

    own = QuantizedModelForCausalLM.from_pretrained(str(folder))
    ours = quanto.load(folder, {"dtype": "auto"})
    for name in decoding.weights(folder):
        theirs = own.get_submodule(name).weight.dequantize()
        assert torch.equal(theirs, ours.get_submodule(name).weight.dequantize())
    if bits < 8:
        given = torch.tensor([checkpoints.ids()])
        with torch.no_grad():
            assert torch.equal(own(input_ids=given).logits, ours(input_ids=given).logits)


def test_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the extension for GPUs either, which the library registers where there is one."""
    from optimum.quanto.library.extensions import extension
    from optimum.quanto.library.extensions.extension import get_extension

    for_cuda = extension.Extension("quanto_cuda", "/nowhere", ["unpack.cu"])
    monkeypatch.setitem(extension._extensions, "quanto_cuda", for_cuda)
    quanto_library.library()
    assert not extension.is_extension_available("quanto_cuda")  # else other kernels are chosen
    assert for_cuda.lib.__module__ == quanto_library.__name__
    quanto_library.library()

    assert get_extension("quanto_cpp").lib.__module__ == quanto_library.__name__
    packed = torch.tensor([[0b11100100]], dtype=torch.uint8)
    unpacked: Any = torch.ops.quanto.unpack
    assert unpacked(packed, 2).flatten().tolist() == [0, 1, 2, 3]
    assert unpacked(packed, 4).flatten().tolist() == [4, 14]


def test_rows_of_zeros_stay_zeros(made: Made) -> None:
    """The embedded model has some: the library divides 0 by 0 there, which is no number of E4M3."""
    weights = decoding.weights(made("quanto", 8, weights="float8")[0])
    query = weights["model.layers.0.self_attn.q_proj"]
    assert int((query == 0).all(1).sum()) > 0
    assert all(bool(each.isfinite().all()) for each in weights.values())


def test_floats_have_eight_bits_only(make_cell: Callable[..., Cell]) -> None:
    options = jobs.options("quanto", weights="float8")
    assert registry.support(Method("quanto", options)).bits == (8,)
    kept = jobs.options("quanto", weights="float8", keep={"model.*": 4})
    said = quanto.refusal(make_cell(method=Method("quanto", kept), bits=8))
    assert "4 bits, which `quanto` cannot (has: 8, 16)" in str(said)
