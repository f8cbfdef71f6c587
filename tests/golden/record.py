"""Record the results of the golden runs: ``python -m tests.golden.record [--full DIR] [NAME ...]``.
Without ``--full`` it rewrites ``expected/``; with it, it writes complete results to DIR for
bit-exact comparisons and leaves ``expected/`` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

EXPECTED = Path(__file__).with_name("expected")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs [default: all]")
    parser.add_argument("--full", type=Path, metavar="DIR", help="whole results, to the bit")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "LORAKIT_CACHE": folder,
        }  # fmt: skip
        record(Path(folder), arguments.names, arguments.full)


def record(workspace: Path, names: list[str], full: Path | None) -> None:
    # Here, after the environment is set, which torch and transformers read when imported.
    from tests.golden.commands import execute
    from tests.golden.data import write_data
    from tests.golden.models import write_models
    from tests.golden.runs import RUNS

    if unknown := set(names) - {golden.name for golden in RUNS}:
        raise SystemExit(f"error: no such golden run: {', '.join(sorted(unknown))}")
    target = None if full is None else full.absolute()
    write_models(workspace / "models")
    write_data(workspace / "data")
    for golden in RUNS:
        if (names and golden.name not in names) or (target is None and not golden.portable):
            continue
        results = execute(golden, workspace)
        print(f"{golden.name}: {len(results.values)} values, {len(results.tensors)} tensors")
        if target is not None:
            results.save_full(target, golden.name)
        else:
            EXPECTED.mkdir(exist_ok=True)
            file = EXPECTED / f"{golden.name}.json"
            file.write_text(_one_entry_a_line(results.summary()), encoding="utf-8")
    if target is None and not names:
        recorded = {f"{golden.name}.json" for golden in RUNS if golden.portable}
        for file in EXPECTED.glob("*.json"):
            if file.name not in recorded:
                file.unlink()


def _one_entry_a_line(summary: dict[str, dict[str, object]]) -> str:
    parts = []
    for part, entries in summary.items():
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        parts.append(f"{json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
