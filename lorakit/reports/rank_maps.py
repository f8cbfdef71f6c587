"""AdaLoRA's ranks over the steps of a run, for a map of layers and matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.module_names import layer_of
from lorakit.reports.html import Html, element, joined, table
from lorakit.reports.metrics_log import is_rank
from lorakit.reports.runs import Run
from lorakit.training.ranks import matrix_names

_MOST_FRAMES = 200


def rank_maps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each run with ranks: ``run`` (its number), ``rows`` (layers) and ``columns`` (matrices in
    a layer), ``cells`` (row and column of each adapted matrix) and ``frames`` (step, ranks)."""
    maps = ((at, _rank_map(run)) for at, run in enumerate(runs))
    return [{"run": at} | found for at, found in maps if found is not None]


def _rank_map(run: Run) -> dict[str, Any] | None:
    names, final = _names(run)
    frames = [frame for frame in run.log.ranks if len(frame[1]) == len(names)]
    if final and (not frames or frames[-1][1] != final):
        frames.append((run.log.last_step, final))
    if not names or not frames:
        return None
    adapter = run.recipe.get("adapter")
    start = adapter.get("init_r") if isinstance(adapter, dict) else None
    if type(start) is int:
        frames.insert(0, (0, [start] * len(names)))
    layers = sorted({layer_of(name) for name in names}, key=lambda at: (at is None, at or 0))
    matrices = matrix_names(names)
    columns = list(dict.fromkeys(matrices.values()))
    return {
        "rows": ["-" if layer is None else str(layer) for layer in layers],
        "columns": columns,
        "cells": [[layers.index(layer_of(n)), columns.index(matrices[n])] for n in names],
        "frames": [[step, ranks] for step, ranks in _some(frames)],
    }


def _names(run: Run) -> tuple[list[str], list[int]]:
    """The names of the adapted matrices, and their ranks at the end of the run if it has ended."""
    ended = _listed(run.record, "ranks", "module")
    ranks = [entry["rank"] for entry in ended if is_rank(entry.get("rank"))]
    if ranks and len(ranks) == len(ended):
        return [entry["module"] for entry in ended], ranks
    return [entry["name"] for entry in _listed(run.record, "adapted_modules", "name")], []


def _listed(record: Mapping[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    """The objects in the list at ``key`` that have a ``name``."""
    entries = record.get(key)
    known = entries if isinstance(entries, list) else []
    return [own for own in known if isinstance(own, dict) and isinstance(own.get(name), str)]


def _some(frames: Sequence[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    count = min(len(frames), _MOST_FRAMES)
    places = [at * (len(frames) - 1) // max(count - 1, 1) for at in range(count)]
    return [frames[at] for at in places]


def rank_section(runs: Sequence[Run], maps: Sequence[Mapping[str, Any]]) -> Html:
    """A place for each map, which the page's script draws, and the last ranks as a table."""
    parts = []
    for found in maps:
        name = runs[found["run"]].name
        (step, ranks), cells = found["frames"][-1], found["cells"]
        places: dict[tuple[int, int], list[int]] = {}
        for (row, column), rank in zip(cells, ranks, strict=True):
            places.setdefault((row, column), []).append(rank)
        rows = [
            [
                layer,
                *(_mean(places.get((row, column), [])) for column in range(len(found["columns"]))),
            ]
            for row, layer in enumerate(found["rows"])
        ]
        ranks_table = table(
            ["layer", *found["columns"]], rows, label=f"{name}: ranks at step {step}"
        )
        summary = element("summary", "Table of the last ranks")
        parts.append(
            element("figure", element("figcaption", f"Ranks of {name}"),
                    element("div", class_="rank-map", data_run=str(found["run"])))
        )  # fmt: skip
        parts.append(element("details", summary, ranks_table))
    return joined(parts)


def _mean(ranks: Sequence[int]) -> str:
    if not ranks:
        return "."
    mean = sum(ranks) / len(ranks)
    return f"{mean:.1f}" if mean % 1 else f"{mean:.0f}"
