from __future__ import annotations

import math

import pytest

from lorakit.recipe.yaml_source import read_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1.0e-6", 1e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("007", 7),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("-.inf", -math.inf),
    ],
)
def test_core_schema(text: str, value: object) -> None:
    read = read_scalar(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "no",
        "on",
        "off",
        "y",
        "0x1F",
        "0o17",
        "1_000",
        "1:30",
        "e5",
        "1e",
        ".",
        "-",
        "2026-01-01",
    ],
)
def test_stays_text(text: str) -> None:
    assert read_scalar(text) == text


def test_nan() -> None:
    assert math.isnan(float(read_scalar(".nan") or 0))


def test_long_numbers_stay_text() -> None:
    assert isinstance(read_scalar("9" * 5000), str)
    assert isinstance(read_scalar("0." + "9" * 5000), str)
