"""AdaLoRA in complete runs: no calls are needed, and interrupted runs end like uninterrupted ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.cli.main import run as command
from lorakit.layers import AdapterLayer, adapter_layers
from lorakit.recipe.sections import Recipe
from lorakit.training.checkpoint import (
    Progress,
    Snapshot,
    load_checkpoint,
    save_checkpoint,
)
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.random_states import random_states
from lorakit.training.ranks import rank_list, rank_table
from lorakit.training.run import train
from tests.training.engines import Built, built
from tests.training.runs import (
    adapter_bytes,
    changed,
    eval_lines,
    learning,
    log_lines,
    recipe_for,
    run_json,
    tree,
    write_recipe_file,
)

ADAPTER = {
    "method": "adalora", "target_modules": ["q", "v"], "init_r": 4, "target_r": 2, "tinit": 6,
    "tfinal": 10, "deltaT": 3,
}  # fmt: skip
#: 32 steps: allocations at 9, 12, 15, 18, 21 and 22, after which the kept triplets are fixed.
SETTINGS = {"adapter": ADAPTER, "train__epochs": 8, "train__eval_every_steps": 16}
MATRICES = 4


def adalora_recipe(folder: Path, model: Path, task: str = "completion", **changes: Any) -> Recipe:
    return lorakit.load_recipe(adalora_file(folder, model, task, **changes))


def adalora_file(folder: Path, model: Path, task: str = "completion", **changes: Any) -> Path:
    """``adapter__`` changes override ADAPTER."""
    own = {k.removeprefix("adapter__"): v for k, v in changes.items() if k.startswith("adapter__")}
    rest = {k: v for k, v in changes.items() if not k.startswith("adapter__")}
    settings = {k: v for k, v in SETTINGS.items() if k != "adapter"} | rest
    file = write_recipe_file(folder, model, task, **settings)
    recipe = json.loads(file.read_text())
    recipe["adapter"] = ADAPTER | own
    file.write_text(json.dumps(recipe))
    return file


@pytest.fixture(scope="module")
def done(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run and its messages."""
    said: list[str] = []
    recipe = adalora_recipe(tmp_path_factory.mktemp("adalora"), tiny_llama)
    train(recipe, say=said.append)
    return Path(recipe.train.output_dir), said


# What a run leaves


