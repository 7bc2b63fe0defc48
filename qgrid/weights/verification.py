"""Checks of a stored artifact: files, manifest, bits, coverage, tokenizer, finite; no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgrid import environment, models, phrases, registry
from qgrid.envs import locks
from qgrid.files import HashCache
from qgrid.layouts import MISSING
from qgrid.lora import adapters
from qgrid.types import Cell, Check, Manifest, MethodSupport, ModuleState
from qgrid.weights import inspection, widths
from qgrid.weights.fingerprint import difference
from qgrid.weights.finite import nonfinite
from qgrid.weights.inspection import Contents

_BITS_TOLERANCE = 0.01  # relative; layer by layer the format leaves no room, see `stored_bits`
_UNKNOWN_OVERHEAD = 1.0  # bits of scales that a method without `stored_bits` may add


class BadArtifact(RuntimeError):
    """Stored files fail a check; `checks` holds all verdicts."""

    def __init__(self, checks: Sequence[Check], message: str) -> None:
        super().__init__(message)
        self.checks = tuple(checks)


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


def check_files(folder: Path, manifest: Manifest, sha256: Callable[[Path], str]) -> Check:
    """Every listed file is there with its size and hash, and no weights beside them."""
    wrong = []
    for name, size in manifest.sizes.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} of {size} bytes")
        elif sha256(path) != manifest.files.get(name):
            wrong.append(f"{name} has another sha256")
    extra = {path.name for path in inspection.every_weight_file(folder)} - manifest.files.keys()
    wrong += [f"{name} is not in the manifest" for name in sorted(extra)]
    return _check("files", wrong, f"{len(manifest.files)} files as when built")


def check_whole(folder: Path) -> Check:
    """Weights and config are there and every weights file is as long as its header says."""
    wrong = [] if (folder / "config.json").is_file() else ["config.json is missing"]
    paths = inspection.weight_files(folder)
    wrong += [] if paths else ["there is no safetensors or GGUF file"]
    for path in paths:
        try:
            inspection.read_header(path)
        except inspection.TornFile as error:
            wrong.append(str(error))
    return _check("files", wrong, "whole weights files and a config")


def check_manifest(manifest: Manifest, contents: Contents, artifact_id: str, cell: Cell) -> Check:
    """The manifest belongs to this cell and tells what the files hold."""
    pairs: dict[str, tuple[Any, Any]] = {
        "artifact_id": (artifact_id, manifest.artifact_id),
        "method": (cell.method.name, manifest.method.name),
        "options": (dict(cell.method.options), dict(manifest.method.options)),
        "bits": (cell.bits, manifest.bits),
        "format": (contents.format, manifest.format),
        "dtypes": (dict(contents.dtypes), dict(manifest.dtypes)),
        "num_parameters": (contents.num_parameters, manifest.num_parameters),
        "bits_per_weight": (contents.bits_per_weight, manifest.bits_per_weight),
        "linear_bits_per_weight": (
            contents.linear_bits_per_weight,
            manifest.linear_bits_per_weight,
        ),
        "modules": (_widths(contents.modules), _widths(manifest.modules)),
    }
    wrong = [
        f"{key} says {_short(told)}, found {_short(found)}"
        for key, (found, told) in pairs.items()
        if found != told
    ]
    return _check("manifest", wrong, "tells what the files hold")


def check_bits(contents: Contents, cell: Cell) -> Check:
    """The format and the stored bits of every linear layer are those that were asked for."""
    method = registry.method(cell.method.name)
    wanted = registry.support(cell.method).produces[cell.bits]
    expected = _expected_bits(method, cell, contents.shapes)
    wrong = [] if contents.format == wanted else [f"format {contents.format}"]
    for name, state in contents.modules.items():
        low, high = expected[name]
        if not low * (1 - _BITS_TOLERANCE) <= state.bits <= high * (1 + _BITS_TOLERANCE):
            wrong.append(f"{name} has {state.bits:.4g} bits a weight")
    if not contents.modules:
        wrong.append("no linear layer was found")
    goal = f"{cell.bits} bits as {wanted}{_mean(contents, expected)}"
    found = f"{contents.linear_bits_per_weight:.4g} bits a weight as {contents.format}"
    return _check("bits", wrong, goal, found)


def _expected_bits(
    method: Any, cell: Cell, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[float, float]]:
    """Lowest and highest bits per weight of every layer."""
    exact, options = getattr(method, "stored_bits", None), cell.method.options

    def span(layer: str, shape: tuple[int, int]) -> tuple[float, float]:
        bits = widths.of(cell.bits, options, layer)
        if bits == widths.UNQUANTIZED:
            return bits, bits
        if exact is None:
            return bits, bits + _UNKNOWN_OVERHEAD
        value = exact(bits, options, *shape)
        return value if isinstance(value, tuple) else (value, value)

    return {layer: span(layer, shape) for layer, shape in shapes.items()}


def _mean(contents: Contents, expected: Mapping[str, tuple[float, float]]) -> str:
    weights = sum(state.num_weights for state in contents.modules.values())
    if not weights or contents.format == "safetensors-16bit":
        return ""
    low, high = (
        sum(expected[n][end] * s.num_weights for n, s in contents.modules.items()) / weights
        for end in (0, 1)
    )
    span = f"{high:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return f" ({span} with scales)"


def check_coverage(contents: Contents, cell: Cell) -> Check:
    """Every linear layer of the decoder except the head is quantized, or at 16 bits where asked.

    Only noted, not fatal, where the cell accepts that some layers are stored otherwise.
    """
    plain = {
        name
        for name in contents.modules
        if widths.of(cell.bits, cell.method.options, name) >= widths.UNQUANTIZED
    }
    wrong = [
        f"{name} ({state.format})"
        for name, state in contents.modules.items()
        if (state.method == "none") != (name in plain) or state.format == MISSING
    ]
    total = len(contents.modules)
    share = (total - len(wrong)) / total if total else 0.0
    goal = f"all linear layers {'at 16 bits' if cell.bits >= widths.UNQUANTIZED else 'quantized'}"
    if plain and cell.bits < widths.UNQUANTIZED:
        goal += f" but {len(plain)}"
    if not total:
        wrong.append("no linear layer was found")
    check = _check("coverage", wrong, goal, f"{total} of {total} layers")
    if check.ok:
        return check
    accepted = bool(cell.method.options.get("accept_fallback")) and share > 0
    return replace(check, actual=f"{share:.1%}, not {check.actual}", fatal=not accepted)


def check_method(contents: Contents, cell: Cell) -> Check:
    """Layers that the method left to another one; fatal when it treated none itself."""
    kinds = histogram(contents.modules)
    others = [
        f"{name} by {state.method}"
        for name, state in contents.modules.items()
        if state.method not in {cell.method.name, "none"}
    ]
    wanted = cell.method.name if cell.bits < 16 else "none"
    check = _check("method", others, f"all layers by {wanted}")
    return replace(check, fatal=not kinds.get(wanted))


def check_tokenizer(actual: Mapping[str, str], base: Mapping[str, str]) -> Check:
    """The tokenizer is the base model's, part by part, and encodes the probes alike."""
    wrong = difference(dict(base), dict(actual))
    return _check("tokenizer", [f"another {part}" for part in wrong], "the base model's")


