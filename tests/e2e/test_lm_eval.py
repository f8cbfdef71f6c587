"""The commands of docs/lm-evaluation-harness.md, executed on a random model."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lorakit
from lorakit.cli.main import run
from tests.adapters.directories import write_adapter

pytest.importorskip("lm_eval", reason="needs lorakit[harness]")

DOC = (Path(__file__).resolve().parents[2] / "docs" / "lm-evaluation-harness.md").read_text()
BASE, ADAPTER = Path("models/smollm2-135m-instruct"), Path("runs/quickstart/adapter")
Samples = list[dict[str, Any]]


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}(?: \S+)?\n(.*?)^```$", DOC, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture(autouse=True)
def newcomer(in_tmp: Path, tiny_llama: Path) -> Iterator[None]:
    """Create what the guide assumes: a base in bfloat16 and the task's files. (The harness sets
    seeds.)"""
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(BASE)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(BASE)
    Path("tasks").mkdir()
    (Path("tasks") / "capitals.yaml").write_text(blocks("yaml")[0])
    (Path("tasks") / "capitals.jsonl").write_text(blocks("json")[0])
    before = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(before)


def adapter(**keys: Any) -> None:
    """Write an adapter with its tokenizer, as training does."""
    write_adapter(BASE, ADAPTER, scale=0.3, **keys)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(ADAPTER)


def execute(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.__main__ import cli_evaluate

    program, *arguments = shlex.split(command)
    if program == "pip":
        return
    if program == "lorakit":
        assert run(arguments) == 0
        return
    assert program == "lm_eval"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        cli_evaluate()


def logged(folder: str) -> tuple[dict[str, Any], Samples]:
    """Return the scores and the samples, in the order of the rows, from ``--output_path``."""
    (scores,) = Path(folder).rglob("results_*.json")
    (samples,) = Path(folder).rglob("samples_capitals_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(scores.read_text())["results"], rows


def from_python() -> tuple[dict[str, Any], Samples]:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[0], "score.py", "exec"), names)
    found = names["results"]
    return found["results"], found["samples"]["capitals"]


def log_likelihoods(samples: Samples) -> torch.Tensor:
    """Return log-likelihoods (rows, choices)."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return torch.tensor(
        [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in ordered]
    )


def direct(model: PreTrainedModel) -> torch.Tensor:
    """Return log p(" choice" | prompt), summed over the tokens, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = [json.loads(line) for line in blocks("json")[0].splitlines()]
    found = []
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        for choice in row["choices"]:
            ids = prompt + tokenizer(f" {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(ids))
            found.append(sum(float(log_p[i - 1, ids[i]]) for i in places))
    return torch.tensor(found).view(len(rows), -1)


@pytest.mark.slow
def test_three_ways_give_the_same_scores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(r=4)
    for command in "".join(blocks("bash")).splitlines():
        execute(command, monkeypatch)
    ways = [logged("scores/merged"), logged("scores/peft"), from_python()]
    wanted = direct(lorakit.load(BASE, ADAPTER, dtype="float32"))
    for scores, samples in ways:
        assert scores["capitals"]["acc,none"] == ways[0][0]["capitals"]["acc,none"]
        assert scores["capitals"]["acc_norm,none"] == ways[0][0]["capitals"]["acc_norm,none"]
        torch.testing.assert_close(log_likelihoods(samples), wanted, rtol=1e-5, atol=1e-4)
    right = [json.loads(line)["answer"] for line in blocks("json")[0].splitlines()]
    chosen = wanted.argmax(1) == torch.tensor(right)
    assert ways[0][0]["capitals"]["acc,none"] == pytest.approx(chosen.double().mean().item())
    bare = direct(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval())
    assert (wanted - bare).abs().max() > 0.1


def test_an_adapter_that_peft_cannot_load() -> None:
    adapter(method="intrinsic", d=64, target_modules=["all-linear"])
    _, samples = from_python()
    wanted = direct(lorakit.load(BASE, ADAPTER, dtype="float32"))
    torch.testing.assert_close(log_likelihoods(samples), wanted, rtol=1e-5, atol=1e-4)
    bare = direct(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval())
    assert (wanted - bare).abs().max() > 0.1
