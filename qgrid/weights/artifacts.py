"""The artifact store: built once under a lock, aside, then renamed; verified before every use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qgrid import codec, models
from qgrid.files import HashCache, built_aside, write_atomic
from qgrid.measure.process_memory import Peak
from qgrid.types import Check, Job, Manifest, Measurement, PlannedCell, StageResult
from qgrid.weights import inspection, verification, weightless
from qgrid.weights.building import Work, made
from qgrid.weights.fingerprint import fingerprint
from qgrid.weights.verification import BadArtifact, require

__all__ = [
    "BadArtifact",
    "build",
    "exists",
    "folder_of",
    "load_manifest",
    "measured",
    "require",
    "reused",
    "verify",
]

MANIFEST = "manifest.json"


def exists(store: Path, artifact_id: str) -> bool:
    """Whether the artifact has been built completely."""
    return (folder_of(store, artifact_id) / MANIFEST).is_file()


def folder_of(store: Path, artifact_id: str) -> Path:
    """Where an artifact lies."""
    return store / "artifacts" / artifact_id


def load_manifest(folder: Path) -> Manifest:
    """What the artifact's builder wrote about it.

    Raises:
        FileNotFoundError: there is no manifest.
        codec.InvalidValue: it cannot be read.
    """
    return codec.loads(Manifest, (folder / MANIFEST).read_text(encoding="utf-8"))


def build(job: Job) -> StageResult:
    """Make the artifact of a cell unless it is there and will do; who asks holds its lease.

    Raises:
        BadArtifact: what was made, or what is there, fails a fatal check.
    """
    target = Path(job.artifact)
    is_there = (target / MANIFEST).is_file() and not job.anew
    return reused(target) if is_there else _built(target, job)


def verify(
    folder: Path, planned: PlannedCell, cache: HashCache, full: bool = False
) -> tuple[Check, ...]:
    """Check an artifact before it is used.

    `full` reads every byte; otherwise hashes are remembered by size, time and inode. The checks
    say what is wrong; nothing is raised.
    """
    try:
        manifest = load_manifest(folder)
    except (OSError, codec.InvalidValue) as error:
        return (Check("files", False, "a readable manifest.json", str(error)),)
    files = verification.check_files(folder, manifest, lambda p: cache.sha256(p, fresh=full))
    cell = planned.cell
    base = models.located(cell.model)
    if weightless.holds_none(cell.method):
        own = weightless.check_manifest(manifest, planned)
        return files, own, _check_tokenizer(folder, base, manifest, cache)
    whole = verification.check_whole(folder)  # whatever the manifest says
    if not (files.ok and whole.ok):
        return (files if not files.ok else whole,)
    contents = inspection.inspect(folder, base, cell.method.name)
    return (
        files,
        verification.check_manifest(manifest, contents, planned.artifact_id, cell),
        *verification.own_checks(folder, cell),
        verification.check_bits(contents, cell),
        verification.check_coverage(contents, cell),
        _check_tokenizer(folder, base, manifest, cache),
        *((verification.check_finite(folder),) if full else ()),
        verification.check_environment(verification.support(cell)),
    )


def _check_tokenizer(
    folder: Path, base: Path | None, manifest: Manifest, cache: HashCache
) -> Check:
    """Against the base model's files where they are on this machine, else what they were."""
    if base is None:
        return verification.check_tokenizer(fingerprint(folder), manifest.tokenizer)
    hashes = verification.tokenizer_hashes
    if hashes(folder, cache) == hashes(base, cache):
        return Check("tokenizer", True, "the base model's", "the base model's, byte for byte")
    return verification.check_tokenizer(fingerprint(folder), fingerprint(base))


def reused(target: Path) -> StageResult:
    """The result of a build that was done before, from its manifest.

    Raises:
        OSError, codec.InvalidValue: the manifest cannot be read.
    """
    manifest = load_manifest(target)
    return _result(manifest, {"build": 0.0}, reused=True)


def _built(target: Path, job: Job) -> StageResult:
    begin = time.perf_counter()
    cell = job.planned.cell
    cache = HashCache(Path(job.store) / "hashes.json")
    with built_aside(target) as folder, TemporaryDirectory() as fetched:
        needs_none = weightless.holds_none(cell.method)
        model = cell.model
        source = models.described(model, Path(fetched)) if needs_none else models.resolve(model)
        work = Work(job.planned, source, folder, cache, {})
        with Peak("cpu" if needs_none else cell.gpu.kind) as peak:
            manifest = made(work)
        took = time.perf_counter() - begin
        manifest = replace(manifest, seconds=took, peak_memory_bytes=peak.bytes)
        write_atomic(folder / MANIFEST, codec.dumps(manifest, indent=1))
    cache.remember({target / name: value for name, value in manifest.files.items()})
    work.seconds["build"] = time.perf_counter() - begin
    return _result(manifest, work.seconds, reused=False)


def _result(manifest: Manifest, seconds: Mapping[str, float], reused: bool) -> StageResult:
    observed: dict[str, Any] = {
        "reused": reused,
        "format": manifest.format,
        "module_methods": verification.histogram(manifest.modules),
        "module_bits": verification.stored_widths(manifest.modules),
        "stored_dtypes": dict(manifest.dtypes),
        "tensor_types": dict(manifest.tensor_types),
        "versions": dict(manifest.versions),
        "build_seconds": manifest.seconds,
        "build_peak_memory_bytes": manifest.peak_memory_bytes,
    }
    found = measured(manifest)
    return StageResult("artifact", found, manifest.checks, observed, seconds=dict(seconds))


def measured(manifest: Manifest) -> tuple[Measurement, ...]:
    """Size and widths of an artifact; nothing of one that holds no weights."""
    if manifest.bits_per_weight is None or manifest.linear_bits_per_weight is None:
        return ()
    size = sum(manifest.sizes.values())
    return (
        Measurement("size_on_disk_bytes", float(size), "bytes"),
        Measurement("bits_per_weight", manifest.bits_per_weight, "bits"),
        Measurement("linear_bits_per_weight", manifest.linear_bits_per_weight, "bits"),
    )
