"""Deterministic kernels: ``train.deterministic``.

On one GPU, two runs of a recipe then end with the same bytes, and so does a run that is resumed.
The CPU computes the same numbers with and without.

In PyTorch's deterministic mode, attention (``varlen_attn`` included) takes the deterministic
backward pass of the flash and memory-efficient kernels and avoids cuDNN's, and sums by index
(``index_add``, ``scatter_add``, gradients of embeddings) have a fixed order. lorakit's kernels and
those of bitsandbytes have no atomic additions and pick no algorithm by its speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import patch_environment

from lorakit.distributed.launcher import is_launched
from lorakit.errors import UserError
from lorakit.notes import Say
from lorakit.recipe.sections import TrainSection

#: The values with which cuBLAS is deterministic.
_WORKSPACES = (":4096:8", ":16:8")
_WORKSPACE_KEY = "CUBLAS_WORKSPACE_CONFIG"
#: Attributes of modules, and their values during a deterministic run. Filling new tensors takes
#: time, and matters only to code that reads them before it writes them.
_SETTINGS: tuple[tuple[Any, str, bool], ...] = (
    (torch.backends.cudnn, "benchmark", False),
    (torch.backends.cudnn, "deterministic", True),
    (torch.utils.deterministic, "fill_uninitialized_memory", False),
)
#: How PyTorch words that an operation has no deterministic kernel.
_HAS_NO_KERNEL = " does not have a deterministic implementation"


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Select deterministic kernels during the block, if ``enabled``.

    Afterwards all settings are what they were before, except for cuBLAS's variable: cuBLAS reads it
    only once. Raises UserError if cuBLAS cannot be made deterministic, and for an operation that
    has no deterministic kernel.
    """
    if not enabled:
        yield
        return
    if torch.cuda.is_available():
        # A launcher's processes select their device before they read the recipe.
        in_use = torch.cuda.is_initialized() and not is_launched()
        os.environ[_WORKSPACE_KEY] = cublas_workspace(os.environ.get(_WORKSPACE_KEY), in_use)
    with ExitStack() as stack:
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True)
        for module, name, value in _SETTINGS:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        # Read by transformers for `attn_implementation: flash_attention_2`.
        stack.enter_context(patch_environment(FLASH_ATTENTION_DETERMINISTIC="1"))
        with no_kernel_as_error():
            yield


def say_costs(section: TrainSection, say: Say) -> None:
    """Tell the user what ``train.deterministic`` costs on a GPU."""
    if section.deterministic and torch.cuda.is_available():
        say(
            "kernels are deterministic (train.deterministic: true): the backward pass of attention "
            "is slower, and layers are not compiled"
        )


def cublas_workspace(configured: str | None, in_use: bool) -> str:
    """Return the value of CUBLAS_WORKSPACE_CONFIG for a deterministic run: ``configured``, the
    user's, or else a default. Raises UserError for a nondeterministic one, and for none if CUDA is
    already ``in_use``, because cuBLAS may have read it."""
    if configured is None and in_use:
        raise UserError(
            "train.deterministic = true: CUDA was already used in this process; set the "
            f"environment variable {_WORKSPACE_KEY}={_WORKSPACES[0]} before using CUDA, "
            "or start a new process"
        )
    if configured is not None and configured not in _WORKSPACES:
        raise UserError(
            f"train.deterministic = true: {_WORKSPACE_KEY}={configured!r} is not deterministic; "
            f"allowed: unset, {', '.join(_WORKSPACES)}"
        )
    return configured or _WORKSPACES[0]


@contextmanager
def no_kernel_as_error() -> Iterator[None]:
    """Turn PyTorch's error about an operation without a deterministic kernel into a UserError."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(_HAS_NO_KERNEL)
        if not found:
            raise
        raise UserError(
            f"train.deterministic = true: this model needs {operation.split()[-1]}, which has no "
            "deterministic kernel; allowed here: false"
        ) from error
