"""The runtime `openai` against real servers: vLLM's and llama.cpp's, with the embedded model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgrid import models
from qgrid.contracts import Engine, InvalidEngine, NoLogprobs
from qgrid.measure import prose, quality, speed, truncated
from qgrid.measure.encoding import Encoder
from qgrid.running import stages
from qgrid.runtimes import llama_cpp, openai
from qgrid.runtimes import transformers as reference
from qgrid.runtimes._openai_engine import Remote
from qgrid.types import Cell, Method, Prose, Runtime, Slice, Slices, StageResult, Workload
from tests.runtimes.conftest import LLAMA_CPP
from tests.servers import cells, real
from tests.servers.processes import Served
from tests.servers.real import FOLDER, TINY, VOCAB

# bf16 keeps 8 bits of a number, and two programs round at other places. Measured on 2,040 tokens of
# prose: 0.0050 nats between the log-probabilities of a token, 0.00006 between their means.
NOISE, NOISE_OF_MEAN = 0.01, 0.001
RESOURCES = "package:qgrid.demo/slices"


pytestmark = pytest.mark.slow


@pytest.fixture
def remote(make_cell: Callable[..., Cell]) -> Iterator[Callable[..., Remote]]:
    """The engine of a server: `remote(vllm, top_logprobs=5)`."""
    opened: list[Remote] = []

    def load(server: Served, **more: Any) -> Remote:
        cell = cells.cell(make_cell, server.base_url, more, model=TINY)
        opened.append(openai.load(FOLDER, cell, "bfloat16"))
        return opened[-1]

    yield load
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def known(make_cell: Callable[..., Cell]) -> reference.Transformers:
    """The same model in transformers, computing in bf16."""
    cell = make_cell(model=TINY)
    return reference.load(FOLDER, cell, "bfloat16")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(FOLDER)


@pytest.fixture(scope="module")
def windows(encoder: Encoder) -> prose.Windows:
    text = models.resource(f"{RESOURCES}/prose.txt").read_text(encoding="utf-8")
    return prose.cut(encoder.prose(text, 2048), 256)


@pytest.fixture(scope="module")
def prompts(encoder: Encoder) -> list[list[int]]:
    lines = models.resource(f"{RESOURCES}/structured.jsonl").read_text().splitlines()[:30]
    return encoder.prompts([json.loads(line)["prompt"] for line in lines], chat=True)


SLICES = Slices(
    "few",
    Prose(f"{RESOURCES}/prose.txt", 1024),
    {
        "knowledge": Slice(f"{RESOURCES}/knowledge.jsonl", "choice", True, 12, 8),
        "structured": Slice(f"{RESOURCES}/structured.jsonl", "json", True, 12, 24),
    },
)


def job(make_cell: Callable[..., Cell], stage: Any, out: Path, server: Served, **more: Any) -> Any:
    changes: dict[str, Any] = {"model": TINY, "slices": SLICES, "context": 256}
    if "workload" in more:
        changes["workload"] = more.pop("workload")
    cell = cells.cell(make_cell, server.base_url, more, **changes)
    folder = cells.artifact(cell, FOLDER, out / "artifact")
    base = folder if more.get("baseline_url") else None
    return cells.job(stage, cell, folder, out / str(stage), base)


def full_rows(engine: Engine, windows: prose.Windows) -> list[torch.Tensor]:
    found: dict[int, list[torch.Tensor]] = {}
    for each in prose.rows(engine, windows):
        found.setdefault(each.sequence, []).append(each.logprobs.double())
    return [torch.cat(found[window]) for window in range(len(windows))]


def test_vllm_tells_what_transformers_computes(
    vllm: Served,
    remote: Callable[..., Remote],
    known: reference.Transformers,
    windows: prose.Windows,
) -> None:
    """Perplexity over HTTP is the perplexity of transformers in the same dtype."""
    top = truncated.told(remote(vllm), windows)
    assert not top.failed
    ours = prose.Tokens.empty(windows)
    prose.collect(ours, windows, prose.rows(known, windows), None)
    theirs = truncated.alone(top)
    apart = np.abs(theirs.nll - ours.nll)
    assert 0 < apart.mean() < NOISE
    assert abs(theirs.nll.mean() - ours.nll.mean()) < NOISE_OF_MEAN
    ratio = prose.perplexity(theirs).value / prose.perplexity(ours).value
    assert ratio == pytest.approx(1.0, abs=2 * NOISE_OF_MEAN)


def test_the_bound_is_below_the_full_divergence_of_the_same_server(
    vllm: Served,
    remote: Callable[..., Remote],
    known: reference.Transformers,
    encoder: Encoder,
) -> None:
    """Lists of the whole vocabulary give the full divergence; shorter ones less."""
    text = models.resource(f"{RESOURCES}/prose.txt").read_text(encoding="utf-8")
    part = prose.cut(encoder.prose(text, 96), 48)
    rows = full_rows(known, part)
    base = [(ids.numpy(), values.numpy()) for values, ids in (each.topk(VOCAB) for each in rows)]
    whole = truncated.told(remote(vllm, top_logprobs=VOCAB, deadline_seconds=60.0), part)
    few = truncated.told(remote(vllm, top_logprobs=20), part)
    for n, each in enumerate(rows):
        cell = torch.full_like(each, float("nan"))
        cell[np.arange(len(cell))[:, None], whole.ids[n]] = torch.from_numpy(whole.logprobs[n])
        full = (each.exp() * (each - cell)).sum(1).numpy()
        equal = truncated.divergence(*base[n], whole.ids[n], whole.logprobs[n])
        ids, logprobs = (each[:, :20] for each in base[n])
        bound = truncated.divergence(ids, logprobs, few.ids[n], few.logprobs[n])
        assert np.isfinite(full).all() and full.mean() > 0
        assert equal == pytest.approx(full, abs=3e-6)
        assert (bound <= full + 3e-6).all()
        assert 0.1 * full.mean() < bound.mean() < full.mean()


def same(first: Any, second: Any) -> float:
    """Share of equal replies."""
    return float(np.mean([one.ids == other.ids for one, other in zip(first, second, strict=True)]))


def test_vllm_replies_as_transformers_does(
    vllm: Served,
    remote: Callable[..., Remote],
    known: reference.Transformers,
    prompts: list[list[int]],
    encoder: Encoder,
) -> None:
    """A near tie may fall either way in bf16; a wrong prompt would change every reply."""
    ours = [known.generate([ids], 24, encoder.stops)[0] for ids in prompts]
    assert same(remote(vllm).generate(prompts, 24, encoder.stops), ours) >= 0.9
    by_text = remote(vllm, prompts="text").generate(prompts, 24, encoder.stops)
    assert same(by_text, ours) >= 0.9


def test_a_server_is_its_own_baseline_and_another_one_is_compared(
    vllm: Served, make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    alone = quality.measure(job(make_cell, "quality", tmp_path / "alone", vllm))
    assert {m for m, _ in cells.values(alone)} == {"ppl", "accuracy", "answer_logprob"}
    other = {"baseline_url": vllm.base_url, "baseline_model": "tiny"}
    paired = quality.measure(job(make_cell, "quality", tmp_path / "paired", vllm, **other))
    found = cells.values(paired)
    assert found["ppl", None] == pytest.approx(cells.values(alone)["ppl", None], rel=NOISE_OF_MEAN)
    assert abs(found["ln_ppl_ratio", None]) < NOISE_OF_MEAN
    assert 0 <= found["kld_topk_mean", None] + 1e-6 < NOISE_OF_MEAN
    assert found["same_top_p", None] > 0.98
    assert not {name for name, _ in found if name.startswith("kld_")} - {"kld_topk_mean"}


def test_vllm_is_asked_by_ids_and_known_by_its_words(
    vllm: Served, remote: Callable[..., Remote]
) -> None:
    engine = remote(vllm)
    seen = engine.observed()
    assert (seen["prompts"], seen["logprobs"], seen["top_logprobs"]) == ("ids", "echo", 20)
    assert seen["server"]["owned_by"] == "vllm"
    assert seen["server"]["system_fingerprint"].startswith("vllm-")
    assert seen["tokenizer_asked_by"] == "tokenize"
    assert engine.positions == 1024
    assert engine.endpoint.extra == {"ignore_eos": True}
    assert all(check.ok for check in engine.checks())
    assert (engine.memory(), engine.kernels()) == (None, {})
    with pytest.raises(InvalidEngine, match="served_model"):
        remote(vllm, model="another")


def test_another_tokenizer_than_vllm_has_is_invalid(
    vllm: Served, make_cell: Callable[..., Cell], tiny_random: Path
) -> None:
    cell = cells.cell(make_cell, vllm.base_url, {})
    with pytest.raises(InvalidEngine, match="served_tokenizer"):
        openai.load(tiny_random, cell, "bfloat16")


@pytest.mark.parametrize("name", ["vllm", "llama"])
def test_a_real_server_is_timed(
    name: str,
    request: pytest.FixtureRequest,
    make_cell: Callable[..., Cell],
    tmp_path: Path,
) -> None:
    server = request.getfixturevalue(name)
    workload = Workload("test", 32, 8, (1, 4), 2, 5)
    result = speed.measure(job(make_cell, "speed", tmp_path, server, workload=workload))
    found = cells.values(result)
    for level in ("concurrency=1", "concurrency=4"):
        assert found["failed_requests", level] == 0
        assert found["output_throughput", level] > 0
    assert "wrong_length" not in result.observed
    assert "other_prompt_length" not in result.observed
    assert "cached_prompt_tokens" not in result.observed
    assert not {"resident_weights_bytes", "peak_memory_bytes"} & {metric for metric, _ in found}


def test_llama_cpp_replies_as_its_library(
    llama: Served,
    gguf_folder: Path,
    remote: Callable[..., Remote],
    make_cell: Callable[..., Cell],
    prompts: list[list[int]],
    encoder: Encoder,
) -> None:
    runtime = Runtime("llama_cpp", "float32", "float32", None, LLAMA_CPP)
    cell = make_cell(model=TINY, method=Method("gguf", {}), runtime=runtime)
    engine = llama_cpp.load(gguf_folder, cell, "float32")
    ours = [engine.generate([ids], 24, encoder.stops)[0] for ids in prompts]
    engine.close()
    assert same(remote(llama).generate(prompts, 24, encoder.stops), ours) >= 0.9
    by_text = remote(llama, prompts="text").generate(prompts, 24, encoder.stops)
    assert same(by_text, ours) >= 0.9


def test_llama_cpp_tells_no_log_probabilities_of_a_prompt(
    llama: Served,
    remote: Callable[..., Remote],
    make_cell: Callable[..., Cell],
    tmp_path: Path,
) -> None:
    """It takes `echo` and ignores it, which must not pass for an echo."""
    engine = remote(llama)
    seen = engine.observed()
    assert (seen["prompts"], seen["logprobs"]) == ("ids", "none")
    assert engine.endpoint.extra == {"ignore_eos": True, "cache_prompt": False}
    assert engine.positions == 1024
    with pytest.raises(NoLogprobs, match="no log-probabilities of a prompt"):
        list(engine.score([[1, 2, 3]], [2]))
    result = quality.measure(job(make_cell, "quality", tmp_path, llama))
    assert set(cells.values(result)) == {("accuracy", "structured")}
    assert set(result.observed["left_out"]) == {"knowledge", "prose"}


def test_a_real_server_that_is_killed_in_the_middle_of_a_load(
    gguf_folder: Path, make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    """What it answered before is kept, what it did not is counted, and the stage ends."""
    workload = Workload("test", 32, 200, (4,), 2, 5, rounds=6, deadline_seconds=20.0)
    with real.llama(gguf_folder, tmp_path) as server:
        wanted = job(make_cell, "speed", tmp_path, server, workload=workload)
        results: list[StageResult] = []
        stage = threading.Thread(target=lambda: results.append(stages.run(wanted)), daemon=True)
        stage.start()
        time.sleep(6)
        assert stage.is_alive(), "the load was over before the server was killed"
        server.kill()
        stage.join(120)
    assert not stage.is_alive()
    (result,) = results
    failed = [m.value for m in result.measurements if m.metric == "failed_requests"]
    assert sum(failed) > 0 or (
        result.failure is not None and "no connection" in str(result.failure)
    )
