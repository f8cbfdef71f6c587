"""The memory of a step by part, from the costs of its passes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from lorakit.layers import adapter_layers
from lorakit.planning.passes import PassCosts
from lorakit.planning.tracker import storage_bytes
from lorakit.training.record import peak_memory_bytes
from lorakit.training.setup import Prepared

#: What the library of a GPU's matrix products keeps for a thread and a stream, which PyTorch
#: allocates for it, and how many there are: a forward and a backward thread, and their captures.
_PRODUCTS_BYTES = 32 * 2**20
_PRODUCTS = {"eager": 2, "compiled_layers": 2, "cuda_graphs": 4}
#: Bytes of an optimizer's state for each trained value. 8-bit averages also have a scale in float32
#: for each 256 of them.
_STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "sgd": 0.0}


@dataclass(frozen=True)
class Memory:
    """Bytes. ``weights`` are those of the base, ``adapter`` the trained values, ``optimizer`` its
    state and the method's, ``activations`` what the backward pass needs of the forward pass,
    ``logits`` what the output layer and the loss need, and ``workspace`` what is computed and freed
    again. Each part is at its own largest, and ``peak`` is what is in use at the fullest moment."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def memory_of(
    prepared: Prepared, device: torch.device, costs: PassCosts, mode: str, steps: int
) -> Memory:
    """The memory of a run of ``steps`` steps whose passes, executed in ``mode``, cost ``costs``."""
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    gradients = storage_bytes(trained)
    layers = adapter_layers(prepared.model)
    hooks = prepared.method.hooks(layers, prepared.recipe.adapter, steps)
    state = _STATE_BYTES[prepared.recipe.train.optimizer] * sum(p.numel() for p in trained)
    optimizer = int(state) + storage_bytes(hooks.state().values())
    static = costs.weights + costs.trained + optimizer
    peak = static + max(costs.peak, gradients) + _library_bytes(device, mode)
    known = static + costs.gradients + costs.activations + costs.logits
    return Memory(
        weights=costs.weights,
        adapter=costs.trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=costs.activations,
        logits=costs.logits,
        workspace=max(0, peak - known),
        peak=peak,
    )


def _library_bytes(device: torch.device, mode: str) -> int:
    """What is needed besides tensors: on the CPU, what a process has loaded, as this one has."""
    if device.type == "cuda":
        return _PRODUCTS[mode] * _PRODUCTS_BYTES
    return peak_memory_bytes(device)
