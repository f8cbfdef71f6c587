"""The modules that replace adapted ones. Each method derives a layer class from ``AdapterLayer``.

A layer accesses the frozen weight of its base only through ``base_shape``, ``base_forward``,
``base_product`` and ``dense_weight``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Mapping
from inspect import getattr_static
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.base_weight import (
    RowView,
    as_matrix,
    dense_weight,
    kind_of,
    product,
    state_of,
    storage,
    stored_weight,
)
from lorakit.errors import AdapterError
from lorakit.io.tensors import check_floating_point, check_shape
from lorakit.kernels.low_rank import LowRankDelta, RowSlice


class BaseWrapper(nn.Module, ABC):
    """Replaces ``base_layer``, a frozen y = W x + b with W (out_features, in_features).

    An embedding is y = W[:, ids] with W (embedding_dim, num_embeddings). A ``ParameterView`` may be
    a stack of matrices, of which ``stack`` has the number; the layer is then not called.
    """

    _merging: Tensor | None = None  # W during a merge, in which the base may be on ``meta``

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        *stack, self.out_features, self.in_features = dense_weight(base_layer).shape
        self.stack = tuple(stack)
        self.kind = kind_of(base_layer)

    @property
    def base_shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.out_features, self.in_features

    def base_forward(self, x: Tensor) -> Tensor:
        """The base's own output for ``x`` (..., in_features), or for token ids."""
        y: Tensor = self.base_layer(x)
        return y

    def base_product(self, x: Tensor) -> Tensor:
        """W x (n, out_features) for ``x`` (n, in_features), without the bias."""
        return product(self.base_layer, x)

    def dense_weight(self) -> Tensor:
        """W (out_features, in_features), in the base's dtype; not to be written to."""
        return dense_weight(self.base_layer) if self._merging is None else self._merging

    @property
    def base_state(self) -> Hashable:
        """A value that changes when W is replaced, moved or written to: the key of a cache."""
        return state_of(self.base_layer)

    @property
    def weight(self) -> Tensor:
        """W as the base stores it. Some models read its dtype or device."""
        return stored_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base_layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def is_meta(self) -> bool:
        """Whether the base is on ``meta``, as in a merge of a checkpoint that is read in parts."""
        return storage(self.base_layer).is_meta

    @property
    def device(self) -> torch.device:
        """That of the layer's own tensors: the base's, or torch's default if that is ``meta``."""
        return torch.get_default_device() if self.is_meta else storage(self.base_layer).device

    @abstractmethod
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W with the adapter folded in, float32 (out_features, in_features). ``weight`` is W, since
        the base itself may be on the ``meta`` device."""

    def merged_rows(self, weight: Tensor, start: int) -> Tensor | None:
        """``merged_weight`` of the rows ``weight``, from row ``start`` of W; None if the method
        needs the whole matrix."""
        return None

    def low_rank(self) -> LowRankDelta | None:
        """The update as a product of two factors, if that is all that is added to W."""
        return None

    def bias_delta(self) -> Tensor | None:
        """The update of b (out_features,), if the adapter has one."""
        return None

    @abstractmethod
    def joined(self) -> AdapterLayer:
        """The same adapter as a single layer over the whole base."""

    @torch.no_grad()
    def fold(self, stored: Tensor) -> Tensor:
        """``merged_weight`` with argument and result in the layout in which the base stores W."""
        merged = self.merged_weight(as_matrix(self.base_layer, stored))
        return as_matrix(self.base_layer, merged)

    def merge(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Fold the adapter into the base, which gets a new weight in ``dtype`` (default: its own).
        Returns the base. Raises AdapterError if the base computes its weight on each access."""
        if hasattr(type(self.base_layer), "weight"):
            raise AdapterError(
                f"{type(self.base_layer).__name__} computes its weight on each access, so nothing "
                "can be merged into it; allowed: modules that store their weight"
            )
        stored = self.weight
        merged = self.fold(stored).to(dtype or stored.dtype)
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        return self.base_layer


