"""``lorakit train`` with frozen weights that are sharded over processes equals one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lorakit
from tests.e2e.processes import REPO, ended, launch, start
from tests.e2e.shared_runs import (
    ADALORA,
    FSDP,
    LORA,
    STOPPED,
    TRAIN,
    assert_equal,
    command,
    recipe,
    split_over,
    train_alone,
    wait_for,
)
from tests.training.runs import (
    adapter_bytes,
    learning,
    run_json,
)

GENERATED: dict[str, Any] = {"task__eval_generate": "always", "task__max_new_tokens": 12}
#: name -> (adapter, changes of the recipe)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (LORA | {"bias": "all"}, GENERATED),
    "lora_plus": (LORA | {"method": "lora_plus"}, {}),
    "adalora": (ADALORA | {"target_modules": ["q", "v"]}, {}),
    "dora": (LORA | {"method": "dora"}, {}),
    "intrinsic": ({"method": "intrinsic", "d": 50, "target_modules": ["q", "v"]}, {}),
    "pissa": (LORA | {"init": "pissa"}, {}),
    "checkpointed": (LORA, {"train__gradient_checkpointing": True}),
    "packed": (LORA, {"task__packing": True, "train__per_device_eval_batch_size": 1}),
    "new tokens": (LORA, {"model__add_tokens": ["red", "<new>"]}),
    "bitfit": ({"method": "bitfit"}, {"train__per_device_eval_batch_size": 1}),
    "streamed": (
        LORA, {"task__streaming": True, "train__max_steps": 5, "train__epochs": None}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained_alone(
    tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The recipe of each run, which one process has trained."""
    return train_alone(tmp_path_factory.mktemp("alone"), tiny_llama, tiny_bert, RUNS)


