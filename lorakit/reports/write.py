"""Writing a report on runs to a file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from lorakit.errors import UserError, check_printable
from lorakit.io.atomic import write_text, writing
from lorakit.reports.page import MARK, render
from lorakit.reports.runs import read_runs

#: The mark of a page of ours is within its first bytes.
_BEGINNING_BYTES = 512


def report(
    *runs: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    samples: bool = True,
) -> Path:
    """Write an HTML report on runs, given as their directories, and return its path.

    The directory of a sweep stands for its members. ``output`` is by default ``report.html`` in the
    first directory. An earlier report there is replaced, any other file only with ``overwrite``.
    Without ``samples``, the page has no rows of the data. Raises UserError, with nothing written,
    for a path that is neither a run's nor a sweep's directory, and WriteFailed.
    """
    if output is not None:
        check_printable(output, "--output")
    found = read_runs(runs)
    file = Path(runs[0]) / "report.html" if output is None else Path(output)
    _check_replaceable(file, overwrite)
    with writing(file):
        write_text(file.resolve() if file.is_symlink() else file, render(found, samples=samples))
    return file


def _check_replaceable(file: Path, overwrite: bool) -> None:
    try:
        if not file.parent.is_dir():
            raise UserError(f"--output {file}: directory {file.parent} does not exist")
        if not file.exists():
            return
        if not file.is_file():
            raise UserError(f"--output {file}: is not a file; allowed: a file")
        with file.open("rb") as page:
            beginning = page.read(_BEGINNING_BYTES)
    except (OSError, ValueError) as error:
        raise (
            error if isinstance(error, UserError) else UserError(f"--output {file}: {error}")
        ) from None
    if not overwrite and MARK.encode() not in beginning:
        raise UserError(
            f"--output {file}: exists and is not a report of lorakit; replace it with --overwrite, "
            "or name another file"
        )
