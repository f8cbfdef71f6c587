from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.errors import Problem, RecipeError
from lorakit.recipe.yaml_source import MAX_BYTES, dotted, read_value, read_yaml

Write = Callable[[str], Path]


def only_problem(path: Path) -> Problem:
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    (problem,) = caught.value.problems
    return problem


def test_data_and_lines(write: Write) -> None:
    source = read_yaml(write("# head\na:\n  b: [1, two]\n\n  c: 'x'\nd: {e: null}\n"))
    assert source.data == {"a": {"b": [1, "two"], "c": "x"}, "d": {"e": None}}
    assert source.lines[("a",)] == 2
    assert source.lines[("a", "b")] == source.lines[("a", "b", 1)] == 3
    assert source.lines[("a", "c")] == 5
    assert source.lines[("d", "e")] == 6
    assert source.quoted == {("a", "c")}
    assert source.problems == ()


def test_keys_are_strings_and_block_scalars_keep_line_breaks(write: Write) -> None:
    source = read_yaml(write("no: 1\n2: |\n  3\n  4\nnull: 5\n"))
    assert source.data == {"no": 1, "2": "3\n4\n", "null": 5}


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffa: é\r\nb: 2\r\n".encode())
    source = read_yaml(path)
    assert source.data == {"a": "é", "b": 2}
    assert source.lines[("b",)] == 2


def test_aliases_are_expanded(write: Write) -> None:
    source = read_yaml(write("a: &x [1, 2]\nb: *x\n"))
    assert source.data == {"a": [1, 2], "b": [1, 2]}
    assert source.data["a"] is not source.data["b"]


def test_an_alias_bomb_is_rejected(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    problem = only_problem(write("\n".join(lines)))
    assert "too many values" in problem.message
    assert "10000" in (problem.allowed or "")


def test_a_recursive_alias_is_rejected(write: Write) -> None:
    problem = only_problem(write("a: 1\nb: &x [1, *x]\n"))
    assert (problem.line, problem.message) == (2, "alias *x refers to itself")


def test_reading_continues_after_tags_and_duplicate_keys(write: Write) -> None:
    source = read_yaml(write("a: !!python/name:os.system x\nb: 1\nb: 2\nc: !!str 3\nd: ! 4\n"))
    assert [problem.line for problem in source.problems] == [1, 3, 4, 5]
    assert "python/name:os.system" in source.problems[0].message
    assert source.problems[1].message == "duplicate key 'b', first set on line 2"
    assert source.data["b"] == 1


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "the file is empty", None),
        ("# only this\n", "the file is empty", None),
        ("- a\n- b\n", "the file is not a mapping", None),
        ("just text\n", "the file is not a mapping", None),
        ("a: 1\nb: [1, 2\n", "not valid YAML", 3),
        ("a:\n\tb: 1\n", "not valid YAML", 2),
        ("a: 1\n---\nb: 2\n", "a second document starts", 2),
        ("a: 1\n? [b, c]\n: 2\n", "the key is a list or a mapping", 2),
        ("a: 1\nb: *nowhere\n", "alias *nowhere has no anchor", 2),
        ("a: 1\nb: \x07\n", "character U+0007", 2),
        ("a: 1\nb: " + "[" * 50 + "]" * 50, "nested too deeply", 2),
        ("%YAML 3.0\n---\na: 1\n", "not valid YAML", 1),
    ],
)
def test_errors_that_stop_parsing(write: Write, text: str, message: str, line: int | None) -> None:
    problem = only_problem(write(text))
    assert message in problem.message
    assert problem.line == line
    assert problem.file is not None
    assert problem.file.endswith("recipe.yaml")


def test_too_large(write: Write) -> None:
    problem = only_problem(write("a: " + "x" * MAX_BYTES))
    assert problem.message == "the file is too large"


@pytest.mark.parametrize(("data", "line"), [(b"a: 1\nb: \xff\n", 2), ("a: 1".encode("utf-16"), 1)])
def test_not_utf8(tmp_path: Path, data: bytes, line: int) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    problem = only_problem(path)
    assert "is not UTF-8" in problem.message
    assert problem.line == line


def test_missing_and_directory(tmp_path: Path) -> None:
    assert only_problem(tmp_path / "none.yaml").message == "no such file"
    assert only_problem(tmp_path).message == "is a directory"
    assert "cannot be read" in only_problem(Path("a\0b")).message


def test_a_pipe_is_read_only_from_the_shell(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    for path in (tmp_path / "recipe.yaml", Path("/dev/zero")):
        with pytest.raises(RecipeError, match="is a device or a pipe; allowed: a recipe file"):
            read_yaml(path)
    reader, writer = os.pipe()
    os.write(writer, b"a: 1\n")
    os.close(writer)
    assert read_yaml(Path(f"/dev/fd/{reader}")).data == {"a": 1}
    os.close(reader)


def test_read_value() -> None:
    assert read_value("[q, k]", "--set") == ["q", "k"]
    assert read_value("2e-4", "--set") == 2e-4
    assert read_value("", "--set") is None
    with pytest.raises(RecipeError, match="tag"):
        read_value("!!set {a}", "--set")


def test_dotted() -> None:
    assert dotted(("adapter", "target_modules", 0)) == "adapter.target_modules[0]"
    assert dotted(("a\nb",)) == r"'a\nb'"
