"""Every recipe in recipes/ is valid, self-contained, and states its source."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorakit.api import load_sweep
from lorakit.cli.main import run
from lorakit.errors import RecipeError
from lorakit.recipe.load import load_recipe

REPO = Path(__file__).resolve().parents[2]
FILES = sorted((REPO / "recipes").rglob("*.yaml"))
SWEEPS = [path for path in FILES if "recipe" in yaml.safe_load(path.read_text(encoding="utf-8"))]
RECIPES = [path for path in FILES if path not in SWEEPS]
PAPERS = [path for path in SWEEPS if path.parent.name == "papers"]
NAMES = [str(path.relative_to(REPO / "recipes")) for path in RECIPES]
MODELS = ("llama-3-8b", "qwen3-8b")
GLUE_OF_THE_PAPER = {"mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"}

#: LoRA paper, Table 9: (batch size, epochs, learning rate in 1e-4, tokens).
TABLE_9 = {
    "base": {
        "mnli": (16, 30, 5, 512),
        "sst2": (16, 60, 5, 512),
        "mrpc": (16, 30, 4, 512),
        "cola": (32, 80, 4, 512),
        "qnli": (32, 25, 4, 512),
        "qqp": (16, 25, 5, 512),
        "rte": (32, 80, 5, 512),
        "stsb": (16, 40, 4, 512),
    },
    "large": {
        "mnli": (4, 10, 3, 128),
        "sst2": (4, 10, 4, 128),
        "mrpc": (4, 20, 3, 512),
        "cola": (4, 20, 2, 128),
        "qnli": (4, 10, 2, 512),
        "qqp": (4, 20, 3, 512),
        "rte": (8, 20, 4, 512),
        "stsb": (8, 30, 2, 512),
    },
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes must be valid without environment variables."""
    for name in ("CHAT_PATH", "E2E_PATH", "GLUE_PATH", "WIKISQL_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_promised_recipes_are_there() -> None:
    promised = {"quickstart.yaml", "quickstart-encoder.yaml", "lora-paper/gpt2-medium/e2e.yaml"}
    promised |= {f"{model}/{task}.yaml" for model in MODELS for task in ("wikisql", "chat")}
    promised |= {
        f"lora-paper/roberta-{size}/{task}.yaml"
        for size in ("base", "large")
        for task in GLUE_OF_THE_PAPER
    }
    assert promised <= set(NAMES)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    name = path.relative_to(REPO / "recipes").with_suffix("")
    assert recipe.train.output_dir == f"runs/{name}"
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(REPO / "recipes")))
def test_sweep_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    sweep = load_sweep(path)
    name = path.relative_to(REPO / "recipes").with_suffix("")
    assert sweep.section.output_dir == f"runs/{name}"
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_example_of_a_sweep_can_be_planned(
    data_dir: Path,
    minilm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = ["--set", f"task.path={data_dir / 'glue' / 'sst2'}"]
    file = REPO / "recipes" / "sweeps" / "rank.yaml"
    monkeypatch.chdir(REPO)
    assert run(["sweep", str(file), "--dry-run", *local]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["r=1,target_modules=q,seed=1", "5,378", "parameters"]
    assert lines[-1] == "12 members, compared by accuracy, in runs/sweeps/rank"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if "wikisql" in path.stem else ())
        for path in PAPERS
    ],
)
def test_the_experiments_of_the_papers_can_be_planned(
    path: Path,
    data_dir: Path,
    minilm: Path,
    smollm2: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No member is known to fail, and the first lines say which experiment it is, what to expect,
    and the command."""
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("GLUE_PATH", str(data_dir / "glue"))
    monkeypatch.setenv("WIKISQL_PATH", str(data_dir / "wikisql"))
    assert run(["sweep", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(f"in runs/papers/{path.stem}")
    comments = path.read_text(encoding="utf-8").splitlines()[:3]
    assert all(line.startswith("# ") for line in comments)
    assert "Expected: " in " ".join(comments)
    assert path.stem in comments[2]


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_an_unknown_key_would_be_seen(path: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["adapter"]["lora_alfa"] = 16
    copy = tmp_path / "recipe.yaml"
    copy.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(RecipeError, match="lora_alfa"):
        load_recipe(copy)


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("task", sorted(GLUE_OF_THE_PAPER))
def test_roberta_has_the_settings_of_table_9(size: str, task: str) -> None:
    recipe = load_recipe(REPO / "recipes" / "lora-paper" / f"roberta-{size}" / f"{task}.yaml")
    batch, epochs, rate, tokens = TABLE_9[size][task]
    assert recipe.model.name_or_path == f"FacebookAI/roberta-{size}"
    assert recipe.task.name == f"glue/{task}"
    assert recipe.task.max_length == tokens
    assert recipe.train.per_device_batch_size * recipe.train.gradient_accumulation_steps == batch
    assert recipe.train.epochs == epochs
    assert recipe.train.learning_rate == pytest.approx(rate * 1e-4)
    assert (recipe.train.lr_scheduler, recipe.train.warmup_ratio) == ("linear", 0.06)
    adapter = recipe.resolved()["adapter"]
    assert (adapter["r"], adapter["lora_alpha"]) == (8, {"base": 8, "large": 16}[size])
    assert adapter["target_modules"] == ["q", "v"]
