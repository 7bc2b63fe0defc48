"""Fixtures that several parts share: a small random model and cells about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in a worker

import pytest

from qgrid import config, registry
from qgrid.files import HashCache
from qgrid.hydra_entry import PLUGINS
from qgrid.planning import choices, plan
from qgrid.planning.facts import Facts
from qgrid.types import Cell, Gpu, KvCache, Method, Model, PlannedCell, Runtime, Slices, Workload

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = [
    "red",
    "green",
    "blue",
    "amber",
    "cold",
    "warm",
    "north",
    "south",
    "bridge",
    "river",
    "seven",
    "eleven",
    "paper",
    "stone",
]


def write_tokenizer(folder: Path, vocab: int = 512) -> None:
    """A byte-level BPE tokenizer with a chat template, learned from a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"{a} {b} {a}{b}" for a in WORDS for b in WORDS]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT
    )
    fast.save_pretrained(folder)


def write_model(folder: Path, seed: int = 0, vocab: int = 512, **changes: Any) -> None:
    """A random Llama in bf16 whose predictions are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes))).to(torch.bfloat16)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_random(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (hidden 256, vocabulary 512) and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_random")
    write_model(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_cell() -> Callable[..., Cell]:
    """Build a cell: `make_cell(context=128, bits=4, ...)`; keywords replace fields."""

    def make(**changes: Any) -> Cell:
        fields: dict[str, Any] = {
            "model": Model("tiny", "qgrid/tiny", None, False, False),
            "method": Method("none", {}),
            "bits": 16,
            "runtime": Runtime(
                "transformers", "float32", "bfloat16", 1, {"attn_implementation": "sdpa"}
            ),
            "gpu": Gpu("cpu", "cpu", "", None, 8.0, None, 1),
            "kv_cache": KvCache("auto16", 16),
            "calibration": None,
            "slices": Slices("test", None, {}),
            "workload": Workload("test", 16, 8, (1, 2), 2, 5),
            "context": 128,
            "seed": 0,
        }
        return Cell(**(fields | changes))

    return make


@pytest.fixture(autouse=True)
def _names_as_installed() -> Iterator[None]:
    """Plugins that a test installed are forgotten when they are gone from the path."""
    yield
    registry.names.cache_clear()


@pytest.fixture
def searchpath() -> list[Path]:
    """Further configuration folders; a test appends its own."""
    return []


@pytest.fixture
def compose(searchpath: list[Path]) -> Iterator[config.Compose]:
    """Hydra's own composition of a configuration."""
    import hydra

    if str(PLUGINS) not in sys.path:
        sys.path.insert(0, str(PLUGINS))
    with hydra.initialize_config_dir(str(config.root("conf")), version_base="1.3"):

        def one(lines: Sequence[str]) -> config.Composed:
            own = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in searchpath)}]"]
            return config.composed(
                hydra.compose("config", [*own, *lines], return_hydra_config=True)
            )

        yield one


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """What a plan looks up, remembered in a folder of the test's own."""
    return Facts(HashCache(tmp_path / "hashes.json"))


@pytest.fixture
def planned(compose: config.Compose, facts: Facts) -> Callable[..., list[PlannedCell]]:
    """The plan of a grid: `planned("method=rtn,gptq", "bits=4")`."""

    def build(*overrides: str) -> list[PlannedCell]:
        reader = choices.Reader()
        grid = config.expand(compose, config.parse(overrides, None))
        return plan.build((reader.choice(values) for values in grid), facts)

    return build
