"""Quantized layers of a checkpoint, decoded and held against the base's, a block at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qgrid.layouts import FLOATS
from qgrid.published import Config, Layer, _smoothing, family
from qgrid.published._nearness import Nearness, nearness
from qgrid.published._reading import Tensors
from qgrid.types import Tensor

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_BLOCK = re.compile(r"^(.*?\.(?:layers|h|blocks|block)\.(\d+))\.")


class _Undecodable(Exception):
    """The tensors of a layer do not fit each other."""


@dataclass
class Layers:
    """`linears` are rows and columns by name, `parts` the stored tensors of those quantized.

    What was decoded: `errors` relative to the base's size, `scaled` layers that are near it under
    scales that something else in their block lost, and `wrong` ones with the reason.
    """

    config: Config
    found: Tensors
    base: Tensors
    linears: Mapping[str, tuple[int, int]]
    parts: Mapping[str, Mapping[str, Tensor]]
    errors: dict[str, float] = field(default_factory=dict)
    scaled: set[str] = field(default_factory=set)
    wrong: dict[str, str] = field(default_factory=dict)
    _columns: dict[str, Array] = field(default_factory=dict)

    def compare(self, layers: list[str]) -> None:
        """Decode layers and hold them against the base's; blocks as a whole."""
        for layer in layers:
            self._first(layer)
        for layer in list(self.wrong):
            self._under_scales(layer)
        for layer in list(self.wrong):
            self._before_scales(layer)

    def _first(self, layer: str) -> None:
        try:
            found, base = self._decoded(layer)
        except _Undecodable as error:
            self.wrong[layer] = str(error)
            return
        self._columns[layer] = _smoothing.columns(found, base)
        self._settle(layer, self._near(layer, found, base))

    def _settle(self, layer: str, near: Nearness) -> None:
        self.errors[layer] = near.error
        self.wrong.pop(layer, None)
        if near.wrong is not None:
            self.wrong[layer] = near.wrong

    def _under_scales(self, layer: str) -> None:
        """Accept a layer whose scales a norm, or the columns of a later layer, account for."""
        if layer not in self._columns:
            return
        found, base = self._decoded(layer)
        for likely, _ in self._likely(layer, base):
            near = self._near(layer, found, likely)
            if near.wrong is None:
                self._settle(layer, near)
                self.scaled.add(layer)
                return

    def _before_scales(self, layer: str) -> None:
        """Accept a layer whose columns have what the rows of an earlier one have less."""
        if layer not in self._columns:
            return
        found, base = self._decoded(layer)
        near = self._near(layer, found, base * self._columns[layer])
        if near.wrong is None and any(self._lost(each, layer) for each in self.beside(layer)):
            self._settle(layer, near)
            self.scaled.add(layer)

    def _lost(self, layer: str, after: str) -> bool:
        """Whether the rows of a layer have less by what the columns of the other have more."""
        if layer in self.wrong or self.linears[layer][0] != self.linears[after][1]:
            return False
        found, base = self._decoded(layer)
        judged = (
            self._near(layer, found, likely)
            for likely, other in self._likely(layer, base)
            if other == after
        )
        return any(near.wrong is None and near.error <= self.errors[layer] for near in judged)

    def _likely(self, layer: str, base: Array) -> Iterator[tuple[Array, str | None]]:
        after = {each: self._columns[each] for each in self.beside(layer) if each != layer}
        return _smoothing.moved(base, self._norms(layer), after)

    def beside(self, name: str) -> list[str]:
        """The decoded layers of the same block."""
        return [layer for layer in self._columns if block(layer) == block(name)]

    def _norms(self, layer: str) -> list[Array]:
        """The base's norms over those that were found, of a block, where they differ."""
        found = [
            ratio
            for name, tensor in self.base.headers.items()
            if len(tensor.shape) == 1 and block(name) == block(layer)
            if name in self.found.headers and self.found.headers[name].shape == tensor.shape
            for ratio in _smoothing.lost(self.base.array(name), self.found.array(name))
        ]
        return [ratio for ratio in found if (ratio != 1).any()]

    # --- what is not quantized -------------------------------------------------------------------

    def explain(self, name: str) -> bool:
        """Whether scales of a layer in the block explain another norm, or another bias."""
        found, base = self.found.array(name), self.base.array(name)
        if _BLOCK.match(name) is None or base.ndim != 1:
            return False
        with contextlib.suppress(_Undecodable):
            return self._explains(name, found, base)
        return False

    def _explains(self, name: str, found: Array, base: Array) -> bool:
        own = name.removesuffix(".bias")
        if own in self.linears:
            if own not in self.parts:
                return False
            decoded, original = self._decoded(own)
            rows = _smoothing.rows(decoded, original)
            return _smoothing.explains_bias(rows, found, base, self.width(own))
        norms = _smoothing.lost(base, found)
        return any(
            _smoothing.explains(self._scales(each), norm, self.width(each))
            for norm in norms
            for each in sorted(self.parts, key=lambda layer: self.linears[layer])
            if block(each) == block(name) and self.linears[each][1] == len(norm)
        )

    def _scales(self, layer: str) -> Array:
        if layer not in self._columns:
            self._columns[layer] = _smoothing.columns(*self._decoded(layer))
        return self._columns[layer]

    # --- one layer -------------------------------------------------------------------------------

    def _decoded(self, layer: str) -> tuple[Array, Array]:
        kind, (rows, columns) = family(self.config), self.linears[layer]
        base = self.base.array(f"{layer}.weight")
        try:
            held = Layer(self.found.layer(layer), rows, columns)
            found = kind.weights(self.config, held)
            return found.reshape(base.shape), base
        except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
            told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise _Undecodable(f"cannot be decoded ({told})") from error

    def _near(self, layer: str, found: Array, base: Array) -> Nearness:
        parts = self.parts[layer]
        floats = "weight_scale" in parts and "weight" in parts and parts["weight"].dtype in FLOATS
        return nearness(found, base, self.width(layer), floats)

    def width(self, layer: str) -> int:
        """Bits of a code, without the scales and tables that swell a small layer."""
        rows, columns = self.linears[layer]
        stored = 8 * sum(part.nbytes for part in self.parts[layer].values())
        told: int = family(self.config).described(self.config).bits
        return min(stored // (rows * columns), told)


def block(layer: str) -> tuple[str, int]:
    """The list of blocks that something lies in, and its number in it."""
    found = _BLOCK.match(f"{layer}.")
    return ("", 0) if found is None else (found.group(1), int(found.group(2)))
