"""A report as one HTML page that needs no other file and no network.

Text and tables are complete without scripts; the page's script draws the charts from the data in
the page. Its Content-Security-Policy allows exactly this style and this script, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from lorakit.errors import listed
from lorakit.reports.charts import charts
from lorakit.reports.comparison import comparison
from lorakit.reports.html import Html, element, embedded_json, joined
from lorakit.reports.predictions import predictions
from lorakit.reports.rank_maps import rank_maps, rank_section
from lorakit.reports.runs import Run
from lorakit.reports.sections import differences, facts, recipes, results
from lorakit.version import __version__

#: What the beginning of each page has, and by which a page of ours is recognized.
MARK = '<meta name="generator" content="lorakit report'
_SCRIPTS = ("charts.js", "rank_map.js", "page.js")
#: A browser without scripts shows the tables.
_NO_SCRIPT = "The charts need JavaScript; the tables do not."


def render(runs: Sequence[Run], *, live: bool = False, samples: bool = True) -> str:
    """The page of a report on ``runs``. A ``live`` one asks the server that it came from for newer
    versions of itself. Without ``samples``, it has no rows of the data."""
    compared = comparison(runs)
    title = listed(dict.fromkeys(run.sweep_name or run.name for run in runs), most=3)
    maps = rank_maps(runs)
    data = {
        "runs": [{"name": run.name, "status": run.status} for run in runs],
        "charts": charts(runs),
        "ranks": maps,
    }
    sections = [
        _section("results", "Results", results(runs, compared)),
        _section("charts", "Curves", element("noscript", element("p", _NO_SCRIPT))),
        _section("differences", "Settings that differ", differences(runs, compared)),
        _section("ranks", "Ranks", rank_section(runs, maps)),
        _section("predictions", "Predictions", predictions(runs) if samples else Html("")),
        _section("facts", "Versions, hardware and data", facts(runs)),
        _section("recipes", "Recipes", recipes(runs)),
    ]
    body = element(
        "body",
        element("header", element("h1", title), element("p", f"lorakit {__version__}"),
                element("p", id="state", role="status")),
        element("main", *sections),
        element("script", embedded_json(data), type="application/json", id="data"),
        element("script", _script()),
    )  # fmt: skip
    page = element("html", _head(title, live), body, lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _section(name: str, title: str, contents: Html) -> Html:
    """A section, whose place remains if it has no contents, since a later version may have some."""
    inner = joined([element("h2", title), contents]) if contents else Html("")
    return element("section", inner, id=name)


def _head(title: str, live: bool) -> Html:
    # Scripts and styles by their hashes alone: nothing that a run brings into the page can run.
    policy = "; ".join([
        "default-src 'none'", f"script-src {_source(_script())}", f"style-src {_source(_style())}",
        "img-src data:", "base-uri 'none'", "form-action 'none'",
        *(["connect-src 'self'"] if live else []),
    ])  # fmt: skip
    return element(
        "head",
        Html(f'{MARK} {__version__}">'),
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        *([element("meta", name="lorakit-live", content="2")] if live else []),
        element("title", f"{title} - lorakit report"),
        element("link", rel="icon", href="data:,"),
        element("style", _style()),
    )


@cache
def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def _asset(name: str) -> str:
    return (files("lorakit.reports") / "assets" / name).read_text(encoding="utf-8")


@cache
def _style() -> Html:
    return Html(_asset("page.css"))


@cache
def _script() -> Html:
    scripts = "".join(map(_asset, _SCRIPTS))
    return Html(f'(() => {{\n"use strict";\n{scripts}}})();\n')
