"""Which base an adapter belongs to, and in which dtype it is wanted; needs no model library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.files import AdapterFiles
from lorakit.errors import AdapterError
from lorakit.models.located import is_missing_path
from lorakit.recipe.sections import ModelSection

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def base_section(
    base: str | Path | None, files: AdapterFiles, trust_remote_code: bool = False
) -> ModelSection:
    """Which base, as a recipe would say it; the adapter's revision holds for its own base."""
    named = files.config.get("base_model_name_or_path")
    name = str(base if base is not None else named or "")
    if not name:
        raise AdapterError(f"{files.directory}: names no base model; give one")
    if base is None and is_missing_path(name):
        raise AdapterError(
            f"{files.directory}: names the base model {name}, and there is no such directory; give "
            "the base explicitly, its directory or Hub id"
        )
    revision = files.config.get("revision") if name == named else None
    return ModelSection(name_or_path=name, revision=revision, trust_remote_code=trust_remote_code)


def dtype_name(dtype: str | torch.dtype | None, key: str) -> str | None:
    """``float32``, ``bfloat16`` or ``float16``. Raises AdapterError for any other."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise AdapterError(f"{key} = {name}: allowed: {', '.join(DTYPES)}")
    return name
