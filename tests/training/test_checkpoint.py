from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.errors import UserError
from lorakit.recipe.sections import TrainSection
from lorakit.training.build import build_optimizer
from lorakit.training.checkpoint import (
    Progress,
    Snapshot,
    checkpoints,
    delete_after,
    load_checkpoint,
    readable_checkpoints,
    save_checkpoint,
    set_aside_after,
)
from lorakit.training.engine import EngineState
from lorakit.training.random_states import random_states, restore_random_states


def snapshot(step: int = 3) -> Snapshot:
    weight = torch.nn.Parameter(torch.randn(2, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    progress = Progress(
        step=step, seconds=0.1 + 0.2, best_metrics={"loss": 1 / 3}, window=[[0.1, 2.0]]
    )
    return Snapshot(
        progress=progress,
        engine=EngineState(
            step=step,
            weights={"a.lora_A": weight.detach()},
            method={"a.mean": weight.detach() + 1},
            optimizer=optimizer.state_dict(),
            scheduler={"last_epoch": step, "_last_lr": [1e-3 / 3]},
            scaler=None,
        ),
        best={"a.lora_A": weight.detach() + 1},
        random=[random_states()],
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    saved = snapshot()
    path = save_checkpoint(tmp_path, saved, keep=None)
    assert path == tmp_path / "step-3"
    found = load_checkpoint(path)
    assert found.progress == saved.progress
    assert found.engine.scheduler == saved.engine.scheduler
    assert torch.equal(found.engine.weights["a.lora_A"], saved.engine.weights["a.lora_A"])
    assert found.best is not None
    assert saved.best is not None
    assert torch.equal(found.best["a.lora_A"], saved.best["a.lora_A"])
    ours, theirs = found.engine.optimizer["state"][0], saved.engine.optimizer["state"][0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    groups = saved.engine.optimizer["param_groups"]
    assert found.engine.optimizer["param_groups"] == [{**groups[0], "betas": [0.9, 0.999]}]
    assert all(name.endswith((".json", ".safetensors")) for name in names(path))


def test_a_checkpoint_without_a_best_model(tmp_path: Path) -> None:
    assert (
        load_checkpoint(save_checkpoint(tmp_path, replace(snapshot(), best=None), 1)).best is None
    )


def test_random_states_come_back() -> None:
    def drawn() -> tuple[float, float, float, float]:
        return (
            torch.rand(1).item(),
            random.random(),
            random.gauss(0, 1),
            float(np.random.standard_normal()),
        )

    np.random.seed(3)
    random.gauss(0, 1)  # keeps a second value for the next call
    np.random.standard_normal()
    states = random_states()
    first = drawn()
    assert drawn() != first
    restore_random_states([states])
    assert drawn() == first


def test_random_states_survive_the_files(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(), keep=None)
    random_after = torch.rand(2), random.random(), np.random.rand()
    restore_random_states(load_checkpoint(path).random)
    assert torch.equal(torch.rand(2), random_after[0])
    assert (random.random(), np.random.rand()) == random_after[1:]


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [1, 2, 9, 10]), (1, [10]), (2, [9, 10]), (9, [1, 2, 9, 10])]
)
def test_the_newest_are_kept(keep: int | None, left: list[int], tmp_path: Path) -> None:
    """By number, not by name: 10 is newer than 9."""
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, snapshot(step), keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step}" for step in left]
    assert len(names(tmp_path)) == len(left)


def test_leftovers_are_ignored_and_cleared(tmp_path: Path) -> None:
    for name in (".step-9.0123abcd.new", ".step-8.0123abcd.removed", "step-7.bak", "step-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, snapshot(), keep=1)
    assert names(tmp_path) == ["step-3", "step-7.bak", "step-x"]


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, snapshot(), keep=None)
    before = [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()]
    assert save_checkpoint(tmp_path, snapshot(), keep=None) == path
    after = [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()]
    assert after == before


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    broken = snapshot()
    broken.engine.scheduler = {"x": object()}
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, broken, keep=None)
    assert names(tmp_path) == []


