"""Packed rows have the same losses and gradients as separate rows."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from lorakit.data.collate import collate_causal, collate_packed
from lorakit.errors import UserError
from lorakit.models.causal import check_packable
from lorakit.training.engine.eager import CausalObjective
from tests.families import CAUSAL, tiny
from tests.models.packed_rows import rows

#: Families without position ids, or whose mask ignores that the positions restart.
REFUSED = {"bloom", "opt"}
PACKABLE = [family for family in CAUSAL if family not in REFUSED]


def loss_and_gradients(model: PreTrainedModel, packed: bool) -> tuple[float, list[torch.Tensor]]:
    every = rows()
    bins = [every[:3], every[3:6], every[6:]]
    batch = collate_packed(bins, 0, 8) if packed else collate_causal(every, 0)
    model.zero_grad()
    loss = CausalObjective(model)(batch)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_losses_and_gradients_equal_those_of_single_rows(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        attention = "eager"  # the only one it has
    model = tiny(family, attn_implementation=attention)
    check_packable(model)
    alone, wanted = loss_and_gradients(model, packed=False)
    packed, found = loss_and_gradients(model, packed=True)
    assert packed == pytest.approx(alone, rel=1e-6, abs=1e-4)
    assert len(found) == len(wanted) > 5
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_sliding_window_applies_within_rows(family: str) -> None:
    model = tiny(family, sliding_window=4)
    alone, _ = loss_and_gradients(model, packed=False)
    packed, _ = loss_and_gradients(model, packed=True)
    wide, _ = loss_and_gradients(tiny(family, sliding_window=64), packed=True)
    assert packed == pytest.approx(alone, rel=1e-6, abs=1e-4)
    assert abs(packed - wide) > 1e-4, "the window has an effect"


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_model_that_mixes_documents_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"task\.packing = true: this model.*allowed: false"):
        check_packable(tiny(family))


def test_a_recurrent_state_is_detected() -> None:
    """A recurrent model carries the first row's state into the second."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(UserError, match="does not isolate packed documents"):
        check_packable(model)
