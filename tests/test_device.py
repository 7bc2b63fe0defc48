"""The device as observed: the CPU of this machine, and NVIDIA cards by what their tool prints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qgrid import device
from qgrid.types import Gpu

CARDS = """\
0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 9.0, 580.82.07
1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, 9.0, 580.82.07
2, GPU-cccc, NVIDIA L4, 23034, 8.9, 580.82.07
"""
H100 = Gpu("h100", "cuda", "H100", "sm_90", 80.0, 3350.0, 1)
L4 = Gpu("l4", "cuda", "NVIDIA L4", "sm_89", 24.0, 300.0, 1)


@pytest.fixture(autouse=True)
def _asked_again() -> Iterator[None]:
    device.query.cache_clear()
    yield
    device.query.cache_clear()


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `nvidia-smi` that prints three cards."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{CARDS}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_cards")
def test_without_a_card_the_device_is_the_cpu() -> None:
    found = device.describe()
    assert found.kind == "cpu"
    assert found.capability is None
    assert found.bandwidth_gb_s is None
    assert found.memory_gib == round(device.memory_bytes() / 2**30)
    assert f"{device.num_cores()} cores" in found.name
    assert device.matches(found, found)
    assert device.describe() == found


@pytest.mark.usefixtures("cards")
def test_a_card_is_described_as_the_driver_reports_it() -> None:
    found = device.describe()
    assert found.name == "NVIDIA H100 80GB HBM3"
    assert (found.kind, found.capability, found.memory_gib) == ("cuda", "sm_90", 80.0)
    assert found.count == 2
    assert device.matches(found, found)
    assert device.matches(H100, found)
    assert not device.matches(L4, found)


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [("2", "NVIDIA L4"), ("2,0", "NVIDIA L4"), ("GPU-cc", "NVIDIA L4"), ("", None), ("-1", None)],
)
def test_only_visible_cards_count(
    visible: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = device.describe()
    assert found.kind == ("cpu" if expected is None else "cuda")
    assert expected is None or found.name == expected


def test_a_tool_that_fails_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert device.describe().kind == "cpu"


CPU = Gpu("EPYC, 2 cores", "cpu", "EPYC", None, 24.0, None, 1)
REAL_H100 = Gpu("NVIDIA H100 80GB HBM3", "cuda", "", "sm_90", 80.0, None, 1)


@pytest.mark.parametrize(
    ("planned", "found", "expected"),
    [
        (H100, REAL_H100, True),
        (H100, replace(REAL_H100, name="nvidia h100 pcie"), True),
        (H100, replace(REAL_H100, name="NVIDIA H100 NVL", memory_gib=94.0), False),
        (H100, replace(REAL_H100, name="NVIDIA A100", capability="sm_80"), False),
        (H100, replace(REAL_H100, capability="sm_89"), False),
        (replace(H100, count=2), REAL_H100, False),
        (H100, replace(REAL_H100, count=8), True),
        (replace(H100, capability=None), REAL_H100, True),
        (L4, replace(L4, name="NVIDIA L40S", memory_gib=45.0), False),
        (L4, replace(L4, name="NVIDIA L4", memory_gib=22.0), True),
        (replace(H100, kind="cpu"), REAL_H100, False),
        (replace(REAL_H100, match=""), REAL_H100, True),
    ],
)
def test_a_match_is_name_kind_capability_memory_and_count(
    planned: Gpu, found: Gpu, expected: bool
) -> None:
    assert device.matches(planned, found) is expected


@pytest.mark.parametrize(
    ("gpu", "least", "needs_gpu", "said"),
    [
        (L4, "sm_90", False, "needs a GPU of compute capability 9.0 or more; `gpu=l4` has 8.9"),
        (replace(L4, capability="sm_90a"), "sm_100", False, "10.0 or more; `gpu=l4` has 9.0"),
        (L4, "sm_89", True, None),
        (L4, None, True, None),
        (replace(L4, capability=None), "sm_90", True, None),
        (CPU, "sm_90", False, None),
        (CPU, "sm_90", True, "needs a GPU of compute capability 9.0 or more"),
        (CPU, None, True, "needs a GPU"),
    ],
)
def test_what_a_device_lacks_names_the_capability(
    gpu: Gpu, least: str | None, needs_gpu: bool, said: str | None
) -> None:
    lacks = device.lack(gpu, least, needs_gpu)
    assert lacks is None if said is None else str(lacks).endswith(said)


def test_describing_imports_no_torch() -> None:
    code = (
        "import sys; from qgrid import device, environment; device.describe();"
        "environment.provenance(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_as_planned_is_told_by_its_keys() -> None:
    planned = Gpu("node", "cpu", "Xeon", None, 8.0, None, 2)
    found = Gpu("EPYC, 2 cores", "cpu", "EPYC", None, 24.0, None, 1)
    told = device.mismatch(planned, found)
    assert told is not None
    for words in (
        "`match=Xeon` is not in `EPYC, 2 cores`",
        "`memory_gib=8`, found 24",
        "`count=2`",
    ):
        assert words in told
    assert "kind" not in told
    assert device.mismatch(found, found) is None
