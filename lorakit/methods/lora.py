"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): y = W x + (lora_alpha / r) B A dropout(x).

W (out, in) is frozen; A (r, in) is random and B (out, r) zero, so the output starts unchanged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lorakit.errors import AdapterError, TargetError
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection, PositiveFloat, PositiveInt, Probability

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer


class LoraConfig(AdapterSection):
    """``rank_pattern`` and ``alpha_pattern`` map a module-name suffix to its own r or lora_alpha.

    ``use_rslora`` scales by lora_alpha / sqrt(r) in place of lora_alpha / r.
    ``init``: ``default`` (A Kaiming-uniform as in loralib, B zero) or ``b_gaussian`` (B random, A
    zero).
    """

    method: str = "lora"
    r: PositiveInt = 8
    lora_alpha: PositiveFloat | Annotated[int, Field(gt=0)] = 16
    lora_dropout: Probability = 0.0
    rank_pattern: dict[str, PositiveInt] = Field(default={})
    alpha_pattern: dict[str, PositiveFloat] = Field(default={})
    bias: Literal["none"] = "none"
    use_rslora: bool = False
    init: Literal["default", "b_gaussian"] = "default"

    def rank_of(self, name: str) -> int:
        return int(_by_suffix(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        return _by_suffix(self.alpha_pattern, name, self.lora_alpha)

    def scaling_of(self, name: str) -> float:
        r = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.use_rslora else r)


class Lora(Method):
    name = "lora"
    summary = "y = W x + (lora_alpha / r) B A x, W frozen (Hu et al. 2021)"
    Config = LoraConfig

    def check(self, config: Any, targets: Sequence[str]) -> None:
        """Every key of ``rank_pattern`` and ``alpha_pattern`` is the end of a target."""
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, field):
                if not any(_is_end(key, name) for name in targets):
                    ends = sorted({name.rpartition(".")[2] for name in targets})
                    raise TargetError(
                        f"adapter.{field}: {key!r} matches no adapted module; allowed: "
                        f"{', '.join(ends)}, or longer ends of their names"
                    )

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        import torch

        from lorakit.layers import AdapterLayer

        r = config.rank_of(name)
        layer = AdapterLayer(module, self, r=r, scaling=config.scaling_of(name))
        factors = {"lora_A": (r, layer.in_features), "lora_B": (layer.out_features, r)}
        for factor, shape in factors.items():
            empty = torch.empty(shape, dtype=torch.float32, device=layer.weight.device)
            layer.register_parameter(factor, torch.nn.Parameter(empty))
        layer.lora_dropout = torch.nn.Dropout(config.lora_dropout)
        self.initialise(layer, config.init)
        return layer

    def initialise(self, layer: AdapterLayer, init: str) -> None:
        """One factor random, the other zero. An embedding has A zero and B Gaussian, as loralib."""
        import torch

        if layer.kind == "embedding" or init == "b_gaussian":
            zero, random = layer.lora_A, layer.lora_B
        else:
            zero, random = layer.lora_B, layer.lora_A
        torch.nn.init.zeros_(zero)
        if layer.kind == "embedding":
            torch.nn.init.normal_(random)
        elif init == "b_gaussian":
            torch.nn.init.normal_(random, std=1 / math.sqrt(layer.r))
        else:
            torch.nn.init.kaiming_uniform_(random, a=math.sqrt(5))

    def forward(self, layer: AdapterLayer, x: Tensor) -> Tensor:
        if layer.kind == "embedding":
            return self._embed(layer, x)
        from lorakit.kernels.lora import lora_add_

        flat = x.reshape(-1, layer.in_features)
        y = layer.base_layer(flat)
        y = lora_add_(y, layer.lora_dropout(flat), layer.lora_A, layer.lora_B, layer.scaling)
        return y.view(*x.shape[:-1], layer.out_features)

    def _embed(self, layer: AdapterLayer, ids: Tensor) -> Tensor:
        import torch.nn.functional as F

        y = layer.base_layer(ids)
        h = F.embedding(ids, layer.lora_A.t()).to(y.dtype)
        update: Tensor = F.linear(h, layer.lora_B.to(y.dtype)) * layer.scaling
        # Gemma's embeddings scale what they look up, so the update to W is scaled too.
        out: Tensor = y + update * getattr(layer.base_layer, "embed_scale", 1.0)
        return out

    def delta_weight(self, layer: AdapterLayer) -> Tensor:
        """scaling * B A, (out, in); transposed for Conv1D and embeddings, which hold W^T."""
        product: Tensor = layer.lora_B.detach().float() @ layer.lora_A.detach().float()
        delta = product * layer.scaling
        return delta if layer.kind == "linear" else delta.t()

    def to_peft(
        self, layers: dict[str, AdapterLayer], config: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """``LORA`` with exact ranks and alphas for the modules that differ from r, lora_alpha."""
        settings = {
            "peft_type": "LORA",
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "rank_pattern": {n: x.r for n, x in layers.items() if x.r != config.r},
            "alpha_pattern": {
                n: config.alpha_of(n) for n in layers if config.alpha_of(n) != config.lora_alpha
            },
            "bias": "none",
            "use_rslora": config.use_rslora,
            "use_dora": False,
            "init_lora_weights": True,
        }
        tensors = {
            f"{name}.{stored}": getattr(layer, factor).detach()
            for name, layer in layers.items()
            for factor, stored in _peft_names(layer.kind).items()
        }
        return settings, tensors

    def from_peft(
        self, module: nn.Module, name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> AdapterLayer:
        """r is what the tensors have; it must be the r that ``settings`` scale by."""
        import torch

        from lorakit.layers import AdapterLayer

        layer = AdapterLayer(module, self, r=_peft_rank(settings, name), scaling=1.0)
        layer.scaling = _peft_scaling(settings, name, layer.r)
        shapes = {"lora_A": (layer.r, layer.in_features), "lora_B": (layer.out_features, layer.r)}
        stored = _peft_names(layer.kind)
        if unlike := set(tensors) ^ set(stored.values()):
            listed = ", ".join(f"{name}.{key}" for key in sorted(unlike))
            verb = "unknown" if unlike <= set(tensors) else "missing"
            raise AdapterError(f"{verb} tensors: {listed}")
        for factor, shape in shapes.items():
            value = tensors[stored[factor]]
            if tuple(value.shape) != shape:
                raise AdapterError(
                    f"{name}.{stored[factor]} is {tuple(value.shape)}, and the model with r = "
                    f"{layer.r} needs {shape}: the adapter belongs to another base model"
                )
            device = value.device if layer.weight.is_meta else layer.weight.device
            value = value.to(device, torch.float32)
            layer.register_parameter(factor, torch.nn.Parameter(value, requires_grad=False))
        layer.lora_dropout = torch.nn.Dropout(settings.get("lora_dropout", 0.0))
        return layer


def _is_end(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _by_suffix(pattern: dict[str, Any], name: str, default: float) -> float:
    """The value of the longest suffix that ``name`` ends with."""
    fitting = [s for s in pattern if _is_end(s, name)]
    return float(pattern[max(fitting, key=len)]) if fitting else default


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's meaning: the first key, a regular expression, that a dotted end of ``name`` fits."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _peft_rank(settings: Mapping[str, Any], name: str) -> int:
    return int(_by_pattern(settings.get("rank_pattern"), name, settings.get("r", 8)))


def _peft_scaling(settings: Mapping[str, Any], name: str, r: int) -> float:
    alpha = _by_pattern(settings.get("alpha_pattern"), name, settings.get("lora_alpha", 8))
    scaling = float(alpha) / (math.sqrt(r) if settings.get("use_rslora") else r)
    if not math.isfinite(scaling):
        raise AdapterError(f"{name}: lora_alpha = {alpha}: allowed: a finite number")
    return scaling


def _peft_names(kind: str) -> dict[str, str]:
    """Our parameter -> what PEFT puts after the module's name."""
    stem = "lora_embedding_{}" if kind == "embedding" else "lora_{}.weight"
    return {f"lora_{factor}": stem.format(factor) for factor in "AB"}


METHOD = Lora()
