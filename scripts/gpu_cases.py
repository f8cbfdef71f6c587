"""The models, rows and settings that ``bench_gpu.py`` times."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ATTENTION = ["q", "k", "v", "o"]
LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "llama70b": LLAMA
    | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256},
    "llama1b": LLAMA
    | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256}
    | {"tie_word_embeddings": True},
    "smollm2": LLAMA
    | {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}
    | {"tie_word_embeddings": True},
    "roberta": {"model_type": "roberta", "hidden_size": 1024, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 50265}
    | {"max_position_embeddings": 514, "type_vocab_size": 1},
}
#: Tokens of the prompts and completions of rows: mean, standard deviation, and the least.
#: ``answers`` are as long as those of instruction data.
LENGTHS = {
    "wikisql": ((52.5, 17.0, 28), (20.0, 6.0, 5)),
    "answers": ((120.0, 60.0, 20), (180.0, 90.0, 20)),
}


@dataclass(frozen=True)
class Case:
    """``rows``: dense (each of ``length`` tokens), short (a sentence with a label), or those of
    ``LENGTHS``."""

    shape: str
    rows: str
    batch: int
    targets: tuple[str, ...]
    length: int = 512
    r: int = 16
    steps: int = 40
    recipe: dict[str, Any] = field(default_factory=dict)


OFFLOAD = {"train.gradient_checkpointing": "offload"}
CASES = {
    "8b": Case("llama8b", "dense", 4, tuple(ATTENTION), 2048),
    "8b-all": Case("llama8b", "dense", 4, ("all-linear",), 2048),
    "8b-fp8": Case(
        "llama8b",
        "dense",
        4,
        tuple(ATTENTION),
        2048,
        recipe={"model.base_precision": "fp8"},
    ),
    "8b-all-fp8": Case(
        "llama8b", "dense", 4, ("all-linear",), 2048, recipe={"model.base_precision": "fp8"}
    ),
    "8b-offload": Case("llama8b", "dense", 4, tuple(ATTENTION), 2048, steps=24, recipe=OFFLOAD),
    "8b-all-offload": Case("llama8b", "dense", 4, ("all-linear",), 2048, steps=24, recipe=OFFLOAD),
    "8b-packed": Case(
        "llama8b", "wikisql", 4, tuple(ATTENTION), 2048, recipe={"task.packing": True}
    ),
    "8b-wikisql": Case("llama8b", "wikisql", 8, tuple(ATTENTION), steps=200),
    "8b-answers": Case("llama8b", "answers", 8, tuple(ATTENTION), 1024, steps=100),
    "8b-all-nf4": Case(
        "llama8b", "dense", 4, ("all-linear",), 2048, recipe={"model.base_precision": "nf4"}
    ),
    "70b": Case(
        "llama70b",
        "dense",
        1,
        tuple(ATTENTION),
        2048,
        steps=10,
        recipe={"train.gradient_checkpointing": True},
    ),
    "1b": Case("llama1b", "dense", 4, ("all-linear",), 1024),
    # Enough tokens that the device, not the host, takes the time of a compiled step.
    "1b-large": Case("llama1b", "dense", 16, ("all-linear",), 1024),
    "1b-adalora": Case(
        "llama1b", "dense", 4, ("all-linear",), 1024, recipe={"adapter.method": "adalora"}
    ),
    "roberta": Case("roberta", "short", 32, ("q", "v"), steps=300),
    "roberta-all": Case("roberta", "short", 32, ("all-linear",), steps=300),
    "roberta-adalora": Case(
        "roberta", "short", 32, ("all-linear",), steps=300, recipe={"adapter.method": "adalora"}
    ),
    "smollm2": Case("smollm2", "wikisql", 16, ("q", "v"), steps=300),
    "smollm2-dropout": Case(
        "smollm2", "wikisql", 16, ("q", "v"), steps=300, recipe={"adapter.lora_dropout": 0.05}
    ),
}


def flops_per_token(case: Case) -> float:
    """4 N, for the products with a Llama's frozen weights and their gradients with respect to the
    inputs, plus causal attention forward and backward; without the adapter's own products."""
    shape = SHAPES[case.shape]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * shape["intermediate_size"]
    weights = layers * layer + hidden * shape["vocab_size"]
    return float(4 * weights + 6 * layers * hidden * case.length)


def save_model(case: Case, work: Path) -> None:
    """Write a model with random weights and its tokenizer."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    folder = work / case.shape
    if folder.exists():
        return
    shape = SHAPES[case.shape]
    config = AutoConfig.for_model(**shape, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    encoder = case.rows == "short"
    kind = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    torch.manual_seed(0)
    if case.shape == "llama70b":
        save_large_model(config, folder)
    else:
        with torch.device("cuda"):
            model = kind.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    save_tokenizer(folder, shape["vocab_size"])


def save_large_model(config: Any, folder: Path) -> None:
    """Write a Llama too large for one GPU, a file for each layer. All layers have the same random
    weights."""
    import torch
    from transformers import AutoModelForCausalLM

    def random(shape: Any) -> Any:
        ones = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        return (ones if len(shape) == 1 else ones.normal_(std=config.initializer_range)).cpu()

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers = "model.layers."
    files: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        number, _, part = name.removeprefix(layers).partition(".")
        if not name.startswith(layers):
            number, part = "rest", name
        if part not in made:
            made[part] = random(tensor.shape)
        files.setdefault(f"model-{number}.safetensors", {})[name] = made[part]
    folder.mkdir(parents=True)
    config.update({"architectures": [type(model).__name__], "dtype": "bfloat16"})
    config.save_pretrained(folder)
    FILES.update({str(folder / file): tensors for file, tensors in files.items()})
    with get_context("fork").Pool(16) as pool:
        pool.map(_save_file, FILES, chunksize=1)
    FILES.clear()
    weights = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


#: What the processes that write a large model inherit.
FILES: dict[str, dict[str, Any]] = {}


def _save_file(path: str) -> None:
    from safetensors.torch import save_file

    save_file(FILES[path], path, {"format": "pt"})


def save_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer with one token for each word t5, t6, ...; its class is BertTokenizer, which
    every release of transformers loads as it is written."""
    from tokenizers import BertWordPieceTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special)}
    vocabulary |= {f"t{i}": i for i in range(len(special), size)}
    BertWordPieceTokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    settings = {f"{name}_token": token for name, token in names.items()}
    settings |= {"eos_token": "[SEP]", "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(case: Case, work: Path) -> None:
    draw = random.Random(0)
    tokens = range(5, SHAPES[case.shape]["vocab_size"])

    def text(count: int) -> str:
        return " ".join(f"t{i}" for i in draw.choices(tokens, k=count))

    def normal(mean: float, deviation: float, least: int) -> int:
        return max(least, round(draw.gauss(mean, deviation)))

    rows = []
    # Of WikiSQL's rows, about 28 fit into 2,048 tokens.
    per_bin = case.length // 60 if case.recipe.get("task.packing") else 1
    for index in range(case.batch * case.steps * per_bin):
        if case.rows == "dense":
            rows.append({"text": text(case.length)})
        elif case.rows == "short":
            rows.append({"text": text(draw.randint(8, 54)), "label": "ab"[index % 2]})
        else:
            prompt, completion = (text(normal(*part)) for part in LENGTHS[case.rows])
            rows.append({"prompt": prompt, "completion": f" {completion}"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (work / f"{case.shape}-{case.rows}.jsonl").write_text(lines)