def test_every_log_line_has_the_budget_and_the_penalty(done: tuple[Path, list[str]]) -> None:
    lines = log_lines(done[0])
    assert [line["step"] for line in lines] == list(range(1, 33))
    budgets = [line["budget"] for line in lines]
    assert budgets[:6] == [16] * 6
    assert budgets[21:] == [8] * 11
    assert budgets == sorted(budgets, reverse=True)
    assert all(line["orthogonality_loss"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.02


def test_ranks_sum_to_the_budget_and_are_shown(done: tuple[Path, list[str]]) -> None:
    ranks = run_json(done[0])["ranks"]
    assert [entry["layer"] for entry in ranks] == [0, 0, 1, 1]
    assert {entry["module"].rpartition(".")[2] for entry in ranks} == {"q_proj", "v_proj"}
    assert sum(entry["rank"] for entry in ranks) == 2 * MATRICES
    table = next(text for text in done[1] if text.lstrip().startswith("layer"))
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["layer", "self_attn.q_proj", "self_attn.v_proj", "total"]
    by_place = {(e["layer"], e["module"].rpartition(".")[2]): e["rank"] for e in ranks}
    for number, row in enumerate(rows[1:3]):
        assert [int(x) for x in row[:3]] == [
            number,
            by_place[number, "q_proj"],
            by_place[number, "v_proj"],
        ]
    assert rows[3][-1] == "8"


def test_log_lines_have_the_ranks_that_an_allocation_chose(done: tuple[Path, list[str]]) -> None:
    lines, record = log_lines(done[0]), run_json(done[0])
    assert [line["step"] for line in lines if "ranks" in line] == [9, 12, 15, 18, 21, 22]
    for line in lines:
        assert sum(line.get("ranks", [line["budget"]])) == line["budget"]
    last = [line["ranks"] for line in lines if "ranks" in line][-1]
    assert last == [entry["rank"] for entry in record["ranks"]]
    names = [module["name"] for module in record["adapted_modules"]]
    assert names == [entry["module"] for entry in record["ranks"]]


def test_a_log_line_of_several_steps_has_the_ranks_of_the_last(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Also after a resume between two log lines."""
    recipe = adalora_recipe(
        tmp_path, tiny_llama, train__log_every_steps=7, train__save_every_steps=16
    )
    output = Path(recipe.train.output_dir)
    train(recipe)
    whole = learning(output)
    assert [line["step"] for line in whole if "ranks" in line] == [14, 21, 28]
    train(recipe, resume=str(output / "checkpoints" / "step-16"))
    assert learning(output) == whole


def test_the_adapter_holds_exactly_the_budget(done: tuple[Path, list[str]]) -> None:
    tensors = load_file(done[0] / "adapter" / "adapter_model.safetensors")
    lambdas = [value for name, value in tensors.items() if "lora_E" in name]
    assert len(lambdas) == MATRICES
    assert sum(int((value != 0).sum()) for value in lambdas) == 2 * MATRICES
    settings = json.loads((done[0] / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "ADALORA"
    kept = {name: sum(mask) for name, mask in settings["rank_pattern"].items()}
    for entry in run_json(done[0])["ranks"]:
        assert kept[f"{entry['module']}.lora_E"] == max(entry["rank"], 1)


@pytest.mark.filterwarnings("ignore")  # PEFT looks for AdaLoRA's rank_pattern among module names
def test_peft_lorakit_and_the_merge_agree(
    done: tuple[Path, list[str]], tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = done[0] / "adapter"
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        ours = lorakit.load(tiny_llama, adapter)(ids).logits
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama), str(adapter)
        )
        lorakit.merge(tiny_llama, adapter, tmp_path / "merged", dtype="float32")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
        torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged(ids).logits, ours, atol=1e-5, rtol=0)
        assert (plain(ids).logits - ours).abs().max() > 1e-3


def test_the_written_recipe_repeats_the_run(done: tuple[Path, list[str]], tmp_path: Path) -> None:
    overrides = {"train.output_dir": str(tmp_path / "again")}
    lorakit.train(lorakit.load_recipe(done[0] / "recipe.yaml", overrides))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(done[0])
    assert learning(tmp_path / "again") == learning(done[0])


def test_an_evaluation_has_no_penalty(tiny_llama: Path, tmp_path: Path) -> None:
    """Neither the run's evaluation nor that of its adapter contains the penalty."""
    recipe = adalora_recipe(
        tmp_path, tiny_llama, adapter__orth_reg_weight=50.0, train__learning_rate=1e-3
    )
    run = lorakit.train(recipe)
    lines = log_lines(run.output_dir)
    assert all(line["orthogonality_loss"] > 100 for line in lines)
    assert all(line["loss"] < 10 for line in lines)
    metrics = lorakit.evaluate(recipe, adapter=run.adapter_dir)
    assert metrics["loss"] == pytest.approx(run.metrics["loss"], abs=1e-5)
    assert run.metrics["loss"] < 10


@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_the_reported_loss_is_the_tasks(
    task: str, tiny_llama: Path, still_bert: Path, tmp_path: Path
) -> None:
    """The loss of the rows of each step, before the weights change."""
    model = tiny_llama if task == "completion" else still_bert
    run = built(adalora_recipe(tmp_path, model, task, adapter__orth_reg_weight=10.0))
    for step in range(8):
        batches = run.loader.take(step).micro_batches
        loss = run.engine.loss(batches)
        result = run.engine.step(batches)
        assert result.loss.item() == pytest.approx(loss, abs=1e-5)
        assert result.values[0].item() > 10


# What must not change the result


@pytest.mark.parametrize("task", ["completion", "glue/sst2"])
def test_accumulation_gives_the_same_result(
    task: str, tiny_llama: Path, still_bert: Path, tmp_path: Path
) -> None:
    model = tiny_llama if task == "completion" else still_bert
    weights = []
    for pieces in (1, 4):
        run = built(
            adalora_recipe(
                tmp_path, model, task, train__per_device_batch_size=8 // pieces,
                train__gradient_accumulation_steps=pieces,
            )
        )  # fmt: skip
        run.take_steps(24)
        weights.append((run.engine.ranks(), run.engine.weights))
    (ranks, whole), (other_ranks, parts) = weights
    assert ranks == other_ranks
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=0)


def scale_gradients(engine: EagerEngine, scale: float) -> None:
    """Let ``engine`` train on as it does in float16 on a GPU: with torch's gradient scaler."""
    accelerator = engine.strategy.accelerator
    accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=scale)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    plain, device_placement = engine.optimizer.optimizer, False
    engine.optimizer = AcceleratedOptimizer(plain, device_placement, accelerator.scaler)
    accelerator._optimizers[:] = [engine.optimizer]


def test_float16s_scaler_scales_the_penalty(tiny_llama: Path, tmp_path: Path) -> None:
    weights = []
    for scale in (None, 1024.0):
        run = built(adalora_recipe(tmp_path, tiny_llama, adapter__orth_reg_weight=1.0))
        if scale:
            scale_gradients(run.engine, scale)
        results = run.take_steps(3)
        scalars = [x for r in results for x in (r.loss, r.grad_norm, *r.values)]
        weights.append([*scalars, *run.engine.weights.values()])
    for plain, scaled in zip(*weights, strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-4, rtol=1e-4)


def test_a_step_that_overflows_does_not_cost_the_last_allocation(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The scaler skips step 22, at which the ranks become final; torch's fused optimizers do so on
    the device, without the host knowing."""
    run = built(adalora_recipe(tmp_path, tiny_llama, adapter__deltaT=14))
    engine = run.engine
    run.take_steps(21)
    assert sum(engine.ranks().values()) > 8
    scale_gradients(engine, math.inf)
    before = {name: weight.clone() for name, weight in engine.weights.items()}
    run.take_steps()
    for name, now in engine.weights.items():
        assert torch.equal(now, before[name]) or "lora_E" in name
    assert sum(engine.ranks().values()) == 8
    assert all(value.isfinite().all() for value in engine.state_dict().method.values())


@pytest.mark.gpu
def test_float16_on_a_gpu(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = adalora_recipe(tmp_path, tiny_llama, model__dtype="float16")
    run = lorakit.train(recipe)
    assert sum(entry["rank"] for entry in run_json(run.output_dir)["ranks"]) == 8
    lines = log_lines(run.output_dir)
    assert lines[-1]["loss"] < lines[0]["loss"]


# Stopped runs


class Killed(BaseException):
    """Ends a process like SIGKILL."""


@pytest.fixture(scope="module")
def stopped(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two steps per log line: a checkpoint may fall between them."""
    return adalora_recipe(
        tmp_path_factory.mktemp("resume"), tiny_llama, adapter__lora_dropout=0.1,
        train__log_every_steps=2, train__save_every_steps=1, train__eval_every_steps=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(stopped: Recipe) -> Path:
    return train(stopped).output_dir


@pytest.mark.parametrize("step", [4, 11, 28], ids=["before-tinit", "allocating", "final"])
def test_a_killed_run_resumes_exactly(
    step: int, stopped: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(stopped, train__output_dir=str(tmp_path / "run"))
    own = EagerEngine.step

    def until(engine: EagerEngine, *batches: Any) -> Any:
        if engine.steps == step - 1:
            raise Killed
        return own(engine, *batches)

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "step", until)
        with pytest.raises(Killed):
            train(recipe)
    run = tmp_path / "run"
    kept = load_checkpoint(run / "checkpoints" / f"step-{step - 1}").engine.method
    assert int(kept["kept"].sum()) == {4: 16, 11: 12, 28: 8}[step]
    assert any(value.any() for name, value in kept.items() if name.endswith("lora_A.uncertainty"))
    train(recipe, resume="auto")
    assert adapter_bytes(run) == adapter_bytes(whole)
    assert learning(run) == learning(whole)
    ours, theirs = run_json(run), run_json(whole)
    assert all(ours[k] == theirs[k] for k in ("ranks", "metrics", "best_step", "steps"))


def test_a_checkpoint_of_other_ranks_or_of_another_method_is_refused(
    whole: Path, stopped: Recipe, tiny_llama: Path, tmp_path: Path
) -> None:
    state = load_checkpoint(whole / "checkpoints" / "step-32").engine
    built(stopped).engine.load_state_dict(state)
    kept = {k: v[:, :3] if k == "kept" else v for k, v in state.method.items()}
    for recipe, given in (
        (changed(stopped, adapter__init_r=6), state),
        (changed(stopped, adapter__target_modules=["q"]), state),
        (recipe_for(tmp_path, tiny_llama), state),
        (stopped, replace(state, method={})),
        (stopped, replace(state, method=kept)),
    ):
        engine = built(recipe).engine
        before = {name: weight.clone() for name, weight in engine.weights.items()}
        with pytest.raises(ValueError, match="the state is of another model or method"):
            engine.load_state_dict(given)
        assert all(torch.equal(before[name], now) for name, now in engine.weights.items())


def test_a_module_that_nothing_uses_trains_saves_and_resumes(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Its lambda never has a gradient, so the optimizer has no state for it."""
    recipe = adalora_recipe(tmp_path, tiny_llama, adapter__orth_reg_weight=0.0)

    def start() -> Built:
        run = built(recipe)
        unused = adapter_layers(run.prepared.model)["model.layers.1.self_attn.v_proj"]
        assert isinstance(unused, AdapterLayer)
        unused.forward = unused.base_layer.forward
        run.engine.probe = None  # which would end the run
        return run

    whole, first, second = start(), start(), start()
    whole.take_steps(32)
    first.take_steps(14)
    state = first.engine.state_dict()
    saved = save_checkpoint(tmp_path, Snapshot(Progress(14), state, None, [random_states()]), None)
    second.engine.load_state_dict(load_checkpoint(saved).engine)
    second.take_steps(18)
    for name, value in whole.engine.weights.items():
        assert torch.equal(value, second.engine.weights[name]), name
    ranks = whole.engine.ranks()
    assert ranks == second.engine.ranks()
    assert sum(ranks.values()) == 8
    assert ranks["model.layers.1.self_attn.v_proj"] == 0, "what does nothing is worth nothing"


# The best model


def test_the_best_model_is_of_the_final_phase(tiny_llama: Path, tmp_path: Path) -> None:
    """The loss is lowest at the first evaluations, when the ranks are not yet final."""
    recipe = adalora_recipe(
        tmp_path, tiny_llama, train__learning_rate=3.0, train__lr_scheduler="constant",
        train__max_grad_norm=None, train__eval_every_steps=2, train__early_stopping_patience=2,
    )  # fmt: skip
    run = lorakit.train(recipe)
    record, evaluations = run_json(run.output_dir), eval_lines(run.output_dir)
    losses = {line["step"]: line["eval"]["loss"] for line in evaluations}
    best = min(losses, key=lambda step: losses[step])
    early = [losses[step] for step in range(2, 22, 2)]
    gains = [loss < min(early[:i], default=9e9) for i, loss in enumerate(early)]
    assert best < 22, "else this shows nothing"
    assert any(not a and not b for a, b in pairwise(gains)), "patience ran out early"
    assert record["best_step"] >= 22
    final = {step: loss for step, loss in losses.items() if step >= 22}
    assert record["best_step"] == min(final, key=lambda step: final[step])
    assert record["metrics"]["loss"] == final[record["best_step"]]
    tensors = load_file(run.adapter_dir / "adapter_model.safetensors")
    assert sum(int((v != 0).sum()) for n, v in tensors.items() if "lora_E" in n) == 8


def test_early_stopping_counts_in_the_final_phase(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = adalora_recipe(
        tmp_path, tiny_llama, train__learning_rate=3.0, train__lr_scheduler="constant",
        train__max_grad_norm=None, train__eval_every_steps=1, train__early_stopping_patience=1,
        adapter__tfinal=26, adapter__tinit=1,
    )  # fmt: skip
    run = lorakit.train(recipe)
    record = run_json(run.output_dir)
    assert record["best_step"] >= 6
    assert 6 < record["steps"] < 32, "it stopped early, and not before the ranks were fixed"
    assert sum(entry["rank"] for entry in record["ranks"]) == 8


# What is refused, and edges


@pytest.mark.parametrize(
    "phases",
    [
        {"adapter__tinit": 20, "adapter__tfinal": 12},
        {"adapter__tinit": 0.5, "adapter__tfinal": 0.5},
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_phases_that_fill_the_run(
    phases: dict[str, Any],
    dry: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = adalora_file(tmp_path, tiny_llama, **phases)
    before = tree(tmp_path)
    assert command(["train", str(file), *dry]) == 2
    out, err = capsys.readouterr()
    (line,) = [x for x in err.splitlines() if "error" in x]
    assert "adapter.tinit = " in line
    assert "adapter.tfinal = " in line
    assert "32 steps" in line
    assert "allowed: less than 32 in total" in line
    assert "Traceback" not in err
    assert out == ""
    assert tree(tmp_path) == before


def test_validate_names_an_initial_rank_below_the_target(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adalora_file(tmp_path, tiny_llama, adapter__init_r=1)
    assert command(["validate", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}" in err
    assert "adapter.init_r = 1" in err
    assert "allowed: 2 or more" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("init_r", "target_r"), [(2, 2), (1, 1)])
def test_a_target_that_equals_the_start(
    init_r: int, target_r: int, tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = adalora_recipe(
        tmp_path, tiny_bert, "glue/sst2", adapter__init_r=init_r, adapter__target_r=target_r
    )
    run = lorakit.train(recipe)
    assert [e["rank"] for e in run_json(run.output_dir)["ranks"]] == [target_r] * MATRICES
    assert {line["budget"] for line in log_lines(run.output_dir)} == {target_r * MATRICES}


def test_one_step_is_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    """The default phases are fractions, here 0 steps each."""
    recipe = adalora_recipe(
        tmp_path, tiny_llama, train__epochs=None, train__max_steps=1, train__eval_every_steps=None,
        adapter__tinit=0.1, adapter__tfinal=0.5,
    )  # fmt: skip
    run = lorakit.train(recipe)
    assert sum(entry["rank"] for entry in run_json(run.output_dir)["ranks"]) == 8


def test_the_table_has_a_place_for_every_name() -> None:
    ranks = {
        "h.0.attn.c_attn.q": 3,
        "h.11.attn.c_attn.q": 0,
        "h.0.mlp.c_fc": 12,
        "classifier.dense": 1,
    }
    assert rank_list(ranks)[1] == {"module": "h.11.attn.c_attn.q", "layer": 11, "rank": 0}
    assert rank_list(ranks)[3]["layer"] is None
    rows = [line.split() for line in rank_table(ranks).splitlines()]
    assert rows == [
        ["layer", "c_attn.q", "mlp.c_fc", "classifier.dense", "total"],
        ["0", "3", "12", ".", "15"],
        ["11", "0", ".", ".", "0"],
        ["-", ".", ".", "1", "1"],
        ["total", "3", "12", "1", "16"],
    ]


def test_the_table_keeps_matrices_apart_whose_names_end_alike() -> None:
    ranks = {
        "layer.0.attention.output.dense": 3,
        "layer.0.output.dense": 1,
        "layer.1.output.dense": 2,
    }
    rows = [line.split() for line in rank_table(ranks).splitlines()]
    assert rows == [
        ["layer", "attention.output.dense", "output.dense", "total"],
        ["0", "3", "1", "4"],
        ["1", ".", "2", "2"],
        ["total", "3", "3", "6"],
    ]
