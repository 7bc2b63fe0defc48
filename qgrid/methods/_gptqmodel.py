"""Checkpoints in the formats that GPTQ and AWQ brought with them, through gptqmodel.

`gptq` keeps whole 32-bit words of codes and zero points, fp16 scales and the group of every column;
`awq` the same without the groups. Both hold zero points whether they are needed or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from qgrid import calibration, models
from qgrid.contracts import Built, Unsupported
from qgrid.libraries import gptq_kernels
from qgrid.methods import _checkpoint
from qgrid.methods import _packed as packed
from qgrid.published.native import PACKAGES
from qgrid.types import Cell, MethodSupport
from qgrid.weights import inspection

Layout = Literal["gptq", "awq"]
GROUPS = (16, 32, 64, 128)  # what some kernel of a CPU multiplies in every width
_MULTIPLE = {"gptq": 32, "awq": 8}  # rows (and columns of `gptq`) that are packed together
ROW_GROUP = -1  # the library's word for one scale a row


def supports(layout: Layout, bits: tuple[int, ...]) -> MethodSupport:
    """What a method makes through gptqmodel."""
    return MethodSupport(
        bits=bits,
        default_bits=4,
        produces=dict.fromkeys(bits, layout),
        packages=PACKAGES,
        calibrated=True,
    )


def is_native(layout: Layout, options: Mapping[str, Any]) -> bool:
    """Whether the options of a method ask for its own format, and so for this library."""
    return bool(options["format"] == layout)


def stored_bits(
    layout: Layout, bits: int, options: Mapping[str, Any], rows: int, columns: int
) -> float:
    """Bits per weight of one layer in the format that the options ask for.

    The native one holds codes, zero points, 16-bit scales and the columns' groups.
    """
    if not is_native(layout, options):
        return packed.stored_bits(bits, options, rows, columns)
    stored = packed.weights(bits, options)
    groups = 1 if stored.group_size is None else -(-columns // stored.group_size)
    places = 32 * columns if layout == "gptq" else 0
    each_group = groups * rows * (stored.bits + 16)
    return (rows * columns * stored.bits + each_group + places) / (rows * columns)


def refusal(cell: Cell, layout: Layout) -> str | None:
    """Why the cell's model cannot be stored so; None if it can, or is not on this machine."""
    if cell.method.options["keep"]:
        return (
            f"`method.keep` is not there in `method.format={layout}`, of which transformers 5.17.0 "
            "reads one width for all layers; leave it out or use `method.format=compressed-tensors`"
        )
    source = models.known(cell.model)
    if source is None:
        return None
    return unpackable(source, layout, packed.weights(cell.bits, cell.method.options).group_size)


@cache
def unpackable(source: Path, layout: Layout, group_size: int | None) -> str | None:
    """Which layers of a checkpoint the format cannot hold, and what to do instead."""
    if group_size not in (*GROUPS, None):
        has = ", ".join(str(group) for group in GROUPS)
        return (
            f"`method.group_size={group_size}` is not there in `method.format={layout}` "
            f"(has: {has}, null); use one of them or `method.format=compressed-tensors`"
        )
    linears = inspection.decoder_linears(inspection.read_headers(source))
    reason = packed.indivisible(linears, group_size)
    if reason is not None:
        return reason
    unit = _MULTIPLE[layout]
    odd = [name for name, (rows, columns) in linears.items() if rows % unit or columns % unit]
    if not odd:
        return None
    return (
        f"`method.format={layout}` packs {unit} rows and columns together, which does not divide "
        f"{len(odd)} layers: {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; use "
        "`method.format=compressed-tensors`"
    )


@dataclass(frozen=True)
class Recipe:
    """How the library quantizes: `options` of its configuration, and the run itself.

    `rounded` runs the library's model on the calibration and names the layers that it only rounded.
    """

    layout: Layout
    options: Mapping[str, Any]
    rounded: Callable[[Any, Mapping[str, Any]], Sequence[str]]


