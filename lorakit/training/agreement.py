"""Whether all processes of a run train the same: each host reads its own recipe and data."""

from __future__ import annotations

import platform
from typing import Any

from lorakit.distributed.processes import gather
from lorakit.errors import UserError, shown
from lorakit.recipe.sections import Recipe
from lorakit.training.setup import Prepared

#: Keys that may differ: where a host has its files, and what only the first process uses.
_OF_A_HOST = {"model.name_or_path", "task.path", "train.output_dir", "train.trackers"}


def check_same_command(name: str) -> None:
    """Raise UserError, in all processes, if they have been started with different commands."""
    names = gather(name)
    if len(set(names)) > 1:
        raise UserError(f"processes were started with different commands: {', '.join(names)}")


def check_agreement(prepared: Prepared) -> None:
    """Raise UserError, in all processes, if the recipe or the data of one are not the first's."""
    found = gather((platform.node(), comparable_keys(prepared.recipe), prepared.data))
    _, keys, data = found[0]
    for rank, (host, other_keys, other_data) in enumerate(found):
        process = f"process {rank} on {host}"
        for key in sorted(keys.keys() | other_keys.keys()):
            first, other = keys.get(key), other_keys.get(key)
            if first != other:
                raise UserError(
                    f"{key} = {shown(other)} in {process}, but {shown(first)} in process 0; "
                    "hint: start all processes with the same recipe"
                )
        for split in data.keys() | other_data.keys():
            if _identity(data.get(split)) != _identity(other_data.get(split)):
                source = (other_data.get(split) or data[split])["source"]
                raise UserError(
                    f"{source}: the {split} data of {process} is not that of process 0; hint: copy "
                    "the same files to all hosts"
                )


def comparable_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys of ``recipe`` that are the same on all hosts, and their values."""
    return {key: value for key, value in recipe.flat().items() if key not in _OF_A_HOST}


def _identity(split: dict[str, Any] | None) -> object:
    """What tells a split and its tokens from others, without its paths."""
    paths = ("source", "sources")  # the fingerprint covers the weights of sources
    return split and {key: value for key, value in split.items() if key not in paths}
