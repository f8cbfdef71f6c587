"""Tiny bases whose checkpoints differ from the class that lorakit loads: experts, towers, parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject
from lorakit.methods.lora import LoraConfig

_TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_NO_HEAD_DIM = {key: value for key, value in _TEXT.items() if key != "head_dim"}
_MOE = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4,
           "linear_value_head_dim": 4}  # fmt: skip
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "n_shared_experts": 1}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
           "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
_LLAMA4 = {**_TEXT, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1}


def _qwen3_5() -> Any:
    text = {**_TEXT, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
              "out_hidden_size": 16, "patch_size": 4, "num_position_embeddings": 16}  # fmt: skip
    return tf.Qwen3_5ForConditionalGeneration(
        tf.Qwen3_5Config(text_config=text, vision_config=vision)
    )


def _gemma3() -> Any:
    text = {**_TEXT, "query_pre_attn_scalar": 4}
    config = tf.Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4)
    return tf.Gemma3ForConditionalGeneration(config)


def _llama4() -> Any:
    sizes = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = tf.Llama4Config(text_config=_LLAMA4, vision_config={**_VISION, **sizes})
    return tf.Llama4ForConditionalGeneration(config)


def _experts(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**more))


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_5": _qwen3_5,
    "gemma3": _gemma3,
    "llama4": _llama4,
    "llama4_text": lambda: tf.Llama4ForCausalLM(tf.Llama4TextConfig(**_LLAMA4)),
    "qwen3_moe": _experts("Qwen3Moe", **_TEXT, **_MOE, decoder_sparse_step=1),
    "qwen3_next": _experts(
        "Qwen3Next", **{**_TEXT, "num_hidden_layers": 4}, **_LINEAR, **_MOE,
        shared_expert_intermediate_size=8,
    ),
    "mixtral": _experts("Mixtral", **_TEXT, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _experts("DeepseekV3", **{**_NO_HEAD_DIM, **_MLA}),
    "gpt_oss": _experts("GptOss", **_TEXT, num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": _experts("GraniteMoe", **_NO_HEAD_DIM, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _experts("Olmoe", **_NO_HEAD_DIM, num_experts=4, num_experts_per_tok=2),
    "falcon": _experts("Falcon", vocab_size=64, hidden_size=16, num_hidden_layers=2,
                       num_attention_heads=4, bos_token_id=1, eos_token_id=2),
    "mamba": _experts("Mamba", vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4),
}  # fmt: skip
if hasattr(tf, "HrmTextConfig"):  # its checkpoint has q, k, v and a gate in one matrix
    MODELS["hrm_text"] = _experts("HrmText", **_TEXT)


def write_model(folder: Path, name: str) -> Path:
    """Write the base with tensors that its class lacks: a prediction head, integers, an odd size."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    torch.random.set_rng_state(state)
    add_tensors(folder, {
        "mtp.layers.0.proj.weight": torch.randn(4, 4), "mtp.steps": torch.arange(3),
        "mtp.mask": torch.tensor([True, False, True]), "mtp.scale": torch.tensor(2.0),
    })  # fmt: skip
    return folder


def add_tensors(folder: Path, more: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})


def write_random_adapter(base: Path, folder: Path, **keys: Any) -> PreTrainedModel:
    """Write a random LoRA adapter for the causal model in ``base``; return the adapted model."""
    model: PreTrainedModel = tf.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(**{"r": 4, "target_modules": ["attention"], **keys})
    torch.manual_seed(0)
    inject(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(folder, model, config, base_model_name_or_path=str(base), task_type="CAUSAL_LM")
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
