"""What the class that lorakit trains reads of a base's checkpoint, and how adapters change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lorakit.adapters.weighted import LowRank, Update

Ties = Sequence[Sequence[str]]


class Group(Protocol):
    """Stored tensors (``sources``) that transformers converts together into those of the class
    (``targets``, name -> shape): experts into one matrix, a fused projection into its parts."""

    @property
    def sources(self) -> Sequence[str]: ...

    @property
    def targets(self) -> Mapping[str, tuple[int, ...]]: ...

    def converted(
        self, values: Mapping[str, Tensor], finish: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Stored values -> those to store, with ``finish(name, W)`` in place of each of the
        class's tensors."""
        ...


@dataclass(frozen=True)
class Held:
    """What the loaded class holds of the stored tensors, and what the adapters do to it.

    ``plain``: stored name -> the class's, where a tensor is read as it is; ``groups``: the others
    that it reads. ``shapes`` and ``ties`` (names of one parameter) are the class's; ``updates``,
    ``base`` and ``whole`` are by its names. ``architecture`` is its own name where the merged model
    is of another class than the base; then ``stored_name`` is also asked for names that are
    stored. ``can_part``: whether the class can hold tied names as separate weights.
    ``text_config``: the key of the text model's part of ``config.json``. ``settings``:
    other keys of ``config.json`` that change.
    """

    plain: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    updates: Mapping[str, Sequence[Update | LowRank]]
    groups: Sequence[Group] = ()
    ties: Ties = ()
    base: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    class_name: str = ""
    architecture: str | None = None
    stored_name: Callable[[str], str] = str
    can_part: Callable[[Sequence[str]], bool] = lambda _names: True
    text_config: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Tensor]:
        return {**self.base, **self.whole}
