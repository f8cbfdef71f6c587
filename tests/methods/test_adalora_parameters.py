"""AdaLoRA on stacked matrices: each has its own rank, as if it were a module of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.errors import TargetError
from lorakit.injection import inject
from lorakit.layers import AdapterLayer, adapter_layers
from lorakit.methods.adalora import METHOD, AdaLoraConfig
from lorakit.methods.adalora_layer import AdaLoraLayer, Allocation

E, OUT, IN, R, STEPS = 5, 6, 4, 3, 14
KEYS: dict[str, Any] = {"init_r": R, "target_r": 1, "tinit": 2, "tfinal": 3, "deltaT": 2}


class Stacked(nn.Module):
    """The weights of all experts in one parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ei->eo", self.weight, x)


class Separate(nn.Module):
    """The same experts as linear layers."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in weight)
        for part, own in zip(self.parts, weight, strict=True):
            part.weight = nn.Parameter(own)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(row) for part, row in zip(self.parts, x, strict=True)])


def models(form: str) -> list[tuple[nn.Module, dict[str, AdapterLayer], Allocation]]:
    """Both, each beside a linear layer, with equal factors."""
    found = []
    for kind, keys in (
        (Stacked, {"target_modules": ["last"], "target_parameters": ["experts.weight"]}),
        (Separate, {"target_modules": [r"re:experts\..*", "last"]}),
    ):
        generator = torch.Generator().manual_seed(0)
        experts = kind(torch.randn(E, OUT, IN, generator=generator))
        model = nn.ModuleDict({"experts": experts, "last": nn.Linear(OUT, 2, bias=False)})
        nn.init.ones_(model["last"].weight)  # type: ignore[arg-type]
        config = AdaLoraConfig(**{**KEYS, **keys, "orth_reg_form": form})
        inject(model, config)
        layers = adapter_layers(model)
        values = torch.randn(E, R * (IN + OUT + 1), generator=generator) * 0.3
        last = torch.randn(R * (OUT + 2 + 1), generator=generator) * 0.3
        start = {"experts.weight": values, "last": last}
        start |= {f"experts.parts.{index}": own for index, own in enumerate(values)}
        for name, layer in layers.items():
            sizes = [R * layer.in_features, R * layer.out_features, R]
            with torch.no_grad():
                for factor, value in zip(
                    (layer.lora_A, layer.lora_B, layer.lora_E),
                    start[name].split(sizes, -1),
                    strict=True,
                ):
                    factor.copy_(value.reshape(factor.shape))
        hooks = METHOD.hooks(layers, config, STEPS)
        assert isinstance(hooks, Allocation)
        found.append((model, layers, hooks))
    return found


def train(model: nn.Module, hooks: Allocation) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        y = model["last"](model["experts"](torch.randn(E, IN, generator=generator)))  # type: ignore[index]
        (y - 1).square().mean().backward()
        hooks.before_step(lambda gradient: gradient)
        optimizer.step()
        hooks.after_step(step)


@pytest.mark.parametrize("form", ["squared", "mean_norm"])
def test_each_matrix_of_a_stack_is_as_a_module(form: str) -> None:
    (stacked, layers, hooks), (separate, others, other_hooks) = models(form)
    for model, own in ((stacked, hooks), (separate, other_hooks)):
        train(model, own)
    ranks = list(hooks.ranks().values())
    assert ranks == list(other_hooks.ranks().values())
    assert sum(ranks) == (E + 1) * KEYS["target_r"]
    assert len(set(ranks)) > 1, "the ranks differ"
    assert list(hooks.ranks()) == [*(f"experts.weight[{i}]" for i in range(E)), "last"]
    layer = layers["experts.weight"]
    assert isinstance(layer, AdaLoraLayer)
    for factor in ("lora_A", "lora_B", "lora_E", "kept"):
        want = torch.stack([getattr(others[f"experts.parts.{i}"], factor) for i in range(E)])
        torch.testing.assert_close(getattr(layer, factor), want, atol=1e-6, rtol=1e-5)
    assert layer.saved_rank == max(ranks[:E])
    folded = layer.as_lora()
    assert folded.lora_A.shape == (E, layer.saved_rank, IN)
    torch.testing.assert_close(folded.delta_weight(), layer.delta_weight())


def test_dropout_is_refused() -> None:
    model = nn.ModuleDict({"experts": Stacked(torch.randn(E, OUT, IN))})
    config = AdaLoraConfig(target_parameters=["experts.weight"], lora_dropout=0.1)
    with pytest.raises(TargetError, match=r"lora_dropout = 0\.1: not supported for parameters"):
        inject(model, config)
