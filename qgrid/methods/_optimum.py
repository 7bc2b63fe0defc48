"""GPTQ through transformers' `GPTQConfig`: optimum walks the blocks, gptqmodel quantizes a layer.

The checkpoint is GPTQ's own format in its second form. Columns are treated as they lie: optimum
2.3.0 has an order by activation only with groups that follow it, which another reader takes amiss.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qgrid import calibration
from qgrid.contracts import Built, Unsupported
from qgrid.libraries import gptq_kernels
from qgrid.methods import _checkpoint
from qgrid.methods import _gptqmodel as native
from qgrid.methods import _packed as packed
from qgrid.types import Cell

_TOLD = ("bits", "group_size", "sym", "desc_act", "damp_percent", "quant_method", "meta")


def refusal(options: Mapping[str, Any]) -> str | None:
    """Which option this way does not have."""
    if options["activation_order"] is None:
        return None
    return (
        f"`method.activation_order={options['activation_order']}` is not there in "
        "`method.library=optimum` (has: null); leave the columns as they lie or use "
        "`method.library=gptqmodel`"
    )


def quantize(cell: Cell, source: Path, out: Path, dampening: float) -> Built:
    """Quantize `source` while transformers loads it, and write the checkpoint into `out`.

    Raises:
        Unsupported: the source is quantized already, or the format cannot take it.
    """
    _checkpoint.refuse_quantized(source)
    stored = packed.weights(cell.bits, cell.method.options)
    _checkpoint.refuse(native.unpackable(source, "gptq", stored.group_size))
    if cell.calibration is None:
        raise Unsupported(f"`method={cell.method.name}` needs a calibration; choose one")
    tokenizer = _checkpoint.tokenizer(source, cell.model)
    drawn = calibration.draw(cell.calibration, tokenizer, cell.seed)
    settings = {
        "bits": stored.bits,
        "group_size": native.ROW_GROUP if stored.group_size is None else stored.group_size,
        "sym": stored.symmetric,
        "damp_percent": dampening,
    }
    with _noted_fallbacks() as names:
        model = _quantized(cell, source, settings, drawn.rows)
    _save(model, out)
    _checkpoint.copy_tokenizer(source, out)
    ids = _checkpoint.probe(source, cell)
    return Built(
        probe=ids,
        reference=_checkpoint.logits(model, ids),
        module_methods=dict.fromkeys(names, "rtn"),
        calibration=drawn.summary,
    )


def _quantized(
    cell: Cell, source: Path, settings: Mapping[str, Any], rows: Sequence[Sequence[int]]
) -> Any:
    gptq_kernels.library()
    from transformers import GPTQConfig

    logging.getLogger("optimum.gptq.quantizer").setLevel(logging.WARNING)
    config = GPTQConfig(
        **settings,
        dataset=native.token_rows(rows),
        tokenizer="",  # its rows are tokens already
        model_seqlen=len(rows[0]),
        desc_act=False,
        act_group_aware=False,
        backend=f"gptq_{gptq_kernels.PLAIN}",
    )
    place = {"": 0 if cell.gpu.kind == "cuda" else "cpu"}
    return _checkpoint.load_16bit(source, cell.model, quantization_config=config, device_map=place)


@contextmanager
def _noted_fallbacks() -> Iterator[list[str]]:
    """Names of the layers that the library only rounded, known before they are packed."""
    from gptqmodel.quantization.gptq import GPTQ
    from optimum.gptq import GPTQQuantizer

    names: list[str] = []
    rounded: list[Any] = []
    treat, pack = GPTQ.quantize, GPTQQuantizer.pack_model

    def noting(self: Any, *args: Any, **arguments: Any) -> Any:
        found = treat(self, *args, **arguments)
        if any(isinstance(each, str) and "fallback" in each for each in found):
            rounded.append(self.module)
        return found

    def naming(self: Any, model: Any, quantizers: Any) -> Any:
        modules = {id(each) for each in rounded}
        names.extend(name for name, each in model.named_modules() if id(each) in modules)
        return pack(self, model, quantizers)

    GPTQ.quantize, GPTQQuantizer.pack_model = noting, naming
    try:
        yield names
    finally:
        GPTQ.quantize, GPTQQuantizer.pack_model = treat, pack


def _save(model: Any, out: Path) -> None:
    """Write weights and config; the config tells the format alone, not what calibrated it."""
    told = model.config.quantization_config
    told.dataset, told.tokenizer = None, None
    model.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    stored = config["quantization_config"]
    kept = {key: stored[key] for key in _TOLD}
    config["quantization_config"] = kept | {"checkpoint_format": stored["format"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
