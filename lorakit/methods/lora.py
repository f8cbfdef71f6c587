"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): y = W x + (lora_alpha / r) B A dropout(x).

W (out, in) is frozen; A (r, in) is random and B (out, r) zero, so the output starts unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lorakit.errors import TargetError
from lorakit.methods.base import Method, RunHooks
from lorakit.recipe.sections import AdapterSection, LoraAlpha, Probability, Rank

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer, FusedLayer


class LoraConfig(AdapterSection):
    """``rank_pattern`` and ``alpha_pattern`` map a module-name suffix to its own r or lora_alpha.

    ``use_rslora`` scales by lora_alpha / sqrt(r) in place of lora_alpha / r. ``bias`` trains the
    biases of the adapted modules (``lora_only``) or of the whole model (``all``) besides.
    ``init``: ``default`` (A Kaiming-uniform as in loralib, B zero), ``b_gaussian`` (B random, A
    zero), ``pissa`` (the principal singular vectors of W) or ``orthogonal``; ``lora_init.py`` has
    their formulas.
    """

    method: str = "lora"
    r: Rank = 8
    lora_alpha: LoraAlpha = 16
    lora_dropout: Probability = 0.0
    rank_pattern: dict[str, Rank] = Field(default={})
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(default={})
    bias: Literal["none", "lora_only", "all"] = "none"
    use_rslora: bool = False
    init: Literal["default", "b_gaussian", "pissa", "orthogonal"] = "default"

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
    Config: ClassVar[type[AdapterSection]] = LoraConfig

    def check(self, config: Any, targets: Collection[str]) -> None:
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
        from lorakit.methods.lora_init import initialise

        r = config.rank_of(name)
        layer = AdapterLayer(module, self, r=r, scaling=config.scaling_of(name))
        factors = {"lora_A": (r, layer.in_features), "lora_B": (layer.out_features, r)}
        for factor, shape in factors.items():
            empty = torch.empty(shape, dtype=torch.float32, device=layer.weight.device)
            layer.register_parameter(factor, torch.nn.Parameter(empty))
        layer.lora_dropout = torch.nn.Dropout(config.lora_dropout)
        initialise(layer, config.init, name)
        return layer

    def trained_parameters(self, model: nn.Module, config: Any) -> list[str]:
        """The biases that ``bias`` names."""
        from lorakit.layers import adapted_modules

        if config.bias == "all":
            return [n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"]
        if config.bias == "none":
            return []
        layers = adapted_modules(model).items()
        return [f"{name}.base_layer.bias" for name, layer in layers if layer.bias is not None]

    def factors(self, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        """A and B of the update; with ``init: pissa`` those of the start are taken off again, so
        that the frozen W counts as W - scaling * B_0 A_0."""
        import torch

        A, B = layer.lora_A, layer.lora_B
        if hasattr(layer, "initial_A"):
            A, B = torch.cat([A, layer.initial_A]), torch.cat([B, -layer.initial_B], dim=1)
        return A, B

    def update(self, layer: AdapterLayer, x: Tensor, y: Tensor) -> Tensor:
        from lorakit.kernels.low_rank import lora_add_

        return lora_add_(y, layer.lora_dropout(x), *self.factors(layer), layer.scaling)

    def embed(self, layer: AdapterLayer, ids: Tensor) -> Tensor:
        return embedding_add(layer.base_layer(ids), layer, ids, *self.factors(layer))

    def delta_weight(self, layer: AdapterLayer) -> Tensor:
        """scaling * B A, (out, in); transposed for Conv1D and embeddings, which hold W^T."""
        A, B = self.factors(layer)
        delta: Tensor = (B.detach().float() @ A.detach().float()) * layer.scaling
        return delta if layer.kind == "linear" else delta.t()

    def hooks(self, layers: Mapping[str, AdapterLayer], config: Any, total_steps: int) -> RunHooks:
        return _InitialFactors(layers) if config.init == "pissa" else RunHooks()

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return settings["peft_type"] == "LORA" and not settings.get("use_dora")

    def saved_rank(self, layer: AdapterLayer) -> int:
        from lorakit.methods.lora_form import rank_of

        return rank_of(layer)

    def compose(self, fused: FusedLayer) -> AdapterLayer:
        from lorakit.methods.lora_form import compose

        return compose(self, fused)

    def split(self, layer: AdapterLayer, parts: Mapping[str, Any]) -> FusedLayer:
        from lorakit.methods.lora_form import split

        return split(self, layer, parts)


def embedding_add(y: Tensor, layer: AdapterLayer, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``y`` and the rows of scaling * (B A)^T for the ids."""
    import torch.nn.functional as F

    update: Tensor = F.linear(F.embedding(ids, A.t()).to(y.dtype), B.to(y.dtype))
    # Gemma's embeddings scale what they look up, so the update to W is scaled too.
    factor = layer.scaling * getattr(layer.base_layer, "embed_scale", 1.0)
    out: Tensor = y + update * factor
    return out


class _InitialFactors(RunHooks):
    """What ``pissa`` started from belongs to a checkpoint: a second SVD may differ in its bits."""

    def __init__(self, layers: Mapping[str, AdapterLayer]) -> None:
        self._buffers: dict[str, Tensor] = {
            f"{name}.{factor}": getattr(layer, factor)
            for name, layer in layers.items()
            for factor in ("initial_A", "initial_B")
        }

    def state(self) -> dict[str, Tensor]:
        return self._buffers

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, buffer in self._buffers.items():
            buffer.copy_(state[name])


def _is_end(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _by_suffix(pattern: dict[str, Any], name: str, default: float) -> float:
    """The value of the longest suffix that ``name`` ends with."""
    fitting = [s for s in pattern if _is_end(s, name)]
    return float(pattern[max(fitting, key=len)]) if fitting else default


METHOD = Lora()
