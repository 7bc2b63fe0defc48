"""A checkpoint that somebody quantized against the base model that it is measured against.

Every tensor is there in its shape; what is not quantized equals the base's, as far as its dtype
holds it; layers of a few blocks, decoded, are near it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qgrid import layouts, models, phrases
from qgrid.published import Config
from qgrid.published._layers import Layers, block
from qgrid.published._reading import Tensors
from qgrid.types import Check
from qgrid.weights import ends, inspection

_BLOCKS = 4  # whose layers are decoded, from the first to the last
_COMPUTED = re.compile(r"(?:\.inv_freq|\.masked_bias|\.attn\.bias)$")


class Comparison:
    """The two checkpoints, and what was found about them."""

    def __init__(self, folder: Path, base: Path, config: Config) -> None:
        self._found, self._base = Tensors(folder), Tensors(base)
        self._linears = inspection.decoder_linears(self._base.headers)
        self._tied = models.tied(dict(config))
        self._parts = self._by_layer()
        quantized = {
            layer: parts
            for layer, parts in self._parts.items()
            if layouts.format_of(parts) not in layouts.PLAIN
        }
        self._layers = Layers(config, self._found, self._base, self._linears, quantized)

    def checks(self) -> tuple[Check, ...]:
        """`shapes`, and if they are right `weights` and `kept`."""
        shapes = self._check_shapes()
        if not shapes.ok:
            return (shapes,)
        return shapes, self._check_weights(), self._check_kept()

    def _by_layer(self) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {}
        for name, tensor in self._found.headers.items():
            for layer in _owners(name):
                if layer in self._linears and name != f"{layer}.bias":
                    parts.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = tensor
        return parts

    # --- shapes ----------------------------------------------------------------------------------

    def _check_shapes(self) -> Check:
        wrong = [*self._misshapen(), *self._further()]
        return _check(
            "shapes", wrong, "the tensors of the base model", f"{len(self._base.headers)} alike"
        )

    def _misshapen(self) -> Iterator[str]:
        for name, tensor in self._base.headers.items():
            layer = name.removesuffix(".weight")
            found: tuple[int, ...] | None
            if layer in self._linears:
                found = self._shape(layer)
            elif name in self._found.headers:
                found = self._found.headers[name].shape
            elif (name in ends.HEADS and self._tied) or _COMPUTED.search(name):
                continue
            else:
                found = None
            if found is None:
                yield f"{name} is missing"
            elif found != tensor.shape:
                yield f"{name} is {_times(found)}, not {_times(tensor.shape)}"

    def _shape(self, layer: str) -> tuple[int, int] | None:
        """Rows and columns of a layer as it is stored."""
        parts = self._parts.get(layer, {})
        kind = layouts.format_of(parts)
        if kind == layouts.MISSING:
            return None
        if kind in layouts.PLAIN:
            rows, columns = parts["weight"].shape
            return rows, columns
        try:
            return layouts.shape(parts, lambda part: self._found.array(f"{layer}.{part}").tobytes())
        except (
            KeyError,
            TypeError,
            ValueError,
            struct.error,
        ):  # parts of a layer, or no such parts
            return None

    def _further(self) -> Iterator[str]:
        known = self._base.headers.keys()
        for name in self._found.headers:
            inside = any(layer in self._linears for layer in _owners(name))
            if name in known or _COMPUTED.search(name) or (name in ends.HEADS and self._tied):
                continue
            if name.endswith(".bias"):  # some old files keep biases of zero
                if self._found.array(name).any():
                    yield f"{name} is not in the base"
            elif not inside:
                yield f"{name} is not in the base"

    # --- layers that are quantized ---------------------------------------------------------------

    def _check_weights(self) -> Check:
        layers = self._sampled()
        self._layers.compare(layers)
        wrong = [f"{layer} {why}" for layer, why in self._layers.wrong.items()]
        if not layers:
            wrong.append("no layer is quantized")
        return _check("weights", wrong, "decoded layers near the base model's", self._told())

    def _sampled(self) -> list[str]:
        """The quantized layers of a few blocks."""
        blocks = sorted({block(layer)[1] for layer in self._linears})
        step = max(1, (len(blocks) - 1) // max(1, _BLOCKS - 1))
        chosen = {*blocks[::step][: _BLOCKS - 1], *blocks[-1:]}
        return [layer for layer in self._layers.parts if block(layer)[1] in chosen]

    def _told(self) -> str:
        apart, scaled = self._layers.errors.values(), len(self._layers.scaled)
        if not apart:
            return "none"
        span = f"{min(apart):.2g} to {max(apart):.2g} of their size apart"
        told = f"{len(apart)} of {len(self._linears)} layers, {span}"
        return told + (f", {scaled} of them under other scales" if scaled else "")

    # --- what is not -----------------------------------------------------------------------------

    def _check_kept(self) -> Check:
        """Embedding, norms, biases, the head and layers that were left out."""
        names = [
            name
            for name in self._base.headers
            if name in self._found.headers and not self._is_quantized(name)
        ]
        changed = [name for name in names if not self._equal(name)]
        wrong = [f"{name} has other values" for name in changed if not self._layers.explain(name)]
        moved = len(changed) - len(wrong)
        told = f"{len(names)} equal" if not moved else f"{len(names) - moved} equal"
        told += f", {moved} scaled as the layers after them" if moved else ""
        return _check("kept", wrong, "what is not quantized equals the base model's", told)

    def _is_quantized(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._layers.parts

    def _equal(self, name: str) -> bool:
        import numpy as np

        found, base = self._found.array(name, ends.ROWS), self._base.array(name, ends.ROWS)
        if self._found.headers[name].dtype == self._base.headers[name].dtype:
            return bool(np.array_equal(found, base))
        return ends.near(found, base)


def _owners(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, the inner ones first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check(name: str, wrong: list[str], expected: str, good: str) -> Check:
    return Check(name, not wrong, expected, phrases.first(wrong) if wrong else good)
