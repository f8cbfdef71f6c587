"""Full fine-tuning: every parameter of the base is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import AdapterError, shown
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection, TextList

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer


class FullConfig(AdapterSection):
    """``target_modules``: null for all modules, or those whose own parameters are trained.

    ``layers`` restricts them: ``layers: "10,11"`` alone trains the last two of twelve layers, the
    FT-Top2 of the LoRA paper (section 5.1).
    """

    usual_learning_rates: ClassVar = (1e-5, 1e-4)
    learning_rate_note: ClassVar = (
        "lower than LoRA's, since all of W moves, not a product of two small factors"
    )
    method: str = "full"
    target_modules: TextList | None = None  # type: ignore[assignment]
    """The modules whose own parameters are trained; null is all."""


class Full(Method):
    """No module is wrapped; the parameters of the base are trained themselves.

    For a half-precision base, fp32 master weights are trained, so that small updates are not lost,
    and the model computes with rounded copies. PEFT has no format for the result:
    ``adapter_config.json`` lists ``trained_parameters``, and ``adapter_model.safetensors`` contains
    their values in float32 under the base model's names.
    """

    name = "full"
    summary = "every parameter is trained"
    Config: ClassVar[type[AdapterSection]] = FullConfig
    kinds: ClassVar[frozenset[str]] = frozenset()
    peft_type = "FULL"
    peft_loads = False

    def trained_parameters(self, model: nn.Module, config: Any) -> list[str]:
        """All parameters; a shared one by its first name."""
        return [name for name, _ in model.named_parameters()]

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return bool(settings["peft_type"] == self.peft_type)

    def to_peft(
        self, layers: Mapping[str, AdapterLayer], config: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"peft_type": self.peft_type}, {}

    def unpack(
        self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors unchanged, after checking that they are those of
        ``trained_parameters`` and of the fully trained modules."""
        listed = settings.get("trained_parameters")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise AdapterError(
                f"adapter_config.json: trained_parameters = {shown(listed)}: allowed: a list of "
                "the names of parameters"
            )
        fully_trained = tuple(f"{name}." for name in settings.get("modules_to_save") or ())
        found = {name for name in tensors if not name.startswith(fully_trained)}
        if mismatched := sorted(set(listed) ^ found):
            kind = "missing" if mismatched[0] in listed else "unknown"
            more = f", and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
            raise AdapterError(f"{kind} tensor: {mismatched[0]}{more}")
        return dict(tensors)


METHOD = Full()
