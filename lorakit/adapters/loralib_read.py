"""A loralib checkpoint read as updates of matrices."""

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
    LowRank,
    Updates,
    check_factors,
    check_matrices,
)
from lorakit.adapters.peft.schema import SEQ_CLS_HEADS
from lorakit.errors import AdapterError

#: The last part of the name by which a module is taken for an embedding.
EMBEDDINGS = (
    "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings",
    "token_type_embeddings", "tok_embeddings", "embed_in", "embed_positions",
)  # fmt: skip


@dataclass(frozen=True)
class LoralibOptions:
    """What a checkpoint does not say; None or nothing takes what its metadata says, if lorakit
    wrote it, else loralib's default.

    ``enable_lora``: ``q,v`` or ``1,0,1``, for those MergedLinear that the shapes tell, or
    ``MODULE=...`` for one end of their names. ``embedding``: ends of names.
    """

    lora_alpha: float | None = None
    enable_lora: Sequence[str] = ()
    embedding: Sequence[str] = ()
    base_model: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False


def read_loralib(file: Path, options: LoralibOptions) -> tuple[Updates, list[str]]:
    """The updates, and what was taken without the file saying so.

    Linear and MergedLinear are told by the shapes, but for a MergedLinear with one projection
    enabled, which ``MODULE=`` names; embeddings by their names. Biases, and modules trained whole,
    are kept. Raises AdapterError for what cannot be read, is misshapen, or needs an option; also
    for a Conv2d, whose factors look like a Linear's, where its name or its bias gives it away.
    """
    stored, told = read_state(file)
    notes: list[str] = []
    try:
        factors, beside = _sorted(_without_prefix(stored, notes), own=bool(told))
        alpha = _alpha(options, told, notes)
        embeddings = _embeddings(factors, options, told, notes)
        enabled = _enabled(factors, embeddings, options, told)
        matrices = {}
        for name, (A, B) in factors.items():
            if name in enabled:
                matrices[name] = merged_linear(A, B, enabled[name], alpha / B.shape[1])
            else:
                matrices[name] = LowRank(A, B, alpha / len(A), name in embeddings)
            check_no_convolution(name, matrices[name], beside, by_name=not told)
        config, beside = _config(matrices, beside, options, told, notes)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error
    return Updates(matrices, beside, config, {}), notes


