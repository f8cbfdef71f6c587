"""Run all checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.doctor.finding import Finding, Status
from lorakit.doctor.gpu import gpu_findings
from lorakit.doctor.host import host_findings, start_sample
from lorakit.doctor.hub import hub_findings, start_request
from lorakit.doctor.kernels import kernel_findings
from lorakit.doctor.storage import storage_findings
from lorakit.doctor.versions import version_findings

_ORDER: tuple[Status, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Diagnosis:
    """What was found, in the order of the report. With the status ``error``, training cannot
    work."""

    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        return max((f.status for f in self.findings), key=_ORDER.index, default="ok")

    def count(self, status: Status) -> int:
        return sum(finding.status == status for finding in self.findings)


def diagnose() -> Diagnosis:
    """Examine this machine and installation, in a few seconds. Nothing is written or downloaded; a
    check that fails is a finding itself."""
    start = start_sample()
    request = _or_none(start_request)
    torch, error = _import_torch()
    gpus = torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0
    findings = [*_checked("versions", lambda: version_findings(torch, error))]
    if torch is not None:
        findings += _checked("gpu", lambda: gpu_findings(torch))
        findings += _checked("kernels", lambda: kernel_findings(torch))
    findings += _checked("host", lambda: host_findings(torch, start))
    findings += _checked("storage", lambda: storage_findings(gpus))
    findings += _checked("hub", lambda: hub_findings(request))
    return Diagnosis(tuple(findings))


def _import_torch() -> tuple[Any | None, str | None]:
    try:
        import torch
    except Exception as error:  # a library that is missing, or built for another machine
        return None, _one_line(error)
    return torch, None


def _or_none(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ImportError:
        return None


def _checked(area: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check. The report of a broken installation must not end early."""
    try:
        yield from check()
    except Exception as error:
        text = f"{type(error).__name__}: {_one_line(error)}"
        yield Finding(area, "check", None, f"failed: {text}", "warning")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
