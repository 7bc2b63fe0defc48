"""Models that are not a plain Llama: sliding windows, capped attention, odd configurations."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qgrid.contracts import InvalidEngine
from qgrid.runtimes import transformers as runtime
from qgrid.runtimes._scoring import slides
from qgrid.types import Cell
from tests.runtimes.passes import Ids, distance, some_ids


def test_sliding_windows_are_seen_where_the_text_model_is_a_part() -> None:
    from transformers import Gemma3Config, LlamaConfig, MistralConfig, Qwen2Config

    assert not slides(LlamaConfig())
    assert not slides(MistralConfig(sliding_window=None))
    assert not slides(Qwen2Config(use_sliding_window=False))
    assert slides(MistralConfig(sliding_window=16))
    assert slides(Gemma3Config(text_config={"num_hidden_layers": 6}))


@pytest.fixture
def load_random(
    tmp_path: Path, make_cell: Callable[..., Cell]
) -> Callable[[Any], runtime.Transformers]:
    """The engine of a random model with the given configuration."""

    def make(config: Any) -> runtime.Transformers:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
        return runtime.load(tmp_path, make_cell(), "float32")

    return make


SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.2,
}


def test_a_sliding_window_equals_plain_forward_passes(
    load_random: Callable[[Any], runtime.Transformers], sequences: list[Ids]
) -> None:
    from transformers import MistralConfig

    loaded = load_random(MistralConfig(**SMALL, sliding_window=16, pad_token_id=None))
    keep = [min(3, len(ids) - 1) for ids in sequences]
    prefix = some_ids(random.Random(9), 30)
    assert distance(loaded, loaded._model, sequences, keep, prefix) <= 2e-5


def test_a_pad_token_outside_the_vocabulary_is_not_used(
    tiny_random: Path, make_cell: Callable[..., Cell], sequences: list[Ids], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_random, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": -1}))
    loaded = runtime.load(folder, make_cell(), "float32")
    assert [len(each.ids) for each in loaded.generate(sequences[:3], 4)] == [4, 4, 4]


def test_capped_attention_is_refused_where_it_would_be_left_out(
    load_random: Callable[[Any], runtime.Transformers],
) -> None:
    """Scaled dot product attention of transformers drops the cap without a word."""
    from transformers import Gemma2Config

    with pytest.raises(InvalidEngine, match=r"set `runtime\.attn_implementation=eager`"):
        load_random(Gemma2Config(**SMALL, attn_logit_softcapping=50.0))
    assert load_random(Gemma2Config(**SMALL, attn_logit_softcapping=None)).observed()


def test_a_model_without_linears_is_observed(
    load_random: Callable[[Any], runtime.Transformers],
) -> None:
    from transformers import GPT2Config

    loaded = load_random(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2))
    assert not loaded.observed()["decompressed"]
