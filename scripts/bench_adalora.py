"""Compare a training step of AdaLoRA with one of LoRA on the same matrices, and with PEFT's.

    python scripts/bench_adalora.py [--layers 16] [--batch 4] [--length 1024] [--repeats 8] [--peft]

Random weights of the shape of Llama-3.2-1B, every linear layer adapted, r = 16 (AdaLoRA init_r =
16, target_r = 8, ranks reallocated every step), the full step: forward, backward, the method's own
work, clipping, AdamW. The variants are interleaved, so that all see the same machine load; the
ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = 1000


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = {"lora": ours("lora"), "adalora": ours("adalora")}
    if arguments.peft:
        cases |= {"PEFT lora": theirs("lora"), "PEFT adalora": theirs("adalora")}
    steps = {
        name: build(llama(arguments, device), arguments, device) for name, build in cases.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 2):
        for name, step in steps.items():
            synchronize(device)
            began = time.perf_counter()
            step(repeat + 1)
            synchronize(device)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"{name:>13}: {median * 1e3:9.1f} ms per step ({low * 1e3:.1f} to {high * 1e3:.1f})")
    for name in ("lora", "adalora") if arguments.parts else ():
        for part, times in steps[name].spent.items():
            print(f"{name:>13}: {part}: {statistics.median(times[2:]) * 1e3:.2f} ms")
    print(f"adalora / lora: {medians['adalora'] / medians['lora']:.3f}")
    if arguments.peft:
        print(f"PEFT adalora / lora: {medians['PEFT adalora'] / medians['PEFT lora']:.3f}")
        print(f"lorakit adalora / PEFT adalora: {medians['adalora'] / medians['PEFT adalora']:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", action="store_true", help="time the parts of a step")
    parser.add_argument("--peft", action="store_true")
    return parser.parse_args()


def llama(arguments: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=arguments.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=arguments.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, arguments.dtype)).train()


def batch(arguments, device):
    generator = torch.Generator(device).manual_seed(0)
    shape = (arguments.batch, arguments.length)
    return torch.randint(0, arguments.vocab, shape, generator=generator, device=device)


def ours(method: str):
    def build(model, arguments, device):
        from lorakit.injection import inject, trainable_state
        from lorakit.layers import adapter_layers
        from lorakit.models.causal import split_model, token_losses
        from lorakit.registry import methods

        known = methods()[method]
        keys = {"r": 16} if method == "lora" else {"init_r": 16, "target_r": 8, "deltaT": 1}
        keys |= {} if method == "lora" else {"tinit": 1, "tfinal": 1}
        config = known.Config(method=method, target_modules=["all-linear"], **keys)
        parts = split_model(model)
        inject(model, config)
        hooks = known.hooks(adapter_layers(model), config, STEPS)
        weights = list(trainable_state(model).values())
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        ids = batch(arguments, device)
        targets = ids.flatten().roll(-1)
        positions = torch.arange(ids.numel(), device=device)

        def step(number: int) -> None:
            loss = token_losses(model, parts, ids, positions, targets) / len(positions)
            loss.backward()
            mark("forward and backward")
            hooks.before_step(lambda gradient: gradient)
            mark("before the step")
            nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
            optimizer.step()
            mark("clipping, optimizer")
            hooks.after_step(number)
            mark("after the step")
            optimizer.zero_grad(set_to_none=True)

        spent: dict[str, list[float]] = {}
        last = [time.perf_counter()]

        def mark(name: str) -> None:
            if arguments.parts:
                synchronize(device)
                spent.setdefault(name, []).append(time.perf_counter() - last[0])
                last[0] = time.perf_counter()

        def timed(number: int) -> None:
            last[0] = time.perf_counter()
            step(number)

        timed.spent = spent  # type: ignore[attr-defined]
        return timed

    return build


def theirs(method: str):
    def build(model, arguments, device):
        from peft import AdaLoraConfig, LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        common = {"target_modules": targets, "task_type": "CAUSAL_LM"}
        adaptive = {"init_r": 16, "target_r": 8, "tinit": 1, "tfinal": 1, "deltaT": 1}
        config = (
            LoraConfig(r=16, **common)
            if method == "lora"
            else AdaLoraConfig(**adaptive, total_step=STEPS, orth_reg_weight=0.1, **common)
        )
        model = get_peft_model(model, config)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        ids = batch(arguments, device)

        def step(number: int) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
            optimizer.step()
            if method == "adalora":
                model.base_model.update_and_allocate(number)
            optimizer.zero_grad(set_to_none=True)

        return step

    return build


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
