"""Offloaded checkpointing gives the gradients of plain training, and keeps less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from transformers import PreTrainedModel

from lorakit.errors import UserError
from lorakit.injection import inject
from lorakit.methods.lora import LoraConfig
from lorakit.training.fast_layers import compile_layers
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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_gradients_are_those_of_plain_training(family: str, dropout: float, compiled: bool) -> None:
    torch._dynamo.reset()
    wanted = gradients(adapted(family, dropout))
    model = adapted(family, dropout)
    offload_layers(model, CPU, compiled, backend="aot_eager")
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


@pytest.mark.slow
def test_a_layer_that_is_no_single_graph_is_computed_again_as_a_whole() -> None:
    torch._dynamo.reset()
    wanted = gradients(adapted("llama", 0.0))
    model = adapted("llama", 0.0)
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    said: list[str] = []
    offload_layers(model, CPU, compiled=True, backend="aot_eager", say=said.append)
    for mine, reference in zip(gradients(model), wanted, strict=True):
        assert torch.equal(mine, reference)
    [note] = said
    assert note.startswith("LlamaDecoderLayer cannot be compiled as a single graph")


def products(offload: bool) -> list[int]:
    """The products of each compiled graph: of a layer, the norm after it, and their backward
    passes."""
    found: list[int] = []

    def count(graph: GraphModule, _inputs: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes]
        found.append(sum(target is torch.ops.aten.mm.default for target in targets))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=1)
    model.config.use_cache = False
    inject(model, LoraConfig(r=4, target_modules=["q"]))
    model.train()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    if offload:
        offload_layers(model, CPU, compiled=True, backend=backend)
    else:
        compile_layers(model, backend)
    gradients(model, passes=1)
    return found


def test_the_last_product_of_a_layer_is_not_computed_again() -> None:
    forward, *norms, backward = products(offload=False)
    assert forward >= 7, "one for each weight"
    assert products(offload=True) == [forward, *norms, backward + forward - 1]


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


class Kept:
    """A store that counts the inputs that wait in it."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def start_pass(self) -> None:
        self.inputs.clear()

    def put(self, x: Tensor) -> int:
        self.inputs.append(x)
        return len(self.inputs)

    def take(self, saved: int) -> Tensor:
        assert saved == len(self.inputs), "the last layer's input is read first"
        return self.inputs.pop()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_input_of_each_layer_waits_in_the_store(compiled: bool) -> None:
    torch._dynamo.reset()
    model, kept = adapted("llama", 0.0), Kept()
    offload_layers(model, CPU, compiled, "aot_eager", kept)
    loss = model(input_ids=IDS)[0].float().sum()
    layers = len(model.get_decoder().layers)
    assert [x.shape for x in kept.inputs] == [(*IDS.shape, model.config.hidden_size)] * layers
    loss.backward()
    assert not kept.inputs


def test_what_cannot_be_offloaded_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Linear has no stack of layers; allowed: true, false"):
        offload_layers(nn.Linear(2, 2), CPU, compiled=False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='gradient_checkpointing = "offload": needs a GPU'):
            train(recipe_for(tmp_path, tiny_llama, train__gradient_checkpointing="offload"))
        assert not (tmp_path / "run").exists()
