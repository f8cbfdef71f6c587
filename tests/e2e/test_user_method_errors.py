"""Errors in the code of a user's method: one line with the user's file and line, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.cli.main import run
from tests.e2e.user_methods import METHOD
from tests.training.runs import write_recipe_file


@pytest.fixture
def recipe(tiny_llama: Path, in_tmp: Path) -> Path:
    (in_tmp / "own.py").write_text(METHOD)
    file = write_recipe_file(
        in_tmp, tiny_llama, "completion", train__epochs=None, train__max_steps=2
    )
    adapter = {"method": "./own.py:Own", "target_modules": ["q"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapter": adapter}))
    return file


def line_of(text: str) -> int:
    lines = Path("own.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def method(name: str, arguments: str, body: str) -> tuple[str, str]:
    """A change that defines a method of the class ``Own``."""
    return (
        "    Layer = Layer\n",
        f"    Layer = Layer\n    def {name}(self, {arguments}):\n        {body}\n",
    )


@pytest.mark.parametrize(
    "change",
    [
        ("size: int = 2", "size: int = 2\n    @field_validator('size', mode='before')\n    def f(cls, value):\n        return 1 / 0"),
        ("self.scales = self", "1 / 0\n        self.scales = self"),
        method("check", "config, targets", "1 / 0"),
        method("wrap", "module, config, name", "1 / 0"),
        method("link", "layers", "1 / 0"),
        method("trained_parameters", "model, config", "1 / 0"),
        method("check_steps", "config, total_steps", "1 / 0"),
        method("param_groups", "parameters, layers, config, train", "1 / 0"),
        method("hooks", "layers, config, total_steps", "1 / 0"),
    ],
)  # fmt: skip
def test_an_error_before_training(
    change: tuple[str, str], recipe: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(METHOD.replace(*change))
    assert run(["train", str(recipe), "--set", "adapter.size=3"]) == 2
    *_, message = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ")
    assert message.endswith(f"own.py:{line_of('1 / 0')}: ZeroDivisionError: division by zero")
    assert not (in_tmp / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("super().__init__(base_layer)", "nn.Module.__init__(self)"), "own.py:14: AttributeError"),
        (
            ("        super().__init__(base_layer)\n        self.scales = self.new_parameter(self.out_features)\n        nn.init.zeros_(self.scales)", "        pass"),
            "wrap returned a Layer; allowed: an AdapterLayer whose __init__ calls super().__init__",
        ),
        (
            ("        nn.init.zeros_(self.scales)", "        nn.init.zeros_(self.scales)\n        self.inner = nn.Linear(2, 2)"),
            "q_proj.inner.weight; allowed: parameters that are attributes of the layer itself",
        ),
        (
            ("    Layer = Layer\n", "    Layer = Layer\n    shared = ('frozen',)\n"),
            "shared: frozen; allowed: parameters that link makes one frozen object",
        ),
        (
            method("trained_parameters", "model, config", "return ['nothing']"),
            "trained_parameters: nothing: no such parameter",
        ),
        (method("wrap", "module, config, name", "return None"), "wrap returned a NoneType; allowed"),
        (
            method("param_groups", "parameters, layers, config, train", "return parameters"),
            "param_groups returned a dict; allowed: a list of dicts with a list of params",
        ),
        (
            method("hooks", "layers, config, total_steps", "return None"),
            "hooks returned a NoneType; allowed: a lorakit.methods.base.RunHooks",
        ),
    ],
)  # fmt: skip
def test_a_wrong_result_before_training(
    change: tuple[str, str],
    said: str,
    recipe: Path,
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("own.py").write_text(METHOD.replace(*change))
    assert run(["train", str(recipe)]) == 2
    *_, message = capsys.readouterr().err.splitlines()
    assert said in message
    assert not (in_tmp / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        ("return self.scales[:, None]", "1 / 0"),
        (
            "    Layer = Layer\n",
            "    Layer = Layer\n    def hooks(self, layers, config, total_steps):\n        return Hooks()\n"
            "from lorakit.methods.base import RunHooks\nclass Hooks(RunHooks):\n"
            "    def after_step(self, step, scaled=False):\n        1 / 0\n",
        ),
    ],
)
def test_an_error_in_a_training_step(
    change: tuple[str, str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(METHOD.replace(*change))
    assert run(["train", str(recipe)]) == 1
    *_, message = capsys.readouterr().err.splitlines()
    place = f"own.py:{line_of('1 / 0')}"
    assert message.startswith(f"error: {place}: ZeroDivisionError: division by zero; the traceback")


@pytest.mark.parametrize("name", ["to_peft", "from_peft"])
def test_an_error_in_the_format(
    name: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"to_peft": "layers, config", "from_peft": "module, name, settings, tensors"}[name]
    Path("own.py").write_text(METHOD.replace(*method(name, arguments, "1 / 0")))
    codes = [run(["train", str(recipe)]), run(["eval", str(recipe)])]
    assert codes == {"to_peft": [1, 2], "from_peft": [0, 2]}[name]
    message = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert f" own.py:{line_of('1 / 0')}: ZeroDivisionError: division by zero" in message
    if name == "to_peft":
        assert "adapter: not written: own.py" in message
        assert "step-2; resume with --resume auto" in message
