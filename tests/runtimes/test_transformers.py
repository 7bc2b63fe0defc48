"""The transformers runtime against plain forward passes of the same model."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qgrid.contracts import InvalidEngine
from qgrid.runtimes import transformers as runtime
from qgrid.runtimes._linears import Stored
from qgrid.types import Cell, Gpu, Method
from tests.runtimes.passes import Ids, distance, plain, some_ids

Make = Callable[[str, int], tuple[Path, Cell]]


@pytest.fixture(scope="module")
def engine(tiny_random: Path, make_cell: Callable[..., Cell]) -> Iterator[runtime.Transformers]:
    loaded = runtime.load(tiny_random, make_cell(), "float32")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def model(tiny_random: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_random, dtype=torch.float32).eval()


def test_batches_and_chunks_equal_plain_forward_passes(
    engine: runtime.Transformers, model: Any, sequences: list[Ids]
) -> None:
    rng = random.Random(1)
    keep = [rng.randrange(1, len(ids)) for ids in sequences]
    keep[20:23], keep[23] = [1, 3, 2], 1299
    assert distance(engine, model, sequences, keep, []) <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 70])
def test_a_shared_prefix_equals_plain_forward_passes(
    engine: runtime.Transformers, model: Any, sequences: list[Ids], length: int
) -> None:
    rng = random.Random(2)
    keep = [rng.randrange(1, len(ids) + 1) for ids in sequences]
    keep[20:23], keep[23] = [1, 3, 2], 1300
    prefix = some_ids(random.Random(3), length)
    assert distance(engine, model, sequences, keep, prefix) <= 2e-5


def test_models_that_count_slots_get_no_gaps(
    engine: runtime.Transformers, model: Any, sequences: list[Ids], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._scorer, "_shares", False)
    keep = [1] * len(sequences)
    assert distance(engine, model, sequences, keep, some_ids(random.Random(4), 9)) <= 1e-5


def test_keep_needs_a_token_before_it(engine: runtime.Transformers) -> None:
    with pytest.raises(ValueError, match=r"`keep=3` of sequence 0 should be between 1 and 2"):
        list(engine.score([[1, 2, 3]], [3]))
    with pytest.raises(ValueError, match="between 1 and 3"):
        list(engine.score([[1, 2, 3]], [4], prefix=[5, 6]))


def test_generation_is_greedy_and_timed(engine: runtime.Transformers, model: Any) -> None:
    rng = random.Random(5)
    prompts = [some_ids(rng, length) for length in (30, 4, 17)]
    made = engine.generate(prompts, 8)
    for prompt, each in zip(prompts, made, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(plain(model, ids)[-1].argmax()))
        assert each.ids == tuple(ids[len(prompt) :])
        assert len(each.seconds) == 8
        assert all(a < b for a, b in zip((0.0, *each.seconds), each.seconds, strict=False))


def test_generation_after_a_common_beginning(engine: runtime.Transformers, model: Any) -> None:
    """The beginning is read once; the gap of padding behind it changes nothing."""
    rng = random.Random(8)
    document = some_ids(rng, 200)
    prompts = [document + some_ids(rng, length) for length in (9, 1, 30)]
    assert "past_key_values" in engine._scorer.prompt(prompts)
    for prompt, made in zip(prompts, engine.generate(prompts, 6), strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(plain(model, ids)[-1].argmax()))
        assert made.ids == tuple(ids[len(prompt) :])
    same = engine.generate([document, document], 3)
    assert same[0].ids == same[1].ids == engine.generate([document], 3)[0].ids


def test_stop_tokens_end_a_request_and_are_left_out(engine: runtime.Transformers) -> None:
    prompt = some_ids(random.Random(6), 12)
    free = engine.generate([prompt], 6)[0].ids
    stop = free[3]
    cut = free.index(stop)
    stopped = engine.generate([prompt, prompt[:5]], 6, stop=[stop])[0]
    assert stopped.ids == free[:cut]
    assert len(stopped.seconds) == cut


def test_end_of_sequence_is_ignored_without_stop(
    tiny_random: Path, make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    """A checkpoint whose settings would end or sample a reply changes nothing."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_random, folder)
    settings = {"eos_token_id": list(range(512)), "do_sample": True, "temperature": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    loaded = runtime.load(folder, make_cell(), "float32")
    assert len(loaded.generate([[5, 6, 7]], 9)[0].ids) == 9


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_memory_counts_weights_and_cache_as_held(
    tiny_random: Path, make_cell: Callable[..., Cell], dtype: str, width: int
) -> None:
    numbers = sum(t.numel() for t in load_file(tiny_random / "model.safetensors").values())
    loaded = runtime.load(tiny_random, make_cell(), dtype)
    held = loaded.memory()
    assert held.weights_bytes == pytest.approx(width * numbers, abs=1024)  # rotary frequencies
    assert held.kv_bytes_per_token == 2 * 2 * 2 * 64 * width  # K and V, layers, heads, size
    seen = loaded.observed()
    assert seen["kernels"] == {"Linear": 15}
    assert seen["stores_in"] == {"bfloat16": 14}
    assert seen["computes_in"] == {dtype: 14}
    assert seen["kv_dtype"] == dtype
    assert not seen["decompressed"]


def test_packed_weights_unpack_and_the_engine_says_so(quantized: Make) -> None:
    folder, cell = quantized("rtn", 4)
    loaded = runtime.load(folder, cell, "bfloat16")
    seen = loaded.observed()
    assert seen["stores_in"] == {"pack-quantized": 14}
    assert seen["computes_in"] == {"bfloat16": 14}
    assert seen["decompressed"]
    on_disk = (folder / "model.safetensors").stat().st_size
    assert loaded.memory().weights_bytes > 2 * on_disk


def test_packed_weights_unpack_exactly_in_fp32(quantized: Make) -> None:
    """A weight is its scale times a whole number, not rounded to bf16 on the way."""
    folder, cell = quantized("rtn", 4)
    loaded = runtime.load(folder, cell, "float32")
    linear = loaded._model.model.layers[0].mlp.up_proj
    stored = load_file(folder / "model.safetensors")
    scale = stored["model.layers.0.mlp.up_proj.weight_scale"].double().repeat_interleave(128, 1)
    whole = (linear.weight.double() / scale).round()
    assert whole.abs().max() == 8
    assert torch.equal(linear.weight.double(), whole * scale)
    assert not torch.equal(linear.weight, linear.weight.bfloat16().float())


def test_nf4_computes_in_fp32_when_asked(quantized: Make, model: Any) -> None:
    """bitsandbytes would round activations to bf16 on a CPU with AVX-512."""
    from bitsandbytes.functional import dequantize_4bit

    folder, cell = quantized("nf4", 4)
    loaded = runtime.load(folder, cell, "float32")
    dense = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    dense.load_state_dict(model.state_dict())
    for name, module in loaded._model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32
            dense.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, state)
    ids = some_ids(random.Random(7), 50)
    found = next(loaded.score([ids], [49])).logprobs
    assert float((found - plain(dense, ids)[:-1]).abs().max()) <= 1e-4
    seen = loaded.observed()
    assert seen["kernels"]["Linear4bit"] == 14
    assert not seen["decompressed"]


