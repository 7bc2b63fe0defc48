"""The frozen types that flow through qgrid: read this file first.

Configuration becomes a `Cell`; a plan is a list of `PlannedCell`; a worker turns a `Job` into a
`StageResult`; the controller joins the results of a cell into one `Record`. Everything here is
plain data: importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Status = Literal[
    "ok",
    "unsupported",  # no library makes or runs this combination; refused before any work
    "does_not_fit",  # predicted memory exceeds the card; refused before any work
    "wrong_device",  # planned for another device than the one found; measured nothing
    "oom",  # ran out of memory: a finding, not an error
    "timeout",  # a stage outlived its limit
    "crashed",  # a stage ended without a result
    "bad_artifact",  # the stored files fail a check
    "invalid",  # the running engine is not what was asked for
]
FINAL: frozenset[Status] = frozenset({"ok", "unsupported", "does_not_fit", "wrong_device", "oom"})
FAILURES: frozenset[Status] = frozenset({"timeout", "crashed", "bad_artifact", "invalid"})

Stage = Literal["artifact", "quality", "speed"]
DeviceKind = Literal["cpu", "cuda"]
Scoring = Literal["choice", "exact", "json"]
Dtype = Literal["float32", "bfloat16", "float16"]
Sampling = Literal["packed", "windows", "short", "documents"]  # see `qgrid.calibration`
AdapterMode = Literal["merged", "attached"]  # into the 16-bit weights, or beside quantized ones

RECORD_SCHEMA = "qgrid.record/1"


# --- what the user composes (one YAML group each) ------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A checkpoint: the embedded one, a local folder or a hub id."""

    name: str
    id: str
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool  # load .bin checkpoints as well as safetensors
    adapter: str | None = None  # a LoRA adapter: a folder or a hub id (docs/adapters.md)
    adapter_revision: str | None = None  # of a hub id
    adapter_mode: AdapterMode = "merged"
    adapter_base: str | None = None  # what it was trained on: "16bit" or a method; None: not told


