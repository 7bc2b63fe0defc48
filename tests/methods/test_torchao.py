"""torchao's schemes: what is stored, what the runtime computes with it, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.methods import torchao
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Gpu, Method
from qgrid.weights import artifacts, inspection, widths
from qgrid.weights.artifacts import BadArtifact
from tests import jobs
from tests.methods import checkpoints, decoding
from tests.methods.checkpoints import MODEL, Made

SCHEMES = ("int8_weight_only", "int8_dynamic", "float8_weight_only")
REFUSED = {
    "int4_weight_only": r"mslk >= 1\.0\.0",
    "float8_dynamic": r"needs a GPU of compute capability 8\.9 or more",
    "intx_weight_only": "in a byte each, so that nothing shrinks",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_what_it_says(
    scheme: str, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, "torchao", 8, scheme=scheme)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    assert result.observed["module_methods"] == {"torchao": 14}
    bare = inspection.inspect(Path(job.artifact))  # without its base
    whole = inspection.inspect(tiny_random)
    assert bare.format == ("torchao-float8" if "float" in scheme else "torchao-int8")
    assert (bare.shapes, bare.num_parameters) == (whole.shapes, whole.num_parameters)
    for name, state in bare.modules.items():
        exact = torchao.stored_bits(8, {"scheme": scheme}, *bare.shapes[name])
        assert state.bits == pytest.approx(exact, rel=1e-9)


def test_kept_layers_stay_at_16_bits(
    tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    keep = {"model.layers.1.*": 16, "lm_head": 16}
    job = jobs.job(make_cell, tmp_path, tiny_random, "torchao", 8, keep=keep)
    result = artifacts.build(job)
    assert all(check.ok for check in result.checks), result.checks
    for name, state in artifacts.load_manifest(Path(job.artifact)).modules.items():
        assert state.method == ("none" if widths.of(8, {"keep": keep}, name) == 16 else "torchao")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_off_by_what_rounding_makes_and_logits_are_theirs(
    scheme: str, made: Made
) -> None:
    """int8: evenly spread errors of the row's own range. E4M3: three bits of mantissa, an error of
    up to 2^-4 of each weight, 2.3 to 2.8 % overall.
    """
    folder, cell = made("torchao", 8, scheme=scheme)
    error = decoding.error(folder, MODEL)
    if "float" in scheme:
        assert 0.023 < error < 0.028
    else:
        assert 0.98 < error / decoding.expected_error(MODEL, 8, None) < 1.02
    found, seen = checkpoints.scored((folder, cell))
    reference = checkpoints.plainly(decoding.unquantized(MODEL, folder))
    apart = float((found - reference).abs().max())
    assert (apart < 1e-4) == (scheme != "int8_dynamic")
    kind = "float8" if "float" in scheme else "int8"
    assert seen["stores_in"] == seen["computes_in"] == {f"torchao-{kind}": 35}
    rounds = scheme == "int8_dynamic"
    assert [(each["scheme"], each["kernel"]) for each in seen["linear_kernels"]] == [
        ("W8A8", "torchao-int8") if rounds else ("W8A16", "torchao-unpacked")
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_rounded_by_token(dtype: str, made: Made) -> None:
    """By hand: a scale a token, so that its largest value is 127.5 steps from zero."""
    folder, cell = made("torchao", 8, scheme="int8_dynamic")
    loaded = runtime.load(folder, cell, dtype)
    layer = loaded._model.get_submodule(SMALL)
    torch.manual_seed(0)
    given = (torch.randn(7, 256) * torch.rand(7, 1)).to(getattr(torch, dtype))
    with torch.inference_mode():
        product = layer(given)
    loaded.close()
    assert product.dtype == given.dtype
    weight = decoding.weights(folder)[SMALL]
    exact = given.double()
    scale = exact.abs().amax(-1, keepdim=True) / 127.5
    rounded = ((exact / scale).round().clamp(-128, 127) * scale) @ weight.T
    effect = float((rounded - exact @ weight.T).norm() / rounded.norm())
    apart = float((product.double() - rounded).norm() / rounded.norm())
    assert effect > 0.003
    assert apart < (effect / 1000 if dtype == "float32" else effect)


def test_rounding_activations_costs_more_and_floats_most(made: Made) -> None:
    apart = [
        checkpoints.divergence(checkpoints.scored(made("torchao", 8, scheme=scheme))[0])
        for scheme in SCHEMES
    ]
    assert 0 < 2 * apart[0] < apart[1] < 1e-3
    assert 2 * apart[0] < apart[2] < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_computes_in_bf16_and_holds_what_is_stored(scheme: str, made: Made) -> None:
    folder, cell = made("torchao", 8, scheme=scheme)
    found, seen = checkpoints.scored((folder, cell), "bfloat16")
    assert seen["linear_kernels"][0]["dtype"] == "bfloat16"
    assert checkpoints.divergence(found) < 1e-3
    data = sum(inspection.inspect(folder).dtypes.values())
    assert seen["weights_bytes"] == pytest.approx(data, rel=0.01)


def test_rows_of_zeros_stay_zeros(made: Made) -> None:
    """The embedded model has some: torchao 0.18.0 makes them NaN in E4M3."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(4, 2, bias=False)
    layer.weight.data[0] = 0
    quantize_(layer, Float8WeightOnlyConfig())
    assert bool(layer.weight.dequantize()[0].isnan().all())  # once not, the mending can go
    weights = decoding.weights(made("torchao", 8, scheme="float8_weight_only")[0])
    query = weights["model.layers.0.self_attn.q_proj"]
    assert int((query == 0).all(1).sum()) > 0
    assert all(bool(each.isfinite().all()) for each in weights.values())


