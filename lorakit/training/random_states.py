"""The states of the random number generators of torch, Python and NumPy."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: torch's generators as tensors; Python's and NumPy's as JSON.
RandomStates = tuple[dict[str, Tensor], dict[str, Any]]


def random_states() -> RandomStates:
    """Return the states of the random number generators of torch, Python and NumPy."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return tensors, {"python": [version, list(numbers), gauss], "numpy": numpy_state}


def restore_random_states(states: list[RandomStates], rank: int = 0) -> None:
    """Restore the states of this process; those of a further one than there were stay as they
    are."""
    if rank >= len(states):
        return
    tensors, plain = states[rank]
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    random.setstate(_python_state(plain))
    np.random.set_state(_numpy_state(plain))


def check_random_states(states: RandomStates) -> None:
    """Raise ValueError for states that a generator does not accept, without changing the global
    ones."""
    tensors, plain = states
    try:
        torch.Generator().set_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.Generator("cuda").set_state(tensors["cuda"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"random.safetensors: {error}") from error
    try:
        random.Random().setstate(_python_state(plain))
        numpy_state = _numpy_state(plain)
        if not 0 <= numpy_state["state"]["pos"] <= 624:  # numpy does not check it
            raise ValueError("numpy's position is out of range")
        np.random.RandomState().set_state(numpy_state)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"state.json: random: {error}") from error


def _python_state(plain: dict[str, Any]) -> tuple[int, tuple[int, ...], float | None]:
    version, numbers, gauss = plain["python"]
    if not (gauss is None or isinstance(gauss, float)):
        raise TypeError("not a number")
    return version, tuple(numbers), gauss


def _numpy_state(plain: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plain["numpy"]
    state = found["state"]
    return {**found, "state": {**state, "key": np.asarray(state["key"], dtype=np.uint32)}}
