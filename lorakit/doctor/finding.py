"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """``value`` is what was found, for programs; ``text`` the same for readers. A ``warning`` costs
    speed, memory or a feature; an ``error`` prevents training. ``hint`` says how to fix it."""

    area: str
    name: str
    value: object
    text: str
    status: Status = "ok"
    hint: str | None = None
