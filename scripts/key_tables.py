"""Write the tables of docs/migrate.md from lorakit.recipe.peers: python scripts/key_tables.py

Each table stands between <!-- keys of TOOL --> and <!-- end -->.
"""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.errors import shown
from lorakit.recipe.peers.counterpart import Counterpart
from lorakit.recipe.peers.hints import TOOLS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migrate.md"
_TABLE = re.compile(r"(<!-- keys of ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """Return the page with the tables as the package has the keys."""
    return _TABLE.sub(lambda m: f"{m[1]}\n{_tables(m[2])}\n{m[3]}", text)


def _tables(tool: str) -> str:
    keys = TOOLS[tool]
    rows = [f"| `{name}` | {_ours(found)} | {_note(found)} |" for name, found in keys.items()
            if not found.needless]  # fmt: skip
    needless = ", ".join(f"`{name}`" for name, found in keys.items() if found.needless)
    text = "\n".join(["| key | lorakit's | |", "|---|---|---|", *rows])
    return f"{text}\n" + (f"\nNot needed: {needless}.\n" if needless else "")


def _ours(found: Counterpart) -> str:
    return f"`{found.key}`" if found.key else "-"


def _note(found: Counterpart) -> str:
    by_ours: dict[str, list[str]] = {}
    for theirs, ours in found.values.items():
        if not (theirs == ours and found.listed_only):
            by_ours.setdefault(_value(ours), []).append(_value(theirs))
    values = [f"{', '.join(theirs)}: {ours}" for ours, theirs in by_ours.items()]
    return "; ".join([*values, *([found.note] if found.note else [])]).replace("|", "\\|")


def _value(value: object) -> str:
    text = shown(value)
    return f"`{text[1:-1] if isinstance(value, str) else text}`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
