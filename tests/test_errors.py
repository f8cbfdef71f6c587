from __future__ import annotations

import copy

import pytest

from lorakit.errors import (
    UserError,
    WriteFailed,
    counted,
    decimal,
    duration,
    file_size,
    memory_size,
    parse_size,
    printable,
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a line\nanother\ttabbed", "a line\nanother\ttabbed"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("title\x1b]0;x\x07", r"title\x1b]0;x\x07"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("\x9b31m\x00\u202e\u2066\u2028", r"\x9b31m\x00\u202e\u2066\u2028"),
        ("é 漢字 \u00a0 नमस\u200dते 👩\u200d🔬", "é 漢字 \u00a0 नमस\u200dते 👩\u200d🔬"),
    ],
)
def test_only_what_controls_a_terminal_is_escaped(text: str, want: str) -> None:
    assert printable(text) == want


def test_parts_of_a_message() -> None:
    error = UserError("is a pipe", about="task.path", allowed="a file", hint="copy it")
    assert str(error) == "task.path: is a pipe; allowed: a file; hint: copy it"
    assert str(WriteFailed("out: the disk is full", hint="free space")) == (
        "out: the disk is full; hint: free space"
    )
    assert str(UserError("--split: unknown")) == UserError("--split: unknown").problem
    again = copy.copy(error)  # as when it is pickled
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_large_numbers_have_an_exponent() -> None:
    values = [0.0, -2.5, 123456.78949, 1e30, float("inf"), float("nan")]
    want = ["0.0000", "-2.5000", "123456.7895", "1.0000e+30", "inf", "nan"]
    assert [decimal(value) for value in values] == want


def test_counted() -> None:
    assert [counted(count, "row") for count in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.4 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (125.4, "2 min 05 s"),
        (2945, "49 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(3000, "3 KiB"), (52 << 20, "52 MiB"), (15 << 30, "15.0 GiB"), (3 << 40, "3,072.0 GiB")],
)
def test_memory_size(count: int, text: str) -> None:
    assert memory_size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MB"), (315_200_000, "315.2 MB"), (16_060_522_240, "16.1 GB")]
)
def test_file_size(count: int, text: str) -> None:
    assert file_size(count) == text


def test_sizes_are_read_as_they_are_written() -> None:
    sizes = [parse_size(text, "size") for text in ("5GB", "200 MB", "1KiB", "7", 12)]
    assert sizes == [5 * 10**9, 2 * 10**8, 1024, 7, 12]
    for bad in ("", "5XB", "-1GB", "0", "GB", "9" * 400):
        with pytest.raises(UserError, match=r"^size = .*: allowed: a size such as 5GB or 200MB$"):
            parse_size(bad, "size")
