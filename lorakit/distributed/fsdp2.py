"""FSDP2 for training with frozen weights: these are sharded, and what is trained stays whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lorakit.anatomy import is_routed_expert, layer_drops, transformer_layers
from lorakit.data.collate import Batch
from lorakit.distributed.processes import gather
from lorakit.distributed.strategy import DataParallel
from lorakit.errors import UserError, counted, memory_size
from lorakit.layers import CompositeLayer
from lorakit.methods.dora_layer import DoraLayer
from lorakit.models.load import device_memory_bytes
from lorakit.recipe.sections import Recipe

#: Weights that are gathered at once, unless those of a single layer are larger.
_GATHER_BYTES = 2**29


class Fsdp2(DataParallel):
    """Several processes, each with a part of the layers' frozen weights and its share of every
    batch (``fsdp2``).

    The frozen matrices of a layer are gathered for its passes only. Vectors, embeddings, the output
    layer and all trained parameters are whole in every process, and ``DataParallel`` adds up their
    gradients.
    A pass needs all processes, so each of them runs as many.

    A GPU keeps frozen weights that take at most 1/32 of its memory whole, unless layers are
    recomputed, which is to save memory.
    """

    is_sharded = True

    def check(self, recipe: Recipe) -> None:
        if recipe.adapter.method == "full":
            raise UserError(
                "adapter.method = 'full': FSDP shards the frozen weights, and there are none; "
                "allowed: another method, or another launcher configuration (configs/ddp.yaml)"
            )
        if (precision := recipe.model.base_precision) is not None:
            raise UserError(
                f"model.base_precision = '{precision}': not supported with FSDP; allowed: null, or "
                "another launcher configuration (configs/ddp.yaml)"
            )

    def place(self, model: Any, checkpoints: bool = False) -> str:
        """Move the model to the device layer by layer, so that it never holds more than one whole
        layer besides the shards.

        Raises UserError for a model without a stack of layers or whose layers are dropped at
        random, and for DoRA on parts of a fused projection, which cannot be saved without W.
        """
        layers: Sequence[Any] = transformer_layers(model)
        _check_model(model, layers)
        whole = _whole_parameters(layers)
        sizes = [_frozen_bytes(layer, whole) for layer in layers]
        room = 0 if checkpoints else min(gather(room_bytes(self.device)))
        self.is_sharded = not 0 < sum(sizes) <= room
        if not self.is_sharded:  # gathers of small layers take longer than their passes
            super().place(model)
            return _note(sum(sizes), len(layers))
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        kept = kept_layers(sizes, room)
        first_kept = len(layers) - kept
        groups = _groups(sizes, first_kept, 0 if checkpoints else _GATHER_BYTES)
        for group in groups:
            members = [layers[index] for index in group]
            _shard(members, mesh, whole, reshards=group[0] < first_kept)
        # The gather of a group begins before the forward pass of the one before it.
        for group, following in pairwise(groups):
            layers[group[0]].set_modules_to_forward_prefetch([layers[following[0]]])
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(self.device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        # The module that calls the layers has nothing to shard, and makes each fetch the next.
        _shard([_caller(model, layers[0])], mesh, set(model.parameters()), reshards=False)
        if any(is_routed_expert(n) for n, p in model.named_parameters() if p.requires_grad):
            # A layer whose experts got no token in one process needs a backward pass there, too.
            model.enable_input_require_grads()
        return _note(sum(sizes), len(layers), kept)

    def passes(self, micro_batches: Sequence[Batch]) -> list[tuple[Batch, bool]]:
        """A process with fewer batches than another repeats one, whose loss does not count."""
        if not self.is_sharded:
            return super().passes(micro_batches)
        counts = gather(len(micro_batches))
        fillers = micro_batches
        if not min(counts):
            found = [each for each in gather(_on_host(micro_batches)) if each is not None]
            fillers = micro_batches or [found[0].to(self.device)]
        missing = max(counts) - len(micro_batches)
        return [(b, True) for b in micro_batches] + [(fillers[0], False)] * missing


def kept_layers(sizes: Sequence[int], room_bytes: int) -> int:
    """How many of the last layers, of these ``sizes`` in bytes, keep their gathered weights from
    the forward to the backward pass: those that fit into ``room_bytes``, and the very last, whose
    weights would be gathered again at once. All, if the launcher's settings say so."""
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "true":
        return len(sizes)
    sums = accumulate(reversed(sizes))
    return max(1, sum(total <= room_bytes for total in sums))


