"""Reading a file that should contain a JSON object."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from lorakit.errors import shown


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in ``file``.

    Raises FileNotFoundError, and ValueError for what is no regular file (from a pipe, reading might
    never end), cannot be read, or contains anything else; its message does not name the file.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("not a regular file")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {shown(value)}")
    return value
