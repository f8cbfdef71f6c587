"""Replace the attention function of a transformers model."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Code that masks tokens by itself for the attention functions that it knows the names of.
_READS_NAME = re.compile(r'if [\w.]*_attn_implementation (in \("eager", "sdpa"\)|== "sdpa"):')


def replace_sdpa(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> bool:
    """Let a half-precision model with ``sdpa`` call ``function``, which gets the same masks, under
    ``name``; return whether it does. ``restore_sdpa`` undoes it."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    if not half or model.config._attn_implementation != "sdpa" or _reads_name(model):
        return False
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    if model._can_set_attn_implementation():
        try:
            model.set_attn_implementation(name)
        except Exception:  # a family with attention code of its own may raise anything
            restore_sdpa(model)
    return bool(model.config._attn_implementation == name)


def restore_sdpa(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")


def _reads_name(model: PreTrainedModel) -> bool:
    """Whether the model's code, as that of sparse attention, would leave out a mask for an
    attention function whose name it does not know."""
    try:
        code = inspect.getsource(sys.modules[type(model).__module__])
    except (KeyError, OSError, TypeError):  # defined in an interactive session
        return True
    return bool(_READS_NAME.search(code))
