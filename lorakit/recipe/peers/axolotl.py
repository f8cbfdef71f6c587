"""The keys of Axolotl's YAML files."""

from __future__ import annotations

from lorakit.recipe.peers.counterpart import Counterpart, missing, needless, only
from lorakit.recipe.peers.trainer import LAUNCH, PEFT, TRAINER, attention, optimizer, scheduler

_KERNELS = "train.kernels: auto has fused kernels"
_TOKENIZER = "the tokenizer is loaded as the model's files say"
_WANDB = "WANDB_{} in the environment"
_REWARD = "lorakit does not train reward models"
_CACHE = "tokens are cached in LORAKIT_CACHE"
_EVENT = "see the WANDB_* variables"

AXOLOTL: dict[str, Counterpart] = {
    **{
        key: TRAINER[key]
        for key in (
            "torch_dtype", "bf16", "fp16", "load_in_4bit", "load_in_8bit", "logging_steps",
            "eval_steps", "save_steps", "eval_strategy", "evaluation_strategy", "save_strategy",
            "torch_compile", "neftune_noise_alpha", "resume_from_checkpoint", "deepspeed", "fsdp",
            "fsdp_config", "fsdp_version", "hub_model_id", "load_best_model_at_end",
            "greater_is_better", "save_only_model", "tf32", "gradient_checkpointing_kwargs",
            "dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc",
            "remove_unused_columns", "ddp_timeout", "ddp_find_unused_parameters",
        )
    },
    **{key: value for key, value in PEFT.items() if key.startswith(("lora_", "peft_use"))},
    "base_model": Counterpart("model.name_or_path"),
    "revision_of_model": Counterpart("model.revision"),
    "bfloat16": only("model.dtype", {True: "bfloat16"}),
    "float16": only("model.dtype", {True: "float16"}),
    "float32": only("model.dtype", {True: "float32"}),
    "attn_implementation": attention,
    "flash_attention": only("model.attn_implementation", {True: "flash_attention_2"}),
    "sdp_attention": only("model.attn_implementation", {True: "sdpa"}),
    "eager_attention": only("model.attn_implementation", {True: "eager"}),
    "xformers_attention": needless("model.attn_implementation: auto"),
    "flex_attention": needless("model.attn_implementation: auto"),
    "chat_template_jinja": Counterpart("model.chat_template", note="a file with the template"),
    "tokens": Counterpart("model.add_tokens"),
    "special_tokens": missing(
        "the tokenizer's own special tokens are used; model.add_tokens adds further ones"
    ),
    "eot_tokens": needless("the end of an answer is read from the chat template"),
    "adapter": only(
        "adapter.method", {"lora": "lora", "qlora": "lora"}, "qlora is model.base_precision: nf4"
    ),
    "qlora": only("model.base_precision", {True: "nf4"}),
    "lora_target_linear": only("adapter.target_modules", {True: "all-linear"}),
    "lora_model_dir": Counterpart("adapter.init_from"),
    "lora_fan_in_fan_out": needless("read from the model"),
    "peft_layers_to_transform": Counterpart("adapter.layers"),
    "peft_init_lora_weights": PEFT["init_lora_weights"],
    "peft": missing("adapter.init: pissa is close to LoftQ"),
    "relora": missing("lorakit has no ReLoRA"),
    "unfrozen_parameters": missing("adapter.modules_to_save trains whole modules"),
    "datasets": Counterpart("task.path", note="its type decides task.name and task.format"),
    "test_datasets": Counterpart("task.path", note="as {train: ..., validation: ...}"),
    "pretraining_dataset": Counterpart(
        "task.path", note="with task.name: text and task.streaming: true"
    ),
    "val_set_size": Counterpart("task.validation_share", {0: None}),
    "sequence_len": Counterpart(
        "task.max_length", note="longer rows are truncated; Axolotl drops them"
    ),
    "sample_packing": Counterpart("task.packing"),
    "streaming": Counterpart("task.streaming"),
    "streaming_multipack_buffer_size": Counterpart("task.shuffle_buffer_rows"),
    "train_on_inputs": only(
        "task.train_on",
        {False: "completion", True: "prompt_and_completion"},
        "for task.name: chat, assistant or all",
    ),
    "micro_batch_size": Counterpart("train.per_device_batch_size"),
    "eval_batch_size": Counterpart("train.per_device_eval_batch_size"),
    "batch_size": missing(
        "train.per_device_batch_size times train.gradient_accumulation_steps is the batch"
    ),
    "num_epochs": Counterpart("train.epochs"),
    "optimizer": optimizer,
    "lr_scheduler": scheduler,
    "adam_eps": Counterpart("train.adam_epsilon"),
    "gradient_checkpointing": Counterpart(
        "train.gradient_checkpointing", {"offload_disk": "offload", "unsloth": "offload"}
    ),
    "activation_offloading": only(
        "train.gradient_checkpointing",
        dict.fromkeys((True, "legacy", "disk", "hidden_states"), "offload"),
    ),
    "evals_per_epoch": only(
        "train.eval_every_steps", {1: None}, "give a step count; null is once per epoch"
    ),
    "saves_per_epoch": only(
        "train.save_every_steps", {1: None}, "give a step count; null is once per epoch"
    ),
    "use_tensorboard": only("train.trackers", {True: ["tensorboard"]}),
    "wandb_project": only("train.trackers", {}, f"[wandb]; {_WANDB.format('PROJECT')}"),
    "wandb_entity": missing(_WANDB.format("ENTITY")),
    "wandb_name": missing(_WANDB.format("NAME")),
    "wandb_run_id": missing(_WANDB.format("RUN_ID")),
    "wandb_watch": missing(_EVENT),
    "wandb_log_model": missing(_WANDB.format("LOG_MODEL")),
    "auto_resume_from_checkpoints": missing("lorakit train RECIPE --resume auto"),
    "rl": missing("lorakit trains on examples, not on preferences or rewards"),
    "reward_model": missing(_REWARD),
    "process_reward_model": missing(_REWARD),
    "num_labels": missing("task.name: classification reads the labels from the data"),
    "cosine_min_lr_ratio": missing("cosine falls to 0"),
    "cosine_constant_lr_ratio": missing("cosine falls until the end of the run"),
    "excess_length_strategy": missing("longer rows are truncated; lorakit preview counts them"),
    "min_sample_len": missing("lorakit keeps short rows"),
    "context_parallel_size": missing(LAUNCH),
    "dp_shard_size": missing(LAUNCH),
    "dp_replicate_size": missing(LAUNCH),
    "tensor_parallel_size": missing("lorakit has FSDP2 in its place, see docs/distributed.md"),
    "expert_parallel_size": missing("lorakit has FSDP2 in its place, see docs/distributed.md"),
    "processor_type": missing("lorakit trains the language model only, on text"),
    "freeze_mm_modules": needless("only the language model is loaded"),
    "quantize_moe_experts": missing("model.base_precision quantizes linear layers"),
    "fp8": missing("model.base_precision: fp8 keeps the frozen base in fp8"),
    "qat": missing("lorakit has no quantization-aware training"),
    "default_system_message": missing("add a column system to the rows"),
    "chat_template_kwargs": missing("a file in model.chat_template can hold such settings"),
    "shuffle_merged_datasets": needless("rows of all sources are shuffled"),
    **dict.fromkeys(
        ("dataset_prepared_path", "push_dataset_to_hub", "skip_prepare_dataset",
         "dataset_processes", "dataset_exact_deduplication"),
        needless(_CACHE),
    ),
    **dict.fromkeys(
        ("plugins", "liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm",
         "liger_glu_activation", "liger_fused_linear_cross_entropy", "cut_cross_entropy",
         "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel",
         "use_kernels", "experts_implementation", "fused_attn_kernel", "gemma4_hybrid_attn_impl",
         "flash_attn_cross_entropy", "flash_attn_fuse_mlp", "flash_attn_rms_norm",
         "flash_optimum", "flex_attn_compile_kwargs", "use_scattermoe", "use_sonicmoe",
         "unsloth_cross_entropy_loss", "chunked_cross_entropy", "tiled_mlp"),
        needless(_KERNELS),
    ),
    **dict.fromkeys(
        ("tokenizer_type", "tokenizer_config", "tokenizer_use_fast", "tokenizer_legacy",
         "tokenizer_use_mistral_common", "model_type", "base_model_config",
         "is_llama_derived_model", "is_falcon_derived_model", "is_mistral_derived_model",
         "is_qwen_derived_model",
         "base_model_ignore_patterns", "resize_token_embeddings_to_32x", "low_cpu_mem_usage"),
        needless(_TOKENIZER),
    ),
    **dict.fromkeys(
        ("strict", "pad_to_sequence_len", "eval_sample_packing", "sample_packing_eff_est",
         "total_num_tokens", "max_packed_sequence_len", "group_by_length", "debug", "local_rank",
         "torchdistx_path", "device_map", "ddp", "world_size", "loss_watchdog_threshold",
         "loss_watchdog_patience", "gptq_groupsize", "gptq_model_v1", "gptq",
         "gptq_disable_exllama", "save_safetensors", "lora_on_cpu", "hf_use_auth_token",
         "experimental_skip_move_to_device", "eval_table_size", "gpu_memory_limit"),
        needless("lorakit decides"),
    ),
}  # fmt: skip
