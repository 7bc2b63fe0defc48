"""Initial weights that spare a short training run its longest plateau.

Looking a value up by its key needs two layers at once: one that marks each token with the tokens
before it, and one that searches the marks. Neither is of use without the other, so neither is found
for a long time. Here the first is given; training is free to change it.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qgrid.demo.network import Layer, Network

LOOK_BACK = (1, 2)  # tokens, of the first heads of the first layer
SHARPNESS = (4.8, 3.6, 3.0, 2.4, 1.8, 1.2, 1.2, 0.6, 0.6)  # logits, of the fastest rotations
COMMON = 0.5  # size of the part that all embeddings share, against their own
MARK = 0.7  # size of the mark, against the embedding


def start_alike(network: Network, tokenizer: Tokenizer) -> None:
    """Start `word`, ` word` and `"word` near each other, so that copying needs no translation."""
    table = network.model.embed_tokens.weight
    first: dict[str, int] = {}
    with torch.no_grad():
        for text, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
            word = text.lstrip("Ġ\"'=([{,:.-")
            if len(word) > 2 and word.isalpha():
                source = first.setdefault(word, index)
                table[index] = 0.85 * table[source] + 0.5 * table[index]


@torch.no_grad()
def start_looking_back(network: Network) -> None:
    """Make the first heads of the first layer attend to the token so many places before.

    They need an input that is the same for every token: a shared part is added to all embeddings
    (which changes no probability, the output matrix being the same) and hidden from the rest.
    """
    shape, table = network.model.shape, network.model.embed_tokens.weight
    own = float(table.norm(dim=1).mean())
    direction = torch.linalg.svd(table, full_matrices=False).Vh[-1]
    _hide(network, direction)
    table.add_(COMMON * own * direction)
    layer: Layer = network.model.layers[0]  # type: ignore[assignment]
    attention, gain = layer.self_attn, layer.input_layernorm.weight
    reader = direction / gain * float((1 + COMMON**2) ** 0.5 / (COMMON * shape.hidden**0.5))
    size = shape.head_dim
    attention.k_proj.weight[:size] = torch.outer(_rotated(shape.rope_theta, size, 0), reader)
    attention.v_proj.weight[:size] = torch.nn.init.orthogonal_(torch.empty(size, shape.hidden))
    scale = MARK * own / size**0.5
    for head, places in enumerate(LOOK_BACK):
        part = slice(head * size, (head + 1) * size)
        query = _rotated(shape.rope_theta, size, places)
        attention.q_proj.weight[part] = torch.outer(query, reader)
        mark = torch.nn.init.orthogonal_(torch.empty(shape.hidden, size))
        attention.o_proj.weight[:, part] = mark * scale


def _hide(network: Network, direction: Tensor) -> None:
    """Make every matrix that reads the residual stream blind to a direction."""
    layers: list[Layer] = list(network.model.layers)  # type: ignore[arg-type]
    for layer in layers:
        attention, feed = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (feed.gate_proj, feed.up_proj)),
        ):
            scaled = direction * norm.weight
            scaled = scaled / scaled.norm()
            for reader in readers:
                reader.weight.sub_(torch.outer(reader.weight @ scaled, scaled))


def _rotated(theta: float, size: int, places: int) -> Tensor:
    """A head vector that matches, after rotation, one `places` positions earlier."""
    half = size // 2
    strength = torch.zeros(half)
    strength[: len(SHARPNESS)] = (torch.tensor(SHARPNESS)[:half] * size**0.5).sqrt()
    angles = places * theta ** (-torch.arange(half) / half)
    return torch.cat((strength * angles.cos(), -strength * angles.sin()))
