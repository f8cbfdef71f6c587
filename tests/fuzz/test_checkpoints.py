"""Mutated checkpoints: ``--resume auto`` takes the one before, and the run ends as without them."""

from __future__ import annotations

import json
import random
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from lorakit.cli.main import run
from tests.fuzz.mutate import assert_plain, limited, listing, mutate_file, run_cases
from tests.training.runs import adapter_bytes, write_recipe_file

SETTINGS = {"train__epochs": 1, "train__save_every_steps": 2, "train__save_total_limit": None}


def as_before_manifests(checkpoint: Path) -> None:
    """Make it a checkpoint of an earlier version."""
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["version"]
    (checkpoint / "state.json").write_text(json.dumps(state))


def rewrite_manifest(checkpoint: Path) -> None:
    """Let the manifest describe the files as they are now."""
    files = [f for f in checkpoint.iterdir() if f.is_file() and not f.is_symlink()]
    entries = {
        f.name: {"bytes": f.stat().st_size, "sha256": sha256(f.read_bytes()).hexdigest()}
        for f in files
        if f.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(("count", "seed"), [(12, 1), pytest.param(500, 2, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_mutated_checkpoints(
    count: int, seed: int, tiny_llama: Path, in_tmp: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    temporary, whole, output = in_tmp / "tmp", in_tmp / "whole", in_tmp / "run"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    recipe = write_recipe_file(in_tmp, tiny_llama, "completion", **SETTINGS)

    def train(folder: Path) -> int:
        return run(["train", str(recipe), "--resume", "auto", "--output-dir", str(folder)])

    assert train(whole) == 0
    want = adapter_bytes(whole)
    shutil.rmtree(whole / "adapter")
    outside = [temporary, in_tmp / "data", whole]
    before = listing(*outside)

    def case(number: int) -> None:
        draw = random.Random(f"{seed}.{number}")
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(whole, output)
        newest = output / "checkpoints" / "step-4"
        kind = draw.choice(["damaged", "old", "forged", "beside"])
        if kind == "old":
            as_before_manifests(newest)
        files = sorted(newest.iterdir())
        if kind == "beside":
            files = [output / name for name in ("run.json", "recipe.yaml", "metrics.jsonl")]
        for file in draw.sample(files, draw.choice([1, 1, 2])):
            mutate_file(file, draw)
        if kind == "forged" and not (newest / "manifest.json").is_dir():
            (newest / "manifest.json").unlink(missing_ok=True)
            rewrite_manifest(newest)
        capsys.readouterr()
        with limited():
            code = train(output)
        err = capsys.readouterr().err
        assert_plain(err)
        allowed = {"damaged": (0,), "beside": (0, 1, 2)}.get(kind, (0, 1))
        assert code in allowed, (number, err)
        if kind == "damaged" or "warning: skipped" in err:
            assert adapter_bytes(output) == want, number
        assert listing(*outside) == before, number

    run_cases(count, case)
