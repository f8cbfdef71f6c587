from __future__ import annotations

import importlib.abc
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import lorakit
from lorakit import registry
from lorakit.__main__ import main as start
from lorakit.cli import main as cli
from lorakit.errors import Interrupted, TrainingError, UserError

REPO = Path(__file__).resolve().parents[2]
GOOD = """\
model: {name_or_path: some/model}
adapter: {method: lora}
task: {name: completion, path: data.jsonl}
train: {output_dir: runs/x}
"""
HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy")


def process(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), **extra}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path / "good.yaml"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"lorakit {lorakit.__version__}\n"


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [info.name or info.callback.__name__ for info in cli.app.registered_commands]
    assert {"validate", "schema", "methods", "tasks"} <= set(commands)
    for command in commands:
        assert cli.run([command, "--help"]) == 0
        assert f"Example: lorakit {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *(info.name for info in cli.app.registered_commands)])
def test_help_fits_into_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Summaries are whole, examples can be copied, and names of files are not divided."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "{" not in lines[0]
    _usage, *text = lines
    assert [line for line in text if len(line) > 80 or line.endswith(("...", "-"))] == []
    examples = [index for index, line in enumerate(lines) if "Example: " in line]
    assert examples
    assert all(index + 1 == len(lines) or not lines[index + 1].strip() for index in examples)


def test_validate_prints_a_line_for_each_good_recipe(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["validate", "good.yaml", str(good)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "good.yaml: valid (some/model, lora, completion)",
        f"{good}: valid (some/model, lora, completion)",
    ]
    assert shown.err == ""


def test_validate_shows_the_problems_of_all_files(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("one.yaml").write_text(GOOD.replace("method: lora", "method: loro"))
    Path("two.yaml").write_text(GOOD.replace("output_dir", "outputdir"))
    assert cli.run(["validate", "one.yaml", "good.yaml", "two.yaml"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "good.yaml: valid (some/model, lora, completion)\n"
    lines = shown.err.splitlines()
    assert [re.split("[:,]", line)[1].strip() for line in lines] == [
        "one.yaml",
        "two.yaml",
        "two.yaml",
    ]
    assert all(line.startswith("error: ") for line in lines)


def test_validate_names_the_recipe_of_a_bad_override(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("two.yaml").write_text(GOOD)
    assert cli.run(["validate", "good.yaml", "two.yaml", "--set", "train.sed=1"]) == 2
    starts = ["error: good.yaml: --set: train.sed = 1: ", "error: two.yaml: --set: train.sed = 1: "]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("unknown")[0] for line in lines] == starts
    assert cli.run(["validate", "good.yaml", "--set", "train.sed=1"]) == 2
    assert capsys.readouterr().err.startswith("error: --set: train.sed = 1: ")


def test_validate_json(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(GOOD + "trian: {}\n")
    assert cli.run(["validate", "good.yaml", "bad.yaml", "--json"]) == 2
    results = json.loads(capsys.readouterr().out)
    assert [result["valid"] for result in results] == [True, False]
    (problem,) = results[1]["problems"]
    assert (problem["file"], problem["line"], problem["key"]) == ("bad.yaml", 5, "trian")
    assert set(problem) == {"file", "line", "key", "value", "message", "allowed"}


def test_set(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["validate", "good.yaml", "--set", "model.name_or_path=other"]) == 0
    assert "(other, lora, completion)" in capsys.readouterr().out


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "lorakit recipe"


@pytest.mark.parametrize("command", ["methods", "tasks"])
def test_lists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(registry.methods() if command == "methods" else registry.tasks())
    assert cli.run([command]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    assert cli.run([command, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in listed] == names
    assert all(item["summary"] for item in listed)


@pytest.mark.parametrize("command", ["methods", "tasks"])
def test_lists_fit_80_columns_and_have_the_facts_of_the_json(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert cli.run([command, "--json"]) == 0
    for line, facts in zip(lines, json.loads(capsys.readouterr().out), strict=True):
        assert facts["summary"] in line
        assert (facts["source"] or "") in line
        for rate in facts.get("usual_learning_rates", ()):
            assert rate in [float(word) for word in line.split() if re.fullmatch(r"\de-\d", word)]


def test_the_json_of_methods_has_links_and_that_of_tasks_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["methods", "--json"]) == 0
    methods = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert methods["lora"]["url"] == "https://arxiv.org/abs/2106.09685"
    assert methods["full"]["url"] is None
    assert methods["lora"]["usual_learning_rates"] == [2e-4, 1e-3]
    assert cli.run(["tasks", "--json"]) == 0
    tasks = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert tasks["glue/mnli"]["columns"] == [["premise", "hypothesis", "label"]]
    assert ["messages"] in tasks["chat"]["columns"]
    assert (tasks["chat"]["model"], tasks["glue/mnli"]["model"]) == ("causal", "encoder")


@pytest.mark.parametrize(
    "arguments",
    [["no-such-command"], ["validate"], ["validate", "--no-such-option"], ["schema", "x"]],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    command = "lorakit" if arguments == ["no-such-command"] else f"lorakit {arguments[0]}"
    assert line.startswith("error: ")
    assert line.endswith(f"; hint: {command} --help")


def test_a_similar_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tran"]) == 2
    expected = "error: no such command 'tran' (did you mean 'train'?); hint: lorakit --help\n"
    assert capsys.readouterr().err == expected


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    assert "Usage: lorakit" in capsys.readouterr().err


def test_the_tasks_are_sorted_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == sorted(lines)
    assert len({line.partition(" ")[2] for line in lines}) == len(lines)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, BaseException]:
    """Replace the commands with one that raises the exception under the key ``error``."""
    raised: dict[str, BaseException] = {}
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise raised["error"]

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("LORAKIT_TRACEBACK", raising=False)
    return raised


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingError("the loss is NaN in step 3"), 1),
        (UserError("train.seed = x: not a number"), 2),
    ],
)
def test_exit_codes(
    failing: dict[str, BaseException],
    error: BaseException,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing["error"] = error
    assert cli.run([]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Interrupted("saved step-3", 2), 130, "saved step-3\nresume with --resume auto"),
        (Interrupted("saved step-3", 15, "resume: it"), 143, "saved step-3\nresume: it"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "terminated"),
    ],
)
def test_an_interrupt_is_no_error(
    failing: dict[str, BaseException],
    error: BaseException,
    code: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing["error"] = error
    assert cli.run([]) == code
    assert capsys.readouterr().err == f"{text}\n"


def test_an_interrupt_that_a_library_turned_into_an_error(
    failing: dict[str, BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise ImportError("cannot import the library") from error
    except ImportError as error:
        failing["error"] = error
    assert cli.run([]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.glob("lorakit-*.log"))


def test_summaries_fit_a_line_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["--help"]) == 0
    commands = capsys.readouterr().out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert len(commands.splitlines()) == len(cli.app.registered_commands)
    assert "..." not in commands


class _Interrupts(importlib.abc.MetaPathFinder):
    """Ctrl-C while the command line is imported."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "lorakit.cli.main":
            raise KeyboardInterrupt


def test_an_interrupt_while_the_command_line_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lorakit.cli.main")
    monkeypatch.setattr(sys, "meta_path", [_Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        start()
    assert end.value.code == 130


def test_unexpected_errors_write_a_traceback_file(
    failing: dict[str, BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing["error"] = ZeroDivisionError("one\ntwo")
    assert cli.run([]) == 1
    message = capsys.readouterr().err
    (log,) = tmp_path.glob("lorakit-*.log")
    assert message == f"error: ZeroDivisionError: one; the traceback is in {log}\n"
    assert "Traceback (most recent call last)" in log.read_text()


def test_the_traceback_is_shown_on_request(
    failing: dict[str, BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing["error"] = ZeroDivisionError("one")
    monkeypatch.setenv("LORAKIT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run([])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_missing_recipe_is_reported_before_torch_is_imported(
    command: str, tmp_path: Path
) -> None:
    code = """
import sys
from lorakit.cli.main import run
code = run([sys.argv[1], "nope.yaml"])
sys.exit(99 if "torch" in sys.modules else code)
"""
    done = process("-c", code, command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: nope.yaml: no such file\n")


def test_python_m_lorakit(tmp_path: Path) -> None:
    done = process("-m", "lorakit", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"lorakit {lorakit.__version__}\n")


def test_a_closed_pipe_prints_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", "schema"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_usage_leaves_out_hidden_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["predict", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: lorakit predict [OPTIONS] MODEL\n")


FULL_STDOUT = (
    "stdout: cannot be written: No space left on device; hint: redirect it to another file\n"
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["schema"], FULL_STDOUT),
        (["tasks"], FULL_STDOUT),
        (["--version"], FULL_STDOUT),
        (["train", "--help"], "cannot write: No space left on device; hint: free some space or "),
    ],
)
def test_a_full_disk_on_stdout_is_one_line(
    arguments: list[str], problem: str, tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {problem}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "light"),
    [(["--help"], ("pydantic", "yaml", "rich")), (["validate", "good.yaml"], ()), (["tasks"], ())],
)
def test_nothing_heavy_is_imported(
    good: Path, arguments: list[str], light: tuple[str, ...]
) -> None:
    code = (
        "import sys; from lorakit.cli.main import run; code = run(sys.argv[1:]);"
        f"print([name for name in {(*HEAVY, *light)!r} if name in sys.modules], file=sys.stderr);"
        "sys.exit(code)"
    )
    done = process("-c", code, *arguments, cwd=good.parent)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]")


@pytest.mark.parametrize(
    ("arguments", "limit_seconds"), [(["--help"], 0.4), (["validate", "good.yaml"], 0.9)]
)
def test_startup_time(good: Path, arguments: list[str], limit_seconds: float) -> None:
    """The best CPU time of three runs, because wall time depends on other processes."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("-m", "lorakit", *arguments, cwd=good.parent).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < limit_seconds
