"""The keys and values of one ``generate`` call, handed on to the next."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

_FIELDS = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
#: Early releases of transformers 5 say ``past_key_values``; later ones deprecate it for ``cache``.
_OUTPUT = "cache" if "cache" in _FIELDS else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument with which ``generate`` goes on from ``cache`` (None: none)."""
    return {} if cache is None else {_OUTPUT: cache}


def cache_of(model: PreTrainedModel, output: Any) -> Any:
    """The cache that a ``generate`` call with ``return_dict_in_generate`` returns; None, from which
    it is made anew, for the Mamba models of early releases: they do not go on from one."""
    if _OUTPUT != "cache" and "cache_params" in inspect.signature(model.forward).parameters:
        return None
    return getattr(output, _OUTPUT, None)


def select_rows(cache: Any, index: Tensor) -> Any:
    """The cache of some rows; None, from which it is made anew, where it cannot be taken apart."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    cache.batch_select_indices(index)
    return cache
