"""Which directories are accepted as an adapter or a base, and the errors for all others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapters.convert import convert
from lorakit.adapters.load import load
from lorakit.adapters.merge.run import merge
from lorakit.adapters.peft.locate import adapter_directory
from lorakit.adapters.peft.read import read_adapter
from lorakit.errors import AdapterError, ModelError, UserError
from lorakit.models.hub import load_config
from lorakit.recipe.sections import ModelSection
from tests.adapters.directories import logits, write_adapter, write_base


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = write_base(folder / "base")
    return base, write_adapter(base, folder / "adapter")


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a copy as PEFT would write it."""
    copy = shutil.copytree(pair[1], tmp_path / "adapter")
    (copy / "lorakit.json").unlink()
    return copy


def edit(adapter: Path, **keys: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return adapter


def cached(cache: Path, adapter: Path, name: str) -> None:
    """Copy the adapter into the Hub cache, as the repository ``name``."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(adapter, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)


def test_a_hub_id_is_read_from_the_cache(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(tmp_path / "cache", adapter, "some-one/their.adapter")
    found = load(base, "some-one/their.adapter")
    assert torch.equal(logits(found), logits(load(base, adapter)))
    with pytest.raises(UserError, match="some-one/other: no such directory, not in the"):
        read_adapter("some-one/other")


@pytest.mark.parametrize("name", ["none", "a/b/c", "/none/at/all", "./none/here", "a b/c"])
def test_neither_a_directory_nor_a_hub_id(name: str) -> None:
    with pytest.raises(AdapterError, match="no such adapter directory") as raised:
        adapter_directory(name)
    assert ("namespace/name" in str(raised.value)) == ("/" not in name)


def test_the_error_describes_what_was_found_instead(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    for name in ("state.json", "weights.safetensors"):
        (checkpoint / name).touch()
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "model.gguf").write_bytes(b"GGUF")
    for path, said in (
        (tmp_path / "run", f"did you mean {tmp_path / 'run' / 'adapter'}?"),
        (checkpoint, "a training checkpoint; resume from it with train --resume"),
        (base, "a model, not an adapter"),
        (
            tmp_path / "quantized",
            "not an adapter (it contains GGUF files, which lorakit does not read)",
        ),
        (tmp_path / "quantized" / "model.gguf", "a GGUF file, which lorakit does not read"),
        (adapter / "adapter_model.safetensors", "a weights file, not a directory; allowed"),
    ):
        with pytest.raises(AdapterError) as raised:
            adapter_directory(path)
        assert said in str(raised.value)


def test_a_base_that_is_none_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    shutil.copytree(pair[1], tmp_path / "run" / "adapter")
    for name, said in (
        (str(tmp_path / "model.gguf"), "a GGUF file, which lorakit does not read; allowed"),
        (str(tmp_path / "run"), f"a run's output directory; its adapter is {tmp_path / 'run'}"),
        (str(pair[1]), "it contains an adapter, not a base model"),
        (str(tmp_path / "gone"), f"{tmp_path / 'gone'}: no such directory"),
        ("./gone", "./gone: no such directory"),
        ("models/some/folder", "models/some/folder: no such directory"),
    ):
        with pytest.raises(ModelError) as raised:
            load_config(ModelSection(name_or_path=name))
        assert said in str(raised.value)
        assert "repo" not in str(raised.value).lower()


def test_a_base_that_has_moved(pair: tuple[Path, Path], adapter: Path) -> None:
    base, _ = pair
    edit(adapter, base_model_name_or_path="/once/here")
    with pytest.raises(AdapterError, match="base model /once/here, which does not exist"):
        load(None, adapter)
    edit(adapter, base_model_name_or_path="once/here")
    with pytest.raises(ModelError, match="names this base; hint: if it has moved, pass the base"):
        load(None, adapter)
    assert logits(load(base, adapter)).isfinite().all()


def test_unknown_keys_are_listed_once(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    neutral = {"use_new_thing": False, "new_config": None, "new_list": [], "new_map": {}}
    edit(adapter, **neutral)
    read_adapter(adapter)
    assert capsys.readouterr().err == ""
    edit(adapter, **neutral, use_other_thing=True, mode="turbo")
    read_adapter(adapter)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('unknown keys are ignored: mode = "turbo", use_other_thing = true')
    assert str(adapter / "adapter_config.json") in line
    said: list[str] = []
    read_adapter(adapter, said.append)
    assert said == [line]


def test_merge_and_convert_report_unknown_keys_through_their_callback(
    pair: tuple[Path, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(adapter, mode="turbo")
    merged: list[str] = []
    merge(pair[0], adapter, tmp_path / "merged", say=merged.append)
    converted: list[str] = []
    convert(adapter, tmp_path / "converted", "lora", say=converted.append)
    for said in (merged, converted):
        assert sum('ignored: mode = "turbo"' in line for line in said) == 1
    assert "unknown keys" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [
        {"use_qalora": True}, {"alora_invocation_tokens": [1]}, {"layer_replication": [[0, 2]]},
        {"megatron_config": {"a": 1}}, {"init_lora_weights": "loftq"}, {"kasa_config": {"r": 2}},
    ],
    ids=lambda keys: next(iter(keys)),
)  # fmt: skip
def test_settings_that_change_the_sum_are_rejected(keys: dict[str, Any], adapter: Path) -> None:
    with pytest.raises(AdapterError, match=rf"{next(iter(keys))} = .*: not supported; allowed: "):
        read_adapter(edit(adapter, **keys))


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"peft_type": "IA3"}, "hint: merge it into its base with PEFT (merge_and_unload, "),
        ({"peft_type": "PROMPT_TUNING"}, "hint: use it with PEFT, since it cannot be merged"),
        ({"use_qalora": True}, "hint: merge it into its base with PEFT (merge_and_unload, "),
        ({"alora_invocation_tokens": [1]}, "hint: use it with PEFT, since it cannot be merged"),
    ],
)
def test_an_error_says_what_to_do_with_an_adapter_of_peft(
    keys: dict[str, Any], hint: str, adapter: Path
) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter(edit(adapter, **keys))
    assert hint in str(caught.value)


def test_tied_weights_are_refused_where_they_would_be_adapted(adapter: Path) -> None:
    edit(adapter, ensure_weight_tying=True)
    read_adapter(adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(2, 3)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="ensure_weight_tying = true: not supported"):
        read_adapter(adapter)


def test_unknown_and_missing_tensors_are_distinguished(
    pair: tuple[Path, Path], adapter: Path
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[name.replace("lora_A.weight", "lora_C.weight")] = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(AdapterError) as raised:
        load(pair[0], adapter)
    stem = name.removeprefix("base_model.model.").removesuffix("A.weight")
    said = f"unknown tensors: {stem}C.weight; missing tensors: {stem}A.weight"
    assert said in str(raised.value)
