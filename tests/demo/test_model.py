"""The shipped weights and tokenizer: sizes, loading, agreement with transformers, scores."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qgrid.demo import MODEL_DIR, SLICES_DIR, checkpoint
from qgrid.demo import tokenizer as tokenizers
from qgrid.demo.network import Segment
from qgrid.demo.rows import Encoder
from qgrid.demo.sensitivity import read_items, reply_row, rounded, score_items, summary
from qgrid.demo.tasks import SLICES

FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "train_log.jsonl",
    "scores.json",
}
TEXTS = ("The code of Anna is lamp.", "a  b\n\n\tc", "12345", "don't", "日本 wörld", "")


@cache
def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODEL_DIR / "config.json").read_text())
    return found


@cache
def encoder() -> Encoder:
    return Encoder(tokenizers.load(MODEL_DIR))


def test_folder_is_complete_and_small() -> None:
    assert {path.name for path in MODEL_DIR.iterdir()} == FILES
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 16e6


def test_dimensions_suit_every_quantized_format() -> None:
    assert config()["head_dim"] == 64
    assert config()["num_attention_heads"] % config()["num_key_value_heads"] == 0
    assert config()["num_attention_heads"] > config()["num_key_value_heads"]
    assert config()["max_position_embeddings"] >= 4096
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.isfinite(tensor).all()
            assert tensor.ndim == 1 or tensor.shape[1] % 256 == 0, name


@torch.no_grad()
@pytest.mark.parametrize("length", [40, 300])
def test_transformers_computes_the_same_logits(length: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    network = checkpoint.read_network(MODEL_DIR)
    ids = torch.tensor(encoder().text((SLICES_DIR / "prose.txt").read_text()[:4000])[:length])
    hidden = network(ids, torch.arange(length), [Segment(1, length)])
    expected = model(ids[None]).logits[0]
    torch.testing.assert_close(network.logits(hidden), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(text: str) -> None:
    loaded = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded(text).input_ids == encoder().text(text)


def test_tokenizer_is_split_as_qwen2_does() -> None:
    found = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    assert found["normalizer"] == {"type": "NFC"}
    assert found["model"]["type"] == "BPE"
    split, byte_level = found["pre_tokenizer"]["pretokenizers"]
    assert (split["type"], split["behavior"]) == ("Split", "Isolated")
    assert split["pattern"] == {"Regex": tokenizers.QWEN2_REGEX}
    assert (byte_level["add_prefix_space"], byte_level["use_regex"]) == (False, False)
    digits = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")).encode("2024").tokens
    assert digits == ["2", "0", "2", "4"]


def test_special_tokens_and_ends_are_explicit() -> None:
    loaded = AutoTokenizer.from_pretrained(MODEL_DIR)
    settings = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False
    assert loaded("a").input_ids == encoder().text("a")
    assert (loaded.eos_token, loaded.pad_token) == (tokenizers.END, tokenizers.PAD)
    assert loaded.eos_token_id == config()["eos_token_id"]
    assert loaded.pad_token_id == config()["pad_token_id"]
    assert len(loaded) == config()["vocab_size"]
    for text in tokenizers.SPECIAL:
        assert len(loaded(text).input_ids) == 1


def test_chat_template_gives_the_prompt_of_training() -> None:
    loaded = AutoTokenizer.from_pretrained(MODEL_DIR)
    turns = [{"role": "user", "content": "34+5="}]
    text = loaded.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>34+5=<|end|><|assistant|>"
    assert loaded(text).input_ids == encoder().prompt("34+5=")


def test_the_tokenizer_can_be_learned_again(tmp_path: Path) -> None:
    tokenizers.build().save(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.json").read_text() == (MODEL_DIR / "tokenizer.json").read_text()


@pytest.mark.parametrize("name", [name for name in SLICES if name != "long_context"])
def test_scores_are_those_that_are_shipped(name: str) -> None:
    shipped = json.loads((MODEL_DIR / "scores.json").read_text())["16"][name]
    items = read_items(SLICES_DIR / f"{name}.jsonl", every=5)
    found = summary(score_items(checkpoint.read_network(MODEL_DIR), encoder(), items))
    spread = (shipped["accuracy"] * (1 - shipped["accuracy"]) / len(items)) ** 0.5
    assert abs(found["accuracy"] - shipped["accuracy"]) <= 3 * spread + 0.02


def test_greedy_reply_is_what_the_forced_reply_says() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    network = checkpoint.read_network(MODEL_DIR)
    items = read_items(SLICES_DIR / "structured.jsonl", every=50)
    for item, score in zip(items, score_items(network, encoder(), items), strict=True):
        prompt = torch.tensor([encoder().prompt(item.message)])
        reply = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        expected = reply_row(encoder(), item, item.answer).ids[prompt.shape[1] :]
        assert (reply.tolist() == expected) == score.right


def test_rounding_has_as_many_values_as_bits_allow() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        groups = rounded(weight, bits).reshape(-1, 128)
        assert max(len(group.unique()) for group in groups) <= 2**bits
    assert (rounded(weight, 8) - weight).abs().max() < weight.abs().max() / 127
