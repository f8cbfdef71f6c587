"""Writes a model as GGUF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapters.merge.checkpoint import Checkpoint, read_config
from lorakit.adapters.merge.quantized import open_checkpoint
from lorakit.adapters.merge.workers import OnProgress
from lorakit.errors import ModelError, listed
from lorakit.export.gguf.encode import (
    OF_TORCH,
    OutputTensor,
    Written,
    file_type,
    tensor_dtype,
    write_file,
)
from lorakit.export.gguf.families import Family, family_of, stored_values
from lorakit.export.gguf.settings import add_settings, rope_factors
from lorakit.export.gguf.vocabulary import add_tokenizer
from lorakit.models.hub import load_config
from lorakit.recipe.sections import ModelSection

#: Buffers that old checkpoints contain, and llama.cpp computes.
_COMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias")


def text_config(section: ModelSection) -> dict[str, Any]:
    """The configuration of the text model, with all defaults."""
    config = load_config(section)
    text = config.get_text_config()
    found: dict[str, Any] = text.to_dict()
    if text is not config:
        raise ModelError(
            f"{section.name_or_path}: model_type = {config.model_type}: models of texts and images "
            "cannot be written as GGUF"
        )
    return found


def write_model(directory: Path, out: Path, dtype: str | None, on_progress: OnProgress) -> Written:
    """Write the model to ``out``.

    ``dtype`` None keeps the dtype that most of the weights have. Raises ModelError for a model,
    tokenizer or setting that llama.cpp does not support.
    """
    from gguf import GGUFWriter

    config = text_config(ModelSection(name_or_path=str(directory)))
    family = family_of(config, str(directory))
    with open_checkpoint(directory, read_config(directory)) as checkpoint:
        dtype = dtype or _common_dtype(checkpoint)
        writer = GGUFWriter(path=None, arch=family.arch)
        writer.add_type("model")
        writer.add_name(directory.resolve().name)
        writer.add_file_type(file_type(dtype))
        writer.add_quantization_version(2)
        notes = add_settings(writer, family, config, str(directory))
        tensors = list(_tensors(checkpoint, family, config, dtype))
        rows = next(t.shape[0] for t in tensors if t.name == "token_embd.weight")
        if rows != config["vocab_size"]:
            raise ModelError(
                f"{directory}: vocab_size = {config['vocab_size']} in config.json, but the "
                f"embedding has {rows} rows"
            )
        add_tokenizer(writer, directory, rows)
        size = write_file(writer, out, tensors, on_progress)
    halves = sum(t.dtype == "f16" for t in tensors) if dtype == "q8_0" else 0
    if halves:
        notes.append(f"{halves} matrices are float16: their row length is not a multiple of 32")
    return Written(len(tensors), dtype, size, tuple(notes))


def tensor_names(family: Family, layers: int) -> Callable[[str], str | None]:
    """A function from transformers' names of weights and biases to GGUF's, or None."""
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch)
    names = gguf.get_tensor_name_map(arch, layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def _tensors(
    checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], dtype: str
) -> Iterator[OutputTensor]:
    if (factors := rope_factors(config)) is not None:
        yield OutputTensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)
    named = tensor_names(family, int(config["num_hidden_layers"]))
    unknown = []
    for name, stored in checkpoint.tensors.items():
        if name.endswith(_COMPUTED) or (config.get("tie_word_embeddings") and "lm_head" in name):
            continue
        if (target := named(name)) is None:
            unknown.append(name)
            continue
        yield OutputTensor(
            target, stored.shape, tensor_dtype(stored.shape, dtype),
            partial(_read, checkpoint, family, config, name),
        )  # fmt: skip
    if unknown:
        raise ModelError(
            f"{checkpoint.directory}: llama.cpp has no such tensors in {family.arch}: "
            f"{listed(unknown)}"
        )


def _read(checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], name: str) -> Tensor:
    return stored_values(family, config, name, checkpoint.read(name))


def _common_dtype(checkpoint: Checkpoint) -> str:
    """The type that keeps the values of most weights; bf16 for a quantized checkpoint, which is
    dequantized."""
    if any(stored.is_quantized for stored in checkpoint.tensors.values()):
        return "bf16"
    sizes: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        if stored.dtype is not None:
            sizes[OF_TORCH.get(stored.dtype, "f32")] += stored.parameters
    return sizes.most_common(1)[0][0] if sizes else "f32"
