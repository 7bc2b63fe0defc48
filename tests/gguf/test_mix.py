"""Which type each layer gets: every rule against the library's own dry run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qgrid.gguf import mix, quantization
from qgrid.gguf.types import FILE_TYPES
from tests.gguf.bare import Sizes, write

LAYERS = (1, 5, 16, 80)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("hidden", [256, 320])
def test_every_layers_type_is_the_dry_runs(
    layers: int, kv_heads: int, hidden: int, tmp_path: Path
) -> None:
    sizes = Sizes(layers=layers, kv_heads=kv_heads, hidden=hidden, tied=layers % 2 == 0)
    write(tmp_path / "hole.gguf", sizes, None)
    shape = mix.Shape(layers, sizes.heads, kv_heads)
    some = {"blk.0.attn_q.weight": np.ones(hidden, np.float32)}
    for kind in FILE_TYPES.values():
        for importance in (None, some):
            planned = quantization.plan_types(tmp_path / "hole.gguf", kind.name, importance)
            ours = mix.types(kind, shape, sizes.linears(), importance is not None)
            assert ours == {name: planned[name] for name in ours}, kind.name


@pytest.mark.parametrize("name", sorted(FILE_TYPES))
def test_table_of_a_mix_holds_every_type_that_is_given(name: str) -> None:
    kind = FILE_TYPES[name]
    given = {
        mix.meant(kind, mix.Shape(layers, 4, kv_heads), tensor, imatrix)
        for layers in LAYERS
        for kv_heads in (4, 2, 1)
        for imatrix in (False, True)
        for tensor in Sizes(layers=layers).linears()
    }
    assert given == kind.mix


def test_only_rows_that_are_no_whole_blocks_fall_back() -> None:
    sizes = Sizes(hidden=320)
    kind = FILE_TYPES["Q4_K_M"]
    fallen = mix.fallbacks(kind, mix.Shape(2, 4, 2), sizes.linears(), imatrix=False)
    assert fallen.keys() == {n for n, columns in sizes.linears().items() if columns == 320}
    assert set(fallen.values()) == {"Q5_0", "Q8_0"}
