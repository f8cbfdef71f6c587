"""A directory in which the commands of the documentation run: tiny models and data by the names that it uses."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lorakit
from tests.shipped.test_docs import REPO
from tests.training.runs import WORDS, completion_rows, write_rows

CAUSAL = ("models/smollm2-135m-instruct", "Qwen/Qwen3-8B", "meta-llama/Llama-3.2-1B", "BASE")
ENCODER = ("models/all-minilm-l6-v2",)
#: Adapters of causal models, by the names of the runs.
RUNS = ("lora", "chat", "sql", "nlg", "seed-1", "seed-2", "quickstart")
#: The recipe of pages that have none of their own.
RECIPE = """
model: {name_or_path: models/smollm2-135m-instruct}
adapter: {r: 8, target_modules: [q, v]}
task: {name: chat, path: data/chat, eval_generate: end, max_new_tokens: 8}
train: {output_dir: runs/chat, epochs: 1}
"""
#: Variables that the documentation sets.
VARIABLES = {
    "GLUE_PATH": "data/glue",
    "WIKISQL_PATH": "data/wikisql-sample",
    "E2E_PATH": "data/e2e",
}


def write_files(folder: Path, llama: Path, bert: Path) -> None:
    """Write models and data, and links to the repository's files."""
    for names, model in ((CAUSAL, llama), (ENCODER, bert)):
        for name in names:
            shutil.copytree(model, folder / name)
    for name in ("recipes", "configs", "scripts"):
        (folder / name).symlink_to(REPO / name)
    (folder / "docs").mkdir()
    (folder / "docs" / "examples").symlink_to(REPO / "docs" / "examples")
    for example in (REPO / "docs" / "examples").glob("*.py"):
        shutil.copy(example, folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    _write_data(folder)


def _write_data(folder: Path) -> None:
    data = folder / "data"
    texts = [" ".join(WORDS[i % 4 : i % 9 + 4]) for i in range(12)]
    splits = ("train", 12), ("validation", 4)
    for split, count in splits:
        chats = [
            {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[:8]}]}
            for t in texts[:count]
        ]
        pairs = completion_rows(count)
        classes = [{"sentence": t, "label": i % 2} for i, t in enumerate(texts[:count])]
        write_rows(data / "chat" / f"{split}.jsonl", chats)
        write_rows(data / "general" / f"{split}.jsonl", chats)
        write_rows(data / {"train": "own.jsonl", "validation": "held_out.jsonl"}[split], chats)
        write_rows(data / "pairs" / f"{split}.jsonl", pairs)
        write_rows(data / "glue" / "sst2" / f"{split}.jsonl", classes)
        two = [
            {"sentence1": row["sentence"], "sentence2": "one", "label": row["label"]}
            for row in classes
        ]
        write_rows(data / "glue" / "rte" / f"{split}.jsonl", two)
    shutil.copy(data / "chat" / "train.jsonl", folder / "chats.jsonl")
    reviews = [{"text": t, "label": ("bad", "good")[i % 2]} for i, t in enumerate(texts)]
    _write_csv(folder / "reviews.csv", reviews)
    _write_csv(folder / "held_out.csv", reviews[:4])
    _write_csv(folder / "new.csv", [{"text": t, "body": t} for t in texts[:3]])
    write_rows(folder / "new.jsonl", [{"text": t} for t in texts[:3]])
    _write_csv(folder / "capitals.csv", [{"country": "France", "capital": "Paris"}] * 4)
    sample = [sys.executable, str(REPO / "scripts" / "make_wikisql_sample.py")]
    subprocess.run(
        [*sample, str(data / "wikisql-sample"), "--train", "20", "--dev", "5"], check=True
    )


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_runs(folder: Path) -> None:
    """Train adapters in the working directory ``folder``, a step each."""
    chat = {"name": "chat", "path": str(folder / "data/chat")}
    for name in RUNS:
        _train(folder, name, CAUSAL[0], chat)
    _train(folder, "loha", CAUSAL[0], chat, "./loha.py:LoHa")
    _train(folder, "adalora", CAUSAL[0], chat, "adalora")
    members = {"adapter.r": [1, 2]}
    lorakit.sweep({"recipe": "recipe.yaml", "output_dir": "runs/table6", "grid": members})
    files = {
        split: str(folder / f"{name}.csv")
        for split, name in (("train", "reviews"), ("validation", "held_out"))
    }
    reviews = {"name": "classification", "path": files}
    _train(folder, "reviews", ENCODER[0], reviews)
    glue = str(folder / "data/glue/rte")
    _train(folder, "nli", ENCODER[0], {"name": "glue/rte", "path": glue})


def _train(folder: Path, name: str, base: str, task: dict[str, Any], method: str = "lora") -> None:
    recipe = {
        "model": {"name_or_path": base, "dtype": "float32"},
        "adapter": {"method": method, "target_modules": ["q", "v"]},
        "task": task,
        "train": {
            "output_dir": f"runs/{name}", "max_steps": 1, "learning_rate": 1e-2,
            "seed": len(name),
        },
    }  # fmt: skip
    file = folder / f"{name}.json"
    file.write_text(json.dumps(recipe))
    lorakit.train(lorakit.load_recipe(file))
    file.unlink()
