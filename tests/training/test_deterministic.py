"""Deterministic kernels: which settings a run changes, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.errors import UserError
from lorakit.training.deterministic import cublas_workspace, deterministic_kernels
from lorakit.training.run import dry_run
from tests.training.runs import adapter_bytes, recipe_for

#: On the CPU, `put_` is one of the few operations that are never deterministic.
METHOD = """
import torch
from torch import nn
from lorakit.layers import AdapterLayer
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection


class Settings(AdapterSection):
    r: int


class Layer(AdapterLayer):
    def __init__(self, base_layer, config, name):
        super().__init__(base_layer)
        self.scale = self.new_parameter(1)
        nn.init.zeros_(self.scale)

    def delta_weight(self):
        places = torch.zeros(self.base_shape).put_(torch.tensor([0]), torch.ones(1))
        return self.scale * places


class Put(Method):
    summary = "trains one value"
    Config = Settings
    Layer = Layer
"""


def settings() -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "cudnn": torch.backends.cudnn.deterministic,
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "flash attention": os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
    }


SELECTED = {"algorithms": True, "warn only": False, "benchmark": False, "cudnn": True,
            "fill": False, "flash attention": "1"}  # fmt: skip


def test_the_settings_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    before = settings()
    with deterministic_kernels(True):
        assert settings() == SELECTED
    assert settings() == before


def test_settings_of_the_caller_are_kept() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(True):
            assert settings() == SELECTED
        assert settings()["warn only"]
        with deterministic_kernels(False):
            assert settings()["warn only"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_cpu_computes_the_same_with_and_without(tiny_llama: Path, tmp_path: Path) -> None:
    before = settings()
    written = []
    for chosen in (False, True):
        said: list[str] = []
        recipe = recipe_for(
            tmp_path, tiny_llama, train__max_steps=3, train__epochs=None,
            train__deterministic=chosen, train__output_dir=str(tmp_path / f"{chosen}"),
        )  # fmt: skip
        written.append(adapter_bytes(lorakit.train(recipe, say=said.append).output_dir))
        assert not any("deterministic" in line for line in said)
    assert written[0] == written[1]
    assert settings() == before


def test_an_operation_without_a_deterministic_kernel(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "put.py").write_text(METHOD)
    method = f"{tmp_path}/put.py:Put"
    recipe = recipe_for(tmp_path, tiny_llama, adapter__method=method, train__deterministic=True)
    before = settings()
    with pytest.raises(UserError, match=r"^train\.deterministic = true: .* needs put_, which"):
        lorakit.train(recipe)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"needs put_, .*; allowed here: false$"):
        dry_run(recipe, print)
    assert settings() == before


@pytest.mark.parametrize(
    ("configured", "in_use", "wanted"),
    [
        (None, False, ":4096:8"),
        (":4096:8", False, ":4096:8"),
        (":16:8", True, ":16:8"),
        (None, True, "CUDA was already used in this process; set .*=:4096:8"),
        (":4096:2:16:8", False, "is not deterministic; allowed: unset, :4096:8, :16:8"),
        ("", True, "'' is not deterministic"),
    ],
)
def test_the_workspace_of_cublas(configured: str | None, in_use: bool, wanted: str) -> None:
    if wanted.startswith(":"):
        assert cublas_workspace(configured, in_use) == wanted
        return
    with pytest.raises(UserError, match=rf"^train\.deterministic = true: .*{wanted}"):
        cublas_workspace(configured, in_use)
