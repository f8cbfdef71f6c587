"""Invalid recipes: exit code 2, an error that names the problem, no traceback, no files."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakit.cli.main import run

DATA = "data.jsonl"
REPO = Path(__file__).resolve().parents[2]
GOOD = """\
model:
  name_or_path: some/model
  dtype: bfloat16
adapter:
  method: lora
  r: 8
  target_modules: [q, v]
task:
  name: completion
  path: data.jsonl
train:
  output_dir: runs/x
  learning_rate: 2.0e-4
"""
ENCODER = GOOD.replace("name: completion", "name: glue/sst2")
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@dataclass(frozen=True)
class Bad:
    """An invalid recipe, and what its error must contain."""

    name: str
    recipe: str | bytes
    names: tuple[str, ...]
    line: int | None = None
    overrides: tuple[str, ...] = ()


RATE = "learning_rate: 2.0e-4"
CASES = [
    # Keys
    Bad("typo", changed("learning_rate", "lerning_rate"),
        ("train.lerning_rate", "'learning_rate'"), 13),
    Bad("typo in a section", changed("train:", "trian:"),
        ("trian", "'train'", "model, adapter"), 11),
    Bad("key of another section", changed("r: 8", "learning_rate: 1"), ("belongs under train",), 6),
    Bad("key of another tool", changed("r: 8", "rank: 8"), ("adapter.rank", "'r'"), 6),
    Bad("key at the top", GOOD + "seed: 1\n", ("seed", "belongs under train"), 14),
    Bad("merge key", GOOD + "  <<: {seed: 1}\n", ("train.<<", "unknown key"), 14),
    Bad("missing key", changed("  output_dir: runs/x\n", ""),
        ("train.output_dir", "required key is missing"), 11),
    Bad("missing model", changed("  name_or_path: some/model\n", ""), ("model.name_or_path",), 1),
    Bad("missing sections", "model: {name_or_path: m}\n", ("adapter", "task", "train", "missing")),
    Bad("duplicate key", changed("r: 8", "r: 8\n  r: 16"), ("duplicate key 'r'", "line 6"), 7),
    Bad("duplicate section", GOOD + "model: {}\n", ("duplicate key 'model'", "line 1"), 14),
    # Types
    Bad("text for a number", changed("r: 8", "r: eight"),
        ("adapter.r", '"eight"', "an integer > 0"), 6),
    Bad("quoted number", changed("2.0e-4", '"2.0e-4"'),
        ("train.learning_rate", "quotes", "> 0"), 13),
    Bad("float for an integer", changed("r: 8", "r: 8.5"), ("adapter.r", "8.5", "an integer"), 6),
    Bad("null for an integer", changed("r: 8", "r: null"), ("adapter.r", "null", "an integer"), 6),
    Bad("yes for true", changed(RATE, "gradient_checkpointing: yes"),
        ('"yes"', "true or false"), 13),
    Bad("yes in a union", changed(RATE, "compile: yes"),
        ("train.compile", "auto or true or false"), 13),
    Bad("number for text", changed("some/model", "7"), ("model.name_or_path", "7", "string"), 2),
    Bad("mapping for a list", changed("[q, v]", "{q: 1}"), ("target_modules", "list of strings"), 7),
    Bad("number in a list", changed("[q, v]", "[q, 1]"), ("adapter.target_modules[1]", "string"), 7),
    Bad("union of paths", changed("data.jsonl", "7"), ("task.path = 7", "string or", "null"), 10),
    Bad("list for a section",
        changed("  method: lora\n  r: 8\n  target_modules: [q, v]\n", "- lora\n"),
        ("adapter", "mapping"), 4),
    Bad("text for a section", "model: m\nadapter:\ntask: t\ntrain: x\n",
        ("model", '"m"', "mapping"), 1),
    # Ranges and names
    Bad("rank 0", changed("r: 8", "r: 0"), ("adapter.r = 0", "out of range", "> 0"), 6),
    Bad("negative rate", changed("2.0e-4", "-1"), ("train.learning_rate = -1", "> 0"), 13),
    Bad("NaN", changed("2.0e-4", ".nan"), ("train.learning_rate", "finite"), 13),
    Bad("infinity", changed("2.0e-4", ".inf"), ("train.learning_rate", "finite"), 13),
    Bad("overflow", changed("2.0e-4", "1e400"), ("train.learning_rate", "finite"), 13),
    Bad("huge integer", changed(RATE, "seed: " + "9" * 30), ("train.seed", "4294967296"), 13),
    Bad("huge rank", changed("r: 8", "r: 65537"), ("adapter.r = 65537", "<= 65536"), 6),
    Bad("huge rank of a module", changed("r: 8", "rank_pattern: {q_proj: 65537}"),
        ("adapter.rank_pattern.q_proj", "<= 65536"), 6),
    Bad("huge scaling", changed("r: 8", "lora_alpha: 1.0e+300"),
        ("adapter.lora_alpha", "out of range", "<= 1000000000"), 6),
    Bad("huge final rank", changed("lora\n  r: 8", "adalora\n  target_r: " + "9" * 400),
        ("adapter.target_r", "<= 65536"), 6),
    Bad("huge subspace", changed("lora\n  r: 8", "intrinsic\n  d: 2147483648"),
        ("adapter.d = 2147483648", "< 2147483648"), 6),
    Bad("ratio of 2", changed(RATE, "warmup_ratio: 2"), ("train.warmup_ratio = 2", "< 1"), 13),
    Bad("dropout of 1", changed("r: 8", "lora_dropout: 1.0"), ("adapter.lora_dropout", "< 1"), 6),
    Bad("empty text", changed("runs/x", "''"), ("train.output_dir", "empty"), 12),
    Bad("empty list", changed("[q, v]", "[]"), ("adapter.target_modules", "empty"), 7),
    Bad("unknown dtype", changed("bfloat16", "float61"),
        ("model.dtype", "'float16'", "float32"), 3),
    Bad("no for none", changed("r: 8", "bias: no"), ("adapter.bias", '"no"', "none"), 6),
    Bad("unknown scheduler", changed(RATE, "lr_scheduler: cosin"),
        ("'cosine'", "linear, cosine"), 13),
    Bad("unknown tracker", changed(RATE, "trackers: [wandbb]"),
        ("train.trackers[0]", "'wandb'"), 13),
    Bad("unknown metric", changed(RATE, "metric_for_best_model: acc"),
        ("accuracy", "perplexity"), 13),
    Bad("unknown method", changed("method: lora", "method: lroa"), ("adapter.method", "'lora'"), 5),
    Bad("unknown task", changed("completion", "completions"), ("task.name", "'completion'"), 9),
    # Contradictions and forms
    Bad("epochs and max_steps", GOOD + "  epochs: 1\n  max_steps: 2\n",
        ("max_steps", "epochs"), 15),
    Bad("two warmups", GOOD + "  warmup_steps: 1\n  warmup_ratio: 0.1\n", ("warmup_ratio",), 14),
    Bad("float16 on the CPU", changed("bfloat16", "float16"),
        ("model.dtype", "bfloat16, float32"), 3),
    Bad("packing encoder", ENCODER.replace("  path:", "  packing: true\n  path:"),
        ("task.packing", "encoder task cannot pack", "false"), 10),
    Bad("layers backwards", changed("r: 8", 'layers: "5-2"'), ("adapter.layers", "reversed"), 6),
    Bad("layers of text", changed("r: 8", "layers: all"), ("adapter.layers", '"0-5,11"'), 6),
    Bad("negative layer", changed("r: 8", "layers: [-1]"), ("adapter.layers", ">= 0"), 6),
    Bad("broken regex", changed("[q, v]", '["re:(q"]'),
        ("target_modules[0]", "regular expression"), 7),
    # YAML
    Bad("open bracket", changed("[q, v]", "[q, v"), ("not valid YAML",), 8),
    Bad("tab", changed("  r: 8", "\tr: 8"), ("not valid YAML", "tabs"), 6),
    Bad("bad indentation", changed("  r: 8", "   r: 8"), ("not valid YAML",), 6),
    Bad("python tag", changed("some/model", "!!python/object/apply:os.getcwd []"),
        ("tag", "not supported"), 2),
    Bad("standard tag", changed("r: 8", "r: !!int 8"), ("tag", "not supported"), 6),
    Bad("own tag", changed("r: 8", "r: !env R"), ("tag '!env' is not supported",), 6),
    Bad("alias bomb", BOMB + GOOD, ("too many values", "10000")),
    Bad("recursive alias", changed("[q, v]", "&a [q, *a]"), ("*a refers to itself",), 7),
    Bad("alias of nothing", changed("[q, v]", "*a"), ("&a",), 7),
    Bad("two documents", GOOD + "---\n" + GOOD, ("second document",), 14),
    Bad("deep nesting", changed("[q, v]", "[" * 1000 + "]" * 1000), ("nested too deeply",), 7),
    Bad("list key", GOOD + "? [a]\n: 1\n", ("the key is a list or a mapping",), 14),
    Bad("list at the top", "- model\n", ("not a mapping",)),
    Bad("text at the top", "recipe", ("not a mapping",)),
    Bad("empty", "", ("empty",)),
    Bad("only a comment", "# recipe\n", ("empty",)),
    Bad("JSON cut short", '{"model": {"name_or_path": ', ("not valid YAML",), 1),
    # Bytes
    Bad("latin-1", changed("some/model", "café").encode("latin-1"), ("not UTF-8",), 2),
    Bad("utf-16", GOOD.encode("utf-16"), ("not UTF-8",), 1),
    Bad("a gzip file", b"\x1f\x8b\x08\x00" + bytes(range(128, 256)), ("not UTF-8",), 1),
    Bad("a bell", changed("some/model", "a\x07"), ("U+0007",), 2),
    Bad("a zero byte", changed("some/model", "a\0"), ("U+0000",), 2),
    Bad("too large", GOOD + "#" * 300_000, ("too large", "bytes")),
    # Environment
    Bad("unset variable", changed("runs/x", "runs/${LORAKIT_NO_SUCH}"),
        ("LORAKIT_NO_SUCH", "set"), 12),
    Bad("broken reference", changed("runs/x", "runs/${x"), ("train.output_dir", "${NAME}"), 12),
    Bad("default of a wrong type", changed("r: 8", "r: ${LORAKIT_NO_SUCH:-x}"),
        ("adapter.r", '"x"'), 6),
    # --set
    Bad("set: typo", GOOD, ("--set", "train.sead", "'seed'"), None, ("train.sead=1",)),
    Bad("set: section", GOOD, ("--set", "trian", "'train'"), None, ("trian.seed=1",)),
    Bad("set: type", GOOD, ("--set", "train.seed", '"x"', "integer"), None, ("train.seed=x",)),
    Bad("set: no value", GOOD, ("--set", "'train.seed' has no '='"), None, ("train.seed",)),
    Bad("set: no key", GOOD, ("--set", "empty key"), None, ("=1",)),
    Bad("set: bad YAML", GOOD, ("--set", "not valid YAML"), None, ("adapter.target_modules=[q",)),
    Bad("set: tag", GOOD, ("--set", "tag"), None, ("train.seed=!!python/name:os.system",)),
    Bad("set: below a value", GOOD, ("--set", "task.path has no keys"), None, ("task.path.a=1",)),
    Bad("set: contradiction", GOOD, ("epochs",), None, ("train.epochs=1", "train.max_steps=1")),
]  # fmt: skip


#: All others have one fault, and give one line.
SEVERAL = ("missing sections", "text for a section")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("LORAKIT_NO_SUCH", raising=False)
    Path(DATA).write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != DATA]


def test_the_unchanged_recipes_are_valid(folder: Path) -> None:
    Path("recipe.yaml").write_text(GOOD)
    Path("encoder.yaml").write_text(ENCODER)
    assert run(["validate", "recipe.yaml", "encoder.yaml"]) == 0


def check_message(bad: Bad, message: str) -> None:
    assert "Traceback" not in message
    assert all(line.startswith("error: ") for line in message.splitlines())
    assert "recipe.yaml" in message or "--set" in message
    for name in bad.names:
        assert name in message
    if bad.line is not None:
        assert f"recipe.yaml, line {bad.line}: " in message


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_recipe(bad: Bad, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bad.recipe if isinstance(bad.recipe, bytes) else bad.recipe.encode()
    Path("recipe.yaml").write_bytes(data)
    code = run(["validate", "recipe.yaml", *(f"--set={text}" for text in bad.overrides)])
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    check_message(bad, shown.err)
    if bad.name not in SEVERAL:
        assert len(shown.err.splitlines()) == 1
    assert names_in(folder) == ["recipe.yaml"]
    assert Path("recipe.yaml").read_bytes() == data


@pytest.mark.parametrize(
    ("name", "message"), [("none.yaml", "no such file"), ("folder", "is a directory")]
)
def test_no_file(name: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    assert run(["validate", name]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {name}: {message}")
    assert names_in(folder) == ["folder"]


@pytest.mark.parametrize("name", ["typo", "python tag", "alias bomb", "latin-1", "set: type"])
def test_in_a_separate_process(name: str, folder: Path) -> None:
    (bad,) = (bad for bad in CASES if bad.name == name)
    data = bad.recipe if isinstance(bad.recipe, bytes) else bad.recipe.encode()
    Path("recipe.yaml").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "validate", "recipe.yaml"]
        + [f"--set={text}" for text in bad.overrides],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    check_message(bad, done.stderr)
    assert names_in(folder) == ["recipe.yaml"]
