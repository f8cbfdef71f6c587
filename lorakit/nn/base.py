"""The mixin of all layers, and functions that select the LoRA parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lorakit.errors import UserError, shown

if TYPE_CHECKING:
    from typing_extensions import Self


class LoraMixin(nn.Module):
    """Makes a torch layer compute with W + (lora_alpha / r) * delta(lora_B, lora_A) instead of W.

    List it before the torch class among the bases. With r = 0 there are no factors and the layer is
    the torch layer. With r > 0 ``weight`` is frozen, but not the bias
    (``mark_only_lora_as_trainable`` freezes it).

    If ``merge_weights`` is set, ``eval()`` merges: until ``train()`` is called, ``weight`` is
    another parameter with the values W + delta, computed in float32 and rounded once. W itself is
    kept, so that ``train()`` restores it bit for bit and tied modules never see merged values. A
    merged layer needs memory for both, and its factors get no gradient.

    State dicts contain W and the factors, whether the layer is merged or not, so saving and loading
    work in either mode. (loralib saves the merged weight in eval mode; after loading, the factors
    are added twice.) ``named_parameters()`` has the merged values in eval mode. Changes that are
    made to the factors of a merged layer take effect at the next ``eval()``; changes to its
    ``weight`` are lost.
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int = 0
    lora_alpha: float
    scaling: float
    merge_weights: bool
    #: W while merged, in a tuple to hide it from nn.Module.
    _unmerged_weight: tuple[Tensor, ...] = ()

    @property
    def merged(self) -> bool:
        return bool(self._unmerged_weight)

    def delta_weight(self) -> Tensor:
        """scaling times the product of the factors, in the layout of ``weight`` and at least
        float32; differentiable."""
        raise NotImplementedError

    def reset_factors(self) -> None:
        """Initialize one factor randomly and the other with zeros."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """W + delta in the dtype of W, for the current ``weight``."""
        return (self.weight + self.delta_weight()).to(self.weight.dtype)

    def reset_parameters(self) -> None:
        with self._unmerged():
            super().reset_parameters()  # type: ignore[misc]  # the torch class
            if hasattr(self, "lora_A"):  # the torch constructor calls this before the factors exist
                self.reset_factors()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self._unmerge()
        if not mode and self.merge_weights:
            self._merge()
        return self

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, r={self.r}, lora_alpha={self.lora_alpha}" if self.r else text

    def _add_factors(
        self,
        A: tuple[int, int],
        B: tuple[int, int],
        *,
        r: int,
        lora_alpha: float,
        merge_weights: bool,
    ) -> None:
        """Register lora_A and lora_B of these shapes, in W's dtype, and freeze W; unless r = 0."""
        self.r = r
        self.lora_alpha = lora_alpha
        self.merge_weights = merge_weights
        if r == 0:
            return
        self.scaling = lora_alpha / r
        self.lora_A = nn.Parameter(self.weight.new_empty(A))
        self.lora_B = nn.Parameter(self.weight.new_empty(B))
        self.weight.requires_grad_(False)
        self.reset_factors()

    @torch.no_grad()
    def _merge(self) -> None:
        if self.r:
            base = self.weight
            self.weight = nn.Parameter(self.merged_weight(), requires_grad=base.requires_grad)
            self._unmerged_weight = (base,)

    def _unmerge(self) -> None:
        if self._unmerged_weight:
            base = self._unmerged_weight[0].requires_grad_(self.weight.requires_grad)
            self.weight, self._unmerged_weight = base, ()

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """A context in which ``weight`` is W; a merged layer is merged again at the end."""
        merged = self.merged
        self._unmerge()
        yield
        if merged:
            self._merge()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self._unmerged():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._unmerged():
            super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for base in self._unmerged_weight:
            destination[f"{prefix}weight"] = base if keep_vars else base.detach()


def wide(value: Tensor) -> Tensor:
    """``value`` in float32, or float64 if it has that dtype, so that products are rounded once."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def kaiming_(lora_A: Tensor, lora_B: Tensor) -> None:
    """Initialize A Kaiming-uniform with a = sqrt(5), as torch.nn.Linear does, and B with zeros."""
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


def check_arguments(layer: str, r: object, lora_dropout: float = 0.0) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 0:
        raise UserError(f"{layer}: r = {shown(r)}: allowed: an integer from 0")
    if not 0 <= lora_dropout < 1:
        raise UserError(f"{layer}: lora_dropout = {lora_dropout}: allowed: 0 <= p < 1")


Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freeze every parameter without ``lora_`` in its name, and unfreeze the others.

    ``bias`` selects biases to unfreeze: ``none``, ``all`` (``bias`` in the name), or ``lora_only``
    (the biases of layers with factors). This also works on models adapted by ``lorakit.inject``.
    Raises UserError for any other ``bias``.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = _chosen(parameters, bias)
    trained = {id(parameters[name]) for name in chosen}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The entries of ``model.state_dict()`` that ``mark_only_lora_as_trainable`` unfreezes with the
    same ``bias``; load them with ``strict=False``. Raises UserError for any other ``bias``.
    """
    state = model.state_dict()
    return {name: state[name] for name in _chosen(state, bias)}


def _chosen(names: Iterable[str], bias: str) -> list[str]:
    if bias not in ("none", "all", "lora_only"):
        raise UserError(f"bias = {shown(bias)}: allowed: none, all, lora_only")
    names = list(names)
    beside = {bias for name in names if "lora_" in name for bias in _biases_beside(name)}
    return [
        name
        for name in names
        if "lora_" in name
        or (bias == "all" and "bias" in name)
        or (bias == "lora_only" and name in beside)
    ]


def _biases_beside(factor: str) -> tuple[str, ...]:
    """The possible names of the bias that belongs to ``factor``: in the same layer, in the module
    that ``inject`` wrapped, or in the fused projection of which the layer is a part."""
    layer = factor.rpartition("lora_")[0]
    whole = layer[:-1].rpartition(".")[0]
    return f"{layer}bias", f"{layer}base_layer.bias", f"{whole}.base_layer.bias"
