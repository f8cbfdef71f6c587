"""Packed rows through ``varlen_attn``."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from lorakit.data.collate import collate_causal, collate_documents, collate_packed
from lorakit.models.causal import VARLEN, use_varlen
from lorakit.training.engine.eager import CausalObjective
from tests.families import tiny
from tests.models.packed_rows import rows

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 64, "num_attention_heads": 4}
FAMILIES = {"llama": {"head_dim": 16}, "qwen3": {"head_dim": 16}, "phi": {},
            "mistral": {"head_dim": 16, "sliding_window": 4}}  # fmt: skip


def on_gpu(family: str, **changes: object) -> PreTrainedModel:
    sizes = SIZES | FAMILIES[family] | changes
    return tiny(family, **sizes).to("cuda", torch.bfloat16)  # type: ignore[arg-type]


def loss_and_gradients(model: PreTrainedModel, layout: str) -> tuple[float, list[torch.Tensor]]:
    every = rows()
    bins = [every[:3], every[3:6], every[6:]]
    batch = {
        "padded": lambda: collate_causal(every, 0, 8),
        "block": lambda: collate_packed(bins, 0, 8),
        "varlen": lambda: collate_documents(bins, 0, 8),
    }[layout]()
    model.zero_grad()
    loss = CausalObjective(model, longest_row=20)(batch.to(torch.device("cuda")))
    loss.backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return loss.item(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_gives_the_losses_of_single_rows(family: str) -> None:
    alone, wanted = loss_and_gradients(on_gpu(family), "padded")
    block, _ = loss_and_gradients(on_gpu(family), "block")
    model = on_gpu(family)
    assert use_varlen(model)
    assert model.config._attn_implementation == VARLEN
    found, gradients = loss_and_gradients(model, "varlen")
    assert found == pytest.approx(alone, rel=2e-3)
    assert block == pytest.approx(alone, rel=2e-3)
    norm = sum(float(g.norm() ** 2) for g in wanted) ** 0.5
    apart = sum(float((a - b).norm() ** 2) for a, b in zip(gradients, wanted, strict=True)) ** 0.5
    assert apart < 0.03 * norm
    again, _ = loss_and_gradients(model, "padded")
    assert again == pytest.approx(alone, rel=1e-6), "unpacked rows attend as before"


def test_varlen_under_gradient_checkpointing() -> None:
    model = on_gpu("llama")
    assert use_varlen(model)
    model.train()
    plain = loss_and_gradients(model, "varlen")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    spared = loss_and_gradients(model, "varlen")
    assert spared[0] == plain[0]
    for ours, theirs in zip(spared[1], plain[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_what_varlen_cannot_do_goes_by_block_mask() -> None:
    assert not use_varlen(on_gpu("llama", attention_dropout=0.1))
    assert not use_varlen(on_gpu("llama").float())
    assert not use_varlen(on_gpu("llama", attn_implementation="eager"))
