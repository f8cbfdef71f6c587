"""After the first step every adapted module has a gradient, or the run stops with an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lorakit import registry
from lorakit.cli.main import run
from lorakit.errors import TargetError
from lorakit.injection import inject
from lorakit.layers import adapter_layers
from lorakit.methods.lora import LoraConfig
from lorakit.targets import find_targets
from lorakit.training.engine.probe import GradientProbe
from tests.families import tiny, token_ids
from tests.hybrids import hybrid, saved_hybrid
from tests.training.runs import run_json, tree, write_recipe_file

FEW: dict[str, Any] = {"train__epochs": None, "train__max_steps": 2, "task__limit_eval": 2}


class Mixture(nn.Module):
    """A list of experts, of which ``used`` receive tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.used: tuple[int, ...] = (0,)
        self.detached = False

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index in self.used:
            out = self.experts[index](x)
            y = y + (out.detach() if self.detached else out)
        return y


class Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.proj, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way
        self.gate = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(x)
        if self.way == "read past forward":
            return x + nn.functional.linear(x, self.proj.weight, self.proj.bias)
        if self.way == "never used":
            return x
        if self.way == "without gradient":
            with torch.no_grad():
                y = self.proj(x)
            return x + y
        if self.way == "closed gate":
            return x + self.gate * self.proj(x)
        return x + self.proj(x)


def step(model: nn.Module, targets: list[str], counts: bool = True, **inputs: Any) -> list[str]:
    """Run a backward pass over an adapted ``model`` and return the notes of the check."""
    notes: list[str] = []
    inject(model, LoraConfig(r=2, target_modules=targets))
    probe = GradientProbe(model.train(), notes.append, count_calls=counts)
    model(torch.randn(3, 4)).square().sum().backward()
    probe.check()
    assert not [m for m in model.modules() if m._forward_hooks]
    return notes


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("way", ["read past forward", "never used", "without gradient"])
def test_a_module_without_a_gradient_is_named(way: str, counts: bool) -> None:
    with pytest.raises(
        TargetError, match=r"no gradient reaches proj: .*target_modules: \[inner\]$"
    ):
        step(Block(way), ["all-linear"], counts)


def test_a_trained_module_passes() -> None:
    assert step(Block("used"), ["all-linear"]) == []


def test_a_zero_gradient_is_reported() -> None:
    (note,) = step(Block("closed gate"), ["all-linear"])
    assert "gradient of proj is exactly zero" in note


@pytest.mark.parametrize("counts", [True, False])
def test_an_expert_without_tokens_is_fine(counts: bool) -> None:
    assert step(Mixture(), ["all-linear"], counts) == []


def test_an_expert_with_tokens_needs_a_gradient() -> None:
    model = Mixture()
    model.detached = True
    with pytest.raises(TargetError, match=r"no gradient reaches 1\.experts\.0"):
        step(nn.Sequential(nn.Linear(4, 4), model, nn.Linear(4, 4)), ["re:1.experts.*", "2"])


def test_layers_that_are_skipped_at_random_are_fine() -> None:
    model = tiny("opt", layerdrop=1.0).train()
    inject(model, LoraConfig(r=2, target_modules=["q", "v"]))
    probe = GradientProbe(model, print)
    with pytest.raises(RuntimeError):
        model(token_ids()).logits.sum().backward()
    probe.check()


METHODS = sorted(set(registry.methods()) - {"full", "bitfit"})
INITS = ("b_gaussian", "pissa", "orthogonal")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_method_passes(method: str, family: str) -> None:
    config = registry.methods()[method].Config(target_modules=["attention"])
    _check(tiny(family), config)


@pytest.mark.parametrize("init", INITS)
def test_every_init_passes(init: str) -> None:
    _check(tiny("llama"), LoraConfig(init=init, target_modules=["q", "v", "embed_tokens"]))


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize(
    "family", ["qwen3_next", "deepseek_v3", "llama4_text", "falcon_h1", "gpt_oss"]
)
def test_every_attention_passes(family: str, targets: str) -> None:
    _check(hybrid(family), LoraConfig(target_modules=[targets]))


