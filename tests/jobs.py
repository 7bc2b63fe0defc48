"""Jobs that build artifacts of a model folder, and faults planted into what was built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qgrid import codec, files, registry
from qgrid.types import Calibration, Cell, Job, Manifest, Method, Model, PlannedCell
from qgrid.weights import inspection
from qgrid.weights.artifacts import MANIFEST

CONF = Path(__file__).parents[1] / "conf"


def options(method: str, **changes: Any) -> dict[str, Any]:
    """The options that the method's YAML gives, with changes."""
    values: dict[str, Any] = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text())
    assert values.pop("name") == method
    return values | changes


def texts(folder: Path) -> Path:
    """A small calibration file."""
    path = folder / "calibration.jsonl"
    words = ["red", "green", "blue", "amber", "cold", "warm", "north", "bridge", "river", "seven"]
    lines = [
        {"text": " ".join(words[(i * j) % len(words)] for j in range(40))} for i in range(1, 60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def calibration(path: Path, **changes: Any) -> Calibration:
    return replace(Calibration("t", str(path), None, None, "train", "text", 8, 64), **changes)


def job(
    make: Callable[..., Cell], store: Path, model: Path, method: str, bits: int, **changes: Any
) -> Job:
    """The artifact job of `method` at `bits` on the checkpoint in `model`."""
    values = options(method, **changes)
    drawn = None
    if registry.method(method).SUPPORTS.calibrated:
        store.mkdir(parents=True, exist_ok=True)
        short = {"samples": 4, "length": 32} if method == "awq" else {}  # its search takes long
        drawn = calibration(texts(store), **short)
    cell = make(
        model=Model("random", str(model), None, False, False),
        method=Method(method, values),
        bits=bits,
        calibration=drawn,
    )
    artifact_id = codec.digest([str(model), method, bits, values])
    planned = PlannedCell("cell", artifact_id, "quality", None, cell, False)
    folder = store / "artifacts" / artifact_id
    return Job("artifact", planned, str(folder), None, str(store / "out"), str(store))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1000])


def plant_nan(folder: Path) -> None:
    """One value of the first stored float tensor that quantization keeps."""
    write_float(folder, 0x7FC0)


def write_float(folder: Path, bits: int, within: str = "") -> None:
    path = folder / "model.safetensors"
    header = sorted(inspection.read_header(path).items())
    start = next(
        place for name, (tensor, place) in header if tensor.dtype == "BF16" and within in name
    )
    data = bytearray(path.read_bytes())
    data[start : start + 2] = np.uint16(bits).tobytes()
    path.unlink()
    path.write_bytes(data)


def swap_tokenizer(folder: Path) -> None:
    """Exchange two entries of the vocabulary: same size, same files."""
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocab = stored["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.__getitem__)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.unlink()
    path.write_text(json.dumps(stored))


def unquantize(source: Path) -> Callable[[Path], None]:
    """Put the 16-bit weights where the quantized ones were; the config still claims them."""

    def plant(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")

    return plant


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the files as they are now, and with `changes`."""
    path = folder / MANIFEST
    manifest = codec.loads(Manifest, path.read_text())
    hashes = {name: files.sha256(folder / name) for name in manifest.files}
    sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    path.write_text(codec.dumps(replace(manifest, files=hashes, sizes=sizes, **changes)))
