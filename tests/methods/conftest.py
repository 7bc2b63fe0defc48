"""Checkpoints that several files look at, each made once in a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qgrid.methods import _checkpoint
from qgrid.types import Cell
from tests.methods import checkpoints
from tests.methods.checkpoints import Made


@pytest.fixture(scope="session")
def made(make_cell: Callable[..., Cell], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint of the trained model and its cell: `made("hqq", 4, axis=0)`."""
    return checkpoints.maker(make_cell, tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory, tiny_random: Path) -> Path:
    """Another architecture: biases, an untied head, fp16, weights in several files."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    model.to(torch.float16).save_pretrained(folder, max_shard_size="300KB")
    _checkpoint.copy_tokenizer(tiny_random, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder
