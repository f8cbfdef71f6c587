"""The keys of PEFT's LoraConfig, Transformers' Trainer, TRL's SFTTrainer and Unsloth.

LLaMA-Factory and Axolotl use many of the same names. Keys that lorakit spells in the same way, such
as ``learning_rate``, are not listed: an error about them names their section.
"""

from __future__ import annotations

from lorakit.recipe.peers.counterpart import Counterpart, missing, needless, only

OPTIMIZERS: dict[object, object] = {
    **dict.fromkeys(
        ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused",
         "paged_adamw", "paged_adamw_32bit"),
        "adamw",
    ),
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit",
         "adamw_torch_4bit"),
        "adamw_8bit",
    ),
    "sgd": "sgd",
}  # fmt: skip
SCHEDULERS: dict[object, object] = {
    "constant_with_warmup": "constant",
    **{name: name for name in ("constant", "linear", "cosine", "cosine_with_restarts",
                               "polynomial", "inverse_sqrt")},
}  # fmt: skip
TRACKERS: dict[object, object] = {
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "all": ["tensorboard", "wandb"],
    "none": [],
}
ATTENTION: dict[object, object] = {
    "auto": "auto",
    "fa2": "flash_attention_2",
    "disabled": "eager",
    **{name: name for name in ("sdpa", "eager", "flash_attention_2")},
}
NO_INT8 = "8-bit integer bases are not supported; allowed: fp8, nf4"
LAUNCH = "start the run with torchrun or accelerate launch, see docs/distributed.md"

_NOT_PAGED = "{}: its state stays in GPU memory, where it is not paged out"
optimizer = only(
    "train.optimizer",
    OPTIMIZERS,
    "allowed: adamw, adamw_8bit, sgd",
    differs={
        **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), _NOT_PAGED.format("adamw")),
        "paged_adamw_8bit": _NOT_PAGED.format("adamw_8bit"),
        "adamw_torch_4bit": "adamw_8bit: its state takes 8 bits per value instead of 4",
    },
)
scheduler = only("train.lr_scheduler", SCHEDULERS, "allowed: constant, linear, cosine and others")
attention = only("model.attn_implementation", ATTENTION, "auto uses what the model supports")

#: Arguments of ``transformers.TrainingArguments`` and ``trl.SFTConfig``.
TRAINER: dict[str, Counterpart] = {
    "model_name_or_path": Counterpart("model.name_or_path"),
    "model_name": Counterpart("model.name_or_path"),
    "torch_dtype": only("model.dtype", {n: n for n in ("float32", "bfloat16", "float16")}),
    "bf16": only("model.dtype", {True: "bfloat16", "auto": "bfloat16"}),
    "fp16": only("model.dtype", {True: "float16"}),
    "load_in_4bit": Counterpart("model.base_precision", {True: "nf4", False: None}),
    "load_in_8bit": only("model.base_precision", {False: None}, NO_INT8),
    "bnb_4bit_quant_type": needless("nf4 is the 4-bit format"),
    "num_train_epochs": Counterpart("train.epochs"),
    "per_device_train_batch_size": Counterpart("train.per_device_batch_size"),
    "auto_find_batch_size": only("train.per_device_batch_size", {True: "auto"}),
    "lr_scheduler_type": scheduler,
    "optim": optimizer,
    "label_smoothing_factor": Counterpart("train.label_smoothing"),
    "logging_steps": Counterpart("train.log_every_steps"),
    "eval_steps": Counterpart("train.eval_every_steps"),
    "save_steps": Counterpart("train.save_every_steps"),
    "eval_strategy": only("train.eval_every_steps", {"epoch": None}, "give a step count"),
    "evaluation_strategy": only("train.eval_every_steps", {"epoch": None}, "give a step count"),
    "save_strategy": only("train.save_every_steps", {"epoch": None}, "give a step count"),
    "torch_compile": Counterpart("train.compile"),
    "full_determinism": Counterpart("train.deterministic"),
    "use_cpu": missing("CUDA_VISIBLE_DEVICES= (empty) in the environment hides the GPUs"),
    "data_seed": missing("train.seed also orders the rows"),
    "report_to": only("train.trackers", TRACKERS, "allowed: tensorboard, wandb"),
    "max_seq_length": Counterpart("task.max_length"),
    "dataset_text_field": Counterpart("task.text_column", note="with task.name: text"),
    "completion_only_loss": only(
        "task.train_on", {True: "completion", False: "prompt_and_completion"}
    ),
    "assistant_only_loss": only("task.train_on", {True: "assistant", False: "all"}),
    "neftune_noise_alpha": missing("lorakit adds no noise to embeddings"),
    "resume_from_checkpoint": missing("lorakit train RECIPE --resume auto, or --resume DIR"),
    "overwrite_output_dir": missing("lorakit train RECIPE --overwrite"),
    "deepspeed": missing(f"FSDP2 takes its place; {LAUNCH}"),
    "fsdp": missing(LAUNCH),
    "fsdp_config": missing(LAUNCH),
    "fsdp_version": missing(LAUNCH),
    "push_to_hub": missing("lorakit train RECIPE --push-to-hub NAMESPACE/NAME"),
    "hub_model_id": missing("lorakit train RECIPE --push-to-hub NAMESPACE/NAME"),
    "load_best_model_at_end": needless("the adapter is always that of the best evaluation"),
    "greater_is_better": needless("follows from train.metric_for_best_model"),
    "save_only_model": needless("checkpoints always hold what a resume needs"),
    "do_train": needless("lorakit train"),
    "do_eval": needless("a split for validation is evaluated if there is one"),
    "run_name": missing("WANDB_NAME in the environment"),
    "tf32": needless("the base is in model.dtype, the adapter in float32"),
    "gradient_checkpointing_kwargs": needless("lorakit chooses the form"),
    "dataloader_num_workers": needless("rows are tokenized before the run and cached"),
    "dataloader_pin_memory": needless("lorakit decides"),
    "dataset_num_proc": needless("lorakit decides"),
    "remove_unused_columns": needless("columns that the task does not need are not read"),
    "ddp_timeout": needless("lorakit sets its own timeouts"),
    "ddp_find_unused_parameters": needless("lorakit decides"),
    "use_liger_kernel": needless("train.kernels: auto has fused kernels"),
}

