"""Columns of size and memory."""

from __future__ import annotations

from collections.abc import Sequence

from qgrid.metrics import METRICS
from qgrid.report import numbers
from qgrid.report.columns import POOL, UNPACKED, Column, Text, nothing, plain
from qgrid.report.rows import Row


def build(every: Sequence[Row]) -> list[Column]:
    """Sizes on disk, then what is held in memory: what is needed apart from what is set aside."""
    return [
        *_bytes(every, "size_on_disk_bytes", ("size",)),
        *plain(every, "size", "bits_per_weight", ("bits per", "weight")),
        *plain(every, "size", "linear_bits_per_weight", ("of the", "linears")),
        *_bytes(every, "resident_weights_bytes", ("weights", "in memory"), unpacked=UNPACKED),
        *_bytes(every, "activation_peak_bytes", ("activa-", "tions")),
        *_bytes(every, "kv_pool_bytes", ("KV", "pool")),
        *_bytes(every, "reserved_bytes", ("all", "reserved"), suffix=POOL),
        *plain(every, "size", "max_concurrency", ("requests", "in pool")),
        *_peak(every),
        *(_kv_bytes(every) if len({row.planned.cell.kv_cache.name for row in every}) > 1 else ()),
    ]


def _kv_bytes(every: Sequence[Row]) -> list[Column]:
    return plain(every, "size", "kv_bytes_per_token", ("KV bytes", "a token"))


def _peak(every: Sequence[Row]) -> list[Column]:
    """The peak where it is a need: an engine with a KV pool has as much as it was told to take."""
    return _bytes(
        [row for row in every if not has_pool(row)],
        "peak_memory_bytes",
        ("peak", "memory"),
        unpacked=UNPACKED,
    )


def has_pool(row: Row) -> bool:
    """Whether the engine set memory aside for its KV cache."""
    return row.get("kv_pool_bytes") is not None


def _bytes(
    every: Sequence[Row],
    metric: str,
    head: tuple[str, ...],
    unpacked: str = "",
    suffix: str = "",
) -> list[Column]:
    """A column in one unit, with marks; of other rows than `every` it says nothing."""
    found = [m.value for row in every if (m := row.get(metric)) is not None]
    unit, scale = numbers.byte_unit(found)
    told = {row.planned.cell_id for row in every}

    def of(row: Row) -> Text:
        measured = row.get(metric)
        if measured is None or row.planned.cell_id not in told:
            return nothing(row)
        mark = (unpacked if row.is_decompressed else "") + suffix
        return Text(f"{measured.value / scale:.2f}{mark}", hint=f"{measured.value:,.0f} bytes")

    return [Column("size", (*head, unit), METRICS[metric].definition, of)] if found else []
