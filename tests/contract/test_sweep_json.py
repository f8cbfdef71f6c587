"""The contract of a sweep's directory: the keys of sweep.json, and what stands beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lorakit
from tests.sweeps.files import write_sweep

MEMBER_KEYS = [
    "name", "set", "status", "metrics", "trainable_parameters", "seconds", "adapter_dir", "error"
]  # fmt: skip


def test_sweep_json(tiny_bert: Path, tmp_path: Path) -> None:
    grid = {"adapter.target_modules": [["q"], ["none"]], "train.seed": [1, 2]}
    lorakit.sweep(write_sweep(tmp_path, tiny_bert, "glue/sst2", grid=grid))
    out = tmp_path / "out"
    found = json.loads((out / "sweep.json").read_text())
    assert list(found) == ["metric", "members", "groups", "best"]
    assert found["metric"] == "accuracy"
    for member in found["members"]:
        assert list(member) == MEMBER_KEYS
    good, _, bad, _ = found["members"]
    assert good["name"] == "target_modules=q,seed=1"
    assert good["set"] == {"adapter.target_modules": ["q"], "train.seed": 1}
    assert good["status"] == "completed"
    assert set(good["metrics"]) == {"loss", "accuracy"}
    assert isinstance(good["trainable_parameters"], int)
    assert good["seconds"] > 0
    assert Path(good["adapter_dir"], "adapter_config.json").is_file()
    assert good["error"] is None
    assert bad["status"] == "failed"
    assert (bad["metrics"], bad["adapter_dir"], bad["seconds"]) == ({}, None, None)
    assert "none" in bad["error"]
    first, second = found["groups"]
    assert {"mean", "std", "n"} <= set(first)
    assert first["members"] == ["target_modules=q,seed=1", "target_modules=q,seed=2"]
    assert first["n"] == 2
    assert all(map(math.isfinite, (first["mean"], first["std"])))
    assert (second["mean"], second["std"], second["n"]) == (None, None, 0)
    assert found["best"] in first["members"]
    for name in ("table.md", "table.csv", "plots/target_modules.png", "plots/target_modules.svg"):
        assert (out / name).is_file()
    assert sorted(path.name for path in (out / "members").iterdir()) == sorted(
        member["name"] for member in found["members"]
    )
