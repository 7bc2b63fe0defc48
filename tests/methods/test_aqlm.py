"""`method=aqlm`: a published checkpoint loads, computes what it stores, and has its own head."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.files import HashCache
from qgrid.libraries import loading
from qgrid.methods import _checkpoint, aqlm
from qgrid.runtimes import transformers as runtime
from qgrid.types import Cell, Job
from qgrid.weights import artifacts, inspection
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.methods import foreign

IDS = list(range(4, 68))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    write_model(folder, tie_word_embeddings=False)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return foreign.write_aqlm(base, tmp_path_factory.mktemp("published") / "aqlm")


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory,
    base: Path,
    published: Path,
    make_cell: Callable[..., Cell],
) -> Job:
    """The job of its artifact, built."""
    store = tmp_path_factory.mktemp("store")
    made = foreign.job(make_cell, store, base, "aqlm", published)
    artifacts.build(made)
    return made


def test_published_checkpoint_becomes_an_artifact(job: Job, published: Path) -> None:
    result = artifacts.build(job)
    assert {c.name: c.ok for c in result.checks if c.fatal} == dict.fromkeys(
        ["files", "config", "shapes", "weights", "kept", "vocabulary", "bits", "coverage",
         "tokenizer", "finite", "ends", "reload"], True,
    )  # fmt: skip
    assert result.observed["format"] == "aqlm"
    assert result.observed["module_methods"] == {"aqlm": 14}
    assert job.planned.cell.bits == 2
    linked = Path(job.artifact) / "model.safetensors"
    assert linked.resolve() == (published / "model.safetensors").resolve()


def test_bits_are_those_of_codes_codebooks_and_scales(job: Job) -> None:
    """Two bytes for eight weights; 4096 fp16 entries of weights, and an fp16 scale a row."""
    contents = inspection.inspect(Path(job.artifact))  # without its base
    for name, (rows, columns) in contents.shapes.items():
        weights = rows * columns
        expected = 2 + 16 * (2 * 256 * 8 + rows) / weights
        assert contents.modules[name].bits == pytest.approx(expected)
        options = job.planned.cell.method.options
        assert aqlm.stored_bits(2, options, rows, columns) == pytest.approx((expected, expected))


def test_artifact_is_verified_before_use(job: Job, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    checks = artifacts.verify(Path(job.artifact), job.planned, cache, full=True)
    assert all(check.ok for check in checks), checks


def test_weights_are_near_the_base(job: Job, base: Path) -> None:
    """Untrained codebooks of 2 x 256 entries for 8 weights: no better than 2^-(16/8), no worse
    than two bits rounded to nearest (0.6)."""
    stored = load_file(Path(job.artifact) / "model.safetensors")
    original = load_file(base / "model.safetensors")
    for name in inspection.decoder_linears(inspection.read_headers(base)):
        weight = original[f"{name}.weight"].float()
        error = (foreign.plain_aqlm(stored, name) - weight).norm() / weight.norm()
        assert 0.25 < float(error) < 0.6, name


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_engine_computes_the_weights_as_they_are_stored(
    dtype: str, apart: float, job: Job, base: Path
) -> None:
    """fp32: sums in another order; bf16: activations and unpacked weights rounded to 2^-9."""
    stored = load_file(Path(job.artifact) / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in inspection.decoder_linears(inspection.read_headers(base)):
        plain.get_submodule(name).weight.data = foreign.plain_aqlm(stored, name)
    expected = _checkpoint.logits(plain, IDS).log_softmax(-1)[:-1]
    engine = runtime.load(Path(job.artifact), job.planned.cell, dtype)
    found = next(iter(engine.score([IDS], [len(IDS) - 1]))).logprobs
    assert float((found - expected).abs().max()) < apart
    told = engine.observed()
    assert told["stores_in"] == told["computes_in"] == {"aqlm": 14}
    assert told["kernel"] == "torch"
    whole = sum(each.nelement() for each in plain.parameters())
    assert engine.memory().weights_bytes < 0.75 * whole * getattr(torch, dtype).itemsize


def test_head_that_the_library_would_make_up_is_caught(job: Job) -> None:
    """`lm_head.weight` among what is not quantized: transformers looks for `lm_head`."""
    with pytest.raises(InvalidEngine, match=r"3 tensors.*lm_head\.codebooks"):
        loading.pretrained(Path(job.artifact), {"dtype": torch.float32})


def test_two_passes_are_equal_with_all_threads(job: Job) -> None:
    """The library's own product on a CPU adds from all threads at once, without a lock."""
    model = aqlm.load(Path(job.artifact), {"dtype": torch.float32})
    assert _checkpoint.logits(model, IDS).equal(_checkpoint.logits(model, IDS))


def test_without_a_path_it_says_that_qgrid_trains_none(
    make_cell: Callable[..., Cell], tmp_path: Path, base: Path
) -> None:
    made = jobs.job(make_cell, tmp_path, base, "aqlm", 2)
    said = str(aqlm.refusal(made.planned.cell))
    assert "does not train AQLM codebooks" in said
    assert "set `method.path`" in said
    with pytest.raises(Unsupported, match="does not train"):
        artifacts.build(made)


def test_checkpoint_of_another_kind_is_refused(
    make_cell: Callable[..., Cell], tmp_path: Path, base: Path, published: Path
) -> None:
    other = shutil.copytree(published, tmp_path / "other")

    def rename(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}

    foreign.configured(other, rename)
    made = foreign.job(make_cell, tmp_path, base, "aqlm", other)
    said = str(aqlm.refusal(made.planned.cell))
    assert "is `bitsandbytes-int8`, not `aqlm`" in said
