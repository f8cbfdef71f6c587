"""``doctor``: whether this machine can train."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import typer

from lorakit.cli.console import AsJson, echo, only_results
from lorakit.errors import counted

if TYPE_CHECKING:
    from lorakit.api import Diagnosis


def doctor(as_json: AsJson = False) -> None:
    """Check the environment, and say how to fix its problems.

    Shows versions, GPUs, kernels and compilers, cores and memory, disks and caches, and access to
    the Hub, in a few seconds. The exit code is 1 if training will not work, and 0 if there are only
    warnings.

    Example: lorakit doctor --json
    """
    from lorakit.api import diagnose

    with only_results():
        found = diagnose()
    if as_json:
        checks = [dataclasses.asdict(finding) for finding in found.findings]
        echo(json.dumps({"status": found.status, "checks": checks}, indent=2, default=str))
    else:
        _print(found)
    if found.status == "error":
        raise typer.Exit(1)


def _print(found: Diagnosis) -> None:
    width = max(len(finding.name) for finding in found.findings)
    area = None
    for finding in found.findings:
        if finding.area != area:
            area = finding.area
            echo(f"{area}:")
        mark = "" if finding.status == "ok" else f"{finding.status}: "
        echo(f"  {finding.name:<{width}}  {mark}{finding.text}")
        if finding.hint:
            echo(f"  {'':<{width}}  hint: {finding.hint}")
    warnings, errors = found.count("warning"), found.count("error")
    counts = ((errors, "error"), (warnings, "warning"))
    parts = [counted(count, what) for count, what in counts if count]
    summary = ", ".join(parts) or "no problems"
    echo(f"{summary}{': training will not work' if errors else ''}")
