"""``lorakit report`` and ``lorakit compare``, of a run that was trained and of others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit
from lorakit.cli.main import run
from tests.reports.files import write_run, write_sweep_files
from tests.training.runs import recipe_for, tree

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_for(tmp_path_factory.mktemp("trained"), tiny_bert, "glue/sst2")
    return lorakit.train(recipe).output_dir


def done(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    out, err = told(capsys, *arguments)
    assert err == ""
    return out


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """What a command that succeeds prints to stdout and to stderr."""
    assert run([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    return out, err


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The message about wrong input, after which ``folder`` is as it was."""
    before = tree(folder)
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert tree(folder) == before
    return err


def test_a_page_about_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "report.html"
    assert done(capsys, "report", trained) == f"{file}\n"
    page = file.read_text(encoding="utf-8")
    record = json.loads((trained / "run.json").read_text())
    assert f"{record['metrics']['accuracy']:.4f}" in page
    assert "red green blue one" in page, "a sample of the data"
    assert done(capsys, "report", trained, "--no-samples") == f"{file}\n"
    assert "red green blue one" not in file.read_text(encoding="utf-8")
    assert lorakit.report(trained) == file
    assert file.read_text(encoding="utf-8") == page
    file.unlink()


def test_several_runs_and_a_sweep(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep_files(tmp_path / "sweep")
    out, err = told(capsys, "report", sweep, trained)
    assert out == f"{sweep / 'report.html'}\n"
    assert err == "written to the first run's directory; --output FILE.html names another file\n"
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert all(f'"name":"{name}"' in page for name in ("r=8", "r=1", "r=2", "run"))
    output = tmp_path / "page.html"
    assert done(capsys, "report", trained, "--output", output) == f"{output}\n"


def test_only_reports_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, file = write_run(tmp_path / "run"), tmp_path / "notes.html"
    file.write_text("<p>mine</p>")
    message = refused(capsys, tmp_path, "report", one, "--output", file)
    assert message == (
        f"error: --output {file}: exists and is not a report of lorakit; replace it with "
        "--overwrite, or name another file\n"
    )
    done(capsys, "report", one, "--output", file, "--overwrite")
    done(capsys, "report", one, "--output", file)
    assert "lorakit report" in file.read_text()
    link = tmp_path / "link.html"
    link.symlink_to(file)
    done(capsys, "report", one, "--output", link)
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: no such directory; allowed: that of a run or of a sweep"),
        (["empty"], "empty: contains neither a run nor a sweep: none of run.json"),
        (["run", "--output", "absent/x.html"], "--output absent/x.html: directory absent does not"),
        (["run", "--output", "empty"], "--output empty: is not a file"),
        (["run", "--port", "1"], "--port 1: requires --serve"),
        (["run", "--serve", "--output", "x"], "--serve and --output are mutually exclusive"),
        (["run", "--serve", "--overwrite"], "--serve and --overwrite are mutually exclusive"),
        (["run", "--serve", "--port", "70000"], "less than or equal to 65535"),
        (["run", "--output", "x" * 300], "File name too long"),
        ([], "missing argument"),
    ],
)
def test_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert message in refused(capsys, tmp_path, "report", *arguments)


def test_compare_prints_a_table_or_json(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(trained, tmp_path / "other")
    recipe = (other / "recipe.yaml").read_text()
    assert recipe.count("seed: 7") == 1
    (other / "recipe.yaml").write_text(recipe.replace("seed: 7", "seed: 8"))
    lines = done(capsys, "compare", trained, other).splitlines()
    assert lines[0].split() == ["run", "other"]
    assert lines[-1].split() == ["train.seed", "7", "8"]
    found = json.loads(done(capsys, "compare", trained, other, "--json"))
    assert found == lorakit.compare(trained, other).as_json()
    assert found["differences"] == [{"key": "train.seed", "values": [7, 8]}]
    assert [own["name"] for own in found["runs"]] == ["run", "other"]
    assert "no such directory" in refused(capsys, tmp_path, "compare", tmp_path / "absent")


def test_names_cannot_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_directory = write_run(tmp_path / "a\x1b[2Jb", record={"exit_reason": "\x1b[31mred"})
    out, err = told(capsys, "compare", run_directory)
    assert err.startswith("warning: a\\x1b[2Jb: recipe.yaml: not readable: ")
    assert "\x1b" not in out + err
    assert "\x1b" not in done(capsys, "report", run_directory)


def test_no_tensor_library_is_imported(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code = (
        "import sys\nfrom lorakit.cli.main import run\n"
        f"assert run(['report', {str(tmp_path / 'run')!r}]) == 0\n"
        f"assert run(['compare', {str(tmp_path / 'run')!r}]) == 0\n"
        "print([name for name in ('torch', 'numpy', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert found.stdout.splitlines()[-1] == "[]"
