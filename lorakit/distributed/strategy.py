"""Where a training runs: its device, its precision, and how gradients and counts are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lorakit.data.collate import Batch
from lorakit.data.plan import Share
from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.processes import gather, largest
from lorakit.recipe.sections import Recipe

#: Gradients are reduced in parts of at most this many elements: 64 MiB in float32.
_BUCKET_ELEMENTS = 2**24


class Strategy:
    """One process on one device (``single``).

    ``wrap`` may replace a module's parameters, so it must run before anything refers to them:
    parameter groups, hooks, the optimizer. After ``reduce_gradients``, gradients are sums over all
    processes. For a single process they are the gradients themselves.
    """

    share = Share()
    #: Whether the frozen weights are sharded; before the model is placed, whether they may be.
    is_sharded: bool = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """float16's loss scaler; None for other precisions."""
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    @property
    def skipped_update(self) -> bool:
        """Whether the scaler skipped the last optimizer step because a gradient was not finite."""
        skipped: bool = self.accelerator.optimizer_step_was_skipped
        return skipped

    def check(self, recipe: Recipe) -> None:
        """Raise UserError for a recipe that the strategy does not support."""

    def place(self, model: nn.Module, checkpoints: bool = False) -> str | None:
        """Move ``model``, with its adapters, to the device; return what the user should know of it.
        ``checkpoints``: whether its layers are recomputed in the backward pass."""
        model.to(self.device)
        return None

    def wrap(self, module: nn.Module) -> Any:
        """Return ``module`` on its device, in the run's precision and ready for ``backward``."""
        # As for an evaluation: gradients are reduced here, not by DistributedDataParallel.
        return self.accelerator.prepare_model(
            module, device_placement=not self.is_sharded, evaluation_mode=True
        )

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        """Return ``optimizer`` with float16's loss scaling, if the run uses it."""
        return self.accelerator.prepare_optimizer(optimizer)

    def passes(self, micro_batches: Sequence[Batch]) -> list[tuple[Batch, bool]]:
        """The batches of this process's passes, and whether their loss counts."""
        return [(batch, True) for batch in micro_batches]

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def scale(self, gradient: Tensor) -> Tensor:
        """Scale ``gradient`` like those of ``backward``, which ``clip_grad_norm`` undoes."""
        scaled: Tensor = gradient if self.scaler is None else self.scaler.scale(gradient)
        return scaled

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Undo the loss scaling, clip to ``max_norm`` and return the norm before clipping."""
        self.accelerator.unscale_gradients()
        # Sums depend on the order in memory, which must not depend on the other members of a joint
        # training. That of a transposed matrix, as all B are there, needs no copy.
        gradients = [_dense(p.grad) for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def reduce_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Add up the gradients of all processes, and return the sum of their ``loss``."""
        return loss


def _dense(gradient: Tensor) -> Tensor:
    """The elements without gaps between them."""
    if gradient.is_contiguous() or gradient.ndim != 2:
        return gradient.contiguous()
    return gradient.mT.contiguous()


class DataParallel(Strategy):
    """Several processes, each with the whole model and its share of every batch (``ddp``).

    The gradients of the trained parameters, which are few, are added up once per step, after the
    last micro-batch. So all processes take the same update, whatever their shares are, and the
    passes need no hooks.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.share = Share(*rank_and_world_size())

    def wrap(self, module: nn.Module) -> Any:
        """All processes start with the main process's trained parameters."""
        gather(None)  # one that has failed to prepare its model does not broadcast
        for parameter in module.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)
        return super().wrap(module)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        has_gradient = largest([int(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, has in zip(parameters, has_gradient, strict=True):
            if has and parameter.grad is None:  # this process had no row, or no token for an expert
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))
        loss = loss.clone()
        dist.all_reduce(loss)
        return loss


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of one dtype and limited size, which are copied to be reduced."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room or tensor.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = _BUCKET_ELEMENTS
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets
