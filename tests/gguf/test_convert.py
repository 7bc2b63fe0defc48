"""The converter: tensors against an independent expectation, logits against transformers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qgrid import demo
from qgrid.gguf import _library, convert
from qgrid.weights import inspection
from tests.gguf import checkpoints

IDS = [(i * i + 7 * i) % 900 for i in range(200)]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def expected_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{part}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{part}"


def expected_rows(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Llama's query and key rows: one of each half of a head by turns, written as a loop."""
    if config["model_type"] not in {"llama", "mistral"} or not (
        "q_proj" in name or "k_proj" in name
    ):
        return tensor
    size = config["head_dim"]
    order = []
    for start in range(0, len(tensor), size):
        for i in range(size // 2):
            order += [start + i, start + size // 2 + i]
    return tensor[order]


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_every_byte_of_every_tensor(
    made: dict[str, Path], variant: str, dtype: Any, tmp_path: Path
) -> None:
    source, out = made[variant], tmp_path / "model.gguf"
    convert.convert(source, out, dtype)
    config = json.loads((source / "config.json").read_text())
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    expected = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        rows = expected_rows(name, tensor, config)
        kind = narrow if rows.dim() > 1 else torch.float32
        expected[expected_name(name)] = (tuple(rows.shape), raw_bytes(rows.to(kind)))
    found = {
        tensor.name: (tuple(int(n) for n in tensor.shape)[::-1], tensor.data.tobytes())
        for tensor in GGUFReader(out).tensors
    }
    if variant == "llama rope":
        found.pop("rope_freqs.weight")
    assert found == expected


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def divergence(source: Path, file: Path, narrow: torch.dtype) -> float:
    """Mean KL in nats, from transformers with rounded matrices to llama.cpp."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(weight.to(narrow).float())
        reference = model(torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    with _library.model(file) as loaded:
        rows = [torch.from_numpy(part) for part in _library.logits(loaded, IDS, 2)]
    found = torch.cat(rows).double().log_softmax(-1)
    assert reference.exp().max(-1).values.mean() > 3 / reference.shape[1]  # not a flat model
    return float((reference.exp() * (reference - found)).sum(-1).mean())


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_logits_are_those_of_transformers(
    made: dict[str, Path], variant: str, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    convert.convert(made[variant], out, "F16")
    assert divergence(made[variant], out, torch.float16) <= 1e-5


def test_llama3_rope_factors_are_those_of_transformers(
    made: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    convert.convert(made["llama rope"], out, "F16")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(out).tensors}
    model = AutoModelForCausalLM.from_pretrained(made["llama rope"])
    stretched = model.model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16)
    factors = torch.from_numpy(stored["rope_freqs.weight"].copy())
    assert torch.allclose(plain / factors, stretched, rtol=1e-6, atol=0)
    assert {1.0, 8.0} < set(factors.tolist())  # short, long and some waves between
    assert all(math.isfinite(x) and 1 <= x <= 8 for x in factors.tolist())


def test_sizes_are_written(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    convert.convert(made["qwen3 head_dim"], out, "BF16")
    found = {key: field.contents() for key, field in GGUFReader(out).fields.items()}
    expected = {
        "general.architecture": "qwen3",
        "general.file_type": 32,
        "qwen3.vocab_size": 1000,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 10000.0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_older_configs_give_the_same_file(
    made: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(made["llama rope"], checkpoint, dirs_exist_ok=True)
    convert.convert(checkpoint, tmp_path / "new.gguf", "F16")
    config = json.loads((checkpoint / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (checkpoint / "config.json").write_text(json.dumps(config))
    convert.convert(checkpoint, tmp_path / "old.gguf", "F16")
    assert (tmp_path / "old.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


def test_a_sharded_checkpoint_beside_a_second_copy(checkpoint: Path, tmp_path: Path) -> None:
    convert.convert(checkpoint, tmp_path / "one.gguf", "F16")
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = f"model-0000{number % 2 + 1}-of-00002.safetensors"
        weight_map[name] = file
        shard = checkpoint / file
        save_file({**(load_file(shard) if shard.is_file() else {}), name: tensor}, shard)
    index = {"weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, checkpoint / "consolidated.safetensors")
    convert.convert(checkpoint, tmp_path / "two.gguf", "F16")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_a_stored_copy_of_a_tied_head_is_left_out(made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["qwen2 tied"], source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    convert.convert(source, tmp_path / "model.gguf", "F16")
    assert "output.weight" not in [t.name for t in GGUFReader(tmp_path / "model.gguf").tensors]


def test_names_cover_every_linear_layer(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("llama biases", "qwen3 head_dim"):
        source, out = made[name], tmp_path / f"{name}.gguf"
        convert.convert(source, out, "F16")
        names = convert.tensor_names(json.loads((source / "config.json").read_text()))
        linears = set(inspection.decoder_linears(inspection.read_headers(source)))
        head = {"lm_head"} if name == "llama biases" else set()
        assert set(names) == linears | head | {"model.embed_tokens"}
        stored = {tensor.name for tensor in GGUFReader(out).tensors}
        assert {f"{tensor}.weight" for tensor in names.values()} <= stored


def test_a_failure_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.gguf"
    convert.convert(checkpoint, out, "F16")
    before = out.read_bytes()
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"][5, 7] = 1e5  # BF16 can, F16 cannot; the head is written last
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"`output\.weight` has 1 values beyond"):
        convert.convert(checkpoint, out, "F16")
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
    convert.convert(checkpoint, out, "BF16")
    assert out.read_bytes() != before


def test_rounding_of_a_32_bit_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Ties, denormal and special values as torch rounds them."""
    tensors = {n: t.float() for n, t in load_file(checkpoint / "model.safetensors").items()}
    seed, shape = torch.Generator().manual_seed(0), tensors["lm_head.weight"].shape
    bits = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=seed)
    bits[0, :4] = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF])
    tensors["lm_head.weight"] = bits.view(torch.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    convert.convert(checkpoint, tmp_path / "model.gguf", "BF16")
    stored = {t.name: t.data for t in GGUFReader(tmp_path / "model.gguf").tensors}
    found = torch.frombuffer(bytearray(stored["output.weight"].tobytes()), dtype=torch.bfloat16)
    expected = tensors["lm_head.weight"].to(torch.bfloat16).flatten()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_memory_is_that_of_one_tensor(tmp_path: Path, traced: None) -> None:
    out = tmp_path / "model.gguf"
    convert.convert(demo.MODEL_DIR, out, "F32")  # what is imported and cached stays out
    tracemalloc.reset_peak()
    start, _ = tracemalloc.get_traced_memory()
    convert.convert(demo.MODEL_DIR, out, "F32")
    _, peak = tracemalloc.get_traced_memory()
    largest = 4 * 1536 * 256
    assert peak - start < 4 * largest < out.stat().st_size / 2


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from qgrid import demo; from qgrid.gguf import convert, parity;"
        "assert convert.refusal(demo.MODEL_DIR) is None;"
        "print([m for m in ('torch', 'transformers', 'llama_cpp', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
