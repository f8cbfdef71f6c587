"""Methods in a user's file: ``lorakit methods --check``, and the keys of such a method in recipes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.cli.main import run
from lorakit.errors import UserError
from lorakit.recipe.check import check_recipe

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
    (in_tmp / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return in_tmp / "own.py"


def test_a_method_that_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--check", "./own.py:Scaled"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert all(line.startswith(("ok      linear: ", "ok      conv1d: ")) for line in lines)


def test_what_a_method_prints_does_not_reach_stdout(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write_text(
        METHOD.replace("        return self.scale", "        print('x')\n        return self.scale")
    )
    assert run(["methods", "--check", "./own.py:Scaled", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["passed"], len(found["checks"])) == ("./own.py:Scaled", True, 16)
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
        ("lroa", "--check lroa: unknown method (did you mean 'lora'?); allowed: "),
        ("./none.py:X", "none.py: no such file"),
        ("./own.py:Scald", "the file has no 'Scald' (did you mean 'Scaled'?); allowed: Scaled\n"),
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
        (
            "Config = Config",
            "Config = dict",
            "Config = the class dict; allowed: a subclass of lorakit.recipe.sections.AdapterSection",
        ),
        (
            "    Config = Config\n",
            "",
            "does not define Config; allowed: a subclass of lorakit.recipe.sections.AdapterSection",
        ),
        (
            "Layer = Layer",
            "Layer = nn.Linear",
            "Layer = the class Linear; allowed: a subclass of lorakit.layers.AdapterLayer",
        ),
        ("def delta_weight", "def delta", "Layer: missing methods: delta_weight; allowed: "),
        (
            "config, name)",
            "config)",
            "Layer.__init__: too many positional arguments; allowed: "
            "__init__(self, base_layer, config, name)",
        ),
        (
            "Layer = Layer",
            "Layer = Layer\n    def hooks(self, layers):\n        pass",
            "hooks: too many positional arguments; allowed: hooks(self, layers, config, total_steps)",
        ),
        (
            "blocks: PositiveInt",
            "revision: PositiveInt",
            "Config: revision: a key of adapter_config",
        ),
        ("blocks: PositiveInt", "blocks: 'Nothing'", "Config: name 'Nothing' is not defined"),
        (
            "blocks: PositiveInt = 2",
            "blocks: set[int] = {2}",
            "Config: blocks = {2}: cannot be written to a recipe and read back; allowed: ",
        ),
        (
            "Layer = Layer",
            "Layer = Layer\n    shared = 'scale'",
            'shared = "scale"; allowed: a tuple of names',
        ),
        (
            "Layer = Layer",
            "Layer = Layer\n    kinds = {'linaer'}",
            "kinds = \"{'linaer'}\"; allowed: a set of linear, conv1d, embedding, slice",
        ),
        (
            "Layer = Layer",
            "Layer = Layer\n    kinds = 'linear'",
            'kinds = "linear"; allowed: a set of linear, conv1d, embedding, slice',
        ),
        (
            "Layer = Layer",
            "kinds = ()",
            "kinds is empty, so the method trains nothing; allowed: a set of linear",
        ),
        (
            "Layer = Layer",
            "Layer = Layer\n    kinds = {'slice'}",
            "kinds has slice; allowed: a Layer that defines join and split",
        ),
        (
            "Layer = Layer",
            "Layer = Layer\n    def __init__(self, factor):\n        pass",
            "cannot be created without arguments: Scaled.__init__() missing 1 required",
        ),
        (
            "Layer = Layer",
            "Layer = Layer\n    def __init__(self):\n        1 / 0",
            "own.py:26: ZeroDivisionError: division by zero",
        ),
    ],
)
def test_classes_that_define_no_method(
    old: str, new: str, message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write_text(METHOD.replace(old, new))
    for command in (["methods", "--check", "./own.py:Scaled"], ["validate", "recipe.yaml"]):
        assert run(command) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
        assert err.count("own.py:Scaled") <= 1


def imported() -> Any:
    """The file as a module of the user's own program."""
    spec = importlib.util.spec_from_file_location("own", "own.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_inject_with_the_configuration_of_a_file() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = imported().Config(method=Path("./own.py:Scaled"), target_modules=["0"])
    assert config.method == "own.py:Scaled"
    report = lorakit.inject(net, config)
    assert (report.method, report.trainable_parameters) == ("own.py:Scaled", 17)


def test_a_recipe_with_the_configuration_of_a_file() -> None:
    config = imported().Config(method="./own.py:Scaled", blocks=3)
    check_recipe(lorakit.load_recipe("recipe.yaml").model_copy(update={"adapter": config}))
    config = imported().Config(blocks=3)
    with pytest.raises(UserError, match="adapter: has type Config; allowed: LoraConfig"):
        check_recipe(lorakit.load_recipe("recipe.yaml").model_copy(update={"adapter": config}))


@pytest.mark.parametrize("base", ["AdapterSection", "LoraConfig"])
def test_inject_without_the_name_of_the_method(base: str, own: Path) -> None:
    """Also if the configuration has the same keys as that of the default method."""
    code = METHOD.replace(
        "class Config(AdapterSection):\n    blocks", f"class Config({base}):\n    r"
    )
    own.write_text(f"from lorakit import LoraConfig\n{code}")
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"is LoraConfig, not Config; hint: Config\(method='FILE"):
        lorakit.inject(net, imported().Config(target_modules=["0"]))


def test_a_method_that_trains_the_base(own: Path) -> None:
    own.write_text(
        METHOD.replace(
            "Layer = Layer",
            "kinds = ()\n    def trained_parameters(self, model, config):\n        return []",
        )
    )
    assert run(["validate", "recipe.yaml", "--set", "adapter.blocks=1"]) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "blocks: 3",
            "blocs: 3",
            "line 5: adapter.blocs = 3: unknown key (did you mean 'blocks'?)",
        ),
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