def quantize(cell: Cell, source: Path, out: Path, recipe: Recipe) -> Built:
    """Run gptqmodel on `source` and write the native checkpoint into `out`.

    Raises:
        Unsupported: the source is quantized already, or the format or the library cannot take it.
    """
    _checkpoint.refuse_quantized(source)
    stored = packed.weights(cell.bits, cell.method.options)
    _checkpoint.refuse(unpackable(source, recipe.layout, stored.group_size))
    if cell.calibration is None:
        raise Unsupported(f"`method={cell.method.name}` needs a calibration; choose one")
    tokenizer = _checkpoint.tokenizer(source, cell.model)
    drawn = calibration.draw(cell.calibration, tokenizer, cell.seed)
    model = _loaded(cell, source, _configuration(recipe, stored))
    with _logs_aside():
        names = recipe.rounded(model, _calibration(drawn.rows))
        model.save(str(out))
    _tidy(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(
        probe=ids,
        reference=_checkpoint.logits(_as_reloaded(model), ids),
        module_methods=dict.fromkeys(names, "rtn"),
        calibration=drawn.summary,
    )


def _configuration(recipe: Recipe, stored: packed.Weights) -> Any:
    gptq_kernels.library()
    from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig

    group = ROW_GROUP if stored.group_size is None else stored.group_size
    common = {"bits": stored.bits, "group_size": group, "sym": stored.symmetric, **recipe.options}
    # The other way to pack compiles C++ first; here nothing needs a compiler.
    common |= {"offload_to_disk": False, "pack_impl": "original"}
    if recipe.layout == "awq":
        return AWQConfig(**common, format=FORMAT.GEMM)
    # The old form keeps zero points less one: readers that unpack code by code lose those of 0.
    form = FORMAT.GPTQ if stored.symmetric else FORMAT.GPTQ_V2
    return GPTQConfig(**common, format=form, act_group_aware=False)


def _loaded(cell: Cell, source: Path, configuration: Any) -> Any:
    """The library's own model around the 16-bit checkpoint."""
    library = gptq_kernels.library()
    from gptqmodel.models.auto import SUPPORTED_MODELS

    kind = json.loads((source / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind not in SUPPORTED_MODELS:
        raise Unsupported(
            f"gptqmodel, which makes `method.format={cell.method.options['format']}`, does not "
            f"know the architecture `{kind}`; use `method.format=compressed-tensors`"
        )
    return library.GPTQModel.load(
        str(source),
        configuration,
        device=cell.gpu.kind,
        dtype=_checkpoint.dtype_16bit(source),
        **models.load_options(cell.model),
    )


@contextmanager
def _logs_aside() -> Iterator[None]:
    """Keep the library's tables of losses, which the artifact has too, out of the user's folder."""
    from gptqmodel.looper import loop_processor

    original = loop_processor._PROJECT_LOG_DIR
    with TemporaryDirectory(prefix="qgrid-gptqmodel-", ignore_cleanup_errors=True) as folder:
        loop_processor._PROJECT_LOG_DIR = Path(folder)
        try:
            yield
        finally:
            loop_processor._PROJECT_LOG_DIR = original


def _calibration(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Arguments of the library's `quantize` that keep the rows as they were drawn."""
    return {
        "calibration": token_rows(rows),
        "calibration_sort": None,
        "calibration_data_min_length": 1,
        "batch_size": 1,
    }


def token_rows(rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The rows as these libraries take tokenized text: one a batch, nothing masked."""
    import torch

    ids = [torch.tensor([list(row)]) for row in rows]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def _tidy(source: Path, out: Path) -> None:
    """Keep weights and config; the tokenizer is the source's own.

    What differs from run to run (a temporary folder, a table of seconds) goes, and what the
    config says already.
    """
    for path in out.iterdir():
        if path.suffix != ".safetensors" and path.name not in KEPT:
            path.unlink()
    _checkpoint.copy_tokenizer(source, out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    told = config["quantization_config"]
    told["meta"].pop("offload_to_disk_path", None)
    told["desc_act"] = False  # groups lie in the order of the columns, see `g_idx`
    if "zero_point" in told:
        told["zero_point"] = True  # they are stored, also of a symmetric quantization
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


KEPT = ("config.json", "generation_config.json", "model.safetensors.index.json")


def _as_reloaded(model: Any) -> Any:
    """The model in memory in the form that its kernel multiplies.

    The library packs for the file: zero points less one, where the old form of `gptq` is written.
    """
    from gptqmodel.quantization.config import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format

    configuration = model.quantize_config
    if configuration.format == FORMAT.GPTQ:
        convert_gptq_v1_to_v2_format(model.model, configuration, model.qlinear_kernel)
    return model.model.eval()
