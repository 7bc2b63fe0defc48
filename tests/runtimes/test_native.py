"""Native checkpoints in transformers: every kernel of a CPU against decoded weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qgrid import registry
from qgrid.contracts import Unsupported
from qgrid.libraries import gptq_kernels
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Gpu, KvCache, Method, Model
from tests import jobs
from tests.methods import unpacking
from tests.runtimes.passes import Ids, plain, some_ids

pytestmark = pytest.mark.slow
Made = Callable[..., tuple[Path, Cell]]


@pytest.fixture(scope="module")
def made(
    tiny_random: Path, make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """A native checkpoint of the random model, made once: `made("gptq", 4)`."""
    known: dict[tuple[Any, ...], tuple[Path, Cell]] = {}

    def run(method: str, bits: int, **changes: Any) -> tuple[Path, Cell]:
        key = method, bits, *changes.items()
        if key not in known:
            folder = tmp_path_factory.mktemp(method)
            cell = make_cell(
                model=Model("random", str(tiny_random), None, False, False),
                method=Method(method, jobs.options(method, format=method, **changes)),
                bits=bits,
                # short: the time of AWQ's search grows with the tokens
                calibration=jobs.calibration(
                    jobs.texts(tmp_path_factory.mktemp("texts")), samples=4, length=32
                ),
            )
            registry.method(method).quantize(cell, tiny_random, folder)
            known[key] = folder, cell
        return known[key]

    return run


def asking(cell: Cell, kernel: str) -> Cell:
    options = {**cell.runtime.options, "kernel": kernel}
    return replace(cell, runtime=replace(cell.runtime, options=options))


def dense(folder: Path, source: Path) -> Any:
    """The base model in fp32 with the checkpoint's weights, decoded bit by bit."""
    from safetensors.torch import load_file

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    stored = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in stored.items() if name in model.state_dict()}
    linears = {f"{name}.weight": value for name, value in unpacking.weights(folder).items()}
    assert len(linears) == 14
    model.load_state_dict({**kept, **linears}, strict=False)
    return model


def compared(engine: runtime.Transformers, model: Any, ids: Ids) -> tuple[float, float]:
    """Largest difference of log-probabilities, and mean KL divergence."""
    found = next(engine.score([ids], [len(ids) - 1])).logprobs.double()
    expected = plain(model, ids)[:-1].double()
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    return float((found - expected).abs().max()), float(divergence)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8)])
def test_quality_is_computed_in_fp32_from_unrounded_weights(
    method: str, bits: int, made: Made, tiny_random: Path
) -> None:
    folder, cell = made(method, bits)
    loaded = runtime.load(folder, cell, "float32")
    ids = some_ids(random.Random(0), 60)
    assert compared(loaded, dense(folder, tiny_random), ids)[0] <= 1e-4
    seen = loaded.observed()
    assert seen["kernel"] == "torch"
    assert seen["stores_in"] == seen["computes_in"] == {"gptq": 14}
    assert seen["linear_kernels"] == [
        {
            "modules": 14,
            "method": "gptq",
            "scheme": f"W{bits}A16",
            "kernel": "torch",
            "dtype": "float32",
        }
    ]
    assert "slow_kernel" not in seen
    assert not seen["decompressed"]
    assert seen["kernels"] == {"TorchLinear": 14, "Linear": 1}
    loaded.close()


