"""The kinds of models, and the class of transformers that loads each."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lorakit.data.examples import Problem
from lorakit.errors import ModelError
from lorakit.models.heads import declares_head, declares_token_head, of_tokens

Kind = Literal["causal", "encoder"]
#: PEFT's name for a causal model, a classifier of texts, or one of tokens.
TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"]
_MULTIMODAL = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
_LOADERS: dict[TaskType, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


def loader(task_type: TaskType) -> Any:
    """The class of transformers whose ``from_pretrained`` and ``from_config`` return the model."""
    return _LOADERS[task_type]


def task_type_of(kind: Kind, problem: Problem | None = None) -> TaskType:
    """The task type of a model of ``kind``; of a classifier, that for labels of ``problem``."""
    if kind == "causal":
        return "CAUSAL_LM"
    return "TOKEN_CLS" if of_tokens(problem) else "SEQ_CLS"


def stored_task_type(config: PreTrainedConfig) -> TaskType:
    """The task type that a checkpoint was saved with."""
    if not declares_head(config):
        return "CAUSAL_LM"
    return "TOKEN_CLS" if declares_token_head(config) else "SEQ_CLS"


def check_kind(config: PreTrainedConfig, kind: Kind, name: str) -> None:
    """Raise ModelError for a model of the other kind, or one without a class for ``kind``."""
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind == "encoder" and getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: {config.model_type} is an encoder-decoder, and the task needs an "
            "encoder; allowed: a model such as BERT, RoBERTa or ModernBERT"
        )
    encoder = masked and not getattr(config, "is_decoder", False)
    has_code = hasattr(config, "auto_map")
    if kind == "causal" and config.model_type in _MULTIMODAL and not causal and not has_code:
        raise ModelError(
            f"{name}: {config.model_type} is multimodal, and transformers has no class for "
            "training it on text alone: not supported yet; allowed: a decoder such as Llama, Qwen "
            "or GPT-2, or a multimodal Gemma 3, Qwen3.5 or Llama 4"
        )
    if kind == "causal" and (encoder or not causal) and not has_code:
        raise ModelError(
            f"{name}: {config.model_type} is not a causal language model, and the task "
            "needs one; allowed: a decoder such as Llama, Qwen, Gemma or GPT-2"
        )
