"""Which base an adapter belongs to, and in which dtype it is wanted; needs no model library."""

from __future__ import annotations

from contextlib import suppress
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


def other_base_note(section: ModelSection, files: AdapterFiles) -> str | None:
    """A line where the adapter names a base that is called otherwise than the given one."""
    named, given = files.config.get("base_model_name_or_path"), section.name_or_path
    if not named or _names(str(named)) & (_names(given) | _names(str(Path(given).resolve()))):
        return None
    with suppress(OSError):
        if Path(named).samefile(given):
            return None
    return (
        f"{files.directory}: trained on {named}, but used with {given}: matching shapes do not "
        "prove that it is the same model"
    )


def _names(path: str) -> set[str]:
    """What a model is called by a path or Hub id; of the Hub's cache, the repository's name."""
    parts = [part.casefold() for part in Path(path).parts]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return set(cached or parts[-1:])


def dtype_name(dtype: str | torch.dtype | None, key: str) -> str | None:
    """``float32``, ``bfloat16`` or ``float16``. Raises AdapterError for any other."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise AdapterError(f"{key} = {name}: allowed: {', '.join(DTYPES)}")
    return name
