"""Tiny random models beyond plain decoders: mixtures of experts, latent and linear attention, state
spaces, and vision-language models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

_SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_HEADS = {"head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
_SHARED = _EXPERTS | {"shared_expert_intermediate_size": 12}
_LINEAR = {
    "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 16,
    "patch_size": 4, "num_position_embeddings": 16,
}  # fmt: skip
_LLAMA4 = {"intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}

_LONGCAT = {
    "ffn_hidden_size": 24, "expert_ffn_hidden_size": 12, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    "n_routed_experts": 4, "zero_expert_num": 2,
}  # fmt: skip
_ZAMBA = {
    "layers_block_type": ["mamba", "hybrid"] * 3, "num_mem_blocks": 2, "adapter_rank": 4,
    "use_shared_attention_adapter": True, "mamba_d_state": 8, "n_mamba_heads": 4,
    "mamba_headdim": 8, "mamba_ngroups": 1,
}  # fmt: skip

_CONFIGS: dict[str, Callable[[int], Any]] = {
    "qwen3_moe": lambda v: tf.Qwen3MoeConfig(vocab_size=v, **_SMALL, **_HEADS, **_EXPERTS),
    "mixtral": lambda v: tf.MixtralConfig(vocab_size=v, **_SMALL, **_HEADS, num_local_experts=4),
    "deepseek_v3": lambda v: tf.DeepseekV3Config(vocab_size=v, **_SMALL | _LATENT, q_lora_rank=8),
    "qwen3_next": lambda v: tf.Qwen3NextConfig(vocab_size=v, **_SMALL | _HEADS | _LINEAR | _SHARED),
    "llama4_text": lambda v: tf.Llama4TextConfig(vocab_size=v, **_SMALL, **_HEADS, **_LLAMA4),
    "gpt_oss": lambda v: tf.GptOssConfig(
        vocab_size=v, **_SMALL, **_HEADS, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_5_moe_text": lambda v: tf.Qwen3_5MoeTextConfig(
        vocab_size=v, **_SMALL | _HEADS | _LINEAR | _SHARED
    ),
    "qwen3_5_text": lambda v: tf.Qwen3_5TextConfig(vocab_size=v, **_SMALL | _HEADS | _LINEAR),
    "longcat_flash": lambda v: tf.LongcatFlashConfig(
        vocab_size=v, **_LONGCAT, hidden_size=16, num_layers=2, num_attention_heads=4, moe_topk=2
    ),
    "rwkv": lambda v: tf.RwkvConfig(
        vocab_size=v, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16,
        intermediate_size=24,
    ),
    "jetmoe": lambda v: tf.JetMoeConfig(
        vocab_size=v, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
    ),
    "xlm": lambda v: tf.XLMConfig(vocab_size=v, emb_dim=16, n_layers=2, n_heads=4),
    "zamba2": lambda v: tf.Zamba2Config(
        vocab_size=v, **_ZAMBA, hidden_size=16, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=24,
    ),
    "mamba": lambda v: tf.MambaConfig(vocab_size=v, hidden_size=16, num_hidden_layers=2, state_size=8),
    "jamba": lambda v: tf.JambaConfig(
        vocab_size=v, **_SMALL, num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8,
    ),
    "falcon_h1": lambda v: tf.FalconH1Config(
        vocab_size=v, **_SMALL, **_HEADS, **_MAMBA2, mamba_d_ssm=32, mamba_n_groups=1
    ),
    "falcon": lambda v: tf.FalconConfig(
        vocab_size=v, hidden_size=16, num_hidden_layers=2, num_attention_heads=4
    ),
    "qwen3_5": lambda v: tf.Qwen3_5Config(
        text_config=_SMALL | _HEADS | _LINEAR | {"vocab_size": v}, vision_config=_QWEN_VISION
    ),
    "gemma3": lambda v: tf.Gemma3Config(
        text_config=_SMALL | _HEADS | {"vocab_size": v, "query_pre_attn_scalar": 8},
        vision_config=_VISION | {"image_size": 16, "patch_size": 4}, mm_tokens_per_image=4,
        image_token_index=3, boi_token_index=4, eoi_token_index=5,
    ),
    "llama4": lambda v: tf.Llama4Config(
        text_config=_SMALL | _HEADS | _LLAMA4 | {"vocab_size": v, "attention_chunk_size": 64},
        vision_config=_VISION | {
            "image_size": 16, "patch_size": 4, "projector_input_dim": 16,
            "projector_output_dim": 16, "vision_output_dim": 16,
        },
        boi_token_index=3, eoi_token_index=4, image_token_index=5,
    ),
    "mllama": lambda v: tf.MllamaConfig(
        text_config=_SMALL | {"vocab_size": v, "num_hidden_layers": 2, "cross_attention_layers": [1]},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 32, "image_size": 16,
            "patch_size": 4, "max_num_tiles": 1, "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
    ),
}  # fmt: skip
_CLASSES = {
    "qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM", "qwen3_next": "Qwen3NextForCausalLM",
    "llama4_text": "Llama4ForCausalLM", "gpt_oss": "GptOssForCausalLM", "mamba": "MambaForCausalLM",
    "jamba": "JambaForCausalLM", "falcon_h1": "FalconH1ForCausalLM", "falcon": "FalconForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM", "qwen3_5_text": "Qwen3_5ForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM", "rwkv": "RwkvForCausalLM",
    "jetmoe": "JetMoeForCausalLM", "xlm": "XLMWithLMHeadModel", "zamba2": "Zamba2ForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration", "mllama": "MllamaForConditionalGeneration",
}  # fmt: skip
MULTIMODAL = ("qwen3_5", "gemma3", "llama4", "mllama")


def hybrid(name: str, vocab_size: int = 64) -> PreTrainedModel:
    """Return a random model in evaluation mode, of the class that its checkpoints name."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = _CONFIGS[name](vocab_size)
    model: PreTrainedModel = getattr(tf, _CLASSES[name])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    torch.random.set_rng_state(state)
    return model.eval()


def saved_hybrid(name: str, tokenizer: Path, folder: Path) -> Path:
    """Write the model to a directory with the tokenizer of another."""
    from transformers import AutoTokenizer

    model = hybrid(name, len(AutoTokenizer.from_pretrained(tokenizer)) + 6)  # room for a pad token
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)
    return folder
