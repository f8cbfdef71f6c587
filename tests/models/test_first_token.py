"""What follows the attention of the last layer is computed for the first token only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.injection import inject
from lorakit.methods.lora import LoraConfig
from lorakit.models.first_token import skip_unread_tokens
from tests.families import tiny

BATCH = 8 * torch.get_num_threads()
IDS = (torch.arange(7 * BATCH) % 59 + 5).view(BATCH, 7)
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0


def classifier(family: str = "bert", targets: Sequence[str] = ("q", "v")) -> PreTrainedModel:
    model = tiny(family)
    torch.manual_seed(0)
    inject(model, LoraConfig(r=2, init="orthogonal", target_modules=list(targets)), ["classifier"])
    return model.train()


def logits_and_gradients(model: PreTrainedModel) -> list[Tensor]:
    torch.manual_seed(1)
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    F.cross_entropy(logits, torch.arange(BATCH) % 3).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return [logits.detach(), *(p.grad for p in trained.values() if p.grad is not None)]


def rows_seen(model: PreTrainedModel, rows: int = BATCH) -> list[int]:
    """The lengths of the sequences in the feed-forward parts of the layers."""
    seen: list[int] = []
    layers: Any = model.base_model.encoder.layer
    for layer in layers:
        layer.intermediate.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    model(input_ids=IDS[:rows], attention_mask=MASK[:rows])
    return seen


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta_v2"])
def test_logits_and_gradients_stay_the_same_with_dropout(family: str) -> None:
    expected = logits_and_gradients(classifier(family))
    model = classifier(family)
    assert model.config.hidden_dropout_prob > 0
    assert skip_unread_tokens(model)
    for ours, theirs in zip(logits_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert rows_seen(model) == [7, 1]


def test_evaluations_compute_every_token() -> None:
    model = classifier()
    assert skip_unread_tokens(model)
    assert rows_seen(model.eval()) == [7, 7]


def test_a_small_batch_keeps_its_rounding() -> None:
    model = classifier()
    assert skip_unread_tokens(model)
    assert rows_seen(model, rows=1) == [7, 7]


def test_mode_and_random_state_are_kept() -> None:
    model, state = classifier().eval(), torch.get_rng_state()
    assert skip_unread_tokens(model)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trained_part_is_computed_for_every_token() -> None:
    model = classifier(targets=["q", "o"])
    assert not skip_unread_tokens(model)
    assert rows_seen(model) == [7, 7]


def test_a_classifier_that_reads_every_token_is_left_alone() -> None:
    model = classifier()

    class MeanPooler(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(1)

    model.base_model.pooler = MeanPooler()
    assert not skip_unread_tokens(model)
    assert rows_seen(model) == [7, 7]


@pytest.mark.parametrize("family", ["distilbert", "albert", "modernbert"])
def test_other_architectures_are_left_alone(family: str) -> None:
    assert not skip_unread_tokens(tiny(family))
