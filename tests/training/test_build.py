from __future__ import annotations

import pytest
import torch

from lorakit.errors import UserError
from lorakit.recipe.sections import TrainSection
from lorakit.training.build import build_optimizer, check_optimizer


def test_adamw_is_the_formula() -> None:
    section = TrainSection(
        output_dir="x", learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
    )
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.5}], section)
    w, m, v = parameter.detach().clone().double(), torch.zeros(1, 2), torch.zeros(1, 2)
    for step in (1, 2, 3):
        gradient = torch.tensor([[0.3, -0.1]]) * step
        parameter.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        hat = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        w = w * (1 - 0.1 * 0.5) - 0.1 * hat
    torch.testing.assert_close(parameter.detach(), w.float())


def test_an_optimizer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer("adamw")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"adamw_8bit.*bitsandbytes.*allowed without it: adamw, sgd"
    ):
        check_optimizer("adamw_8bit")
