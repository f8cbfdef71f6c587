"""Methods in a user's file: ``lorakit methods --check``, and the keys of such a method in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.cli.main import run

METHOD = """
import torch
from torch import nn
from lorakit.layers import AdapterLayer
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection, PositiveInt

class Config(AdapterSection):
    blocks: PositiveInt = 2

class Layer(AdapterLayer):
    def __init__(self, base_layer, config, name):
        super().__init__(base_layer)
        self.scale = self.new_parameter(1)
        self.direction = self.new_parameter(*self.base_shape)
        nn.init.zeros_(self.scale)
        nn.init.normal_(self.direction)

    def delta_weight(self):
        return self.scale * self.direction

class Scaled(Method):
    Config = Config
    Layer = Layer
"""
RECIPE = """\
model: {name_or_path: some/model}
adapter:
  method: ./own.py:Scaled
  target_modules: [q]
  blocks: 3
task: {name: completion, path: data.jsonl}
train: {output_dir: runs/x}
"""


@pytest.fixture(autouse=True)
def own(in_tmp: Path) -> Path:
    (in_tmp / "own.py").write_text(METHOD)
    (in_tmp / "recipe.yaml").write_text(RECIPE)
    return in_tmp / "own.py"


def test_a_method_that_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--check", "./own.py:Scaled"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14
    assert all(line.startswith(("ok      linear: ", "ok      conv1d: ")) for line in lines)
    assert run(["methods", "--check", "./own.py:Scaled", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["passed"], len(found["checks"])) == ("./own.py:Scaled", True, 14)
    assert found["checks"][0]["problem"] is None


def test_a_method_that_fails(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.write_text(METHOD.replace("zeros_(self.scale)", "ones_(self.scale)"))
    assert run(["methods", "--check", "./own.py:Scaled"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED  linear: the output is unchanged" in out
    assert "\nok      linear: " in out
    assert err == ""
    assert run(["methods", "--check", "./own.py:Scaled", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lroa", "--check lroa: unknown method; did you mean 'lora'?; allowed: "),
        ("./none.py:X", "none.py: no such file"),
        ("./own.py:Scald", "has no 'Scald'; did you mean 'Scaled'?"),
        ("./own.py:Config", "own.py:Config"),
    ],
)
def test_names_that_are_no_method(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["methods", "--check", name]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("blocks: 3", "blocs: 3", "line 5: adapter.blocs = 3: unknown key; did you mean 'blocks'?"),
        ("blocks: 3", "blocks: 0", "line 5: adapter.blocks = 0: out of range; allowed: an integer"),
        (":Scaled", ":Scald", 'line 3: adapter.method = "./own.py:Scald": '),
        ("own.py", "none.py", 'line 3: adapter.method = "./none.py:Scaled": '),
        ("./own.py:Scaled", "scaled", "or a method file: ./FILE.py:CLASS"),
    ],
)
def test_keys_of_a_recipe(
    old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["validate", "recipe.yaml"]) == 0
    assert (
        capsys.readouterr().out == "recipe.yaml: valid (some/model, ./own.py:Scaled, completion)\n"
    )
    Path("recipe.yaml").write_text(RECIPE.replace(old, new))
    assert run(["validate", "recipe.yaml"]) == 2
    assert message in capsys.readouterr().err.splitlines()[0]
