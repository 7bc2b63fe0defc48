"""Small random checkpoints of the four architectures, and tokenizers learned from a few texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qgrid.gguf import _probes

SPECIAL = ("<s>", "</s>", "<|pad|>", "<|user|>", "<|endoftext|>")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama rope": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral head_dim": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 24}),
    "qwen2 tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 theta": ("Qwen2ForCausalLM", {"rope_parameters": {"rope_theta": 1e6}}),
    "qwen3 head_dim": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 all heads": ("Qwen3ForCausalLM", {"head_dim": 16, "num_key_value_heads": 4}),
}


def texts() -> list[str]:
    """What the tokenizers learn: the fixed strings and much of what is mixed from fragments."""
    return [*_probes.FIXED, *_probes.strings(()), _probes.PROSE * 3]


def split_by(regex: str | None, digits: bool = False) -> Any:
    """A byte-level pre-tokenizer: by a regex, or GPT-2's own, single digits before it."""
    from tokenizers import Regex, pre_tokenizers

    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_only])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2


def byte_level(
    folder: Path,
    pre_tokenizer: Any,
    vocab: int = 1000,
    ignore_merges: bool = False,
    bos: bool = False,
    normalizer: Any = None,
) -> None:
    """Write a byte-level BPE tokenizer learned from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    _save(tokenizer, folder)


def pieces(folder: Path, vocab: int = 1200, all_splits: bool = True) -> None:
    """Write a SentencePiece-style tokenizer: bytes, all merges of every piece, BOS before."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.processors import TemplateProcessing

    prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence(prefix)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False, max_token_length=16, limit_alphabet=300
    )
    words = " ".join(texts()).replace("\0", "").split(" ")
    learner.train_from_iterator(words, trainer)
    learned = json.loads(learner.to_str())["model"]
    control = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names = control + sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {name: number for number, name in enumerate(names)}
    ranked = [left + right for left, right in learned["merges"]]
    merges = _all_splits(ranked, vocabulary) if all_splits else learned["merges"]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for left, right in merges],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(prefix)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    _save(tokenizer, folder, unk_token="<unk>")


def _all_splits(ranked: Sequence[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    return [
        (piece[:cut], piece[cut:])
        for piece in dict.fromkeys(ranked)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def _save(tokenizer: Any, folder: Path, **special: str) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|pad|>",
        chat_template="{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}",
        **special,
    )
    fast.save_pretrained(folder)


def model(folder: Path, architecture: str, dtype: str = "bfloat16", **changes: Any) -> None:
    """Write a random model of an architecture; its vocabulary is that of the folder's tokenizer."""
    import torch
    import transformers

    rows = 1 + max(
        [
            *json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].values(),
            *changes.pop("ids", ()),
        ]
    )
    name = architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "vocab_size": rows, **changes})
    torch.manual_seed(len(architecture))
    made = getattr(transformers, architecture)(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 1:  # norms of ones and biases of zeros would hide a mistake
                weight.add_(0.2 * torch.randn(weight.shape).to(weight.dtype))
    made.save_pretrained(folder)
