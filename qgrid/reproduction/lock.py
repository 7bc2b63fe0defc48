"""The types of `sweep.lock.yaml`: what was planned, from which contents, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, StringConstraints

from qgrid.types import (
    Calibration,
    Gpu,
    KvCache,
    Limits,
    Method,
    Model,
    Runtime,
    Slices,
    Status,
    Workload,
)

SCHEMA = "qgrid.lock/1"
FILE = "sweep.lock.yaml"

SEEN = (  # of a record's environment: what its fingerprint covers, the system's name, threads
    "qgrid",
    "python",
    "versions",
    "machine",
    "cpu",
    "cpu_flags",
    "cores",
    "memory_gib",
    "cuda",
    "driver",
    "gpus",
    "os",
    "threads",
)

_STRICT = ConfigDict(extra="forbid", strict=True)  # pydantic reads it from each dataclass

Hashes = Mapping[str, str | None]  # of contents by name; None: could not be read


class Row(NamedTuple):
    """A number, as in `Measurement`; a list in the file."""

    metric: str
    slice: str | None
    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Parts:
    """What cells are made of, each thing once, under a name that cells refer to."""

    __pydantic_config__ = _STRICT

    models: Mapping[str, Model]
    methods: Mapping[str, Method]
    runtimes: Mapping[str, Runtime]
    gpus: Mapping[str, Gpu]
    kv_caches: Mapping[str, KvCache]
    calibrations: Mapping[str, Calibration]
    slices: Mapping[str, Slices]
    workloads: Mapping[str, Workload]


@dataclass(frozen=True)
class Inputs:
    """Hashes of contents, by the name of the part that names the files."""

    __pydantic_config__ = _STRICT

    models: Mapping[str, Hashes]  # files of the checkpoint, tokenizer included; `commit` of a hub
    methods: Mapping[str, Hashes]  # files that options name
    calibrations: Mapping[str, Hashes]
    slices: Mapping[str, Hashes]  # `items.NAME` and `prose`


@dataclass(frozen=True)
class Composition:
    """A cell as names of parts and its own numbers."""

    __pydantic_config__ = _STRICT

    model: str
    method: str
    bits: int
    runtime: str
    gpu: str
    kv_cache: str
    calibration: str | None
    slices: str
    workload: str
    context: int
    seed: int


@dataclass(frozen=True)
class LockedCell:
    """One cell and what it came to; `status` is None where it has no record yet."""

    __pydantic_config__ = _STRICT

    cell: Composition
    artifact_id: str
    quality_id: str
    baseline_cell_id: str | None
    added: bool
    status: Status | None
    environment: str | None  # a key of `Lock.environments`
    measurements: tuple[Row, ...]


@dataclass(frozen=True)
class Answers:
    """Results per item of one slice, compact: enough to say which of them differ.

    `items`: four characters an item (24 bits of its line's hash, base64), in order. `right`: a bit
    an item, as hexadecimal digits, the first item highest.
    """

    __pydantic_config__ = _STRICT

    n: int
    digest: str
    right: str
    items: str


@dataclass(frozen=True)
class LockedArtifact:
    """The files that were loaded, and what made them."""

    __pydantic_config__ = _STRICT

    format: str | None
    files: Mapping[str, str]  # path -> sha256
    tokenizer: Mapping[str, str]  # part -> sha256
    calibration: str | None  # sha256 of the text that was drawn
    versions: Mapping[str, str]  # of the libraries that made it


@dataclass(frozen=True)
class Lock:
    """A sweep, whole: enough to run it again elsewhere and to compare every number."""

    __pydantic_config__ = _STRICT

    schema: str
    name: Annotated[str, StringConstraints(pattern=r"^\w[\w.-]{0,99}$")]  # it names a folder
    command: tuple[str, ...] | None  # as given; None: it was not planned by a command
    commits: tuple[str, ...]  # of qgrid's checkout, as the records name them
    verify: Literal["cached", "full"]
    limits: Limits
    changed: tuple[str, ...]  # cells whose inputs were altered after they were planned
    pins: Mapping[str, Mapping[str, str]]  # lock of an environment -> distribution -> version
    environments: Mapping[str, Mapping[str, Any]]  # fingerprint -> versions seen, device, driver
    inputs: Inputs
    parts: Parts
    cells: Mapping[str, LockedCell]
    qualities: Mapping[str, Mapping[str, Answers]]  # quality id -> slice -> results
    artifacts: Mapping[str, LockedArtifact]


def is_described(gpu: Gpu) -> bool:
    """Whether a device is the description of a machine, as `gpu=auto` gives it."""
    return gpu.name == gpu.match
