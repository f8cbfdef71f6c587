"""The shared model that computes the passes of all members."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorakit.anatomy import is_routed_expert, is_within, outermost
from lorakit.injection import trainable_state
from lorakit.layers import BaseWrapper, adapted_modules
from lorakit.models.first_token import after_attention, skip_unread_tokens
from lorakit.models.heads import reads_first_token
from lorakit.models.master_weights import plain_name
from lorakit.training.joint.bank import Stack, stacks_of
from lorakit.training.joint.layers import (
    Current,
    JointLayer,
    JointLinear,
    OwnModules,
    is_plain_linear,
    shares_base,
)
from lorakit.training.setup import Prepared


class Trunk:
    """A view of the base, in which adapted and fully trained modules are those of the members."""

    def __init__(
        self, model: Any, members: Mapping[int, Prepared], batches: Mapping[int, int]
    ) -> None:
        """Change ``model``, a view without an adapter. ``members`` are known by a number; in
        ``order``, those with the same ``batches`` are neighbors, and among them those with the same
        method and targets.

        ``separate`` tells whether a pass can only be of one member: adapted experts get the tokens
        of all rows in one tensor.
        """
        self.current = Current()
        self.order = sorted(members, key=lambda n: (batches[n], _kind(members[n])))
        members = {number: members[number] for number in self.order}
        self._modules: list[OwnModules | JointLayer | JointLinear] = []
        # The state of 8-bit AdamW depends on the order of a parameter's elements in memory.
        self._padded = {n for n, m in members.items() if m.recipe.train.optimizer != "adamw_8bit"}
        views = {number: member.model for number, member in members.items()}
        paths = {path for member in members.values() for path in _own_paths(member)}
        own = sorted(outermost(paths))
        adapted = {name: None for view in views.values() for name in adapted_modules(view)}
        self.separate = any(is_routed_expert(name) for name in adapted)
        unread = {id(module) for part in after_attention(model) for module in part.modules()}
        first = next(iter(members.values()))
        if reads_first_token(first.task.problem(first.recipe.task)) and not any(
            id(model.get_submodule(path)) in unread for path in (*own, *adapted)
        ):
            skip_unread_tokens(model)
        # The head of a causal model is called by the members' objectives.
        self._head = None if first.task.kind == "encoder" else model.get_output_embeddings()
        for path in own:
            modules = {number: view.get_submodule(path) for number, view in views.items()}
            plain = first.task.kind == "encoder" and all(map(is_plain_linear, modules.values()))
            joint = JointLinear if plain else OwnModules
            self._place(model, path, joint(modules, self.current))
        for path in adapted:
            if not is_within(path, tuple(own)):
                self._place(model, path, self._joint_module(model, path, views))

    def stack(self, groups: Sequence[Collection[int]]) -> list[Stack]:
        """Stack the parameters of the members anew, factors within the ``groups`` that take part
        in the same passes."""
        found: list[Stack] = []
        for module in self._modules:
            if isinstance(module, JointLayer):
                own = [{m: module.own[m] for m in module.own if m in group} for group in groups]
                module.stacks = [s for layers in own for s in stacks_of(layers, self._padded)]
                found += module.stacks
            elif isinstance(module, JointLinear):
                found.append(module.stack())
        return found

    @property
    def layers(self) -> list[JointLayer]:
        """The adapted modules."""
        return [module for module in self._modules if isinstance(module, JointLayer)]

    @contextmanager
    def evaluated(self, members: Collection[int]) -> Iterator[None]:
        """The members' own modules are in evaluation mode during the block. The factors that are
        stacked have no mode."""
        modules = [
            module.own[member]
            for module in self._modules
            for member in members
            if not isinstance(module, JointLinear)
            if isinstance(module, OwnModules) or member not in module.stacked
        ]
        found = [module for module in modules if module is not None]
        before = [module.training for module in found]
        for module in found:
            module.eval()
        try:
            yield
        finally:
            for module, was_training in zip(found, before, strict=True):
                module.train(was_training)

    def drop(self, member: int) -> None:
        """Forget a member that takes part in no further pass."""
        self.order.remove(member)
        for module in self._modules:
            del module.own[member]

    def _place(
        self, model: nn.Module, path: str, module: OwnModules | JointLayer | JointLinear
    ) -> None:
        model.set_submodule(path, module)
        self._modules.append(module)

    def _joint_module(
        self, model: nn.Module, path: str, views: Mapping[int, nn.Module]
    ) -> OwnModules | JointLayer:
        modules = {number: view.get_submodule(path) for number, view in views.items()}
        layers = {number: m for number, m in modules.items() if isinstance(m, BaseWrapper)}
        shared = model.get_submodule(path)
        if shared is not self._head and all(shares_base(layer) for layer in layers.values()):
            own: dict[int, nn.Module | None] = {number: layers.get(number) for number in modules}
            return JointLayer(shared, own, self.current)
        return OwnModules(modules, self.current)


def _kind(member: Prepared) -> tuple[str, list[str], list[int]]:
    modules = member.report.adapted_modules
    return member.method.name, [each.name for each in modules], [each.r for each in modules]


def _own_paths(member: Prepared) -> Iterator[str]:
    """The modules of the base that the member trains itself, or parameters of which it trains."""
    yield from member.report.modules_to_save
    layers = tuple(adapted_modules(member.model))
    for name in map(plain_name, trainable_state(member.model)):
        owner = name.rpartition(".")[0]
        if owner.endswith(".base_layer"):
            yield owner.removesuffix(".base_layer")
        elif not is_within(owner, (*layers, *member.report.modules_to_save)):
            yield owner
