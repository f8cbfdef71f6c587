"""What ``bench_gpu.py`` compares lorakit with: PEFT in several forms, and Unsloth."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from gpu_cases import ATTENTION, SHAPES, Case

#: PEFT's names of the target modules.
MODULES = {
    "llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    "roberta": {"q": "query", "k": "key", "v": "value", "o": "attention.output.dense"},
}


def peer_rows(case: Case, work: Path) -> tuple[list[dict[str, Any]], Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / case.shape)
    rows = []
    with (work / f"{case.shape}-{case.rows}.jsonl").open() as file:
        for row in map(json.loads, file):
            if case.rows == "short":
                ids = tokenizer(row["text"])["input_ids"]
                rows.append({"input_ids": ids, "labels": "ab".index(row["label"])})
            elif case.rows == "dense":
                ids = tokenizer(row["text"])["input_ids"][: case.length]
                rows.append({"input_ids": ids, "labels": ids})
            else:
                # As lorakit does: no special tokens between the two.
                prompt = tokenizer(row["prompt"])["input_ids"][:-1]
                ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
                labels = [-100] * len(prompt) + ids[len(prompt) :]
                rows.append({"input_ids": ids, "labels": labels})
    return rows, tokenizer


def peft_model(case: Case, work: Path) -> Any:
    import torch
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    encoder = case.rows == "short"
    kind = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    model = kind.from_pretrained(work / case.shape, dtype=torch.bfloat16, device_map="cuda")
    names = MODULES[SHAPES[case.shape]["model_type"]]
    targets = "all-linear" if case.targets == ("all-linear",) else [names[t] for t in case.targets]
    common = {"target_modules": targets, "lora_alpha": 2 * case.r}
    common["task_type"] = "SEQ_CLS" if encoder else "CAUSAL_LM"
    common["lora_dropout"] = case.recipe.get("adapter.lora_dropout", 0.0)
    if case.recipe.get("adapter.method") == "adalora":
        config = AdaLoraConfig(
            init_r=case.r, target_r=case.r // 2, total_step=case.steps, deltaT=10, **common
        )
    else:
        config = LoraConfig(r=case.r, **common)
    return get_peft_model(model, config)


def trainer(case: Case, work: Path, liger: bool = True) -> dict[str, Any]:
    import torch
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    rows, tokenizer = peer_rows(case, work)
    model = peft_model(case, work)
    first, losses = case.steps // 4, []

    class Timer(TrainerCallback):  # type: ignore[misc]
        began = seconds = 0.0

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step in (first, case.steps):
                torch.cuda.synchronize()
                self.seconds, self.began = time.perf_counter() - self.began, time.perf_counter()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                losses.append(round(float(logs["loss"]), 4))

    pad = DataCollatorWithPadding if case.rows == "short" else DataCollatorForSeq2Seq
    timer = Timer()
    arguments = TrainingArguments(
        str(work / "trainer"),
        per_device_train_batch_size=case.batch,
        max_steps=case.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=True,
        report_to=[],
        save_strategy="no",
        logging_steps=max(2, case.steps // 20),
        optim="adamw_torch_fused",
        disable_tqdm=True,
        use_liger_kernel=liger and case.shape == "llama8b",  # whose logits are large
        ddp_find_unused_parameters=False,
    )
    torch.cuda.reset_peak_memory_stats()
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=pad(tokenizer),
        callbacks=[timer],
    ).train()
    return measured(case, rows, timer.seconds, case.steps - first, losses)


def plain_loop(case: Case, work: Path, liger: bool = False, compiled: bool = False) -> Any:
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True
        )
    model = peft_model(case, work)
    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    return timed_loop(case, work, model)


def unsloth(case: Case, work: Path, four_bit: bool = False) -> dict[str, Any]:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(work / case.shape),
        max_seq_length=case.length,
        dtype=torch.bfloat16,
        load_in_4bit=four_bit,
        local_files_only=True,
    )
    names = MODULES["llama"]
    attention = [names[target] for target in ATTENTION]
    every = [*attention, "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.r,
        target_modules=every if case.targets == ("all-linear",) else attention,
        lora_alpha=2 * case.r,
        lora_dropout=0,
        bias="none",
        # Its own form of checkpointing moves the inputs of the layers to the host.
        use_gradient_checkpointing="unsloth" if "offload" in case.recipe.values() else False,
    )
    return timed_loop(case, work, model)


def timed_loop(case: Case, work: Path, model: Any) -> dict[str, Any]:
    """Take ``case.steps`` steps and time those after the first quarter. Batches of rows of several
    lengths are padded to the longest."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    rows, tokenizer = peer_rows(case, work)
    pad = DataCollatorForSeq2Seq(tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
    )
    torch.cuda.reset_peak_memory_stats()
    first, losses, began = case.steps // 4, [], 0.0
    for step in range(case.steps):
        if step == first:
            torch.cuda.synchronize()
            began = time.perf_counter()
        part = rows[step * case.batch : (step + 1) * case.batch]
        if case.rows == "dense":
            ids = torch.tensor([row["input_ids"] for row in part], device="cuda")
            batch = {"input_ids": ids, "labels": ids}
        else:
            batch = pad(part).to("cuda", non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    every = max(2, case.steps // 20)
    means = torch.stack(losses).float().view(-1, every).mean(1).tolist()
    return measured(case, rows, seconds, case.steps - first, [round(x, 4) for x in means])


def measured(
    case: Case, rows: list[dict[str, Any]], seconds: float, steps: int, losses: list[float]
) -> dict[str, Any]:
    import torch

    examples = case.batch * steps / seconds
    tokens = statistics.mean(len(row["input_ids"]) for row in rows)
    return {
        "tokens_per_second": round(examples * tokens),
        "examples_per_second": round(examples, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": losses,
    }


PEERS = {
    "trainer": trainer,
    "loop": plain_loop,
    "liger": lambda case, work: plain_loop(case, work, liger=True),
    "compiled": lambda case, work: plain_loop(case, work, liger=True, compiled=True),
    "unsloth": unsloth,
    "unsloth4bit": lambda case, work: unsloth(case, work, four_bit=True),
}
