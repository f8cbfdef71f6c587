"""What SECURITY.md promises and no other test covers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli.main import run
from tests.training.runs import write_recipe_file

REPO = Path(__file__).resolve().parents[2]
SECRETS = {
    name: f"{name.lower()}-secret-0123456789"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}


def lorakit(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorakit", *map(str, arguments)],
        env={**os.environ, **SECRETS, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_no_secrets(done: subprocess.CompletedProcess[str], *folders: Path) -> None:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    texts = [done.stdout.encode(), done.stderr.encode(), *(file.read_bytes() for file in files)]
    for secret in SECRETS.values():
        assert not any(secret.encode() in text for text in texts)


def test_tokens_of_the_environment_are_not_written(tiny_llama: Path, tmp_path: Path) -> None:
    """Not into the run's files, TensorBoard's included, nor into messages."""
    recipe = write_recipe_file(
        tmp_path, tiny_llama, "completion", train__epochs=1, train__trackers=["tensorboard"]
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = lorakit(temporary, "train", recipe)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "README.md").is_file()
    assert_no_secrets(done, tmp_path)
    missing = lorakit(temporary, "train", recipe, "--set", "model.name_or_path=no/such-model")
    assert missing.returncode == 2
    assert_no_secrets(missing, tmp_path)


def test_the_log_of_a_traceback_has_no_values_of_variables(tmp_path: Path) -> None:
    """Its messages may name files; it contains source lines, but no values."""
    program = (
        "import os, sys, typer\n"
        "from lorakit.cli import main\n"
        "@main.app.command('fail')\n"
        "def fail() -> None:\n"
        "    token = os.environ['HF_TOKEN']\n"
        "    raise RuntimeError('a bug')\n"
        "sys.exit(main.run(['fail']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **SECRETS, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "error: RuntimeError: a bug; the traceback is in" in done.stderr
    assert len(list(tmp_path.glob("lorakit-*.log"))) == 1
    assert_no_secrets(done, tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ messages.append(m) }}{% endfor %}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(
    template: str, tiny_llama: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = in_tmp / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text(template)
    chats = in_tmp / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert run(["generate", str(model), "--input", str(chats)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "chat template" in shown.err
    assert not (in_tmp / "pwned").exists()


def test_nothing_but_a_restricted_loader_reads_pickles() -> None:
    """``torch.load(weights_only=True)`` reads loralib's checkpoints; nothing else unpickles."""
    loads = re.compile(r"pickle\.loads?\(|torch\.load\(|Unpickler\(|joblib|allow_pickle=True")
    calls = [
        (file.name, line.strip())
        for file in sorted((REPO / "lorakit").rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if loads.search(line) and not line.startswith("#")
    ]
    assert calls == [
        ("loralib.py", 'state = torch.load(file, map_location="cpu", weights_only=True)')
    ]


def test_each_test_that_the_policy_names_exists() -> None:
    text = (REPO / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(named) >= 6
    for name in named:
        assert (REPO / name).is_file(), name
    assert "private vulnerability reporting" in text
