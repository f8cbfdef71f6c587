"""Replay the joint passes as CUDA graphs, one per shape, and the updates of all members as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.notes import Say
from lorakit.training.engine.capture import capturing, generator_of, restore_generator
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.engine.update_graph import UpdateGraph, can_capture
from lorakit.training.joint.batches import JointBatch

#: Runs the passes of a joint batch and returns the members' losses.
Compute = Callable[[JointBatch], Tensor]
#: The members and the shapes of a joint batch.
_Key = tuple[object, ...]


@dataclass(frozen=True)
class _CapturedPass:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    losses: Tensor

    def replay(self, joint: JointBatch) -> Tensor:
        for name, tensor in joint.tensors().items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.losses.clone()


class JointGraphs:
    """Captures what runs on ``device`` when a shape first occurs; batches with fewer rows than
    earlier ones (an epoch's last) run eagerly. ``say`` gets the reason if
    something cannot be captured, which then runs eagerly. With ``passes`` false, only the updates
    are captured."""

    def __init__(self, device: torch.device, passes: bool, say: Say) -> None:
        self._device, self._say = device, say
        self._passes_enabled, self._update_enabled = passes, True
        self.forget()

    def forget(self) -> None:
        """Drop what has been captured, since the memory that it refers to has been replaced."""
        # All graphs share their memory, since only one runs at a time.
        self._pool = torch.cuda.graph_pool_handle()
        self._passes: dict[_Key, _CapturedPass] = {}
        self._rows: dict[int, int] = {}
        self._updates: dict[tuple[int, ...], UpdateGraph] = {}

    def run(self, members: Sequence[int], joint: JointBatch, compute: Compute) -> Tensor:
        """The losses of ``compute``; ``joint`` is in host memory."""
        if not self._passes_enabled:
            return compute(joint.to(self._device))
        shapes = [(name, tuple(tensor.shape)) for name, tensor in joint.tensors().items()]
        key = (*members, *joint.counts, *shapes)
        if not self._have_all_rows(members, joint):
            return compute(joint.to(self._device))
        if key not in self._passes and not self._add(key, joint, compute):
            return compute(joint.to(self._device))
        pinned = {name: tensor.pin_memory() for name, tensor in joint.tensors().items()}
        return self._passes[key].replay(joint.with_tensors(pinned))

    def _add(self, key: _Key, joint: JointBatch, compute: Compute) -> bool:
        """Capture the pass of ``joint``; false if that is not possible."""
        state = generator_of(self._device).get_state()
        try:
            self._passes[key] = self._capture(joint.to(self._device), compute)
        except RuntimeError as error:
            self._passes_enabled = False
            self._passes.clear()
            restore_generator(self._device, state)
            self._say(f"joint passes are not replayed as CUDA graphs: {_reason(error)}")
            return False
        return True

    def _have_all_rows(self, members: Sequence[int], joint: JointBatch) -> bool:
        rows = {m: shape[0] for m, shape in zip(members, joint.layout.shapes, strict=True)}
        self._rows |= {m: max(count, self._rows.get(m, 0)) for m, count in rows.items()}
        return all(count == self._rows[member] for member, count in rows.items())

    def _capture(self, joint: JointBatch, compute: Compute) -> _CapturedPass:
        inputs = {name: tensor.clone() for name, tensor in joint.tensors().items()}
        static, graph = joint.with_tensors(inputs), torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):
            losses = compute(static)
        return _CapturedPass(graph, inputs, losses)

    def update(self, engines: Mapping[int, EagerEngine]) -> dict[int, list[Tensor]]:
        """Change the weights of those members whose update can be replayed; return the scalars
        of each."""
        if not self._update_enabled:
            return {}
        fitting = {member: each for member, each in engines.items() if can_capture(each)}
        if not fitting:
            return {}
        if (key := tuple(fitting)) not in self._updates:
            state = generator_of(self._device).get_state()
            try:
                self._updates[key] = UpdateGraph(list(fitting.values()), self._pool)
            except RuntimeError as error:
                self._update_enabled = False
                restore_generator(self._device, state)
                self._say(f"updates are not replayed as a CUDA graph: {_reason(error)}")
                return {}
        return dict(zip(fitting, self._updates[key].replay(), strict=True))


def _reason(error: RuntimeError) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
