"""Matrices that a checkpoint stores quantized: their parts, and the values that they stand for.

Each format is read with torch alone, so that the package that wrote it is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.errors import ModelError, shown

#: Part of a matrix (the end of its tensor's name) -> name of the tensor, or the tensor itself.
Names = dict[str, str]
Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]


class Format(Protocol):
    """A way to store matrices. ``label`` names it in messages."""

    label: str

    def find(self, names: Collection[str]) -> dict[str, Names]:
        """The parts of each quantized matrix among the stored tensors, by the parameter's name."""

    def shape(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> Shape:
        """The matrix's shape from those of its parts; ``read`` returns the values of a part."""

    def dense(self, parts: Parts) -> Tensor:
        """The matrix in float32."""

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor only serves products with quantized inputs."""


def quantization_of(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a ``config.json``, which in a multimodal one may be the text
    part's; None if the checkpoint is not quantized."""
    for part in (settings, *(own for own in settings.values() if isinstance(own, Mapping))):
        found = part.get("quantization_config")
        if found and isinstance(found, Mapping):
            return found
    return None


def format_of(quantization: Mapping[str, Any], base: str) -> Format:
    """The format that ``quantization_config`` describes. Raises ModelError for one that is not
    read."""
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"
    method = str(getattr(method, "value", method))
    known = _FORMATS.get(method)
    if known is None:
        raise ModelError(
            f"{base}: quant_method = {shown(method)}: its weights cannot be read; allowed: "
            f"{', '.join(_FORMATS)}; hint: use the original weights"
        )
    try:
        return known(quantization)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = {KeyError: f"{error} is missing", ValueError: str(error)}.get(type(error))
        raise ModelError(
            f"{base}: quantization_config = {shown(dict(quantization))}: {reason or 'malformed'}; "
            "hint: use the original weights"
        ) from error


def split_names(form: Format, names: Collection[str]) -> tuple[dict[str, Names], list[str]]:
    """The parts of the quantized matrices, as from ``form.find``, and the names of the other
    tensors, without those that are dropped."""
    matrices = form.find(names)
    parts = {name for own in matrices.values() for name in own.values()}
    return matrices, [n for n in names if n not in parts and not form.is_dropped(n)]


def check_plain(codes: Mapping[str, str], form: Format, base: str) -> None:
    """Raise ModelError for a weight that is quantized in another way. ``codes``: names of the
    tensors that are no part of a quantized matrix -> codes of their dtypes."""
    for name, code in codes.items():
        if name.endswith("weight") and (code.startswith("F8") or code in ("U8", "I8", "I32")):
            raise ModelError(
                f"{base}: {name} is {code}, but not quantized as quantization_config says "
                f"({form.label}); hint: use the original weights"
            )


@contextmanager
def explained_parts(form: Format, name: str) -> Iterator[None]:
    """Turn errors about parts of the matrix ``name`` that do not fit together into a ModelError."""
    try:
        yield
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise ModelError(f"{name}: corrupt {form.label} weights: {reason}") from error


#: The end of the name of a tensor beside a matrix of 4 bits.
_BNB_PART = re.compile(r"\.(quant_state\.)?\w+$")


class _Bnb:
    """bitsandbytes: 4 bits in blocks with an absmax each, which may be quantized in turn, or 8 bits
    with an absmax ``SCB`` for each row."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        four = quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")
        self.label = f"bitsandbytes ({'4' if four else '8'} bits)"

    def find(self, names: Collection[str]) -> dict[str, Names]:
        found: dict[str, Names] = {}
        for name in names:
            if name.endswith(".absmax"):
                own = name.removesuffix(".absmax")
                found[own] = {"": own}
            elif name.endswith(".SCB"):
                own = f"{name.removesuffix('SCB')}weight"
                found[own] = {"": own, "SCB": name}
        for name in names:
            own = _BNB_PART.sub("", name)
            if own != name and own in found:
                found[own][name.removeprefix(own)] = name
        return found

    def shape(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> Shape:
        if "SCB" in shapes:
            return shapes[""]
        return tuple(_bnb_state(read(_bnb_state_part(shapes)))["shape"])

    def dense(self, parts: Parts) -> Tensor:
        if "SCB" in parts:
            return parts[""].float() * (parts["SCB"].float() / 127)[:, None]
        state = _bnb_state(parts[_bnb_state_part(parts)])
        absmax = parts[".absmax"].flatten()
        if ".nested_absmax" in parts:
            codes = parts[".nested_quant_map"].float()[absmax.int()]
            scale = parts[".nested_absmax"].float()
            absmax = codes * _repeated(scale, state["nested_blocksize"], len(codes))
            absmax += state["nested_offset"]
        codes = parts[".quant_map"].float()
        pairs = torch.stack([codes.repeat_interleave(16), codes.repeat(16)], dim=1)
        packed = parts[""].contiguous().flatten().view(torch.uint8)
        count = math.prod(state["shape"])
        values = pairs[packed.int()].flatten()[:count]
        values *= _repeated(absmax.float(), state["blocksize"], count)
        return values.view(state["shape"])

    def is_dropped(self, name: str) -> bool:
        return name.endswith(".weight_format")


def _bnb_state_part(parts: Collection[str]) -> str:
    return next(part for part in parts if part.startswith(".quant_state."))


def _bnb_state(stored: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(stored.tolist()))
    return state


class _Scaled:
    """Each value times a scale, which is that of the matrix, its row, a group of columns or a
    block: fine-grained fp8, and the formats of compressed-tensors."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        self.label = str(quantization.get("quant_method"))
        groups = quantization.get("config_groups") or {}
        weights = [group["weights"] for group in groups.values()]
        if any(own.get("type") == "float" and own.get("num_bits") != 8 for own in weights):
            raise ValueError("floating-point weights of other than 8 bits are not read")
        blocks = [own["block_structure"] for own in weights if own.get("block_structure")]
        self._block: Sequence[int] = quantization.get("weight_block_size") or next(iter(blocks), ())
        if self._block and [n > 0 for n in self._block] != [True, True]:
            raise ValueError(f"block size {shown(self._block)}: allowed: two integers above 0")

    def find(self, names: Collection[str]) -> dict[str, Names]:
        found: dict[str, Names] = {}
        stored = set(names)
        for name in names:
            for end in ("_scale_inv", "_scale"):
                own = name.removesuffix(end)
                if own == name or not {own, f"{own}_packed"} & stored:
                    continue
                ends = ("", "_packed", "_zero_point", "_shape", "_g_idx")
                parts = {part: own + part for part in ends if own + part in stored}
                found[own] = {**parts, "scale": name}
        return found

    def shape(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> Shape:
        if "" in shapes:
            return shapes[""]
        return tuple(read("_shape").tolist())

    def dense(self, parts: Parts) -> Tensor:
        scale = parts["scale"].float()
        if "" in parts:
            values = parts[""].float()
        else:
            packed, (_, columns) = parts["_packed"], parts["_shape"].tolist()
            bits = 32 // math.ceil(columns / packed.shape[1])
            values = _unpacked(packed, bits)[:, :columns].float() - 2 ** (bits - 1)
        if (zero := parts.get("_zero_point")) is not None:
            if zero.dtype == torch.int32 and "_packed" in parts:
                bits = 32 // math.ceil(len(values) / len(zero))
                zero = _unpacked(zero.t(), bits).t()[: len(values)] - 2 ** (bits - 1)
            values -= self._spread(zero.float(), values.shape, parts.get("_g_idx"))
        return values.mul_(self._spread(scale, values.shape, parts.get("_g_idx")))

    def is_dropped(self, name: str) -> bool:
        return name.endswith((".activation_scale", ".input_scale", ".input_zero_point"))

    def _spread(self, scale: Tensor, shape: Shape, groups: Tensor | None) -> Tensor:
        """``scale`` in a form that can be multiplied with a matrix of ``shape``."""
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.ndim == 1:
            return scale[:, None]
        if groups is not None and int(groups.min()) >= 0:
            return scale[:, groups.int()]
        for dim in (-2, -1):
            have, want = scale.shape[dim], shape[dim]
            if have in (1, want):
                continue
            size = math.ceil(want / have)
            if self._block and math.ceil(want / self._block[dim]) == have:
                size = self._block[dim]
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, want)
        return scale


class _Gptq:
    """GPTQ: integers of ``bits``, packed along the input, with a scale and a zero for each group of
    inputs; W is their transpose."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        self.bits: int = quantization["bits"]
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits = {shown(self.bits)}: allowed: 2, 4, 8")
        self.label = f"gptq ({self.bits} bits)"
        self._group = int(quantization.get("group_size", -1))
        # The first version of the format stores zeros less one.
        self._offset = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1

    def find(self, names: Collection[str]) -> dict[str, Names]:
        return _packed_linear(names)

    def shape(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> Shape:
        rows, columns = shapes["qweight"]
        return columns, rows * (32 // self.bits)

    def dense(self, parts: Parts) -> Tensor:
        values = _unpacked(parts["qweight"].t(), self.bits)
        scales = parts["scales"].float().t()
        zeros = _unpacked(parts["qzeros"], self.bits).t() + self._offset
        columns = values.shape[1]
        groups = parts.get("g_idx")
        if groups is None:
            group = self._group if self._group > 0 else columns
            groups = torch.arange(columns) // group
        index = groups.int()
        return (values - zeros[:, index]).float().mul_(scales[:, index])

    def is_dropped(self, name: str) -> bool:
        return False


class _Awq:
    """AWQ's ``gemm`` layout: 4 bits, packed along the output in an interleaved order."""

    label = "awq (4 bits)"

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        bits, version = quantization.get("bits", 4), quantization.get("version", "gemm")
        if bits != 4 or str(version).lower() != "gemm":
            raise ValueError(f"bits = {bits}, version = {version}: allowed: 4, gemm")

    def find(self, names: Collection[str]) -> dict[str, Names]:
        return _packed_linear(names)

    def shape(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> Shape:
        rows, columns = shapes["qweight"]
        return columns * 8, rows

    def dense(self, parts: Parts) -> Tensor:
        values, zeros = (_deinterleaved(parts[part]) for part in ("qweight", "qzeros"))
        scales = parts["scales"].float()
        group = len(values) // len(scales)
        spread = zeros.float().repeat_interleave(group, 0)
        W = (values - spread).mul_(scales.repeat_interleave(group, 0))
        return W.t().contiguous()

    def is_dropped(self, name: str) -> bool:
        return False


_FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "bitsandbytes": _Bnb,
    "fp8": _Scaled,
    "compressed-tensors": _Scaled,
    "gptq": _Gptq,
    "awq": _Awq,
}


def _packed_linear(names: Collection[str]) -> dict[str, Names]:
    stored, found = set(names), {}
    for name in names:
        if name.endswith(".qweight"):
            own = name.removesuffix("qweight")
            parts = ("qweight", "qzeros", "scales", "g_idx")
            found[f"{own}weight"] = {part: own + part for part in parts if own + part in stored}
    return found


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The integers (n, m * 32 / bits) in ``packed`` (n, m), the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values: Tensor = (packed.contiguous()[..., None] >> shifts) & (2**bits - 1)
    return values.flatten(-2)


def _deinterleaved(packed: Tensor) -> Tensor:
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    values = _unpacked(packed, 4)
    return values.view(*packed.shape, 8)[..., order].flatten(-2)


def _repeated(values: Tensor, times: int, count: int) -> Tensor:
    """Each value ``times`` times, as far as ``count``."""
    return values.repeat_interleave(times)[:count]
