"""The methods of ``docs/examples``, used as a user uses them: by file and class, from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.api import check_method
from lorakit.cli.main import run
from lorakit.errors import AdapterError
from tests.training.processes import Launcher
from tests.training.runs import adapter_bytes, log_lines, run_json, write_recipe_file

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
#: Specification, lines at most, keys in ``adapter``, and what PEFT calls it.
METHODS = {
    "loha": ("./loha.py:LoHa", 80, {"r": 4, "alpha": 8}, "LOHA"),
    "vera": ("./vera.py:Vera", 100, {"r": 16, "d_initial": 0.5}, "VERA"),
}


@pytest.fixture
def recipe(name: str, tiny_llama: Path, in_tmp: Path) -> Path:
    """A recipe beside the method's file, in the working directory."""
    spec, _, keys, _ = METHODS[name]
    shutil.copy(EXAMPLES / f"{name}.py", in_tmp)
    file = write_recipe_file(
        in_tmp,
        tiny_llama,
        "completion",
        task__limit_train=16,
        task__limit_eval=6,
        train__epochs=None,
        train__max_steps=4,
        train__learning_rate=2e-2,
        train__save_every_steps=2,
        train__save_total_limit=None,
    )
    settings = json.loads(file.read_text())
    adapter = {"method": spec, "target_modules": ["q", "v", "down_proj"], **keys}
    file.write_text(json.dumps(settings | {"adapter": adapter}))
    return file


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        out: torch.Tensor = model.eval()(ids).logits
    return out


@pytest.mark.parametrize("name", METHODS)
def test_its_length_and_the_contract(name: str) -> None:
    spec, lines, _, _ = METHODS[name]
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) <= lines
    results = check_method(f"{EXAMPLES}/{spec.removeprefix('./')}")
    assert results
    assert not [result for result in results if result.problem]


def test_the_method_written_in_the_document(in_tmp: Path) -> None:
    document = (EXAMPLES.parent / "own-method.md").read_text()
    code, *_ = re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    Path("row_scale.py").write_text(code)
    results = check_method("./row_scale.py:RowScale")
    assert {result.module for result in results} == {"linear", "conv1d"}
    assert not [result for result in results if result.problem]
    checks = [f"ok      linear: {r.check}" for r in results if r.module == "linear"]
    assert "\n".join(checks) in document


@pytest.mark.parametrize("name", METHODS)
def test_train_resume_eval_merge_and_load_in_peft(
    name: str,
    recipe: Path,
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec, _, keys, peft_type = METHODS[name]
    assert run(["train", str(recipe)]) == 0
    assert "PEFT cannot load" not in capsys.readouterr().err
    whole = in_tmp / "run"
    losses = [line["loss"] for line in log_lines(whole)]
    assert losses[-1] < losses[0]

    again, middle = in_tmp / "again", whole / "checkpoints" / "step-2"
    assert run(["train", str(recipe), "--output-dir", str(again), "--resume", str(middle)]) == 0
    assert adapter_bytes(again) == adapter_bytes(whole)

    capsys.readouterr()
    assert run(["eval", str(recipe), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics == pytest.approx(run_json(whole)["metrics"], rel=1e-5)

    adapter = whole / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["peft_type"] == peft_type
    assert settings.items() >= keys.items()
    base = json.loads(recipe.read_text())["model"]["name_or_path"]
    ours = lorakit.load(base, adapter, dtype="float32", method=spec)
    merged = in_tmp / "merged"
    assert run(["merge", base, str(adapter), str(merged), "--method", spec]) == 0
    for other in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)),
        AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
    ):
        torch.testing.assert_close(logits(other), logits(ours), atol=1e-5, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - logits(ours)).abs().max() > 1e-3, "the adapter does something"

    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    saved.save_pretrained(in_tmp / "theirs")
    capsys.readouterr()
    theirs = lorakit.load(base, in_tmp / "theirs", dtype="float32", method=spec)
    assert torch.equal(logits(theirs), logits(ours))
    assert "unknown keys" not in capsys.readouterr().err
    config = in_tmp / "theirs" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"bias": "all"}))  # the model has no biases
    lorakit.load(base, in_tmp / "theirs", method=spec)
    assert "unknown keys" not in capsys.readouterr().err
    for key in ("alpha_pattern", "rank_pattern"):
        config.write_text(json.dumps(settings | {key: {"q_proj": 1}}))
        with pytest.raises(AdapterError, match=rf'{key} = \{{"q_proj": 1\}}: not supported by'):
            lorakit.load(base, in_tmp / "theirs", method=spec)


