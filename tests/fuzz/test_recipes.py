"""Mutated recipes: accepted, or refused with lines that say why."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from lorakit.cli.main import run
from tests.fuzz.mutate import assert_plain, limited, listing, mutate_bytes, run_cases

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
SCALARS = [
    "null", "~", "true", "yes", "-1", "0", "1", "0x10", "1_000", "1e400", "-.inf", ".nan", "1e-5", "10" * 3000,
    '""', "' '", "[]", "{}", "[[]]", "[1, a]", "{a: 1}", "2026-01-01", "1:30:00", "!!set {a}", "!!binary aGk=",
    "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!x y", "&a [*a]", "*a",
    "[" * 3000, "{a: " * 3000, "x" * 100_000, r'"\x1b[31mred"', r'"\0"', r'"\uD800"', '"\u202e"', "../../escape",
    "/dev/zero", "/etc/passwd", "./x.py:Y", "evil.py:Task", "hf://x", "http://localhost:1/x", "|", ">", "- a", "? a",
    "<<: {a: 1}", "'", '"', "\t", "\ufeff", "\x85", "a: b: c", "%YAML 9.9", "---", "...", "@", "`", "\x00",
]  # fmt: skip


def mutated(recipes: Sequence[str], draw: random.Random) -> bytes:
    lines = draw.choice(recipes).splitlines()
    for _ in range(draw.choice([1, 1, 2, 4])):
        at, how = draw.randrange(len(lines)), draw.random()
        key, colon, _ = lines[at].partition(":")
        if how < 0.6 and colon:
            lines[at] = f"{key}: {draw.choice(SCALARS)}"
        elif how < 0.7:
            lines[at : at + 1] = []
        elif how < 0.8:
            lines.insert(draw.randrange(len(lines) + 1), lines[at])
        elif how < 0.9:
            lines[at] = draw.choice([" ", "  ", "    "]) + lines[at]
        else:
            lines.insert(at, draw.choice(SCALARS))
        lines = lines or ["x"]
    text = "\n".join(lines).encode("utf-8", errors="surrogatepass") + b"\n"
    return mutate_bytes(text, draw) if draw.random() < 0.3 else text


@pytest.mark.parametrize(
    ("count", "seed"), [(200, 1), pytest.param(5000, 2, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1800)
def test_mutated_recipes(
    count: int, seed: int, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    temporary = in_tmp / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    recipes = [file.read_text(encoding="utf-8") for file in sorted(SHIPPED.glob("*.yaml"))]
    file = in_tmp / "recipe.yaml"
    file.touch()
    for name in ("all-minilm-l6-v2", "smollm2-135m-instruct"):  # the recipes' local paths
        (in_tmp / "models" / name).mkdir(parents=True)
        (in_tmp / "models" / name / "config.json").write_text("{}")
    (in_tmp / "data" / "wikisql-sample").mkdir(parents=True)
    (in_tmp / "data" / "wikisql-sample" / "train.jsonl").write_text("{}\n")
    before = set(listing(in_tmp))
    codes = {0: 0, 2: 0}

    def case(number: int) -> None:
        content = mutated(recipes, random.Random(f"{seed}.{number}"))
        file.write_bytes(content)
        with limited():
            code = run(["validate", str(file)])
        streams = capsys.readouterr()
        assert code in (0, 2), (number, streams.err)
        assert_plain(streams.out + streams.err)
        lines = streams.err.splitlines()
        assert code == 0 or any(line.startswith("error: ") for line in lines), number
        assert set(listing(in_tmp)) == before, number
        codes[code] += 1

    run_cases(count, case)
    assert min(codes.values()) > count // 50  # the mutations are neither too mild nor too wild
