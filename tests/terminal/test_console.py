"""The console on stderr: what it is written to may be gone."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest

from lorakit.terminal.console import stderr_console


def test_a_reader_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as file:
        monkeypatch.setattr(sys, "stderr", file)
        console = stderr_console()
        console.print("heard")
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)
        console.print("lost")
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            file.close()


def test_a_process_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    stderr_console().print("lost")
