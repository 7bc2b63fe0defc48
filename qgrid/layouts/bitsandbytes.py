"""bitsandbytes: 4-bit codes with a line of JSON that describes them, or int8 with a scale a row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from qgrid.layouts import Parts, Read

FORMATS = ("bitsandbytes-nf4", "bitsandbytes-fp4", "bitsandbytes-int8")
STATE = "weight.quant_state.bitsandbytes__"  # followed by the type: nf4 or fp4


def format_of(parts: Parts) -> str | None:
    """`bitsandbytes-nf4`, `bitsandbytes-fp4` or `bitsandbytes-int8`."""
    state = _state(parts)
    if state is not None:
        return f"bitsandbytes-{state.removeprefix(STATE)}"
    return "bitsandbytes-int8" if "SCB" in parts else None


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Of int8 the weight's own; of 4 bits as the JSON says."""
    state = _state(parts)
    rows, columns = parts["weight"].shape if state is None else json.loads(read(state))["shape"]
    return int(rows), int(columns)


def codes(names: Iterable[str]) -> Iterator[str]:
    """4-bit weights: bytes in the dtype that the one who saved them chose."""
    for name in names:
        layer, state, _ = name.partition(f".{STATE}")
        if state:
            yield f"{layer}.weight"


def _state(parts: Parts) -> str | None:
    return next((name for name in parts if name.startswith(STATE)), None)
