"""The page: one well-formed file, in which nothing of a run is markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorakit.reports.page import render
from lorakit.reports.runs import read_runs
from tests.reports.files import (
    PREDICTIONS,
    RECIPE,
    RECORD,
    adalora_lines,
    log_line,
    write_run,
    write_sweep_files,
)

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;\u202e\u2028{{x}}"
_VOID = {"meta", "link", "input", "br", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects them and their text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attributes}) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        {"script": self.scripts, "style": self.styles}.get(inside, self.texts).append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def page_of(*runs: Path, **options: Any) -> Page:
    return Page(render(read_runs(runs), **options))


def test_it_needs_nothing_else_and_allows_only_its_own_code(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", predictions=PREDICTIONS)
    page = page_of(run)
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name) in (None, "data:,")
    policy = next(
        a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    for name, (code,) in {"script": page.scripts[1:], "style": page.styles}.items():
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    assert not re.search(
        r"innerHTML\s*=(?!=)|outerHTML|insertAdjacentHTML|document\.write|eval\(", page.scripts[1]
    )


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    record = {
        "message": HOSTILE, "exit_reason": HOSTILE, "versions": {HOSTILE: HOSTILE},
        "metrics": {HOSTILE: 1.0}, "adapted_modules": [{"name": HOSTILE}, {"name": HOSTILE + "2"}],
    }  # fmt: skip
    example = dict.fromkeys(("row", "input", "reference", "prediction"), HOSTILE) | {"right": False}
    predictions = {"split": HOSTILE, "labels": [HOSTILE], "confusion": [[1]], "examples": [example]}
    lines = [log_line(1, ranks=[1, 2], **{HOSTILE: 1}), {"step": 1, "eval": {HOSTILE: 1}}]
    recipe = f"adapter: {{method: {json.dumps(HOSTILE)}}}\n# {HOSTILE}\n"
    name = HOSTILE.replace("/", "").replace("\u2028", "")
    run = write_run(
        tmp_path / name, record=record, predictions=predictions, lines=lines, recipe=recipe
    )
    page = page_of(run, write_run(tmp_path / "other"))
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [tag for tag, _ in page.elements if tag in ("img", "svg")]
    shown = (
        "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;\\u202e\\u2028{{x}}"
    )
    assert sum(shown in text for text in page.texts) >= 12
    assert any(
        HOSTILE in chart["title"].lower() or HOSTILE[1:] in chart["title"]
        for chart in page.data["charts"]
    )
    assert page.data["ranks"][0]["frames"][-1] == [1, [1, 2]]


def test_sections_show_what_the_run_has(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", predictions=PREDICTIONS)
    page = page_of(run)
    text = "\n".join(page.texts)
    for expected in ("completed", "0.7500", "1 min 15 s", "1.0 GiB", "a text", "glue/rte", "2.9"):
        assert expected in text
    charts = {chart["title"]: chart for chart in page.data["charts"]}
    assert list(charts) == [
        "Loss", "Accuracy", "Learning rate", "Gradient norm", "Throughput", "Peak memory",
    ]  # fmt: skip
    training, evaluation = charts["Loss"]["curves"]
    assert (training["x"], training["y"]) == ([1, 2, 3, 4], [2.0, 1.0, 0.666667, 0.5])
    assert (evaluation["x"], evaluation["y"], evaluation["points"]) == ([4], [0.5], True)
    assert charts["Peak memory"]["curves"][0]["y"] == [1.0] * 4
    shades = {a["class"] for t, a in page.elements if t == "td" and "class" in a}
    assert shades == {"s6 own", "s3", "s0", "s9 own"}
    assert {"0.667", "1.000"} <= set(page.texts), "recall and precision"


def test_samples_can_be_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", predictions=PREDICTIONS)
    assert "a text" not in "".join(page_of(run, samples=False).texts)


def test_ranks_over_time(tmp_path: Path) -> None:
    ranks = [{"module": m["name"], "layer": 0, "rank": r}
             for m, r in zip(RECORD["adapted_modules"], [3, 1, 1, 3], strict=True)]  # type: ignore[call-overload]  # fmt: skip
    run = write_run(
        tmp_path / "run", method="adalora", record={"ranks": ranks}, lines=adalora_lines()
    )
    (found,) = page_of(run).data["ranks"]
    assert found["rows"] == ["0", "1"]
    assert found["columns"] == ["attn.q_proj", "attn.v_proj"]
    assert found["cells"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert found["frames"] == [
        [0, [3] * 4], [2, [3, 3, 2, 3]], [3, [3, 2, 1, 3]], [4, [3, 1, 1, 3]],
    ]  # fmt: skip


def test_several_runs_a_sweep_and_a_run_without_numbers(tmp_path: Path) -> None:
    sweep = write_sweep_files(tmp_path / "sweep")
    page = page_of(sweep, write_run(tmp_path / "dora", method="dora"))
    assert [run["status"] for run in page.data["runs"]] == [
        "completed", "failed", "pending", "completed",
    ]  # fmt: skip
    loss = page.data["charts"][0]
    assert [curve["run"] for curve in loss["curves"]] == [0, 0, 1, 1, 3, 3]
    text = "".join(page.texts)
    assert "sweep, dora - lorakit report" in page.texts
    assert "step 3: the loss is nan" in text
    assert "adapter.method" in text
    empty = write_run(tmp_path / "empty", lines=[])
    assert page_of(empty).data["charts"] == []


@pytest.mark.parametrize("value", [None, 1, "x", [], [1], [[]], {"a": [1]}, True, -1, 1e400])
def test_records_of_other_types_break_nothing(tmp_path: Path, value: Any) -> None:
    record = dict.fromkeys([*RECORD, "ranks"], value)
    predictions = dict.fromkeys([*PREDICTIONS, "x"], value)
    lines = [dict.fromkeys(("step", "eval", "ranks", "loss"), value), log_line(1)]
    run = write_run(tmp_path / "run", record=record, lines=lines, predictions=predictions)
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps({"adapter": value, "train": value}))
    page_of(run, run, write_run(tmp_path / "other", predictions={"examples": [value, {}]}))
    sweep = tmp_path / "sweep"
    write_run(sweep / "members" / "a")
    (sweep / "sweep.json").write_text(json.dumps({"members": [value, {"name": value}]}))
    page_of(sweep)


def test_files_that_are_nested_too_deep_are_not_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    deep = "[" * 900 + "]" * 900
    (run / "run.json").write_text(f'{{"versions": {deep}, "message": {deep}}}')
    (run / "predictions.json").write_text(f'{{"examples": [{{"input": {deep}}}]}}')
    assert "run.json: not readable" in page_of(run).texts


def test_fifty_thousand_lines_stay_a_small_page(tmp_path: Path) -> None:
    lines = [log_line(step, loss=1 / step + step % 7) for step in range(1, 50_001)]
    run = write_run(tmp_path / "run", lines=lines)
    text = render(read_runs([run]))
    assert len(text) < 150_000
    curve = Page(text).data["charts"][0]["curves"][0]
    assert len(curve["x"]) <= 600
    assert max(curve["y"]) == pytest.approx(max(line["loss"] for line in lines), rel=1e-5)


def test_a_recipe_longer_than_any_is_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe=RECIPE + "# long\n" * 100_000)
    assert len(render(read_runs([run]))) < 600_000
