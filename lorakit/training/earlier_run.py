"""The earlier run in an output directory, which ``--overwrite`` replaces.

Its files are moved aside when the new run starts, and deleted with the new run's first checkpoint.
If the new run ends before that, they are put back: by itself, or if it was killed, by the next
command that starts or resumes a run there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.io.atomic import remove_path, writing
from lorakit.training.checkpoint import checkpoints
from lorakit.training.guard import OutputTaken
from lorakit.training.prediction_samples import PREDICTIONS_JSON
from lorakit.training.run_json import read_record
from lorakit.training.tracking import PROJECT

#: What a run writes to its output directory, besides checkpoints. TensorBoard's logs are the last.
_FILES = ("recipe.yaml", "run.json", "metrics.jsonl", PREDICTIONS_JSON, "adapter", PROJECT)
_NAME = ".earlier-run"


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
    aside = _Aside(output_dir)
    aside.move()
    try:
        yield
    except OutputTaken:
        raise
    except BaseException:
        if aside.is_only_copy():
            aside.put_back()
            if not had_folder:
                folder.rmdir()
        raise
    aside.delete()


def is_set_aside(output_dir: Path) -> bool:
    """Whether ``output_dir`` has files of an earlier run that were moved aside."""
    return _Aside(output_dir).exists()


def put_back_if_killed(output_dir: Path) -> bool:
    """Put the earlier run back if the new one was killed before its first checkpoint, and return
    whether it was; else delete what is left of the earlier run. The caller has the lock."""
    aside = _Aside(output_dir)
    if aside.is_only_copy():
        aside.put_back()
        return True
    aside.delete()
    return False


def delete_earlier_run(output_dir: Path) -> None:
    """Delete the run that was set aside, if there is one; the new run has a checkpoint. Raises
    WriteFailed."""
    with writing(output_dir):
        _Aside(output_dir).delete()


class _Aside:
    """Where the earlier run is while the new one starts.

    Checkpoints may be on another disk, and a move between disks can be cut short. So checkpoints
    and other files each have a directory beside them, and are renamed. The one of the checkpoints
    has another name while files are moved, since then ``step-N`` are not the new run's.
    """

    def __init__(self, output_dir: Path) -> None:
        self._output_dir, self._folder = output_dir, output_dir / "checkpoints"
        self._files, self._steps = output_dir / _NAME, self._folder / _NAME
        self._moving = self._folder / f"{_NAME}.moving"

    def exists(self) -> bool:
        return any(path.is_dir() for path in (self._files, self._steps, self._moving))

    def is_only_copy(self) -> bool:
        is_whole = self._steps.is_dir() and not checkpoints(self._folder)
        return is_whole or self._moving.is_dir()

    def move(self) -> None:
        self._moving.mkdir()
        self._files.mkdir()
        for found in self._folder.glob("step-*"):
            found.rename(self._moving / found.name)
        for name in _FILES:
            if (self._output_dir / name).exists():
                (self._output_dir / name).rename(self._files / name)
        self._moving.rename(self._steps)

    def put_back(self) -> None:
        if self._steps.is_dir():
            for name in _FILES:
                remove_path(self._output_dir / name)
            self._steps.rename(self._moving)
        for place, target in ((self._files, self._output_dir), (self._moving, self._folder)):
            if place.is_dir():
                for found in list(place.iterdir()):
                    found.rename(target / found.name)
                place.rmdir()

    def delete(self) -> None:
        remove_path(self._steps)
        shutil.rmtree(self._files, ignore_errors=True)
