"""``Recipe`` -> YAML that reads back as an equal ``Recipe``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lorakit.recipe.environment import escape
from lorakit.recipe.scalars import read_scalar
from lorakit.recipe.sections import Recipe

#: The keys that stand first, in the order in which the documentation shows them.
_FIRST = (
    "method",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "use_rslora",
    "init",
)


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every resolved value as UTF-8 YAML, beside ``path`` and then renamed."""
    path = Path(path)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(recipe_text(recipe))
        Path(beside).chmod(0o666 & ~_umask())
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def recipe_text(recipe: Recipe) -> str:
    """The YAML that ``write_recipe`` writes."""
    sections = _escaped(recipe.resolved())
    adapter = sections["adapter"]
    first = {key: adapter.pop(key) for key in _FIRST if key in adapter}
    sections["adapter"] = {**first, **adapter}
    return yaml.dump(
        sections,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=2**20,
    )


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return escape(value) if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Quotes what ``read_scalar`` would not read as text; writes no aliases, which it counts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    plain = isinstance(read_scalar(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
