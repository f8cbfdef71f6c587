"""Time ``lorakit predict`` on a file against transformers' text-classification pipeline.

    python scripts/bench_predict.py MODEL DATA [--rows 10000] [--batch-size 32] [--repeats 3]

MODEL is a merged classifier, DATA a JSON Lines file (may be gzipped) whose first rows are used,
with the columns of GLUE. Both sides are whole processes that import, load, read the same file and
write one JSON object per row; they run in turn. The pipeline gets the rows as one list, the same
batch size and truncation. rows/s are by wall time; CPU rows/s by the user and system time of the
process, which depends less on what else runs; "without start" subtracts the time of one row. The
last line is the largest difference of a probability.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COLUMNS = (("sentence1", "sentence2"), ("question", "sentence"), ("sentence",), ("text",))
SIDES = ("lorakit", "pipeline")
KEYS = ("rows/s", "CPU rows/s", "CPU rows/s without start")


def main() -> None:
    arguments = parse()
    if arguments.pipeline:
        with_pipeline(arguments.model, *map(Path, arguments.pipeline), arguments.batch_size)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, all_rows = folder / "one.jsonl", folder / "rows.jsonl"
        write_rows(arguments.data, one, 1)
        count = write_rows(arguments.data, all_rows, arguments.rows)
        rates: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.repeats):
            for side in SIDES:
                _, start = timed(arguments, side, one, folder / "one.out.jsonl")
                wall, cpu = timed(arguments, side, all_rows, folder / f"{side}.jsonl")
                values = (count / wall, count / cpu, (count - 1) / (cpu - start))
                rates[side].append(dict(zip(KEYS, values, strict=True)))
        show(rates, f"{count:,} rows, batch size {arguments.batch_size}")
        print(f"largest difference of a probability: {difference(folder):.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pipeline", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(data: Path, target: Path, count: int) -> int:
    with (gzip.open if data.suffix == ".gz" else open)(data, "rt", encoding="utf-8") as lines:
        kept = [line for line, _ in zip(lines, range(count), strict=False)]
    target.write_text("".join(kept), encoding="utf-8")
    return len(kept)


def timed(
    arguments: argparse.Namespace, side: str, source: Path, target: Path
) -> tuple[float, float]:
    """Run one side in a process of its own; return its wall time and its CPU time, in seconds."""
    size = ["--batch-size", str(arguments.batch_size)]
    command = [__file__, arguments.model, str(arguments.data), "--pipeline", source, target]
    if side == "lorakit":
        command = ["-m", "lorakit", "predict", arguments.model, "--input", source]
        command += ["--output", target]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, *map(str, command), *size], capture_output=True, check=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def with_pipeline(model: str, source: Path, target: Path, batch_size: int) -> None:
    from transformers import pipeline

    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    columns = next(names for names in COLUMNS if set(names) <= set(rows[0]))
    texts = [dict(zip(("text", "text_pair"), map(row.get, columns), strict=False)) for row in rows]
    classify = pipeline("text-classification", model=model, device="cpu")
    lines = []
    for scores in classify(texts, batch_size=batch_size, truncation=True, top_k=None):
        by_name = {score["label"]: score["score"] for score in scores}
        lines.append(json.dumps({**scores[0], "scores": by_name}))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def show(rates: dict[str, list[dict[str, float]]], what: str) -> None:
    middle = {
        side: {key: statistics.median(row[key] for row in rates[side]) for key in KEYS}
        for side in SIDES
    }
    print(f"| {what} | {' | '.join(KEYS)} |\n" + "|---" * 4 + "|")
    for side in SIDES:
        print(f"| {side} | {' | '.join(f'{middle[side][key]:,.0f}' for key in KEYS)} |")
    ours, theirs = (rates[side] for side in SIDES)
    for key in KEYS:
        ratios = sorted(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
        print(f"{key}: {statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def difference(folder: Path) -> float:
    sides = []
    for side in SIDES:
        lines = (folder / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
        sides.append([json.loads(line)["scores"] for line in lines])
    pairs = zip(*sides, strict=True)
    return max(abs(ours[name] - theirs[name]) for ours, theirs in pairs for name in theirs)


if __name__ == "__main__":
    main()
