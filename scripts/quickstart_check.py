"""Stop the quickstart if its output directory belongs to another recipe: which file to remove."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lorakit.recipe.load import load_recipe


def main() -> None:
    recipe, run = Path(sys.argv[1]), Path(sys.argv[2])
    kept = run / "recipe.yaml"
    if not kept.is_file():
        return
    changes = differences(load_recipe(kept).resolved(), load_recipe(recipe).resolved())
    if changes:
        lines = [f"{run} holds a run of another recipe than {recipe}:", *changes]
        print("\n  ".join(lines), file=sys.stderr)
        print(f"To train anew, remove it: rm -r {run}", file=sys.stderr)
        sys.exit(2)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``section.key: OLD -> NEW`` for each key that differs."""
    found = []
    for section in sorted(old.keys() | new.keys()):
        before, after = old.get(section) or {}, new.get(section) or {}
        found += [
            f"{section}.{key}: {before.get(key)!r} -> {after.get(key)!r}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
    return found


if __name__ == "__main__":
    main()