@pytest.mark.parametrize(
    ("processes", "reshard"), [(2, "true"), pytest.param(3, "false", marks=pytest.mark.slow)]
)
def test_every_method_equals_one_process(
    processes: int, reshard: str, trained_alone: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [
        (alone, split_over(processes, alone, tmp_path / name))
        for name, alone in trained_alone.items()
    ]
    variables = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": reshard}
    for code, _, err in launch(
        processes, "-c", TRAIN, *(shared for _, shared in pairs), **variables
    ):
        assert code == 0, err
    for alone, shared in pairs:
        assert_equal(alone, shared)


def test_a_killed_process_ends_the_others_and_the_run_resumes_exactly(
    tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = ADALORA | {"target_modules": ["q", "v"], "lora_dropout": 0.2, "tfinal": 0.4}
    file = recipe(tmp_path / "long", tiny_llama, "completion", adapter, **STOPPED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, _, _ in launch(2, *command(file, whole), **FSDP)] == [0, 0]
    started = start(2, *command(file, cut), **FSDP)
    wait_for(cut / "checkpoints" / "step-8")
    started[1].send_signal(signal.SIGKILL)
    [(code, _, err), _] = ended(started, seconds=30)
    assert code == 1
    assert "error: the connection to another process is lost" in err
    assert f"last good checkpoint: {cut / 'checkpoints' / 'step-'}" in err
    assert "Traceback" not in err
    assert not (cut / "adapter").exists()
    for code, _, err in launch(2, *command(file, cut, "--resume", "auto"), **FSDP):
        assert code == 0, err
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert learning(cut) == learning(whole)


#: Builds the model of a recipe and prints how many values of the layers this process holds: of
#: frozen matrices, and others.
COUNT = """
import sys, torch, lorakit
from lorakit.api import process_group
from lorakit.anatomy import transformer_layers
from lorakit.distributed.build import build_strategy
from lorakit.distributed.group import init_process_group
from lorakit.training.build import build_objective
from lorakit.training.setup import prepare
with process_group():
    init_process_group()
    recipe = lorakit.load_recipe(sys.argv[1])
    prepared = prepare(recipe, lambda text: None)
    build_objective(prepared, build_strategy("float32"), lambda text: None)
    frozen = other = 0
    for layer in transformer_layers(prepared.model):
        if hasattr(layer, "reshard"):  # the last one is still gathered after a forward pass
            layer.reshard()
        for parameter in layer.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.requires_grad or parameter.dim() < 2:
                other += local.numel()
            else:
                frozen += local.numel()
    print(frozen, other)
"""


def test_each_process_has_half_of_the_frozen_matrices(tiny_llama: Path, tmp_path: Path) -> None:
    """Trained factors and vectors are whole."""
    file = recipe(tmp_path, tiny_llama, "completion", LORA)
    whole = [int(n) for n in launch(1, "-c", COUNT, file)[0][1].split()]
    for code, out, err in launch(2, "-c", COUNT, file, **FSDP):
        assert code == 0, err
        frozen, other = map(int, out.split())
        assert other == whole[1]
        assert frozen == whole[0] / 2


#: Compares gradients with and without sharding, for rows of other lengths in each process.
GRADIENTS = """
import sys, torch
from lorakit.api import process_group
from lorakit.distributed.build import build_strategy
from lorakit.distributed.group import init_process_group
from lorakit.injection import inject, trainable_state
from lorakit.methods.lora import LoraConfig
from lorakit.training.fast_layers import compile_layers, fuse_layers
from lorakit.training.offload import offload_layers
from tests.families import tiny
from tests.hybrids import hybrid

def gradients(model, rank):
    torch.manual_seed(0)
    model.train()
    for length in range(3, 6):
        ids = torch.arange(length + rank)[None]
        model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    return {name: p.grad for name, p in trainable_state(model).items()}

def adapted(build, family):
    model = build(family)
    torch.manual_seed(0)
    inject(model, LoraConfig(r=2, target_modules=["q", "v"]))
    for parameter in trainable_state(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model

with process_group():
    init_process_group()
    strategy = build_strategy("float32")
    for build, family in (
        (tiny, "gpt2"), (tiny, "phi3"), (tiny, "albert"), (hybrid, "mixtral"), (hybrid, "zamba2"),
        (hybrid, "qwen3_5"), (tiny, "llama"),
    ):
        whole, sharded = adapted(build, family), adapted(build, family)
        strategy.place(sharded)
        if family == "llama":
            offload_layers(sharded, strategy.device, compiled=False)
        wanted = gradients(whole, strategy.share.rank)
        for name, gradient in gradients(sharded, strategy.share.rank).items():
            torch.testing.assert_close(gradient, wanted[name], msg=f"{family}: {name}")
    for offloads in (False, True):
        halves = [adapted(tiny, "llama").bfloat16() for _ in range(2)]
        strategy.place(halves[0], checkpoints=offloads)
        for model, is_sharded in zip(halves, (True, False)):
            fuse_layers(model, is_sharded)
            if offloads and is_sharded:
                offload_layers(model, strategy.device, True, "aot_eager")
            else:
                compile_layers(model, "aot_eager", has_hooks=is_sharded)
        found, wanted = (gradients(model, strategy.share.rank) for model in halves)
        for name, gradient in found.items():
            error = (gradient - wanted[name]).norm() / wanted[name].norm()
            assert error < 0.02, f"compiled, offloaded: {offloads}: {name}: {error}"
        if offloads:
            layers = halves[0].get_decoder().layers
            assert all(layer.forward.recomputed for layer in layers), "each is a single graph"
"""


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_model() -> None:
    """Fused projections, layers called several times, experts, modules that layers share, parts of
    a multimodal model, layers that are recomputed from host memory, and compiled ones."""
    for code, _, err in launch(2, "-c", GRADIENTS, **FSDP):
        assert code == 0, err


#: One process runs out of memory in a pass that needs both, in the middle of the model.
NO_MEMORY = """
import os, sys, torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaMLP

trains, passes = [], []

def fail(module, _args):
    if not isinstance(module, LlamaMLP):
        return
    trains.append(module.training)
    if trains[-1] == (os.environ["WHEN"] == "training") and any(trains):
        passes.append(module)
        if os.environ["RANK"] == "1" and len(passes) == 3:
            raise torch.OutOfMemoryError("no memory left")

register_module_forward_pre_hook(fail)
from lorakit.cli.main import main
sys.argv = ["lorakit", "train", os.environ["RECIPE"]]
main()
"""


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ("training", "step 2: out of memory on cpu with a batch of "),
        (
            "evaluation",
            "step 3: out of memory on cpu in an evaluation; lower train.per_device_eval_",
        ),
    ],
)
def test_a_process_without_memory_ends_the_others(
    when: str, told: str, tiny_llama: Path, tmp_path: Path
) -> None:
    changes = {"train__eval_every_steps": 3, "train__per_device_eval_batch_size": 2}
    alone = recipe(tmp_path / "alone", tiny_llama, "completion", LORA, **changes)
    shared = split_over(2, alone, tmp_path / "shared")
    found = ended(start(2, "-c", NO_MEMORY, RECIPE=str(shared), WHEN=when, **FSDP), seconds=60)
    assert [code for code, _, _ in found] == [1, 1]
    assert f"error: {told}" in found[1][2]
    assert "error: the connection to another process is lost" in found[0][2]
    assert not any("Traceback" in err for _, _, err in found)


