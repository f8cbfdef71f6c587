"""User tasks and user metrics: what is loaded and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError, Problem, RecipeError, UserError
from lorakit.recipe.check import check_recipe
from lorakit.recipe.load import load_recipe

TASK = """
from lorakit.recipe.sections import TaskSection
from lorakit.tasks.base import Task

class MyConfig(TaskSection):
    shift: int = 0

class My(Task):
    Config = MyConfig
    kind = "causal"

    def columns(self, config):
        return ("a",)

    def example(self, row, config):
        return row["b"]

    def metrics(self, predictions, split, config):
        return {"own": float(len(predictions))}

    def main_metric(self, config):
        return "own"

ready = My()
number = 3

class Half(Task):
    Config = MyConfig
    kind = "causal"

class Kindless(My):
    kind = "both"

class Unconfigured(My):
    Config = dict
"""
RECIPE = """\
model: {name_or_path: m}
adapter: {}
task:
  name: NAME
  path: data.jsonl
train:
  output_dir: runs/x
"""


@pytest.fixture
def my(in_tmp: Path) -> Path:
    (in_tmp / "my.py").write_text(TASK)
    return in_tmp / "my.py"


def recipe(folder: Path, name: str, more: str = "") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.replace("NAME", f"{name}{more}"))
    return file


def problems(file: Path) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    return caught.value.problems


def split_of(*rows: dict[str, Any]) -> Split:
    return Split("validation", list(rows), "rows", "0")


@pytest.mark.parametrize("name", ["./my.py:My", "my.py:ready"])
def test_a_class_or_an_instance(my: Path, name: str) -> None:
    task = registry.task(name)
    assert registry.task(name) is task
    assert name not in registry.tasks()
    loaded = load_recipe(recipe(my.parent, name, "\n  shift: 2"))
    assert (loaded.task.name, getattr(loaded.task, "shift", None)) == (name, 2)
    assert isinstance(loaded.task, task.Config)
    check_recipe(loaded)
    assert task.metrics([1, 2], split_of({}, {}), loaded.task) == {"own": 2.0}


def test_a_relative_path_is_relative_to_the_working_directory(
    my: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (my.parent / "sub").mkdir()
    assert registry.task(str(my) + ":My")
    monkeypatch.chdir(my.parent / "sub")
    assert registry.task("../my.py:My")
    with pytest.raises(UserError, match=r"my\.py: no such file \(the path is relative to "):
        registry.task("./my.py:My")


def test_a_changed_file_is_read_again(my: Path) -> None:
    before = registry.task("my.py:My")
    stat = my.stat()
    my.write_text(TASK.replace("len(predictions)", "0*len(predictions)"))
    os.utime(my, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = registry.task("my.py:My")
    assert after.metrics([1], split_of({}), after.Config(name="x")) == {"own": 0.0}
    assert before.digest != after.digest != b""
    assert registry.task("text").digest == b""


def test_keys_are_checked_as_those_of_a_built_in_task(my: Path) -> None:
    file = recipe(my.parent, "my.py:My", "\n  shfit: 2\n  shift: two\n  limit_eval: 0")
    found = problems(file)
    assert [problem.key for problem in found] == ["task.shfit", "task.shift", "task.limit_eval"]
    assert "did you mean 'shift'?" in found[0].message
    my.write_text(TASK.replace("Config = MyConfig", "Config = TaskSection"))
    assert [p.key for p in problems(recipe(my.parent, "my.py:My", "\n  shift: 2"))] == [
        "task.shift"
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./no.py:My", "no.py: no such file"),
        (
            "./my.py:Kindles",
            "the file has no 'Kindles' (did you mean 'Kindless'?); allowed: My, ready, Half",
        ),
        (
            "./my.py",
            "a class or function is missing; allowed: ./my.py:My, ./my.py:ready, ./my.py:Half",
        ),
        ("./my.py:number", "is of type int; allowed: a subclass of lorakit.tasks.base.Task"),
        ("./my.py:MyConfig", "allowed: a subclass of lorakit.tasks.base.Task"),
        ("./my.py:Half", "missing methods: columns, example; allowed: a class that defines them"),
        ("./my.py:Kindless", 'kind = "both"; allowed: causal, encoder'),
        (
            "./my.py:Unconfigured",
            "Config = <class 'dict'>; allowed: a subclass of lorakit.recipe.sections.TaskSection",
        ),
        ("./syntax.py:My", "syntax.py:2: SyntaxError: "),
        ("./raises.py:My", "raises.py:3: ZeroDivisionError: division by zero"),
        ("./imports.py:My", "imports.py:1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("./leaves.py:My", "leaves.py:2: SystemExit: 3"),
    ],
)
def test_an_invalid_task_is_refused(my: Path, name: str, said: str) -> None:
    for file, text in (
        ("syntax.py", "x = 1\ny = = 2\n"),
        ("raises.py", "def f():\n\n    return 1 / 0\nf()\n"),
        ("imports.py", "import no_such_thing\n"),
        ("leaves.py", "import sys\nsys.exit(3)\n"),
    ):
        (my.parent / file).write_text(text)
    (problem,) = problems(recipe(my.parent, name))
    assert (problem.key, problem.value, problem.line) == ("task.name", name, 4)
    assert said in problem.message
    assert "\n" not in str(problem)


def test_a_failure_in_the_file_names_its_line(my: Path) -> None:
    task = registry.task("my.py:My")
    line = TASK.split("\n").index('        return row["b"]') + 1
    with pytest.raises(DataError, match=rf"^my\.py:{line}: KeyError: 'b'$"):
        task.example({"a": 1}, task.Config(name="x"))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("float('nan')", r"my\.py:My\.metrics: own = NaN; allowed: a finite number"),
        ("None", r"own = null"),
        ("1, 'other': 2}, **{", r"returned"),
        ("10**400", r"own = 1000.*allowed: a finite number"),
        ("1.0, 'loss': 2.0", r"loss is reserved; allowed: another name"),
    ],
)
def test_invalid_scores_are_refused(my: Path, returned: str, said: str) -> None:
    text = TASK.replace("float(len(predictions))", returned)
    if "other" in returned:
        text = TASK.replace('{"own": float(len(predictions))}', "[1]")
    my.write_text(text)
    task = registry.task("my.py:My")
    with pytest.raises(DataError, match=said):
        task.metrics([1], split_of({}), task.Config(name="x"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "def example(self, row, config): return 5",
            r"\.example: returned 5; allowed: a TextExample",
        ),
        ("def prompt(self, row, config): return 'a'", r"\.prompt: returned \"a\"; allowed: a Text"),
        (
            "def stop_texts(self, config): return 'ab'",
            r"\.stop_texts: returned \"ab\"; allowed: a tup",
        ),
        (
            "def stop_texts(self, config): return ('',)",
            r"returned \[\"\"\]; allowed: a tuple of non-empty",
        ),
        ("def stop_texts(self, config): return 1 / 0", r"my\.py:\d+: ZeroDivisionError"),
        ("def main_metric(self, config): return 1 / 0", r"my\.py:\d+: ZeroDivisionError"),
        ("def prediction_counts(self, split, config): 1 / 0", r"my\.py:\d+: ZeroDivisionError"),
        ("def metrics(self, p, s, c): raise SystemExit(0)", r"my\.py:\d+: SystemExit: 0"),
    ],
)
def test_an_invalid_return_value_is_refused(my: Path, body: str, said: str) -> None:
    my.write_text(f"{TASK}\nclass Odd(My):\n    {body}\n")
    task = registry.task("my.py:Odd")
    config = task.Config(name="x")
    with pytest.raises(DataError, match=said):
        {
            "example": lambda: task.example({}, config),
            "prompt": lambda: task.prompt({}, config),
            "stop_texts": lambda: task.stop_texts(config),
            "main_metric": lambda: task.main_metric(config),
            "prediction_counts": lambda: task.prediction_counts(split_of({}), config),
            "metrics": lambda: task.metrics([1], split_of({}), config),
        }[body.split("(")[0].removeprefix("def ")]()


def test_sigterm_is_not_blamed_on_the_file(my: Path) -> None:
    body = "def stop_texts(self, config): raise SystemExit(143)"
    my.write_text(f"{TASK}\nclass Odd(My):\n    {body}\n")
    task = registry.task("my.py:Odd")
    with pytest.raises(SystemExit):
        task.stop_texts(task.Config(name="x"))


def test_the_main_metric_must_be_returned(my: Path) -> None:
    my.write_text(TASK.replace('{"own":', '{"other":'))
    task = registry.task("my.py:My")
    with pytest.raises(DataError, match='main_metric = "own"; allowed: one of other'):
        task.metrics([1], split_of({}), task.Config(name="x"))


YAML = """\
kind: completion
template: "{q} ="
completion_template: " {a}"
stop: ["\\n"]
max_new_tokens: 5
"""


def test_a_recipe_overrides_the_defaults_of_a_yaml_task(in_tmp: Path) -> None:
    (in_tmp / "my.yaml").write_text(YAML + "metric: [bleu, exact_match]\n")
    loaded: Any = load_recipe(recipe(in_tmp, "./my.yaml", "\n  stop: ['#']")).task
    check_recipe(load_recipe(in_tmp / "recipe.yaml"))
    assert (loaded.template, loaded.stop, loaded.max_new_tokens) == ("{q} =", ["#"], 5)
    task = registry.task("./my.yaml")
    row = {"q": "2 and 2", "a": "4 5 6 7"}
    assert [s.text for s in task.example(row, loaded).segments] == ["2 and 2 =", " 4 5 6 7"]
    assert task.main_metric(loaded) == "bleu"
    assert task.metrics(["4 5 6 7"], split_of(row), loaded) == {"bleu": 1.0, "exact_match": 1.0}


def test_a_yaml_classification(in_tmp: Path) -> None:
    (in_tmp / "m.py").write_text("def mean(p, r):\n    return (sum(p) - sum(r)) / len(p)\n")
    (in_tmp / "my.yaml").write_text(
        "kind: classification\ntext_column: t\nlabels: [no, yes]\n"
        "metric: [./m.py:mean, matthews_correlation]\n"
    )
    task = registry.task("my.yaml")
    config = task.Config(name="my.yaml")
    rows = split_of({"t": "a", "label": "yes"}, {"t": "b", "label": 0})
    assert task.labels(config, None) == ["no", "yes"]
    assert task.main_metric(config) == "mean"
    assert task.metrics([1, 1], rows, config) == {"mean": 0.5, "matthews_correlation": 0.0}
    with pytest.raises(DataError, match="prediction 2: 7"):
        task.metrics([1, 7], rows, config)
    digest = task.digest
    (in_tmp / "m.py").write_text("def mean(p, r):\n    return 0.25\n")
    task = registry.task("my.yaml")
    assert task.metrics([1, 1], rows, config)["mean"] == 0.25
    assert task.digest != digest


def test_a_yaml_classification_of_several_labels(in_tmp: Path) -> None:
    (in_tmp / "m.py").write_text("def same(p, r):\n    return float(p == r == [[0, 1], []])\n")
    text = "kind: classification\nmulti_label: true\nlabels: [x, y]\n"
    (in_tmp / "my.yaml").write_text(f"{text}metric: [./m.py:same, f1_micro]\n")
    task = registry.task("my.yaml")
    config = task.Config(name="my.yaml")
    rows = split_of({"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []})
    assert task.metrics([[0, 1], []], rows, config) == {"same": 1.0, "f1_micro": 1.0}
    (in_tmp / "my.yaml").write_text(text)
    assert registry.task("my.yaml").main_metric(config) == "f1_micro"
    (in_tmp / "my.yaml").write_text(f"{text}metric: accuracy\n")
    with pytest.raises(UserError, match="allowed: f1_micro, f1_macro, subset_accuracy"):
        registry.task("my.yaml")


def test_every_problem_of_a_yaml_file_at_once(in_tmp: Path) -> None:
    (in_tmp / "my.yaml").write_text(
        "kind: completion\ntemplat: x\nmax_new_tokens: 0\ntemplate: '{'\nmetric: [exact, ./m.py:f]\n"
    )
    file = recipe(in_tmp, "my.yaml", "\n  limit_train: 0")
    assert [(p.file, p.line, p.key) for p in problems(file)] == [
        (str(file), 5, "task.limit_train"),
        ("my.yaml", 2, "templat"),
        ("my.yaml", 3, "max_new_tokens"),
        ("my.yaml", 4, "template"),
        ("my.yaml", 5, "metric"),
        ("my.yaml", 5, "metric"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("template: x\n", "kind: is required; allowed: completion, classification"),
        ("kind: completions\n", "unknown kind (did you mean 'completion'?)"),
        ("kind: completion\nlabels: [a, b]\n", "unknown key"),
        ("kind: completion\nname: x\n", "unknown key"),
        ("kind: completion\nmetric: acuracy\n", "unknown metric"),
        ("kind: classification\nmetric: acuracy\n", "did you mean 'accuracy'?"),
        ("kind: classification\nregression: true\nmetric: f1\n", "allowed: pearson, spearmanr"),
        ("kind: classification\nmetric: 3\n", "not the name of a metric"),
        ("kind: classification\nmetric: []\n", "not the name of a metric"),
        ("kind: completion\nmetric: [bleu, bleu]\n", "duplicate name"),
        ("", "the file is empty; allowed: a mapping of keys to values"),
        ("kind: classification\nmetric: ./no.py:f\n", "no.py: no such file"),
        ("kind: completion\ntemplate: a\nprompt_column: b\n", "mutually exclusive"),
        ("- a\n", "the file is not a mapping"),
        ("kind: [\n", "not valid YAML"),
    ],
)
def test_an_invalid_yaml_task_is_refused(in_tmp: Path, text: str, said: str) -> None:
    (in_tmp / "my.yaml").write_text(text)
    (problem,) = problems(recipe(in_tmp, "./my.yaml"))
    assert str(problem).startswith("my.yaml")
    assert said in str(problem)


def test_a_metric_must_be_a_function(in_tmp: Path) -> None:
    (in_tmp / "m.py").write_text("f = 3\n")
    (in_tmp / "my.yaml").write_text("kind: completion\nmetric: ./m.py:f\n")
    (problem,) = problems(recipe(in_tmp, "my.yaml"))
    assert "./m.py:f: is of type int; allowed: a function" in problem.message


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def f(predictions): return 1\n", "f", "cannot be called as function(predictions, ref"),
        ("class f: pass\n", "f", "cannot be called as function(predictions, references)"),
        ("from statistics import mean as f\n", "f", "cannot be called as function("),
        ("def loss(p, r): return 1\n", "loss", "loss is reserved; allowed: another name"),
    ],
)
def test_an_invalid_metric_is_refused_before_anything_runs(
    in_tmp: Path, text: str, name: str, said: str
) -> None:
    (in_tmp / "m.py").write_text(text)
    (in_tmp / "my.yaml").write_text(f"kind: completion\nmetric: ./m.py:{name}\n")
    (problem,) = problems(recipe(in_tmp, "my.yaml"))
    assert said in str(problem)


def test_a_duplicate_key_is_reported_although_the_file_was_cached(in_tmp: Path) -> None:
    (in_tmp / "my.yaml").write_text(YAML)
    registry.task("./my.yaml")
    (in_tmp / "my.yaml").write_text(f"{YAML}kind: completion\n")
    (problem,) = problems(recipe(in_tmp, "./my.yaml"))
    assert "duplicate key 'kind'" in str(problem)


def test_a_user_task_names_its_own_metrics(in_tmp: Path) -> None:
    (in_tmp / "my.yaml").write_text(YAML)
    file = recipe(in_tmp, "./my.yaml")
    file.write_text(file.read_text() + "  metric_for_best_model: closeness\n")
    assert load_recipe(file).train.metric_for_best_model == "closeness"
    file.write_text(file.read_text().replace("./my.yaml", "completion"))
    (problem,) = problems(file)
    assert problem.key == "train.metric_for_best_model"


def test_an_unknown_name_mentions_user_files(in_tmp: Path) -> None:
    (problem,) = problems(recipe(in_tmp, "compleshun"))
    assert problem.allowed is not None
    assert problem.allowed.endswith("or a task file: ./FILE.py:CLASS, ./FILE.yaml")
