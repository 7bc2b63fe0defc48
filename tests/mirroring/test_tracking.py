from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from qgrid import codec, files
from qgrid.mirroring import tracking, wandb_run
from qgrid.running import machine
from qgrid.store import records
from qgrid.types import (
    RECORD_SCHEMA,
    Cell,
    Check,
    Failure,
    Limits,
    Measurement,
    Method,
    PlannedCell,
    Record,
    Settings,
    Tracking,
)

TARGET = Tracking("wandb", "qgrid-test", None)
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login and no settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the machine lock of the mirroring process


@pytest.fixture
def pair(make_cell: Callable[..., Cell]) -> list[Record]:
    """A measured cell and a refused one."""
    good = make_cell(method=Method("gptq", {"group_size": 128}), bits=4)
    bad = make_cell(method=Method("nf4", {}), bits=8)
    measurements = (
        Measurement("accuracy", 0.62, "ratio", "arithmetic", 0.02, 500, 0.58, 0.66),
        Measurement("accuracy_delta", -0.03, "ratio", "arithmetic", 0.01, 500, -0.05, -0.01),
        Measurement("accuracy_delta", 0.01, "ratio", "long-context", 0.01, 500, -0.01, 0.03),
        Measurement("decode_throughput", 118.0, "tok/s", "concurrency=1", None, 5, 117.0, 119.0),
        Measurement("ttft_ms", 26.4, "ms", "concurrency=1"),
        Measurement("size_on_disk_bytes", 5e6, "bytes"),
        Measurement("ppl", 6.2, "1"),
        Measurement("kld_mean", 1.5e-5, "nats", None, 1e-6),
    )
    checks = (Check("bits", True, "4 bits", "4.125 bits"),)
    first = _record("a1" * 8, good, measurements=measurements, checks=checks)
    failure = Failure("unsupported", "method `nf4` has no `bits=8`")
    return [first, _record("b2" * 8, bad, status="unsupported", error=failure)]


def _record(cell_id: str, cell: Cell, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "schema": RECORD_SCHEMA,
        "cell_id": cell_id,
        "artifact_id": "c3" * 8,
        "quality_id": "d4" * 8,
        "baseline_cell_id": "e5" * 8,
        "status": "ok",
        "cell": cell,
        "artifact": {},
        "measurements": (),
        "checks": (),
        "observed": {},
        "environment": {},
        "timings": {},
        "notes": (),
        "error": None,
    }
    return Record(**(fields | changes))


def run_mirror(store: Path, found: list[Record]) -> float:
    """Log all records as a sweep does, ready or not; the seconds that it cost the caller."""
    mirror = tracking.start(TARGET, "grid", store)
    for each in found:
        records.write(store, each)
    begin = time.monotonic()
    for each in found:
        mirror.log(each)
    mirror.close()
    return time.monotonic() - begin


def patient_mirror(store: Path, found: list[Record]) -> None:
    """Log all records and give the process the time that cells would take."""
    mirror = tracking.start(TARGET, "grid", store)
    for each in found:
        records.write(store, each)
        mirror.log(each)
    _wait_for(lambda: _num_mirrored(store) == len(found))
    mirror.close()


def _num_mirrored(store: Path) -> int:
    try:
        return len(json.loads((store / "wandb" / "mirrored.json").read_text()))
    except FileNotFoundError:
        return 0


