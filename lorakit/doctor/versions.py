"""Versions of Python, of the packages that lorakit uses, and of CUDA's libraries."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.doctor.finding import Finding, Status
from lorakit.version import __version__

_AREA = "versions"
#: Packages whose versions are always shown; of the other required ones, only problems are.
_SHOWN = ("torch", "transformers", "accelerate", "datasets", "safetensors")
_OPTIONAL = ("peft", "bitsandbytes", "triton", "flash-attn")
_DRIVER = Path("/proc/driver/nvidia/version")


def version_findings(torch: Any | None, import_error: str | None) -> Iterator[Finding]:
    """The versions. ``torch`` is the module, or None with the error of its import."""
    yield _found("python", platform.python_version())
    yield _found("lorakit", __version__)
    requirements = _requirements()
    for name in dict.fromkeys((*_SHOWN, *requirements)):
        found = _package(name, requirements.get(name), "error")
        if name in _SHOWN or found.status != "ok":
            yield found
    optional = _requirements(optional=True)
    for name in _OPTIONAL:
        if installed_version(name) is not None:
            yield _package(name, optional.get(name), "warning")
    if torch is None:
        if installed_version("torch") is not None:
            yield Finding(
                _AREA, "import torch", import_error, f"fails: {import_error}", "error",
                "pip install --force-reinstall torch",
            )  # fmt: skip
        return
    yield _found("cuda", torch.version.cuda, torch.version.cuda or "none (a CPU build of torch)")
    driver = driver_version()
    yield _found("driver", driver, driver or "no NVIDIA driver")
    if torch.version.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield _found("nccl", nccl)


def _found(name: str, value: object, text: str | None = None) -> Finding:
    return Finding(_AREA, name, value, text or str(value))


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, needed: str | None, status: Status) -> Finding:
    """The version of a package; with ``status`` if it is missing, or not one that is needed."""
    found, hint = installed_version(name), f'pip install "{name}{needed or ""}"'
    if found is None:
        return Finding(_AREA, name, None, "not installed", status, hint)
    if needed is not None and not _fits(found, needed):
        text = f"{found}, but lorakit needs {needed}"
        return Finding(_AREA, name, found, text, status, hint)
    return _found(name, found)


def _requirements(optional: bool = False) -> dict[str, str | None]:
    """Package -> the versions that lorakit's metadata asks for, such as ``>=2.8,<2.14``; those of
    its extras if ``optional``. Empty if lorakit is not installed but run from its sources."""
    try:
        listed = importlib.metadata.requires("lorakit") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, str | None] = {}
    for text in listed:
        requirement, _, marker = text.partition(";")
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*(.*)", requirement)
        if match and ("extra" in marker) == optional:
            found.setdefault(match[1].lower(), match[2].strip().strip("()") or None)
    return found


def _fits(version: str, specifier: str) -> bool:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return True


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver, None if there is none."""
    try:
        match = re.search(r"Kernel Module\S*\s+(?:for \S+\s+)?([0-9][0-9.]+)", _DRIVER.read_text())
    except OSError:
        match = None
    return match[1] if match else nvidia_smi("driver_version")


def nvidia_smi(query: str) -> str | None:
    """The first line that nvidia-smi prints for a query; None without the tool or an answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0].strip() or None
