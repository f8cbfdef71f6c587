"""Results of a golden run: storage and comparison."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.golden.models import uniform

#: Of a value, and of the norm of a tensor, whose gradients cancel more. Other instruction sets
#: (SSE, AVX2, AVX-512) change these runs by less, a changed formula by more.
TOLERANCE, TENSOR_TOLERANCE = 5e-6, 1e-5
_PROJECTIONS = 3
#: Differences of these are relative to 1: they may be near 0 by cancellation.
_CORRELATIONS = ("pearson", "spearmanr", "matthews_correlation")


@dataclass
class Results:
    """``values`` are JSON scalars, ``tensors`` complete tensors; both are named with the command
    first, as in ``merge/model.norm.weight``."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Add each scalar of a JSON value under its own name."""
        if isinstance(value, (dict, list)) and value:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self.add(f"{name}/{key}", item)
        else:
            self.values[name] = value

    def add_tensors(self, name: str, file: Path) -> None:
        """Add all tensors of a safetensors file."""
        for key, tensor in load_file(file).items():
            self.tensors[f"{name}/{key}"] = tensor

    def summary(self) -> dict[str, Any]:
        """Return what ``expected/`` stores: ``values``, and a few numbers of each tensor."""
        return {
            "values": dict(sorted(self.values.items())),
            "tensors": {name: _summary(t) for name, t in sorted(self.tensors.items())},
        }

    def save_full(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(self.values), encoding="utf-8")
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")

    @classmethod
    def load_full(cls, folder: Path, name: str) -> Results:
        values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return cls(values, load_file(folder / f"{name}.safetensors"))


def exact_differences(found: Results, expected: Results) -> list[str]:
    """Return a line for each value or tensor that is not bit-equal."""
    lines = _missing(found.values, expected.values) + _missing(found.tensors, expected.tensors)
    for name in found.values.keys() & expected.values.keys():
        ours, theirs = found.values[name], expected.values[name]
        if type(ours) is not type(theirs) or not (ours == theirs or _both_nan(ours, theirs)):
            lines.append(f"{name}: {ours!r}, expected {theirs!r}")
    for name in found.tensors.keys() & expected.tensors.keys():
        ours, theirs = found.tensors[name], expected.tensors[name]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            lines.append(f"{name}: {_form(ours)}, expected {_form(theirs)}")
        elif not torch.equal(_bits(ours), _bits(theirs)):
            off = (ours.double() - theirs.double()).abs().max().item()
            lines.append(f"{name}: differs by up to {off:.3g}")
    return sorted(lines)


def differences(
    found: dict[str, Any], expected: dict[str, Any], tensor_tolerance: float = TENSOR_TOLERANCE
) -> list[str]:
    """Return a line for each difference between two summaries beyond its tolerance."""
    lines = []
    compare_tensors = partial(_tensor_difference, tolerance=tensor_tolerance)
    for part, compare in (("values", _value_difference), ("tensors", compare_tensors)):
        ours, theirs = found[part], expected[part]
        lines += _missing(ours, theirs)
        for name in ours.keys() & theirs.keys():
            if line := compare(name, ours[name], theirs[name]):
                lines.append(f"{name}: {line}")
    return sorted(lines)


def _summary(tensor: torch.Tensor) -> dict[str, Any]:
    """Return shape, norm, and inner products with fixed vectors of root mean square 1, so that a
    random error changes each by about its own norm."""
    flat = tensor.double().flatten()
    vectors = (torch.from_numpy(uniform(len(flat), seed)) for seed in range(_PROJECTIONS))
    products = [math.sqrt(3) * torch.dot(flat, vector).item() for vector in vectors]
    return {
        "form": _form(tensor),
        "norm": _rounded(flat.norm().item()),
        "projections": [_rounded(product) for product in products],
    }


def _tensor_difference(
    _name: str, ours: dict[str, Any], theirs: dict[str, Any], tolerance: float
) -> str | None:
    if ours["form"] != theirs["form"]:
        return f"{ours['form']}, expected {theirs['form']}"
    pairs = zip(
        (ours["norm"], *ours["projections"]), (theirs["norm"], *theirs["projections"]), strict=True
    )
    off = max(abs(a - b) for a, b in pairs)
    if off <= tolerance * theirs["norm"]:
        return None
    return f"differs by {off / theirs['norm'] if theirs['norm'] else off:.3g} of its norm"


def _value_difference(name: str, ours: Any, theirs: Any) -> str | None:
    if isinstance(ours, float) and isinstance(theirs, float):
        scale = max(abs(ours), abs(theirs), float(name.endswith(_CORRELATIONS)))
        off = abs(ours - theirs)
        if off <= TOLERANCE * scale or _both_nan(ours, theirs):
            return None
        return f"{ours!r}, expected {theirs!r}: differs by {off / scale:.3g}"
    if type(ours) is type(theirs) and ours == theirs:
        return None
    return f"{ours!r}, expected {theirs!r}"


def _missing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [f"{name}: missing" for name in expected.keys() - found.keys()] + [
        f"{name}: not expected" for name in found.keys() - expected.keys()
    ]


def _both_nan(ours: Any, theirs: Any) -> bool:
    return bool(ours != ours and theirs != theirs)


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")