# KL divergence from the decoded weights: fp16 activations; bf16 ones and scales; weights rounded
# again to int8. All are below what 4 bits cost (0.1 for this random model).
@pytest.mark.parametrize(
    ("method", "kernel", "dtype", "bound"),
    [
        ("gptq", "torch_aten", "bfloat16", 5e-3),
        ("gptq", "torch_fused", "bfloat16", 5e-3),
        ("gptq", "torch_int8", "float32", 5e-3),
        ("awq", "torch", "float16", 1e-4),
        ("awq", "torch_aten", "bfloat16", 5e-3),
        ("awq", "torch_fused", "bfloat16", 5e-3),
        ("awq", "torch_int8", "float32", 5e-3),
    ],
)
def test_every_kernel_multiplies_the_same_weights(
    method: str, kernel: str, dtype: str, bound: float, made: Made, tiny_random: Path
) -> None:
    folder, cell = made(method, 4)
    loaded = runtime.load(folder, asking(cell, kernel), "float32")
    ids = some_ids(random.Random(1), 60)
    divergence = compared(loaded, dense(folder, tiny_random), ids)[1]
    assert 0 < divergence < bound
    seen = loaded.observed()
    assert seen["kernel"] == kernel
    assert [layer["dtype"] for layer in seen["linear_kernels"]] == [dtype]
    assert seen["stores_in"] == {method: 14}
    widened = kernel == "torch_int8"
    assert seen["computes_in"] == ({"int8": 14} if widened else {method: 14})
    assert seen["decompressed"] is widened
    assert [(c.name, c.ok) for c in loaded.checks()] == [("kernel", True)]
    loaded.close()


def test_speed_has_the_library_choose_and_names_a_slow_choice(made: Made) -> None:
    folder, cell = made("gptq", 4)
    quick = runtime.load(folder, cell, "bfloat16")
    assert quick.observed()["kernel"] == "torch_aten"
    assert "slow_kernel" not in quick.observed()
    slow = runtime.load(folder, asking(cell, "torch"), "bfloat16")
    said = slow.observed()["slow_kernel"]
    assert "`torch` unpacks all weights in every pass" in said
    assert "torch_aten, torch_fused, torch_int8" in said


def test_resident_bytes_are_those_of_packed_words(made: Made, tiny_random: Path) -> None:
    """Codes, zero points and scales as stored; embedding, norms and small tables beside them."""
    folder, cell = made("awq", 4)
    loaded = runtime.load(folder, asking(cell, "torch"), "bfloat16")
    linears = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 256 * 512)
    packed = linears * 4.15625 / 8
    expected = packed + 2 * 512 * 256
    assert loaded.memory().weights_bytes == pytest.approx(expected, rel=0.01)
    wide = runtime.load(folder, asking(cell, "torch_int8"), "bfloat16")
    assert wide.memory().weights_bytes == pytest.approx(linears + 2 * 512 * 256, rel=0.02)