def test_a_router_that_is_never_called_is_excluded() -> None:
    model = hybrid("longcat_flash")
    _check(model, LoraConfig(target_modules=["all-linear"]))
    assert not [name for name in adapter_layers(model) if "router" in name]
    with pytest.raises(TargetError, match=r"mlp\.router\.classifier.*target_modules: \[o_proj\]"):
        _check(hybrid("longcat_flash"), LoraConfig(target_modules=["classifier", "o_proj"]))


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_the_advice_covers_the_rest_exactly(layers: list[int] | None) -> None:
    """Zamba2 shares blocks in which each adapter of a list is used by one layer."""
    model = hybrid("zamba2")
    with pytest.raises(TargetError) as error:
        _check(model, LoraConfig(target_modules=["all-linear"], layers=layers))
    advice = yaml.safe_load(str(error.value).rpartition("target_modules: ")[2])
    assert "q_proj" in advice
    bare = hybrid("zamba2")
    live = set(find_targets(bare, advice, layers))
    everything = set(find_targets(bare, ["all-linear"], layers, ["lm_head"]))
    assert live < everything
    assert all("adapter_list" in name for name in everything - live)
    _check(bare, LoraConfig(target_modules=advice, layers=layers))


def _check(model: nn.Module, config: Any) -> None:
    inject(model, config)
    probe = GradientProbe(model.train(), lambda note: pytest.fail(note))
    logits = model(input_ids=token_ids(), use_cache=False).logits
    logits.float().log_softmax(-1)[..., 7].mean().backward()
    probe.check()


# Whole runs


def _hybrid_recipe(
    name: str, tiny_llama: Path, folder: Path, targets: list[str], **more: Any
) -> Path:
    model = saved_hybrid(name, tiny_llama, folder / name)
    return write_recipe_file(
        folder, model, "completion", adapter__target_modules=targets, **FEW, **more
    )


def test_mamba_reads_a_weight_without_calling_the_module(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _hybrid_recipe("mamba", tiny_llama, tmp_path, ["all-linear"])
    for options in (["--dry-run"], []):
        capsys.readouterr()
        assert run(["train", str(recipe), *options]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert "no gradient reaches backbone.layers.{0-1}.mixer.dt_proj" in line
        assert line.endswith("target_modules: [in_proj, x_proj, out_proj]")
        assert not (tmp_path / "run").exists()
    alone = "adapter.target_modules=[dt_proj]"
    assert run(["train", str(recipe), "--set", alone]) == 2
    assert "no gradient reaches" in capsys.readouterr().err
    others = 'adapter.target_modules=["in_proj", "x_proj", "out_proj"]'
    assert run(["train", str(recipe), "--set", others]) == 0


def test_a_refused_run_leaves_the_directory_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = _hybrid_recipe(
        "mamba", tiny_llama, tmp_path, ["all-linear"], train__trackers=["tensorboard"]
    )
    nested = tmp_path / "new" / "run"
    assert run(["train", str(recipe), "--output-dir", str(nested)]) == 2
    assert not (tmp_path / "new").exists()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "run.json").write_text("{}")
    before = tree(folder)
    assert run(["train", str(recipe)]) == 2
    assert tree(folder) == before


def test_a_module_to_save_outside_the_language_model(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _hybrid_recipe(
        "gemma3",
        tiny_llama,
        tmp_path,
        ["q", "v"],
        adapter__modules_to_save=["multi_modal_projector"],
    )
    assert run(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "model.multi_modal_projector: outside the language model" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["qwen3_next", "llama4_text", "gemma3"])
def test_coverage_is_reported_and_recorded(
    name: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _hybrid_recipe(name, tiny_llama, tmp_path, ["all-linear"])
    capsys.readouterr()
    assert run(["train", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run(["train", str(recipe)]) == 0
    said = capsys.readouterr().err
    coverage = run_json(tmp_path / "run")["coverage"]
    assert plan["coverage"] == coverage
    (line,) = [x for x in said.splitlines() if "targets cover" in x]
    assert "of attention" in line
    wanted = {"qwen3_next": "experts", "llama4_text": "router", "gemma3": "vision_tower"}[name]
    assert [m for m in coverage["missed"] if wanted in m["modules"] and m["share"] > 0]
    assert any("not adapted" in x and wanted in x and "%" in x for x in said.splitlines())
    assert coverage["parts"]["MLP"]["covered"] == coverage["parts"]["MLP"]["total"]
