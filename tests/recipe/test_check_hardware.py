from __future__ import annotations

import platform

import pytest

from lorakit.recipe import check as hardware


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend to be on Linux, with ``/dev/null`` as the accelerator."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(hardware, "_DEVICES", ("null",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return monkeypatch


def test_a_device_is_found(linux: pytest.MonkeyPatch) -> None:
    assert hardware.has_accelerator()
    linux.setattr(hardware, "_DEVICES", ("no-such-device",))
    assert not hardware.has_accelerator()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "true")],
)
def test_the_environment_hides_devices(
    linux: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    linux.setenv(variable, value)
    assert not hardware.has_accelerator()


def test_a_chosen_device_is_not_hidden(linux: pytest.MonkeyPatch) -> None:
    linux.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert hardware.has_accelerator()


def test_apple_silicon(linux: pytest.MonkeyPatch) -> None:
    linux.setattr(platform, "system", lambda: "Darwin")
    linux.setattr(platform, "machine", lambda: "arm64")
    assert hardware.has_accelerator()
    linux.setattr(platform, "machine", lambda: "x86_64")
    assert not hardware.has_accelerator()
