"""The updates that a merge adds to each matrix: W + w_1 delta_1 + w_2 delta_2 + ..."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.adapters.peft.tokens import StoredRows, by_tensor
from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import LowRankDelta
from lorakit.notes import Say, to_stderr

if TYPE_CHECKING:
    from lorakit.layers import BaseWrapper


@dataclass(frozen=True)
class Weighted:
    """An adapter and the factor of its update. Fully trained modules are not scaled by it."""

    files: AdapterFiles
    weight: float = 1.0


@dataclass(frozen=True)
class LayerUpdate:
    """An adapter's layer on one matrix, and the factor of its update."""

    layer: BaseWrapper
    weight: float = 1.0


@dataclass(frozen=True)
class LowRankUpdate:
    """``weight`` * ``delta``, in the layout in which the base stores W.

    The factors may still map a file: call ``in_memory`` before using them.
    """

    delta: LowRankDelta
    weight: float = 1.0

    def in_memory(self) -> LowRankUpdate:
        """Copy the factors to float32. A tensor that maps a file may start at any address, and the
        last bits of a product depend on the alignment."""
        A, B = (factor.to(torch.float32, copy=True) for factor in (self.delta.A, self.delta.B))
        return replace(self, delta=LowRankDelta(A, B, self.delta.scaling))

    def add_rows_(self, W: Tensor, start: int, scratch: Tensor) -> None:
        """Add the rows from ``start`` on to ``W`` (n, columns) in place; ``scratch``, of the same
        shape, is overwritten."""
        self.delta.rows_into(scratch, start)
        if self.weight != 1:
            scratch.mul_(self.weight)
        W.add_(scratch)


Update = LayerUpdate | LowRankUpdate


def read_weighted(
    adapter: str | Path,
    weight: float,
    add: Iterable[tuple[str | Path, float]],
    say: Say = to_stderr,
) -> list[Weighted]:
    """Read the adapter to merge and those to ``add``, each with its weight.

    Raises AdapterError for a missing or corrupt adapter, and for a weight that is not finite.
    """
    read = []
    for directory, factor in ((adapter, weight), *add):
        if not math.isfinite(factor):
            raise AdapterError(f"{directory}: weight = {factor}: allowed: a finite number")
        if not str(directory):
            raise AdapterError(f'"": weight = {factor:g} without an adapter directory')
        read.append(Weighted(read_adapter(directory, say), float(factor)))
    return read


def find_updates(model: nn.Module, adapters: Sequence[Weighted]) -> dict[str, list[Update]]:
    """Return the updates of each parameter. ``model`` may be on the ``meta`` device. It is left
    with the fully trained modules of the first adapter, but without adapter layers.

    Raises AdapterError if an adapter does not fit the model, or if the fully trained values differ.
    """
    # These import transformers, which ``resolve_by_name`` does without.
    from lorakit.adapters.peft.place import find_places, load_adapter
    from lorakit.layers import adapted_modules
    from lorakit.models.token_rows import token_rows
    from lorakit.parameters import replaced_modules

    first, *added = adapters
    places = find_places(model, first.files)
    check_unscaled(first, [*places.base, *by_tensor(places.rows)])
    own = places.given | by_tensor(places.rows)
    for other in added:
        found = find_places(model, other.files)
        check_same_values(own, found.given | by_tensor(found.rows), first.files, other.files)
    updates: dict[str, list[Update]] = {}
    for adapter in (*added, first):
        load_adapter(model, adapter.files)
        for name, layer in adapted_modules(model).items():
            weight = name if layer.kind == "parameter" else f"{name}.weight"
            updates.setdefault(weight, []).insert(0, LayerUpdate(layer, adapter.weight))
            if (delta := layer.bias_delta()) is not None:
                update = _bias_update(layer, name, delta, adapter)
                updates.setdefault(f"{name}.bias", []).insert(0, update)
        for name, replacement in replaced_modules(model).items():
            model.set_submodule(name, replacement.base_layer)
        for name, rows in token_rows(model).items():
            model.set_submodule(name, rows.base_layer)
    return updates


def _bias_update(layer: BaseWrapper, name: str, delta: Tensor, adapter: Weighted) -> LowRankUpdate:
    """The update of a bias, as a matrix of one column."""
    if layer.bias is None:
        raise AdapterError(
            f"{adapter.files.directory}: lora_bias = true: {name} has no bias in the base, so "
            "the adapter's cannot be merged; hint: load the adapter without merging it"
        )
    column = delta.detach()[:, None]
    return LowRankUpdate(LowRankDelta(torch.ones(1, 1), column, 1.0), adapter.weight)


def low_rank(updates: Sequence[Update]) -> list[LowRankUpdate] | None:
    """Return the updates as low-rank products, of which single rows can be computed; None if a
    method does more than add such a product."""
    found = [_low_rank(update) for update in updates]
    products = [update for update in found if update is not None]
    return products if len(products) == len(found) else None


