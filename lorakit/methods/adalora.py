"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): W + s P Lambda Q, ranks chosen during training.

Lambda is initialized with zeros, P (out, init_r) and Q (init_r, in) with Gaussians; the penalty
gamma * (||P^T P - I||_F^2 + ||Q Q^T - I||_F^2) keeps them near orthonormal (section 3.1). Every
``deltaT`` steps the triplets (a column of P, its lambda, a row of Q) of all matrices are ranked by
importance, and the lambdas of all but the best within the budget are set to zero (section 3.2). P
and Q continue to train, so a pruned triplet can return. The names are those of PEFT: P is
``lora_B``, Lambda ``lora_E``, Q ``lora_A``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lorakit.errors import UserError
from lorakit.methods.base import RunHooks
from lorakit.methods.lora import Lora
from lorakit.recipe.sections import (
    MAX_RANK,
    AdapterSection,
    LoraAlpha,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Rank,
)

if TYPE_CHECKING:
    from pydantic import ValidationInfo
    from torch import nn

    from lorakit.layers import AdapterLayer
    from lorakit.methods.lora_layer import LoraLayer

#: A number of steps, or a fraction of the run.
Steps = NonNegativeInt | Annotated[float, Field(gt=0, lt=1)]


class AdaLoraConfig(AdapterSection):
    """The keys of AdaLoRA. ``init_r`` is that of most of the paper's tables; ``tinit`` and
    ``tfinal`` are close to its Table 8. The gammas of the paper's tables were chosen for
    ``orth_reg_form: mean_norm``.
    """

    usual_learning_rates: ClassVar = (1e-3, 5e-3)
    learning_rate_note: ClassVar = (
        "5 to 10 times LoRA's: at first only the lambdas change W, through a P and a Q of small "
        "entries"
    )
    method: str = "adalora"
    target_r: Rank = 8
    """The average rank at the end."""
    init_r: Rank = 12
    """The rank of every matrix at the start; by default 1.5 times target_r."""
    lora_alpha: LoraAlpha = 16
    """The update is scaled by lora_alpha / init_r."""
    lora_dropout: Probability = 0.0
    """The probability of dropout on the input."""
    tinit: Steps = 0.1
    """Steps, or a fraction of the run, at the start in which all triplets are trained."""
    tfinal: Steps = 0.5
    """Steps, or a fraction of the run, at the end in which only the kept triplets are trained."""
    deltaT: PositiveInt = 10
    """Steps between allocations of the ranks."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of the importance of triplets."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of the uncertainty of the importance."""
    orth_reg_weight: NonNegativeFloat = 0.1
    """gamma, the weight of the penalty that keeps P and Q near orthonormal."""
    orth_reg_form: Literal["squared", "mean_norm"] = "squared"
    """squared: the paper's sum of squared norms. mean_norm: the mean of norms, as in both public
    implementations."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Also train the biases of the adapted modules (lora_only) or of the whole model (all)."""

    @model_validator(mode="before")
    @classmethod
    def _start_above_the_target(cls, data: Any) -> Any:
        if isinstance(data, dict) and "init_r" not in data:
            target_r = data.get("target_r")
            if isinstance(target_r, int):
                init_r = target_r + (target_r + 1) // 2
                return {**data, "init_r": min(max(1, init_r), MAX_RANK)}
        return data

    @field_validator("init_r")
    @classmethod
    def _no_less_than_the_target(cls, init_r: int, info: ValidationInfo) -> int:
        target_r = info.data.get("target_r", 0)
        if init_r < target_r:
            raise ValueError(f"is below target_r = {target_r}; allowed: {target_r} or more")
        return init_r


class AdaLora(Lora):
    name = "adalora"
    summary = "W + P Lambda Q, ranks learned"
    source = "Zhang et al. 2023"
    arxiv = "2303.10512"
    Config: ClassVar[type[AdapterSection]] = AdaLoraConfig
    kinds = frozenset({"linear", "conv1d", "slice", "parameter"})
    peft_type = "ADALORA"

    def check(self, config: Any, targets: Collection[str]) -> None:
        """No setting refers to modules by name."""

    def layer_class(self) -> type[LoraLayer]:
        from lorakit.methods.adalora_layer import AdaLoraLayer

        return AdaLoraLayer

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        self.check_parameter(module, config, name)
        r = config.init_r
        layer = self.layer_class()(
            module,
            r=r,
            scaling=scaling_of(config.lora_alpha, r),
            dropout=config.lora_dropout,
        )
        layer.reset_parameters("default", name)
        return layer

    def check_steps(self, config: Any, total_steps: int) -> None:
        tinit, tfinal = (resolve_steps(s, total_steps) for s in (config.tinit, config.tfinal))
        if tinit + tfinal >= total_steps:
            given = ["tinit", "tfinal"]
            if given[0] not in config.model_fields_set:  # start with the key that the recipe sets
                given.reverse()
            keys = ", ".join(f"adapter.{key} = {getattr(config, key)}" for key in given)
            raise UserError(
                f"{keys}: {tinit} initial and {tfinal} final of the run's {total_steps} steps "
                f"leave none for rank allocation; allowed: less than {total_steps} in total"
            )

    def hooks(self, layers: Mapping[str, AdapterLayer], config: Any, total_steps: int) -> RunHooks:
        from lorakit.methods.adalora_layer import AdaLoraLayer, Allocation, Budget

        tinit, tfinal = (resolve_steps(s, total_steps) for s in (config.tinit, config.tfinal))
        matrices = sum(math.prod(layer.stack) for layer in layers.values())
        start, end = config.init_r * matrices, config.target_r * matrices
        return Allocation(
            {name: layer for name, layer in layers.items() if isinstance(layer, AdaLoraLayer)},
            Budget(start, end, tinit, tfinal, total_steps, config.deltaT),
            beta1=config.beta1,
            beta2=config.beta2,
            orth_reg_weight=config.orth_reg_weight,
            orth_reg_form=config.orth_reg_form,
        )

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return bool(settings["peft_type"] == "ADALORA")


def scaling_of(lora_alpha: float, init_r: int) -> float:
    """lora_alpha / init_r, as in both public implementations: independent of the remaining rank,
    with a small term that prevents a division by zero."""
    return lora_alpha / (init_r + 1e-5)


def resolve_steps(steps: float, total_steps: int) -> int:
    """``steps`` as a number of steps, if it is a fraction of the run."""
    return steps if isinstance(steps, int) else round(steps * total_steps)


METHOD = AdaLora()
