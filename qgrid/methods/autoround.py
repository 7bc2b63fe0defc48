"""AutoRound: which way each weight rounds is learned, block by block, by the signs of gradients.

Symmetric weights go into all formats, those with zero points into `awq` alone: auto-round 0.15.1
fails to pack them for compressed-tensors ("Tensor must be quantized to torch.int8"), and writes
`gptq` only in its old form, whose readers lose zero points of 0. `gguf` means Q4_0 or Q8_0: their
grid is that of symmetric weights in groups of 32, so that nothing is rounded again.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import PositiveInt

from qgrid import calibration, models
from qgrid.contracts import Built, Unsupported
from qgrid.gguf import PACKAGES as GGUF_PACKAGES
from qgrid.libraries import gptq_kernels
from qgrid.methods import _checkpoint
from qgrid.methods import _gptqmodel as native
from qgrid.methods import _packed as packed
from qgrid.methods import _tuned_gguf as tuned_gguf
from qgrid.published.native import PACKAGES as NATIVE_PACKAGES
from qgrid.types import Cell, Check, MethodSupport
from qgrid.weights import widths

Format = Literal["compressed-tensors", "gptq", "awq", "gguf"]
_EXPORTS: Mapping[str, str] = {  # in the library's words
    "compressed-tensors": "llm_compressor",
    "gptq": "auto_gptq",
    "awq": "auto_awq",
    "gguf": "llm_compressor",  # its codes are taken over
}
_PACKAGES = ("auto-round", "torch", "transformers")
_READERS = {  # widths and further packages of the formats
    "gptq": (packed.BITS, NATIVE_PACKAGES[:3]),
    "awq": ((4,), NATIVE_PACKAGES[:3]),
    "gguf": (tuned_gguf.BITS, ("compressed-tensors", *GGUF_PACKAGES)),
}
_GROUP = 32  # of GGUF's types
_UNIT = 32  # rows and columns: the library leaves out layers that are no multiples
SUPPORTS = MethodSupport(
    bits=packed.BITS,
    default_bits=4,
    produces=dict.fromkeys(packed.BITS, packed.FORMAT),
    packages=(*_PACKAGES, "compressed-tensors"),
    calibrated=True,
)


@dataclass(frozen=True)
class Options:
    """`group_size` None: one scale a row. `iters`: steps a block; `batch_size`: rows a step."""

    format: Format
    group_size: PositiveInt | None
    symmetric: bool
    iters: PositiveInt
    batch_size: PositiveInt
    keep: Mapping[str, int] | None


def support(options: Mapping[str, Any]) -> MethodSupport:
    """What is made in the format that is asked for."""
    layout = options["format"]
    if layout == "compressed-tensors":
        return SUPPORTS
    bits, further = _READERS[layout]
    packages = tuple(dict.fromkeys((*_PACKAGES, *further)))
    return MethodSupport(bits, 4, dict.fromkeys(bits, str(layout)), packages, calibrated=True)


def stored_bits(bits: int, options: Mapping[str, Any], rows: int, columns: int) -> float:
    """Bits per weight of one layer in the format that the options ask for."""
    if options["format"] == "gguf":
        return bits + 16 / _GROUP
    layout: native.Layout = "awq" if options["format"] == "awq" else "gptq"
    return native.stored_bits(layout, bits, {**options, "scheme": None}, rows, columns)


def refusal(cell: Cell) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    options = cell.method.options
    if reason := _unpacked(options) or _ragged(cell) or widths.refusal(cell, packed.BITS):
        return reason
    source = models.known(cell.model)
    if source is None:
        return None
    return _unfit(cell, source)


def _unpacked(options: Mapping[str, Any]) -> str | None:
    """What the library does not export."""
    layout = options["format"]
    if layout == "gguf" and (reason := tuned_gguf.refusal(options, None)):
        return reason
    if not options["symmetric"] and layout != "awq":
        return (
            f"`method.symmetric=false` cannot be exported to `method.format={layout}` by "
            "auto-round 0.15.1; use `method.format=awq` or `method.symmetric=true`"
        )
    if options["keep"] and layout != "compressed-tensors":
        return (
            f"`method.keep` is not there in `method.format={layout}`, of which transformers 5.17.0 "
            "reads one width for all layers; leave it out or use `method.format=compressed-tensors`"
        )
    return None


def _ragged(cell: Cell) -> str | None:
    """Rows that the library cannot join."""
    if cell.calibration is None or cell.calibration.sampling != "documents":
        return None
    return (
        f"`calibration={cell.calibration.name}` has rows of different lengths "
        "(`calibration.sampling=documents`), and auto-round 0.15.1 joins rows of one length; "
        "set `calibration.sampling=packed`"
    )


def _unfit(cell: Cell, source: Path) -> str | None:
    """Which layers the groups or the library's unit do not divide."""
    group = cell.method.options["group_size"]
    rounded = widths.rounded(cell, source)
    if reason := packed.indivisible(rounded, group):
        return reason
    layout = cell.method.options["format"]
    if layout in {"gptq", "awq"} and (reason := native.unpackable(source, layout, group)):
        return reason
    if layout == "gguf" and (reason := tuned_gguf.refusal(cell.method.options, source)):
        return reason
    sizes = rounded.items()
    odd = [name for name, (rows, columns) in sizes if rows % _UNIT or columns % _UNIT]
    if not odd:
        return None
    return (
        f"`method=autoround` leaves out layers whose rows or columns {_UNIT} does not divide, here "
        f"{len(odd)}: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; use `method=gptq` or "
        "`method=rtn`"
    )


