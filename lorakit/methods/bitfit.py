"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199, section 3): only biases are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import TargetError
from lorakit.methods.full import Full, FullConfig
from lorakit.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from torch import nn


class BitFitConfig(FullConfig):
    """``target_modules``: null for all biases of the model, including those of norms, or modules
    whose biases are trained (the paper's subset: q and the first layer of the MLP)."""

    usual_learning_rates: ClassVar = (4e-4, 2e-3)
    learning_rate_note: ClassVar = (
        "higher than LoRA's, since biases are few and need larger changes"
    )
    method: str = "bitfit"


class BitFit(Full):
    """y = W x + b with only b trained; saved in the format of ``full``."""

    name = "bitfit"
    summary = "only the biases are trained"
    source = "Ben Zaken et al. 2021"
    arxiv = "2106.10199"
    Config: ClassVar[type[AdapterSection]] = BitFitConfig
    peft_type = "BITFIT"

    def trained_parameters(self, model: nn.Module, config: Any) -> list[str]:
        """Every parameter whose name ends with ``bias``. Raises TargetError if there is none."""
        found = [n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"]
        if not found:
            raise TargetError(
                f"adapter.method: bitfit trains biases, and {type(model).__name__} has none; "
                "allowed: a model with biases (BERT, RoBERTa, GPT-2, OPT), or another method"
            )
        return found


METHOD = BitFit()
