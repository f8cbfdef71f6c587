"""Joint passes whose factors are cast once, as on a GPU: the results of those that cast them in
each layer, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lorakit.training.joint.bank import FactorStack, StagedStacks
from lorakit.training.joint.batches import JointBatch
from lorakit.training.joint.passes import JointPasses
from lorakit.training.session import RunResult
from tests.training.joint_runs import members, save_family, train_together, weights

ADALORA = {
    "method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1,
    "target_modules": ["q", "v"],
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    *({"adapter__r": r, "train__seed": 1 + r // 4} for r in (2, 3, 8)),
    {"adapter__r": 2, "train__max_steps": 3, "train__epochs": None},
    {"adapter": ADALORA},
]


class EagerGraphs:
    """What replays passes on a GPU, without graphs."""

    def run(
        self, members: Sequence[int], joint: JointBatch, compute: Callable[[JointBatch], Tensor]
    ) -> Tensor:
        return compute(joint)

    def update(self, engines: object) -> dict[int, list[Tensor]]:
        return {}

    def forget(self) -> None:
        """There are no graphs."""


class FailsOnce:
    """Runs out of memory in the middle of a pass."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: object) -> None:
        if module.training and type(module).__name__.endswith("Norm") and torch.is_grad_enabled():
            self.calls += 1
            if self.calls == 40:
                raise torch.OutOfMemoryError("no memory left")


def adapters(
    folder: Path, model: Path, task: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Those of members of a bfloat16 model, whose factors are staged if ``dtype`` is that too."""
    folder.mkdir()

    class Passes(JointPasses):
        def __init__(self, *args: Any) -> None:
            [*rest, _, say] = args
            super().__init__(*rest, EagerGraphs(), say)  # type: ignore[arg-type]

    class Staged(StagedStacks):
        def __init__(self, stacks: Iterable[FactorStack], dtype: torch.dtype) -> None:
            super().__init__(stacks, dtype)
            used.append(dtype)

    used: list[torch.dtype] = []
    common: dict[str, Any] = {"model__dtype": "bfloat16"}
    if task != "completion":
        common["model__new_head"] = True
    recipes = members(folder, model, task, CHANGES, **common)
    failing = FailsOnce()
    hook = register_module_forward_pre_hook(failing)
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.training.joint.run.JointPasses", Passes)
        patch.setattr("lorakit.training.joint.passes.base_dtype", lambda model: dtype)
        patch.setattr("lorakit.training.joint.passes.StagedStacks", Staged)
        try:
            results = train_together(recipes)
        finally:
            hook.remove()
    assert failing.calls > 40
    assert {*used} == {dtype} - {torch.float32}
    for result in results:
        assert isinstance(result, RunResult), result
    return [weights(Path(recipe.train.output_dir)) for recipe in recipes]


@pytest.mark.parametrize("family", ["llama", "bert", "albert"])
def test_equal_to_the_bit(
    family: str,
    tiny_llama: Path,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = {"llama": tiny_llama, "bert": tiny_bert}.get(family)
    model = model or save_family(family, tiny_bert, tmp_path / "model")
    task = "completion" if family == "llama" else "glue/sst2"
    staged, plain = (
        adapters(tmp_path / str(dtype), model, task, monkeypatch, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    for ours, theirs in zip(staged, plain, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
