"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): y = W x + (lora_alpha / r) B A dropout(x).

W (out, in) is frozen; A (r, in) is random and B (out, r) zero, so the output starts unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lorakit import registry
from lorakit.errors import TargetError
from lorakit.methods.base import Method, RunHooks
from lorakit.module_names import is_suffix
from lorakit.recipe.sections import AdapterSection, LoraAlpha, Probability, Rank

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer
    from lorakit.methods.lora_layer import LoraLayer


class LoraConfig(AdapterSection):
    """The keys of LoRA; the formulas of ``init`` are in ``LoraLayer.reset_parameters``."""

    #: 2e-4 is common for models of 7B and 8B; MiniLM is best at 5e-4 to 1e-3 (docs/results.md).
    usual_learning_rates: ClassVar = (2e-4, 1e-3)
    method: str = "lora"
    r: Rank = 8
    """The rank of A (r, in) and B (out, r)."""
    lora_alpha: LoraAlpha = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Probability = 0.0
    """The probability of dropout on the input of A."""
    rank_pattern: dict[str, Rank] = Field(default={})
    """Suffixes of module names, each with a rank of its own."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(default={})
    """Suffixes of module names, each with a lora_alpha of its own."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Also train the biases of the adapted modules (lora_only) or of the whole model (all)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."""
    init: Literal["default", "b_gaussian", "pissa", "orthogonal"] = "default"
    """default: A Kaiming-uniform as in loralib, B zero. b_gaussian: A zero, B random. pissa: the
    principal singular vectors of W. orthogonal: orthonormal factors."""

    def rank_of(self, name: str) -> int:
        return int(_by_suffix(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        return _by_suffix(self.alpha_pattern, name, self.lora_alpha)

    def scaling_of(self, name: str) -> float:
        r = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.use_rslora else r)


class Lora(Method):
    name = "lora"
    summary = "W x + (lora_alpha / r) B A x"
    source = "Hu et al. 2021"
    arxiv = "2106.09685"
    Config: ClassVar[type[AdapterSection]] = LoraConfig
    kinds = frozenset({"linear", "conv1d", "embedding", "slice", "parameter"})
    peft_type = "LORA"
    peft_loads = True

    def check(self, config: Any, targets: Collection[str]) -> None:
        """Every key of ``rank_pattern`` and ``alpha_pattern`` must be a suffix of a target."""
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, field):
                if not any(is_suffix(key, name) for name in targets):
                    ends = sorted({name.rpartition(".")[2] for name in targets})
                    raise TargetError(
                        f"adapter.{field}: {key!r} matches no adapted module; allowed: "
                        f"{', '.join(ends)}, or longer suffixes of their names"
                    )

    def layer_class(self) -> type[LoraLayer]:
        from lorakit.methods.lora_layer import LoraLayer

        return LoraLayer

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        """Raises TargetError for a parameter with dropout or an init that it does not support."""
        self.check_parameter(module, config, name)
        layer = self.layer_class()(
            module,
            r=config.rank_of(name),
            scaling=config.scaling_of(name),
            dropout=config.lora_dropout,
        )
        layer.reset_parameters(config.init, name)
        return layer

    def check_parameter(self, module: nn.Module, config: Any, name: str) -> None:
        """Raise TargetError if ``module`` is a parameter, such as stacked experts, for which the
        method or ``config`` is not defined."""
        from lorakit.base_weight import ParameterView
        from lorakit.methods.adalora_layer import AdaLoraLayer
        from lorakit.methods.lora_layer import LoraLayer

        key, value, allowed = "", "", ""
        if not isinstance(module, ParameterView):
            return
        if self.layer_class() not in (LoraLayer, AdaLoraLayer):
            allowed = ", ".join(registry.methods_for("parameter"))
            key, value = "method", self.name
        elif config.lora_dropout:
            key, value, allowed = "lora_dropout", config.lora_dropout, "0, as in PEFT"
        elif getattr(config, "init", "default") not in ("default", "b_gaussian"):
            key, value, allowed = "init", config.init, "default, b_gaussian"
        if key:
            raise TargetError(
                f"adapter.{key} = {value!r}: not supported for parameters ({name}); allowed: "
                f"{allowed}"
            )

    def trained_parameters(self, model: nn.Module, config: Any) -> list[str]:
        """The biases that ``bias`` selects."""
        from lorakit.layers import adapted_modules

        if config.bias == "all":
            return [n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"]
        if config.bias == "none":
            return []
        layers = adapted_modules(model).items()
        return [f"{name}.base_layer.bias" for name, layer in layers if layer.bias is not None]

    def hooks(self, layers: Mapping[str, AdapterLayer], config: Any, total_steps: int) -> RunHooks:
        return _InitialFactors(layers) if config.init == "pissa" else RunHooks()

    def depends_on_length(self) -> bool:
        return type(self).hooks is not Lora.hooks

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return settings["peft_type"] == "LORA" and not settings.get("use_dora")


class _InitialFactors(RunHooks):
    """Keeps the initial factors of ``pissa`` in checkpoints: another SVD may have other bits."""

    def __init__(self, layers: Mapping[str, AdapterLayer]) -> None:
        self._buffers: dict[str, Tensor] = {
            f"{name}.{end}": value
            for name, layer in layers.items()
            for end, value in layer.named_buffers()
            if end in ("initial_A", "initial_B")
        }

    def state(self) -> dict[str, Tensor]:
        return self._buffers

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, buffer in self._buffers.items():
            buffer.copy_(state[name])


def _by_suffix(pattern: dict[str, Any], name: str, default: float) -> float:
    """The value for the longest matching suffix of ``name``."""
    fitting = [s for s in pattern if is_suffix(s, name)]
    return float(pattern[max(fitting, key=len)]) if fitting else default


METHOD = Lora()