@pytest.mark.parametrize("scheme", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(
    scheme: str, tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    job = jobs.job(make_cell, tmp_path, tiny_random, "torchao", 8, scheme=scheme)
    with pytest.raises(Unsupported, match=f"`method.scheme={scheme}` .*{REFUSED[scheme]}"):
        artifacts.build(job)
    cell = make_cell(method=Method("torchao", jobs.options("torchao")), bits=8)
    assert torchao.refusal(cell) is None


@pytest.mark.parametrize(
    ("scheme", "capability", "said"),
    [
        ("int4_weight_only", "sm_90", "is packed by `mslk`"),
        ("float8_dynamic", "sm_80", "8.9 or more; `gpu=a100` has 8.0"),
        ("float8_dynamic", "sm_90a", "on this GPU what qgrid has not compared"),
    ],
)
def test_what_a_gpu_lacks_is_said_of_it(
    scheme: str, capability: str, said: str, make_cell: Callable[..., Cell]
) -> None:
    method = Method("torchao", jobs.options("torchao", scheme=scheme))
    gpu = Gpu("a100", "cuda", "A100", capability, 80.0, None, 1)
    reason = str(torchao.refusal(make_cell(method=method, bits=8, gpu=gpu)))
    assert re.search(f"^`method.scheme={scheme}` .*{said}", reason)


def test_an_intx_4_that_does_not_shrink_is_caught(
    tmp_path: Path,
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Named four bits and rounded to sixteen values, but a byte for each on disk and in memory."""
    from torchao.quantization import IntxWeightOnlyConfig

    monkeypatch.setattr(
        torchao, "_config", lambda _: IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"])
    )
    produces = {4: "torchao-int8"}
    supports = replace(torchao.SUPPORTS, bits=(4,), default_bits=4, produces=produces)
    monkeypatch.setattr(torchao, "SUPPORTS", supports)
    job = jobs.job(make_cell, tmp_path, tiny_random, "torchao", 4)
    with pytest.raises(BadArtifact, match=r"check `bits`: expected 4 bits .* has 8\.\d+ bits"):
        artifacts.build(job)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    torchao.quantize(job.planned.cell, tiny_random, out)
    assert len(torch.unique(decoding.weights(out)[SMALL][0])) <= 16
    with pytest.raises(InvalidEngine, match="holds 14 x torchao-int8"):
        runtime.load(out, job.planned.cell, "float32")


SMALL = "model.layers.0.self_attn.k_proj"
