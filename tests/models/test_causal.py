from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from lorakit.injection import inject
from lorakit.methods.lora import LoraConfig
from lorakit.models.causal import split_model, token_losses
from tests.families import CAUSAL, tiny, token_ids

POSITIONS = torch.tensor([0, 3, 5, 8, 12])


def targets() -> Tensor:
    return token_ids(1, len(POSITIONS), seed=1)[0]


def whole_loss(model: PreTrainedModel, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
    rows = model(input_ids=ids).logits.flatten(0, 1)[POSITIONS].float()
    return F.cross_entropy(rows, targets(), reduction="sum", label_smoothing=label_smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_equals_that_of_all_logits(family: str, smoothing: float) -> None:
    model, ids = tiny(family), token_ids()
    parts = split_model(model)
    assert parts.head is not None, "every family's output can be taken apart"
    model.requires_grad_(False)
    found = token_losses(model, parts, ids, POSITIONS, targets(), smoothing)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole_loss(model, ids, smoothing), rtol=1e-5, atol=1e-5)


def test_softcap_and_scale_follow_the_model() -> None:
    model = tiny("gemma2", final_logit_softcapping=2.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    assert split_model(model).transform.softcap == 2.0
    model.requires_grad_(False)
    found = token_losses(model, split_model(model), token_ids(), POSITIONS, targets())
    torch.testing.assert_close(found, whole_loss(model, token_ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained_head", [False, True])
def test_gradients_equal_those_of_all_logits(trained_head: bool) -> None:
    model, ids = tiny("llama", tie_word_embeddings=False), token_ids()
    changes = {"modules_to_save": ["lm_head"]} if trained_head else {}
    inject(model, LoraConfig(r=2, target_modules=["q", "v"], **changes))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05)
    whole_loss(model, ids).backward()
    wanted = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    assert set(wanted) == set(trained)
    model.zero_grad()
    token_losses(model, split_model(model), ids, POSITIONS, targets()).backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_only_trained_positions_reach_the_output_layer() -> None:
    model = tiny("llama")
    model.requires_grad_(True)  # the path that calls the head as a module
    parts = split_model(model)
    seen: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    token_losses(model, parts, token_ids(2, 40), POSITIONS, targets())
    assert seen
    assert sum(seen) == len(POSITIONS)


def test_a_model_with_other_logits_is_not_split() -> None:
    model = tiny("llama")
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(64) / 10
        return out

    model.forward = shifted  # type: ignore[method-assign]
    parts = split_model(model)
    assert parts.head is None
    model.requires_grad_(False)
    found = token_losses(model, parts, token_ids(), POSITIONS, targets())
    torch.testing.assert_close(found, whole_loss(model, token_ids()))


def test_splitting_keeps_mode_and_random_state() -> None:
    model = tiny("llama", attention_dropout=0.5).train()
    state = torch.get_rng_state()
    assert split_model(model).head is not None
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_padding_on_the_right_changes_nothing() -> None:
    model = tiny("llama")
    model.requires_grad_(False)
    parts, ids = split_model(model), token_ids(1, 6)
    positions, wanted = torch.tensor([1, 4]), torch.tensor([7, 9])
    padded = nn.functional.pad(ids, (0, 10), value=3)
    torch.testing.assert_close(
        token_losses(model, parts, padded, positions, wanted),
        token_losses(model, parts, ids, positions, wanted),
    )


def test_residuals_in_float32_are_cast_for_the_output_layer() -> None:
    """Those of Mamba, by default, in a model of half precision."""
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = MambaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    parts = split_model(model)
    assert parts.head is not None
    found = token_losses(model, parts, token_ids(), POSITIONS, targets())
    torch.testing.assert_close(found, whole_loss(model, token_ids()), rtol=1e-2, atol=1e-2)


def test_padding_without_a_mask_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("gpt2", pad_token_id=0)
    parts = split_model(model)
    ids = F.pad(token_ids(), (0, 3))
    with caplog.at_level("WARNING", logger="transformers"):
        token_losses(model, parts, ids, POSITIONS, targets())
    assert "attention_mask" not in caplog.text
