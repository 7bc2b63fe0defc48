"""Hugging Face transformers on CPU and CUDA: the reference runtime."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from qgrid import registry
from qgrid.contracts import Generation, Memory, Scores, Unsupported
from qgrid.libraries import gptq_kernels
from qgrid.runtimes import (
    _checkpoint_model,
    _kv_cache,
    _kv_refusals,
    _linear_kernels,
    _linears,
    _storage,
)
from qgrid.runtimes._kv_used import Used
from qgrid.runtimes._piecewise import PieceScorer
from qgrid.runtimes._scoring import Scorer, slides
from qgrid.types import RuntimeSupport

if TYPE_CHECKING:
    import torch

    from qgrid.types import Cell, Check, KvCache

LOADS = RuntimeSupport(
    loads=dict.fromkeys(("cpu", "cuda"), _linears.formats()),
    kv_cache=dict.fromkeys(("cpu", "cuda"), ("auto16", *_kv_cache.INTENTS)),
    packages=("transformers", "torch", "compressed-tensors", "bitsandbytes", "accelerate"),
    adapters=_linears.adapted(),
)
_OF_A_CACHE = ("cache_backend", "cache_group_size", "residual_length", "cache_search")
_PAD = 0  # any valid id: padded slots are masked
_PROBED = 8  # tokens of the first forward pass
_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # of one padded forward pass


@dataclass(frozen=True)
class Options:
    """Options of this runtime."""

    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]
    kernel: str = gptq_kernels.AUTO  # of a native checkpoint; see `qgrid.libraries.gptq_kernels`
    cache_backend: Literal["auto", "hqq", "quanto"] = "auto"  # of a quantized KV cache, as the rest
    cache_group_size: PositiveInt = 32
    residual_length: PositiveInt = 128
    cache_search: bool = False


def refusal(cell: Cell) -> str | None:
    """Why the cell's kernel or adapter cannot be had for its artifact, or its KV cache."""
    made = registry.support(cell.method).produces[cell.bits]
    kernel = cell.runtime.options.get("kernel", gptq_kernels.AUTO)
    objection = gptq_kernels.refusal(kernel, made, cell.bits, cell.gpu)
    return objection or _checkpoint_model.refused_adapter(cell) or _kv_refusals.refusal(cell)


def more_packages(cell: Cell) -> tuple[str, ...]:
    """The library of a quantized KV cache."""
    return _kv_refusals.packages(cell)


def kv_bits(cell: Cell) -> float:
    """Bits of a stored key or value while timing, its share of scales and zeros included."""
    asked = _kv_cache.wanted(cell)
    if asked is None:
        return cell.kv_cache.bits
    return asked.stored_bits(32 if cell.runtime.speed_dtype == "float32" else 16)


