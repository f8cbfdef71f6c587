"""Reads a loralib checkpoint as low-rank updates of matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapters.loralib import check_no_convolution, merged_linear, read_state
from lorakit.adapters.low_rank import (
    BASE_BIAS,
    BASE_WEIGHT,
    AdaptedMatrix,
    Updates,
    check_factors,
    check_matrices,
)
from lorakit.adapters.peft.schema import CLASSIFIER_HEADS
from lorakit.errors import AdapterError
from lorakit.module_names import is_suffix

#: The last part of the name by which a module is recognized as an embedding.
EMBEDDINGS = (
    "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings",
    "token_type_embeddings", "tok_embeddings", "embed_in", "embed_positions",
)  # fmt: skip


@dataclass(frozen=True)
class LoralibOptions:
    """Settings that a checkpoint does not record. For empty values, the metadata is used if lorakit
    wrote the file, else loralib's defaults.

    ``enable_lora``: ``q,v`` or ``1,0,1`` for every MergedLinear that the shapes reveal, or
    ``MODULE=...`` for modules with that suffix. ``embedding``: suffixes of module names.
    """

    lora_alpha: float | None = None
    enable_lora: Sequence[str] = ()
    embedding: Sequence[str] = ()
    base_model: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False


def read_loralib(file: Path, options: LoralibOptions) -> tuple[Updates, list[str]]:
    """Return the updates, and notes on what had to be assumed.

    Linear and MergedLinear are distinguished by shape, except for a MergedLinear with one
    projection enabled, which ``MODULE=`` must name; embeddings are recognized by name. Biases and
    fully trained modules are included. Raises AdapterError for a file that is unreadable,
    misshapen, or needs an option, and for a Conv2d, whose factors look like a Linear's, if its name
    or bias reveals it."""
    stored, facts = read_state(file)
    notes: list[str] = []
    try:
        factors, others = _split(_without_prefix(stored, notes), by_lorakit=bool(facts))
        alpha = _alpha(options, facts, notes)
        embeddings = _embeddings(factors, options, facts, notes)
        enabled = _enabled(factors, embeddings, options, facts)
        matrices = {}
        for name, (A, B) in factors.items():
            if name in enabled:
                matrices[name] = merged_linear(A, B, enabled[name], alpha / B.shape[1])
            else:
                matrices[name] = AdaptedMatrix(A, B, alpha / len(A), name in embeddings)
            check_no_convolution(name, matrices[name], others, by_name=not facts)
        config, others = _config(matrices, others, options, facts, notes)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error
    return Updates(matrices, others, config, {}), notes


def _without_prefix(stored: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Remove the prefix ``module.`` of DistributedDataParallel."""
    if not all(name.startswith("module.") for name in stored):
        return stored
    notes.append("removed the prefix module. of all names (DistributedDataParallel)")
    return {name.removeprefix("module."): value for name, value in stored.items()}


