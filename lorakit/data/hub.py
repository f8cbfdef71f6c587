"""Datasets on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakit.data.file_names import split_names
from lorakit.errors import DataError

#: Name and configuration of a dataset on the Hub.
HubName = tuple[str, str | None]


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset; with ``split`` null, the one that is asked for, which may be absent
    unless it is ``required``. ``key`` is what the recipe names it by, for error messages."""

    path: str
    name: str | None = None
    split: str | None = None
    required: bool = False
    key: str = "task.path"

    def __str__(self) -> str:
        return "/".join(filter(None, (self.path, self.name)))

    def label(self, split: str) -> str:
        """``NAME/CONFIG (SPLIT)``."""
        return f"{self} ({self.split or split})"

    def load(self, split: str, streaming: bool = False) -> Any | None:
        """The rows as ``datasets`` loads them; None if the dataset has no such split.

        Raises DataError if it cannot be loaded, or lacks a required split.
        """
        import datasets

        try:
            # All splits at once: unlike a list of their names, this is served from the cache
            # offline.
            splits: Any = datasets.load_dataset(self.path, self.name, streaming=streaming)
        except Exception as error:  # offline, gated and missing datasets raise different types
            raise self.failure(error) from error
        names = (self.split,) if self.split else split_names(split)
        found = next((known for known in names if known in splits), None)
        if found is None and self.required:
            allowed = ", ".join(splits)
            raise DataError(f"{self.key}: {self}: no split {names[0]!r}; allowed: {allowed}")
        return None if found is None else splits[found]

    def failure(self, error: Exception) -> DataError:
        """The error for a dataset that cannot be read."""
        text = str(error).strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        return DataError(
            f"{self.key}: cannot load the Hub dataset {str(self)!r}: {reason}; "
            "hint: set task.path to a local copy, or check the network and HF_HUB_OFFLINE"
        )


def task_data_set(hub: HubName | None) -> HubSplit:
    """The dataset of a task. Raises DataError if it has none."""
    if hub is None:
        raise DataError(
            "the task has no dataset on the Hub",
            about="task.path = null",
            allowed="a file, a directory, a glob, a source {path: NAME, split: SPLIT} on the Hub, "
            "a list of these, or a mapping of splits",
        )
    return HubSplit(*hub, key="task.path = null")
