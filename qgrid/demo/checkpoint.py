"""Checkpoints of a training run, and the export of one as a model folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from qgrid.demo import tokenizer as tokenizers
from qgrid.demo.network import Network, Shape


def write_aside(path: Path, text: str) -> None:
    """Write a text file in one step."""
    aside = path.with_name(path.name + ".aside")
    aside.write_text(text)
    aside.replace(path)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint in one step."""
    aside = path.with_name(path.name + ".aside")
    torch.save(state, aside)
    aside.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint (tensors and plain values only)."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def bf16_weights(network: Network) -> dict[str, Tensor]:
    """The weights under their published names, rounded to bf16."""
    state = network.state_dict()
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}


def llama_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json for the shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(tokenizers.END),
        "pad_token_id": tokenizer.token_to_id(tokenizers.PAD),
        "dtype": "bfloat16",
    }


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model folder, each file in one step, the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(network.model.shape, tokenizer)
    ends = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    generation = {"do_sample": False, "bos_token_id": None, **ends}
    write_aside(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_aside(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    tokenizers.save(tokenizer, folder, network.model.shape.positions)
    aside = folder / "model.safetensors.aside"
    save_file(bf16_weights(network), aside, metadata={"format": "pt"})
    aside.chmod(0o644)
    aside.replace(folder / "model.safetensors")


def read_network(folder: Path) -> Network:
    """The exported model as a `Network` in fp32."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        positions=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
    )
    network = Network(shape)
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return network


def shape_state(shape: Shape) -> dict[str, Any]:
    """A shape as plain values, for a checkpoint."""
    return asdict(shape)
