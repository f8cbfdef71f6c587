"""Which modules of a model can be adapted: those that compute what their class says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.layers import ADAPTABLE

#: Packages whose linear layers hold quantised weights: their ``forward`` is their own, and linear.
_QUANTISED = ("bitsandbytes.", "torchao.", "transformers.integrations.", "compressed_tensors.")


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module for all that a target may name, in the model's order.

    Linear layers, Conv1D and embeddings of the language model. Left out are subclasses that
    compute something else (Llama 4's router, position embeddings with an offset) and what
    nn.MultiheadAttention reads past ``forward``.
    """
    multihead = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    outside = outside_language_model(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ADAPTABLE)
        and not name.startswith(multihead or ("\0",))
        and not is_within(name, outside)
        and behaves_as_its_class(module)
    }


def behaves_as_its_class(module: nn.Module) -> bool:
    """Whether ``module(x)`` is W x + b, or for an embedding the rows of W that x names."""
    forward = type(module).forward
    if isinstance(module, nn.Embedding):
        # Scaled embeddings (Gemma) multiply by ``embed_scale``, which the adapter does too.
        return forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, Conv1D):
        return forward is Conv1D.forward
    if forward is nn.Linear.forward or type(module).__module__.startswith(_QUANTISED):
        return True
    return _is_linear_map(module)


@torch.no_grad()
def _is_linear_map(module: Any) -> bool:
    """Try a subclass of nn.Linear that has a ``forward`` of its own."""
    weight: Tensor = module.weight
    if weight.is_meta or weight.ndim != 2 or not weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype)
    x = x.view(1, 2, -1)
    try:
        y = module(x)
    except Exception:
        return False
    want = F.linear(x, weight, module.bias)
    return (
        isinstance(y, Tensor)
        and y.shape == want.shape
        and torch.allclose(y.to(want.dtype), want, rtol=1e-2, atol=1e-3)
    )


def outside_language_model(model: nn.Module) -> tuple[str, ...]:
    """The outermost modules of a multimodal model that text does not pass through: vision and
    audio towers, projectors. Empty for a model of text alone."""
    if not isinstance(model, PreTrainedModel):
        return ()
    text = model.config.get_text_config()
    if text is model.config:  # text alone
        return ()
    parts = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and type(module.config) is type(text)
    ]
    if not parts:
        return ()
    output = model.get_output_embeddings()
    kept = [*parts, *(name for name, module in model.named_modules() if module is output)]
    if "Classification" in type(model).__name__:  # the head
        kept += [n for n, child in model.named_children() if isinstance(child, nn.Linear)]
    above = {name[:at] for name in kept for at, letter in enumerate(name) if letter == "."}
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or name in above or is_within(name, (*kept, *found)):
            continue
        if name.count(".") and name.rpartition(".")[0] not in above:
            continue
        if any(True for _ in module.parameters()):
            found.append(name)
    return tuple(found)


def is_text_part(model: nn.Module) -> bool:
    """Whether ``model`` is the language model of a multimodal base, loaded alone."""
    config = getattr(model, "config", None)
    return getattr(config, "base_config_key", "") == "text_config"


def is_within(name: str, modules: tuple[str, ...] | list[str]) -> bool:
    """Whether ``name`` is one of ``modules`` or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
