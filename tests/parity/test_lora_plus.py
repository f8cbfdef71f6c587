"""LoRA+ in lorakit and with PEFT's optimizer: 50 steps from the same start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.lora_plus import METHOD, LoraPlusConfig
from lorakit.recipe.sections import TrainSection
from tests.families import tiny, token_ids

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _ours(name: str) -> str:
    """Translate PEFT's name of a parameter to lorakit's."""
    name = name.removeprefix("base_model.model.")
    for factor in "AB":
        name = name.replace(f"lora_{factor}.default.weight", f"lora_{factor}")
        name = name.replace(f"lora_embedding_{factor}.default", f"lora_{factor}")
    return name


def _step(model: Any, optimizer: Any, step: int) -> torch.Tensor:
    optimizer.zero_grad()
    logits = model(input_ids=token_ids(4, 9, seed=step)).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["all-linear", "embed_tokens"]), ("gpt2", ["c_attn"])],
    ids=str,
)
def test_50_steps(family: str, targets: list[str], tmp_path: Path) -> None:
    ours, config = tiny(family), LoraPlusConfig(r=4, target_modules=targets, loraplus_lr_ratio=8)
    torch.manual_seed(0)
    inject(ours, config)
    save_adapter(tmp_path, ours, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path), is_trainable=True)
    parameters: Any = trainable_state(ours)
    other = {_ours(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert set(parameters) == set(other)
    train = TrainSection(output_dir="x", learning_rate=5e-4, weight_decay=0.05)
    groups = METHOD.param_groups(parameters, adapter_layers(ours), config, train)
    mine = torch.optim.AdamW(groups)
    # A group without a weight decay of its own takes the optimizer's.
    peft_s = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8, loraplus_weight_decay=0.05
    )
    start = {name: value.detach().clone() for name, value in parameters.items()}
    for step in range(50):
        losses = _step(ours, mine, step), _step(theirs, peft_s, step)
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    moved = {}
    for name, value in parameters.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=0)
        moved[name] = (value - start[name]).abs().max().item()
    for name, size in moved.items():
        slow = "embed_tokens" in name
        assert size < 1e-4 if slow else size > (2e-2 if name.endswith("lora_B") else 5e-3), name