#: Keys of ``peft.LoraConfig``, and the names that tools give them with the prefix ``lora_``.
PEFT: dict[str, Counterpart] = {
    "lora_r": Counterpart("adapter.r"),
    "lora_rank": Counterpart("adapter.r"),
    "rank": Counterpart("adapter.r"),
    "lora_target_modules": Counterpart("adapter.target_modules", {"all-linear": "all-linear"}),
    "lora_target_parameters": Counterpart("adapter.target_parameters"),
    "lora_modules_to_save": Counterpart("adapter.modules_to_save"),
    "lora_rank_pattern": Counterpart("adapter.rank_pattern"),
    "lora_alpha_pattern": Counterpart("adapter.alpha_pattern"),
    "lora_bias": Counterpart("adapter.bias"),
    "layers_to_transform": Counterpart("adapter.layers"),
    "use_dora": only("adapter.method", {True: "dora"}),
    "peft_use_dora": only("adapter.method", {True: "dora"}),
    "peft_use_rslora": Counterpart("adapter.use_rslora"),
    "init_lora_weights": only(
        "adapter.init",
        {True: "default", "pissa": "pissa", "orthogonal": "orthogonal"},
        "allowed: default, b_gaussian, pissa, orthogonal",
    ),
    "peft_type": only(
        "adapter.method", {"LORA": "lora", "ADALORA": "adalora"}, "lorakit methods lists the names"
    ),
    "task_type": missing("task.name: chat, completion, text, classification and others"),
    "fan_in_fan_out": needless("read from the model"),
    "inference_mode": needless("lorakit decides"),
    "megatron_core": missing("lorakit does not train Megatron models"),
}

#: Arguments of Unsloth's ``from_pretrained`` and ``get_peft_model``.
UNSLOTH: dict[str, Counterpart] = {
    "full_finetuning": only("adapter.method", {True: "full"}),
    "load_in_16bit": only("model.base_precision", {True: None}),
    "use_gradient_checkpointing": Counterpart(
        "train.gradient_checkpointing", {"unsloth": "offload"}
    ),
    "random_state": Counterpart("train.seed"),
    "finetune_language_layers": missing(
        "adapter.target_modules selects the language layers to adapt"
    ),
    "finetune_vision_layers": missing("lorakit trains the language model only"),
    "finetune_attention_modules": only("adapter.target_modules", {True: "attention"}),
    "finetune_mlp_modules": missing("list the modules in adapter.target_modules"),
    "embedding_learning_rate": missing(
        "adapter.method: lora_plus has loraplus_lr_embedding, for adapted embeddings"
    ),
    "loftq_config": missing("adapter.init: pissa is close to it"),
}
