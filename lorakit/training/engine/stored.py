"""Checks the state of a checkpoint against the engine that is to load it, before it is loaded.

An optimizer or a scheduler takes what it is given; a wrong shape would fail, or corrupt memory,
only in a later step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorakit.errors import shown
from lorakit.training.engine import EngineState, same_shapes

#: What each optimizer keeps for a parameter after a step: AdamW, SGD, and 8-bit AdamW for large and
#: small parameters.
_ADAM8 = {"step", "state1", "state2"}
_KEYS: tuple[set[str], ...] = (
    {"step", "exp_avg", "exp_avg_sq"},
    set(),
    {"momentum_buffer"},
    _ADAM8,
    _ADAM8 | {"qmap1", "qmap2", "absmax1", "absmax2"},
)
_BLOCK, _CODES = 256, 256


def fitted(
    stored: EngineState, now: EngineState, groups: Sequence[Mapping[str, Any]]
) -> EngineState:
    """Return ``stored`` with the settings that it lacks, which a later version may have added,
    taken from ``now``, the state of an engine whose optimizer has ``groups``.

    Raises ValueError if ``stored`` is of another model, method or optimizer.
    """
    for part in ("weights", "method"):
        if not same_shapes(getattr(stored, part), getattr(now, part)):
            raise ValueError(f"the state is of another model or method: its {part} differ")
    parameters = [parameter for group in groups for parameter in group["params"]]
    for index, values in stored.optimizer["state"].items():
        if not 0 <= index < len(parameters):
            raise ValueError("the state is of another model or method: its optimizer differs")
        _check_optimizer_state(values, parameters[index])
    param_groups = _like(stored.optimizer["param_groups"], now.optimizer["param_groups"], "groups")
    if [g["params"] for g in param_groups] != [g["params"] for g in now.optimizer["param_groups"]]:
        raise ValueError("the optimizer's groups have other parameters")
    scaler = stored.scaler and now.scaler and _like(stored.scaler, now.scaler, "scaler")
    return replace(
        stored,
        optimizer={"state": stored.optimizer["state"], "param_groups": param_groups},
        scheduler=_like(stored.scheduler, now.scheduler, "scheduler"),
        scaler=scaler,
    )


def _check_optimizer_state(stored: Mapping[str, Any], parameter: Tensor) -> None:
    values = {key: value for key, value in stored.items() if not isinstance(value, dict)}
    for group in stored.values():
        values |= group if isinstance(group, dict) else {}
    if set(values) not in _KEYS:
        raise ValueError("the state is of another optimizer")
    for key, value in values.items():
        if isinstance(value, Tensor):
            if tuple(value.shape) not in _shapes(key, parameter):
                raise ValueError(f"the optimizer's {key} has the shape {tuple(value.shape)}")
        elif key != "step" or type(value) is not int:
            raise ValueError(f"the optimizer's {key} is {shown(value)}")


def _shapes(key: str, parameter: Tensor) -> list[tuple[int, ...]]:
    if key == "step":
        return [()]
    if key.startswith("qmap"):
        return [(_CODES,)]
    if key.startswith("absmax"):
        return [(math.ceil(parameter.numel() / _BLOCK),)]
    return [tuple(parameter.shape)]


def _like(stored: Any, now: Any, where: str) -> Any:
    """``stored`` with the keys of mappings that only ``now`` has. Raises ValueError unless both
    have the same structure, with numbers for numbers."""
    if isinstance(now, dict):
        if not isinstance(stored, dict) or not stored.keys() <= now.keys():
            raise ValueError(f"its {where} has other keys")
        missing = {key: value for key, value in now.items() if key not in stored}
        return {k: _like(v, now[k], f"{where}.{k}") for k, v in stored.items()} | missing
    if isinstance(now, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(now):
            raise ValueError(f"its {where} has another length")
        return [_like(a, b, where) for a, b in zip(stored, now, strict=True)]
    if isinstance(now, Tensor):
        now = now.item()
    numbers = (int, float)
    is_number = type(now) in numbers
    if is_number != (type(stored) in numbers) or (not is_number and type(stored) is not type(now)):
        raise ValueError(f"its {where} is {shown(stored)}")
    if is_number and not (math.isfinite(stored) and abs(stored) < 2**53):
        raise ValueError(f"its {where} is {shown(stored)}")
    return stored
