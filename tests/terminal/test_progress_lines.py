"""Progress as lines of a log."""

from __future__ import annotations

import pytest

from lorakit.terminal.progress_lines import progress_lines


def test_lines_are_rare_and_the_last_one_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    said: list[str] = []
    report = progress_lines(said.append, seconds=10)
    clock[0] = 100.0
    for seconds, done in ((0.0, 1), (9.0, 2), (10.0, 3), (19.0, 4), (20.0, 5), (21.0, 6)):
        clock[0] = 100.0 + seconds
        report("generated", done, 6)
    assert said == ["generated 3/6", "generated 5/6", "generated 6/6"]
    for start in (1, 2, 1):  # the time since the last line does not count
        clock[0] += 20.0
        report("predicted", start, 3)
    report("predicted", 3, 3)
    assert said[3:] == ["predicted 2/3", "predicted 3/3"]
