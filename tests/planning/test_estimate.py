"""Planned memory reproduces published sizes (docs: the architectures' own config.json)."""

from __future__ import annotations

import pytest

from qgrid.planning.estimate import GIB, Architecture, predict

LLAMA_3_8B = Architecture(32, 4096, 32, 8, 128, 14336, 128256, tied=False)
LLAMA_3_70B = Architecture(80, 8192, 64, 8, 128, 28672, 128256, tied=False)
LLAMA_2_7B = Architecture(32, 4096, 32, 32, 128, 11008, 32000, tied=False)
MISTRAL_7B = Architecture(32, 4096, 32, 8, 128, 14336, 32000, tied=False)


@pytest.mark.parametrize(
    ("model", "billions", "bf16", "int8", "four_bit", "kv"),
    [
        (LLAMA_3_8B, 8.0303, 14.96, 8.46, 5.33, 131_072),
        (LLAMA_3_70B, 70.5537, 131.42, 67.67, 37.04, 327_680),
        (LLAMA_2_7B, 6.7384, 12.55, 6.52, 3.62, 524_288),
        (MISTRAL_7B, 7.2417, 13.49, 6.99, 3.87, 131_072),
    ],
)
def test_sizes_of_known_models(
    model: Architecture, billions: float, bf16: float, int8: float, four_bit: float, kv: int
) -> None:
    assert (model.linear_weights + model.other_weights) / 1e9 == pytest.approx(billions, abs=5e-5)
    assert model.weight_bytes(16) / GIB == pytest.approx(bf16, abs=0.006)
    assert model.weight_bytes(8) / GIB == pytest.approx(int8, rel=0.005)
    assert model.weight_bytes(4.15625) / GIB == pytest.approx(four_bit, abs=0.006)
    assert model.kv_bytes_per_token() == kv


def test_the_true_parameter_count_wins() -> None:
    known = Architecture(32, 4096, 32, 8, 128, 14336, 128256, False, num_parameters=10**10)
    assert known.linear_weights + known.other_weights == 10**10


def test_a_prediction_adds_weights_and_cache() -> None:
    weights = LLAMA_3_8B.weight_bytes(16)
    found = predict(weights, LLAMA_3_8B, kv_bits=16, context=131_072, concurrency=1)
    assert found["kv_bytes"] == 16 * GIB
    assert found["total_bytes"] == found["weight_bytes"] + found["kv_bytes"]
