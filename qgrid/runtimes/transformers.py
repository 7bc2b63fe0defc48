"""Hugging Face transformers on CPU and CUDA: the reference runtime."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qgrid import gptq_kernels, models, registry
from qgrid.contracts import Generation, InvalidEngine, Memory, Scores, Unsupported
from qgrid.device import compute_threads
from qgrid.runtimes import _linear_kernels, _storage
from qgrid.runtimes._scoring import Scorer, slides
from qgrid.types import RuntimeSupport

if TYPE_CHECKING:
    import torch

    from qgrid.types import Cell, Check

_FORMATS = (
    "safetensors-16bit",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "gptq",
    "awq",
    "bitsandbytes-nf4",
    "bitsandbytes-int8",
)
LOADS = RuntimeSupport(
    loads={"cpu": _FORMATS, "cuda": _FORMATS},
    kv_cache={"cpu": ("auto16",), "cuda": ("auto16",)},
    packages=("transformers", "torch", "compressed-tensors", "bitsandbytes", "accelerate"),
)
_PAD = 0  # any valid id: padded slots are masked
_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # of one padded forward pass


@dataclass(frozen=True)
class Options:
    """Options of this runtime."""

    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]
    kernel: str = gptq_kernels.AUTO  # of a native checkpoint; see `qgrid.gptq_kernels`


def refusal(cell: Cell) -> str | None:
    """Why the cell's kernel cannot be had for its artifact."""
    made = registry.support(cell.method).produces[cell.bits]
    kernel = cell.runtime.options.get("kernel", gptq_kernels.AUTO)
    return gptq_kernels.refusal(kernel, made, cell.bits, cell.gpu.kind)


class Transformers:
    """A loaded causal language model (an `Engine`)."""

    def __init__(
        self, model: Any, dtype: str, arrived: Mapping[_storage.Stored, int], options: Options
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._arrived = arrived
        self._device: torch.device = next(model.parameters()).device
        self._kv_dtype, self._kv_bytes = _probe_cache(model)
        tokens = _BATCH_TOKENS[self._device.type]
        self._scorer = Scorer(model, tokens, not slides(model.config), _PAD)
        self._options = options

    def score(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int], prefix: Sequence[int] = ()
    ) -> Iterator[Scores]:
        """See `Engine.score`."""
        return self._scorer.score(sequences, keep, prefix)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] = ()
    ) -> list[Generation]:
        """See `Engine.generate`."""
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop) if stop else None,
            pad_token_id=_PAD,
        )
        clock = _Clock(self._synchronize)
        begin = time.perf_counter()
        prompt = self._scorer.prompt(prompts)
        with torch.inference_mode():
            output = self._model.generate(
                **prompt,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        seconds = [moment - begin for moment in clock.moments]
        rows = output[:, prompt["input_ids"].shape[1] :].tolist()
        return [_until(row, seconds, frozenset(stop)) for row in rows]

    def memory(self) -> Memory:
        """See `Engine.memory`; the first forward pass has already unpacked what it unpacks."""
        return Memory(_storage.resident_bytes(self._model), self._kv_bytes)

    def kernels(self) -> Mapping[str, int]:
        """See `Engine.kernels`."""
        return _storage.classes(self._model)

    def observed(self) -> Mapping[str, Any]:
        """See `Engine.observed`. `computes_in` differs from `stores_in` where weights unpack."""
        import torch

        now = _storage.histogram(self._model)
        layers = _linear_kernels.kernels(self._model, self._dtype)
        return {
            **_linear_kernels.facts(layers, self._dtype, self._device.type),
            "device": _device_name(self._device),
            "device_kind": self._device.type,
            "kernels": dict(self.kernels()),
            "stores_in": {each.format: count for each, count in self._arrived.items()},
            "computes_in": {each.format: count for each, count in now.items()},
            "decompressed": _narrowest(now) > _narrowest(self._arrived) < 16,
            "resident_dtypes": _storage.dtypes(self._model),
            "compute_dtype": self._dtype,
            "kv_dtype": self._kv_dtype,
            "attn_implementation": self._model.config._attn_implementation,
            "threads": torch.get_num_threads(),
        }

    def checks(self) -> Sequence[Check]:
        """See `Engine.checks`: `load` has raised already for what differs otherwise."""
        layers = _linear_kernels.kernels(self._model, self._dtype)
        return _linear_kernels.checks(layers, self._options.kernel)

    def close(self) -> None:
        """Free the model's memory."""
        import gc

        import torch

        del self._scorer, self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)


