"""Rows of the embedding and the output layer that are trained for some tokens, in PEFT's format.

``adapter_config.json`` has their ids as ``trainable_token_indices``: a list for the embedding, or
one for each layer by name. The weights file has the rows themselves, not their changes. Where
the model ties both layers, only the embedding's are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.peft.schema import TOKEN_ROWS
from lorakit.errors import AdapterError, shown
from lorakit.models.token_rows import place_rows, token_rows


@dataclass(frozen=True)
class StoredRows:
    """The rows (n, columns) of the tokens ``indices`` in one layer."""

    indices: tuple[int, ...]
    values: Tensor

    def put(self, weight: Tensor, first: int = 0) -> None:
        """Write the rows into ``weight``, the rows of a matrix from ``first`` on."""
        places = torch.tensor(self.indices) - first
        inside = (places >= 0) & (places < len(weight))
        weight[places[inside]] = self.values[inside].to(weight.dtype)


def rows_to_peft(
    model: nn.Module, renamed: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the key of ``adapter_config.json`` and the tensors for the rows of ``model``; both are
    empty if it has none."""
    found = token_rows(model)
    layers = sorted(found, key=lambda name: not _embeds(found[name].base_layer))
    stored: dict[int, str] = {}
    for name in layers:
        stored.setdefault(id(found[name].values), name)
    if not stored:
        return {}, {}
    tensors = {
        f"{renamed(name)}.{TOKEN_ROWS}": found[name].values.detach() for name in stored.values()
    }
    indices: Any = {renamed(n): found[n].indices.tolist() for n in stored.values()}
    if len(indices) == 1 and _embeds(found[layers[0]].base_layer):
        (indices,) = indices.values()
    return {"trainable_token_indices": indices}, tensors


def check_indices(config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for ``trainable_token_indices`` of another type."""
    given = config.get("trainable_token_indices")
    lists = given.values() if isinstance(given, dict) else [given or []]
    for indices in lists:
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise AdapterError(
                f"{where}: trainable_token_indices = {shown(given)}: allowed: a list of token ids, "
                "or a list for each layer by name"
            )


def stored_rows(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
) -> dict[str, StoredRows]:
    """Return the rows of an adapter by the name of their layer. ``tensors`` are the rows by layer,
    ``layers`` the embedding and the output layer. Raises AdapterError if they do not fit."""
    given = config.get("trainable_token_indices") or {}
    if isinstance(given, list):
        embeddings = [name for name, layer in layers.items() if _embeds(layer)]
        given = dict.fromkeys(embeddings[:1], given)
    found: dict[str, StoredRows] = {}
    if other := sorted(set(tensors) - set(layers)):
        raise AdapterError(
            f"{other[0]}.{TOKEN_ROWS}: allowed: rows of {' and '.join(layers) or 'no layer'}"
        )
    for key, indices in given.items():
        matching = [n for n in tensors if n.endswith(key)]
        tied = _tied([n for n in layers if n.endswith(key)], tensors, layers)
        if not matching and not tied:
            raise AdapterError(f"the adapter lacks the rows of trainable_token_indices in {key}")
        for name in matching:
            found[name] = _checked(name, indices, tensors[name], layers[name])
    shared = {id(_weight(layers[name])) for name in found}  # of tied layers PEFT may save a copy
    if extra := [n for n in tensors if n not in found and id(_weight(layers[n])) not in shared]:
        raise AdapterError(
            f"{extra[0]}.{TOKEN_ROWS}: not in trainable_token_indices of adapter_config.json"
        )
    return found


def _checked(name: str, indices: list[int], values: Tensor, layer: nn.Module) -> StoredRows:
    columns = _weight(layer).shape[-1]
    if tuple(values.shape) != (len(indices), columns):
        raise AdapterError(
            f"{name}.{TOKEN_ROWS} is {tuple(values.shape)}, and the model with "
            f"{len(indices)} trainable_token_indices needs {(len(indices), columns)}"
        )
    if len(set(indices)) < len(indices):
        raise AdapterError(
            f"trainable_token_indices = {shown(indices)}: allowed: token ids, each once"
        )
    return StoredRows(tuple(indices), values.float())


def _tied(
    names: Sequence[str], tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
) -> bool:
    """Whether a layer of ``names`` has the weight of one that has rows."""
    own = {id(_weight(layers[name])) for name in tensors if name in layers}
    return any(id(_weight(layers[name])) in own for name in names)


def place_stored_rows(model: nn.Module, rows: Mapping[str, StoredRows], trainable: bool) -> None:
    """Give the layers of ``model``, and those that share their weight, these rows."""
    weights = {id(_weight(model.get_submodule(name))): own for name, own in rows.items()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.Linear)}
    for key, own in weights.items():
        names = [name for name, layer in layers.items() if id(_weight(layer)) == key]
        weight = _weight(layers[names[0]])
        values = own.values if weight.is_meta else own.values.to(weight.device)
        placed = place_rows(model, own.indices, dict.fromkeys(names, values))
        placed[names[0]].values.requires_grad_(trainable)


def with_tied(
    rows: Mapping[str, StoredRows], layers: Mapping[str, nn.Module]
) -> dict[str, StoredRows]:
    """Return ``rows`` also for layers whose weight is that of one with rows."""
    by_weight = {id(_weight(layers[name])): own for name, own in rows.items()}
    return {
        name: by_weight[key]
        for name, layer in layers.items()
        if (key := id(_weight(layer))) in by_weight
    }


def by_tensor(rows: Mapping[str, StoredRows]) -> dict[str, Tensor]:
    """Return the values of the rows, and their ids, as tensors by name."""
    values = {f"{name}.{TOKEN_ROWS}": own.values for name, own in rows.items()}
    ids = {f"{name} (token ids)": torch.tensor(own.indices) for name, own in rows.items()}
    return values | ids


def row_names(names: Iterable[str]) -> list[str]:
    """Return those of the tensors ``names`` that are trained rows."""
    return [name for name in names if name.endswith(f".{TOKEN_ROWS}")]


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the resized weights that PEFT saves with ``save_embedding_layers`` next to rows, and
    leave out the values that the rows replaced."""
    wrapper = TOKEN_ROWS.partition(".")[0]
    return {
        key.replace(f".{wrapper}.base_layer.", "."): value
        for key, value in tensors.items()
        if f".{wrapper}.trainable_tokens_original" not in key
    }


def _embeds(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
