"""Compare time and peak memory of a training step in lorakit and PEFT, and the share of the logits.

    python scripts/bench_step.py MODEL [--batch 16] [--length 256] [--trained-share 0.3]

Each case runs in a separate process. ``hidden`` replaces the loss by the sum of the hidden states,
so the difference is the cost of the logits. Peaks are those of the GPU allocator or, on the CPU, of
the process, minus its memory before the first step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

CASES = ("lorakit", "lorakit-hidden", "peft", "peft-hidden")


def main() -> None:
    arguments = parse()
    if arguments.case:
        print(json.dumps(measure(arguments)))
        return
    rows = {}
    for case in CASES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--case", case],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, json.dumps(rows[case]), flush=True)
    for name in ("lorakit", "peft"):
        full, hidden = (rows[n]["peak_memory_bytes"] for n in (name, f"{name}-hidden"))
        print(f"{name}: the logits take {1 - hidden / full:.1%} of {full / 2**20:,.0f} MiB")
    for key in ("peak_memory_bytes", "step_seconds"):
        print(f"lorakit / PEFT, {key}: {rows['lorakit'][key] / rows['peft'][key]:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--trained-share", type=float, default=0.3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", choices=CASES)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    build = lorakit_step if arguments.case.startswith("lorakit") else peft_step
    step = build(arguments, device, hidden=arguments.case.endswith("hidden"))
    before = memory(device)
    seconds = []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "loss": float(loss),
        "step_seconds": statistics.median(seconds[1:]),
        "peak_memory_bytes": memory(device) - before,
        "held_before_bytes": before,
    }


def memory(device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def labels(arguments, vocab, device):
    """Return random labels; the last ``trained_share`` of each row is trained."""
    import torch

    ids = torch.randint(0, vocab, (arguments.batch, arguments.length), device=device)
    targets = ids.clone()
    targets[:, : round(arguments.length * (1 - arguments.trained_share))] = -100
    return ids, targets


def lorakit_step(arguments, device, hidden):
    import torch

    import lorakit
    from lorakit.models.causal import split_model, token_losses
    from lorakit.models.load import load_pretrained
    from lorakit.recipe.sections import ModelSection

    section = ModelSection(name_or_path=arguments.model, dtype=arguments.dtype)
    model = load_pretrained(section, "causal").model.to(device).train()
    parts = split_model(model)
    lorakit.inject(model, lorakit.LoraConfig(r=8, target_modules=["q", "v"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids, targets = labels(arguments, model.config.vocab_size, device)
    shifted = torch.full_like(targets, -100)
    shifted[:, :-1] = targets[:, 1:]
    positions = torch.nonzero(shifted.flatten() != -100).squeeze(1)
    wanted = shifted.flatten()[positions]

    def step():
        if hidden:
            loss = parts.decoder(input_ids=ids, use_cache=False).last_hidden_state.float().mean()
        else:
            loss = token_losses(model, parts, ids, positions, wanted) / len(positions)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peft_step(arguments, device, hidden):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids, targets = labels(arguments, model.config.vocab_size, device)
    decoder = model.base_model.model.model

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            if hidden:
                loss = decoder(input_ids=ids, use_cache=False).last_hidden_state.float().mean()
            else:
                loss = model(input_ids=ids, labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


if __name__ == "__main__":
    main()
