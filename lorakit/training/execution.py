"""Choose how the steps of a run are executed: eagerly, as CUDA graphs, or with compiled layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor, nn

from lorakit.anatomy import is_routed_expert
from lorakit.data.encode import EncodedSplit
from lorakit.methods.lora_layer import LoraLayer, SharedInput
from lorakit.models.fp8 import can_quantize, quantize_linear
from lorakit.training.setup import Prepared

Mode = Literal["eager", "cuda_graphs", "compiled_layers"]

#: Below this many operations per pass, kernels take less time than their launches.
_LAUNCH_BOUND_FLOPS = 1e13
#: Operations of a run that repay the time for compiling: about 100 s on an H100.
_COMPILE_PAYS_FLOPS = 4e16


@dataclass(frozen=True)
class Execution:
    """``note`` tells the user what was chosen and why; None for the default."""

    mode: Mode
    note: str | None = None


def choose_execution(prepared: Prepared, device: torch.device, total_steps: int) -> Execution:
    """Follow ``train.compile``: ``true`` compiles the layers, ``false`` runs eagerly, and ``auto``
    chooses what is faster for this model, batch size and run on a GPU."""
    section = prepared.recipe.train
    if section.compile is True:
        return Execution("compiled_layers", "each layer is compiled (train.compile: true)")
    if section.compile is False or device.type != "cuda" or _routes_tokens(prepared.model):
        return Execution("eager")
    flops = 4.0 * _matrix_parameters(prepared.model) * _tokens_per_batch(prepared)
    if flops < _LAUNCH_BOUND_FLOPS:
        return _cuda_graphs(prepared)
    run_flops = flops * section.gradient_accumulation_steps * total_steps
    half = prepared.model.dtype in (torch.bfloat16, torch.float16)
    if run_flops < _COMPILE_PAYS_FLOPS or not half:
        return Execution("eager")
    return Execution(
        "compiled_layers",
        "each layer is compiled, which takes up to a minute and pays for a run of this size "
        "(train.compile: false disables this)",
    )


def _cuda_graphs(prepared: Prepared) -> Execution:
    recipe = prepared.recipe
    float16 = recipe.model.dtype == "float16"  # its loss scaler needs the host
    if float16 or recipe.task.packing or recipe.train.gradient_checkpointing:
        return Execution("eager")
    return Execution(
        "cuda_graphs",
        "passes are replayed as CUDA graphs, since the model is small "
        "(train.compile: false disables this)",
    )


def transformer_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of the largest stack in ``model``, by parameters; empty if there is none."""
    stacks = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(map(_size, stack)), default=[])


def compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself: all layers share the compiled code, so that this takes seconds
    where compiling the whole model takes minutes. A second length compiles it once more, for any
    length."""
    _recompute_more()
    for layer in transformer_layers(model):
        layer.compile()


def stack_layers(model: Any) -> None:
    """Let LoRA layers that read the same tensor share its products. A forward pass on a few tokens
    finds them."""
    plain = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and m.is_plain()}
    if len(plain) < 2:
        return
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
    groups: dict[tuple[str, int], list[LoraLayer]] = {}
    for name, tensor in inputs.items():  # in the order of the calls
        groups.setdefault((name.rpartition(".")[0], id(tensor)), []).append(plain[name])
    for layers in groups.values():
        if len(layers) > 1 and len({layer.bias is None for layer in layers}) == 1:
            SharedInput(layers)


def quantize_base(model: nn.Module) -> int:
    """Keep the frozen linear layers of the transformer's layers in fp8; return their number."""
    count = 0
    for layer in transformer_layers(model):
        shared = {m.shared_input for m in layer.modules() if isinstance(m, LoraLayer)}
        for group in shared:
            if group is not None and can_quantize(group.base):
                group.quantize()
                count += len(group.layers)
        for name, module in list(layer.named_modules()):
            if can_quantize(module):
                assert isinstance(module, nn.Linear)
                layer.set_submodule(name, quantize_linear(module))
                count += 1
    return count


def _recompute_more() -> None:
    """Recompute element-wise results, such as SwiGLU's, in the backward pass, although a matrix
    product reads them: a quarter less memory for 2% more time."""
    name = "ban_recompute_materialized_backward"
    if hasattr(torch._functorch.config, name):
        setattr(torch._functorch.config, name, False)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matrix_parameters(model: Any) -> int:
    embeddings = model.get_input_embeddings()
    return _size(model) - _size(embeddings)


def _routes_tokens(model: nn.Module) -> bool:
    """Whether the model has experts, whose shapes depend on the tokens."""
    return any(is_routed_expert(name) for name, _ in model.named_parameters())


def _tokens_per_batch(prepared: Prepared) -> float:
    """The expected number of tokens of a micro-batch."""
    section, task = prepared.recipe.train, prepared.recipe.task
    rows = section.per_device_batch_size
    if rows is None or task.packing:
        return float(section.max_tokens_per_batch or (rows or 1) * task.max_length)
    train = prepared.train
    mean = float(train.lengths.mean()) if isinstance(train, EncodedSplit) else task.max_length
    return rows * mean
