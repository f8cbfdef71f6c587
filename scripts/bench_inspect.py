"""Time ``lorakit inspect`` on random adapters with the shapes of Llama-3-8B, on all linear layers.

Writes two adapters (r = 16, float32) and runs the command on one, and on both. The times are of
the whole process, startup included; CPU time is user and system.

    python scripts/bench_inspect.py
    python scripts/bench_inspect.py --rank 64 --layers 8
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

_HIDDEN, _KEYS, _INNER = 4096, 1024, 14336
_SHAPES = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_KEYS, _HIDDEN),
    "self_attn.v_proj": (_KEYS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_INNER, _HIDDEN),
    "mlp.up_proj": (_INNER, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INNER),
}


def write_adapter(folder: Path, layers: int, rank: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in _SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in _SHAPES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure(*arguments: object) -> tuple[float, float]:
    """Wall and CPU seconds of ``lorakit inspect``."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "lorakit", "inspect", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, two = (
            write_adapter(Path(folder) / str(seed), given.layers, given.rank, seed)
            for seed in (1, 2)
        )
        for label, arguments in (("one adapter", (one,)), ("two adapters", (one, two))):
            for _ in range(given.repeats):
                wall, cpu = measure(*arguments, "--json")
                print(f"{label}: {wall:.1f} s, {cpu:.1f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
