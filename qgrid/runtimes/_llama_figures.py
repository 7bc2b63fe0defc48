"""Figures of a model and of a context, which llama.cpp tells in its log alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qgrid.gguf.log import LlamaError

_MIB = 2**20
_BUFFER = re.compile(r": +(\S+) (model|compute) buffer size = +([\d.]+) MiB")
_KV = re.compile(
    r"size = +([\d.]+) MiB \( *(\d+) cells,.*/(\d+) seqs\), K \((\w+)\):.*V \((\w+)\):"
)
_WIDTH = re.compile(r"n_embd_([kv])_gqa +=\s+(.+)$")
_LAYERS = re.compile(r" n_layer +=\s+(\d+)")
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers")
_LAYER = re.compile(r"layer +(\d+) assigned to device (\S+),")
_REPACKED = re.compile(r"repack tensor (\S+) with (\S+)|(amx) repack tensor (\S+) of type")
_DEVICE = re.compile(r"using device (\S+) \((.+?)\) \(")
_FLASH = re.compile(r"flash_attn +=\s+(\w+)|Flash Attention (enabled)|Flash Attention (not supp)")


@dataclass(frozen=True)
class ModelFigures:
    """What loading told: bytes by buffer name, width of keys and values summed over layers."""

    weights_bytes: dict[str, int]
    key_width: int
    value_width: int
    layers: int
    offloaded: int
    devices: dict[str, str]  # of the GPUs it uses, name -> description
    layer_devices: dict[int, str]  # layer -> `CPU`, `CUDA0`
    repacked: dict[str, str]  # tensor that was laid out for this processor -> its layout


@dataclass(frozen=True)
class ContextFigures:
    """What making a context told; `kv_bytes` counts all `cells`, rounded to 0.01 MiB."""

    kv_bytes: int
    compute_bytes: int
    cells: int
    key_type: str
    value_type: str
    flash_attention: bool


def model_figures(lines: Sequence[str], details: Sequence[str] = ()) -> ModelFigures:
    """The figures in the log of a load; `details` are its lines for debugging."""
    layers = int(_only(_LAYERS, lines)[0])
    offloaded = [match.group(1) for match in map(_OFFLOADED.search, lines) if match]
    widths = _pairs(_WIDTH, lines)
    return ModelFigures(
        weights_bytes=_buffers(lines, "model"),
        key_width=_summed(widths["k"], layers),
        value_width=_summed(widths["v"], layers),
        layers=layers,
        offloaded=int(offloaded[-1]) if offloaded else 0,
        devices=_pairs(_DEVICE, lines),
        layer_devices={int(layer): name for layer, name in _pairs(_LAYER, details).items()},
        repacked=_layouts(details, has_buffer=any("CPU_REPACK" in line for line in lines)),
    )


def _layouts(details: Sequence[str], has_buffer: bool) -> dict[str, str]:
    """Tensor -> layout, such as `q4_K_8x8` or `amx`."""
    found: dict[str, str] = {}
    for match in filter(None, map(_REPACKED.search, details)):
        tensor, layout, amx, amx_tensor = match.groups()
        found[tensor if amx is None else amx_tensor] = layout if amx is None else amx
    if has_buffer and not found:
        raise LlamaError("llama.cpp's log does not say which tensors it repacked: another version?")
    return found


def context_figures(lines: Sequence[str]) -> ContextFigures:
    """The figures in the log of making a context."""
    size, cells, streams, key_type, value_type = _only(_KV, lines)
    return ContextFigures(
        kv_bytes=round(float(size) * _MIB),
        compute_bytes=sum(_buffers(lines, "compute").values()),
        cells=int(cells) * int(streams),
        key_type=key_type,
        value_type=value_type,
        flash_attention=_flash_attention(lines),
    )


def _flash_attention(lines: Sequence[str]) -> bool:
    """As it came up: what was asked for is logged first, the outcome of a probe later."""
    found = [match for match in map(_FLASH.search, lines) if match]
    if not found:
        raise LlamaError("llama.cpp's log does not say whether flash attention is used")
    return "enabled" in found[-1].groups()


def _buffers(lines: Sequence[str], kind: str) -> dict[str, int]:
    """Bytes by buffer name; buffers of one name (of several devices or files) together."""
    total: dict[str, int] = {}
    for match in map(_BUFFER.search, lines):
        if match and match.group(2) == kind:
            name = match.group(1)
            total[name] = total.get(name, 0) + round(float(match.group(3)) * _MIB)
    return total


def _pairs(pattern: re.Pattern[str], lines: Sequence[str]) -> dict[str, str]:
    found = (match for match in map(pattern.search, lines) if match)
    return {match.group(1): match.group(2) for match in found}


def _summed(width: str, layers: int) -> int:
    """One width for every layer, or a list where they differ."""
    numbers = [int(number) for number in re.findall(r"\d+", width)]
    return numbers[0] * layers if len(numbers) == 1 else sum(numbers)


def _only(pattern: re.Pattern[str], lines: Sequence[str]) -> tuple[str, ...]:
    found = next((match for match in map(pattern.search, lines) if match), None)
    if found is None:
        raise LlamaError(f"llama.cpp's log lacks `{pattern.pattern}`: another version?")
    return found.groups()
