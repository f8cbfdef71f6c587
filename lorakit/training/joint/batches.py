"""One batch of the batches of several members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.data.buckets import count_bucket, length_bucket
from lorakit.data.collate import CausalBatch, EncoderBatch
from lorakit.data.words import IGNORED_LABEL
from lorakit.kernels.linear_cross_entropy import IGNORED
from lorakit.training.joint.layout import Layout, padded

#: Buckets of joint batches are so many times coarser than those of a single run's: the pass of many
#: members is captured anew for each shape, which takes as long as 5 to 40 replays, and the longest
#: row, or the most trained tokens, of many batches vary less than those of one.
_COARSER_BUCKETS = 2


@dataclass(frozen=True)
class JointBatch:
    """``batch`` is what the shared model gets. ``losses`` are the members' targets: ``labels``
    (members, rows, ...), or ``indices``, ``targets`` and, if any weigh other than 1, ``weights``
    (members, n), of which each member has the first ``counts``; positions are those within the
    member's part. ``factors`` (members,) are those of the losses. ``classes`` are the members'
    numbers of classes if their rows have several."""

    batch: Any
    losses: dict[str, Tensor]
    factors: Tensor
    counts: tuple[int, ...]
    layout: Layout
    classes: tuple[int, ...] | None = None

    def states(self, joint: Tensor, place: int) -> Tensor:
        """A member's part of what the model computed."""
        if "labels" in self.losses:
            return self.layout.chunks(joint)[place][: self.counts[place]]
        return self.layout.chunks(joint, int(self.layout.is_flat))[place]

    def own(self, place: int) -> Any:
        """A member's batch, as its objective needs it for the losses."""
        count = self.counts[place]
        if "labels" in self.losses:
            labels = self.losses["labels"][place, :count]
            if self.classes is not None:
                labels = labels[:, : self.classes[place]]
            return EncoderBatch(self.batch.input_ids, labels)
        own = {name: values[place, :count] for name, values in self.losses.items()}
        return CausalBatch(
            self.batch.input_ids, own["indices"], own["targets"], weights=own.get("weights")
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {**self.batch.tensors(), **self._unshared()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> JointBatch:
        """The same batch with other tensors of these shapes."""
        own: dict[str, Any] = {name: tensors[name] for name in self.batch.tensors()}
        losses = {name: tensors[f"losses.{name}"] for name in self.losses}
        batch = replace(self.batch, **own)
        return replace(self, batch=batch, losses=losses, factors=tensors["factors"])

    def to(self, device: torch.device) -> JointBatch:
        """Copy to ``device`` without blocking."""
        if device.type == "cpu":
            return self
        moved = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in self.tensors().items()
        }
        return self.with_tensors(moved)

    def _unshared(self) -> dict[str, Tensor]:
        named = {f"losses.{name}": tensor for name, tensor in self.losses.items()}
        return {**named, "factors": self.factors}


@dataclass(frozen=True)
class Joiner:
    """Joins batches, which are all of one kind. ``longest_row`` bounds the documents of a packed
    sequence. With ``longest``, batches are padded to few shapes, of at most so many tokens."""

    pad_id: int
    longest_row: int
    longest: int | None = None

    def join(self, batches: Sequence[Any], factors: Sequence[float]) -> JointBatch:
        shapes = tuple((batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in batches)
        rows, length = (max(sizes) for sizes in zip(*shapes, strict=True))
        if self.longest is not None:
            length = max(length, min(length_bucket(length, _COARSER_BUCKETS), self.longest))
        is_flat = getattr(batches[0], "cu_seq_lens", None) is not None
        layout = Layout(shapes, rows, length, is_flat)
        scales = torch.tensor(factors, dtype=torch.float32)
        if isinstance(batches[0], EncoderBatch):
            counts = tuple(len(batch.labels) for batch in batches)
            joint, losses = self._encoder(batches, layout), {"labels": _labels(batches, layout)}
            several = batches[0].labels.ndim == 2 and batches[0].words is None
            classes = tuple(batch.labels.shape[1] for batch in batches) if several else None
            return JointBatch(joint, losses, scales, counts, layout, classes)
        return self._with_targets(batches, scales, layout)

    def _with_targets(
        self, batches: Sequence[CausalBatch], scales: Tensor, layout: Layout
    ) -> JointBatch:
        counts = tuple(len(batch.targets) for batch in batches)
        most = max(counts)
        if self.longest is not None:
            most = count_bucket(most, _COARSER_BUCKETS)
            counts = (most,) * len(batches)
        indices = _rows([_moved(batch, layout.length) for batch in batches], most, 0)
        targets = _rows([batch.targets for batch in batches], most, IGNORED)
        joint = self._causal(batches, layout)
        losses = {"indices": indices, "targets": targets}
        if any(batch.weights is not None for batch in batches):
            losses["weights"] = _weights(batches, most)
        return JointBatch(joint, losses, scales, counts, layout)

    def _encoder(self, batches: Sequence[EncoderBatch], layout: Layout) -> EncoderBatch:
        masks, types = None, None
        is_masked = any(batch.attention_mask is not None for batch in batches)
        if is_masked or not layout.is_exact or self.longest is not None:
            masks = [_mask(batch, layout) for batch in batches]
        if any(batch.token_type_ids is not None for batch in batches):
            types = [
                torch.zeros_like(b.input_ids) if b.token_type_ids is None else b.token_type_ids
                for b in batches
            ]
        ids = _stacked([batch.input_ids for batch in batches], self.pad_id, layout)
        return EncoderBatch(
            input_ids=ids,
            labels=ids.new_zeros(0),
            attention_mask=None if masks is None else torch.cat(masks),
            token_type_ids=None if types is None else _stacked(types, 0, layout),
        )

    def _causal(self, batches: Sequence[CausalBatch], layout: Layout) -> CausalBatch:
        ids = _stacked([batch.input_ids for batch in batches], self.pad_id, layout)
        none, first = ids.new_zeros(0), batches[0]
        if first.position_ids is None:
            return CausalBatch(ids, none, none)
        positions = torch.cat([_positions(batch, layout, self.longest_row) for batch in batches])
        if first.cu_seq_lens is None:
            return CausalBatch(ids, none, none, position_ids=positions)
        boundaries = _boundaries(batches, layout, self.longest_row)
        return CausalBatch(
            ids.view(1, -1), none, none, position_ids=positions.view(1, -1), cu_seq_lens=boundaries
        )


def _mask(batch: EncoderBatch, layout: Layout) -> Tensor:
    """A row that only fills the batch attends to its first token, since one that attends to
    nothing has no finite output."""
    mask = batch.attention_mask
    mask = torch.ones_like(batch.input_ids) if mask is None else mask
    mask = padded(mask, (layout.rows, layout.length))
    if len(batch.labels) < layout.rows:
        mask = mask.clone()
        mask[len(batch.labels) :, 0] = 1
    return mask


def _labels(batches: Sequence[EncoderBatch], layout: Layout) -> Tensor:
    """Labels of rows (members, rows), of classes (members, rows, classes), or of tokens (members,
    rows, length)."""
    labels = [batch.labels for batch in batches]
    if batches[0].words is not None:
        shape = (layout.rows, layout.length)
        return torch.stack([padded(own, shape, IGNORED_LABEL) for own in labels])
    most = [max(sizes) for sizes in zip(*(own.shape[1:] for own in labels), strict=True)]
    return torch.stack([padded(own, (layout.rows, *most)) for own in labels])


def _positions(batch: CausalBatch, layout: Layout, longest_row: int) -> Tensor:
    """Positions (rows, length) in which what fills the batch consists of further documents."""
    own = batch.position_ids
    assert own is not None
    count, length = own.shape
    filler = torch.arange(layout.length - length) % longest_row
    own = torch.cat([own, filler.expand(count, -1)], dim=1)
    row = torch.arange(layout.length) % longest_row
    return torch.cat([own, row.expand(layout.rows - count, -1)])


def _boundaries(batches: Sequence[CausalBatch], layout: Layout, longest_row: int) -> Tensor:
    """The boundaries of all documents, of which none is longer than ``longest_row``."""
    found = []
    for place, batch in enumerate(batches):
        assert batch.cu_seq_lens is not None
        filler = torch.arange(batch.input_ids.shape[1], layout.length, longest_row)[1:]
        own = torch.cat([batch.cu_seq_lens, filler.to(torch.int32)])
        found.append(own + place * layout.length)
    end = torch.tensor([len(batches) * layout.length], dtype=torch.int32)
    distinct: Tensor = torch.cat([*found, end]).unique_consecutive()
    return distinct


def _moved(batch: CausalBatch, length: int) -> Tensor:
    """The positions of the losses in rows of ``length`` tokens."""
    own = batch.input_ids.shape[1]
    rows = batch.loss_indices.div(own, rounding_mode="floor")
    return batch.loss_indices + rows * (length - own)


def _weights(batches: Sequence[CausalBatch], count: int) -> Tensor:
    ones = (torch.ones(len(batch.targets)) for batch in batches)
    found = [one if b.weights is None else b.weights for b, one in zip(batches, ones, strict=True)]
    return _rows(found, count, 0)


def _rows(values: Sequence[Tensor], count: int, fill: int) -> Tensor:
    return torch.stack([padded(value, (count,), fill) for value in values])


def _stacked(values: Sequence[Tensor], fill: int, layout: Layout) -> Tensor:
    return torch.cat([padded(value, (layout.rows, layout.length), fill) for value in values])
