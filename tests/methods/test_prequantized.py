"""`method=prequantized`: somebody's file as a cell, if it is what it says and fits its base."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qgrid import codec
from qgrid.contracts import InvalidEngine, Unreachable, Unsupported
from qgrid.files import HashCache, sha256
from qgrid.gguf import convert, quantization
from qgrid.methods import prequantized
from qgrid.types import Cell, Check, Job, StageResult
from qgrid.weights import artifacts
from qgrid.weights.artifacts import BadArtifact
from tests import jobs
from tests.conftest import write_model, write_tokenizer
from tests.gguf.rewriting import rewritten

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_random: Path) -> Path:
    """A folder of files made from the random model, as a publisher would."""
    folder = tmp_path_factory.mktemp("published")
    convert.convert(tiny_random, folder / "model-BF16.gguf", "BF16")
    quantization.quantize(folder / "model-BF16.gguf", folder / "model-Q4_K_M.gguf", "Q4_K_M")
    shutil.copyfile(folder / "model-Q4_K_M.gguf", folder / "plain.gguf")
    shutil.copyfile(folder / "model-BF16.gguf", folder / "renamed-Q4_K_M.gguf")
    return folder


@pytest.fixture
def make(tmp_path: Path, tiny_random: Path, make_cell: Callable[..., Cell]) -> Make:
    """The artifact job of a file: `make(path)`; its width is the file's unless given."""

    def job(
        path: Path | str, model: Path = tiny_random, bits: int | None = None, **more: Any
    ) -> Job:
        checked = codec.convert(
            prequantized.Options, jobs.options("prequantized", path=str(path), **more)
        )
        options = codec.plain(checked)
        width = prequantized.option_bits(options) if bits is None else bits
        made = jobs.job(make_cell, tmp_path / "store", model, "prequantized", width or 4)
        method = replace(made.planned.cell.method, options=options)
        cell = replace(made.planned.cell, method=method)
        return replace(made, planned=replace(made.planned, cell=cell))

    return job


