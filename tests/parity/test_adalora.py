"""AdaLoRA in lorakit and PEFT: the same scores, masks and parameters over 50 steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.adalora import METHOD, AdaLoraConfig
from tests.families import tiny, token_ids

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
STEPS, TINIT, TFINAL, DELTA = 50, 5, 15, 5


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(**keys: Any) -> AdaLoraConfig:
    keys = {"target_modules": ["all-linear"], "init_r": 4, "target_r": 2, **keys}
    return AdaLoraConfig(
        tinit=TINIT,
        tfinal=TFINAL,
        deltaT=DELTA,
        orth_reg_weight=0.1,
        orth_reg_form="mean_norm",
        **keys,
    )


def _loss(model: nn.Module, step: int, **more: Any) -> torch.Tensor:
    ids = token_ids(4, 9, seed=step)
    out = model(input_ids=ids, **more)
    logits = out.logits.reshape(-1, out.logits.shape[-1])
    own: torch.Tensor = nn.functional.cross_entropy(
        logits, torch.arange(len(logits)) % logits.shape[-1]
    )
    return own


def _their_loss(model: Any, step: int) -> torch.Tensor:
    """Return PEFT's loss; PEFT adds the penalty to it."""
    ids = token_ids(4, 9, seed=step)
    labels = (
        torch.zeros(4, dtype=torch.long)
        if "Classification" in type(model.base_model.model).__name__
        else ids
    )
    out = model(input_ids=ids, labels=labels)
    penalty = out.loss - model.base_model.model(input_ids=ids, labels=labels).loss
    return _loss(model.base_model.model, step) + penalty


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_50_steps(family: str, tmp_path: Path) -> None:
    ours, config = tiny(family), _config()
    torch.manual_seed(0)
    inject(ours, config)
    save_adapter(tmp_path / "a", ours, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    theirs: Any = PeftModel.from_pretrained(tiny(family), str(tmp_path / "a"), is_trainable=True)
    peft_config = theirs.peft_config["default"]
    peft_config.total_step, peft_config.tinit, peft_config.tfinal = STEPS, TINIT, TFINAL
    peft_config.deltaT, peft_config.orth_reg_weight, peft_config.target_r = DELTA, 0.1, 2
    allocator = theirs.base_model.rankallocator

    layers = adapter_layers(ours)
    hooks: Any = METHOD.hooks(layers, config, STEPS)
    mine = trainable_state(ours)
    other = {
        n.removeprefix("base_model.model.").removesuffix(".default"): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(mine) == set(other)
    optimizers = [torch.optim.AdamW(p.values(), lr=5e-3, weight_decay=0.01) for p in (mine, other)]
    allocations = 0
    for step in range(1, STEPS + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(ours, step).backward()
        _their_loss(theirs, step).backward()
        (penalty,) = hooks.before_step(lambda g: g)
        assert penalty > 0
        for name, value in mine.items():
            torch.testing.assert_close(value.grad, other[name].grad, atol=2e-6, rtol=1e-3)
        for optimizer in optimizers:
            optimizer.step()
        hooks.after_step(step)
        theirs.base_model.update_and_allocate(step)
        if hooks.budget.allocates(step):
            allocations += 1
            pattern = peft_config.rank_pattern
            masks = {n: layer.kept.tolist() for n, layer in layers.items()}
            assert {
                k.removesuffix(".lora_E.default").removeprefix("model."): v
                for k, v in pattern.items()
            } == {n.removeprefix("model."): mask for n, mask in masks.items()}
            assert sum(map(sum, masks.values())) == hooks.budget.at(step)
        if step < hooks.budget.final_step:
            averages = hooks.state()
            for name, value in allocator.exp_avg_ipt.items():
                plain = name.removeprefix("model.").removesuffix(".default")
                plain = next(
                    k
                    for k in (plain, f"model.{plain}", f"transformer.{plain}")
                    if f"{k}.average" in averages
                )
                torch.testing.assert_close(
                    averages[f"{plain}.average"], value, atol=1e-7, rtol=1e-3
                )
    assert allocations == 6
    assert hooks.ranks() == {n: int(layer.kept.sum()) for n, layer in layers.items()}
    assert len(set(hooks.ranks().values())) > 1, "the ranks differ"
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=0)

    # And on disk: PEFT loads what was pruned, with equal logits.
    save_adapter(tmp_path / "b", ours, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    again = PeftModel.from_pretrained(tiny(family), str(tmp_path / "b"))
    back = tiny(family)
    load_adapter(back, tmp_path / "b")
    with torch.no_grad():
        want = ours.eval()(token_ids()).logits
        torch.testing.assert_close(again(token_ids()).logits, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(back(token_ids()).logits, want, atol=1e-6, rtol=0)
    theirs.save_pretrained(tmp_path / "c")
    back = tiny(family)
    load_adapter(back, tmp_path / "c")
    with torch.no_grad():
        torch.testing.assert_close(back(token_ids()).logits, want, atol=2e-4, rtol=0)
