from __future__ import annotations

import json
import subprocess
from pathlib import Path

from lorakit.injection import AdaptedModule, InjectionReport
from lorakit.training.record import git_commit, new_record, versions


def test_run_json_is_replaced_atomically(tmp_path: Path) -> None:
    module = AdaptedModule("layers.0.q", (4, 3), 2)
    report = InjectionReport("lora", (module,), (), 14, 100)
    record = new_record(report, {"device": "cpu"}, 7, {"train": {"rows": 3}})
    file = tmp_path / "run.json"
    record.write(file)
    record.exit_reason = "completed"
    record.write(file)
    found = json.loads(file.read_text())
    assert found["adapted_modules"] == [{"name": "layers.0.q", "shape": [4, 3], "r": 2}]
    assert found["exit_reason"] == "completed"
    assert list(tmp_path.iterdir()) == [file]


def test_versions_of_the_packages_that_decide_the_results() -> None:
    import torch

    assert versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"python", "transformers", "safetensors"} <= versions().keys()


def test_git_commit_of_the_working_directory(in_tmp: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_commit() is None
    git("init")
    assert git_commit() is None, "no commit yet"
    git("commit", "--allow-empty", "-m", "first")
    assert git_commit() == git("rev-parse", "HEAD")
