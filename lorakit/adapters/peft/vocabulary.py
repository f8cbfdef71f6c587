"""Extend a model's embeddings to the vocabulary that an adapter was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.peft.schema import EMBEDDING_FACTORS, LINEAR_FACTORS
from lorakit.adapters.peft.tokens import StoredRows
from lorakit.errors import AdapterError
from lorakit.models.token_rows import vocabulary_layers
from lorakit.models.vocabulary import extend_embeddings

#: Module -> suffix -> factor.
Factors = Mapping[str, Mapping[str, Tensor]]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding and the output layer of a model of transformers by name, else none."""
    if isinstance(model, PreTrainedModel):
        with suppress(NotImplementedError):
            return vocabulary_layers(model)
    return {}


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of rows of the embedding; None if there is no table."""
    layers = layers_of(model).values()
    found = next((layer for layer in layers if isinstance(layer, nn.Embedding)), None)
    return None if found is None else found.num_embeddings


def needed_size(
    model: nn.Module, given: Mapping[str, Tensor], factors: Factors, rows: Mapping[str, StoredRows]
) -> int | None:
    """Return the number of rows of the vocabulary with an adapter, whose weights are ``given``;
    None for a model without one. Raises AdapterError if some would have no values."""
    own = size = vocabulary_size(model)
    if size is None:
        return None
    layers = layers_of(model)
    for name, layer in layers.items():
        for shape in _matrices(name, given, factors):
            if shape[1:] == _shape(layer)[1:]:
                size = max(size, shape[0])
    size = max([size, *(index + 1 for own in rows.values() for index in own.indices)])
    if size != own:
        _check_covered(layers, size, given, rows)
    return size


def _check_covered(
    layers: Mapping[str, nn.Module],
    size: int,
    given: Mapping[str, Tensor],
    rows: Mapping[str, StoredRows],
) -> None:
    """Raise AdapterError if rows up to ``size`` are in neither the base nor the adapter."""
    for name, layer in layers.items():
        have = _shape(layer)[0]
        sharing = [other for other, module in layers.items() if module.weight is layer.weight]
        known = {index for other in sharing if other in rows for index in rows[other].indices}
        absent = next((index for index in range(have, size) if index not in known), None)
        if absent is not None and not any(f"{other}.weight" in given for other in sharing):
            raise AdapterError(
                f"{name}: row {absent} is in neither the base, which has {have} rows, nor the "
                "adapter",
                hint="pass a base with it (resize_token_embeddings, then save_pretrained)",
            )


def check_vocabulary(
    directory: object, model: nn.Module, given: Mapping[str, Tensor], factors: Factors
) -> None:
    """Raise AdapterError if the adapter was trained with another vocabulary size."""
    for name, layer in layers_of(model).items():
        own = _shape(layer)
        for shape in _matrices(name, given, factors):
            if shape != own and shape[1:] == own[1:]:
                raise AdapterError(
                    f"{directory}: {name} has {shape[0]} rows, and {own[0]} in the base: the "
                    "vocabulary was resized for training",
                    hint="pass a base of that size (resize_token_embeddings, then save_pretrained)",
                )


@contextmanager
def extended_vocabulary(model: nn.Module, size: int | None) -> Iterator[None]:
    """Extend the embeddings to ``size`` rows, unless they have as many; undone if the block raises
    AdapterError."""
    if size is None or not isinstance(model, PreTrainedModel):
        yield
        return
    before = vocabulary_size(model) or 0
    extend_embeddings(model, size)
    try:
        yield
    except AdapterError:
        if size > before:
            model.resize_token_embeddings(before, mean_resizing=False)
        raise


def _matrices(
    name: str, given: Mapping[str, Tensor], factors: Factors
) -> Iterator[tuple[int, ...]]:
    """The shapes of the layer's matrix, as far as the adapter's tensors determine it."""
    if (weight := given.get(f"{name}.weight")) is not None:
        yield tuple(weight.shape)
    own = factors.get(name, {})
    if own.keys() >= set(LINEAR_FACTORS):
        yield len(own[LINEAR_FACTORS.B]), own[LINEAR_FACTORS.A].shape[-1]
    if own.keys() >= set(EMBEDDING_FACTORS):
        yield own[EMBEDDING_FACTORS.A].shape[-1], len(own[EMBEDDING_FACTORS.B])


def _shape(layer: nn.Module) -> tuple[int, ...]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)