def test_bitsandbytes_is_counted_with_its_states(quantized: Make) -> None:
    folder, cell = quantized("int8", 8)
    loaded = runtime.load(folder, cell, "bfloat16")
    linears = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 256 * 512)
    embedding = 512 * 256
    scales = 4 * 2 * (256 * 2 + 128 * 2 + 2 * 512 + 256)
    expected = linears + 2 * embedding + scales
    assert loaded.memory().weights_bytes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (("none", 16), ("rtn", 4)),  # the label says quantized, the weights are not
        (("rtn", 4), ("none", 16)),
        (("rtn", 4), ("rtn", 3)),
        (("nf4", 4), ("int8", 8)),
    ],
)
def test_an_engine_that_differs_from_the_request_is_invalid(
    tiny_random: Path,
    make_cell: Callable[..., Cell],
    quantized: Make,
    stored: tuple[str, int],
    asked: tuple[str, int],
) -> None:
    folder = tiny_random if stored[0] == "none" else quantized(*stored)[0]
    cell = make_cell(method=Method(asked[0], {}), bits=asked[1])
    with pytest.raises(InvalidEngine, match="but the engine holds 14 x"):
        runtime.load(folder, cell, "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_planned_gpu_that_is_absent_is_invalid(
    tiny_random: Path, make_cell: Callable[..., Cell]
) -> None:
    gpu = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)
    with pytest.raises(InvalidEngine, match="torch finds none"):
        runtime.load(tiny_random, make_cell(gpu=gpu), "float32")


def test_unknown_options_are_refused(tiny_random: Path, make_cell: Callable[..., Cell]) -> None:
    cell = make_cell()
    odd = dataclasses.replace(cell.runtime, options={"attention": "sdpa"})
    with pytest.raises(TypeError, match="attention"):
        runtime.load(tiny_random, dataclasses.replace(cell, runtime=odd), "float32")


def test_layers_of_one_format_in_several_widths_are_counted_together() -> None:
    found = {Stored("hqq", 4): 25, Stored("hqq", 8): 7, Stored("bfloat16", 16): 3}
    assert runtime._by_format(found) == {"hqq": 32, "bfloat16": 3}
