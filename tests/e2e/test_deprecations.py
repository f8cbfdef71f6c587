"""stderr shows nothing that only the developers can act on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.training.runs import write_recipe_file

#: One process for all: what transformers says, it says once a process.
_RUN_ALL = """
import sys
from lorakit.cli.main import run

for line in sys.stdin.read().splitlines():
    assert run(line.split("\\t")) == 0, line
"""


def test_no_command_triggers_a_deprecation_warning(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    (tmp_path / "causal").mkdir()
    (tmp_path / "encoder").mkdir()
    short = {"train__gradient_checkpointing": True, "train__epochs": 1}
    # More tokens than a round of generation has, so that one goes on from another's cache.
    generates = {"task__eval_generate": "always", "task__max_new_tokens": 12}
    causal = write_recipe_file(
        tmp_path / "causal", tiny_llama, "completion", **generates, **short,
    )  # fmt: skip
    encoder = write_recipe_file(tmp_path / "encoder", tiny_bert, "glue/sst2", **short)
    adapter = tmp_path / "causal" / "run" / "adapter"
    say = ["generate", tiny_llama, "--adapter", adapter, "--prompt", "one", "--max-new-tokens", 9]
    commands: list[list[object]] = [
        ["train", causal],
        ["train", causal, "--output-dir", tmp_path / "packed", "--set", "task.packing=true"],
        ["train", encoder],
        ["eval", causal],
        ["eval", encoder],
        say,
        [*say, "--num-beams", 2],
        ["merge", tiny_llama, adapter, tmp_path / "merged"],
    ]
    lines = "\n".join("\t".join(map(str, command)) for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL], input=lines, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "deprecat" in line or "Warning" in line]
    assert said == []
    assert "[transformers]" not in done.stderr