def load(artifact: Path, cell: Cell, dtype: str) -> Transformers:
    """Load the checkpoint in `artifact`, computing in `dtype`.

    Raises:
        InvalidEngine: the device or the storage of the weights is not what the cell says.
        Unsupported: the library does not have the kernel for these weights.
    """
    import torch
    from transformers import GenerationConfig

    options = Options(**cell.runtime.options)
    _quiet()
    _require_device(cell)
    if cell.gpu.kind == "cpu":
        torch.set_num_threads(compute_threads(cell.runtime.threads))
    model = _model(artifact, cell, dtype, options)
    _require_attention(model.config, options)
    model.generation_config = GenerationConfig()  # greedy, and nothing that the checkpoint adds
    arrived = _storage.arrived(model, _checkpoint_dtype(artifact))
    require_storage(arrived, cell)
    _compute_in(model, dtype)
    return Transformers(model, dtype, arrived, options)


def _model(artifact: Path, cell: Cell, dtype: str, options: Options) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    arguments = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": options.attn_implementation,
        "device_map": {"": "cuda:0" if cell.gpu.kind == "cuda" else "cpu"},
        "local_files_only": True,
        **models.load_options(cell.model),
        **gptq_kernels.asked(artifact, options.kernel, dtype),
    }
    try:
        return AutoModelForCausalLM.from_pretrained(artifact, **arguments).eval()
    except (ValueError, ImportError, NotImplementedError) as error:
        if options.kernel == gptq_kernels.AUTO:
            raise
        first = str(error).strip().partition("\n")[0]
        raise Unsupported(
            f"`runtime.kernel={options.kernel}` cannot be had for these weights here: {first}"
        ) from error


def require_storage(arrived: Mapping[_storage.Stored, int], cell: Cell) -> None:
    """Compare how the linears arrived with what the cell asks for.

    Raises:
        InvalidEngine: a quantized cell without quantized linears, another width, or the reverse.
    """
    quantized = {each: count for each, count in arrived.items() if 0 < each.bits < 16}
    seen = ", ".join(f"{count} x {each.format}" for each, count in arrived.items())
    if cell.bits >= 16 and quantized:
        raise InvalidEngine(f"16-bit weights were asked for, but the engine holds {seen}")
    if cell.bits < 16 and not any(each.bits == cell.bits for each in quantized):
        raise InvalidEngine(
            f"method `{cell.method.name}` with `bits={cell.bits}` was asked for, "
            f"but the engine holds {seen}"
        )


def _narrowest(found: Mapping[_storage.Stored, int]) -> int:
    return min((each.bits for each in found), default=16)  # GPT-2 has no linears, but Conv1D


def _checkpoint_dtype(artifact: Path) -> str | None:
    """The dtype in which the files hold what is not quantized."""
    config = json.loads((artifact / "config.json").read_text())
    parts = (config.get("text_config", {}), config)
    named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((str(each) for each in named if each is not None), None)


def _quiet() -> None:
    """Silence what libraries print at every load or at every layer of every forward pass."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _require_device(cell: Cell) -> None:
    import torch

    if cell.gpu.kind == "cuda" and not torch.cuda.is_available():
        raise InvalidEngine(f"`gpu={cell.gpu.name}` is a CUDA device, but torch finds none here")


def _compute_in(model: Any, dtype: str) -> None:
    """Make layers of bitsandbytes and gptqmodel compute in `dtype`.

    The checkpoint's own setting would win otherwise, and with AVX-512 bitsandbytes rounds
    activations and scales to bf16 on a CPU whatever the dtype: fp32 quality must not pass there.
    gptqmodel would round scale times code to fp16.
    """
    import torch

    module: Any
    for module in _storage.linears(model).values():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = getattr(torch, dtype)
            module.compute_type_is_set = True
            module.weight.quant_state.dtype = getattr(torch, dtype)  # else unpacked in bf16
            if dtype == "float32":
                module.support_avx512bf16_for_cpu = False
        elif gptq_kernels.is_kernel(module) and gptq_kernels.computes_exactly(module, dtype):
            module.scales = module.scales.float()


def _require_attention(config: Any, options: Options) -> None:
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and options.attn_implementation == "sdpa":
        raise InvalidEngine(
            "the model caps its attention logits, which `runtime.attn_implementation=sdpa` leaves "
            "out; set `runtime.attn_implementation=eager`"
        )


def _probe_cache(model: Any) -> tuple[str, int]:
    """Run the first forward pass (packed weights unpack now): KV dtype and bytes per token."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    length = 8
    with torch.inference_mode():
        ids = torch.full((1, length), _PAD, device=next(model.parameters()).device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return str(held[0].dtype).removeprefix("torch."), total // length


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _until(row: Sequence[int], seconds: Sequence[float], stop: frozenset[int]) -> Generation:
    """A request's tokens before the first stop token."""
    length = next((i for i, token in enumerate(row) if token in stop), len(row))
    return Generation(tuple(row[:length]), tuple(seconds[:length]))


class _Clock:
    """Notes the time of every generated token; never stops anything."""

    def __init__(self, synchronize: Any) -> None:
        self.moments: list[float] = []
        self._synchronize = synchronize

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        import torch

        self._synchronize()
        self.moments.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
