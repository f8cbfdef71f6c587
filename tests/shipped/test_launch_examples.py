"""docs/examples/: the scripts for clusters start torchrun with options that it and lorakit have."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from tests.shipped.test_docs import CODE, COMMANDS, DOCS, FENCE, prose

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
SLURM = EXAMPLES / "slurm.sh"
#: The keys of kubeflow.org/v1 that the manifest may use, by the keys that lead to them.
KNOWN = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "spec.elasticPolicy": {"maxReplicas", "maxRestarts", "minReplicas", "rdzvBackend", "rdzvId"},
    "spec.runPolicy": {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy"},
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "restartPolicy", "template"},
    "spec.pytorchReplicaSpecs.Worker.template": {"metadata", "spec"},
    "spec.pytorchReplicaSpecs.Worker.template.spec": {
        "containers", "terminationGracePeriodSeconds", "volumes",
    },
}  # fmt: skip


def check_command(words: list[str]) -> None:
    """Raise SystemExit or AssertionError for what torchrun or lorakit does not accept."""
    assert words[0] == "torchrun"
    options = get_args_parser().parse_args(words[1:])
    assert (options.module, options.training_script) == (True, "lorakit")
    command, *arguments = options.training_script_args
    assert {word for word in arguments if word.startswith("--")} <= COMMANDS[command]


def test_the_manifest_has_only_known_keys() -> None:
    manifest = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    for path, keys in KNOWN.items():
        found: Any = manifest
        for key in filter(None, path.split(".")):
            found = found[key]
        assert set(found) <= keys, path
    assert isinstance(manifest["spec"]["nprocPerNode"], str)
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert manifest["spec"]["elasticPolicy"]["minReplicas"] == worker["replicas"]
    pod = worker["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch"
    check_command(container["command"])
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    wait = {each["name"]: each["value"] for each in container["env"]}
    assert int(wait["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with SLURM's commands, which write down how they are called."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    commands = {
        "srun": 'echo "$@" > srun; sleep 0.05; [[ -z "$REASON" ]] || '
        'echo "{\\"exit_reason\\": \\"$REASON\\"}" > "$RUN/run.json"; exit "$CODE"',
        "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo "$@" > scontrol; fi',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "commands").mkdir()
    for name in commands:
        (tmp_path / name).rename(tmp_path / "commands" / name)
    return os.environ | {
        "PATH": f"{tmp_path / 'commands'}{os.pathsep}{os.environ['PATH']}", "RUN": "run",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "code", "queued_again"),
    [("completed", 0, False), ("interrupted", 1, True), ("failed", 1, False), ("", 1, False)],
)
def test_only_a_run_that_a_signal_stopped_is_queued_again(
    reason: str, code: int, queued_again: bool, cluster: dict[str, str], tmp_path: Path
) -> None:
    """Not one that is refused at its start and leaves an earlier record alone."""
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps({"exit_reason": "interrupted"}))
    os.utime(record, (1, 1))
    done = subprocess.run(
        ["bash", SLURM, "recipe.yaml", "run"], cwd=tmp_path, capture_output=True, text=True,
        env=cluster | {"REASON": reason, "CODE": str(code)}, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    words = shlex.split((tmp_path / "srun").read_text())
    check_command(words)
    assert "node1:29500" in words
    asked = tmp_path / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if queued_again else "")


def test_the_commands_of_the_page_are_accepted() -> None:
    page = DOCS["docs/distributed.md"].replace("\\\n", " ")
    blocks = [body for language, _, body in FENCE.findall(page) if language == "bash"]
    commands = [line for body in blocks for line in body.splitlines()] + CODE.findall(prose(page))
    launched = [shlex.split(line) for line in commands if " -m lorakit " in line]
    assert {words[0] for words in launched} == {"torchrun", "accelerate"}
    for words in launched:
        if words[0] == "torchrun":
            check_command(words)
            continue
        options = launch_command_parser().parse_args(words[2:])
        assert options.module
        assert (EXAMPLES.parents[1] / options.config_file).is_file()
        assert words[1:2] + options.training_script_args[:1] == ["launch", "train"]