@dataclass(frozen=True)
class Method:
    """A quantization method; `options` are the fields of its module's `Options`, all resolved."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Runtime:
    """An inference engine. `dtype` is the compute dtype of quality, `speed_dtype` of timing."""

    name: str
    dtype: Dtype
    speed_dtype: Dtype
    threads: PositiveInt | None  # None: all physical cores
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Price:
    """What a managed API asks, in USD per million tokens, and where and when that was read."""

    input: NonNegativeFloat
    output: NonNegativeFloat
    source: str
    date: str


@dataclass(frozen=True)
class Gpu:
    """A device as planned; `gpu=auto` is replaced by a description of this machine."""

    name: str
    kind: DeviceKind
    match: str  # case-insensitive part of the device name that the driver reports
    capability: str | None  # "sm_90"; None for a CPU
    memory_gib: NonNegativeFloat
    bandwidth_gb_s: PositiveFloat | None
    count: PositiveInt
    gres: str | None = None  # what a cluster calls it, and what its nodes have: where to find it
    constraint: str | None = None  # changes no number, so neither enters an id


@dataclass(frozen=True)
class KvCache:
    """An intent that a runtime maps to its own type or refuses."""

    name: str
    bits: int


@dataclass(frozen=True)
class Calibration:
    """Text that a calibrated method looks at: a local text/JSONL file or a hub data set."""

    name: str
    path: str | None
    dataset: str | None
    revision: str | None
    split: str
    text_field: str  # that holds text, or a chat's messages
    samples: PositiveInt
    length: PositiveInt  # tokens a sample
    sampling: Sampling = "packed"
    seed: NonNegativeInt | None = None  # that a protocol fixes; None: the run's
    data_files: str | None = None  # of a data set: the one file that is read


@dataclass(frozen=True)
class Slice:
    """A named set of items in a JSONL file (format: docs/slices.md)."""

    path: str
    scoring: Scoring
    chat: bool  # wrap the prompt in the model's chat template
    limit: PositiveInt | None  # the first n items, spread over levels; None: all
    max_new_tokens: PositiveInt


@dataclass(frozen=True)
class Prose:
    """Plain text for perplexity and KL divergence."""

    path: str
    tokens: PositiveInt | None  # at most so many; None: all
    protocol: Literal["gptq", "llamacpp"] = "gptq"  # which tokens of a window count


@dataclass(frozen=True)
class Slices:
    """What quality is measured on."""

    name: str
    prose: Prose | None
    items: Mapping[str, Slice]


@dataclass(frozen=True)
class Slo:
    """What a user of a served model is promised, in milliseconds; None: not promised."""

    ttft_ms: PositiveFloat | None = None
    itl_ms: PositiveFloat | None = None  # of a request: the mean over its tokens, as TPOT
    e2e_latency_ms: PositiveFloat | None = None


@dataclass(frozen=True)
class Workload:
    """The shape of a timing run. Prompts are unique; end-of-sequence is ignored."""

    name: str
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt
    concurrency: tuple[PositiveInt, ...]  # closed loop: users at once; 1 is always measured, first
    warmup: NonNegativeInt
    repeats: PositiveInt
    rounds: PositiveInt = 1  # requests that each user sends in a repeat, one after the other
    request_rates: tuple[PositiveFloat, ...] = ()  # open loop: Poisson arrivals a second
    rate_requests: PositiveInt = 32  # of one repeat of an open loop
    deadline_seconds: PositiveFloat = 600.0  # of one request; later it counts as failed
    slo: Slo = Slo()


@dataclass(frozen=True)
class Tracking:
    """Where records are mirrored to."""

    name: str
    project: str
    entity: str | None


@dataclass(frozen=True)
class Choice:
    """One point as asked: what the user composed, before the plan resolves it."""

    model: Model
    method: Method
    bits: int | None  # None: the method's own width
    runtime: Runtime
    gpu: Gpu
    kv_cache: KvCache
    calibration: Calibration
    slices: Slices
    workload: Workload
    context: int
    seed: int


@dataclass(frozen=True)
class Limits:
    """Seconds that a stage may take before its cell becomes `timeout`."""

    artifact: PositiveFloat
    quality: PositiveFloat
    speed: PositiveFloat


@dataclass(frozen=True)
class Settings:
    """How a sweep runs; nothing here changes a number, so nothing here enters an id."""

    name: str | None  # of the sweep; None: a hash of its plan
    out: str
    rerun: tuple[str, ...]  # statuses, "stale" or "unstable"
    fresh: bool
    verify: Literal["cached", "full"]
    limits: Limits
    tracking: Tracking


# --- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One point of the grid, fully resolved. `bits` is the width that the method will use."""

    model: Model
    method: Method
    bits: int
    runtime: Runtime
    gpu: Gpu
    kv_cache: KvCache
    calibration: Calibration | None  # None where the method needs none
    slices: Slices
    workload: Workload
    context: int  # tokens
    seed: int


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its identities. `status` is set when it was refused before any work."""

    cell_id: str
    artifact_id: str
    quality_id: str
    baseline_cell_id: str | None  # None: this cell is a baseline itself
    cell: Cell
    added: bool  # a baseline that the grid lacked
    status: Status | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)


# --- what methods and runtimes declare -----------------------------------------------------------


@dataclass(frozen=True)
class MethodSupport:
    """What a method can make. Legality is derived from it, never listed as pairs."""

    bits: tuple[int, ...]
    default_bits: int
    produces: Mapping[int, str]  # bits -> artifact format
    packages: tuple[str, ...]  # distributions whose locked versions are part of the artifact id
    calibrated: bool  # a method whose options decide has a `calibrates` beside it
    needs_gpu: bool = False
    capability: str | None = None  # the least that a GPU must have, where it is on one: "sm_75"
    environment: str = "main"
    stores_weights: bool = True  # False: config and tokenizer only, the width as stated
    from_base: bool = True  # False: the weights are somebody else's, so that none can be merged
    broken: tuple[tuple[str, str], ...] = ()  # versions that make wrong weights, and what they do


@dataclass(frozen=True)
class RuntimeSupport:
    """What a runtime can load: artifact formats and KV intents for each kind of device."""

    loads: Mapping[DeviceKind, tuple[str, ...]]
    kv_cache: Mapping[DeviceKind, tuple[str, ...]]
    packages: tuple[str, ...]
    capability: str | None = None  # the least that a GPU must have, where it is on one: "sm_75"
    environment: str = "main"
    baseline: str = "none"  # the method that makes the 16-bit weights that it loads
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")  # that it can compute in
    keeps_stored: bool = False  # weights stay in memory as they are stored, whatever the dtype
    remote: bool = False  # computes on a machine that nothing here describes or limits
    adapters: tuple[str, ...] = ()  # artifact formats beside which an adapter can be kept
    broken: tuple[tuple[str, str], ...] = ()  # versions that compute wrongly, and what they do


# --- what was made and measured ------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One number. `stderr` is None where the number has no sampling error."""

    metric: str  # a key of `metrics.METRICS`
    value: float
    unit: str
    slice: str | None = None  # a slice, or "concurrency=8" for a load
    stderr: float | None = None
    n: int | None = None
    low: float | None = None  # 95 % interval
    high: float | None = None