def test_later_checkpoints_are_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, snapshot(step), None)
    delete_after(tmp_path, 2)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_the_state_of_8_bit_adamw_comes_back(tmp_path: Path) -> None:
    """bitsandbytes keeps its tensors one level deeper."""
    weight = torch.nn.Parameter(torch.randn(5000))
    section = TrainSection(output_dir="x", optimizer="adamw_8bit")
    optimizer = build_optimizer([{"params": [weight]}], section)
    weight.grad = torch.randn(5000)
    optimizer.step()
    saved = snapshot()
    saved.engine.optimizer = optimizer.state_dict()
    found = load_checkpoint(save_checkpoint(tmp_path, saved, None)).engine.optimizer["state"][0]
    group = "__bnb_optimizer_quant_state__"
    want = saved.engine.optimizer["state"][0]
    assert found.keys() == want.keys()
    assert found[group].keys() == want[group].keys()
    assert all(torch.equal(found[group][key], want[group][key]) for key in want[group])


def rewritten(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change state.json, and leave out the manifest, as in checkpoints of earlier versions."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["version"]
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    return checkpoint


def test_a_checkpoint_without_a_manifest_is_read(tmp_path: Path) -> None:
    saved = snapshot()
    path = rewritten(save_checkpoint(tmp_path, saved, None), lambda state: None)
    assert load_checkpoint(path).progress == saved.progress


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda c: flip(c / "optimizer.safetensors"),
    "a flipped bit of the manifest": lambda c: flip(c / "manifest.json"),
    "a pipe": lambda c: (c / "best.safetensors").unlink() or os.mkfifo(c / "best.safetensors"),
    "a directory": lambda c: (c / "best.safetensors").unlink() or (c / "best.safetensors").mkdir(),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "an empty manifest": lambda c: (c / "manifest.json").write_text("{}"),
    "a path in the manifest": lambda c: (c / "manifest.json").write_text('{"state.json": {}, "../x": {}}'),
    "deep JSON": lambda c: (c / "manifest.json").write_text("[" * 100_000),
    "another step": lambda c: rewritten(c, lambda s: s["progress"].update(step=4)),
    "NaN": lambda c: rewritten(c, lambda s: s["progress"].update(seconds=float("nan"))),
    "text for a number": lambda c: rewritten(c, lambda s: s["progress"].update(best_step="1")),
    "a huge number": lambda c: rewritten(c, lambda s: s["progress"].update(trained_tokens=10**30)),
    "an unknown key": lambda c: rewritten(c, lambda s: s["progress"].update(x=1)),
    "a loss that is NaN": lambda c: rewritten(c, lambda s: s["progress"].update(window=[[float("nan"), 1.0]])),
    "no optimizer": lambda c: rewritten(c, lambda s: s.pop("optimizer")),
    "a name for an index": lambda c: rewritten(c, lambda s: s["optimizer"].update(state={"a": {}})),
    "a random state out of range": lambda c: rewritten(c, lambda s: s["random"][0]["numpy"]["state"].update(pos=10**6)),
    "a list of records": lambda c: rewritten(c, lambda s: s.update(random=[])),
    "an absurd header": lambda c: rewritten(c, lambda s: None) and huge_header(c / "weights.safetensors"),
}  # fmt: skip


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)


def huge_header(file: Path) -> None:
    header = b'{"a.lora_A": {"dtype": "F32", "shape": [9999999999, 99], "data_offsets": [0, 24]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, snapshot(2), None)
    bad = save_checkpoint(tmp_path, snapshot(3), None)
    DAMAGE[damage](bad)
    with pytest.raises(UserError, match="corrupt or incomplete checkpoint") as caught:
        load_checkpoint(bad)
    assert len(str(caught.value).splitlines()) == 1
    said: list[str] = []
    assert next(readable_checkpoints(tmp_path, said.append))[0] == good
    assert [line.startswith(f"warning: skipped: {bad}: ") for line in said] == [True]


def test_what_was_skipped_is_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, snapshot(step), None)
    (tmp_path / "step-4").symlink_to(tmp_path / "step-1")
    (tmp_path / "step-5").write_text("not a directory")
    set_aside_after(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1", "step-2"]
    assert names(tmp_path)[2:] == ["step-3.corrupt", "step-4.corrupt", "step-5.corrupt"]
    set_aside_after(tmp_path, 1)
    (tmp_path / "step-2").mkdir()
    set_aside_after(tmp_path, 1)
    assert len(names(tmp_path)) == 5


def test_no_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="incomplete checkpoint"):
        load_checkpoint(tmp_path)
