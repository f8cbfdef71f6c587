"""The golden runs."""

from __future__ import annotations

from tests.golden.commands import (
    GoldenRun,
    convert,
    evaluate,
    evaluate_base,
    generate,
    merge,
    merge_twice,
    resume,
    score,
    switch,
)

_FACTORS = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
_GENERATED = {"eval_generate": "end", "max_new_tokens": 10}

_METHODS = (
    GoldenRun(
        "lora",
        steps=(merge, merge_twice, switch, convert("lora"), convert("loralib"), generate(),
               generate("--num-beams", "3")),
    ),
    GoldenRun("lora-plus", adapter={**_FACTORS, "method": "lora_plus", "loraplus_lr_ratio": "auto"}),
    GoldenRun(
        "adalora",
        adapter={"method": "adalora", "target_r": 2, "init_r": 4, "tinit": 1, "tfinal": 2,
                 "deltaT": 1, "target_modules": ["v", "up_proj"]},
        train={"max_steps": 6, "save_every_steps": 3, "save_total_limit": None,
               "adam_epsilon": 3e-3},
        steps=(merge, switch, convert("lora"), resume),
    ),
    GoldenRun("dora", adapter={**_FACTORS, "method": "dora"}, steps=(merge, switch)),
    GoldenRun("moslora", adapter={**_FACTORS, "method": "moslora"}, steps=(merge,)),
    GoldenRun("intrinsic", adapter={"method": "intrinsic", "d": 24}, steps=(merge, generate())),
    GoldenRun(
        "full",
        adapter={"method": "full", "target_modules": None},
        train={"save_every_steps": 2, "weight_decay": 0.1},
        steps=(merge, resume),
    ),
    GoldenRun(
        "bitfit",
        model="bert", data="classification",
        adapter={"method": "bitfit", "target_modules": None},
        steps=(merge,),
    ),
)  # fmt: skip

_LORA_VARIANTS = (
    GoldenRun("lora-rslora", adapter={"use_rslora": True, "init": "b_gaussian"}, steps=(merge,)),
    GoldenRun(
        "lora-pissa",
        tensor_tolerance=1e-4,  # processors round the singular vectors differently
        adapter={"init": "pissa", "r": 2},
        train={"learning_rate": 3e-3},
        steps=(merge,),
    ),
    GoldenRun("lora-orthogonal", adapter={"init": "orthogonal"}, steps=(merge,)),
    GoldenRun(
        "lora-bias",
        model="bert", data="classification",
        adapter={"bias": "lora_only", "target_modules": ["v", "o"]},
    ),
    GoldenRun(
        "lora-modules-to-save",
        adapter={"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "o"]},
        train={"learning_rate": 3e-3},
        steps=(merge, switch),
    ),
    GoldenRun(
        "lora-patterns",
        adapter={
            "target_modules": ["all-linear"],
            "layers": [1],
            "rank_pattern": {"q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"v_proj": 4},
        },
        steps=(convert("lora"),),
    ),
    GoldenRun(
        "lora-fused",
        model="gpt2",
        adapter={"target_modules": ["q", "v"]},
        steps=(merge, switch, convert("lora"), convert("loralib"), generate()),
    ),
    GoldenRun(
        "adalora-fused",
        model="gpt2",
        adapter={"method": "adalora", "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1,
                 "target_modules": ["q", "v"], "orth_reg_form": "mean_norm"},
        steps=(merge,),
    ),
)  # fmt: skip

_TRAINING = (
    GoldenRun("packed", task={"packing": True, "max_length": 96}, train={"per_device_batch_size": 2}),
    GoldenRun(
        "accumulated",
        train={"per_device_batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5},
    ),
    GoldenRun(
        "resumed",
        train={"max_steps": 6, "save_every_steps": 2, "save_total_limit": None},
        steps=(resume,),
    ),
    GoldenRun(
        "streamed",
        task={"streaming": True, "shuffle_buffer_rows": 6},
        train={"max_steps": 6, "save_every_steps": 2, "save_total_limit": None},
        steps=(resume,),
    ),
    GoldenRun(
        "batches-by-tokens",
        task={"max_length": 96},
        train={"max_steps": None, "epochs": 1.0, "per_device_batch_size": None,
               "max_tokens_per_batch": 150, "gradient_checkpointing": True},
    ),
    GoldenRun(
        "schedule-and-best",
        data="text",
        train={"optimizer": "sgd", "lr_scheduler": "cosine", "label_smoothing": 0.1,
               "weight_decay": 0.1, "metric_for_best_model": "loss", "early_stopping_patience": 1,
               "learning_rate": 0.5, "max_steps": 6, "group_by_length": False},
    ),
    GoldenRun(
        "dropout",
        adapter={"lora_dropout": 0.2},
        train={"max_steps": 6, "save_every_steps": 3},
        steps=(resume, generate("--temperature", "0.8", "--seed", "3")),
        portable=False,
    ),
    GoldenRun(
        "bfloat16",
        adapter={"target_modules": ["all-linear"]},
        dtype="bfloat16",
        steps=(merge, generate()),
        portable=False,
    ),
)  # fmt: skip

_TASKS = (
    GoldenRun("task-completion", task=_GENERATED, steps=(evaluate,)),
    GoldenRun("task-chat", data="chat", task=_GENERATED, steps=(evaluate,)),
    GoldenRun("task-chat-packed", data="chat", task={"packing": True}, steps=(evaluate_base,)),
    GoldenRun(
        "task-classification",
        model="bert", data="classification",
        adapter={"target_modules": ["v", "o"], "layers": "1"},
        steps=(evaluate, merge),
    ),
    GoldenRun("task-regression", model="bert", data="regression", task={"name": "glue/stsb"},
              steps=(evaluate,)),
    GoldenRun(
        "task-wikisql",
        data="wikisql",
        task=_GENERATED,
        steps=(
            evaluate,
            score(
                'SELECT COUNT("Ship") FROM t WHERE "Crew" = 12',
                {"query": {"sel": 0, "agg": 0, "conds": [[2, 0, "Wick"]]}},
                "SELECT everything",
                {"query": {"sel": 1, "agg": 0, "conds": []}},
                'SELECT COUNT("Ship") FROM t WHERE "Crew" = 7',
            ),
        ),
    ),
    GoldenRun(
        "task-e2e-nlg",
        data="e2e_nlg",
        task={"eval_generate": "never"},
        steps=(
            score(
                "Mill is near the porch.",
                "Porch is near an attic, up the hill.",
                "Attic is by the harbour",
                "Harbour is near the yard, up the hill.",
                "the Yard, near a mill.",
            ),
        ),
    ),
)  # fmt: skip

RUNS = (*_METHODS, *_LORA_VARIANTS, *_TRAINING, *_TASKS)
