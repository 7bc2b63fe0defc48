"""The artifact store: built once under a lock, aside, checked, then renamed; verified before use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgrid import codec, inspection, models, registry, verification
from qgrid.files import HashCache, built_aside, locked, write_atomic
from qgrid.fingerprint import fingerprint
from qgrid.memory import PeakMemory
from qgrid.types import (
    Cell,
    Check,
    Job,
    Manifest,
    Measurement,
    PlannedCell,
    StageResult,
)

if TYPE_CHECKING:
    from qgrid.contracts import Built

MANIFEST = "manifest.json"
_RELOAD_TOLERANCE = 1e-6  # of the largest logit; see docs/artifacts.md


class BadArtifact(RuntimeError):
    """Stored files fail a check; `checks` holds all verdicts."""

    def __init__(self, checks: Sequence[Check], message: str) -> None:
        super().__init__(message)
        self.checks = tuple(checks)


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
    return codec.loads(Manifest, (folder / MANIFEST).read_text())


def build(job: Job) -> StageResult:
    """Make the artifact of a cell unless it is there; a second process waits and finds it.

    Raises:
        BadArtifact: what was made, or what is there, fails a fatal check.
    """
    target = Path(job.artifact)
    with locked(target.with_name(target.name + ".lock")):
        if (target / MANIFEST).is_file():
            return _reused(target, job)
        return _built(target, job)


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
    if not files.ok:
        return (files,)
    cell = planned.cell
    base = models.located(cell.model)
    contents = inspection.inspect(folder, base, cell.method.name)
    return (
        files,
        verification.check_manifest(manifest, contents, planned.artifact_id, cell),
        verification.check_bits(contents, cell),
        verification.check_coverage(contents, cell),
        _check_tokenizer(folder, base, manifest, cache),
        *((verification.check_finite(folder),) if full else ()),
        verification.check_environment(registry.method(cell.method.name).SUPPORTS),
    )


def require(checks: Sequence[Check], what: str) -> None:
    """Raise for the first failed fatal check.

    Raises:
        BadArtifact: names the check, what was expected and what was found.
    """
    failed = [check for check in checks if check.fatal and not check.ok]
    if failed:
        first = failed[0]
        raise BadArtifact(
            checks,
            f"{what} fails the check `{first.name}`: expected {first.expected}, "
            f"found {first.actual}",
        )


def _check_tokenizer(
    folder: Path, base: Path | None, manifest: Manifest, cache: HashCache
) -> Check:
    if base is None:
        return verification.check_tokenizer(folder, manifest.tokenizer)
    hashes = verification.tokenizer_hashes
    if hashes(folder, cache) == hashes(base, cache):
        return Check("tokenizer", True, "the base model's", "the base model's, byte for byte")
    return verification.check_tokenizer(folder, fingerprint(base))


def _reused(target: Path, job: Job) -> StageResult:
    """The result of a build that was done before, from its manifest."""
    manifest = load_manifest(target)
    return StageResult(
        stage="artifact",
        measurements=_measurements(manifest),
        checks=manifest.checks,
        observed=_observed(manifest) | {"reused": True},
        seconds={"build": 0.0},
    )


@dataclass(frozen=True)
class _Work:
    """One build under way."""

    job: Job
    source: Path
    folder: Path  # aside
    seconds: dict[str, float]

    @property
    def cell(self) -> Cell:
        return self.job.planned.cell

    def timed(self, phase: str, function: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = function()
        self.seconds[phase] = time.perf_counter() - begin
        return result


def _built(target: Path, job: Job) -> StageResult:
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    source = models.resolve(job.planned.cell.model)
    with PeakMemory() as peak, built_aside(target) as folder:
        work = _Work(job, source, folder, seconds)
        manifest = _make(work)
        manifest = replace(
            manifest, seconds=time.perf_counter() - begin, peak_memory_bytes=peak.read()
        )
        write_atomic(folder / MANIFEST, codec.dumps(manifest, indent=1))
    seconds["build"] = time.perf_counter() - begin
    return StageResult(
        stage="artifact",
        measurements=_measurements(manifest),
        checks=manifest.checks,
        observed=_observed(manifest) | {"reused": False},
        seconds=seconds,
    )


def _make(work: _Work) -> Manifest:
    """Quantize, check what was written, describe it."""
    cell, folder = work.cell, work.folder
    method = registry.method(cell.method.name)
    built = work.timed("quantize", lambda: method.quantize(cell, work.source, folder))
    checks = work.timed("verify", lambda: _verdicts(work, built))
    require(checks, f"artifact `{work.job.planned.artifact_id}` of method `{cell.method.name}`")
    contents = _contents(work, built)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    cache = HashCache(Path(work.job.store) / "hashes.json")
    return Manifest(
        artifact_id=work.job.planned.artifact_id,
        model=cell.model,
        method=cell.method,
        bits=cell.bits,
        format=contents.format,
        files={name: cache.sha256(folder / name, fresh=True) for name in names},
        sizes={name: (folder / name).stat().st_size for name in names},
        modules=contents.modules,
        dtypes=contents.dtypes,
        num_parameters=contents.num_parameters,
        bits_per_weight=contents.bits_per_weight,
        linear_bits_per_weight=contents.linear_bits_per_weight,
        tokenizer=fingerprint(folder),
        versions=verification.versions(method.SUPPORTS),
        calibration=built.calibration,
        checks=tuple(checks),
        seconds=0.0,
        peak_memory_bytes=0,
    )


def _contents(work: _Work, built: Built) -> inspection.Contents:
    """What the folder holds, with what really quantized each layer."""
    contents = inspection.inspect(work.folder, work.source, work.cell.method.name)
    named = built.module_methods or {}
    modules = {
        name: replace(state, method=named.get(name, state.method)) if state.method != "none" else state
        for name, state in contents.modules.items()
    }
    return replace(contents, modules=modules)


def _verdicts(work: _Work, built: Built) -> list[Check]:
    """All checks of a fresh build; the later ones need whole files."""
    folder, cell = work.folder, work.cell
    whole = verification.check_whole(folder)
    if not whole.ok:
        return [whole]
    contents = _contents(work, built)
    return [
        whole,
        verification.check_bits(contents, cell),
        verification.check_coverage(contents, cell),
        verification.check_tokenizer(folder, fingerprint(work.source)),
        verification.check_finite(folder),
        _check_reload(folder, cell, built),
        verification.check_environment(registry.method(cell.method.name).SUPPORTS),
    ]


def _check_reload(folder: Path, cell: Cell, built: Built) -> Check:
    """A fresh load of the folder computes what the model in memory computed."""
    from qgrid.methods import _checkpoint

    if built.reference is None:
        return Check("reload", False, "reference logits", "the method gave none", fatal=False)
    again = _checkpoint.logits(_checkpoint.reload(folder, cell), built.probe)
    apart = float((again - built.reference).abs().max())
    largest = float(built.reference.abs().max())
    ok = apart <= _RELOAD_TOLERANCE * largest
    goal = f"logits within {_RELOAD_TOLERANCE:g} of the largest ({largest:.4g})"
    return Check("reload", ok, goal, f"at most {apart:.3g} apart")


def _measurements(manifest: Manifest) -> tuple[Measurement, ...]:
    return (
        Measurement("size_on_disk_bytes", float(sum(manifest.sizes.values())), "bytes"),
        Measurement("bits_per_weight", manifest.bits_per_weight, "bits"),
        Measurement("linear_bits_per_weight", manifest.linear_bits_per_weight, "bits"),
    )


def _observed(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": manifest.format,
        "module_methods": verification.histogram(manifest.modules),
        "stored_dtypes": dict(manifest.dtypes),
        "versions": dict(manifest.versions),
        "build_peak_memory_bytes": manifest.peak_memory_bytes,
        "build_seconds": manifest.seconds,
    }