def baseline_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of a 16-bit cell with a 16-bit cache, which have no kernel and no cache to choose."""
    plain = {field.name: field.default for field in fields(Options)}
    return {
        key: value if plain.get(key, MISSING) is MISSING else plain[key]
        for key, value in options.items()
    }


def settled_options(options: Mapping[str, Any], kv_cache: KvCache) -> Mapping[str, Any]:
    """A cache that is not quantized has no library, groups or search."""
    if kv_cache.name in _kv_cache.INTENTS:
        return options
    plain = {field.name: field.default for field in fields(Options)}
    return {key: plain[key] if key in _OF_A_CACHE else each for key, each in options.items()}


class Transformers:
    """A loaded causal language model (an `Engine`)."""

    def __init__(
        self,
        loaded: _checkpoint_model.Loaded,
        dtype: str,
        options: Options,
        cache: _kv_cache.Quantization | None = None,
    ) -> None:
        self._model = model = loaded.model
        self._dtype = dtype
        self._arrived = loaded.arrived
        self._checks = loaded.checks
        self._device: torch.device = next(model.parameters()).device
        self._cache = cache
        self._kv_dtype, self._kv_held = _probe_cache(model, cache)
        self._used = None if cache is None else Used(cache)
        tokens = _BATCH_TOKENS[self._device.type]
        self._scorer: Scorer | PieceScorer
        if cache is None:
            self._scorer = Scorer(model, tokens, not slides(model.config), _PAD)
        else:
            assert self._used is not None
            self._used.note("loading", self._kv_held)
            self._scorer = PieceScorer(model, cache, tokens, _PAD, self._used)
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
        made = [_until(row, seconds, frozenset(stop)) for row in rows]
        if self._used is not None:
            self._used.generated(prompt["past_key_values"], [len(each.ids) for each in made])
        return made

    def memory(self) -> Memory:
        """See `Engine.memory`; the first forward pass has already unpacked what it unpacks."""
        kv_bytes = sum(each.nbytes for each in self._kv_held) // _PROBED
        return Memory(_storage.resident_bytes(self._model), kv_bytes)

    def kernels(self) -> Mapping[str, int]:
        """See `Engine.kernels`."""
        return _storage.classes(self._model)

    def observed(self) -> Mapping[str, Any]:
        """See `Engine.observed`. `computes_in` differs from `stores_in` where weights unpack."""
        import torch

        now = _storage.histogram(self._model)
        return {
            **_linear_kernels.facts(self._model, self._dtype, self._device.type),
            "device": _device_name(self._device),
            "device_kind": self._device.type,
            "kernels": dict(self.kernels()),
            "stores_in": _by_format(self._arrived),
            "computes_in": _by_format(now),
            "decompressed": _narrowest(now) > _narrowest(self._arrived) < 16,
            "resident_dtypes": _storage.dtypes(self._model),
            "compute_dtype": self._dtype,
            "kv_dtype": self._kv_dtype,
            **self._cache_facts(),
            "attn_implementation": self._model.config._attn_implementation,
            "threads": torch.get_num_threads(),
        }

    def checks(self) -> Sequence[Check]:
        """See `Engine.checks`: `load` has raised already for what differs otherwise."""
        layers = _linear_kernels.kernels(self._model, self._dtype)
        used = () if self._used is None else (self._used.check(),)
        return (*self._checks, *_linear_kernels.checks(layers, self._options.kernel), *used)

    def kv_rows(self) -> tuple[int, int] | None:
        """See `Engine`; None with a cache of 16 bits."""
        return None if self._used is None else self._used.rows

    def close(self) -> None:
        """Free the model's memory."""
        import gc

        import torch

        del self._scorer, self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _cache_facts(self) -> Mapping[str, Any]:
        if self._cache is None:
            return {}
        return {
            "kv_cache": {**vars(self._cache), "stored": sorted({h.bits for h in self._kv_held})},
            "kv_protocol": self._cache.protocol,
        }

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)


def load(artifact: Path, cell: Cell, dtype: str) -> Transformers:
    """Load the checkpoint in `artifact`, computing in `dtype`.

    Raises:
        InvalidEngine: the device or the storage of the weights is not what the cell says.
        Unsupported: the library does not have the kernel for these weights, or the KV cache for
            this model.
    """
    options = Options(**cell.runtime.options)
    loaded = _checkpoint_model.load(artifact, cell, dtype, options)
    cache = _kv_cache.wanted(cell)
    if cache is not None and slides(loaded.model.config):
        raise Unsupported(_kv_refusals.sliding(cell))
    return Transformers(loaded, dtype, options, cache)


def _by_format(found: Mapping[_linears.Stored, int]) -> dict[str, int]:
    """Layers of each format, whatever their widths."""
    counted: dict[str, int] = {}
    for each, count in found.items():
        counted[each.format] = counted.get(each.format, 0) + count
    return counted


def _narrowest(found: Mapping[_linears.Stored, int]) -> int:
    return min((each.bits for each in found), default=16)  # GPT-2 has no linears, but Conv1D


def _probe_cache(
    model: Any, asked: _kv_cache.Quantization | None
) -> tuple[str, list[_kv_cache.Held]]:
    """The cache's dtype, and what it holds after `_PROBED` tokens.

    The first forward pass is the one in which packed weights unpack.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache() if asked is None else _kv_cache.for_decoding(model, asked)
    with torch.inference_mode():
        ids = torch.full((1, _PROBED), _PAD, device=next(model.parameters()).device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if asked is not None:
        return f"int{asked.bits} ({asked.backend})", _kv_cache.held(cache)
    dtype = str(cache.layers[0].keys.dtype).removeprefix("torch.")
    return dtype, _kv_cache.held(cache)


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
