"""Training in a random subspace: theta = theta_0 + P theta_d (Li et al. 2018, arXiv 1804.08838,
section 2; Aghajanyan et al. 2020, arXiv 2012.13255, section 3).

theta_0 are the adapted weights W_1 ... W_n, D values in total; theta_d (d,) is a single trained
vector for the whole model; P (D, d) is random and fixed, and generated from its seed when needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lorakit.errors import AdapterError, shown
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection, Seed, TextList

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer
    from lorakit.methods.intrinsic_layer import IntrinsicLayer


class IntrinsicConfig(AdapterSection):
    """The keys of the intrinsic dimension."""

    usual_learning_rates: ClassVar = (1e-3, 5e-3)
    learning_rate_note: ClassVar = (
        "a step changes each weight by about the learning rate, whatever d is"
    )
    method: str = "intrinsic"
    d: Annotated[int, Field(gt=0, lt=2**31)] = 1000
    """The number of trained values."""
    projection_seed: Seed = 0
    """The seed of the random projection P."""
    target_modules: TextList = ["all-linear"]
    """The modules whose weights are moved; by default all linear layers."""


class Intrinsic(Method):
    """W_i + reshape(P_i theta_d), where theta_d is initialized with zeros.

    P_i, the rows of P for W_i (out, in) row by row, comes from ``kernels.fastfood.project`` with
    the number of the matrix as the stream. Its rows have norm 1, so a step of Adam changes each
    weight by about the learning rate, whatever d and D are. In Li et al. the columns have norm 1,
    which scales theta_d by sqrt(d / D) and needs a learning rate for each model size. On MiniLM
    (D = 1.1e7, d = 1000, 16 rows, 12 steps of AdamW, initial loss 0.692): learning rates of 1e-3
    and 1e-2 lead to losses of 0.574 and 0.039; with columns of norm 1, to 0.691 and 0.684.

    Layers have no rank (r is 0). PEFT has no format for this method: ``adapter_config.json`` has
    ``d``, ``projection_seed`` and ``matrices``, the names in the order of their streams, and
    ``adapter_model.safetensors`` has a single ``theta``.
    """

    name = "intrinsic"
    summary = "W + P theta, theta one vector"
    source = "Li et al. 2018"
    arxiv = "1804.08838"
    Config: ClassVar[type[AdapterSection]] = IntrinsicConfig
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    joins = False
    peft_type = "INTRINSIC"
    peft_loads = False

    def layer_class(self) -> type[IntrinsicLayer]:
        from lorakit.methods.intrinsic_layer import IntrinsicLayer

        return IntrinsicLayer

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        import torch

        return self.layer_class()(module, torch.zeros(config.d), config.projection_seed)

    def link(self, layers: Mapping[str, IntrinsicLayer]) -> None:
        """Share one theta, and number the matrices that have no number yet."""
        first = next(iter(layers.values()))
        for index, layer in enumerate(layers.values()):
            layer.share(first, index)

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return bool(settings["peft_type"] == self.peft_type)

    def to_peft(
        self, layers: Mapping[str, IntrinsicLayer], config: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        ordered = sorted(layers, key=lambda name: layers[name].stream or 0)
        first = layers[ordered[0]]
        settings = {
            "peft_type": self.peft_type,
            "d": first.theta.numel(),
            "projection_seed": first.projection_seed,
            "matrices": ordered,
        }
        return settings, {"theta": first.theta}

    def unpack(
        self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """theta under the name of each matrix, and the tensors of fully trained modules."""
        names = _matrices(settings)
        d, seed = settings.get("d"), settings.get("projection_seed")
        for key, value, least in (("d", d, 1), ("projection_seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**32:
                raise AdapterError(
                    f"adapter_config.json: {key} = {shown(value)}: allowed: an integer from {least}"
                )
        rest = dict(tensors)
        theta = rest.pop("theta", None)
        if theta is None:
            raise AdapterError("missing tensor: theta")
        if tuple(theta.shape) != (d,):
            raise AdapterError(f"theta is {tuple(theta.shape)}, and d = {d} needs ({d},)")
        return rest | {f"{name}.theta": theta for name in names}

    def from_peft(
        self, module: nn.Module, name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> AdapterLayer:
        from lorakit.base_weight import kind_of

        if set(tensors) != {"theta"}:
            listed = ", ".join(f"{name}.{key}" for key in sorted(set(tensors) - {"theta"}))
            raise AdapterError(f"unknown tensors: {listed}")
        if kind_of(module) not in self.kinds:
            allowed = ", ".join(sorted(self.kinds))
            raise AdapterError(f"{name} is an {kind_of(module)}: allowed: {allowed}")
        stream = settings["matrices"].index(name)
        return self.layer_class()(module, tensors["theta"], settings["projection_seed"], stream)


def _matrices(settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("matrices")
    listed = names if isinstance(names, list) else []
    texts = [name for name in listed if isinstance(name, str)]
    if not texts or len(texts) < len(listed) or len(set(texts)) < len(texts):
        raise AdapterError(
            f"adapter_config.json: matrices = {shown(names)}: allowed: a list of the adapted "
            "modules' names, each once"
        )
    return texts


METHOD = Intrinsic()
