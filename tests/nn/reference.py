"""The layers' formulas in NumPy and float64, with every product written out."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

import lorakit

Array = Any


def array(value: Tensor) -> Array:
    return value.detach().double().numpy()


def updated_weight(layer: nn.Module, base: Tensor) -> Array:
    """Return W + (lora_alpha / r) * delta for the factors of ``layer``."""
    A, B = array(layer.lora_A), array(layer.lora_B)
    W = array(base)
    scaling = layer.lora_alpha / layer.r
    if isinstance(layer, lorakit.Embedding):
        return W + scaling * (B @ A).T
    if isinstance(layer, lorakit.Conv2d):
        return W + scaling * (B @ A).reshape(W.shape)
    delta = _stacked(layer, A, B) if isinstance(layer, lorakit.MergedLinear) else B @ A
    return W + scaling * (delta.T if layer.fan_in_fan_out else delta)


def _stacked(layer: nn.Module, A: Array, B: Array) -> Array:
    """Return B_i A_i for each enabled projection and zeros for the others."""
    size, r = layer.out_features // len(layer.enable_lora), layer.r
    rows, i = [], 0
    for on in layer.enable_lora:
        if on:
            rows.append(B[i * size : (i + 1) * size] @ A[i * r : (i + 1) * r])
            i += 1
        else:
            rows.append(np.zeros((size, layer.in_features)))
    return np.concatenate(rows)


def output(layer: nn.Module, W: Array, x: Tensor) -> Array:
    """Return the output of a layer with weight W for x."""
    if isinstance(layer, lorakit.Embedding):
        return W[x.numpy()]
    bias = 0 if layer.bias is None else array(layer.bias)
    if isinstance(layer, lorakit.Conv2d):
        return _conv(array(x), W, layer.padding[0], layer.groups) + bias[:, None, None]
    return array(x) @ (W if layer.fan_in_fan_out else W.T) + bias


def _conv(x: Array, W: Array, padding: int, groups: int) -> Array:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    (n, channels, height, width), (out, _, k, _) = x.shape, W.shape
    y = np.zeros((n, out, height - k + 1, width - k + 1))
    for o in range(out):
        first = o // (out // groups) * (channels // groups)
        seen = x[:, first : first + channels // groups]
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                y[:, o, i, j] = (seen[:, :, i : i + k, j : j + k] * W[o]).sum((1, 2, 3))
    return y
