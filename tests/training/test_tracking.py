from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lorakit.errors import UserError
from lorakit.training.run import train
from lorakit.training.tracking import Display, MetricsFile, check_trackers
from tests.training.runs import recipe_for


def test_metrics_are_written_immediately(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file)
    metrics.write({"step": 1, "loss": 0.5})
    assert json.loads(file.read_text()) == {"step": 1, "loss": 0.5}
    metrics.write({"step": 2})
    assert metrics.lines == 2
    metrics.close()


def test_a_resumed_file_keeps_the_lines_before_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": {}}\n{"st')
    metrics = MetricsFile(file, keep=2)
    metrics.write({"step": 3})
    metrics.close()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert metrics.lines == 3
    assert list(tmp_path.iterdir()) == [file]


def test_damaged_lines_after_the_checkpoint_do_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": \xa3\x00\n')
    metrics = MetricsFile(file, keep=1)
    metrics.close()
    assert file.read_text() == '{"step": 1}\n'


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st')
    MetricsFile(file, keep=2).close()
    assert file.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("keep", [0, 2])
def test_a_missing_file(keep: int, tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", keep)
    metrics.close()
    assert metrics.lines == 0


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(total_steps=20, done=10)
    display.advance(11)
    display.log(
        {"step": 12, "loss": 1.5, "learning_rate": 2e-4, "tokens_per_second": 12345.6,
         "peak_memory_bytes": 3 * 2**30}
    )  # fmt: skip
    display.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("step 12/20  loss 1.5000  lr 2.00e-04  12,346 tok/s  3.0 GiB  00:00 left")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    check_trackers(["tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.trackers: 'wandb' is not installed"):
        check_trackers(["wandb"])


#: What W&B is called with; its own settings come from the environment, as the real one's do.
_WANDB = """
import json, os, pathlib

class Run:
    def __init__(self, **given):
        names = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "entity": "WANDB_ENTITY",
                 "group": "WANDB_RUN_GROUP", "dir": "WANDB_DIR", "mode": "WANDB_MODE"}
        settings = {key: given.get(key) or os.environ.get(name) for key, name in names.items()}
        pathlib.Path(__file__).with_name("settings.json").write_text(json.dumps(settings))

    def log(self, values, step=None):
        pass

    def finish(self):
        pass

class config:
    update = staticmethod(lambda values, allow_val_change: None)

def init(**given):
    return Run(**given)
"""


@pytest.mark.parametrize("project", [None, "mine"])
def test_the_environment_of_wandb_goes_before_our_defaults(
    project: str | None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(_WANDB, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    theirs = {"name": "n", "entity": "e", "group": "g", "dir": "d", "mode": "offline"}
    names = {"group": "RUN_GROUP"}
    for key, value in theirs.items():
        monkeypatch.setenv(f"WANDB_{names.get(key, key.upper())}", value)
    if project is None:
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
    else:
        monkeypatch.setenv("WANDB_PROJECT", project)
    keys = {"train__trackers": ["wandb", "tensorboard"], "train__epochs": None}
    train(recipe_for(tmp_path, tiny_llama, train__max_steps=1, **keys))
    sys.modules.pop("wandb", None)
    settings = json.loads((tmp_path / "site" / "settings.json").read_text())
    assert settings == {"project": project or "lorakit", **theirs}
    assert (tmp_path / "run" / "lorakit").is_dir()  # TensorBoard's