@pytest.mark.parametrize("name", ["vera"])
def test_a_shared_tensor_for_another_base(name: str, recipe: Path, in_tmp: Path) -> None:
    assert run(["train", str(recipe)]) == 0
    adapter, spec = in_tmp / "run" / "adapter", METHODS[name][0]
    base = json.loads(recipe.read_text())["model"]["name_or_path"]
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in ("base_model.vera_A", "base_model.vera_B"):
        rows, columns = tensors[key].shape
        changed = tensors[key][:-1].contiguous()
        save_file(tensors | {key: changed}, file)
        message = (
            rf"{key[11:]} is \({rows - 1}, {columns}\), and the model needs \({rows}, {columns}\): "
            "the adapter belongs to another base model"
        )
        with pytest.raises(AdapterError, match=message):
            lorakit.load(base, adapter, method=spec)
        with pytest.raises(AdapterError, match=message):
            lorakit.merge(base, adapter, in_tmp / "merged", method=spec)


@pytest.mark.parametrize("name", ["loha"])
def test_the_code_runs_only_if_it_is_named(
    name: str,
    recipe: Path,
    in_tmp: Path,
    launcher: Launcher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The class has a name of its own, since a process remembers the methods that it has run."""
    source = Path("loha.py").read_text().replace("class LoHa(", "class Unnamed(")
    Path("own.py").write_text(source)
    train = ["train", recipe, "--set", "adapter.method=./own.py:Unnamed"]
    assert launcher.run(train).code == 0
    adapter = in_tmp / "run" / "adapter"
    base = json.loads(recipe.read_text())["model"]["name_or_path"]
    ran = in_tmp / "ran"
    Path("own.py").write_text(f"{source}\nopen({str(ran)!r}, 'w').close()\n")
    with pytest.raises(AdapterError, match=r"trained with \./own\.py:Unnamed.*--method"):
        lorakit.load(base, adapter)
    assert run(["merge", base, str(adapter), "merged"]) == 2
    assert run(["generate", base, "--adapter", str(adapter), "--prompt", "a"]) == 2
    assert run(["convert", str(adapter), "converted", "--to", "lora"]) == 2
    assert "--method ./own.py:Unnamed" in capsys.readouterr().err
    assert not ran.exists()
    assert not Path("merged").exists()
    generated = ["generate", base, "--adapter", str(adapter), "--prompt", "a"]
    assert run([*generated, "--max-new-tokens", "2", "--method", "own.py:Unnamed"]) == 0
    assert ran.exists()
    assert run(["convert", str(adapter), "converted", "--to", "lora"]) == 2
    assert "is not a product of two factors" in capsys.readouterr().err
    assert run(["merge", base, str(adapter), "merged", "--method", "gone.py:LoHa"]) == 2
    assert "gone.py: no such file" in capsys.readouterr().err
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a" in tensors


@pytest.mark.parametrize("name", ["loha"])
def test_what_is_wrong_in_a_recipe_is_said(
    name: str, recipe: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads(recipe.read_text())
    for change, messages in (
        ({"method": "./gone.py:LoHa"}, ["gone.py: no such file", "adapter.method"]),
        ({"method": "./loha.py:LoHaLayer"}, ["loha.py:LoHaLayer", "is the class LoHaLayer"]),
        ({"r": "x"}, ["adapter.r"]),
        ({"rank": 3}, ["unknown key", "rank"]),
        ({"target_modules": ["embed_tokens"]}, ["does not adapt", "allowed: linear"]),
    ):
        recipe.write_text(json.dumps(settings | {"adapter": settings["adapter"] | change}))
        assert run(["train", str(recipe)]) == 2
        said = capsys.readouterr().err
        assert all(message in said for message in messages), said
        assert not (in_tmp / "run").exists()


@pytest.mark.parametrize("name", ["loha"])
def test_classes_of_the_same_name_are_told_apart_by_file(
    name: str,
    recipe: Path,
    in_tmp: Path,
    launcher: Launcher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path("loha.py").read_text()
    for file, factor in (("a.py", "1"), ("b.py", "3")):
        own = source.replace("class LoHa(Method)", "class Same(Method)")
        Path(file).write_text(own.replace("* self.scaling", f"* self.scaling * {factor}"))
    base = json.loads(recipe.read_text())["model"]["name_or_path"]
    assert run(["train", str(recipe), "--set", "adapter.method=./a.py:Same"]) == 0
    adapter = in_tmp / "run" / "adapter"
    expected = logits(lorakit.load(base, adapter))
    other = logits(lorakit.load(base, adapter, method="b.py:Same"))
    assert torch.equal(other, expected), "the adapter is still read with the file that wrote it"
    Path("a.py").rename("moved.py")
    capsys.readouterr()
    ended = launcher.run(["merge", base, adapter, "merged", "--method", "moved.py:Same"])
    assert ended.code == 0, ended.err
    assert "trained with ./a.py:Same, read with moved.py:Same" in ended.err
