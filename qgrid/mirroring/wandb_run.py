"""One record as one W&B run: what it holds, whether it goes online, what was mirrored before."""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from qgrid import codec
from qgrid.files import write_atomic
from qgrid.lora import adapters
from qgrid.store import leases
from qgrid.types import Measurement, Record, Tracking

Mode = Literal["online", "offline"]
CLOUD = "api.wandb.ai"  # keys for it serve the other addresses of the same cloud
_CLOUD_DOMAINS = ("wandb.ai", "forge.coreweave.com")
CONNECT_SECONDS = 1.0
INIT_SECONDS = 20.0
FINISH_SECONDS = 20.0
_UNITS = {"1": "", "tok/s": "tok_per_s", "req/s": "req_per_s", "USD": ""}
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True)
class Content:
    """What a run holds: plain data."""

    id: str
    name: str
    group: str
    config: dict[str, Any]
    summary: dict[str, Any]


def content(record: Record, sweep: str) -> Content:
    """A record as a run: config is the resolved cell, summary the metrics with their units."""
    cell = codec.plain(record.cell)
    ids = {
        "cell_id": record.cell_id,
        "artifact_id": record.artifact_id,
        "quality_id": record.quality_id,
        "baseline_cell_id": record.baseline_cell_id,
    }
    return Content(record.cell_id, _name(record), sweep, {**cell, **ids}, summary(record))


def _name(record: Record) -> str:
    cell = record.cell
    names = [adapters.label(cell.model), cell.method.name, f"{cell.bits}-bit"]
    parts = [*names, cell.runtime.name, cell.gpu.name]
    if cell.kv_cache.name != "auto16":
        parts.append(f"kv {cell.kv_cache.name}")
    return " ".join([*parts, f"ctx {cell.context}"])


def summary(record: Record) -> dict[str, Any]:
    """Flat names that W&B accepts as axes (letters, digits, underscores) with their values."""
    flat: dict[str, Any] = {"status": record.status}
    if record.error is not None:
        flat["error"] = record.error.message
    for check in record.checks:
        flat[f"check_{_word(check.name)}"] = check.ok
    for measured in record.measurements:
        flat |= _values(measured, flat)
    return flat | _overall(record)


def _values(measured: Measurement, taken: Mapping[str, Any]) -> dict[str, Any]:
    name = key(measured.metric, measured.slice, measured.unit)
    if name in taken:  # two slices whose names differ in signs only
        name = f"{name}_{codec.digest(measured.slice, 4)}"
    bounds = {f"{name}_low": measured.low, f"{name}_high": measured.high}
    return {name: measured.value} | {k: v for k, v in bounds.items() if v is not None}


def key(metric: str, part: str | None, unit: str) -> str:
    """`decode_throughput_concurrency_1_tok_per_s`; a unit that the metric names is not repeated."""
    word = _word(_UNITS.get(unit, unit))
    words = [metric, *([] if part is None else [_word(part)])]
    if word and word not in metric.split("_"):
        words.append(word)
    return "_".join(words)


