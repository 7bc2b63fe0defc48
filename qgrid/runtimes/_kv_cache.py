"""A KV cache of 8, 4 or 2 bits in transformers: made, repeated and weighed.

Groups lie within the key or value of one token: `axis_key` and `axis_value` are those that mean so
in each library. transformers' own default mixes tokens and rows of a batch in one of them, so that
a request's numbers would depend on its neighbours.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qgrid.libraries import quanto_library
from qgrid.types import Check

if TYPE_CHECKING:
    import torch

    from qgrid.types import Cell

AUTO = "auto"  # the library that has every width and compiles nothing
INTENTS = {"int8": 8, "int4": 4, "int2": 2}
WIDTHS: Mapping[str, tuple[int, ...]] = {"hqq": (8, 4, 2), "quanto": (4, 2)}
_AXES = {"hqq": 1, "quanto": 0}


@dataclass(frozen=True)
class Quantization:
    """How keys and values are held.

    The library keeps up to `residual_length` of the latest tokens in 16 or 32 bits. When they are
    that many it quantizes them, and all that is there before them once more. What is read first is
    quantized at once.
    """

    backend: str
    bits: int
    group_size: int
    residual_length: int
    search: bool = False  # hqq looks for better zeros

    @property
    def piece(self) -> int:
        """Tokens that are read at once when scoring: the library then quantizes after two pieces.

        A token sees as many exact tokens before it as when decoding after a prompt of one piece.
        """
        return self.residual_length // 2

    @property
    def protocol(self) -> str:
        """How text is scored, in words."""
        return (
            f"pieces of {self.piece} tokens; after every second piece all tokens so far are "
            f"quantized (residual_length {self.residual_length})"
        )

    def stored_bits(self, float_bits: int) -> float:
        """Bits of a stored key or value: with each group's scale and zero in `float_bits`."""
        return self.bits + 2 * float_bits / self.group_size


def wanted(cell: Cell) -> Quantization | None:
    """The cell's quantized cache; None for one of 16 bits."""
    bits = INTENTS.get(cell.kv_cache.name)
    if bits is None:
        return None
    options = cell.runtime.options
    backend = options.get("cache_backend", AUTO)
    return Quantization(
        backend="hqq" if backend == AUTO else backend,
        bits=bits,
        group_size=options.get("cache_group_size", 32),
        residual_length=options.get("residual_length", 128),
        search=options.get("cache_search", False),
    )


# --- caches --------------------------------------------------------------------------------------


def for_scoring(model: Any, asked: Quantization) -> Any:
    """An empty cache that is read into in pieces of `asked.piece` tokens."""
    return _made(model, asked, asked.piece + 1)  # so that it quantizes after every second piece


def for_decoding(model: Any, asked: Quantization) -> Any:
    """An empty cache for a prompt and the tokens that follow it one by one."""
    return _made(model, asked, asked.residual_length)


def _made(model: Any, asked: Quantization, residual: int) -> Any:
    from transformers import QuantizedCache

    if asked.backend == "quanto":
        quanto_library.library()
    axis = _AXES[asked.backend]
    made = QuantizedCache(
        asked.backend,
        model.config,
        nbits=asked.bits,
        axis_key=axis,
        axis_value=axis,
        q_group_size=asked.group_size,
        residual_length=residual,
    )
    for layer in made.layers:
        if hasattr(layer, "quantizer") and not asked.search:
            layer.quantizer = _without_search(layer.quantizer)
    return made


@functools.cache
def _without_search(quantizer: Any) -> Any:
    """hqq's quantizer as it rounds between the least and the greatest number of a group.

    Its search for better zeros stops by the mean error of all that is quantized at once, so that
    with it a request's numbers depend on its neighbours (hqq 0.2.8).
    """

    class Rounding(quantizer):  # type: ignore[misc]
        @classmethod
        def quantize(cls, tensor: torch.Tensor, **arguments: Any) -> Any:
            return super().quantize(tensor, optimize=False, **arguments)

    return Rounding


def finish(cache: Any) -> None:
    """Leave what comes next unquantized: nothing will read it."""
    for layer in cache.layers:
        layer.residual_length = math.inf


@dataclass(frozen=True)
class _Repeated:
    """Quantized rows, of which some are used, some several times."""

    held: Any
    rows: torch.Tensor


def spread(cache: Any, rows: torch.Tensor) -> Any:
    """The cache with its rows chosen and repeated; the original stays as it is."""
    made = copy.copy(cache)
    made.layers = [_spread(layer, rows) for layer in cache.layers]
    return made


def _spread(layer: Any, rows: torch.Tensor) -> Any:
    made = copy.copy(layer)
    if layer.keys.dim() == 4:  # else nothing waits to be quantized
        made.keys, made.values = layer.keys[rows], layer.values[rows]
    made._quantized_keys = _Repeated(layer._quantized_keys, rows)
    made._quantized_values = _Repeated(layer._quantized_values, rows)
    made._dequantize = functools.partial(_dequantized, layer)
    return made


def _dequantized(layer: Any, held: Any) -> torch.Tensor:
    if isinstance(held, _Repeated):
        found: torch.Tensor = _dequantized(layer, held.held)[held.rows]
        return found
    plain: torch.Tensor = layer._dequantize(held)
    return plain


# --- what is in them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """One layer's keys or values: bits of a stored number, and bytes with scales and zeros."""

    bits: float
    nbytes: int
    numbers: int


def held(cache: Any) -> list[Held]:
    """Keys and values of every layer as they are stored, the inner tensors of quantized ones."""
    return [_held(value) for layer in cache.layers for value in _stored(layer)]


def _stored(layer: Any) -> Iterator[Any]:
    for name in ("keys", "values"):
        yield getattr(layer, f"_quantized_{name}", getattr(layer, name))


def _held(value: Any) -> Held:
    if isinstance(value, _Repeated):
        return _held(value.held)
    if isinstance(value, tuple):  # hqq: codes, and a mapping with the rest
        codes, meta = value
        return _weighed(codes, (meta["scale"], meta["zero"]), math.prod(meta["shape"]))
    if hasattr(value, "_scale") and hasattr(value._data, "_data"):  # optimum-quanto
        return _weighed(value._data._data, (value._scale, value._shift), value.numel())
    return _weighed(value, (), value.numel())


def _weighed(codes: torch.Tensor, others: tuple[torch.Tensor, ...], numbers: int) -> Held:
    size = codes.numel() * codes.element_size()
    more = sum(each.numel() * each.element_size() for each in others)
    return Held(8 * size / numbers, size + more, numbers)


def check(found: Sequence[Held], asked: Quantization, where: Sequence[str]) -> Check:
    """Whether keys and values of every layer are stored in the width that was asked for.

    `where` names the caches that were looked at.
    """
    widths = sorted({each.bits for each in found})
    told = ", ".join(f"{sum(h.bits == bits for h in found)} of {bits:g} bits" for bits in widths)
    return Check(
        "kv_cache",
        bool(found) and widths == [asked.bits],
        f"keys and values of every layer in {asked.bits} bits",
        f"{f'tensors {told}' if found else 'no tensors'} ({', '.join(where)})",
    )