def _low_rank(update: Update) -> LowRankUpdate | None:
    if isinstance(update, LowRankUpdate):
        return update.in_memory()
    delta = update.layer.low_rank()
    if delta is None:
        return None
    A, B = delta.A.float(), delta.B.float()
    if update.layer.kind in ("conv1d", "embedding"):  # W^T is stored
        A, B = B.t(), A.t()
    return LowRankUpdate(LowRankDelta(A.contiguous(), B.contiguous(), delta.scaling), update.weight)


def merged_rows(updates: Sequence[Update], weight: Tensor, start: int) -> Tensor | None:
    """Return the rows of ``merged_sum`` from ``start`` on, where ``weight`` are those rows of W;
    None if all of W is needed."""
    [first, *more] = updates
    if more or isinstance(first, LowRankUpdate) or first.weight != 1:
        return None
    layer = first.layer
    return layer.merged_rows(weight, start) if layer.kind == "linear" else None


@torch.no_grad()
def merged_sum(updates: Sequence[Update], weight: Tensor) -> Tensor:
    """Return W + sum of w_i * delta_i in float32. delta_i is the merged W minus W: the whole change
    of W for methods that do more than add (DoRA)."""
    if not updates:
        return weight
    [first, *more] = updates
    if isinstance(first, LayerUpdate) and first.weight == 1 and not more:
        return first.layer.fold(weight)
    W = weight.float()
    merged = W.clone()
    for update in updates:
        if isinstance(update, LowRankUpdate):
            rows = merged.view(len(merged), -1)  # of a bias, one column
            update.in_memory().add_rows_(rows, 0, torch.empty_like(rows))
            continue
        own = update.layer.fold(weight)
        merged += update.weight * (own - W)
    return merged


def check_unscaled(adapter: Weighted, base: Collection[str]) -> None:
    """Raise AdapterError if the adapter, which trains the parameters ``base``, has a weight."""
    if base and adapter.weight != 1:
        raise AdapterError(
            f"{adapter.files.directory}: weight = {adapter.weight:g}: it trains parameters of the "
            f"base ({min(base)}), which have no delta to scale; allowed: 1"
        )


def check_same_values(
    own: Mapping[str, Tensor], other: Mapping[str, Tensor], first: AdapterFiles, added: AdapterFiles
) -> None:
    """Raise AdapterError if an added adapter has fully trained values that the first one lacks."""
    for name, value in sorted(other.items()):
        if name not in own or not value.equal(own[name]):
            raise AdapterError(
                f"{added.directory}: {name} is fully trained, with other values than in "
                f"{first.directory}: fully trained modules cannot be added; hint: add adapters "
                "without them, or with the same values"
            )


Ties = Sequence[Sequence[str]]


class Group(Protocol):
    """Stored tensors (``sources``) that transformers converts together into parameters of the class
    (``targets``: name -> shape), such as experts into a stack."""

    @property
    def sources(self) -> Sequence[str]: ...

    @property
    def targets(self) -> Mapping[str, tuple[int, ...]]: ...

    def converted(
        self, values: Mapping[str, Tensor], finish: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Convert stored values to the class's, replace each by ``finish(name, W)``, and convert
        them back."""
        ...


@dataclass(frozen=True)
class ResolvedBase:
    """How the class that is loaded reads the stored tensors, and how the adapters change them.

    ``plain``: stored name -> parameter, for tensors that are read unchanged; ``groups``: the others
    that are read. Everything else is keyed by parameter names. ``ties``: names of one parameter;
    ``base``: trained parameters of the base; ``fully_trained``: those of fully trained modules.
    ``architecture`` is the class's name if the merged model is of another class than the base;
    ``stored_name`` then also applies to names that are stored. ``rows``: rows of a weight that
    replace those of the base or follow them; ``vocab_size`` is that of the model if it changes.
    ``can_untie``: whether the class can
    store tied names as separate weights. ``text_config``: the key of the text model's configuration
    in ``config.json``; ``settings``: other keys of ``config.json`` that change.
    """

    plain: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    updates: Mapping[str, Sequence[Update]]
    groups: Sequence[Group] = ()
    ties: Ties = ()
    base: Mapping[str, Tensor] = field(default_factory=dict)
    fully_trained: Mapping[str, Tensor] = field(default_factory=dict)
    class_name: str = ""
    architecture: str | None = None
    stored_name: Callable[[str], str] = str
    can_untie: Callable[[Sequence[str]], bool] = lambda _names: True
    text_config: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    rows: Mapping[str, StoredRows] = field(default_factory=dict)
    vocab_size: int | None = None

    @property
    def given(self) -> dict[str, Tensor]:
        """The values that replace those of the base."""
        return {**self.base, **self.fully_trained}
