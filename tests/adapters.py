"""Tiny LoRA adapters of the embedded model, trained in seconds on answers that it gets wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from qgrid import codec, demo, models
from qgrid.types import Cell, Job, Model, Slice, Slices
from qgrid.weights import inspection
from tests import jobs

STEPS = 25
TARGETS = ["q_proj", "v_proj", "down_proj"]
_LAST_LEVEL = slice(400, 424)  # of 500 items in five levels: the model knows about a fifth of them


def items() -> list[dict[str, Any]]:
    """The questions whose answers an adapter learns."""
    lines = (demo.SLICES_DIR / "arithmetic.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[_LAST_LEVEL]]


def slices(folder: Path) -> Slices:
    """A slice of these questions, to be measured."""
    path = folder / "taught.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items()))
    return Slices("taught", None, {"taught": Slice(str(path), "choice", True, None, 8)})


def train(folder: Path, quantized: bool = False, steps: int = STEPS, **changes: Any) -> Path:
    """Train an adapter on the 16-bit weights in fp32, or on NF4 ones, and save it into `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.manual_seed(0)
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if quantized:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head"],
        )
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, **arguments)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **(settings | changes)))
    # No forward pass without gradients before: bitsandbytes repacks then, and has no backward.
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    batch = _batch([_encoded(tokenizer, item) for item in items()])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(str(folder))
    return folder


def write(folder: Path, base: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """An adapter of rank 2 for the first layers of `base`, made by hand; keys may be changed."""
    import torch
    from safetensors.torch import save_file

    shapes = inspection.decoder_linears(inspection.read_headers(base))
    layers = {name: shapes[name] for name in shapes if name.endswith(("q_proj", "down_proj"))}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in layers.items():
        a, b = torch.empty(2, columns), torch.empty(rows, 2)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.normal_(0, 0.1, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.normal_(0, 0.1, generator=generator)
        if changes and changes.get("use_dora"):
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.ones(rows)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | dict(changes or {})))
    return folder


def model(adapter: Path, mode: Literal["merged", "attached"] = "merged", **changes: Any) -> Model:
    """The embedded model with an adapter."""
    plain = Model("tiny", models.EMBEDDED, None, False, False, str(adapter), None, mode)
    return replace(plain, **changes)


def job(
    make: Callable[..., Cell], store: Path, of: Model, method: str, bits: int, **changes: Any
) -> Job:
    """The artifact job of a method on the embedded model, with an adapter or without."""
    plain = jobs.job(make, store, demo.MODEL_DIR, method, bits, **changes)
    artifact_id = codec.digest([of, method, bits, changes])
    cell = replace(plain.planned.cell, model=of)
    planned = replace(plain.planned, artifact_id=artifact_id, cell=cell)
    return replace(plain, planned=planned, artifact=str(store / "artifacts" / artifact_id))


def low_rank(adapter: Path) -> dict[str, Any]:
    """By layer: what the adapter adds to its weight, computed in fp64 from its files alone."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    return {
        name.removeprefix("base_model.model."): config["lora_alpha"]
        / config["r"]
        * (tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double())
        for name in names
    }


def _encoded(tokenizer: Any, item: dict[str, Any]) -> tuple[list[int], int]:
    """Token ids of a question with its answer, and how many of them are the question's."""
    message = [{"role": "user", "content": item["prompt"]}]
    asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(asked + item["answer"])["input_ids"], len(tokenizer(asked)["input_ids"])


def _batch(rows: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    import torch

    longest = max(len(ids) for ids, _ in rows)
    shape = len(rows), longest
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for row, (ids, asked) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, asked : len(ids)] = torch.tensor(ids[asked:])
    return batch
