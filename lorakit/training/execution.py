"""Choose how the steps of a run are executed: eagerly, as CUDA graphs, or with compiled layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lorakit.anatomy import is_routed_expert, layer_drops
from lorakit.data.encode import EncodedSplit
from lorakit.models.quantized import QuantizedLinear
from lorakit.training.setup import Prepared

#: ``joint``: the passes are computed with those of other runs, see ``training.joint``.
Mode = Literal["eager", "cuda_graphs", "compiled_layers", "joint"]

#: Below this many operations per pass, kernels take far less time than their launches from Python.
_LAUNCH_BOUND_FLOPS = 1e13
#: Up to this number, a graph is still faster than eager passes.
_GRAPHS_PAY_FLOPS = 8e13
#: From this number on, passes are captured only if there is room for a second one; those of the
#: members of a sweep are not, which was not measured.
_LARGE_FLOPS = 4e13
#: From this number on, compiled layers are faster than such a graph even if they are not replayed.
_COMPILED_PAYS_FLOPS = 6e13
#: Operations of a run that repay the time for compiling: about 100 s on an H100.
_COMPILE_PAYS_FLOPS = 4e16


@dataclass(frozen=True)
class Execution:
    """``note`` tells the user what was chosen and why; None for the default. ``replays``: the
    passes of compiled layers are replayed as CUDA graphs, too. ``if_room``: passes are captured
    only if the memory is enough for a second one."""

    mode: Mode
    note: str | None = None
    replays: bool = False
    if_room: bool = False


def choose_execution(
    prepared: Prepared, device: torch.device, total_steps: int, is_sharded: bool = False
) -> Execution:
    """Follow ``train.compile``: ``true`` compiles the layers, ``false`` runs eagerly, and ``auto``
    chooses what is faster for this model, batch size and run on a GPU. A graph cannot be captured
    of a model that ``is_sharded``. With ``auto``, a deterministic run is not compiled: the code
    depends on the first batches, which are others when a run is resumed."""
    section = prepared.recipe.train
    on_gpu = device.type == "cuda" and not _routes_tokens(prepared.model)
    flops = 4.0 * _matrix_parameters(prepared.model) * _tokens_per_batch(prepared)
    eager = not on_gpu or is_sharded or flops >= _GRAPHS_PAY_FLOPS
    otherwise = Execution("eager") if eager else _cuda_graphs(prepared)
    otherwise = replace(otherwise, if_room=flops >= _LARGE_FLOPS)
    replays = _can_replay(prepared, device, is_sharded)
    # Launched from Python, compiled layers of a small batch are slower than a graph of eager ones.
    compiled_is_faster = replays or otherwise.mode == "eager" or flops >= _COMPILED_PAYS_FLOPS
    if section.compile is True:
        faster = "" if compiled_is_faster else "; auto would be faster for batches this small"
        note = f"each layer is compiled (train.compile: true){faster}"
        return Execution("compiled_layers", note, replays, if_room=replays)
    if section.compile is False or not on_gpu:
        return Execution("eager")
    run_flops = flops * section.gradient_accumulation_steps * total_steps
    half = prepared.model.dtype in (torch.bfloat16, torch.float16)
    large = flops >= _LAUNCH_BOUND_FLOPS and run_flops >= _COMPILE_PAYS_FLOPS
    if large and half and not section.deterministic and compiled_is_faster:
        return Execution(
            "compiled_layers",
            "each layer is compiled, which takes up to a minute and pays for a run of this size "
            "(train.compile: false disables this)",
            replays,
            if_room=replays,
        )
    return otherwise


def replays_joint_passes(prepared: Prepared, device: torch.device, members: int) -> bool:
    """Whether the passes of so many runs like this one are replayed as CUDA graphs."""
    section = prepared.recipe.train
    if device.type != "cuda" or section.compile is False or _routes_tokens(prepared.model):
        return False
    flops = 4.0 * _matrix_parameters(prepared.model) * _tokens_per_batch(prepared) * members
    return flops < _LARGE_FLOPS and _cuda_graphs(prepared).mode == "cuda_graphs"


def _cuda_graphs(prepared: Prepared) -> Execution:
    recipe, section = prepared.recipe, prepared.recipe.train
    float16 = recipe.model.dtype == "float16"  # its loss scaler needs the host
    if float16 or recipe.task.packing or section.gradient_checkpointing:
        return Execution("eager")
    if layer_drops(prepared.model.config):  # a graph would always drop the same ones
        return Execution("eager")
    if section.deterministic and section.units_per_batch is None:
        return Execution("eager")  # which batches are replayed would depend on the first one's rows
    return Execution(
        "cuda_graphs",
        "forward and backward passes are replayed as CUDA graphs, since batches are small "
        "(train.compile: false disables this)",
    )


def _can_replay(prepared: Prepared, device: torch.device, is_sharded: bool) -> bool:
    """Whether the passes of compiled layers can be captured, and all batches have one shape: each
    further one would be compiled and captured, and keep the memory of its pass. Passes of quantized
    weights run eagerly."""
    section, train = prepared.recipe.train, prepared.train
    if device.type != "cuda" or is_sharded or _routes_tokens(prepared.model):
        return False
    if prepared.recipe.model.base_precision is not None:
        return False
    if _cuda_graphs(prepared).mode != "cuda_graphs" or section.max_tokens_per_batch:
        return False
    counts = [train.lengths, train.trained_counts] if isinstance(train, EncodedSplit) else []
    return bool(counts) and all(len(count) and count.min() == count.max() for count in counts)


def _matrix_parameters(model: Any) -> int:
    """The number of parameters without the embeddings, nearly all of which are matrices; quantizing
    the base does not change it, apart from biases."""
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    sizes = [layer.in_features * layer.out_features for layer in quantized]
    sizes += [p.numel() for p in model.parameters() if id(p) not in embeddings]
    return sum(sizes)


def _routes_tokens(model: nn.Module) -> bool:
    """Whether the model has experts, whose shapes depend on the tokens."""
    return any(is_routed_expert(name) for name, _ in model.named_parameters())


def _tokens_per_batch(prepared: Prepared) -> float:
    """The expected number of tokens of a micro-batch."""
    section, task = prepared.recipe.train, prepared.recipe.task
    rows = section.units_per_batch
    if rows is None or task.packing:
        return float(section.max_tokens_per_batch or (rows or 1) * task.max_length)
    train = prepared.train
    mean = float(train.lengths.mean()) if isinstance(train, EncodedSplit) else task.max_length
    return rows * mean
