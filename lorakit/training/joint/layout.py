"""Where the rows and tokens of each member are in a joint tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class NotSplit(Exception):
    """A module was called with a tensor that cannot be split into the members' rows, so their
    outputs cannot be computed in one call."""


@dataclass(frozen=True)
class Layout:
    """Each member has ``rows`` x ``length`` tokens of a joint batch, one member after another, of
    which the first (rows, tokens) of its entry in ``shapes`` are its own, and the rest is padding.
    With ``is_flat``, all tokens are one sequence.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: int
    length: int
    is_flat: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether nothing is padded."""
        return all(shape == (self.rows, self.length) for shape in self.shapes)

    def of(self, member: int) -> Layout:
        """The layout of one member's part of a joint tensor."""
        return Layout((self.shapes[member],), self.rows, self.length)

    def split_dim(self, value: Tensor) -> int | None:
        """The dimension of a joint tensor along which the members follow each other; None if there
        is none, as in a table that all rows share."""
        rows = len(self.shapes) * self.rows
        tokens = rows * self.length
        if value.ndim and value.shape[0] in (rows, tokens):
            return 0
        return 1 if self.is_flat and value.ndim > 1 and value.shape[1] == tokens else None

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
            full = [padded(grid, (self.rows, self.length, like.shape[1])) for grid in grids]
            return torch.cat(full).view(like.shape)
        return torch.cat([padded(part, (self.rows, *like.shape[1:])) for part in parts])

    def _token_dims(self, value: Tensor) -> list[int]:
        if value.ndim not in (3, 4):
            return []
        *_, tokens, last = value.shape
        dims = [value.ndim - 2] if tokens == self.length else []
        # A head may have as many values as the batch has tokens.
        pairwise = value.ndim == 4 and last == self.length and tokens in (1, last)
        return [*dims, 3] if pairwise else dims


def padded(value: Tensor, shape: Sequence[int], fill: int = 0) -> Tensor:
    """``value`` with ``fill`` up to ``shape``."""
    missing = [
        amount
        for dim in reversed(range(value.ndim))
        for amount in (0, shape[dim] - value.shape[dim])
    ]
    return F.pad(value, missing, value=fill) if any(missing) else value
