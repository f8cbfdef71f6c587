"""The steps of a golden run: commands of lorakit and the results to record."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lorakit
from lorakit.cli.main import run as run_command
from tests.golden.data import write_lines
from tests.golden.results import TENSOR_TOLERANCE, Results

#: Of an adapter that names no method.
_LORA = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
_TRAIN = {
    "max_steps": 4,
    "per_device_batch_size": 4,
    "learning_rate": 3e-2,
    # About the size of a gradient: with a small epsilon Adam makes a full step of a gradient that
    # is little but rounding, and does not see the gradient's scale.
    "adam_epsilon": 3e-2,
    "log_every_steps": 1,
    "eval_every_steps": 2,
    "warmup_steps": 1,
    "seed": 7,
}
#: Of metrics.jsonl: what depends on the machine.
_MACHINE_KEYS = {"tokens_per_second", "peak_memory_bytes"}
_RECORD_KEYS = (
    "adapted_modules", "trainable_parameters", "total_parameters", "steps", "trained_tokens",
    "metrics", "ranks", "exit_reason",
)  # fmt: skip


class Session:
    """The commands of one run, in ``folder`` below a working directory with ``models/`` and
    ``data/``. All paths are relative, so that they are equal on every machine."""

    def __init__(self, golden: GoldenRun) -> None:
        self.folder = Path("runs") / golden.name
        self.folder.mkdir(parents=True)
        self.base = Path("models") / golden.model
        self.output = self.folder / "run"
        self.recipe = self.folder / "recipe.yaml"
        self.recipe.write_text(json.dumps(golden.recipe(self.base, self.output)), encoding="utf-8")
        self.results = Results()

    @property
    def adapter(self) -> Path:
        return self.output / "adapter"

    def lorakit(self, *arguments: object) -> str:
        """Run a command and return its stdout; raise AssertionError if it fails."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = run_command([str(argument) for argument in arguments])
        assert code == 0, f"lorakit {arguments}: exit code {code}\n{err.getvalue()}"
        return out.getvalue()

    def keep_run(self, name: str) -> None:
        """Record metrics.jsonl, run.json and the adapter."""
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for line in map(json.loads, lines):
            kind = "eval" if "eval" in line else "log"
            kept = {key: value for key, value in line.items() if key not in _MACHINE_KEYS}
            self.results.add(f"{name}/{kind}/{line['step']}", kept)
        record = json.loads((self.output / "run.json").read_text(encoding="utf-8"))
        self.results.add(f"{name}/run", {key: record.get(key) for key in _RECORD_KEYS})
        self.keep_adapter(name, self.adapter)

    def keep_adapter(self, name: str, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self.results.add(f"{name}/adapter_config", config)
        self.results.add_tensors(name, folder / "adapter_model.safetensors")


Step = Callable[[Session], None]


@dataclass(frozen=True)
class GoldenRun:
    """A run with model ``model`` and data ``data``: recipe sections that override small defaults,
    and further steps after training. ``portable`` is false if the results depend on the processor
    by more than rounding; ``tensor_tolerance`` is relative to a tensor's norm."""

    name: str
    model: str = "llama"
    data: str = "completion"
    adapter: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    steps: tuple[Step, ...] = ()
    portable: bool = True
    tensor_tolerance: float = TENSOR_TOLERANCE

    def recipe(self, base: Path, output: Path) -> dict[str, Any]:
        return {
            "model": {"name_or_path": str(base), "dtype": self.dtype},
            "adapter": self.adapter if "method" in self.adapter else {**_LORA, **self.adapter},
            "task": {"name": self.data, "path": f"data/{self.data}", "max_length": 256, **self.task},
            "train": {"output_dir": str(output), **_TRAIN, **self.train},
        }  # fmt: skip


def execute(golden: GoldenRun, workspace: Path) -> Results:
    """Train and run the further steps of ``golden`` on one CPU thread."""
    with _inside(workspace), _one_thread():
        session = Session(golden)
        session.lorakit("train", session.recipe)
        session.keep_run("train")
        for step in golden.steps:
            step(session)
        return session.results


def resume(session: Session) -> None:
    """Resume from the first checkpoint in another directory, which becomes the session's run."""
    checkpoints = (session.output / "checkpoints").iterdir()
    first = min(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    session.output = session.folder / "resumed"
    output = ["--output-dir", session.output]
    session.lorakit("train", session.recipe, *output, "--resume", first)
    session.keep_run("resume")


def merge(session: Session) -> None:
    _merge(session, "merge")


def merge_twice(session: Session) -> None:
    """Merge the adapter with one weight, then with another."""
    _merge(session, "merge_twice", "--weight", "0.75", "--add", f"{session.adapter}:-0.25")


def _merge(session: Session, name: str, *options: str) -> None:
    out = session.folder / name
    session.lorakit("merge", session.base, session.adapter, out, *options)
    base = load_file(session.base / "model.safetensors")
    for key, tensor in load_file(out / "model.safetensors").items():
        if key in base and tensor.equal(base[key]):
            session.results.add(f"{name}/{key}", "as in the base")
        else:
            session.results.tensors[f"{name}/{key}"] = tensor


def switch(session: Session) -> None:
    """Record the logits of ``lorakit.load`` with the adapter unmerged and merged, which computes
    the sum differently from file-based merging."""
    ids = torch.arange(5, 29).reshape(2, 12)
    model = lorakit.load(session.base, {"golden": session.adapter}).eval()
    for name, merged in (("beside", False), ("folded", True)):
        lorakit.switch(model, "golden", merged=merged)
        with torch.no_grad():
            session.results.tensors[f"switch/{name}/logits"] = model(ids).logits


def convert(to: str) -> Step:
    def step(session: Session) -> None:
        out = session.folder / f"convert-{to}"
        session.lorakit("convert", session.adapter, out, "--to", to)
        if (out / "adapter_config.json").is_file():
            session.keep_adapter(f"convert/{to}", out)
        else:
            (file,) = out.glob("*.safetensors")
            session.results.add_tensors(f"convert/{to}", file)

    return step


def evaluate(session: Session) -> None:
    """Evaluate the adapter, score its predictions again from their file, and evaluate the base."""
    file = session.folder / "predictions.jsonl"
    options = ["--adapter", session.adapter, "--json"]
    found = session.lorakit("eval", session.recipe, *options, "--save-predictions", file)
    session.results.add("eval/adapter", json.loads(found))
    lines = [json.loads(x) for x in file.read_text(encoding="utf-8").splitlines()]
    session.results.add("eval/predictions", lines)
    again = session.lorakit("eval", session.recipe, "--predictions", file, "--json")
    session.results.add("eval/from_predictions", json.loads(again))
    evaluate_base(session)


def evaluate_base(session: Session) -> None:
    found = session.lorakit("eval", session.recipe, "--base", "--json")
    session.results.add("eval/base", json.loads(found))


def score(*predictions: object) -> Step:
    """Score ready predictions without a model."""

    def step(session: Session) -> None:
        file = session.folder / "ready.jsonl"
        write_lines(file, [{"prediction": prediction} for prediction in predictions])
        found = session.lorakit("eval", session.recipe, "--predictions", file, "--json")
        session.results.add("score", json.loads(found))

    return step


def generate(*options: str) -> Step:
    """Generate for a streamed prompt and for a batch of three."""

    def step(session: Session) -> None:
        name = "/".join(["generate", *options])
        common = ["--adapter", session.adapter, "--max-new-tokens", 12, *options]
        text = session.lorakit("generate", session.base, *common, "--prompt", "Where is the bell?")
        file = session.folder / "prompts.jsonl"
        prompts = ("Where", "Where is the lamp?", "A mill and")
        write_lines(file, [{"prompt": prompt} for prompt in prompts])
        lines = session.lorakit("generate", session.base, *common, "--input", file)
        session.results.add(name, [text, *map(json.loads, lines.splitlines())])

    return step


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
