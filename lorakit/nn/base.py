"""What the layers share: the two factors, and merging them into the weight and back.

Which parameters train, and which are saved: those named ``lora_*`` and, if asked, biases.
"""

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
    """A layer of torch with W + (lora_alpha / r) * delta(lora_B, lora_A) in place of W.

    Stands before torch's class among the bases. With r = 0 there are no factors, and the layer is
    torch's own. With r > 0 ``weight`` is frozen; a bias is not (``mark_only_lora_as_trainable``
    freezes that).

    ``eval()`` merges, if ``merge_weights`` holds: until ``train()``, ``weight`` is another
    parameter that holds W + delta, computed in float32 and rounded once. W itself is kept, so
    ``train()`` restores it bit for bit, and a module tied to it never sees the merged values. A
    merged layer needs the memory of both, and its factors get no gradient.

    A state dict always holds W and the factors, merged or not, and is always read as that: nothing
    is lost on the way, whatever the mode of the model that saves or loads. (loralib writes the
    merged weight in eval mode; loaded again, the factors are added twice.) The merged values are
    those of ``named_parameters()`` in eval mode. What is written by hand to a merged layer takes
    effect at the next ``eval()`` (factors), or is dropped (``weight``).
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int = 0
    lora_alpha: float
    scaling: float
    merge_weights: bool
    _kept: tuple[Tensor, ...] = ()  # W while merged; a tuple hides it from nn.Module

    @property
    def merged(self) -> bool:
        return bool(self._kept)

    def delta_weight(self) -> Tensor:
        """scaling times the product of the factors in the layout of ``weight``, in at least
        float32; differentiable."""
        raise NotImplementedError

    def reset_factors(self) -> None:
        """One factor random, the other zero."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """W + delta in W's dtype, for the ``weight`` that stands now."""
        return (self.weight + self.delta_weight()).to(self.weight.dtype)

    def reset_parameters(self) -> None:
        with self._unmerged():
            super().reset_parameters()  # type: ignore[misc]  # torch's class, next in line
            if hasattr(self, "lora_A"):  # torch's constructor calls this before there are factors
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
            self._kept = (base,)

    def _unmerge(self) -> None:
        if self._kept:
            base = self._kept[0].requires_grad_(self.weight.requires_grad)
            self.weight, self._kept = base, ()

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """W stands in ``weight`` meanwhile; a merged layer is merged anew afterwards."""
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
        for base in self._kept:
            destination[f"{prefix}weight"] = base if keep_vars else base.detach()


def wide(value: Tensor) -> Tensor:
    """In float32, or in float64 if it is that already: products are rounded once, at the end."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def kaiming_(lora_A: Tensor, lora_B: Tensor) -> None:
    """A Kaiming-uniform with a = sqrt(5), as torch's linear layer starts; B zero."""
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


def check_arguments(layer: str, r: object, lora_dropout: float = 0.0) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 0:
        raise UserError(f"{layer}: r = {shown(r)}: allowed: an integer from 0")
    if not 0 <= lora_dropout < 1:
        raise UserError(f"{layer}: lora_dropout = {lora_dropout}: allowed: 0 <= p < 1")


Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Every parameter with ``lora_`` in its name trains; the others are frozen.

    ``bias``: those that train too: ``none``, ``all`` (``bias`` in the name), or ``lora_only`` (the
    biases of the layers that hold factors). Models adapted by ``lorakit.inject`` fit as well.
    Raises UserError for another ``bias``.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = _chosen(parameters, bias)
    trained = {id(parameters[name]) for name in chosen}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """What ``mark_only_lora_as_trainable`` lets train with the same ``bias``, by its name in
    ``model.state_dict()``; load it with ``strict=False``. Raises UserError for another ``bias``.
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
    """Where the bias of the layer that holds ``factor`` may stand: beside it; in the module that
    inject wraps; or, for a part of a fused projection, in the one that holds the parts."""
    layer = factor.rpartition("lora_")[0]
    whole = layer[:-1].rpartition(".")[0]
    return f"{layer}bias", f"{layer}base_layer.bias", f"{whole}.base_layer.bias"
