"""``adapter.init_from`` with variants of LoRA that only PEFT trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lorakit
from lorakit.errors import UserError
from lorakit.training.run import train
from lorakit.training.setup import prepare
from tests.families import logits, randomized
from tests.training.runs import write_recipe_file

pytestmark = pytest.mark.filterwarnings("ignore")


def fresh(model: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return found


@pytest.mark.parametrize("form", ["pissa", "state_dict"])
def test_a_run_starts_from_it(form: str, tiny_llama: Path, tmp_path: Path) -> None:
    init = True if form == "state_dict" else form
    config = PeftLora(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=init)
    theirs = get_peft_model(fresh(tiny_llama), config)
    randomized(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    if form == "state_dict":
        want = logits(theirs)
        stored = {name: value.clone() for name, value in theirs.state_dict().items()}
        save_file(stored, tmp_path / "theirs" / "adapter_model.safetensors")
    else:
        want = logits(PeftModel.from_pretrained(fresh(tiny_llama), str(tmp_path / "theirs")))
    file = write_recipe_file(tmp_path, tiny_llama, "completion")
    start = {"init_from": str(tmp_path / "theirs")}
    recipe = lorakit.load_recipe(file, {"adapter": start, "train.max_steps": 1})
    prepared = prepare(recipe, lambda text: None)
    torch.testing.assert_close(logits(prepared.model), want, atol=1e-5, rtol=0)
    assert prepared.recipe.adapter.r == (3 if form == "state_dict" else 6)
    if form == "state_dict":
        return
    adapter = train(recipe).adapter_dir
    reloaded = PeftModel.from_pretrained(fresh(tiny_llama), str(adapter))
    got = logits(lorakit.load(tiny_llama, adapter, dtype="float32"))
    torch.testing.assert_close(got, logits(reloaded), atol=1e-5, rtol=0)


def test_lora_bias_is_not_trained(tiny_llama: Path, tmp_path: Path) -> None:
    config = PeftLora(r=3, target_modules=["q_proj"], lora_bias=True)
    get_peft_model(fresh(tiny_llama), config).save_pretrained(tmp_path / "theirs")
    file = write_recipe_file(tmp_path, tiny_llama, "completion")
    recipe = lorakit.load_recipe(file, {"adapter": {"init_from": str(tmp_path / "theirs")}})
    with pytest.raises(UserError, match=r"lora_bias is \(32,\) in the adapter, and absent here"):
        prepare(recipe, lambda text: None)
