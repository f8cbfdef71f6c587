"""What one key of another tool is in a recipe, and how its values translate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counterpart:
    """The counterpart of a key of another tool.

    ``key`` is lorakit's dotted key, None if it has none. ``values`` maps the other tool's values to
    lorakit's; other values are used as they are, unless ``listed_only``: then they have no
    counterpart. ``note`` says what to do instead, or what differs, and ``differs`` what differs for
    single values. A ``needless`` key has nothing to carry over: lorakit decides it by itself, or
    the setting has no effect on the result.
    """

    key: str | None = None
    values: Mapping[object, object] = field(default_factory=dict)
    listed_only: bool = False
    note: str = ""
    needless: bool = False
    differs: Mapping[str, str] = field(default_factory=dict)

    def translates(self, value: object) -> bool:
        """Whether ``value`` has a counterpart."""
        return self.key is not None and (not self.listed_only or self._listed(value) is not None)

    def value_of(self, value: object) -> object:
        """lorakit's value for ``value``, for which ``translates`` holds."""
        found = self._listed(value)
        return value if found is None else found[0]

    def _listed(self, value: object) -> tuple[object] | None:
        """The value in a tuple; None if it is not listed. 1 and true are different values."""
        for known, ours in self.values.items():
            if isinstance(known, bool) == isinstance(value, bool) and known == value:
                return (ours,)
        return None


def needless(note: str) -> Counterpart:
    """A key that a recipe does not need."""
    return Counterpart(note=note, needless=True)


def missing(note: str) -> Counterpart:
    """A key whose effect lorakit does not have, or has in another place that ``note`` names."""
    return Counterpart(note=note)


def only(
    key: str,
    values: Mapping[object, object],
    note: str = "",
    differs: Mapping[str, str] | None = None,
) -> Counterpart:
    """A key of which only the listed values have a counterpart."""
    return Counterpart(key, values, listed_only=True, note=note, differs=differs or {})
