"""Prepare the layers of a model for fast passes: fused LoRA layers and compilation.

Each function changes the model in place, on its device, after the adapter has been injected.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from lorakit.anatomy import transformer_layers
from lorakit.errors import UserError
from lorakit.methods.lora_layer import LoraLayer, SharedInput


def compile_layers(model: nn.Module, backend: Any = "inductor", has_hooks: bool = False) -> None:
    """Compile each layer by itself: all layers share the compiled code, so that this takes seconds
    where compiling the whole model takes minutes. A second length compiles it once more, for any
    length. With ``has_hooks``, the hooks of the layers stay outside, such as those that gather
    sharded weights. Raises UserError for a model without a stack of layers."""
    layers = transformer_layers(model)
    if not layers:
        raise UserError(
            f"train.compile = true: {type(model).__name__} has no stack of layers; allowed: auto, "
            "false"
        )
    _recompute_more()
    compile_checkpoints()
    for layer in layers:
        if has_hooks:
            layer.forward = torch.compile(layer.forward, backend=backend)
        else:
            layer.compile(backend=backend)
    compile_last_norm(model, backend)


def compile_last_norm(model: nn.Module, backend: Any = "inductor") -> None:
    """Compile what normalizes the output of the last layer, if it is beside the stack of layers."""
    layers = transformer_layers(model)
    for parent in model.modules():
        children = list(parent.children())
        if any(isinstance(child, nn.ModuleList) and list(child) == layers for child in children):
            for child in children:
                if type(child).__name__.endswith("Norm"):
                    child.compile(backend=backend)


def fuse_layers(model: Any, is_sharded: bool = False) -> None:
    """Compute LoRA layers that read the same tensor (q, k and v) by one operator, and each of the
    others by its own. A forward pass on a few tokens finds them. Frozen weights that are sharded
    stay apart."""
    plain = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and m.is_plain()}
    if not plain:
        return
    for layer in plain.values():
        layer.fused = True
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _module, arguments: inputs.__setitem__(name, arguments[0])

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in plain.items()]
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(8, device=model.device)[None])
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[str, int, type[nn.Module]], list[LoraLayer]] = {}
    for name, tensor in inputs.items():  # in the order of the calls
        key = (name.rpartition(".")[0], id(tensor), type(plain[name].base_layer))
        groups.setdefault(key, []).append(plain[name])
    for layers in groups.values():
        if len(layers) > 1 and len({layer.bias is None for layer in layers}) == 1:
            SharedInput(layers, stacks=not is_sharded)


def _recompute_more() -> None:
    """Recompute element-wise results, such as SwiGLU's, in the backward pass, although a matrix
    product reads them: a quarter less memory for 2% more time."""
    name = "ban_recompute_materialized_backward"
    if hasattr(torch._functorch.config, name):
        setattr(torch._functorch.config, name, False)


def compile_checkpoints() -> None:
    """Compile layers within a checkpoint, as those of transformers are, although the first of those
    that share an input keeps the outputs of the others until they are called, within the layer.
    Otherwise torch.compile leaves such layers eager."""
    from torch._dynamo import config  # takes time to import

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if hasattr(config, name):
        setattr(config, name, True)
