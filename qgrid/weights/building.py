"""One build of an artifact: quantize, check what was written, describe it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qgrid import registry
from qgrid.contracts import InvalidEngine, Unsupported
from qgrid.files import HashCache, sha256
from qgrid.lora import adapters
from qgrid.types import Cell, Check, Manifest, PlannedCell
from qgrid.weights import ends, inspection, skipped, verification, weightless
from qgrid.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from qgrid.contracts import Built
    from qgrid.lora.merging import Merged

# Largest difference of logits, as a share of the largest logit. Every method here reloads to the
# same bits on a CPU; on a GPU the model in memory and the reload may meet other kernels in bf16.
_RELOAD_TOLERANCE = {"cpu": 1e-6, "cuda": 2e-2}


@dataclass(frozen=True)
class Work:
    """One build under way."""

    planned: PlannedCell
    source: Path  # the base model
    folder: Path  # aside
    cache: HashCache
    seconds: dict[str, float]

    @property
    def cell(self) -> Cell:
        """The cell whose artifact it is."""
        return self.planned.cell

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the block's seconds under `phase`."""
        begin = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begin


def made(work: Work) -> Manifest:
    """Quantize, check what was written, describe it; seconds and memory are the caller's.

    An adapter that is to be merged goes into a copy of the base first, which is then the source.

    Raises:
        BadArtifact: what was written fails a fatal check.
    """
    if not adapters.is_merged(work.cell.model) or weightless.holds_none(work.cell.method):
        return _made(work, None)
    from qgrid.lora import merging

    beside, name = work.folder.parent, work.folder.name  # the same file system, hidden alike
    with TemporaryDirectory(dir=beside, prefix=f"{name}.") as place:
        with work.timed("merge"):
            merged = merging.merge(work.cell, work.source, Path(place))
        return _made(replace(work, source=Path(place)), merged)


def _made(work: Work, merged: Merged | None) -> Manifest:
    cell, folder = work.cell, work.folder
    with work.timed("quantize"):
        built = _quantized(work, merged)
    with work.timed("verify"):
        stored = not weightless.holds_none(cell.method)
        described = _described(work, built) if stored else weightless.described(work)
    with work.timed("hash"):
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        hashes = {name: _hash(folder / name, work.cache) for name in names}
    return replace(
        described,
        files=hashes,
        sizes={name: (folder / name).stat().st_size for name in names},
        calibration=built.calibration,
        versions=verification.versions(verification.support(cell)),
    )


def _quantized(work: Work, merged: Merged | None) -> Built:
    """What the method reports, with what is known of the adapter."""
    cell, folder = work.cell, work.folder
    method = registry.method(cell.method.name)
    own = getattr(method, "refusal", None)
    reason = None if own is None else own(cell)
    if reason is not None:  # the model was not here when the cell was planned
        raise Unsupported(reason)
    built = method.quantize(cell, work.source, folder)
    if cell.model.adapter is None:
        return built
    from qgrid.lora import merging

    if merged is None:
        return replace(built, checks=(*built.checks, *merging.keep(cell, folder, work.source)))
    merging.own(folder, work.source)
    built = replace(built, checks=(*merged.checks, *built.checks))
    if built.reference is not None or inspection.is_gguf(folder):
        return built
    return replace(built, probe=merged.probe, reference=merged.reference)


def _hash(path: Path, cache: HashCache) -> str:
    """A linked file of the base model may be remembered, one of ours is new."""
    return cache.sha256(path) if path.is_symlink() else sha256(path)


def _described(work: Work, built: Built) -> Manifest:
    """The manifest of what was written, once every fatal check holds.

    Raises:
        BadArtifact: a fatal check fails.
    """
    what = f"artifact `{work.planned.artifact_id}` of method `{work.cell.method.name}`"
    whole = verification.check_whole(work.folder)
    verification.require([whole], what)
    contents = _contents(work, built)
    tokenizer = fingerprint(work.folder)
    checks = [
        whole,
        *built.checks,
        *verification.own_checks(work.folder, work.cell),
        verification.check_bits(contents, work.cell),
        verification.check_coverage(contents, work.cell),
        verification.check_method(contents, work.cell),
        verification.check_tokenizer(tokenizer, fingerprint(work.source)),
        verification.check_finite(work.folder),
        *(() if inspection.is_gguf(work.folder) else (ends.check(work.folder, work.source),)),
    ]
    if all(check.ok for check in checks if check.fatal):  # a bad folder may not even load
        checks += _check_reload(work, built)
    checks.append(verification.check_environment(verification.support(work.cell)))
    verification.require(checks, what)
    return _manifest(work, contents, tokenizer, checks)


def _contents(work: Work, built: Built) -> inspection.Contents:
    """What the folder holds, with what really quantized each layer."""
    contents = inspection.inspect(work.folder, work.source, work.cell.method.name)
    named = built.module_methods or {}
    modules = {
        name: state
        if state.method == "none"
        else replace(state, method=named.get(name, state.method))
        for name, state in contents.modules.items()
    }
    return replace(contents, modules=modules)


def _check_reload(work: Work, built: Built) -> list[Check]:
    """A fresh load of the folder computes what the model in memory computed.

    No such check of a GGUF file: no library here holds it in memory while it is made.
    """
    if inspection.is_gguf(work.folder):
        return []
    if built.reference is None:
        linked = all(path.is_symlink() for path in inspection.weight_files(work.folder))
        told = "the base model's own files" if linked else "the method gave no reference"
        return [Check("reload", linked, "the logits of the model in memory", told, fatal=False)]
    from qgrid.methods import _checkpoint

    bad = int((~built.reference.isfinite()).sum())
    if bad:
        told = f"{bad} of {built.reference.numel()} are NaN or infinite"
        return [Check("finite_logits", False, "finite logits of the model in memory", told)]
    try:
        again = _checkpoint.logits(_checkpoint.reload(work.folder, work.cell), built.probe)
    except InvalidEngine as error:
        return [Check("reload", False, "a model of the stored tensors alone", str(error))]
    apart = float((again - built.reference).abs().max())
    largest = float(built.reference.abs().max())
    allowed = _RELOAD_TOLERANCE[work.cell.gpu.kind] * largest
    ok = apart <= allowed  # false for NaN too
    goal = f"logits at most {allowed:.2g} from the model in memory (largest {largest:.4g})"
    return [Check("reload", ok, goal, f"{apart:.3g} apart")]


def _manifest(
    work: Work,
    contents: inspection.Contents,
    tokenizer: Mapping[str, str],
    checks: Sequence[Check],
) -> Manifest:
    return Manifest(
        artifact_id=work.planned.artifact_id,
        model=work.cell.model,
        method=work.cell.method,
        bits=work.cell.bits,
        format=contents.format,
        files={},
        sizes={},
        modules=contents.modules,
        dtypes=contents.dtypes,
        num_parameters=contents.num_parameters,
        bits_per_weight=contents.bits_per_weight,
        linear_bits_per_weight=contents.linear_bits_per_weight,
        tokenizer=tokenizer,
        versions={},
        calibration=None,
        checks=tuple(checks),
        seconds=0.0,
        peak_memory_bytes=None,
        tensor_types=contents.tensor_types,
        modules_skipped=skipped.reasons(work.cell, contents, work.source),
    )
