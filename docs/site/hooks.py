"""What mkdocs does differently from GitHub, so that the pages read the same on both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[2]
#: Pages of the site that are at the top level of the repository.
_TOP_LEVEL = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
_NAMED_FENCE = re.compile(r"^```(\w+) ([\w./-]+)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the top level."""
    for name in _TOP_LEVEL:
        text = (_ROOT / name).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](")
        for other in _TOP_LEVEL:
            text = text.replace(f"]({other}", f"]({other.lower()}")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show the file name after a code block's language as its title."""
    return _NAMED_FENCE.sub(r'```\1 title="\2"', markdown)
