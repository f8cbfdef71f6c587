"""The contract of methods in a run: an interrupted and resumed run equals an uninterrupted one,
and the merged checkpoint equals base and adapter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import lorakit
from lorakit import registry
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.base import Method, RunHooks
from lorakit.recipe.sections import AdapterSection, TrainSection
from tests.contract.cases import Model, cases, config, injected, loss
from tests.families import tiny, token_ids

STEPS, STOP = 8, 3
TRAIN = TrainSection(output_dir="none", max_steps=STEPS, weight_decay=0.01)


class Run:
    """Takes the steps of a run like the training loop."""

    def __init__(self, model: Model, method: Method, section: AdapterSection) -> None:
        self.model = model.train()
        self.parameters: dict[str, Any] = trainable_state(model)
        layers = adapter_layers(model)
        groups = method.param_groups(self.parameters, layers, section, TRAIN)
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(map(id, self.parameters.values())), "each once"
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.hooks: RunHooks = method.hooks(layers, section, STEPS)

    def take(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            loss(self.model).backward()
            values = self.hooks.before_step(lambda value: value)
            assert len(values) == len(self.hooks.device_values)
            assert all(value.numel() == 1 for value in values)
            self.optimizer.step()
            self.hooks.after_step(step)


def snapshot(run: Run) -> Any:
    values = {name: p.detach() for name, p in run.parameters.items()}
    return copy.deepcopy((values, run.optimizer.state_dict(), run.hooks.state()))


def restore(run: Run, saved: Any) -> None:
    values, optimizer, state = copy.deepcopy(saved)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(values[name])
    run.optimizer.load_state_dict(optimizer)
    run.hooks.load_state(state)


@cases(unchecked=True)
def test_a_resume_equals_no_stop(name: str, kind: str, dtype: torch.dtype) -> None:
    method, section = registry.methods()[name], config(name, kind)
    straight = Run(injected(name, kind, dtype), method, section)
    straight.take(1, STOP)
    saved = snapshot(straight)
    straight.take(STOP + 1, STEPS)

    resumed = Run(injected(name, kind, dtype, seed=2), method, section)
    restore(resumed, saved)
    assert resumed.hooks.state().keys() == saved[2].keys()
    assert all(torch.equal(value, saved[2][key]) for key, value in resumed.hooks.state().items())
    resumed.take(STOP + 1, STEPS)
    for key, value in straight.parameters.items():
        assert torch.equal(resumed.parameters[key], value), key
    assert resumed.hooks.ranks() == straight.hooks.ranks()


@cases()
def test_a_state_that_lacks_something_is_a_key_error(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    run = Run(injected(name, kind, dtype), registry.methods()[name], config(name, kind))
    state = run.hooks.state()
    for key in state:
        with pytest.raises(KeyError):
            run.hooks.load_state({k: v for k, v in state.items() if k != key})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", registry.methods())
def test_the_merged_checkpoint_equals_base_and_adapter(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Both are in float32, since a half-precision base is merged exactly and rounded only on request."""
    method = registry.methods()[name]
    targets = {"target_modules": ["q", "v", "o"]} if method.kinds else {}
    section = method.Config(method=name, **targets)
    base = tiny("bert").to(dtype)
    base.save_pretrained(tmp_path / "base")
    inject(base, section)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_state(base).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(
        tmp_path / "a",
        base,
        section,
        base_model_name_or_path=str(tmp_path / "base"),
        task_type="SEQ_CLS",
    )
    lorakit.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", dtype="float32")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    unmerged = lorakit.load(tmp_path / "base", tmp_path / "a", dtype="float32")
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-5, rtol=1e-5)
    change = (logits(unmerged) - logits(tiny("bert").to(dtype).float())).abs().max()
    assert change > 1e-3, "the adapter does something"
