"""Random numbers of each member of a joint pass: those that it would draw in a run of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorakit.training.joint.layout import Layout, NotSplit
from lorakit.training.random_states import RandomStates, random_states, restore_random_states

#: Function -> its arguments by position.
_DROPOUT = tuple(inspect.signature(F.dropout).parameters)
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class MemberRandom:
    """The states of a member's generators, which are the process's while the member runs. On a GPU
    all members draw from one generator."""

    def __init__(self) -> None:
        self._states: RandomStates = random_states()

    @contextmanager
    def active(self, only_torch: bool = False) -> Iterator[None]:
        """The member runs during the block. With ``only_torch``, the generators of Python and NumPy
        are left alone, which takes a hundred times as long to switch."""
        if only_torch:
            with self.drawing():
                yield
            return
        tensors, plain = self._states
        restore_random_states([({"cpu": tensors["cpu"]}, plain)])
        try:
            yield
        finally:
            self._states = random_states()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The member draws numbers from torch's generator of the CPU during the block."""
        torch.set_rng_state(self._states[0]["cpu"])
        try:
            yield
        finally:
            self._states[0]["cpu"] = torch.get_rng_state()

    @property
    def drawn(self) -> Tensor:
        """The state of torch's generator of the CPU."""
        return self._states[0]["cpu"]

    @drawn.setter
    def drawn(self, state: Tensor) -> None:
        self._states[0]["cpu"] = state


class MemberDropout(TorchFunctionMode):
    """Applies dropout, in attention too, to each member's own rows and tokens of a joint tensor,
    with the random numbers of that member. Raises NotSplit for a tensor that ``Layout.cut`` does
    not understand, unless there is one member."""

    def __init__(self, randoms: Sequence[MemberRandom], layout: Layout) -> None:
        super().__init__()
        self._randoms, self._layout = list(randoms), layout

    @contextmanager
    def only(self, member: int) -> Iterator[None]:
        """The tensors in the block are one member's part of the joint ones."""
        before = self._randoms, self._layout
        self._randoms, self._layout = [self._randoms[member]], self._layout.of(member)
        try:
            yield
        finally:
            self._randoms, self._layout = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            given = dict(zip(_DROPOUT, args, strict=False)) | kwargs
            if given.get("training", True) and given.get("p", 0.5) > 0:
                given["inplace"] = False
                return self._by_member(func, given, ("input",))
        elif func is F.scaled_dot_product_attention:
            given = dict(zip(_ATTENTION, args, strict=False)) | kwargs
            if given.get("dropout_p", 0.0) > 0:
                return self._by_member(func, given, ("query", "key", "value", "attn_mask"))
        return func(*args, **kwargs)

    def _by_member(
        self, func: Callable[..., Any], given: dict[str, Any], names: Sequence[str]
    ) -> Any:
        if len(self._randoms) == 1 and self._layout.is_exact:
            with self._randoms[0].drawing():
                return func(**given)
        first, parts = given[names[0]], []
        for member, random in enumerate(self._randoms):
            own = {name: self._own(given.get(name), member) for name in names}
            if own[names[0]] is None:
                raise NotSplit
            with random.drawing():
                parts.append(func(**{**given, **own}))
        return self._layout.pad(parts, first)

    def _own(self, value: Tensor | None, member: int) -> Tensor | None:
        if value is None:
            return None
        if value.ndim == 4 and len(value) == 1:  # a mask that all rows share
            _, length = self._layout.shapes[member]
            return value[:, :, :length, :length]
        return self._layout.cut(value, member)
