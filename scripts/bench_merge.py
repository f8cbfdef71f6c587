"""Compare time and anonymous memory of merging in lorakit, in PEFT, and of a plain copy.

Creates a random bfloat16 Llama of about ``--size`` GB and an adapter on all its linear layers, then
runs the three one after the other, ``--repeats`` times. lorakit runs as a command, PEFT as a
process that loads, merges and saves; both times include startup. Memory is the maximum RssAnon,
read from /proc every 10 ms.

    python scripts/bench_merge.py                # 1.9 GB, r = 8
    python scripts/bench_merge.py --size 0.1 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
_LINEAR = {
    "q_proj": ("self_attn", "hidden", "hidden"),
    "k_proj": ("self_attn", "hidden", "kv"),
    "v_proj": ("self_attn", "hidden", "kv"),
    "o_proj": ("self_attn", "hidden", "hidden"),
    "gate_proj": ("mlp", "hidden", "inner"),
    "up_proj": ("mlp", "hidden", "inner"),
    "down_proj": ("mlp", "inner", "hidden"),
}


def make_base(folder: Path, gigabytes: float, vocab: int) -> dict[str, tuple[int, int]]:
    """Write the model and return the (out, in) shape of each linear layer."""
    sizes = {"hidden": 2048, "kv": 512, "inner": 6144}
    if gigabytes < 0.5:
        sizes = {"hidden": 512, "kv": 128, "inner": 1536}
    shapes = {}
    layer = sum(sizes[a] * sizes[b] for _, a, b in _LINEAR.values()) * 2
    layers = max(1, round((gigabytes * 1e9 - vocab * sizes["hidden"] * 2) / layer))
    hidden = sizes["hidden"]
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for index in range(layers):
        stem = f"model.layers.{index}"
        for name, (part, inward, outward) in _LINEAR.items():
            shapes[f"{stem}.{part}.{name}"] = (sizes[outward], sizes[inward])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = (hidden,)
    tensors |= {f"{name}.weight": shape for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, shape in tensors.items():
        value = torch.empty(shape, dtype=torch.bfloat16)
        value.fill_(1) if len(shape) == 1 else value.normal_(0, 0.02, generator=generator)
        values[name] = value
    folder.mkdir()
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": sizes["inner"], "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": sizes["kv"] // 64,
        "vocab_size": vocab, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return shapes


def make_adapter(folder: Path, base: Path, shapes: dict[str, tuple[int, int]], r: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (outward, inward) in shapes.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(r, inward, generator=generator) * 0.02
        tensors[f"{stem}.lora_B.weight"] = torch.randn(outward, r, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r,
        "target_modules": list(_LINEAR), "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure(command: list[str]) -> tuple[float, float, float]:
    """Return seconds, CPU seconds and the peak anonymous memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]))
            time.sleep(0.01)

    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    watcher = threading.Thread(target=watch)
    watcher.start()
    _, err = process.communicate()
    watcher.join()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"{command}: {err.decode()}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, peak * 1024 / 1e6


def check_equal(one: Path, other: Path) -> None:
    """Print how many values of the two merged models differ."""
    from safetensors import safe_open

    differ = total = 0
    files = [safe_open(folder / "model.safetensors", "pt") for folder in (one, other)]
    for name in files[0].keys():  # noqa: SIM118 (not a mapping)
        a, b = (file.get_tensor(name) for file in files)
        differ += int((a != b).sum())
        total += a.numel()
    print(f"values that differ between lorakit and PEFT: {differ:,} of {total:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.9, help="GB of the base")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=given.folder))
    try:
        base, adapter = work / "base", work / "adapter"
        make_adapter(adapter, base, make_base(base, given.size, given.vocab), given.r)
        size = sum(file.stat().st_size for file in base.iterdir()) / 1e9
        print(f"base {size:.2f} GB bfloat16, r = {given.r}, torch {torch.__version__}", flush=True)
        arguments = [str(base), str(adapter)]
        commands = {
            "lorakit": [sys.executable, "-m", "lorakit", "merge", *arguments],
            "PEFT": [sys.executable, "-c", _PEFT, *arguments],
            "cp -r": ["cp", "-r", str(base)],
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for round_ in range(given.repeats):
            for name, command in commands.items():
                out = work / f"out-{name.split()[0]}"
                shutil.rmtree(out, ignore_errors=True)
                found[name].append(measure([*command, str(out)]))
                seconds, cpu, memory = found[name][-1]
                print(f"{round_ + 1} {name:8} {seconds:6.2f} s, {cpu:6.2f} s of CPU, "
                      f"{memory:6.0f} MB", flush=True)  # fmt: skip
        check_equal(work / "out-lorakit", work / "out-PEFT")
        for name, runs in found.items():
            columns = list(zip(*runs, strict=True))
            print(f"{name:8} minimum {min(columns[0]):6.2f} s, median "
                  f"{statistics.median(columns[0]):6.2f} s, CPU {min(columns[1]):6.2f} s, "
                  f"anonymous {max(columns[2]):6.0f} MB")  # fmt: skip
        ratios = [p[0] / o[0] for p, o in zip(found["PEFT"], found["lorakit"], strict=True)]
        print(f"PEFT's time / lorakit's: {', '.join(f'{ratio:.1f}' for ratio in ratios)}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
