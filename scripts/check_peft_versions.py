"""Check that old and new versions of PEFT load lorakit's adapters with equal logits.

    python scripts/check_peft_versions.py [--versions 0.13.2,0.17.1,installed] [--keep DIR] [--json]

Each version of PEFT is installed with the transformers of its time into a separate directory that
takes precedence over this environment's packages; the environment itself is not changed. For each
case lorakit adapts a tiny model, randomizes the adapter, saves it and loads it with
``lorakit.load``; every version loads the same directory on the same base in float32. The table
shows the largest difference from the logits of ``lorakit.load``. The exit code is 1 if one is above
1e-5, or if a version refuses an adapter that it should load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Packages installed with pip for each version of PEFT, without dependencies.
SETS: dict[str, list[str]] = {
    "0.13.2": [
        "peft==0.13.2", "transformers==4.46.3", "tokenizers==0.20.3", "huggingface_hub==0.26.5",
    ],
    "0.17.1": [
        "peft==0.17.1", "transformers==4.57.3", "tokenizers==0.22.1", "huggingface_hub==0.36.0",
    ],
    "installed": [],
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
ROLES = {"target_modules": ["q", "v"]}
#: Model class, its configuration, lorakit's method and its keys, by case.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "Linear, q and v": ("LlamaForCausalLM", LLAMA, "lora", ROLES),
    "every Linear": ("LlamaForCausalLM", LLAMA, "lora", {"target_modules": ["all-linear"]}),
    "one layer": ("LlamaForCausalLM", LLAMA, "lora", ROLES | {"layers": [1]}),
    "Conv1D": ("GPT2LMHeadModel", GPT2, "lora", {"target_modules": ["all-linear"]}),
    "q and v of c_attn": ("GPT2LMHeadModel", GPT2, "lora", ROLES),
    "embeddings": ("GPT2LMHeadModel", GPT2, "lora", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "tied embeddings": (
        "LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}, "lora",
        {"target_modules": ["embed_tokens", "v"]},
    ),
    "rsLoRA": ("LlamaForCausalLM", LLAMA, "lora", ROLES | {"use_rslora": True}),
    "patterns": (
        "LlamaForCausalLM", LLAMA, "lora",
        ROLES | {"rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ),
    "PiSSA": ("LlamaForCausalLM", LLAMA, "lora", ROLES | {"init": "pissa"}),
    "modules_to_save": (
        "LlamaForCausalLM", LLAMA, "lora", ROLES | {"modules_to_save": ["lm_head"]}
    ),
    "classification head": (
        "BertForSequenceClassification", SMALL | {"num_labels": 3}, "lora", ROLES,
    ),
    "score": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3}, "lora", ROLES),
    "biases": (
        "BertForSequenceClassification", SMALL | {"num_labels": 3}, "lora",
        ROLES | {"bias": "lora_only"},
    ),
    "DoRA": ("LlamaForCausalLM", LLAMA, "dora", ROLES),
    "DoRA, Conv1D": ("GPT2LMHeadModel", GPT2, "dora", {"target_modules": ["c_attn", "c_fc"]}),
    "AdaLoRA": ("LlamaForCausalLM", LLAMA, "adalora", ROLES | {"init_r": 4, "target_r": 2}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--versions", default=",".join(SETS))
    parser.add_argument("--keep", type=Path, help="working directory, kept afterwards")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read_all(arguments.read)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        for number, case in enumerate(CASES):
            write(folder / str(number), case)
        results = [measure(folder, version) for version in arguments.versions.split(",")]
    print(json.dumps(results, indent=2) if arguments.json else table(results))
    wrong = [value for r in results for value in r["cases"].values() if not good(value)]
    raise SystemExit(1 if wrong else 0)


def write(folder: Path, case: str) -> None:
    """Write a base, an adapter with random values, and the logits of ``lorakit.load``."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import lorakit
    from lorakit import registry
    from lorakit.adapters.peft.write import save_adapter
    from lorakit.injection import inject

    kind, config, method, keys = CASES[case]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**config)).eval()
    model.save_pretrained(folder / "base")
    section = registry.methods()[method].Config(method=method, **keys)
    inject(model, section)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    task = "SEQ_CLS" if "Classification" in kind else "CAUSAL_LM"
    base = str(folder / "base")
    save_adapter(folder / "adapter", model, section, base_model_name_or_path=base, task_type=task)
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        logits = lorakit.load(base, folder / "adapter")(input_ids=ids).logits
        effect = (logits - model_class.from_pretrained(base).eval()(input_ids=ids).logits).abs()
    assert effect.max() > 1e-3, f"{case}: the adapter does nothing"
    save_file({"ids": ids, "logits": logits.contiguous()}, folder / "expected.safetensors")


def measure(folder: Path, version: str) -> dict[str, Any]:
    """Load every case with a version of PEFT in a separate process."""
    packages = SETS.get(version, [f"peft=={version}"])
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    if packages:
        target = folder / f"peft-{version}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(target), *packages], check=True)
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), before]))
    command = [sys.executable, __file__, "--read", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_all(folder: Path) -> None:
    """Load every case with the PEFT of this process and print the differences as JSON."""
    import logging
    import warnings

    import peft
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    cases: dict[str, Any] = {}
    for number, case in enumerate(CASES):
        try:
            cases[case] = difference(folder / str(number), CASES[case][0])
        except Exception as error:
            cases[case] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, "cases": cases}))


def difference(folder: Path, kind: str) -> float:
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    expected = load_file(folder / "expected.safetensors")
    base = getattr(transformers, kind).from_pretrained(folder / "base", torch_dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    with torch.no_grad():
        logits = model(input_ids=expected["ids"]).logits
    return float((logits - expected["logits"]).abs().max())


def good(value: Any) -> bool:
    return isinstance(value, float) and value <= 1e-5


def table(results: list[dict[str, Any]]) -> str:
    names = [f"PEFT {r['peft']}, transformers {r['transformers']}" for r in results]
    lines = [f"| adapter | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in CASES:
        cells = [r["cases"][case] for r in results]
        shown = [f"{cell:.1e}" if isinstance(cell, float) else cell for cell in cells]
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
