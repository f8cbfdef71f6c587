"""Train single rows of the embedding and of the output layer: those of some tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RowValues(nn.Module):
    """The rows ``trainable_tokens_delta`` (n, columns), float32, which PEFT also calls so although
    they are the rows themselves."""

    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.trainable_tokens_delta = values


class TokenRows(nn.Module):
    """Replaces ``base_layer``, an embedding or the linear output layer, of whose weight W
    (tokens, columns) the rows ``indices`` have values of their own; W itself is frozen.

    Tied layers share ``values``, the float32 rows, which are cast to the dtype of the layer.
    """

    def __init__(self, base_layer: nn.Module, indices: Sequence[int], values: nn.Parameter) -> None:
        super().__init__()
        # The first parameter of a model tells its dtype, so the base comes first.
        self.base_layer = base_layer
        self.token_adapter = RowValues(values)
        device, index = values.device, torch.tensor(indices, dtype=torch.long)
        places = torch.full((len(self.weight),), -1, dtype=torch.long)
        places[index] = torch.arange(len(index))
        self.register_buffer("indices", index.to(device), persistent=False)
        self.register_buffer("places", places.to(device), persistent=False)
        self.indices: Tensor
        self.places: Tensor

    @property
    def values(self) -> nn.Parameter:
        """The rows, in the order of ``indices``."""
        return self.token_adapter.trainable_tokens_delta

    @property
    def weight(self) -> Tensor:
        """W of the base, without the rows. Some models read its dtype or device."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The embeddings (..., columns) of token ids (...), or logits (..., tokens) for hidden
        states (..., columns)."""
        y: Tensor = self.base_layer(x)
        if not isinstance(self.base_layer, nn.Embedding):
            bias = getattr(self.base_layer, "bias", None)
            own_bias = bias[self.indices] if isinstance(bias, Tensor) else None
            own = F.linear(x.to(y.dtype), self.values.to(y.dtype), own_bias)
            return y.index_copy(-1, self.indices, own)
        places = self.places[x]
        own = F.embedding(places.clamp(min=0), self.values.to(y.dtype))
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:  # Gemma's embeddings multiply their rows
            own = own * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((places >= 0).unsqueeze(-1), own, y)


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """The layers with rows of their own, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TokenRows)}


def vocabulary_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embedding, and the output layer if the model has one, by name."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {n: m for n, m in model.named_modules() if any(m is end for end in ends)}


def place_rows(
    model: nn.Module, indices: Sequence[int], values: Mapping[str, Tensor]
) -> dict[str, TokenRows]:
    """Give each layer of ``values`` these rows (n, columns), float32, and return the new layers.
    Layers that share their weight share the rows, those of the first one."""
    placed: dict[str, TokenRows] = {}
    shared: dict[int, nn.Parameter] = {}
    for name, rows in values.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        own = nn.Parameter(rows, requires_grad=False)
        placed[name] = TokenRows(layer, indices, shared.setdefault(id(weight), own))
        model.set_submodule(name, placed[name])
    return placed
