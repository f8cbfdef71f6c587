"""The page in a real browser: charts are drawn, the keyboard works, and nothing of a run runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.reports.page import render
from lorakit.reports.runs import read_runs
from tests.reports.files import PREDICTIONS, RECIPE, adalora_lines, log_line, write_run
from tests.reports.test_serve import serving

api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(_BROWSERS)} is on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """What a page has reported: errors, dialogs, and requests for anything else."""
    return []


@pytest.fixture
def page(browser: Any, problems: list[str]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("dialog", lambda dialog: (problems.append("dialog"), dialog.dismiss()))
    yield page
    context.close()


def opened(page: Any, folder: Path, *runs: Path) -> Any:
    file = folder / "page.html"
    file.write_text(render(read_runs(runs)), encoding="utf-8")
    page.goto(file.as_uri())
    return page


def test_charts_and_their_controls(page: Any, problems: list[str], tmp_path: Path) -> None:
    lines = [log_line(step, loss=step % 5 + 1.0) for step in range(1, 31)]
    one, other = (write_run(tmp_path / name, lines=lines) for name in ("one", "other"))
    opened(page, tmp_path, one, other)
    titles = page.locator("#charts figcaption").all_inner_texts()
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory"]
    loss = page.locator("#charts figure").first
    assert loss.locator("path.line.c0").count() == 2, "smoothed, and as it is"
    assert loss.locator("path.line.c1:not(.faint)").count() == 1
    texts = loss.locator("svg text").all_text_contents()
    assert {"step", "loss"} <= set(texts)
    page.get_by_label("Smoothing").fill("0")
    assert loss.locator("path.line").count() == 2
    before = loss.locator("path.line.c0").get_attribute("d")
    page.get_by_label("Logarithmic").check()
    assert loss.locator("path.line.c0").get_attribute("d") != before
    page.get_by_role("checkbox", name="other").uncheck()
    assert loss.locator("path.line").count() == 1
    loss.locator(".plot").focus()
    for key, readout in (("ArrowRight", "step 1: one, training 2"), ("ArrowRight", "step 2: one, training 3"),
                         ("End", "step 30: one, training 1"), ("Escape", "")):  # fmt: skip
        page.keyboard.press(key)
        assert loss.locator(".readout").inner_text() == readout
    loss.locator("summary").press("Enter")
    loss.locator("tbody td").first.wait_for()
    cells = loss.locator("tbody td").all_inner_texts()
    assert cells == ["2", "1", "1", "5", "5", "4"], "first, last, lowest at, highest at"
    assert problems == []


def test_ranks_over_time(page: Any, problems: list[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", method="adalora", lines=adalora_lines())
    opened(page, tmp_path, run)
    texts = page.locator(".rank-map rect.heat + text")
    assert texts.all_text_contents() == ["3", "1", "1", "3"]
    page.get_by_label("Allocation").press("Home")
    assert texts.all_text_contents() == ["3", "3", "3", "3"]
    assert page.locator(".rank-map output").inner_text() == "step 0, total rank 12"
    page.get_by_role("button", name="Play").press("Enter")
    page.locator(".rank-map output", has_text="step 4, total rank 8").wait_for()
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen(
    browser: Any, problems: list[str], tmp_path: Path, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": 380, "height": 800}, color_scheme=scheme)
    run = write_run(tmp_path / "run", predictions=PREDICTIONS, lines=adalora_lines())
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page = opened(page, tmp_path, run, write_run(tmp_path / ("long" * 40)))
    size = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert size[0] <= size[1]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert dark == (scheme == "dark")
    assert problems == []
    context.close()


def test_nothing_that_a_run_says_is_run(page: Any, problems: list[str], tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>"
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    module = [{"name": attack}]
    run = write_run(
        tmp_path / attack.replace("/", ""),
        record={"message": attack, "adapted_modules": module, "versions": {attack: attack}},
        lines=[log_line(1, ranks=[1], **{attack: 1}), {"step": 1, "eval": {attack: 1}}],
        predictions={"labels": [attack], "confusion": [[1]],
                     "examples": [{"input": attack, "right": False}]},
        recipe=f"{RECIPE}# {attack}\n",
    )  # fmt: skip
    opened(page, tmp_path, run, write_run(tmp_path / "other"))
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0
    assert page.get_by_text("onerror=alert(2)").count() >= 8
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert problems == []
    # The policy stops what the escaping would let through.
    page.evaluate("document.body.innerHTML += '<img src=x onerror=alert(3)>'")
    page.wait_for_timeout(100)
    assert "dialog" not in problems
    assert any("Content Security Policy" in text for text in problems)


def test_a_served_page_follows_the_run(page: Any, problems: list[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record={"exit_reason": None, "metrics": {}, "steps": 0},
                    lines=[log_line(1), log_line(2)])  # fmt: skip
    with serving(run) as server:
        page.goto(server.url)
        page.get_by_text("Live").wait_for()
        page.locator("#facts summary").click()
        page.get_by_label("Smoothing").fill("0.3")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(log_line(9)) + "\n" + json.dumps({"step": 9, "eval": {"f1": 1}}))
            file.write("\n")
        page.locator("figcaption", has_text="F1").wait_for()
        assert page.locator("#results td").nth(4).inner_text() == "9", "the last step"
        assert page.locator("#facts details").get_attribute("open") == ""
        assert page.get_by_label("Smoothing").input_value() == "0.3"
    page.get_by_text("The server has ended").wait_for()
    assert [text for text in problems if "Failed to load resource" not in text] == []
