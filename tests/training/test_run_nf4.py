"""Runs with `base_precision: nf4`: they learn, resume exactly, and their adapters fit the base."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit.cli.main import run
from tests.families import token_ids
from tests.training.processes import Launcher
from tests.training.runs import (
    adapter_bytes,
    checkpoint_names,
    eval_lines,
    learning,
    log_lines,
    recipe_for,
    tree,
    write_recipe_file,
)

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with matrices that nf4 supports, except those of k and v."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    shutil.copytree(tiny_llama, folder)
    config = LlamaConfig.from_pretrained(
        folder, hidden_size=128, intermediate_size=256, head_dim=32
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("launcher"))


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "model__base_precision": "nf4",
        "adapter__target_modules": ["all-linear"],
        "train__log_every_steps": 1,
        **changes,
    }


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_killed_run_resumes_to_the_same_bytes(
    dtype: str, wide_llama: Path, tmp_path: Path, launcher: Launcher
) -> None:
    recipe = write_recipe_file(
        tmp_path, wide_llama, "completion",
        **settings(model__dtype=dtype, train__save_every_steps=3),
    )  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ended = launcher.run(["train", recipe, "--set", f"train.output_dir={whole}"])
    assert ended.code == 0, ended.err
    [line] = [line for line in ended.err.splitlines() if "nf4" in line]
    assert "10 linear layers are kept in nf4; 4 others, small or trained, are not" in line
    losses = [line["loss"] for line in log_lines(whole)]
    assert losses[-1] < 0.9 * losses[0]
    command = ["train", recipe, "--set", f"train.output_dir={stopped}"]
    step = "lorakit.training.engine.eager:EagerEngine.step"
    assert launcher.run(command, at_call=(step, 6)).code == -9
    assert checkpoint_names(stopped) == ["step-3"]
    assert launcher.run([*command, "--resume", "auto"]).code == 0
    assert adapter_bytes(stopped) == adapter_bytes(whole)
    assert learning(stopped) == learning(whole)


def test_the_adapter_fits_the_original_base(wide_llama: Path, tmp_path: Path) -> None:
    """PEFT, evaluate and merge compute the same loss with it, near that of the run."""
    recipe = recipe_for(tmp_path, wide_llama, **settings())
    trained = lorakit.train(recipe)
    ended = eval_lines(trained.output_dir)[-1]["eval"]["loss"]
    base = AutoModelForCausalLM.from_pretrained(wide_llama)
    adapter = PeftModel.from_pretrained(base, trained.adapter_dir)
    ids = token_ids()
    with torch.no_grad():
        wanted = adapter(input_ids=ids).logits
        loaded = lorakit.load(wide_llama, trained.adapter_dir)(input_ids=ids).logits
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-4)
    lorakit.merge(wide_llama, trained.adapter_dir, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {p.dtype for p in base.parameters()}
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)
    scored = lorakit.evaluate(recipe, adapter=trained.adapter_dir)
    assert scored["loss"] == pytest.approx(ended, rel=0.1)
    assert scored["loss"] != ended, "the base of this call is not quantized"


def test_a_run_is_refused_in_one_line(
    wide_llama: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    small = write_recipe_file(tmp_path, tiny_bert, "glue/sst2", **settings())
    before = tree(tmp_path)
    assert run(["train", str(small)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {small}, line 1: ")
    assert 'model.base_precision = "nf4": BertForSequenceClassification has no frozen' in last
    assert tree(tmp_path) == before
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    wide = write_recipe_file(tmp_path, wide_llama, "completion", **settings())
    assert run(["train", str(wide)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert 'model.base_precision = "nf4": needs bitsandbytes' in line