@dataclass(frozen=True)
class Check:
    """A verdict about an artifact or an engine: what was expected, what was found."""

    name: str
    ok: bool
    expected: str
    actual: str
    fatal: bool = True  # a failed fatal check makes the cell `bad_artifact` or `invalid`


@dataclass(frozen=True)
class Tensor:
    """A stored tensor as the manifest lists it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ModuleState:
    """How one linear layer is stored."""

    method: str  # what quantized it: "gptq", "rtn" (a fallback shows here), "none"
    format: str
    bits: float  # stored bits per weight, scales and zero points included
    num_weights: int


@dataclass(frozen=True)
class Manifest:
    """What an artifact folder really holds; written once, when the artifact is built."""

    artifact_id: str
    model: Model
    method: Method
    bits: int
    format: str
    files: Mapping[str, str]  # relative path -> sha256
    sizes: Mapping[str, int]  # relative path -> bytes
    modules: Mapping[str, ModuleState]  # linear layers of the decoder by name
    dtypes: Mapping[str, int]  # stored dtype -> bytes
    num_parameters: int | None  # None, as both widths: an artifact without weights
    bits_per_weight: float | None
    linear_bits_per_weight: float | None
    tokenizer: Mapping[str, str]  # fingerprint: part -> sha256
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None  # source, hash, samples, length, seed
    checks: tuple[Check, ...]
    seconds: float
    peak_memory_bytes: int | None  # of the build; None where the system keeps no such figure
    tensor_types: Mapping[str, int] = field(default_factory=dict)  # stored dtype -> tensors
    # linear layers that were left as they were: name or pattern -> why
    modules_skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """The input of one stage in one process; all paths are absolute."""

    stage: Stage
    planned: PlannedCell
    artifact: str  # folder of this cell's artifact
    baseline: str | None  # folder of the 16-bit artifact that quality compares with
    out: str  # folder that receives `result.json` and the stage's files
    store: str  # root of all outputs
    verify: Literal["cached", "full"] = "cached"
    cores: tuple[int, ...] | None = None  # that the stage may use; None: all of the machine
    anew: bool = False  # build the artifact although there is one, and replace it in the end


@dataclass(frozen=True)
class Failure:
    """Why a stage gave no result."""

    status: Status
    message: str  # one sentence
    traceback: str | None = None


@dataclass(frozen=True)
class StageResult:
    """The output of one stage."""

    stage: Stage
    measurements: tuple[Measurement, ...] = ()
    checks: tuple[Check, ...] = ()
    observed: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)  # own work by phase
    failure: Failure | None = None


@dataclass(frozen=True)
class Record:
    """The truth about one cell (schema: docs/record.md)."""

    schema: str
    cell_id: str
    artifact_id: str
    quality_id: str
    baseline_cell_id: str | None
    status: Status
    cell: Cell
    artifact: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    checks: tuple[Check, ...]
    observed: Mapping[str, Any]
    environment: Mapping[str, Any]
    timings: Mapping[str, float]
    notes: tuple[str, ...]
    error: Failure | None
    predicted: Mapping[str, float] = field(default_factory=dict)  # figures of the plan