class AdapterLayer(BaseWrapper, ABC):
    """y = (W + delta) x + b, where delta is computed from the parameters of the subclass.

    A subclass must define ``delta_weight`` only. Override ``update`` and ``embed`` if the output is
    cheaper to compute than delta, and ``merged_weight`` if the update is not a sum. ``r`` is the
    rank (0 if there is none), ``scaling`` a factor of the update.
    """

    def __init__(self, base_layer: nn.Module, *, r: int = 0, scaling: float = 1.0) -> None:
        super().__init__(base_layer)
        self.r = r
        self.scaling = scaling

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The update of W, float32 (out_features, in_features), differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output for ``x`` (..., in_features), or token ids for an embedding."""
        if self.kind == "embedding":
            return self.embed(x)
        flat = x.reshape(-1, self.in_features)
        y = self.update(flat, self.base_forward(flat))
        return y.view(*x.shape[:-1], self.out_features)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output for ``x`` (n, in_features) and the base's output ``y``
        (n, out_features), which may be overwritten."""
        return y + F.linear(x.to(y.dtype), self.delta_weight().to(y.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        """The adapted rows for token ``ids``: (..., out_features)."""
        y = self.base_forward(ids)
        return y + F.embedding(ids, self.delta_weight().t()).to(y.dtype) * self.embed_scale

    @property
    def embed_scale(self) -> float:
        """The factor by which Gemma's embeddings multiply their rows and those of the update."""
        return float(getattr(self.base_layer, "embed_scale", 1.0))

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        self._merging = weight.detach()
        try:
            return weight.float() + self.delta_weight()
        finally:
            self._merging = None

    @property
    def saved_rank(self) -> int:
        """The rank of the update as it is saved."""
        return self.r

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the layer by name, without those of the base."""
        return {n: p for n, p in self.named_parameters() if not n.startswith("base_layer.")}

    def load_parameters(
        self, values: Mapping[str, Tensor], shared: Collection[str], name: str
    ) -> None:
        """Replace the parameters by frozen ones with these ``values``, in float32.

        ``shared`` are those that all layers have in common, which keep sharing memory. ``name`` is
        the module's, for errors. Raises AdapterError if a value is missing, unknown or misshapen.
        """
        own = self.adapter_parameters()
        wanted = {*own, *shared}
        if mismatched := sorted(set(values) ^ wanted):
            kind = "missing" if mismatched[0] in wanted else "unknown"
            raise AdapterError(f"{kind} tensor: {name}.{mismatched[0]}")
        for key, value in values.items():
            if key not in shared:
                check_shape(f"{name}.{key}", value, own[key])
            check_floating_point(f"{name}.{key}", value)
            device = value.device if self.is_meta else self.device
            # A tensor that maps a file may start at any address, and the last bits of a product
            # depend on the alignment.
            moved = value.to(device, torch.float32, copy=key not in shared)
            setattr(self, key, nn.Parameter(moved, requires_grad=False))

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A float32 parameter on the base's device, without values yet."""
        return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=self.device))

    def joined(self) -> AdapterLayer:
        return self

    @classmethod
    def can_be_part(cls) -> bool:
        """Whether the class defines ``join`` and ``split``, which a part of a module needs."""
        return all(getattr_static(cls, n) is not vars(AdapterLayer)[n] for n in ("join", "split"))

    @classmethod
    def join(cls, composite: CompositeLayer) -> AdapterLayer:
        """The parts of ``composite``, all of this class, as one layer over the whole base."""
        raise NotImplementedError

    def split(self, parts: Mapping[str, tuple[RowSlice, int]]) -> CompositeLayer:
        """The reverse of ``join``; ``parts``: name -> (rows, rank). Raises AdapterError if the
        parts do not cover the layer's update."""
        raise NotImplementedError