def _split(
    stored: Mapping[str, Tensor], *, by_lorakit: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return A and B by module, and the rest. In files written by lorakit, the rest may include the
    base's weight of an adapted embedding or output layer, which PEFT saves with the factors."""
    As = {n.removesuffix(".lora_A"): v for n, v in stored.items() if n.endswith(".lora_A")}
    Bs = {n.removesuffix(".lora_B"): v for n, v in stored.items() if n.endswith(".lora_B")}
    rest = {n: v for n, v in stored.items() if not n.endswith((".lora_A", ".lora_B"))}
    if unknown := [name for name in rest if "lora_" in name]:
        raise AdapterError(
            f"{unknown[0]}: not a name of loralib; allowed: MODULE.lora_A and MODULE.lora_B, where "
            "MODULE is its name in the model (a layer that was saved alone has none)"
        )
    if unpaired := sorted(set(As) ^ set(Bs)):
        missing = "B" if unpaired[0] in As else "A"
        raise AdapterError(f"missing tensor: {unpaired[0]}.lora_{missing}")
    if not As:
        raise AdapterError("not a loralib checkpoint: it has no MODULE.lora_A")
    if not by_lorakit and (adapted := [name for name in As if f"{name}.weight" in rest]):
        raise AdapterError(
            f"{adapted[0]}.weight: the file contains a whole model, whose weights loralib may have "
            "merged; hint: save only lora_state_dict(model)"
        )
    return {name: (As[name], Bs[name]) for name in As}, rest


def _alpha(options: LoralibOptions, facts: Mapping[str, Any], notes: list[str]) -> float:
    if options.lora_alpha is not None:
        if not (math.isfinite(options.lora_alpha) and options.lora_alpha > 0):
            raise AdapterError(f"--lora-alpha = {options.lora_alpha}: allowed: a number above 0")
        return options.lora_alpha
    if "lora_alpha" not in facts:
        notes.append(
            "lora_alpha = 1, loralib's default; pass --lora-alpha if training used another"
        )
    return float(facts.get("lora_alpha", 1))


def _embeddings(
    names: Mapping[str, Any], options: LoralibOptions, facts: Mapping[str, Any], notes: list[str]
) -> set[str]:
    found = set()
    for end in options.embedding:
        fitting = {name for name in names if is_suffix(end, name)}
        if not fitting:
            raise AdapterError(f"--embedding = {end}: no adapted module's name ends with it")
        found |= fitting
    if facts:
        return found | set(facts["embedding"]) & set(names)
    by_name = {name for name in names if name.rpartition(".")[2] in EMBEDDINGS} - found
    if by_name:
        notes.append(f"treated as an embedding by its name: {', '.join(sorted(by_name))}")
    return found | by_name


def _enabled(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    embeddings: set[str],
    options: LoralibOptions,
    facts: Mapping[str, Any],
) -> dict[str, list[bool]]:
    """Return ``enable_lora`` of each MergedLinear. Raises AdapterError if the shapes do not fit."""
    given = [_parsed(text) for text in options.enable_lora]
    used = set()
    enabled = {}
    for name, (A, B) in factors.items():
        check_matrices(name, A, B)
        r = B.shape[1]
        blocks = 1 if name in embeddings or len(A) % r else len(A) // r
        fitting = [g for g in given if (is_suffix(g[0], name) if g[0] else blocks > 1)]
        # A choice that names the module takes precedence.
        chosen = max(fitting, key=lambda g: len(g[0]), default=None)
        enable = chosen[1] if chosen else (facts.get("enable_lora") or {}).get(name)
        used.add(id(chosen))
        if enable is None and blocks > 1:
            raise AdapterError(
                f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} belong to a "
                f"MergedLinear with {blocks} projections enabled; hint: pass which ones as "
                "--enable-lora (q,v or 1,0,1)"
            )
        if enable is None:
            check_factors(name, A, B)
            continue
        if sum(enable) * r != len(A) or len(B) % blocks:
            raise AdapterError(
                f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit "
                f"the {sum(enable)} projections of r = {r} that --enable-lora enables"
            )
        enabled[name] = list(map(bool, enable))
    for choice in given:
        if id(choice) not in used:
            where = f"module's name ends with {choice[0]}" if choice[0] else "module is fused"
            raise AdapterError(f"--enable-lora: no adapted {where} by its shapes")
    return enabled


def _parsed(text: str) -> tuple[str, list[bool]]:
    """Parse ``[MODULE=]q,v`` or ``[MODULE=]1,0,1`` into a suffix and enable_lora."""
    module, _, spec = text.rpartition("=")
    items = [item.strip() for item in spec.split(",")]
    if items and all(item in ("q", "k", "v") for item in items):
        return module, [role in items for role in "qkv"]
    if "1" in items and all(item in ("0", "1") for item in items):
        return module, [item == "1" for item in items]
    raise AdapterError(
        f"--enable-lora = {text}: allowed: those of q,k,v that are enabled (q,v), or 1 or 0 for "
        "each projection (1,0,1), after an optional MODULE= for a suffix of the modules' names"
    )


def _config(
    matrices: Mapping[str, AdaptedMatrix],
    stored: Mapping[str, Tensor],
    options: LoralibOptions,
    facts: Mapping[str, Any],
    notes: list[str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the known keys of ``adapter_config.json``, and the other tensors by PEFT's names."""
    modules = {n: n.rpartition(".")[0] for n in stored if not n.endswith(".bias")}
    fully_trained = sorted({_head(module) for module in modules.values() if module not in matrices})
    others, bias = {}, "none"
    for key, value in stored.items():
        module = key.rpartition(".")[0]
        if key in modules and module in matrices:
            others[f"{module}{BASE_WEIGHT}"] = value
            continue
        if module in matrices:
            others[f"{module}{BASE_BIAS}"] = value
            bias = "lora_only" if bias == "none" else bias
            continue
        others[key] = value
        if _head(module) not in fully_trained:
            bias = "all"
    task_type = options.task_type or facts.get("task_type")
    if task_type is None:
        last_parts = {name.rpartition(".")[2] for name in fully_trained}
        task_type = "SEQ_CLS" if set(CLASSIFIER_HEADS) & last_parts else "CAUSAL_LM"
        notes.append(
            f"task_type = {task_type}, inferred from the tensors; --task-type overrides it"
        )
    config = {
        "base_model_name_or_path": options.base_model or facts.get("base_model"),
        "revision": None,
        "task_type": task_type,
        "bias": bias,
        "fan_in_fan_out": options.fan_in_fan_out or bool(facts.get("fan_in_fan_out")),
        "lora_dropout": 0.0,
        "modules_to_save": fully_trained or None,
        "target_modules": sorted(matrices),
    }
    return config, others


def _head(module: str) -> str:
    """The head that contains ``module``, which PEFT replaces as a whole; else the module."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part in CLASSIFIER_HEADS:
            return ".".join(parts[: i + 1])
    return module
