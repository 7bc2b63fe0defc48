"""bitsandbytes: 4-bit codes with a line of JSON that describes them, or int8 with a scale a row."""

from __future__ import annotations

import json

from qgrid.layouts import Parts, Read

_STATE = "weight.quant_state.bitsandbytes__"  # followed by the type: nf4 or fp4


def format_of(parts: Parts) -> str | None:
    """`bitsandbytes-nf4`, `bitsandbytes-fp4` or `bitsandbytes-int8`."""
    state = _state(parts)
    if state is not None:
        return f"bitsandbytes-{state.removeprefix(_STATE)}"
    return "bitsandbytes-int8" if "SCB" in parts else None


def shape(parts: Parts, read: Read) -> tuple[int, int] | None:
    """Of int8 the weight's own; of 4 bits as the JSON says."""
    state = _state(parts)
    rows, columns = parts["weight"].shape if state is None else json.loads(read(state))["shape"]
    return int(rows), int(columns)


def _state(parts: Parts) -> str | None:
    return next((name for name in parts if name.startswith(_STATE)), None)