class CompositeLayer(BaseWrapper):
    """Several adapter layers over one base, each on a slice of its rows.

    The parts, children by name, are layers on a ``RowView`` of the base, which runs once for all
    of them. Slices that do not overlap adapt q, k and v of a fused projection separately, and rows
    outside the slices keep the base's output bit for bit. Where slices overlap, the updates are
    added: parts over all rows are several adapters of one module. The base may be any module that
    ``dense_weight`` can read, including one that stacks the matrices of several modules.
    """

    def __init__(self, base_layer: nn.Module, parts: Mapping[str, AdapterLayer]) -> None:
        super().__init__(base_layer)
        if not parts:
            raise AdapterError("a layer without parts; allowed: one or more")
        for name, part in parts.items():
            if not name.isidentifier() or hasattr(self, name):
                raise AdapterError(f"the part {name!r}: allowed: an unused name")
            view = part.base_layer
            if not isinstance(view, RowView) or view.module is not base_layer:
                raise AdapterError(f"the part {name!r}: allowed: a layer on a RowView of the base")
            self.add_module(name, part)
        slices = [self.rows(name) for name in self.parts]
        # Slices of different periods may have rows in common.
        self.overlaps = any(a.stop > b.start or a.period != b.period for a, b in pairwise(slices))

    @property
    def parts(self) -> dict[str, AdapterLayer]:
        """Name -> part, in the order of their rows."""
        found = {n: m for n, m in self.named_children() if isinstance(m, AdapterLayer)}
        return dict(sorted(found.items(), key=lambda item: self.rows(item[0]).start))

    def rows(self, name: str) -> RowSlice:
        """The rows of the part ``name``."""
        view = getattr(self, name).base_layer
        assert isinstance(view, RowView), type(view)
        return view.rows

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = self.update(flat, self.base_forward(flat))
        return y.view(*x.shape[:-1], self.out_features)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output for ``x`` (n, in_features) and the base's output ``y``
        (n, out_features)."""
        return self._forward_overlapping(x, y) if self.overlaps else self._forward_disjoint(x, y)

    def _forward_disjoint(self, x: Tensor, y: Tensor) -> Tensor:
        """The output if no row belongs to two parts: the concatenated pieces."""
        parts = self.parts
        period = self.rows(next(iter(parts))).period
        y = y.view(len(x), self.out_features // period, period)
        pieces, at = [], 0
        for name, part in parts.items():
            rows = self.rows(name)
            own = y[..., rows.start : rows.stop]
            updated = part.update(x, own.flatten(1).contiguous())
            pieces += [y[..., at : rows.start], updated.view(own.shape)]
            at = rows.stop
        return torch.cat([*pieces, y[..., at:]], dim=-1).flatten(1)

    def _forward_overlapping(self, x: Tensor, y: Tensor) -> Tensor:
        """The output if parts overlap: y plus the change that each part makes to its rows of y."""
        total = y
        for name, part in self.parts.items():
            rows = self.rows(name)
            own = rows.of(y, dim=1)
            index = rows.of(torch.arange(self.out_features, device=y.device))
            total = total.index_add(1, index, part.update(x, own.clone()) - own)
        return total

    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        """W plus the change that each part makes to its rows, in float32."""
        merged = weight.float().clone()
        for name, part in self.parts.items():
            rows, own = self.rows(name), self.rows(name).of(weight)
            new = part.merged_weight(own)
            rows.put(merged, rows.of(merged) + (new - own.float()) if self.overlaps else new)
        return merged

    def joined(self) -> AdapterLayer:
        """Raises AdapterError if no single layer is equal to the parts."""
        classes = self._classes()
        if len(classes) > 1:
            names = ", ".join(sorted(c.__name__ for c in classes))
            raise AdapterError(f"parts of {names} do not form one layer; allowed: one class")
        return classes.pop().join(self)

    def low_rank(self) -> LowRankDelta | None:
        """The update as one product, which is zero outside the parts' rows."""
        mixed = len(self._classes()) > 1
        if mixed or any(part.low_rank() is None for part in self.parts.values()):
            return None
        return self.joined().low_rank()

    def _classes(self) -> set[type[AdapterLayer]]:
        return {type(part) for part in self.parts.values()}


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The layer of every adapted matrix by name, in the model's order. A part of a composite layer
    has the layer's name as a prefix (``h.0.attn.c_attn.q``)."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}


def adapted_modules(model: nn.Module) -> dict[str, BaseWrapper]:
    """The layer of every replaced module of the base by name, in the model's order."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, BaseWrapper)}
    return {
        name: layer
        for name, layer in found.items()
        if not isinstance(found.get(name.rpartition(".")[0]), CompositeLayer)
    }