def _without_prefix(stored: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Without the ``module.`` of a model that was trained in DistributedDataParallel."""
    if not all(name.startswith("module.") for name in stored):
        return stored
    notes.append("module., which starts all names, is left out (DistributedDataParallel's)")
    return {name.removeprefix("module."): value for name, value in stored.items()}


def _sorted(
    stored: Mapping[str, Tensor], *, own: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A and B by module, and the rest. In ``own`` files that may be the base's weight of an adapted
    embedding or output layer, which PEFT saves with it."""
    As = {n.removesuffix(".lora_A"): v for n, v in stored.items() if n.endswith(".lora_A")}
    Bs = {n.removesuffix(".lora_B"): v for n, v in stored.items() if n.endswith(".lora_B")}
    rest = {n: v for n, v in stored.items() if not n.endswith((".lora_A", ".lora_B"))}
    if unknown := [name for name in rest if "lora_" in name]:
        raise AdapterError(
            f"{unknown[0]}: not a name of loralib; allowed: MODULE.lora_A and MODULE.lora_B, where "
            "MODULE is its name in the model (a layer saved alone has none)"
        )
    if lonely := sorted(set(As) ^ set(Bs)):
        raise AdapterError(f"missing tensor: {lonely[0]}.lora_{'B' if lonely[0] in As else 'A'}")
    if not As:
        raise AdapterError("no loralib checkpoint: it holds no MODULE.lora_A")
    if not own and (whole := [name for name in As if f"{name}.weight" in rest]):
        raise AdapterError(
            f"{whole[0]}.weight: a whole model, whose weights loralib may have merged; save "
            "lora_state_dict(model) alone"
        )
    return {name: (As[name], Bs[name]) for name in As}, rest


def _alpha(options: LoralibOptions, told: Mapping[str, Any], notes: list[str]) -> float:
    if options.lora_alpha is not None:
        if not (math.isfinite(options.lora_alpha) and options.lora_alpha > 0):
            raise AdapterError(f"--lora-alpha = {options.lora_alpha}: allowed: a number above 0")
        return options.lora_alpha
    if "lora_alpha" not in told:
        notes.append("lora_alpha = 1, loralib's default; --lora-alpha gives that of the training")
    return float(told.get("lora_alpha", 1))


def _embeddings(
    names: Mapping[str, Any], options: LoralibOptions, told: Mapping[str, Any], notes: list[str]
) -> set[str]:
    found = set()
    for end in options.embedding:
        fitting = {name for name in names if _is_end(end, name)}
        if not fitting:
            raise AdapterError(f"--embedding = {end}: no adapted module's name ends so")
        found |= fitting
    if told:
        return found | set(told["embedding"]) & set(names)
    by_name = {name for name in names if name.rpartition(".")[2] in EMBEDDINGS} - found
    if by_name:
        notes.append(f"taken for an embedding by its name: {', '.join(sorted(by_name))}")
    return found | by_name


def _enabled(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    embeddings: set[str],
    options: LoralibOptions,
    told: Mapping[str, Any],
) -> dict[str, list[bool]]:
    """``enable_lora`` of each MergedLinear, whose shapes it fits."""
    given = [_parsed(text) for text in options.enable_lora]
    used = set()
    enabled = {}
    for name, (A, B) in factors.items():
        check_matrices(name, A, B)
        r = B.shape[1]
        blocks = 1 if name in embeddings or len(A) % r else len(A) // r
        fitting = [g for g in given if (_is_end(g[0], name) if g[0] else blocks > 1)]
        # What names the module goes before what does not.
        chosen = max(fitting, key=lambda g: len(g[0]), default=None)
        enable = chosen[1] if chosen else (told.get("enable_lora") or {}).get(name)
        used.add(id(chosen))
        if enable is None and blocks > 1:
            raise AdapterError(
                f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are a MergedLinear's "
                f"with {blocks} projections enabled: --enable-lora must say which of how many "
                "(q,v or 1,0,1)"
            )
        if enable is None:
            check_factors(name, A, B)
            continue
        if sum(enable) * r != len(A) or len(B) % blocks:
            raise AdapterError(
                f"{name}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not of "
                f"the {sum(enable)} projections of r = {r} that --enable-lora enables"
            )
        enabled[name] = list(map(bool, enable))
    for choice in given:
        if id(choice) not in used:
            where = f"module's name ends with {choice[0]}" if choice[0] else "module is fused"
            raise AdapterError(f"--enable-lora: no adapted {where} by its shapes")
    return enabled


def _parsed(text: str) -> tuple[str, list[bool]]:
    """``[MODULE=]q,v`` or ``[MODULE=]1,0,1`` -> the module's end, and enable_lora."""
    module, _, spec = text.rpartition("=")
    items = [item.strip() for item in spec.split(",")]
    if items and all(item in ("q", "k", "v") for item in items):
        return module, [role in items for role in "qkv"]
    if "1" in items and all(item in ("0", "1") for item in items):
        return module, [item == "1" for item in items]
    raise AdapterError(
        f"--enable-lora = {text}: allowed: of q,k,v those enabled (q,v), or a 1 or 0 for each "
        "projection (1,0,1); MODULE= before it for one end of the modules' names"
    )


def _config(
    matrices: Mapping[str, LowRank],
    stored: Mapping[str, Tensor],
    options: LoralibOptions,
    told: Mapping[str, Any],
    notes: list[str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``adapter_config.json`` as far as it is known, and the tensors beside by PEFT's names."""
    modules = {n: n.rpartition(".")[0] for n in stored if not n.endswith(".bias")}
    whole = sorted({_head(module) for module in modules.values() if module not in matrices})
    beside, bias = {}, "none"
    for key, value in stored.items():
        module = key.rpartition(".")[0]
        if key in modules and module in matrices:
            beside[f"{module}{BASE_WEIGHT}"] = value
            continue
        if module in matrices:
            beside[f"{module}{BASE_BIAS}"] = value
            bias = "lora_only" if bias == "none" else bias
            continue
        beside[key] = value
        if _head(module) not in whole:
            bias = "all"
    task_type = options.task_type or told.get("task_type")
    if task_type is None:
        task_type = "SEQ_CLS" if set(SEQ_CLS_HEADS) & {n.split(".")[-1] for n in whole} else None
        task_type = task_type or "CAUSAL_LM"
        notes.append(f"task_type = {task_type}, by the tensors; --task-type gives another")
    config = {
        "base_model_name_or_path": options.base_model or told.get("base_model"),
        "revision": None,
        "task_type": task_type,
        "bias": bias,
        "fan_in_fan_out": options.fan_in_fan_out or bool(told.get("fan_in_fan_out")),
        "lora_dropout": 0.0,
        "modules_to_save": whole or None,
        "target_modules": sorted(matrices),
    }
    return config, beside


def _head(module: str) -> str:
    """The head that ``module`` lies in, which PEFT replaces as one; else the module."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part in SEQ_CLS_HEADS:
            return ".".join(parts[: i + 1])
    return module


def _is_end(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")
