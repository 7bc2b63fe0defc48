"""A checkpoint that somebody quantized against the base model that it is measured against.

Every tensor is there in its shape; what is not quantized equals the base's, as far as its dtype
holds it; layers of a few blocks, decoded, are near it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import inspection, layouts, models, phrases
from qgrid.published import Config, Layer, _smoothing, family
from qgrid.published._reading import Tensors
from qgrid.types import Check

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_BLOCKS = 4  # whose layers are decoded, from the first to the last
_ROWS = 512  # of a matrix that is not quantized, spread over it
# Largest relative error of decoded weights by width: twice what rounding to nearest in groups
# of 128 leaves of a normal distribution, for GPTQ and long groups leave more; unrelated weights are
# 1.4 of their size apart, and 1 under the best scales.
_BANDS = {8: 0.06, 4: 0.35, 3: 0.6, 2: 0.9}
_LEAST = 1e-5  # of the largest value: what fp16 may have cost a small one
_ROUNDED = 2**-7  # a norm or an embedding in another 16-bit dtype than the base's
_BLOCK = re.compile(r"^(.*?\.(?:layers|h|blocks|block)\.(\d+))\.")
_HEADS = ("lm_head.weight", "output.weight")
_COMPUTED = re.compile(r"(?:\.inv_freq|\.masked_bias|\.attn\.bias)$")


class Comparison:
    """The two checkpoints, and what was found about them."""

    def __init__(self, folder: Path, base: Path, config: Config) -> None:
        self._config = config
        self._found, self._base = Tensors(folder), Tensors(base)
        self._linears = inspection.decoder_linears(self._base.headers)
        self._tied = models.tied(dict(config))
        self._parts = self._by_layer()
        self._fits: dict[str, _smoothing.Fit] = {}
        self._errors: dict[str, float] = {}

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
            elif (name in _HEADS and self._tied) or _COMPUTED.search(name):
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
        return layouts.shape(parts, lambda part: self._found.array(f"{layer}.{part}").tobytes())

    def _further(self) -> Iterator[str]:
        known = self._base.headers.keys()
        for name in self._found.headers:
            inside = any(layer in self._linears for layer in _owners(name))
            if name in known or _COMPUTED.search(name) or (name in _HEADS and self._tied):
                continue
            if name.endswith(".bias"):  # some old files keep biases of zero
                if self._found.array(name).any():
                    yield f"{name} is not in the base"
            elif not inside:
                yield f"{name} is not in the base"

    # --- layers that are quantized ---------------------------------------------------------------

    def _check_weights(self) -> Check:
        layers = self._sampled()
        wrong, smoothed = [], 0
        bands = {layer: _band(self._decode(layer)) for layer in layers}
        for layer, band in bands.items():
            if self._errors[layer] <= band:
                continue
            smoothed += 1
            if self._fits[layer].error > band or not self._accounted(layer):
                wrong.append(f"{layer} is {self._errors[layer]:.2g} of its size apart")
        if not layers:
            wrong.append("no layer is quantized")
        goal = "decoded layers near the base model's"
        return _check("weights", wrong, goal, self._told(smoothed))

    def _accounted(self, layer: str) -> bool:
        """Whether the layer's scales were taken out of something else in its block."""
        fits = self._near(layer)
        norms = [
            _smoothing.ratio(self._base.array(name), self._found.array(name))
            for name, tensor in self._base.headers.items()
            if _block(name) == _block(layer) and name in self._found.headers
            if tensor.shape == self._fits[layer].columns.shape
        ]
        others = [fit for name, fit in fits.items() if name != layer]
        return _smoothing.accounted(self._fits[layer], norms, others)

    def _near(self, name: str) -> dict[str, _smoothing.Fit]:
        """The decoded layers of the same block."""
        return {n: fit for n, fit in self._fits.items() if _block(n) == _block(name)}

    def _decode(self, layer: str) -> float:
        """Compare one layer; its width, without the scales and tables that swell a small layer."""
        rows, columns = self._linears[layer]
        kind = family(self._config)
        found = kind.weights(self._config, Layer(self._found.layer(layer), rows, columns))
        base = self._base.array(f"{layer}.weight")
        self._errors[layer] = _smoothing.apart(found, base)
        self._fits[layer] = _smoothing.fit(found, base)
        stored = sum(int(part.nbytes) for part in self._parts[layer].values())
        told: int = kind.described(self._config).bits
        return min(8 * stored / (rows * columns), told)

    def _sampled(self) -> list[str]:
        """The quantized layers of a few blocks."""
        blocks = sorted({_block(layer)[1] for layer in self._linears})
        step = max(1, (len(blocks) - 1) // max(1, _BLOCKS - 1))
        chosen = {*blocks[::step][: _BLOCKS - 1], *blocks[-1:]}
        return [
            layer
            for layer in self._linears
            if _block(layer)[1] in chosen
            and layouts.format_of(self._parts[layer]) not in layouts.PLAIN
        ]

    def _told(self, smoothed: int) -> str:
        if not self._errors:
            return "none"
        fitted = {name: self._fits[name].error for name in self._errors}
        apart = [min(error, fitted[name]) for name, error in self._errors.items()]
        span = f"{min(apart):.2g} to {max(apart):.2g} of their size apart"
        told = f"{len(apart)} of {len(self._linears)} layers, {span}"
        return told + (f", {smoothed} of them under other scales" if smoothed else "")

    # --- what is not -----------------------------------------------------------------------------

    def _check_kept(self) -> Check:
        """Embedding, norms, biases, the head and layers that were left out."""
        names = [
            name
            for name in self._base.headers
            if name in self._found.headers and not self._is_quantized(name)
        ]
        changed = [name for name in names if not self._equal(name)]
        wrong = [f"{name} has other values" for name in changed if not self._explained(name)]
        moved = len(changed) - len(wrong)
        told = f"{len(names)} equal" if not moved else f"{len(names) - moved} equal"
        told += f", {moved} scaled as the layers after them" if moved else ""
        return _check("kept", wrong, "what is not quantized equals the base model's", told)

    def _is_quantized(self, name: str) -> bool:
        layer = name.removesuffix(".weight")
        return (
            layer in self._linears
            and layouts.format_of(self._parts.get(layer, {})) not in layouts.PLAIN
        )

    def _equal(self, name: str) -> bool:
        import numpy as np

        found, base = self._found.array(name, _ROWS), self._base.array(name, _ROWS)
        if self._found.headers[name].dtype == self._base.headers[name].dtype:
            return bool(np.array_equal(found, base))
        least = _LEAST * float(np.abs(base).max(initial=0))
        return bool(np.allclose(found, base, rtol=_ROUNDED, atol=least))

    def _explained(self, name: str) -> bool:
        """Whether scales that were moved into the next layers, or out of this one, explain it.

        Of a block that was not decoded it is taken for the same as in those that were.
        """
        found, base = self._found.array(name), self._base.array(name)
        if _BLOCK.match(name) is None or base.ndim != 1:
            return False
        near = self._near(name)
        if not near:
            return any(self._errors[n] > 2 * fit.error for n, fit in self._fits.items())
        layer = name.removesuffix(".bias")
        if layer in near:
            return _smoothing.explains_bias(near[layer], found, base)
        norm = _smoothing.ratio(base, found)
        return any(_smoothing.explains(fit, norm) for fit in near.values())


def _owners(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, the inner ones first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _block(layer: str) -> tuple[str, int]:
    found = _BLOCK.match(f"{layer}.")
    return ("", 0) if found is None else (found.group(1), int(found.group(2)))


def _band(bits: float) -> float:
    return next((band for width, band in _BANDS.items() if bits >= width), _BANDS[2])


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check(name: str, wrong: list[str], expected: str, good: str) -> Check:
    return Check(name, not wrong, expected, phrases.first(wrong) if wrong else good)
