"""Models through transformers, made of the stored tensors alone.

Where a checkpoint lacks a tensor, transformers makes up random numbers for it and only warns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgrid import phrases
from qgrid.contracts import InvalidEngine


def pretrained(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, with a word for every tensor that was made up.

    Raises:
        InvalidEngine: tensors of the model are not in the folder, or in another shape.
    """
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **arguments
    )
    lacking = sorted(told["missing_keys"])
    lacking += sorted(str(key[0]) for key in told.get("mismatched_keys", ()))
    if lacking:
        raise InvalidEngine(
            f"transformers finds {len(lacking)} tensors of the model in no file of `{folder}` and "
            f"makes up random numbers for them: {phrases.first(lacking, ', ')}; use a whole "
            "checkpoint, and one whose config names what is quantized as transformers does"
        )
    _require_tied(model, folder)
    return model


def _require_tied(model: Any, folder: Path) -> None:
    """A config that shares embedding and head is believed only where they are the same numbers.

    transformers 5.17 leaves them apart where a file holds two that differ.
    """
    import torch

    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(config, "tie_word_embeddings", False) or head is None or embedding is None:
        return
    one, other = getattr(head, "weight", None), getattr(embedding, "weight", None)
    if type(one) is not torch.nn.Parameter or type(other) is not torch.nn.Parameter:
        return  # quantized: its own checks compare it
    if one is not other and not torch.equal(one, other):
        raise InvalidEngine(
            f"the config of `{folder}` says that head and embedding are the same matrix, but its "
            "files hold two that differ; use a whole checkpoint of one of them"
        )