def _groups(sizes: Sequence[int], first_kept: int, limit_bytes: int) -> list[list[int]]:
    """The indices of the layers whose weights are gathered at once: each layer by itself, but of
    those that stay gathered as many as fit into ``limit_bytes``, since each gather takes the host
    as long as several kernels of a small layer."""
    groups: list[list[int]] = []
    for index in range(len(sizes)):
        fits = index > first_kept and sum(sizes[i] for i in (*groups[-1], index)) <= limit_bytes
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _whole_parameters(layers: Sequence[nn.Module]) -> set[nn.Parameter]:
    """The parameters that are not sharded. No other is referred to: as long as anything holds one,
    its whole weight stays on the device."""
    uses = Counter(parameter for layer in layers for parameter in layer.parameters())
    # FSDP does not support parameters of several layers. Vectors are too small to be worth a
    # gather's work for each.
    return {p for p, count in uses.items() if p.requires_grad or count > 1 or p.dim() < 2}


def _shard(modules: list[nn.Module], mesh: Any, whole: set[nn.Parameter], reshards: bool) -> None:
    """Shard the parameters of ``modules``, as one group, but for the ``whole`` ones."""
    sharded = modules if len(modules) > 1 else modules[0]
    fully_shard(sharded, mesh=mesh, reshard_after_forward=reshards, ignored_params=whole)


def _note(size_bytes: int, layers: int, kept: int | None = None) -> str:
    """``kept`` as in ``kept_layers``; None if nothing is sharded."""
    weights = f"FSDP: {memory_size(size_bytes)} of frozen weights, in {counted(layers, 'layer')}, "
    if kept is None:
        return weights + (
            "are not sharded, since they take at most 1/32 of the GPU's memory; with "
            "train.gradient_checkpointing they are"
        )
    last = "the last layer" if kept == 1 else f"the last {kept} layers"
    which = "all layers" if kept == layers else last
    return weights + (
        f"are sharded over {dist.get_world_size()} processes; those of {which} stay gathered from "
        "the forward to the backward pass"
    )


def _frozen_bytes(layer: nn.Module, whole: set[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in layer.parameters() if p not in whole)


def room_bytes(device: torch.device) -> int:
    """The part of a GPU's memory that gathered weights may take between the two passes."""
    return device_memory_bytes(device) // 32 if device.type == "cuda" else 0


def _on_host(batches: Sequence[Batch]) -> Batch | None:
    """The first batch, in host memory."""
    if not batches:
        return None
    first = batches[0]
    return replace(first, **{name: tensor.cpu() for name, tensor in first.tensors().items()})


def _caller(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The module that owns the list of layers that ``layer`` is in."""
    name = next(name for name, module in model.named_modules() if module is layer)
    return model.get_submodule(".".join(name.split(".")[:-2]))


def _check_model(model: Any, layers: Sequence[nn.Module]) -> None:
    name = type(model).__name__
    if not layers:
        raise UserError(
            f"accelerate launch: {name} has no stack of layers that FSDP could shard; allowed: "
            "configs/ddp.yaml"
        )
    if dropping := layer_drops(model.config):
        raise UserError(
            f"accelerate launch: {name} drops layers at random ({dropping[0]}), different ones in "
            "each process, which FSDP does not support; allowed: configs/ddp.yaml"
        )
    fused = (m for m in model.modules() if isinstance(m, CompositeLayer))
    if any(isinstance(part, DoraLayer) for module in fused for part in module.parts.values()):
        raise UserError(
            "adapter.method = 'dora': not supported on parts of a fused projection with FSDP; "
            "allowed: other target_modules, or another launcher configuration (configs/ddp.yaml)"
        )
