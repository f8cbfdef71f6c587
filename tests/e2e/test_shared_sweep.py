"""``lorakit sweep`` in several processes, which share the members."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import launch
from tests.e2e.shared_runs import FSDP
from tests.sweeps.files import sweep_json, write_sweep
from tests.training.runs import adapter_bytes, checkpoint_names, learning, run_json, tree

#: Members that train together, one of which fails, and one that trains alone. Without a grid, there
#: are no plots, whose library takes longer to import than a member to train.
MEMBERS = [
    *({"name": f"r={r}", "set": {"adapter.r": r}} for r in (1, 2, 4)),
    {"name": "fails", "set": {"train.learning_rate": 1e15}},
    {"name": "alone", "set": {"adapter.method": "full"}},
]
Ended = list[tuple[int, str, str]]


@dataclass
class Whole:
    """A sweep file, and the directory of its run in one process."""

    file: Path
    folder: Path


@pytest.fixture(scope="module")
def whole(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    folder = tmp_path_factory.mktemp("sweep")
    file = write_sweep(
        folder, tiny_llama, members=MEMBERS, set={"train.save_every_steps": 2},
        joint="auto" if request.param else False,
    )  # fmt: skip
    [(code, _, err)] = sweep(1, file, folder / "whole")
    assert code == 1, err
    return Whole(file, folder / "whole")


def sweep(processes: int, file: Path, folder: Path, *more: object, **options: Any) -> Ended:
    command = ("-m", "lorakit", "sweep", file, "--output-dir", folder, *more)
    return launch(processes, *command, **options)


def said(ended: Ended, *codes: int) -> list[str]:
    """What all processes printed to stderr; only the first one printed a result."""
    err = "".join(err for _, _, err in ended)
    assert [code for code, _, _ in ended] == list(codes), err
    assert "Traceback" not in err
    assert not any(out for _, out, _ in ended[1:])
    return err.splitlines()


def assert_same(folder: Path, whole: Whole) -> None:
    """Equal but for times and, of members that train together, for rounding."""
    text = json.dumps(sweep_json(folder)).replace(str(folder), str(whole.folder))
    found, wanted = json.loads(text), sweep_json(whole.folder)
    for own, other in zip(found["members"], wanted["members"], strict=True):
        for key in ("name", "set", "status", "trainable_parameters", "error", "adapter_dir"):
            assert own[key] == other[key]
        assert own["metrics"] == pytest.approx(other["metrics"], abs=1e-4)
        if own["status"] == "completed":
            runs = [path / "members" / own["name"] for path in (folder, whole.folder)]
            assert run_json(runs[0])["hardware"].get("processes") in (None, 1)
            if own["name"] == "alone" or not json.loads(whole.file.read_text())["joint"]:
                assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])
                assert learning(runs[0]) == learning(runs[1])
    assert found["best"] == wanted["best"]
    assert [group["n"] for group in found["groups"]] == [group["n"] for group in wanted["groups"]]
    table = (folder / "table.csv").read_text().splitlines()
    assert len(table) == len((whole.folder / "table.csv").read_text().splitlines())


@pytest.mark.parametrize("whole", [True], indirect=True, ids=["joint"])
def test_two_processes_equal_one(whole: Whole, tmp_path: Path) -> None:
    ended = sweep(2, whole.file, tmp_path / "out")
    lines = said(ended, 1, 1)
    assert ended[1] == (1, "", "")
    assert_same(tmp_path / "out", whole)
    assert ended[0][1].splitlines()[0].split()[-1] == "best"
    for member in sweep_json(tmp_path / "out")["members"]:
        name, status = member["name"], member["status"]
        assert [line for line in lines if line.startswith(f"{name}: started (")]
        assert [line for line in lines if line.startswith(f"{name}: {status}")]
    processes = {
        run_json(folder)["process"].split(":")[1]
        for folder in (tmp_path / "out" / "members").iterdir()
    }
    assert len(processes) == 2
    ended = sweep(2, whole.file, tmp_path / "out")
    (line,) = said(ended, 2, 2)
    assert line.endswith("contains a sweep; continue it with --resume, or choose another directory")


@pytest.mark.parametrize("whole", [True], indirect=True, ids=["joint"])
def test_a_dry_run_gives_each_process_a_job(whole: Whole, tmp_path: Path) -> None:
    ended = sweep(2, whole.file, tmp_path / "out", "--dry-run", "--json")
    said(ended, 0, 0)
    jobs = [each["members"] for each in json.loads(ended[0][1])["jobs"]]
    names = [name for each in jobs for name in each]
    assert sorted(names) == sorted(m["name"] for m in sweep_json(whole.folder)["members"])
    assert [len(each) for each in jobs] == [2, 2, 1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [False], indirect=True, ids=["alone"])
@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_process_stops_both(process: int, whole: Whole, tmp_path: Path) -> None:
    """And another number of processes continues."""
    folder = tmp_path / "out"
    fault = {"at_call": ("lorakit.training.loop:Loop.save", 1), "signal": int(signal.SIGTERM)}
    ended = sweep(2, whole.file, folder, faults={process: fault})
    lines = said(ended, 143, 143)
    assert "interrupted" in lines[-2]
    assert lines[-2].endswith(" of 5 members have finished")
    assert lines[-1] == "resume with --resume"
    assert ended[1][2] == ""
    started = [file.parent for file in folder.glob("members/*/run.json")]
    assert any(checkpoint_names(run) for run in started)
    assert "interrupted" in {run_json(run)["exit_reason"] for run in started}
    [(code, _, err)] = sweep(1, whole.file, folder, "--resume")
    assert code == 1, err
    assert_same(folder, whole)


@pytest.mark.parametrize("whole", [True], indirect=True, ids=["joint"])
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other(victim: int, whole: Whole, tmp_path: Path) -> None:
    codes = [1, 1]
    codes[victim] = -signal.SIGKILL
    fault = {"at_call": ("lorakit.training.loop:Loop.save", 1)}
    ended = sweep(2, whole.file, tmp_path / "out", faults={victim: fault})
    lines = said(ended, *codes)
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert line == (
        "error: the connection to another process is lost (was it killed?); resume with --resume"
    )
    said(sweep(2, whole.file, tmp_path / "out", "--resume"), 1, 1)
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("whole", [False], indirect=True, ids=["alone"])
def test_an_error_of_the_first_process_ends_the_other(whole: Whole, tmp_path: Path) -> None:
    ended = sweep(2, whole.file, tmp_path / "out", faults={0: {"max_file_bytes": 1000}})
    (line,) = said(ended, 1, 1)
    assert "recipe.yaml: cannot be written: File too large" in line


@pytest.mark.parametrize("whole", [True], indirect=True, ids=["joint"])
@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        (["--halving"], {}, "halving: not supported with several processes, which do not measure"),
        (["--ray", "local"], {}, "--ray cannot be combined with torchrun or accelerate launch; "),
        ([], FSDP, "accelerate launch: FSDP: lorakit sweep trains each member in one process; "),
    ],
)
def test_what_processes_cannot_share(
    options: list[str], variables: dict[str, str], message: str, whole: Whole, tmp_path: Path
) -> None:
    before = tree(whole.file.parent)
    epochs = ("--set", "train.epochs=2")  # with an evaluation before the last
    ended = sweep(2, whole.file, tmp_path / "out", *epochs, *options, **variables)
    (line,) = said(ended, 2, 2)
    assert message in line
    assert tree(whole.file.parent) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [True], indirect=True, ids=["joint"])
def test_processes_with_other_members(whole: Whole, tmp_path: Path) -> None:
    keys = json.loads(whole.file.read_text())
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(keys | {"set": {"train.lr_scheduler": "${SCHEDULER:-linear}"}}))
    other = {"environment": {"SCHEDULER": "cosine"}}
    (line,) = said(sweep(2, file, tmp_path / "out", faults={1: other}), 2, 2)
    assert "the members in process 1 on " in line
    assert not (tmp_path / "out").exists()
