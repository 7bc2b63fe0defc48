"""The four decoders that GGUF files are made of here: sizes, tensors by name, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qgrid.contracts import Unsupported


@dataclass(frozen=True)
class Architecture:
    """How transformers' class is known to llama.cpp, and what that can express."""

    name: str  # in GGUF keys
    pairs_rotate: bool  # rotary embedding of neighbours: rows of q and k are reordered
    head_norms: bool  # RMS norm of every query and key head
    biases: tuple[str, ...]  # modules that always have a bias
    configured_biases: bool  # `attention_bias` and `mlp_bias` may add biases
    free_head_dim: bool  # heads * head_dim may differ from the hidden size


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", True, False, (), True, True),
    "MistralForCausalLM": Architecture("llama", True, False, (), False, True),
    "Qwen2ForCausalLM": Architecture("qwen2", False, False, _QKV, False, False),
    "Qwen3ForCausalLM": Architecture("qwen3", False, True, (), False, True),
}
_DEFAULT_THETA = 10000.0  # of all four in transformers
_DEFAULT_EPS = 1e-6


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretched rotary embedding: long waves are slowed down by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class Decoder:
    """Sizes and constants of one checkpoint, from its `config.json`."""

    architecture: Architecture
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    norm_eps: float
    rope_theta: float
    rope: Llama3Rope | None
    tied: bool
    biases: tuple[str, ...]  # modules of a layer that have one


