"""What a split may be called in a directory or a mapping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_VALIDATION = ("validation", "valid", "dev", "val")
#: By its own name, which is the first.
ALIASES = {
    "train": ("train",),
    "validation": _VALIDATION,
    "test": ("test",),
    "validation_matched": ("validation_matched",),
    "validation_mismatched": ("validation_mismatched",),
}
KNOWN = tuple(name for names in ALIASES.values() for name in names)


def named_twice(given: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Each split that several of the names ``given`` stand for, and these."""
    given = list(given)
    for split, names in ALIASES.items():
        found = [name for name in given if name in names]
        if len(found) > 1:
            yield split, found
