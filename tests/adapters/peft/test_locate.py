"""Adapters on the Hub: revisions and subfolders, read from the cache, by every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.adapters.peft.locate import adapter_directory
from lorakit.cli.main import run
from lorakit.errors import AdapterError, ModelError
from tests.adapters.directories import logits, write_adapter, write_base

REPO = "some-one/their.adapter"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one adapter on ``main`` and another one in a folder on ``v2``."""
    base = write_base(tmp_path / "base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--some-one--their.adapter"
    (folder / "refs").mkdir(parents=True)
    for ref, commit, inside, seed in (("main", "0" * 40, "", 0), ("v2", "1" * 40, "steps/20", 1)):
        (folder / "refs" / ref).write_text(commit)
        adapter = write_adapter(base, tmp_path / f"adapter-{ref}", seed=seed)
        shutil.copytree(adapter, folder / "snapshots" / commit / inside)
    return tmp_path


def test_a_revision_and_a_subfolder(cache: Path) -> None:
    base = cache / "base"
    for given, local in ((REPO, "adapter-main"), (f"{REPO}@main", "adapter-main"),
                         (f"{REPO}@v2:steps/20", "adapter-v2")):  # fmt: skip
        want = logits(lorakit.load(base, cache / local))
        assert torch.equal(logits(lorakit.load(base, given)), want)


def test_what_is_not_in_the_repository(cache: Path) -> None:
    for given, said in (
        (f"{REPO}:steps/20", "no adapter in the Hub's repository: steps/20/adapter_config.json"),
        (f"{REPO}@v2", "no adapter in the Hub's repository: adapter_config.json is missing"),
        (f"{REPO}@v2:../up", "the subfolder ../up: allowed: inside the repository"),
        ("runs/some/adapter", "no such adapter directory"),
    ):
        with pytest.raises(AdapterError) as raised:
            adapter_directory(given)
        assert said in str(raised.value)
    with pytest.raises(ModelError, match=f"{REPO}@v3: .*not in the local cache"):
        adapter_directory(f"{REPO}@v3")


def test_the_option_subfolder(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, revision = str(cache / "base"), f"{REPO}@v2"
    folder = ["--subfolder", "steps/20"]
    assert run(["merge", base, revision, str(cache / "merged"), *folder]) == 0
    assert run(["convert", revision, str(cache / "plain"), "--to", "lora", *folder]) == 0
    capsys.readouterr()
    assert run(["inspect", revision, *folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"].endswith(":steps/20")
    local = cache / "cache" / "models--some-one--their.adapter" / "snapshots" / ("1" * 40)
    assert run(["merge", base, str(local), str(cache / "again"), *folder]) == 0
    assert run(["merge", base, str(local), str(cache / "not"), "--subfolder", "none"]) == 2
    assert "none: no such adapter directory" in capsys.readouterr().err
    assert run(["eval", "recipe.yaml", *folder]) == 2
    assert "--subfolder steps/20: requires --adapter" in capsys.readouterr().err
