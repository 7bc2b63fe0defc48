"""What the warm parent imports, so that its children need not: libraries by distribution."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from qgrid import codec, registry
from qgrid.lora import adapters
from qgrid.types import Job

# Distribution -> modules that a stage using it would otherwise import in each child.
MODULES: dict[str, tuple[str, ...]] = {
    "torch": ("torch", "numpy.ma", "numpy.ctypeslib", "safetensors.torch"),
    "transformers": (
        "transformers.modeling_utils",
        "transformers.generation.utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ),
    "qgrid": (
        "qgrid.running.stages",
        "qgrid.weights.artifacts",
        "qgrid.weights.building",
        "qgrid.envs",
        "qgrid.measure.quality",
        "qgrid.measure.speed",
        "jsonschema",
    ),
    "compressed-tensors": (
        "compressed_tensors.linear.compressed_linear",
        "transformers.quantizers.quantizer_compressed_tensors",
        "multiprocessing.synchronize",
    ),
    "llama-cpp-python": ("llama_cpp",),
    "gguf": ("gguf", "gguf.tensor_mapping"),
    "accelerate": ("accelerate",),
    "peft": ("peft",),
    "bitsandbytes": (
        "bitsandbytes",
        "transformers.quantizers.quantizer_bnb_4bit",
        "transformers.quantizers.quantizer_bnb_8bit",
        "transformers.integrations.bitsandbytes",
    ),
    "vllm": (  # of no kind of device; its workers' modules are the child's to import
        "vllm.engine.arg_utils",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.executor.uniproc_executor",
        "vllm.v1.core.sched.scheduler",
        "vllm.model_executor.model_loader",
        "vllm.model_executor.models.llama",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    ),
    "llmcompressor": (
        "llmcompressor.modifiers.quantization",
        "llmcompressor.modifiers.gptq",
        "llmcompressor.modifiers.transform.awq",
        "llmcompressor.modeling.moe.gpt_oss",
    ),
}
OWN = ("torch", "transformers")  # of qgrid itself: tokenizers, and the arithmetic of quality
BASE = ("qgrid",)  # imported before the first job; the rest when a job needs it


def needs(path: Path) -> tuple[str, tuple[str, ...]]:
    """The stage of a job file and what to import for it: distributions and model modules."""
    try:
        job = codec.loads(Job, path.read_bytes())
        cell = job.planned.cell
        runtime = registry.runtime(cell.runtime.name).LOADS.packages
        method = registry.support(cell.method).packages
    except Exception:  # noqa: BLE001 - a user's module may fail in any way; the child reports it
        return "artifact", ()
    own = () if job.stage == "speed" else OWN
    used = dict.fromkeys((*own, *runtime, *method, *adapters.packages(cell.model)))
    return job.stage, (*(name for name in used if name in MODULES), *_model_module(job))


def _model_module(job: Job) -> Iterator[str]:
    """The transformers module of the artifact's architecture."""
    with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
        config = json.loads((Path(job.artifact) / "config.json").read_text(encoding="utf-8"))
        name = f"transformers.models.{config['model_type']}.modeling_{config['model_type']}"
        if "transformers" in sys.modules and importlib.util.find_spec(name) is not None:
            yield name
