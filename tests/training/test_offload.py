"""Offloaded checkpointing gives the gradients of plain training, and keeps less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.errors import UserError
from lorakit.injection import inject
from lorakit.methods.lora import LoraConfig
from lorakit.training.offload import offload_layers
from lorakit.training.run import train
from tests.families import tiny
from tests.training.runs import recipe_for

IDS = torch.arange(24).view(2, 12)
CPU = torch.device("cpu")


def adapted(family: str, dropout: float) -> PreTrainedModel:
    torch.manual_seed(0)
    model = tiny(family)
    model.config.use_cache = False
    inject(model, LoraConfig(r=4, target_modules=["all-linear"], lora_dropout=dropout))
    model.train()
    return model


def gradients(model: PreTrainedModel, passes: int = 2) -> list[Tensor]:
    """Those of several passes, summed; each has its own dropout."""
    torch.manual_seed(1)
    for number in range(passes):
        outputs = model(input_ids=IDS + number)
        outputs[0].float().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_gradients_are_those_of_plain_training(family: str, dropout: float) -> None:
    wanted = gradients(adapted(family, dropout))
    model = adapted(family, dropout)
    offload_layers(model, CPU, compiled=False)
    found = gradients(model)
    assert len(found) == len(wanted) > 0
    for mine, reference in zip(found, wanted, strict=True):
        assert torch.equal(mine, reference)


def test_a_pass_without_a_backward_pass_leaves_nothing_behind() -> None:
    wanted = gradients(adapted("llama", 0.0))
    model = adapted("llama", 0.0)
    offload_layers(model, CPU, compiled=False)
    model(input_ids=IDS)
    with torch.no_grad():
        model(input_ids=IDS)
    for mine, reference in zip(gradients(model), wanted, strict=True):
        assert torch.equal(mine, reference)


def test_only_the_inputs_of_the_layers_are_kept() -> None:
    model = adapted("llama", 0.0)
    offload_layers(model, CPU, compiled=False)
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    hidden = model.get_input_embeddings()(IDS)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=hidden)
    assert saved < 6 * hidden.numel(), "the final norm keeps a few tensors of this size"


def test_what_cannot_be_offloaded_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Linear has no stack of layers; allowed: true, false"):
        offload_layers(nn.Linear(2, 2), CPU, compiled=False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='gradient_checkpointing = "offload": needs a GPU'):
            train(recipe_for(tmp_path, tiny_llama, train__gradient_checkpointing="offload"))
        assert not (tmp_path / "run").exists()
