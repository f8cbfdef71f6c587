"""Compare a training step of LoRA on all stacked experts with PEFT's.

    for _ in 1 2 3; do for w in lorakit PEFT; do python scripts/bench_experts.py $w; done; done

Random weights in the form of Qwen3-MoE (4 layers of 64 experts, 4 for each token, hidden size 512,
expert size 192), r = 8, 4 rows of 128 tokens, float32, one thread. Prints the processor time of a
step and the process's peak memory, which includes the base: run each in its own process, in turn.
"""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

STEPS = 5
RANK = 8


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=512, moe_intermediate_size=192, num_experts=64,
        num_experts_per_tok=4, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64,
    )  # fmt: skip
    ids = torch.randint(0, 512, (4, 128))
    model = adapted(Qwen3MoeForCausalLM(config), sys.argv[1]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    step(model, optimizer, ids)
    began = processor_seconds()
    for _ in range(STEPS):
        loss = step(model, optimizer, ids)
    seconds = (processor_seconds() - began) / STEPS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sys.argv[1]}: {seconds:.2f} s a step, peak {peak:.0f} MiB, loss {loss:.4f}")


def adapted(model: nn.Module, with_: str) -> nn.Module:
    if with_ == "lorakit":
        import lorakit

        lorakit.inject(model, lorakit.LoraConfig(r=RANK, target_modules=["experts"]))
        return model
    from peft import LoraConfig, get_peft_model

    ends = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=ends)
    return get_peft_model(model, config)  # type: ignore[arg-type,return-value]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return float(loss)


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
