from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.recipe.check import has_accelerator

Attach = Callable[..., None]


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend to be on Linux, with no settings that hide devices."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return monkeypatch


@pytest.fixture
def attach(linux: pytest.MonkeyPatch) -> Attach:
    """Return ``attach(*files)``, which makes these the only files in ``/dev``; none at first."""
    exists = Path.exists

    def attach_files(*files: str) -> None:
        def found(path: Path) -> bool:
            return str(path) in files if path.parent == Path("/dev") else exists(path)

        linux.setattr(Path, "exists", found)

    attach_files()
    return attach_files


@pytest.mark.parametrize("file", ["/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"])
def test_a_device_is_found(attach: Attach, file: str) -> None:
    assert not has_accelerator()
    attach(file)
    assert has_accelerator()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "true")],
)
def test_the_environment_hides_devices(
    linux: pytest.MonkeyPatch, attach: Attach, variable: str, value: str
) -> None:
    attach("/dev/nvidia0")
    linux.setenv(variable, value)
    assert not has_accelerator()


def test_a_chosen_device_is_not_hidden(linux: pytest.MonkeyPatch, attach: Attach) -> None:
    attach("/dev/nvidia0")
    linux.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert has_accelerator()


def test_apple_silicon(linux: pytest.MonkeyPatch) -> None:
    linux.setattr(platform, "system", lambda: "Darwin")
    linux.setattr(platform, "machine", lambda: "arm64")
    assert has_accelerator()
    linux.setattr(platform, "machine", lambda: "x86_64")
    assert not has_accelerator()
