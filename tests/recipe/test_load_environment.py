from __future__ import annotations

import pytest

from lorakit.recipe.load import escape, expand_environment
from lorakit.recipe.yaml_source import YamlFile

ENVIRON = {"R": "4", "EMPTY": "", "NAME": "a b", "FLAG": "true", "LIST": "[q, k]"}


def expanded(value: object, quoted: bool = False) -> object:
    source = YamlFile("r.yaml", {"k": value}, quoted=frozenset({("k",)} if quoted else ()))
    assert expand_environment(source, ENVIRON) == []
    return source.data["k"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${R}", 4),
        ("${FLAG}", True),
        ("${NAME}", "a b"),
        ("${EMPTY}", None),
        ("${LIST}", "[q, k]"),
        ("${NONE:-2e-4}", 2e-4),
        ("${NONE:-}", None),
        ("${EMPTY:-x}", "x"),
        ("${R:-9}", 4),
        ("runs/${NAME}-${R}", "runs/a b-4"),
        ("${R}${R}", "44"),
        ("$R $$ {R}", "$R $$ {R}"),
        ("$${R}", "${R}"),
        ("$${", "${"),
    ],
)
def test_expansion(text: str, value: object) -> None:
    assert expanded(text) == value


def test_a_quoted_reference_stays_a_string() -> None:
    assert expanded("${R}", quoted=True) == "4"


def test_nested_values() -> None:
    assert expanded({"x": ["${R}", {"${R}": "${NAME}"}]}) == {"x": [4, {"${R}": "a b"}]}


@pytest.mark.parametrize("text", ["${", "$${", "a ${R} $${R} $$${R}", "$$", "${NONE:-x}"])
def test_escape(text: str) -> None:
    assert expanded(escape(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${NONE}", "environment variable NONE is not set"),
        ("x ${NONE} y", "environment variable NONE is not set"),
        ("${1X}", "invalid variable reference"),
        ("${R", "invalid variable reference"),
        ("${R-3}", "invalid variable reference"),
    ],
)
def test_faults(text: str, message: str) -> None:
    source = YamlFile("r.yaml", {"s": {"k": text}}, {("s", "k"): 7})
    (fault,) = expand_environment(source, ENVIRON)
    problem = fault.locate(source)
    assert message in problem.message
    assert (problem.file, problem.line, problem.key, problem.value) == ("r.yaml", 7, "s.k", text)
