"""The earlier run in an output directory, which ``--overwrite`` replaces.

Its files are moved aside when the new run starts, and deleted with the new run's first checkpoint.
If the new run ends before that, they are put back.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.io.atomic import remove_path
from lorakit.training.checkpoint import checkpoints
from lorakit.training.guard import OutputTaken
from lorakit.training.run_json import read_record
from lorakit.training.tracking import PROJECT

#: What a run writes to its output directory, besides checkpoints. TensorBoard's logs are the last.
_FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "adapter", PROJECT)


def is_run(output_dir: Path) -> bool:
    """Whether lorakit has trained in ``output_dir``."""
    has_record = {"exit_reason", "adapted_modules"} <= read_record(output_dir).keys()
    return has_record or bool(checkpoints(output_dir / "checkpoints"))


@contextmanager
def set_aside(output_dir: Path) -> Iterator[None]:
    """Move the files of the run in ``output_dir`` aside for the block, which starts a new one.

    An error in the block before its first checkpoint puts them back in place of what the block
    wrote, unless another run has taken the directory.
    """
    folder = output_dir / "checkpoints"
    had_folder = folder.exists()
    folder.mkdir(exist_ok=True)
    # The next checkpoint deletes what has such a name, as a leftover.
    aside = folder / f".earlier-run.{secrets.token_hex(4)}.removed"
    aside.mkdir()
    _move(output_dir, folder, aside)
    try:
        yield
    except OutputTaken:
        raise
    except BaseException:
        if aside.is_dir() and not checkpoints(folder):
            for name in _FILES:
                remove_path(output_dir / name)
            _put_back(aside, output_dir, folder)
            aside.rmdir()
            if not had_folder:
                folder.rmdir()
        raise
    remove_path(aside)


def _move(output_dir: Path, folder: Path, aside: Path) -> None:
    for found in folder.glob("step-*"):
        found.rename(aside / found.name)
    for name in _FILES:
        if (output_dir / name).exists():
            shutil.move(output_dir / name, aside / name)  # checkpoints may be on another disk


def _put_back(aside: Path, output_dir: Path, folder: Path) -> None:
    for found in list(aside.iterdir()):
        shutil.move(found, (output_dir if found.name in _FILES else folder) / found.name)
