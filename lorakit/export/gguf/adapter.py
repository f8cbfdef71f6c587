"""Writes a LoRA adapter as GGUF, for llama.cpp's ``--lora``.

llama.cpp adds lora_alpha / r * B A to a matrix, with one lora_alpha for all and the rank of each:
the B of a matrix with another scaling is multiplied by what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

from torch import Tensor

from lorakit.adapters.base_model import base_section
from lorakit.adapters.low_rank import AdaptedMatrix, Updates, number, read_updates
from lorakit.adapters.merge.workers import OnProgress
from lorakit.adapters.peft.method import merge_command
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.errors import AdapterError, listed
from lorakit.export.gguf.encode import OutputTensor, Written, file_type, write_file
from lorakit.export.gguf.families import Family, family_of, stored_rows
from lorakit.export.gguf.model import tensor_names, text_config
from lorakit.export.gguf.settings import head_size

#: Blocks of q8_0 do not fit into rows as short as the rank.
DTYPES = ("f32", "f16", "bf16")


def write_adapter(
    files: AdapterFiles, base: str | None, out: Path, dtype: str | None, on_progress: OnProgress
) -> Written:
    """Write the adapter to ``out``.

    Only the configuration of the ``base`` is read, by default of the one that the adapter names.
    Raises AdapterError for what llama.cpp cannot apply, such as trained biases and heads.
    """
    from gguf import GGUFWriter
    from gguf.constants import Keys

    section = base_section(base, files)
    merge = merge_command(section.name_or_path, files.directory, files.method.name)
    hint = f"hint: {merge}, and export OUT"
    updates = read_updates(files)
    _check_others(updates, files, hint)
    config = text_config(section)
    family = family_of(config, section.name_or_path)
    dtype = dtype or "f32"
    alpha = float(number(mode(m.scaling * m.r for m in updates.matrices.values())))
    scaled = sum(matrix.factor_of_B(matrix.r, alpha) != 1 for matrix in updates.matrices.values())
    note = f"B is scaled in {scaled} of {len(updates.matrices)} matrices to fit one lora_alpha"
    writer = GGUFWriter(path=None, arch=family.arch)
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(files.directory.resolve().name)
    writer.add_file_type(file_type(dtype))
    tensors = list(_tensors(updates, family, config, dtype, alpha, f"{files.directory}", hint))
    size = write_file(writer, out, tensors, on_progress)
    return Written(len(tensors), dtype, size, (note,) if scaled else ())


def _check_others(updates: Updates, files: AdapterFiles, hint: str) -> None:
    if updates.others:
        trained = sorted({name.rpartition(".")[0] for name in updates.others})
        raise AdapterError(
            f"{files.directory}: {listed(trained)}: fully trained, and an adapter for llama.cpp "
            f"has low-rank updates only; {hint}"
        )


def _tensors(
    updates: Updates,
    family: Family,
    config: Mapping[str, Any],
    dtype: str,
    alpha: float,
    where: str,
    hint: str,
) -> Iterator[OutputTensor]:
    named = tensor_names(family, int(config["num_hidden_layers"]))
    for module, matrix in updates.matrices.items():
        weight = f"{module}.weight"
        target = named(weight)
        if target is None:
            raise AdapterError(f"{where}: llama.cpp has no {module} in {family.arch}; {hint}")
        tied = bool(config.get("tie_word_embeddings"))
        if tied and target in ("output.weight", "token_embd.weight"):
            raise AdapterError(
                f"{where}: {module}: the base uses one matrix as embedding and output layer, and "
                f"llama.cpp cannot adapt one of the two; {hint}"
            )
        _check_shape(matrix, config, module, where)
        A, B = matrix.A, partial(_scaled, family, config, weight, matrix, alpha)
        if matrix.embedding:  # llama.cpp looks up rows of A, one per token
            A = matrix.A.mT
        yield OutputTensor(f"{target}.lora_a", tuple(A.shape), dtype, partial(_float, A))
        yield OutputTensor(f"{target}.lora_b", tuple(matrix.B.shape), dtype, B)


def _check_shape(matrix: AdaptedMatrix, config: Mapping[str, Any], module: str, where: str) -> None:
    """Raise AdapterError if q, k and v do not have the rows of the base's heads."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(module.rpartition(".")[2])
    if key is None:
        return
    rows = int(config.get(key) or config["num_attention_heads"]) * head_size(config)
    if matrix.B.shape[0] != rows:
        raise AdapterError(
            f"{where}: {module} has {matrix.B.shape[0]} rows, and the base {rows}: the adapter "
            "belongs to another base model"
        )


def _scaled(
    family: Family, config: Mapping[str, Any], weight: str, matrix: AdaptedMatrix, alpha: float
) -> Tensor:
    factor = matrix.factor_of_B(matrix.r, alpha)
    B = matrix.B.float() if factor == 1 else (matrix.B.double() * factor).float()
    return stored_rows(family, config, weight, B)


def _float(value: Tensor) -> Tensor:
    return value.float()