def quantize(cell: Cell, source: Path, out: Path) -> Built:
    """Write the checkpoint of `source` into `out`.

    Raises:
        Unsupported: the source is quantized already, or cannot be stored so.
    """
    _checkpoint.refuse_quantized(source)
    _checkpoint.refuse(_unpacked(cell.method.options) or _ragged(cell) or _unfit(cell, source))
    if cell.calibration is None:
        raise Unsupported("`method=autoround` needs a calibration; choose one")
    tokenizer = _checkpoint.tokenizer(source, cell.model)
    drawn = calibration.draw(cell.calibration, tokenizer, cell.seed)
    model = _checkpoint.load_16bit(source, cell.model)
    with _seen(model) as rows, TemporaryDirectory(dir=out, prefix=".") as folder:
        settings = _settings(cell, source, drawn.rows)
        tuned = _tuned(model, tokenizer, settings, cell.method.options["format"], Path(folder))
        if cell.method.options["format"] != "gguf":
            _adopt(Path(folder), out)
    _checkpoint.copy_tokenizer(source, out)
    seen = _check_rows(rows, drawn.rows)
    if cell.method.options["format"] == "gguf":
        checks = tuned_gguf.write(cell, source, out, tuned)
        return Built(calibration=drawn.summary, checks=(seen, *checks))
    _settle(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(
        probe=ids,
        reference=_checkpoint.logits(_as_reloaded(tuned, out, cell), ids),
        calibration=drawn.summary,
        checks=(seen,),
    )


def _settings(cell: Cell, source: Path, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Arguments of the library's `AutoRound`."""
    options = Options(**cell.method.options)
    return {
        "bits": cell.bits,
        "group_size": native.ROW_GROUP if options.group_size is None else options.group_size,
        "sym": options.symmetric,
        "iters": options.iters,
        "batch_size": min(options.batch_size, len(rows)),
        "dataset": native.token_rows(rows),
        "nsamples": len(rows),
        "seqlen": len(rows[0]),
        "layer_config": _layers(cell, source),
        "scale_dtype": _scale_dtype(source, options.format),
        "device_map": cell.gpu.kind,
        "seed": cell.seed,
        "low_cpu_mem_usage": False,  # else the packed layers are gone from memory
        "enable_torch_compile": False,  # it takes minutes on a CPU
    }


def _tuned(
    model: Any, tokenizer: Any, settings: Mapping[str, Any], layout: Format, folder: Path
) -> Any:
    """Run the library: it packs `model` in memory, which is returned, and writes below `folder`."""
    gptq_kernels.library()
    from auto_round import AutoRound
    from auto_round.logger import logger

    logger.setLevel("ERROR")
    with _quick_collections():
        tuning = AutoRound(model, tokenizer, **settings)
        tuned, _ = tuning.quantize_and_save(str(folder), format=_EXPORTS[layout])
    return tuned


@contextmanager
def _quick_collections() -> Iterator[None]:
    """The library collects garbage after every step of a block: only its own, not all there is."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _layers(cell: Cell, source: Path) -> dict[str, dict[str, Any]] | None:
    """Layers of another width than the rest."""
    others = widths.others(cell, source).items()
    return {layer: {"bits": bits} for bits, layers in others for layer in layers} or None


def _scale_dtype(source: Path, layout: str) -> str:
    """A reader of compressed-tensors has scales in the model's dtype, the native ones fp16."""
    wide = str(_checkpoint.dtype_16bit(source)) == "torch.bfloat16"
    return "bf16" if wide and layout == "compressed-tensors" else "fp16"


@contextmanager
def _seen(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Rows of token ids that go through the model meanwhile."""
    rows: list[tuple[int, ...]] = []

    def note(_: Any, given: Any) -> None:
        rows.extend(tuple(row) for row in given[0].tolist())

    hook = model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield rows
    finally:
        hook.remove()


def _check_rows(seen: Sequence[tuple[int, ...]], drawn: Sequence[tuple[int, ...]]) -> Check:
    """The library has a data set of its own, and drops rows that it finds too short."""
    found = f"{len(set(seen) & set(drawn))} of {len(set(drawn))}"
    if extra := len(set(seen) - set(drawn)):
        found += f" and {extra} others"
    goal = f"{len(set(drawn))} of {len(set(drawn))}"
    return Check("calibration_rows", found == goal, goal, found)


def _adopt(folder: Path, out: Path) -> None:
    """Take the checkpoint out of the library's subfolder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" or path.name in native.KEPT:
            shutil.move(path, out / path.name)


def _settle(source: Path, out: Path) -> None:
    """Let the config say the dtype that is stored, and what readers take for granted."""
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(_checkpoint.dtype_16bit(source)).removeprefix("torch.")
    told = config["quantization_config"]
    if told["quant_method"] == "gptq":
        told["checkpoint_format"] = "gptq"
    if told["quant_method"] == "awq":
        told["zero_point"] = True  # they are stored, also of a symmetric quantization
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _as_reloaded(tuned: Any, out: Path, cell: Cell) -> Any:
    """The packed layers in memory, in the layers that multiply them: the library's own cannot."""
    from transformers import AutoConfig

    remote = models.load_options(cell.model)
    kernel = gptq_kernels.asked(out, gptq_kernels.PLAIN, "auto", cell.gpu.kind)
    config = AutoConfig.from_pretrained(out, **remote)
    return (
        type(tuned)
        .from_pretrained(None, config=config, state_dict=tuned.state_dict(), dtype="auto", **kernel)
        .eval()
    )
