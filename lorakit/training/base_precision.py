"""Keep the frozen weights of the base in fewer bits while training: ``model.base_precision``.

Only the linear layers of the transformer's layers are quantized, after the adapter has been
injected. Each function changes the model in place.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.anatomy import transformer_layers
from lorakit.base_weight import RowView
from lorakit.errors import UserError
from lorakit.methods.lora_layer import LoraLayer
from lorakit.models import fp8, nf4
from lorakit.recipe.sections import ModelSection


def check_base_precision(section: ModelSection) -> None:
    """Raise UserError if the device, the model's dtype or the installed packages do not support
    ``base_precision``."""
    if section.base_precision == "fp8":
        fp8.check_support(section.dtype)
    elif section.base_precision == "nf4":
        nf4.check_support()


def quantize_fp8(model: nn.Module) -> str:
    """Quantize on the model's device, with stacked layers as one; return what was done. Raises
    UserError if there is nothing to quantize."""
    count = 0
    for layer in transformer_layers(model):
        shared = {m.shared_input for m in layer.modules() if isinstance(m, LoraLayer)}
        for group in shared:
            if group is not None and group.quantize():
                count += len(group.layers)
        for name, module in list(layer.named_modules()):
            if fp8.can_quantize(module):
                assert isinstance(module, nn.Linear)
                _replace(layer, name, fp8.quantize_linear(module))
                count += 1
    if not count:
        raise _nothing("fp8", model)
    return f"the weights of {count} linear layers are kept in fp8"


def quantize_nf4(model: nn.Module, device: torch.device) -> str:
    """Quantize on ``device``, matrix by matrix, so that it never holds the whole model in its
    dtype; return what was done. Raises UserError if there is nothing to quantize."""
    count = others = 0
    for layer in transformer_layers(model):
        for name, module in list(layer.named_modules()):
            if nf4.can_quantize(module):
                assert isinstance(module, nn.Linear)
                _replace(layer, name, nf4.quantize_linear(module, device))
                count += 1
            elif isinstance(module, nn.Linear | Conv1D):
                others += 1
    if not count:
        raise _nothing("nf4", model)
    rest = f"; {others} others, small or trained, are not quantized" if others else ""
    return f"the weights of {count} linear layers are kept in nf4{rest}"


def _replace(layer: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule ``name`` of ``layer``, also under the views of its rows."""
    before = layer.get_submodule(name)
    layer.set_submodule(name, module)
    for view in layer.modules():
        if isinstance(view, RowView) and view.module is before:
            view.replace_module(module)


def _nothing(precision: str, model: nn.Module) -> UserError:
    return UserError(
        f'model.base_precision = "{precision}": {type(model).__name__} has no frozen linear layer '
        f"that {precision} supports; allowed here: null"
    )
