"""The class names of a base's own classification head, for a task that has none of its own."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.errors import ModelError
from lorakit.models.heads import declares_head, find_labels, head_labels, names_classes
from lorakit.models.load import load_config
from lorakit.recipe.sections import ModelSection


def names_of_head(section: ModelSection, labels: Sequence[str]) -> list[str] | None:
    """The names in the head's order, those of ``labels`` as they are written there.

    None if the base has no head with names, ``model.new_head`` replaces it, or one of ``labels`` is
    none of its names.
    """
    if section.new_head:
        return None
    try:
        config = load_config(section)
    except ModelError:  # the data is at fault first; loading the model raises it again
        return None
    names = head_labels(config)
    if not (declares_head(config) and len(names) > 1 and names_classes(names)):
        return None
    found = find_labels(labels, names)
    if found is None:
        return None
    if all(label.isdecimal() for label in labels):  # indices
        return names
    written = dict(zip(found, labels, strict=True))
    return [written.get(index, name) for index, name in enumerate(names)]