def _word(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_")


def _overall(record: Record) -> dict[str, float]:
    """Two numbers over all slices for plots; a verdict looks at each slice."""
    scores = [m.value for m in record.measurements if m.metric == "accuracy"]
    changes = [m.value for m in record.measurements if m.metric == "accuracy_delta"]
    found = {}
    if scores:
        found["accuracy_mean_ratio"] = sum(scores) / len(scores)
    if changes:
        found["accuracy_delta_worst_ratio"] = min(changes)
    return found


# --- online or offline ---------------------------------------------------------------------------


def is_disabled() -> bool:
    """Whether the user switched W&B off."""
    return os.environ.get("WANDB_MODE") == "disabled" or _is_true("WANDB_DISABLED")


def is_logged_in() -> bool:
    """Whether there is a key for the server, in the environment or in a netrc file."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(server()).netloc
    hosts = (host, CLOUD) if host.endswith(_CLOUD_DOMAINS) else (host,)
    chosen = os.environ.get("NETRC")
    paths = [Path(chosen)] if chosen else [Path.home() / name for name in (".netrc", "_netrc")]
    for path in paths:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc(str(path.expanduser()))
            if any(found.authenticators(each) for each in hosts):
                return True
    return False


def server() -> str:
    """The address of the W&B server: the environment, `wandb login --host`, or wandb's default."""
    import wandb

    chosen = os.environ.get("WANDB_BASE_URL")
    return chosen if chosen else str(wandb.setup().settings.base_url)


def wanted_mode() -> Mode:
    """Online when the user is logged in and did not ask for offline."""
    asked = os.environ.get("WANDB_MODE", "online")
    return "online" if asked in ("online", "run", "shared") and is_logged_in() else "offline"


def is_reachable() -> bool:
    """Whether the server accepts a connection; behind a proxy only trying tells."""
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    address = urlsplit(server())
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((str(address.hostname), port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in {"true", "1", "yes", "on"}


# --- writing a run -------------------------------------------------------------------------------


def write(made: Content, tracking: Tracking, store: Path, mode: Mode) -> Path:
    """Create or update the run with wandb; the folder that wandb keeps it in.

    Raises:
        wandb.Error, OSError: W&B refused the run or could not be reached.
    """
    import wandb

    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        id=made.id,
        name=made.name,
        group=made.group,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(**_settings(store, mode)),
    )
    run.config.update(made.config, allow_val_change=True)
    run.summary.update(made.summary)
    folder = Path(run.settings.sync_dir)
    run.finish()
    return folder


def _settings(store: Path, mode: Mode) -> dict[str, Any]:
    """Nothing is asked, printed, sampled or collected beyond config and summary."""
    return {
        "mode": mode,
        "root_dir": str(store),
        "base_url": server(),
        "silent": True,
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "symlink": False,
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "finish_timeout_raises": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": 0.5,  # the default loses 15 s of a killed process
    }


# --- what was mirrored before --------------------------------------------------------------------


class Ledger:
    """`wandb/mirrored.json`: what of each cell is mirrored where, so that nothing is sent twice."""

    def __init__(self, store: Path) -> None:
        self._folder = store / "wandb"
        self._lease = leases.of(store, "mirrors", "wandb")
        self._path = self._folder / "mirrored.json"

    def has(self, made: Content, tracking: Tracking, mode: Mode) -> bool:
        """Whether this very content is there; what is online need not be offline too."""
        entry = self._read().get(made.id)
        if entry is None or entry["content"] != _digest(made, tracking):
            return False
        if entry["mode"] == "online":
            return mode == "offline" or entry["server"] == server()
        return mode == "offline" and (self._folder / entry["folder"]).is_dir()

    def add(self, made: Content, tracking: Tracking, mode: Mode, folder: Path) -> None:
        """Remember a run; the folder of an earlier run of the same cell goes."""
        with self._changing() as entries:
            old = entries.get(made.id)
            if old is not None and old["folder"] != folder.name:
                shutil.rmtree(self._folder / old["folder"], ignore_errors=True)
            entries[made.id] = {
                "content": _digest(made, tracking),
                "mode": mode,
                "server": server() if mode == "online" else "",
                "folder": folder.name,
            }

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, str]]]:
        with leases.held(self._lease):
            entries = self._read()
            yield entries
            write_atomic(self._path, json.dumps(entries, indent=1))

    def _read(self) -> dict[str, dict[str, str]]:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return cast("dict[str, dict[str, str]]", json.loads(self._path.read_text()))
        return {}


def _digest(made: Content, tracking: Tracking) -> str:
    return codec.digest([codec.plain(made), tracking.project, tracking.entity])


def mirror(record: Record, sweep: str, tracking: Tracking, store: Path, mode: Mode) -> bool:
    """Write a record's run unless it is there; whether it was written.

    Raises:
        wandb.Error, OSError: see `write`.
    """
    made, ledger = content(record, sweep), Ledger(store)
    if ledger.has(made, tracking, mode):
        return False
    with _nothing_left_on_failure(store / "wandb", made.id):
        folder = write(made, tracking, store, mode)
    ledger.add(made, tracking, mode, folder)
    return True


@contextlib.contextmanager
def _nothing_left_on_failure(folder: Path, run_id: str) -> Iterator[None]:
    """Remove what a failed attempt leaves: `wandb sync` would take it for a run of its own."""
    before = set(folder.glob(f"*-{run_id}"))
    try:
        yield
    except BaseException:
        for path in set(folder.glob(f"*-{run_id}")) - before:
            shutil.rmtree(path, ignore_errors=True)
        raise
