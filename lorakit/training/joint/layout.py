"""One batch of the batches of several members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.data.collate import Batch, CausalBatch, EncoderBatch


@dataclass(frozen=True)
class Layout:
    """Each member has ``rows`` x ``length`` tokens of a joint batch, one member after another, of
    which the first (rows, tokens) of its entry in ``shapes`` are its own, and the rest is padding.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: int
    length: int

    def of(self, member: int) -> Layout:
        """The layout of one member's part of a joint tensor."""
        return Layout((self.shapes[member],), self.rows, self.length)

    def split_dim(self, value: Tensor) -> int | None:
        """The dimension of a joint tensor along which the members follow each other; None if there
        is none."""
        rows = len(self.shapes) * self.rows
        tokens = rows * self.length
        if value.ndim and value.shape[0] in (rows, tokens):
            return 0
        return 1 if value.ndim > 1 and value.shape[0] == 1 and value.shape[1] == tokens else None

    def chunks(self, value: Tensor, dim: int = 0) -> list[Tensor]:
        """The members' parts of a joint tensor, padding included."""
        return list(value.chunk(len(self.shapes), dim))

    def cut(self, value: Tensor, member: int) -> Tensor | None:
        """A member's part of a joint tensor without padding, in the shape that it has in a run of
        its own; None for a tensor that is not understood.

        These are (rows, ...), (rows, length, size), (rows, heads, length, size),
        (rows, heads, length, length), and (rows * length, size).
        """
        members, (rows, length) = len(self.shapes), self.shapes[member]
        if value.ndim == 2 and len(value) == members * self.rows * self.length:
            grid = value.view(members, self.rows, self.length, -1)
            return grid[member, :rows, :length].reshape(rows * length, -1)
        if not value.ndim or len(value) != members * self.rows:
            return None
        part = self.chunks(value)[member][:rows]
        for dim in self._token_dims(value):
            part = part.narrow(dim, 0, length)
        return part

    def pad(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The reverse of ``cut``: a joint tensor of the shape of ``like``, with zeros for
        padding."""
        members = len(self.shapes)
        if like.ndim == 2 and len(like) == members * self.rows * self.length:
            grids = [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]
            full = [_padded(grid, (self.rows, self.length, like.shape[1])) for grid in grids]
            return torch.cat(full).view(like.shape)
        return torch.cat([_padded(part, (self.rows, *like.shape[1:])) for part in parts])

    def _token_dims(self, value: Tensor) -> list[int]:
        if value.ndim not in (3, 4):
            return []
        *_, tokens, last = value.shape
        dims = [value.ndim - 2] if tokens == self.length else []
        # A head may have as many values as the batch has tokens.
        pairwise = value.ndim == 4 and last == self.length and tokens in (1, last)
        return [*dims, 3] if pairwise else dims


def _padded(value: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [
        amount
        for dim in reversed(range(value.ndim))
        for amount in (0, shape[dim] - value.shape[dim])
    ]
    return F.pad(value, missing) if any(missing) else value


@dataclass(frozen=True)
class JointBatch:
    """``batch`` is what the shared model gets; ``own`` are the members' batches, in which the
    positions of the losses are those within the member's part."""

    batch: Batch
    own: list[Any]
    layout: Layout

    def states(self, joint: Tensor, member: int) -> Tensor:
        """A member's part of what the model computed."""
        own, layout = self.own[member], self.layout
        if isinstance(own, EncoderBatch):
            return layout.chunks(joint)[member][: len(own.labels)]
        return layout.chunks(joint, 0 if len(joint) > 1 else joint.ndim - 2)[member]


def join(batches: Sequence[Any], pad_id: int, longest_row: int) -> JointBatch:
    """Join the members' batches, which are all of one kind. ``longest_row`` bounds the documents of
    a packed sequence."""
    shapes = tuple((batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in batches)
    rows, length = (max(sizes) for sizes in zip(*shapes, strict=True))
    layout = Layout(shapes, rows, length)
    if isinstance(batches[0], EncoderBatch):
        return JointBatch(_join_encoder(batches, pad_id, layout), list(batches), layout)
    own = [_moved(batch, length) for batch in batches]
    return JointBatch(_join_causal(batches, pad_id, layout, longest_row), own, layout)


def _join_encoder(batches: Sequence[EncoderBatch], pad_id: int, layout: Layout) -> EncoderBatch:
    masks, types = None, None
    if any(b.attention_mask is not None for b in batches) or len({*layout.shapes}) > 1:
        masks = [_mask(batch, layout) for batch in batches]
    if any(batch.token_type_ids is not None for batch in batches):
        types = [
            torch.zeros_like(b.input_ids) if b.token_type_ids is None else b.token_type_ids
            for b in batches
        ]
    return EncoderBatch(
        input_ids=_stacked([batch.input_ids for batch in batches], pad_id, layout),
        labels=batches[0].labels,
        attention_mask=None if masks is None else torch.cat(masks),
        token_type_ids=None if types is None else _stacked(types, 0, layout),
    )


def _mask(batch: EncoderBatch, layout: Layout) -> Tensor:
    """A row that only fills the batch attends to its first token, since one that attends to
    nothing has no finite output."""
    mask = batch.attention_mask
    mask = torch.ones_like(batch.input_ids) if mask is None else mask
    mask = _padded(mask, (layout.rows, layout.length))
    if len(batch.labels) < layout.rows:
        mask = mask.clone()
        mask[len(batch.labels) :, 0] = 1
    return mask


def _join_causal(
    batches: Sequence[CausalBatch], pad_id: int, layout: Layout, longest_row: int
) -> CausalBatch:
    ids = _stacked([batch.input_ids for batch in batches], pad_id, layout)
    first = batches[0]
    joint = replace(first, input_ids=ids)
    if first.position_ids is None:
        return joint
    positions = torch.cat([_positions(batch, layout, longest_row) for batch in batches])
    if first.cu_seq_lens is None:
        return replace(joint, position_ids=positions)
    return replace(
        joint,
        input_ids=ids.view(1, -1),
        position_ids=positions.view(1, -1),
        cu_seq_lens=_boundaries(batches, layout, longest_row),
    )


def _positions(batch: CausalBatch, layout: Layout, longest_row: int) -> Tensor:
    """Positions (rows, length) in which what fills the batch consists of further documents."""
    own = batch.position_ids
    assert own is not None
    count, length = own.shape
    filler = torch.arange(layout.length - length, device=own.device) % longest_row
    own = torch.cat([own, filler.expand(count, -1)], dim=1)
    row = torch.arange(layout.length, device=own.device) % longest_row
    return torch.cat([own, row.expand(layout.rows - count, -1)])


def _boundaries(batches: Sequence[CausalBatch], layout: Layout, longest_row: int) -> Tensor:
    """The boundaries of all documents, of which none is longer than ``longest_row``."""
    found = []
    for member, batch in enumerate(batches):
        assert batch.cu_seq_lens is not None
        start, device = member * layout.length, batch.cu_seq_lens.device
        filler = torch.arange(
            batch.input_ids.shape[1] + longest_row, layout.length, longest_row,
            dtype=torch.int32, device=device,
        )  # fmt: skip
        found += [batch.cu_seq_lens[:-1] + start, batch.cu_seq_lens[-1:] + start, filler + start]
    total = len(batches) * layout.length
    end = torch.tensor([total], dtype=torch.int32).to(found[0].device, non_blocking=True)
    # A boundary that occurs twice is a document of no tokens.
    return torch.cat([*found, end])


def _moved(batch: CausalBatch, length: int) -> CausalBatch:
    """The batch with its losses at the positions that they have in rows of ``length`` tokens."""
    own = batch.input_ids.shape[1]
    if own == length:
        return batch
    rows = batch.loss_indices.div(own, rounding_mode="floor")
    return replace(batch, loss_indices=batch.loss_indices + rows * (length - own))


def _stacked(values: Sequence[Tensor], fill: int, layout: Layout) -> Tensor:
    full = []
    for value in values:
        rows, length = value.shape
        missing = (0, layout.length - length, 0, layout.rows - rows)
        full.append(F.pad(value, missing, value=fill) if any(missing) else value)
    return torch.cat(full)