@pytest.mark.parametrize(
    ("method", "bits", "kernel", "message"),
    [
        ("gptq", 4, "fast", "no `runtime.kernel=fast` for the format `gptq` with 4 bits on cpu"),
        ("gptq", 4, "marlin", "(has: auto, torch, torch_aten, torch_fused, torch_int8)"),
        ("gptq", 3, "torch_aten", "with 3 bits on cpu (has: auto, torch)"),
        ("awq", 4, "gemm", "no `runtime.kernel=gemm` for the format `awq`"),
        ("rtn", 4, "torch", "but the artifact is `pack-quantized`; set `runtime.kernel=auto`"),
        ("none", 16, "torch", "but the artifact is `safetensors-16bit`"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused(
    method: str, bits: int, kernel: str, message: str, make_cell: Callable[..., Cell]
) -> None:
    native = {"format": method} if method in gptq_kernels.KERNELS else {}
    chosen = Method(method, jobs.options(method, **native))
    cell = asking(make_cell(method=chosen, bits=bits), kernel)
    assert message in str(runtime.refusal(cell))
    assert runtime.refusal(asking(cell, "auto")) is None


def test_a_gpu_has_its_own_kernels(make_cell: Callable[..., Cell]) -> None:
    gpu = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)
    chosen = Method("gptq", jobs.options("gptq", format="gptq"))
    cell = make_cell(method=chosen, bits=4, gpu=gpu, kv_cache=KvCache("auto16", 16))
    assert runtime.refusal(asking(cell, "marlin")) is None
    assert "(has: auto, torch, triton" in str(runtime.refusal(asking(cell, "torch_aten")))


def test_known_kernels_are_those_of_the_library() -> None:
    """The table that plans without torch against the library's own declarations."""
    gptq_kernels.library()
    from gptqmodel.models._const import DEVICE
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils import importer
    from gptqmodel.utils.backend import BACKEND

    for layout, form in (("gptq", "gptq"), ("awq", "gemm")):
        for name, ours in gptq_kernels.KERNELS[layout].items():
            asked = BACKEND(f"{layout}_{name}"), METHOD(layout), FORMAT(form)
            theirs = importer.get_kernel_for_backend(*asked)
            assert set(ours.bits) <= set(theirs.SUPPORTS_BITS), name
            devices = set(theirs.SUPPORTS_DEVICES)
            assert DEVICE.ALL in devices or {DEVICE(d) for d in ours.devices} <= devices, name


def test_what_the_library_refuses_while_loading_is_unsupported(made: Made) -> None:
    folder, cell = made("gptq", 8)
    with pytest.raises(Unsupported, match=r"`runtime.kernel=torch_aten` cannot be had .*bits"):
        runtime.load(folder, asking(cell, "torch_aten"), "bfloat16")


@pytest.mark.parametrize(
    ("changes", "kernel", "message"),
    [
        ({"group_size": 16}, "torch_aten", r"groups of 16 .has: 32, 64, 128, 256"),
        ({"group_size": 16}, "torch_fused", r"groups of 16 .has: 32, 64, 128, 256"),
        ({"group_size": None}, "torch_fused", "groups of a row"),
        ({"symmetric": False}, "torch_fused", "zero points of `gptq`: it takes all for zero"),
    ],
)
def test_a_kernel_that_fails_or_computes_something_else_is_unsupported(
    changes: dict[str, Any], kernel: str, message: str, made: Made
) -> None:
    """Without this they raise in the first pass, and the last one has a KL divergence of 1.5."""
    folder, cell = made("gptq", 4, **changes)
    with pytest.raises(
        Unsupported, match=f"`runtime.kernel={kernel}` does not multiply .*{message}"
    ):
        runtime.load(folder, asking(cell, kernel), "bfloat16")


@pytest.mark.parametrize(
    ("changes", "kernel", "others"),
    [
        ({"group_size": 16}, "torch", "also torch_int8 ("),
        ({"group_size": None}, "torch", "also torch_int8 ("),
        ({"symmetric": False}, "torch_aten", None),
    ],
)
def test_the_automatic_kernel_multiplies_every_packing(
    changes: dict[str, Any], kernel: str, others: str | None, made: Made, tiny_random: Path
) -> None:
    folder, cell = made("gptq", 4, **changes)
    loaded = runtime.load(folder, cell, "bfloat16")
    ids = some_ids(random.Random(2), 60)
    assert compared(loaded, dense(folder, tiny_random), ids)[1] < 5e-3
    seen = loaded.observed()
    assert seen["kernel"] == kernel
    assert (others is None) == ("slow_kernel" not in seen)
    assert others is None or others in seen["slow_kernel"]
    if "symmetric" in changes:
        unpacking_it = runtime.load(folder, asking(cell, "torch"), "bfloat16")
        assert "also torch_aten, torch_int8 (" in unpacking_it.observed()["slow_kernel"]


def test_another_kernel_than_asked_is_told(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cell = made("gptq", 4)
    ask = gptq_kernels.asked
    monkeypatch.setattr(gptq_kernels, "asked", lambda one, _, *more: ask(one, "torch", *more))
    loaded = runtime.load(folder, asking(cell, "torch_int8"), "bfloat16")
    (check,) = loaded.checks()
    assert (check.name, check.ok, check.fatal) == ("kernel", False, True)
    assert (check.expected, check.actual) == ("torch_int8", "torch")