def check_finite(folder: Path) -> Check:
    """No stored float is NaN or infinite; reads every byte."""
    wrong = [
        f"{count} in {name}"
        for path in inspection.weight_files(folder)
        for name, count in nonfinite(path).items()
    ]
    return _check("finite", wrong, "no NaN or infinity")


def own_checks(folder: Path, cell: Cell) -> tuple[Check, ...]:
    """What the cell's method itself says about stored files."""
    own = getattr(registry.method(cell.method.name), "checks", None)
    return () if own is None else tuple(own(folder, cell))


def support(cell: Cell) -> MethodSupport:
    """What the cell's method declares, and what the model's adapter needs."""
    found = registry.support(cell.method)
    return replace(found, packages=(*found.packages, *adapters.packages(cell.model)))


def check_environment(support: MethodSupport) -> Check:
    """The installed libraries are the locked ones; only a warning, for they made what they made."""
    kind = environment.kind_here(support.environment)
    locked = environment.locked_versions(support.environment, kind)
    wrong = []
    for name, found in environment.installed(support.packages, support.environment, kind).items():
        pinned = locked.get(environment.normalized(name))
        if pinned is not None and not locks.same(found, pinned):
            wrong.append(f"{name} {found} (locked {pinned})")
    return replace(_check("environment", wrong, "locked versions"), fatal=False)


def versions(support: MethodSupport) -> dict[str, str]:
    """Installed versions of what made and what loads the artifact."""
    names = {"transformers", "torch", "compressed-tensors", "tokenizers", *support.packages}
    kind = environment.kind_here(support.environment)
    return environment.installed(sorted(names), support.environment, kind)


def tokenizer_hashes(folder: Path, cache: HashCache) -> dict[str, str]:
    """Hashes of the tokenizer's files: equal bytes need no further comparison."""
    present = [folder / name for name in models.TOKENIZER_FILES if (folder / name).is_file()]
    return {path.name: cache.sha256(path) for path in present}


def histogram(modules: Mapping[str, ModuleState]) -> dict[str, int]:
    """How many layers each method quantized."""
    return dict(Counter(state.method for state in modules.values()))


def stored_widths(modules: Mapping[str, ModuleState]) -> dict[str, int]:
    """How many layers are stored in so many bits a weight, scales included."""
    found = Counter(round(state.bits, 2) for state in modules.values())
    return {f"{bits:g}": found[bits] for bits in sorted(found)}


def _widths(modules: Mapping[str, ModuleState]) -> dict[str, tuple[str, float, int]]:
    return {name: (s.format, s.bits, s.num_weights) for name, s in modules.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check(name: str, wrong: Sequence[str], expected: str, found: str | None = None) -> Check:
    """A fatal check that is good when nothing is wrong; else it shows a few of the faults."""
    if not wrong:
        return Check(name, True, expected, expected if found is None else found)
    return Check(name, False, expected, phrases.first(wrong))
