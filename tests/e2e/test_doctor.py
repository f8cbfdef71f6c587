from __future__ import annotations

import json

import pytest

from lorakit import api
from lorakit.api import Diagnosis
from lorakit.cli import main as cli
from lorakit.doctor.finding import Finding


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] in ("ok", "warning")
    assert {"area", "name", "value", "text", "status", "hint"} == set(found["checks"][0])


@pytest.mark.parametrize(
    ("findings", "code", "lines"),
    [
        ([], 0, ["no problems"]),
        ([Finding("host", "threads", 4, "4 threads", "warning", "export OMP_NUM_THREADS=2")], 0,
         ["  threads  warning: 4 threads", "           hint: export OMP_NUM_THREADS=2", "1 warning"]),
        ([Finding("versions", "torch", None, "not installed", "error", "pip install torch"),
          Finding("versions", "peft", "1\x1b[2J", "1\x1b[2J", "warning")], 1,
         ["  torch    error: not installed", "           hint: pip install torch",
          "  peft     warning: 1\\x1b[2J", "1 error, 1 warning: training will not work"]),
    ],
)  # fmt: skip
def test_the_report_and_the_exit_code(
    findings: list[Finding],
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = (Finding("versions", "lorakit", "1", "1"), *findings)
    monkeypatch.setattr(api, "diagnose", lambda: Diagnosis(found))
    assert cli.run(["doctor"]) == code
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if not line.endswith(":") and "lorakit" not in line] == lines
