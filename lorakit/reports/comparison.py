"""Comparing runs: their results, and the settings in which they differ."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from lorakit.errors import decimal, duration, memory_size, printable
from lorakit.reports.metrics_log import as_number
from lorakit.reports.runs import Run, read_runs
from lorakit.terminal.columns import aligned

#: Up to so many runs stand side by side as columns of the terminal's table; more have a row each,
#: with up to so many settings, of which more have a line each.
_MOST_COLUMNS, _MOST_SETTINGS = 4, 8
_MOST_VALUES = 4
_CELL_CHARACTERS, _VALUE_CHARACTERS = 36, 2_000
#: What differs in each run, and says nothing about it.
_OWN = frozenset({"recipe.train.output_dir", "data.train.source"})


@dataclass(frozen=True)
class Difference:
    """A setting in which the runs differ: its value in each, None where it is not set."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Comparison:
    """``results`` are those of each run, by name; ``differences`` are recipe keys and, as
    ``versions.torch`` for example, facts of ``run.json``; ``notes`` are about files that could not
    be read."""

    results: tuple[dict[str, Any], ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        differences = [{"key": own.key, "values": list(own.values)} for own in self.differences]
        return {"runs": list(self.results), "differences": differences}


def compare(*runs: str | PathLike[str]) -> Comparison:
    """Compare runs, given as their directories; that of a sweep stands for its members.

    A run need not be complete: its results are then those so far. Raises UserError for a path that
    is neither a run's nor a sweep's directory.
    """
    return comparison(read_runs(runs))


def comparison(runs: Sequence[Run]) -> Comparison:
    notes = tuple(f"{run.name}: {note}" for run in runs for note in run.notes)
    return Comparison(tuple(map(_results, runs)), tuple(_differences(runs)), notes)


def _results(run: Run) -> dict[str, Any]:
    record = run.record
    counts = {
        key: as_number(record.get(key)) or None  # 0 until the run has ended
        for key in ("trainable_parameters", "steps", "trained_tokens", "seconds")
    }
    counts["steps"] = counts["steps"] or run.log.last_step
    curves = run.log.curves
    speeds = [value for _, value in curves.get("tokens_per_second", ())]
    memory = as_number(record.get("peak_memory_bytes")) or max(
        (value for _, value in curves.get("peak_memory_bytes", ())), default=None
    )
    adapter = run.recipe.get("adapter")
    return {
        "name": run.name,
        "directory": str(run.directory),
        "method": _plain(adapter.get("method")) if isinstance(adapter, dict) else None,
        "status": run.status,
        "diverged": record.get("diverged") is True,
        **counts,
        "best_step": as_number(record.get("best_step")),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_bytes": memory,
        "training_loss": curves["loss"][-1][1] if "loss" in curves else None,
        "metrics": run.metrics,
    }


def _differences(runs: Sequence[Run]) -> Iterator[Difference]:
    if len(runs) < 2:
        return
    facts = [dict(_facts(run)) for run in runs]
    keys = dict.fromkeys(key for own in facts for key in own)
    sections = list(dict.fromkeys(map(_section, keys)))
    for key in sorted(keys, key=lambda key: sections.index(_section(key))):
        values = tuple(own.get(key) for own in facts)
        if key not in _OWN and len({_as_text(value) for value in values}) > 1:
            plain = tuple(map(_plain, values))
            yield Difference(key.removeprefix("recipe."), plain)


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _facts(run: Run) -> Iterator[tuple[str, Any]]:
    yield from flat("recipe", run.recipe)
    for key in ("init_from", "versions", "git_commit", "hardware"):
        yield from flat(key, run.record.get(key))
    yield "effective_batch_size", _effective_batch_size(run)
    splits = run.record.get("data")
    for split, about in (splits if isinstance(splits, dict) else {}).items():
        if isinstance(about, dict):
            yield f"data.{split}.source", about.get("source")
            yield f"data.{split}.rows", about.get("rows")
            yield f"data.{split}.fingerprint", str(about.get("fingerprint"))[:12]


def _effective_batch_size(run: Run) -> int | None:
    """Rows (or bins) per step over all processes; None if tokens limit the batches."""
    train, hardware = run.recipe.get("train"), run.record.get("hardware")
    train, hardware = (x if isinstance(x, dict) else {} for x in (train, hardware))
    factors = (
        train.get("per_device_batch_size"),
        train.get("gradient_accumulation_steps", 1),
        hardware.get("processes", 1),
    )
    if train.get("max_tokens_per_batch") or not all(isinstance(each, int) for each in factors):
        return None
    return int(math.prod(factors))


def flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """``KEY.NAME`` and the value for each entry of a mapping and of those in it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _plain(value: Any) -> Any:
    """``value`` as JSON, which has no infinite numbers."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def value_text(value: Any) -> str:
    """A value of a recipe or of ``run.json``, as a recipe writes it; a dash for none."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) else _as_text(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}..."


def _count(value: Any) -> str:
    return f"{value:,.0f}"


#: The results in a table, in order: title, key, and how the value is written.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("status", "status", str),
    ("method", "method", str),
    ("trainable", "trainable_parameters", _count),
    ("steps", "steps", _count),
    ("best step", "best_step", _count),
    ("trained tokens/labels", "trained_tokens", _count),
    ("time", "seconds", duration),
    ("tokens/s", "tokens_per_second", _count),
    ("peak memory", "peak_memory_bytes", memory_size),
    ("training loss", "training_loss", decimal),
)


def result_columns(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The results as texts, by title, with a value for each run; first the metrics."""
    names = dict.fromkeys(name for own in results for name in own["metrics"])
    columns: dict[str, list[str]] = {}
    columns["status"] = [
        f"{own['status']}, diverged" if own["diverged"] else own["status"] for own in results
    ]
    taken = {"run", *(title for title, *_ in _COLUMNS)}
    for name in names:
        title = f"{name} (metric)" if name in taken else name
        columns[title] = [_written(own["metrics"].get(name), decimal) for own in results]
    for title, key, written in _COLUMNS:
        columns.setdefault(title, [_written(own[key], written) for own in results])
    return {title: values for title, values in columns.items() if {*values} != {"-"}}


def _written(value: Any, write: Callable[[Any], str]) -> str:
    return "-" if value is None else write(value)


def comparison_text(compared: Comparison) -> str:
    """A table for the terminal: results, then the settings that differ."""
    names = [own["name"] for own in compared.results]
    columns = result_columns(compared.results)
    settings = {own.key: [value_text(v) for v in own.values] for own in compared.differences}
    if len(names) <= _MOST_COLUMNS:
        tables = [columns, settings] if settings else [columns]
        return "\n\n".join(
            _table([["", *names], *([title, *values] for title, values in own.items())])
            for own in tables
        )
    few = settings if len(settings) <= _MOST_SETTINGS else {}
    same = {title: values[0] for title, values in columns.items() if len({*values}) == 1}
    columns = {title: values for title, values in columns.items() if title not in same}
    columns = {"run": names, **few, **columns}
    table = _table([list(columns), *map(list, zip(*columns.values(), strict=True))])
    if same:
        table += "\n\nthe same in all runs: " + ", ".join(map(" ".join, same.items()))
    if few or not settings:
        return table
    lines = [[key, _counted_values(values)] for key, values in settings.items()]
    title = f"{len(settings)} settings differ; the values, and how many runs have each:"
    return f"{table}\n\n{title}\n{aligned(lines)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Names stay whole: those of a sweep's members often differ at the end."""
    return aligned([[_one_line(name), *map(_short, cells)] for name, *cells in rows])


def _counted_values(values: Sequence[str]) -> str:
    counts = Counter(values).most_common()
    texts = [f"{_short(value)} ({count})" for value, count in counts[:_MOST_VALUES]]
    more = len(counts) - _MOST_VALUES
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def _one_line(cell: str) -> str:
    return printable(" ".join(cell.split()))


def _short(cell: str) -> str:
    line = _one_line(cell)
    return line if len(line) <= _CELL_CHARACTERS else f"{line[: _CELL_CHARACTERS - 3]}..."
