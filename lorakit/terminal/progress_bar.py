"""A progress bar on stderr that leaves nothing behind."""

from __future__ import annotations

from rich.console import RenderableType
from rich.constrain import Constrain
from rich.progress import Progress, ProgressColumn

from lorakit.terminal.console import stderr_console


class ProgressBar(Progress):
    """One line, which disappears at the end, also after Ctrl-C."""

    def __init__(self, *columns: ProgressColumn) -> None:
        self._console = stderr_console()
        super().__init__(*columns, console=self._console, transient=True)

    def get_renderable(self) -> RenderableType:
        """Leave room for the ^C that the terminal echoes, which would start a new line."""
        return Constrain(super().get_renderable(), max(1, self._console.width - len("^C") - 1))
