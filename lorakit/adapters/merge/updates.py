"""W + w_1 delta_1 + w_2 delta_2 + ...: the updates of several adapters in one merge.

What the class that lorakit trains reads of a base's checkpoint, and how adapters change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.peft.read import AdapterFiles, Say, read_adapter, to_stderr
from lorakit.errors import AdapterError

if TYPE_CHECKING:
    from lorakit.layers import BaseWrapper


@dataclass(frozen=True)
class Weighted:
    """An adapter and the factor of its update; modules trained whole have none."""

    files: AdapterFiles
    weight: float = 1.0


@dataclass(frozen=True)
class Update:
    """An adapter's layer on one matrix, and the factor of its update."""

    layer: BaseWrapper
    weight: float = 1.0


@dataclass(frozen=True)
class LowRank:
    """weight * scaling * left @ right, in the layout of W: left (rows, r), right (r, columns).

    The factors may still be a file's: ``in_memory`` before their use."""

    left: Tensor
    right: Tensor
    scaling: float
    weight: float

    def in_memory(self) -> LowRank:
        """With float32 factors in memory of their own: inside a file's they may begin at any
        address, on which the last bits of a product depend."""
        left, right = (f.to(torch.float32, copy=True) for f in (self.left, self.right))
        return replace(self, left=left, right=right)

    def add_rows(self, W: Tensor, start: int, delta: Tensor) -> None:
        """Add the rows from ``start`` on to ``W`` (n, columns) in place; ``delta``, of the same
        shape, is overwritten."""
        torch.mm(self.left[start : start + len(W)], self.right, out=delta)
        delta.mul_(self.scaling)
        if self.weight != 1:
            delta.mul_(self.weight)
        W.add_(delta)


def read_weighted(
    adapter: str | Path,
    weight: float,
    add: Iterable[tuple[str | Path, float]],
    say: Say = to_stderr,
) -> list[Weighted]:
    """The adapter that is merged and those that are added; ``say`` is that of ``read_adapter``.
    Raises AdapterError for one that is missing or corrupt, and for a weight that is not a finite
    number."""
    read = []
    for directory, factor in ((adapter, weight), *add):
        if not math.isfinite(factor):
            raise AdapterError(f"{directory}: weight = {factor}: allowed: a finite number")
        if not str(directory):
            raise AdapterError(f'"": weight = {factor:g} of no adapter: a directory is missing')
        read.append(Weighted(read_adapter(directory, say), float(factor)))
    return read


def find_updates(model: nn.Module, adapters: Sequence[Weighted]) -> dict[str, list[Update]]:
    """Module -> the updates of its W. Of the adapters themselves only what the first trained whole
    is left in ``model``, which may be without values (device ``meta``).

    Raises AdapterError if one does not fit the model, or has trained other values whole.
    """
    # Imports transformers' model classes, which a merge without a model does not need.
    from lorakit.adapters.peft.place import find_places, load_adapter
    from lorakit.layers import adapted_modules

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


def low_rank(updates: Sequence[Update | LowRank]) -> list[LowRank] | None:
    """The updates as low-rank products, from which any rows are computed alone; None if one of
    them is of a method that does not merely add such a product."""
    products = [u.in_memory() if isinstance(u, LowRank) else _product(u) for u in updates]
    found = [product for product in products if product is not None]
    return found if len(found) == len(products) else None


def _product(update: Update) -> LowRank | None:
    delta = update.layer.low_rank()
    if delta is None:
        return None
    left, right = delta.B.float(), delta.A.float()
    if update.layer.kind != "linear":  # which stores W^T
        left, right = right.t(), left.t()
    return LowRank(left.contiguous(), right.contiguous(), delta.scaling, update.weight)


def merged_rows(updates: Sequence[Update | LowRank], weight: Tensor, start: int) -> Tensor | None:
    """``merged_sum`` of the rows ``weight`` of W, from ``start`` on; None if it needs all of W."""
    [first, *more] = updates
    if more or isinstance(first, LowRank) or first.weight != 1:
        return None
    layer = first.layer
    return layer.merged_rows(weight, start) if layer.kind == "linear" else None


@torch.no_grad()
def merged_sum(updates: Sequence[Update | LowRank], weight: Tensor) -> Tensor:
    """W + sum of w_i * delta_i, float32, where delta_i is the merged W less W: of a method that
    does more than add (DoRA), that is its whole change of W."""
    [first, *more] = updates
    if isinstance(first, Update) and first.weight == 1 and not more:
        return first.layer.fold(weight)
    W = weight.float()
    merged = W.clone()
    for update in updates:
        if isinstance(update, LowRank):
            update.in_memory().add_rows(merged, 0, torch.empty_like(merged))
            continue
        own = update.layer.fold(weight)
        merged += update.weight * (own - W)
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


Ties = Sequence[Sequence[str]]


class Group(Protocol):
    """Stored tensors (``sources``) that transformers converts together into those of the class
    (``targets``, name -> shape): experts into one matrix, a fused projection into its parts."""

    @property
    def sources(self) -> Sequence[str]: ...

    @property
    def targets(self) -> Mapping[str, tuple[int, ...]]: ...

    def converted(
        self, values: Mapping[str, Tensor], finish: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Stored values -> those to store, with ``finish(name, W)`` in place of each of the
        class's tensors."""
        ...


@dataclass(frozen=True)
class Held:
    """What the loaded class holds of the stored tensors, and what the adapters do to it.

    ``plain``: stored name -> the class's, where a tensor is read as it is; ``groups``: the others
    that it reads. ``shapes`` and ``ties`` (names of one parameter) are the class's; ``updates``,
    ``base`` and ``whole`` are by its names. ``architecture`` is its own name where the merged model
    is of another class than the base; then ``stored_name`` is also asked for names that are
    stored. ``can_part``: whether the class can hold tied names as separate weights.
    ``text_config``: the key of the text model's part of ``config.json``. ``settings``:
    other keys of ``config.json`` that change.
    """

    plain: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    updates: Mapping[str, Sequence[Update | LowRank]]
    groups: Sequence[Group] = ()
    ties: Ties = ()
    base: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    class_name: str = ""
    architecture: str | None = None
    stored_name: Callable[[str], str] = str
    can_part: Callable[[Sequence[str]], bool] = lambda _names: True
    text_config: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Tensor]:
        return {**self.base, **self.whole}
