"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA with B's learning rate above A's.

lr_B = loraplus_lr_ratio * lr_A, whichever of the two starts at zero. ``auto`` is the ratio at which
both contribute equally to the change of the loss: (n / m) * sqrt(n / r) for each matrix, with
n = in_features and m = out_features (Su 2024, kexue.fm/archives/10001).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from lorakit.methods.base import RunHooks
from lorakit.methods.lora import Lora, LoraConfig
from lorakit.recipe.sections import AdapterSection, PositiveFloat, TrainSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer


class LoraPlusConfig(LoraConfig):
    """The keys of LoRA, and the ratio lr_B / lr_A. ``loraplus_lr_embedding`` is the learning rate
    of both factors of adapted embeddings; null means ``train.learning_rate``, and is the default
    for a ratio of 1."""

    usual_learning_rates: ClassVar = (4e-5, 2e-4)
    learning_rate_note: ClassVar = (
        "lower than LoRA's, since it is the rate of A alone: B's is 16 times as high"
    )
    method: str = "lora_plus"
    loraplus_lr_ratio: PositiveFloat | Literal["auto"] = 16.0
    """B's learning rate divided by A's; auto is (n / m) sqrt(n / r) for each matrix."""
    loraplus_lr_embedding: PositiveFloat | None = 1e-6
    """The learning rate of adapted embeddings; null is learning_rate."""

    @model_validator(mode="before")
    @classmethod
    def _ratio_1_is_lora(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("loraplus_lr_ratio") in (1, 1.0):
            return {"loraplus_lr_embedding": None, **data}
        return data

    def ratio_of(self, layer: AdapterLayer) -> float:
        if self.loraplus_lr_ratio != "auto":
            return self.loraplus_lr_ratio
        n, m = layer.in_features, layer.out_features
        return n / m * math.sqrt(n / layer.r)


class LoraPlus(Lora):
    name = "lora_plus"
    summary = "LoRA, B learns 16 times as fast"
    source = "Hayou et al. 2024"
    arxiv = "2402.12354"
    Config: ClassVar[type[AdapterSection]] = LoraPlusConfig

    def param_groups(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Mapping[str, AdapterLayer],
        config: Any,
        train: TrainSection,
    ) -> list[dict[str, Any]]:
        """One group for each learning rate, that of A and of everything else first. Groups of B are
        marked, since their rate is logged. Weight decay applies in every group."""
        rates: dict[str, float] = {}
        factor_B = set()
        for name, layer in layers.items():
            if layer.kind == "embedding" and config.loraplus_lr_embedding is not None:
                rates[f"{name}.lora_A"] = rates[f"{name}.lora_B"] = config.loraplus_lr_embedding
            else:
                rates[f"{name}.lora_B"] = train.learning_rate * config.ratio_of(layer)
                factor_B.add(f"{name}.lora_B")
        groups: dict[tuple[float, bool], dict[str, nn.Parameter]] = {
            (train.learning_rate, False): {}
        }
        for name, parameter in parameters.items():
            key = (rates.get(name, train.learning_rate), name in factor_B)
            groups.setdefault(key, {})[name] = parameter
        return [
            group | {"lr": rate, "is_lora_B": is_B}
            for (rate, is_B), members in groups.items()
            for group in super(LoraPlus, self).param_groups(members, layers, config, train)
        ]

    def hooks(self, layers: Mapping[str, AdapterLayer], config: Any, total_steps: int) -> RunHooks:
        return _WithRates(super().hooks(layers, config, total_steps))

    def depends_on_length(self) -> bool:
        return type(self).hooks is not LoraPlus.hooks

    def advice(self, config: Any) -> str | None:
        ratio = config.loraplus_lr_ratio
        shown = ratio if isinstance(ratio, str) else f"{ratio:g}"
        return f"adapter.loraplus_lr_ratio ({shown}) too high"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return False


class _WithRates(RunHooks):
    """Adds B's learning rate to the log of the hooks ``inner``; with ``auto``, the largest one."""

    def __init__(self, inner: RunHooks) -> None:
        self._inner = inner
        self.device_values = inner.device_values

    def before_step(self, scale: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return self._inner.before_step(scale)

    def after_step(self, step: int, scaled: bool = False) -> None:
        self._inner.after_step(step, scaled)

    def is_final_form(self, step: int) -> bool:
        return self._inner.is_final_form(step)

    def logged(self, step: int, optimizer: Any) -> dict[str, float]:
        rates = [group["lr"] for group in optimizer.param_groups if group["is_lora_B"]]
        own = {"learning_rate_B": float(max(rates))} if rates else {}
        return {**self._inner.logged(step, optimizer), **own}

    def changed_ranks(self, first: int, last: int) -> Tensor | None:
        return self._inner.changed_ranks(first, last)

    def state(self) -> dict[str, Tensor]:
        return self._inner.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._inner.load_state(state)

    def ranks(self) -> dict[str, int] | None:
        return self._inner.ranks()


METHOD = LoraPlus()
