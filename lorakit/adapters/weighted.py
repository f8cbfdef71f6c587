"""W + w_1 delta_1 + w_2 delta_2 + ...: the updates of several adapters in one merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lorakit.adapters.files import AdapterFiles, read_adapter
from lorakit.adapters.place import find_places, load_adapter
from lorakit.errors import AdapterError
from lorakit.layers import AdapterLayer, FusedLayer, adapted_modules


@dataclass(frozen=True)
class Weighted:
    """An adapter and the factor of its update; modules trained whole have none."""

    files: AdapterFiles
    weight: float = 1.0


@dataclass(frozen=True)
class Update:
    """An adapter's layer on one matrix, and the factor of its update."""

    layer: AdapterLayer | FusedLayer
    weight: float = 1.0


def read_weighted(
    adapter: str | Path, weight: float, add: Iterable[tuple[str | Path, float]]
) -> list[Weighted]:
    """The adapter that is merged and those that are added. Raises AdapterError for one that is
    missing or corrupt, and for a weight that is not a finite number."""
    read = []
    for directory, factor in ((adapter, weight), *add):
        if not math.isfinite(factor):
            raise AdapterError(f"{directory}: weight = {factor}: allowed: a finite number")
        if not str(directory):
            raise AdapterError(f'"": weight = {factor:g} of no adapter: a directory is missing')
        read.append(Weighted(read_adapter(directory), float(factor)))
    return read


def find_updates(model: nn.Module, adapters: Sequence[Weighted]) -> dict[str, list[Update]]:
    """Module -> the updates of its W. Of the adapters themselves only what the first trained whole
    is left in ``model``, which may be without values (device ``meta``).

    Raises AdapterError if one does not fit the model, or has trained other values whole.
    """
    first, *added = adapters
    places = find_places(model, first.files)
    if places.base and first.weight != 1:
        raise AdapterError(
            f"{first.files.directory}: weight = {first.weight:g}: it trains parameters of the base "
            f"({min(places.base)}), which have no delta to weight; allowed: 1"
        )
    own = {**places.base, **places.whole}
    for other in added:
        found = find_places(model, other.files)
        _check_same(own, {**found.base, **found.whole}, first.files, other.files)
    updates: dict[str, list[Update]] = {}
    for adapter in (*added, first):
        load_adapter(model, adapter.files)
        for name, layer in adapted_modules(model).items():
            updates.setdefault(name, []).insert(0, Update(layer, adapter.weight))
            model.set_submodule(name, layer.base_layer)
    return updates


def merged_sum(updates: Sequence[Update], weight: Tensor) -> Tensor:
    """W + sum of w_i * delta_i, float32, where delta_i is the merged W less W: of a method that
    does more than add (DoRA), that is its whole change of W."""
    if len(updates) == 1 and updates[0].weight == 1:
        return updates[0].layer.merged_weight(weight)
    W = weight.float()
    merged = W.clone()
    for update in updates:
        merged += update.weight * (update.layer.merged_weight(weight) - W)
    return merged


def _check_same(
    own: Mapping[str, Tensor], other: Mapping[str, Tensor], first: AdapterFiles, added: AdapterFiles
) -> None:
    """An added adapter may hold whole values only if they are the first one's."""
    for name, value in sorted(other.items()):
        if name not in own or not value.equal(own[name]):
            raise AdapterError(
                f"{added.directory}: {name} is trained whole, and not as in {first.directory}: a "
                "sum of whole modules has no meaning; add adapters without them, or with the same"
            )
