"""``lorakit methods --check``, on built-in methods and on broken ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lorakit import registry
from lorakit.errors import UserError
from lorakit.method_check import check_method

HEAD = """
import torch
from torch import nn
from lorakit.layers import AdapterLayer
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection

class Layer(AdapterLayer):
    def __init__(self, base_layer, config, name):
        super().__init__(base_layer)
        self.scale = self.new_parameter(1)
        self.direction = self.new_parameter(*self.base_shape)
        nn.init.zeros_(self.scale)
        nn.init.normal_(self.direction)
    def delta_weight(self):
        return self.scale * self.direction
"""
TAIL = """
class Own(Method):
    Config = AdapterSection
    Layer = Layer
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", registry.methods())
def test_built_in_methods(name: str) -> None:
    state = torch.random.get_rng_state()
    results = check_method(name)
    # The check has no case for single parameters, which own tests cover.
    checked = registry.methods()[name].kinds - {"parameter"}
    assert {result.module for result in results} == (checked or {"base"})
    assert not [result for result in results if result.problem]
    assert len({result.check for result in results}) == 8
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_layer_of_one_function(folder: Path) -> None:
    (folder / "own.py").write_text(HEAD + TAIL)
    results = check_method("./own.py:Own")
    assert [r.module for r in results] == ["linear"] * 8 + ["conv1d"] * 8
    assert not [result for result in results if result.problem]


@pytest.mark.parametrize(
    ("change", "check", "problem"),
    [
        (("zeros_(self.scale)", "ones_(self.scale)"), "unchanged", "(expected 0)"),
        (
            ("self.scale * self.direction", "self.scale * self.direction.detach()"),
            "gradients",
            "layer.direction: trained, but receives no gradient",
        ),
        (
            (
                "    def delta_weight",
                "    def update(self, x, y):\n        return y + self.scale\n    def delta_weight",
            ),
            "merged",
            "differ by up to",
        ),
        (
            (
                "    def delta_weight",
                "    def update(self, x, y):\n"
                "        return y + x @ self.delta_weight().t()\n"
                "    def delta_weight",
            ),
            "bfloat16",
            "dtype",
        ),
        (
            (
                "self.direction = self.new_parameter(*self.base_shape)",
                "self.direction = torch.empty(self.base_shape)",
            ),
            "another device",
            "meta",
        ),
        (
            ("        nn.init.normal_(self.direction)\n", ""),
            "initialized",
            "layer.direction: not initialized",
        ),
        (
            (
                "    def delta_weight",
                "    def merged_weight(self, weight):\n"
                "        return self.dense_weight() + self.delta_weight()\n"
                "    def delta_weight",
            ),
            "weight that it is given",
            "own.py:16: ",
        ),
        (
            (
                "    def delta_weight",
                "    def merged_weight(self, weight):\n"
                "        merged = torch.empty_like(self.dense_weight())\n"
                "        return merged.copy_(weight + self.delta_weight())\n"
                "    def delta_weight",
            ),
            "weight that it is given",
            "layer: merged_weight needs more than its argument",
        ),
        (
            ("return self.scale *", "return 1 / 0 *"),
            "unchanged",
            "own.py:16: ZeroDivisionError: division",
        ),
        (
            ("return self.scale *", "raise ValueError('a\\nb') #"),
            "unchanged",
            "own.py:16: ValueError: a",
        ),
    ],
)
def test_problems_of_broken_methods(
    change: tuple[str, str], check: str, problem: str, folder: Path
) -> None:
    (folder / "own.py").write_text(HEAD.replace(*change) + TAIL)
    found = [r for r in check_method("./own.py:Own") if r.problem and check in r.check]
    assert found
    assert problem in str(found[0].problem)


def test_a_frozen_tensor_that_is_drawn_again(folder: Path) -> None:
    """The tensor is neither saved nor seeded, so a resumed run would continue with a different one."""
    broken = HEAD.replace("self.direction = self.new_parameter(*self.base_shape)", "").replace(
        "nn.init.normal_(self.direction)", "self.direction = torch.randn(self.base_shape)"
    )
    (folder / "own.py").write_text(broken + TAIL)
    problems = {r.check: r.problem for r in check_method("./own.py:Own") if r.problem}
    assert len(problems) == 4
    assert "neither saved nor seeded" in str(problems["a resumed run equals an uninterrupted one"])


def test_a_parameter_without_values_is_the_only_problem(folder: Path) -> None:
    (folder / "own.py").write_text(HEAD.replace("nn.init.normal_(self.direction)", "") + TAIL)
    assert [r.problem for r in check_method("./own.py:Own")] == [
        "layer.direction: not initialized"
    ] * 2
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("shared = ('direction',)", "shared: direction; allowed: parameters that link makes one"),
        (
            "def param_groups(self, parameters, layers, config, train):\n"
            "        return [{'params': list(parameters.values())[:1]}]",
            "param_groups: .*is missing; allowed: every trained parameter once",
        ),
        (
            "def param_groups(self, parameters, layers, config, train):\n"
            "        return 2 * [{'params': list(parameters.values())}]",
            "param_groups: .*is there twice; allowed",
        ),
        (
            "def param_groups(self, parameters, layers, config, train):\n"
            "        return [{'params': [*parameters.values(), nn.Parameter(torch.ones(2))]}]",
            "param_groups: a parameter that is not trained; allowed",
        ),
    ],
)
def test_what_is_trained_and_saved(folder: Path, definition: str, message: str) -> None:
    (folder / "own.py").write_text(f"{HEAD}{TAIL}\n    {definition}\n")
    try:
        problems = [str(result.problem) for result in check_method("./own.py:Own")]
    except UserError as error:
        problems = [str(error)]
    assert any(re.search(message, problem) for problem in problems), problems


def test_errors_before_the_checks(folder: Path) -> None:
    for change, message in (
        (
            ("super().__init__(base_layer)", "1 / 0"),
            r"^own\.py:10: ZeroDivisionError: division by zero$",
        ),
        (
            ("Config = AdapterSection", "Config = Keys"),
            "Config has no default for size; a check needs a default",
        ),
    ):
        code = f"{HEAD}\nclass Keys(AdapterSection):\n    size: int\n{TAIL}".replace(*change)
        (folder / "own.py").write_text(code)
        with pytest.raises(UserError, match=message):
            check_method("./own.py:Own")
