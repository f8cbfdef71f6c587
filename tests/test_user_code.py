"""Classes and functions from a user's Python file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.errors import DataError, UserError
from lorakit.user_code import guarded, is_code, load_attribute, load_class

CODE = """
from collections.abc import Iterator
print("this runs")

class Empty(Iterator):
    def __next__(self):
        raise StopIteration

class Abstract(Iterator):
    pass

def fail(number):
    return 1 / number

number = 3
"""


@pytest.fixture
def code(in_tmp: Path) -> Path:
    (in_tmp / "code.py").write_text(CODE)
    return in_tmp / "code.py"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("a.py", True), ("./a.py:B", True), ("a.yaml", False), ("pyramid", False)],
)
def test_what_names_a_python_file(spec: str, expected: bool) -> None:
    assert is_code(spec) is expected


def test_a_class_is_loaded_once_per_version(code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load_class("code.py:Empty", Iterator)
    assert list(found()) == []
    assert load_class("./code.py:Empty", Iterator) is found
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "this runs\n")
    code.write_text(CODE.replace("print", "len"))
    assert load_class("code.py:Empty", Iterator) is not found
    assert not [*code.parent.glob("__pycache__")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("code.py:Abstract", "missing methods: __next__; allowed: a class that defines them"),
        ("code.py:number", "is int; allowed: a subclass of collections.abc.Iterator"),
        ("code.py:Emty", "has no 'Emty' (did you mean 'Empty'?); allowed: Empty, Abstract"),
        ("code.py", "a class or function is missing; allowed: code.py:Empty"),
        ("other.py:Empty", "other.py: no such file (the path is relative to "),
    ],
)
def test_an_invalid_class_is_refused_in_one_line(code: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_class(spec, Iterator)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_of_another_base_is_refused(code: Path) -> None:
    class Base(ABC):
        @abstractmethod
        def run(self) -> None: ...

    with pytest.raises(UserError, match=r"is the class Empty; allowed: a subclass of .*Base$"):
        load_class("code.py:Empty", Base)


def test_a_failure_names_the_file_and_line(code: Path) -> None:
    function, file, _ = load_attribute("code.py:fail")
    line = CODE.split("\n").index("    return 1 / number") + 1
    with pytest.raises(DataError, match=rf"^code\.py:{line}: ZeroDivisionError: division by zero$"):
        guarded(function, file, DataError)(0)
    with pytest.raises(TypeError):  # the caller's mistake, not the file's
        guarded(function, file)()


def test_comments_and_docstrings_do_not_change_the_digest(code: Path) -> None:
    before = load_attribute("code.py:number").digest
    code.write_text(f'"""A docstring."""\n{CODE}\n# a comment\n')
    assert load_attribute("code.py:number").digest == before
    code.write_text(CODE.replace("number = 3", "number = 4"))
    assert load_attribute("code.py:number").digest != before


def test_termination_during_import_is_not_an_error_of_the_file(in_tmp: Path) -> None:
    (in_tmp / "slow.py").write_text("raise SystemExit(143)\n")
    with pytest.raises(SystemExit, match="143"):
        load_attribute("./slow.py:My")
