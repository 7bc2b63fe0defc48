"""The byte-level BPE tokenizer: Qwen2's pre-tokenizer, our own merges and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qgrid.demo.lexicon import CITIES, CODE_WORDS, COLOURS, DAYS, JOBS, TOPICS
from qgrid.demo.problems import LEVELS, draw
from qgrid.demo.prose import prose
from qgrid.demo.seeds import Split, document_rng
from qgrid.demo.tasks import SAMPLED, conversation

VOCAB_SIZE = 1536
PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (PAD, SYSTEM, USER, ASSISTANT, END)
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content']"
    " + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ANSWER_WORDS = (*CODE_WORDS, *CITIES, *JOBS, *COLOURS, *DAYS, *TOPICS, "good", "bad")
CORPUS_SEED_START = 1 << 39  # training seeds that the training run itself never reaches
CORPUS_DOCUMENTS = 6000


def corpus() -> Iterator[str]:
    """Training texts that the merges are learned from: half prose, half tasks."""
    names = list(SAMPLED)
    for i in range(CORPUS_DOCUMENTS):
        rng = document_rng(Split.TRAIN, CORPUS_SEED_START + i)
        yield prose(rng, 600)
        maker = SAMPLED[names[i % len(names)]]
        if names[i % len(names)] != "long_context":
            problem = draw(maker, rng, rng.choice(LEVELS), Split.TRAIN)
            yield from (text for _, text in conversation(problem))
        yield from rng.sample(ANSWER_WORDS, 6)


def build() -> Tokenizer:
    """Learn the tokenizer; the result depends on the generator alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, positions: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def load(folder: Path) -> Tokenizer:
    """The saved tokenizer, without transformers."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