def named(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def built(job: Job) -> StageResult:
    return artifacts.build(job)


@pytest.mark.parametrize(
    ("name", "bits"), [("model-Q4_K_M.gguf", 4), ("plain.gguf", 4), ("model-BF16.gguf", 16)]
)
def test_file_becomes_an_artifact(
    name: str, bits: int, published: Path, make: Make, tmp_path: Path
) -> None:
    job = make(published / name)
    assert job.planned.cell.bits == bits
    assert prequantized.refusal(job.planned.cell) is None
    assert prequantized.mismatch(job.planned.cell) is None
    result = built(job)
    assert all(check.ok for check in result.checks if check.fatal), result.checks
    told = {"shapes", "weights", "constants", "vocabulary", "gguf_tokenizer", "types"}
    assert told <= named(result.checks).keys()
    linked = Path(job.artifact) / "model.gguf"
    assert linked.is_symlink()
    assert linked.resolve() == (published / name).resolve()
    cache = HashCache(tmp_path / "hashes.json")
    checks = artifacts.verify(Path(job.artifact), job.planned, cache, full=True)
    assert all(check.ok for check in checks if check.fatal), checks


def test_file_is_known_by_its_content(published: Path, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    path = published / "plain.gguf"
    known = prequantized.identity({"path": str(path)}, cache)
    assert known == {"sha256": sha256(path)}
    assert known == prequantized.identity({"path": str(published / "model-Q4_K_M.gguf")}, cache)


def test_file_that_is_no_such_type_is_found_before_any_work(published: Path, make: Make) -> None:
    job = make(published / "renamed-Q4_K_M.gguf")
    said = str(prequantized.mismatch(job.planned.cell))
    assert "is no Q4_K_M: the file calls itself BF16" in said
    assert "model.layers.0.self_attn.q_proj is BF16" in said
    with pytest.raises(InvalidEngine, match="calls itself BF16"):
        built(job)


def test_accepted_file_is_measured_as_it_is(
    published: Path, make: Make, tmp_path: Path, tiny_random: Path
) -> None:
    path = tmp_path / "mine-Q4_K_M.gguf"
    quantization.quantize(published / "model-BF16.gguf", path, "Q8_0")
    job = make(path, accept_fallback=True)
    assert prequantized.mismatch(job.planned.cell) is None
    told = named(built(job).checks)["types"]
    assert not told.ok
    assert not told.fatal
    assert "14 Q8_0 in linear layers" in told.actual


def test_swapped_tokenizer_is_caught_and_the_part_named(
    published: Path, make: Make, tmp_path: Path, tiny_random: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_random, base)
    jobs.swap_tokenizer(base)
    with pytest.raises(BadArtifact, match=r"check `vocabulary`.*token"):
        built(make(published / "plain.gguf", model=base))


def test_file_of_another_model_is_caught(published: Path, make: Make, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_model(other, intermediate_size=768)
    write_tokenizer(other)
    message = r"check `shapes`.*ffn_gate\.weight is 512 x 256, not 768 x 256"
    with pytest.raises(BadArtifact, match=message):
        built(make(published / "plain.gguf", model=other))


def test_file_with_more_layers_is_caught(published: Path, make: Make, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_model(other, num_hidden_layers=1)
    write_tokenizer(other)
    with pytest.raises(BadArtifact, match=r"check `shapes`.*blk\.1\.\S+ is not in the base"):
        built(make(published / "plain.gguf", model=other))


def test_torn_file_is_refused(published: Path, make: Make, tmp_path: Path) -> None:
    torn = tmp_path / "torn-Q4_K_M.gguf"
    torn.write_bytes((published / "plain.gguf").read_bytes()[:-200])
    said = str(prequantized.refusal(make(torn).planned.cell))
    assert "is no whole file" in said
    assert "its header says" in said
    with pytest.raises(Unsupported, match="is no whole file"):
        built(make(torn))


def test_part_of_a_split_file_is_refused(published: Path, make: Make, tmp_path: Path) -> None:
    part = tmp_path / "model-Q4_K_M-00001-of-00003.gguf"
    rewritten(published / "plain.gguf", part, lambda keys: keys.update({"split.count": 3}))
    said = str(prequantized.refusal(make(part).planned.cell))
    assert "it is one of 3 parts; join them with `llama-gguf-split --merge`" in said


@pytest.mark.parametrize(
    ("path", "bits", "message"),
    [
        ("acme/model-GGUF/model.gguf", None, "names no GGUF type; download the file"),
        ("acme/model-GGUF/model-Q5_K_M.gguf", 4, "is Q5_K_M, of 5 bits, not `bits=4`"),
        ("model.safetensors", None, "is neither a `.gguf` file, nor a folder"),
    ],
)
def test_refusal_says_what_to_do(path: str, bits: int | None, message: str, make: Make) -> None:
    assert message in str(prequantized.refusal(make(path, bits=bits).planned.cell))


def test_type_in_the_name_tells_the_width_of_a_file_on_the_hub(tmp_path: Path) -> None:
    path = "acme/model-GGUF@abc123/model-Q6_K.gguf"
    assert prequantized.option_bits({"path": path}) == 6
    cache = HashCache(tmp_path / "hashes.json")
    assert prequantized.identity({"path": path}, cache) == {"path": path}


def test_missing_file_is_one_sentence(make: Make, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "hashes.json")
    message = re.escape("`method.path`: no file `missing-Q4_0.gguf`")
    with pytest.raises(FileNotFoundError, match=message):
        prequantized.identity({"path": "missing-Q4_0.gguf"}, cache)
    with pytest.raises(FileNotFoundError, match=message):
        built(make("missing-Q4_0.gguf"))


def test_unreachable_file_on_the_hub_is_one_sentence(make: Make) -> None:
    with pytest.raises(Unreachable, match=r"cannot be had from the hub at this moment"):
        built(make("acme/model-GGUF/model-Q4_0.gguf"))