def read(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a `config.json` describes.

    Raises:
        Unsupported: something that the converter does not know, by name.
    """
    architecture = _architecture(config)
    _refuse_unknown(config)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = config.get("head_dim")
    kv_heads = config.get("num_key_value_heads")
    decoder = Decoder(
        architecture=architecture,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=heads if kv_heads is None else int(kv_heads),
        head_dim=hidden // heads if head_dim is None else int(head_dim),
        vocab=int(config["vocab_size"]),
        positions=int(config["max_position_embeddings"]),
        norm_eps=float(config.get("rms_norm_eps", _DEFAULT_EPS)),
        rope_theta=_rope_theta(config),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        biases=_biases(architecture, config),
    )
    _refuse_head_dim(decoder)
    return decoder


def _architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or ["nothing"]
    if names[0] not in ARCHITECTURES:
        raise Unsupported(
            f"`architectures` in config.json is {names[0]}; GGUF files are made of "
            f"{', '.join(ARCHITECTURES)}; use another method"
        )
    return ARCHITECTURES[names[0]]


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*required, "vocab_size", "max_position_embeddings"):
        if not isinstance(config.get(key), int):
            raise Unsupported(f"config.json has no `{key}`; complete it before making a GGUF file")
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise Unsupported(f"`hidden_act` in config.json is {act}; a GGUF file can only have silu")
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method")
        raise Unsupported(
            f"the checkpoint is already quantized ({kind}); give the 16-bit checkpoint that it "
            "was made from"
        )
    if _slides(config):
        raise Unsupported(
            f"`sliding_window` in config.json is {config.get('sliding_window')} and in use; a "
            "GGUF file of this architecture attends to everything; use another method"
        )


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether some layer would see less than the whole context (defaults are transformers')."""
    kinds = config.get("layer_types")
    if kinds is not None:
        return "sliding_attention" in kinds
    mistral = config["architectures"][0].startswith("Mistral")
    if config["architectures"][0].startswith("Llama"):
        return False
    window = config.get("sliding_window", 4096)
    if window is None or not config.get("use_sliding_window", mistral):
        return False
    first = 0 if mistral else config.get("max_window_layers", 28)
    return bool(window < config["max_position_embeddings"] and first < config["num_hidden_layers"])


def _rope_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_scaling` before it; neither: plain."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_theta(config: Mapping[str, Any]) -> float:
    inside = _rope_settings(config).get("rope_theta")
    return float(config.get("rope_theta", _DEFAULT_THETA) if inside is None else inside)


def _rope(config: Mapping[str, Any]) -> Llama3Rope | None:
    settings = _rope_settings(config)
    kind = settings.get("rope_type", settings.get("type", "default"))
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and partial != 1:
        raise Unsupported(
            f"`partial_rotary_factor` in config.json is {partial}; only 1 can be converted"
        )
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise Unsupported(
            "`rope_parameters` in config.json differ by kind of layer; a GGUF file of this "
            "architecture has one kind; use another method"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise Unsupported(
            f"`rope_type` in config.json is {kind}; GGUF files are made with default or llama3; "
            "use another method"
        )
    return _llama3(settings, config)


def _llama3(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Llama3Rope:
    positions = "original_max_position_embeddings"
    known = {positions: config.get(positions), **settings}
    for key in (positions, "factor", "low_freq_factor", "high_freq_factor"):
        if known.get(key) is None:
            raise Unsupported(f"`rope_type` llama3 in config.json has no `{key}`; add it")
    return Llama3Rope(
        factor=float(known["factor"]),
        low_freq_factor=float(known["low_freq_factor"]),
        high_freq_factor=float(known["high_freq_factor"]),
        original_positions=int(known[positions]),
    )


def _biases(architecture: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if architecture.configured_biases:
        of_attention = (*_QKV, "self_attn.o_proj") if attention else ()
        of_mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") if mlp else ()
        return (*of_attention, *of_mlp)
    if attention and architecture.head_norms:
        raise Unsupported(
            "`attention_bias` in config.json is true; llama.cpp has no bias of the attention "
            f"output in {architecture.name}; use another method"
        )
    return architecture.biases


def _refuse_head_dim(decoder: Decoder) -> None:
    wide = decoder.heads * decoder.head_dim
    if wide != decoder.hidden and not decoder.architecture.free_head_dim:
        raise Unsupported(
            f"heads * `head_dim` in config.json is {wide} and `hidden_size` {decoder.hidden}; "
            f"llama.cpp needs them equal in {decoder.architecture.name}; use another method"
        )


def tensors(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor that such a checkpoint has, by its Hugging Face name, with its shape."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (decoder.vocab, decoder.hidden)
    }
    for layer in range(decoder.layers):
        found |= {f"model.layers.{layer}.{name}": size for name, size in _layer(decoder).items()}
    found["model.norm.weight"] = (decoder.hidden,)
    if not decoder.tied:
        found["lm_head.weight"] = (decoder.vocab, decoder.hidden)
    return found


def _layer(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    linears = layer_linears(decoder)
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in linears.items()}
    found |= {f"{name}.bias": (linears[name][0],) for name in decoder.biases}
    if decoder.architecture.head_norms:
        found["self_attn.q_norm.weight"] = (decoder.head_dim,)
        found["self_attn.k_norm.weight"] = (decoder.head_dim,)
    found["input_layernorm.weight"] = (decoder.hidden,)
    found["post_attention_layernorm.weight"] = (decoder.hidden,)
    return found


def layer_linears(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """The linear layers of one block: name within the block -> (rows, columns)."""
    hidden, inner = decoder.hidden, decoder.intermediate
    query, key = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def rope_factors(decoder: Decoder) -> list[float] | None:
    """What llama.cpp divides each of the head_dim / 2 rotary frequencies by; None: nothing."""
    rope = decoder.rope
    if rope is None:
        return None
    steps = range(0, decoder.head_dim, 2)
    waves = [2 * math.pi * decoder.rope_theta ** (i / decoder.head_dim) for i in steps]
    return [_slowdown(rope, rope.original_positions / wave) for wave in waves]


def _slowdown(rope: Llama3Rope, turns: float) -> float:
    """1 for waves that turn often within the original context, `factor` for the slow ones."""
    if turns > rope.high_freq_factor:
        return 1.0
    if turns < rope.low_freq_factor:
        return rope.factor
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return 1 / ((1 - share) / rope.factor + share)