#: One process is killed before a pass that needs both.
KILLED = """
import os, signal, torch
import torch.distributed as dist
from lorakit.api import process_group
with process_group():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
"""


def test_a_process_killed_in_a_pass_is_reported() -> None:
    [(code, _, err), _] = launch(2, "-c", KILLED)
    assert code == 1
    assert "ConnectionLost: the connection to another process is lost" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version = 1: not supported; allowed: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params = true: not supported"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "ram_efficient_loading = true: not supported"),
    ],
)
def test_other_settings_of_fsdp_are_refused(
    variable: str, value: str, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    file = recipe(tmp_path, tiny_llama, "completion", LORA)
    variables = FSDP | {variable: value}
    refused(message, launch(2, *command(file, tmp_path / "run"), **variables), tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("adapter", {"method": "full"}, "adapter.method = 'full': FSDP shards the frozen weights"),
        ("model", {"base_precision": "nf4"}, "model.base_precision = 'nf4': not supported with"),
    ],
)
def test_recipes_that_cannot_be_sharded_are_refused(
    section: str, values: dict[str, str], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    file = recipe(tmp_path, tiny_llama, "completion", LORA)
    content = json.loads(file.read_text())
    content[section] = values if section == "adapter" else content[section] | values
    file.write_text(json.dumps(content))
    refused(message, launch(2, *command(file, tmp_path / "run"), **FSDP), tmp_path / "run")


def refused(message: str, found: list[tuple[int, str, str]], output_dir: Path) -> None:
    first, second = found
    assert (first[0], second[0]) == (2, 2)
    assert message in first[2]
    assert first[2].startswith("error: ")
    assert "Traceback" not in first[2]
    assert second[1:] == ("", "")
    assert not output_dir.exists()


@pytest.mark.slow
def test_accelerate_launch_starts_it(tiny_llama: Path, tmp_path: Path) -> None:
    """Without GPUs, the processes of a configuration for GPUs train on the CPU."""
    file = recipe(tmp_path / "alone", tiny_llama, "completion", LORA)
    lorakit.train(lorakit.load_recipe(file))
    shared = split_over(2, file, tmp_path / "shared")
    launcher = (
        "-m", "accelerate.commands.accelerate_cli", "launch",
        "--config_file", REPO / "configs" / "fsdp2.yaml", "--num_processes", "2",
        "--main_process_port", "0", "-m", "lorakit", "train", shared,
    )  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *map(str, launcher)], env=environment, cwd=REPO, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert run_json(tmp_path / "shared" / "run")["hardware"]["processes"] == 2
    assert_equal(file, shared)