def _wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def runs(store: Path) -> dict[str, dict[str, Any]]:
    """What wandb's own reader finds in the offline runs, by run id."""
    found = {}
    for file in sorted((store / "wandb").glob("*/run-*.wandb")):
        lines = subprocess.run(
            [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        merged: dict[str, Any] = {"config": {}, "summary": {}}
        for entry in map(json.loads, lines):
            if entry["type"] == "run":
                merged |= {"group": entry["run"]["run_group"], "name": entry["run"]["display_name"]}
                merged["config"] |= entry["run"]["config"].get("update", {})
                merged["id"] = entry["run"]["run_id"]
            elif entry["type"] == "config":
                merged["config"] |= entry["config"]["update"]
            elif entry["type"] == "summary":
                merged["summary"] |= entry["summary"]["update"]
        assert merged["id"] not in found, "one run a cell"
        found[merged["id"]] = merged
    return found


def test_each_cell_is_a_run_with_config_and_summary(tmp_path: Path, pair: list[Record]) -> None:
    patient_mirror(tmp_path, pair)
    found = runs(tmp_path)
    assert set(found) == {each.cell_id for each in pair}
    for each in pair:
        run = found[each.cell_id]
        config = {k: v for k, v in run["config"].items() if not k.startswith("_")}
        ids = ("cell_id", "artifact_id", "quality_id", "baseline_cell_id")
        assert config == codec.plain(each.cell) | {name: getattr(each, name) for name in ids}
        summary = {k: v for k, v in run["summary"].items() if not k.startswith("_")}
        assert summary == wandb_run.summary(each)
        assert run["group"] == "grid"
    assert found[pair[0].cell_id]["name"] == "tiny gptq 4-bit transformers cpu ctx 128"


def test_summary_is_flat_and_names_units(pair: list[Record]) -> None:
    assert wandb_run.summary(pair[0]) == {
        "status": "ok",
        "check_bits": True,
        "accuracy_arithmetic_ratio": 0.62,
        "accuracy_arithmetic_ratio_low": 0.58,
        "accuracy_arithmetic_ratio_high": 0.66,
        "accuracy_delta_arithmetic_ratio": -0.03,
        "accuracy_delta_arithmetic_ratio_low": -0.05,
        "accuracy_delta_arithmetic_ratio_high": -0.01,
        "accuracy_delta_long_context_ratio": 0.01,
        "accuracy_delta_long_context_ratio_low": -0.01,
        "accuracy_delta_long_context_ratio_high": 0.03,
        "decode_throughput_concurrency_1_tok_per_s": 118.0,
        "decode_throughput_concurrency_1_tok_per_s_low": 117.0,
        "decode_throughput_concurrency_1_tok_per_s_high": 119.0,
        "ttft_ms_concurrency_1": 26.4,
        "size_on_disk_bytes": 5e6,
        "ppl": 6.2,
        "kld_mean_nats": 1.5e-5,
        "accuracy_mean_ratio": 0.62,
        "accuracy_delta_worst_ratio": -0.03,
    }
    assert wandb_run.summary(pair[1])["error"] == "method `nf4` has no `bits=8`"


def test_names_fit_what_wandb_can_plot(pair: list[Record]) -> None:
    odd = Measurement("accuracy", 0.5, "ratio", "a.b/c d")
    twin = replace(odd, slice="a-b-c-d", value=0.25)
    made = wandb_run.summary(replace(pair[0], measurements=(odd, twin)))
    assert sorted(v for k, v in made.items() if k.startswith("accuracy_a_b")) == [0.25, 0.5]
    assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name in made)


def test_the_same_record_is_mirrored_once(tmp_path: Path, pair: list[Record]) -> None:
    patient_mirror(tmp_path, pair)
    before = sorted((tmp_path / "wandb").glob("offline-run-*"))
    patient_mirror(tmp_path, pair)
    assert sorted((tmp_path / "wandb").glob("offline-run-*")) == before


def test_a_changed_record_replaces_its_run(tmp_path: Path, pair: list[Record]) -> None:
    patient_mirror(tmp_path, pair)
    again = replace(pair[0], measurements=(Measurement("ppl", 7.0, "1"),))
    wandb_run.mirror(again, "grid", TARGET, tmp_path, "offline")
    assert runs(tmp_path)[again.cell_id]["summary"]["ppl"] == 7.0
    assert len(runs(tmp_path)) == 2


def test_unreachable_costs_two_seconds_a_cell_at_most(
    tmp_path: Path,
    pair: list[Record],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    cost = run_mirror(tmp_path, pair)
    assert cost <= 2.0 * len(pair) + 0.5
    assert "`python -m qgrid sync` replays" in capsys.readouterr().err
    assert all(records.read(tmp_path, each.cell_id) for each in pair)


def test_unreachable_keeps_runs_offline(
    tmp_path: Path,
    pair: list[Record],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    patient_mirror(tmp_path, pair)
    assert set(runs(tmp_path)) == {each.cell_id for each in pair}
    assert f"W&B: {NOWHERE} does not answer" in capsys.readouterr().err
    entries = json.loads((tmp_path / "wandb" / "mirrored.json").read_text()).values()
    assert {entry["mode"] for entry in entries} == {"offline"}


@pytest.fixture
def mute_server() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_mute_server_is_left_in_time_and_nothing_stays_behind(
    tmp_path: Path,
    pair: list[Record],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mute_server: str,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", mute_server)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    assert run_mirror(tmp_path, pair) <= 2.0 * len(pair) + 0.5
    assert "2 of 2 records did not reach W&B in time" in capsys.readouterr().err
    _wait_for(lambda: not _processes_of(tmp_path), 10.0)


def test_it_ends_with_its_parent(tmp_path: Path, pair: list[Record]) -> None:
    records.write(tmp_path, pair[0])
    code = (
        "import time; from pathlib import Path; from qgrid.mirroring import tracking\n"
        "from qgrid.store import records; from qgrid.types import Tracking\n"
        f"store = Path({str(tmp_path)!r})\n"
        "mirror = tracking.start(Tracking('wandb', 'p', None), 'grid', store)\n"
        f"mirror.log(records.read(store, {pair[0].cell_id!r}))\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        _wait_for(lambda: _num_mirrored(tmp_path) == 1)
        assert _processes_of(tmp_path)
        parent.send_signal(signal.SIGKILL)
    _wait_for(lambda: not _processes_of(tmp_path), 10.0)


def _processes_of(store: Path) -> list[int]:
    """Living processes of the mirror of a store, wandb's own among them."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status", "cwd", "name"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        is_mirror = "qgrid.mirroring.mirror" in words and str(store) in words
        is_core = process.info["name"] == "wandb-core" and _uses(process, store)
        if is_mirror or is_core:
            found.append(process.pid)
    return found


def _uses(process: psutil.Process, store: Path) -> bool:
    try:
        return bool(process.environ().get("TMPDIR") == str(store))
    except psutil.Error:
        return False


def test_it_waits_while_a_timing_runs(
    tmp_path: Path, pair: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    records.write(tmp_path, pair[0])
    with machine.hold(alone=True):
        mirror = tracking.start(TARGET, "grid", tmp_path)
        mirror.log(pair[0])
        time.sleep(4)
        assert _num_mirrored(tmp_path) == 0
    _wait_for(lambda: _num_mirrored(tmp_path) == 1)
    mirror.close()


def test_nothing_to_mirror_costs_nothing(tmp_path: Path) -> None:
    mirror = tracking.start(TARGET, "grid", tmp_path)
    begin = time.monotonic()
    mirror.close()
    assert time.monotonic() - begin < 1.0
    assert not list((tmp_path / "wandb").glob("*run-*"))


@pytest.mark.parametrize(
    ("target", "variable"),
    [(Tracking("none", "qgrid", None), None), (TARGET, ("WANDB_MODE", "disabled"))],
)
def test_off_does_nothing(
    tmp_path: Path,
    pair: list[Record],
    monkeypatch: pytest.MonkeyPatch,
    target: Tracking,
    variable: tuple[str, str] | None,
) -> None:
    if variable:
        monkeypatch.setenv(*variable)
    mirror = tracking.start(target, "grid", tmp_path)
    mirror.log(pair[0])
    mirror.close()
    assert not (tmp_path / "wandb").exists()


def test_mode_follows_the_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_run.wanted_mode() == "offline"
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai\n login user\n password x\n")
    assert wandb_run.wanted_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_run.wanted_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    assert wandb_run.wanted_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run.wanted_mode() == "offline"


def test_sync_replays_what_is_missing(
    tmp_path: Path, pair: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    for each in pair:
        records.write(tmp_path, each)
    planned = [
        PlannedCell(
            each.cell_id, each.artifact_id, each.quality_id, each.baseline_cell_id, each.cell, False
        )
        for each in pair
    ]
    folder = tmp_path / "sweeps" / "grid"
    files.write_atomic(folder / "plan.jsonl", "".join(codec.dumps(each) + "\n" for each in planned))
    settings = Settings(
        "grid",
        str(tmp_path),
        (),
        False,
        "cached",
        Limits(1.0, 1.0, 1.0),
        replace(TARGET, name="none"),
    )
    files.write_atomic(folder / "settings.json", codec.dumps(settings))
    assert tracking.sync(tmp_path, "grid") == 0
    assert "2 of 2 records written" in capsys.readouterr().err
    assert set(runs(tmp_path)) == {each.cell_id for each in pair}
    assert tracking.sync(tmp_path, None) == 0
    assert "0 of 2 records written" in capsys.readouterr().err


def test_sync_says_that_wandb_did_not_take_it(
    tmp_path: Path,
    pair: list[Record],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    test_sync_replays_what_is_missing(tmp_path, pair, capsys)
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 1.0)
    assert tracking.sync(tmp_path, "grid") == 1
    assert "W&B did not take" in capsys.readouterr().err
    assert len(runs(tmp_path)) == 2  # the offline runs are still there


def test_import_of_tracking_is_light() -> None:
    code = (
        "import sys, qgrid.mirroring.tracking; "
        "print('wandb' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
