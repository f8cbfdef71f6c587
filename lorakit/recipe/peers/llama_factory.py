"""The keys of LLaMA-Factory's YAML files."""

from __future__ import annotations

from lorakit.recipe.peers.counterpart import Counterpart, missing, needless, only
from lorakit.recipe.peers.trainer import NO_INT8, TRAINER, attention

_STAGES = "lorakit trains on examples, not on preferences or rewards"
_ONLY_TEXT = "lorakit trains the language model only, on text"

LLAMA_FACTORY: dict[str, Counterpart] = {
    **{key: value for key, value in TRAINER.items() if key not in ("model_name", "max_seq_length")},
    "stage": only("task.name", {"sft": "chat", "pt": "text"}, _STAGES),
    "finetuning_type": only(
        "adapter.method", {"lora": "lora", "full": "full"}, "lorakit methods lists the others"
    ),
    "lora_rank": Counterpart("adapter.r"),
    "lora_target": Counterpart("adapter.target_modules", {"all": "all-linear"}),
    "additional_target": Counterpart("adapter.modules_to_save"),
    "use_dora": only("adapter.method", {True: "dora"}),
    "pissa_init": only("adapter.init", {True: "pissa", False: "default"}),
    "pissa_iter": needless("the exact decomposition is computed"),
    "pissa_convert": needless("lorakit convert --to lora"),
    "adapter_name_or_path": Counterpart("adapter.init_from"),
    "quantization_bit": only("model.base_precision", {4: "nf4"}, NO_INT8),
    "quantization_type": needless("nf4 is the 4-bit format"),
    "quantization_method": needless("nf4 quantizes as bitsandbytes does"),
    "double_quantization": needless("nf4 always quantizes twice"),
    "flash_attn": attention,
    "model_revision": Counterpart("model.revision"),
    "add_tokens": Counterpart("model.add_tokens"),
    "add_special_tokens": Counterpart("model.add_tokens"),
    "template": Counterpart(
        "model.chat_template", note="leave it out for a model that has a chat template"
    ),
    "dataset": Counterpart("task.path", note="the file or Hub name in dataset_info.json"),
    "eval_dataset": Counterpart("task.path", note="as {train: ..., validation: ...}"),
    "dataset_dir": Counterpart("task.path", note="a path relative to the working directory"),
    "cutoff_len": Counterpart("task.max_length"),
    "val_size": Counterpart("task.validation_share", {0: None}),
    "max_samples": Counterpart(
        "task.limit_train", note="counts all rows; LLaMA-Factory counts each dataset separately"
    ),
    "train_on_prompt": only("task.train_on", {False: "assistant", True: "all"}),
    "mask_history": only("task.train_on", {False: "assistant", True: "last"}),
    "neat_packing": Counterpart("task.packing"),
    "packing": Counterpart("task.packing", note="rows in a bin do not attend to each other"),
    "buffer_size": Counterpart("task.shuffle_buffer_rows"),
    "interleave_probs": Counterpart("task.path", note="as weights of the sources"),
    "mix_strategy": needless("sources with weights are drawn in proportion"),
    "default_system": missing("add a column system to the rows"),
    "enable_thinking": missing("task.reasoning is train, mask or drop"),
    "early_stopping_steps": Counterpart("train.early_stopping_patience"),
    "pure_bf16": only("model.dtype", {True: "bfloat16"}, "the adapter stays in float32"),
    "disable_gradient_checkpointing": only(
        "train.gradient_checkpointing", {True: False, False: True}
    ),
    "enable_liger_kernel": needless("train.kernels: auto has fused kernels"),
    "use_unsloth": needless("train.kernels: auto has fused kernels"),
    "tokenized_path": needless("tokens are cached in LORAKIT_CACHE"),
    "overwrite_cache": needless("the cache follows the data"),
    "plot_loss": missing("metrics.jsonl has the losses"),
    "do_predict": missing("lorakit eval RECIPE --save-predictions FILE"),
    "predict_with_generate": missing("task.eval_generate"),
    "freeze_trainable_layers": missing("adapter.layers selects the layers of an adapter"),
    "image_max_pixels": missing(_ONLY_TEXT),
    "video_max_pixels": missing(_ONLY_TEXT),
    **dict.fromkeys(
        ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"),
        needless("only the language model is loaded"),
    ),
    **dict.fromkeys(
        ("preprocessing_num_workers", "preprocessing_batch_size", "data_shared_file_system",
         "include_num_input_tokens_seen", "hf_hub_token", "ms_hub_token"),
        needless("lorakit decides"),
    ),
}  # fmt: skip
