"""Whether vLLM can serve an adapter as it is, by vLLM's own rules: ``lorakit.check_vllm``.

The rules are those of vLLM up to 0.33. Where versions differ, an adapter must fit the older one.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.base_model import base_section
from lorakit.adapters.low_rank import Updates, number, read_products
from lorakit.adapters.peft.method import merge_command
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.adapters.peft.tokens import row_names
from lorakit.adapters.vllm import EMBEDDINGS, NEWER_RANKS, VLLM_RANKS, fully_trained
from lorakit.errors import LorakitError, UserError, listed
from lorakit.models.hub import load_config
from lorakit.notes import Say, to_stderr

_ATTENTION_AND_MLP = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
#: Model type -> last parts of the names of modules that vLLM adapts. It computes q, k and v in one
#: module, and gate and up in another, and packs their adapters into it.
_MODULES: Mapping[str, tuple[str, ...]] = {
    "llama": (*_ATTENTION_AND_MLP, *EMBEDDINGS),
    "mistral": _ATTENTION_AND_MLP,
    "qwen2": _ATTENTION_AND_MLP,
    "qwen3": (*_ATTENTION_AND_MLP, *EMBEDDINGS),
    "gemma": _ATTENTION_AND_MLP,
    "gemma2": _ATTENTION_AND_MLP,
    "gemma3_text": _ATTENTION_AND_MLP,
    "granite": (*_ATTENTION_AND_MLP, *EMBEDDINGS),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", *EMBEDDINGS),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gpt2": (),
    "bloom": (),
}
#: Initializations that PEFT repeats when it loads an adapter, which vLLM does not.
_REPEATED = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class VllmRule:
    """``status`` is ``ok``, ``failed`` or ``unknown`` (not checked); ``found`` says what the
    adapter has, and ``run`` what to do if it failed."""

    rule: str
    status: str
    found: str
    run: str | None = None


@dataclass(frozen=True)
class VllmReport:
    """``ok``: no rule failed. ``serve`` is the command that starts vLLM with the adapter."""

    adapter: Path
    ok: bool
    rules: tuple[VllmRule, ...]
    serve: str | None


@dataclass(frozen=True)
class _Commands:
    """What makes an adapter fit: ``convert`` keeps an adapter, ``merge`` writes a model."""

    convert: str
    merge: str


def check_vllm(
    adapter: str | Path,
    *,
    base: str | None = None,
    max_lora_rank: int | None = None,
    say: Say = to_stderr,
) -> VllmReport:
    """Check an adapter against what vLLM can load.

    ``base`` replaces the base model that the adapter names; its configuration tells which modules
    vLLM adapts. ``max_lora_rank`` is the value that vLLM was or will be started with, by default
    the smallest that fits. Raises AdapterError for a directory that is not an adapter, and
    UserError for a ``max_lora_rank`` that vLLM does not accept.
    """
    if max_lora_rank is not None and max_lora_rank not in VLLM_RANKS:
        allowed = ", ".join(map(str, VLLM_RANKS))
        raise UserError(f"--max-lora-rank = {max_lora_rank}: allowed: {allowed}")
    files = read_adapter(adapter, say)
    named = base or files.config.get("base_model_name_or_path")
    commands = _Commands(
        f"lorakit convert {files.directory} OUT --to lora",
        merge_command(named, files.directory, files.method.name),
    )
    rules = [_base_rule(named), _method_rule(files, commands)]
    fitting = None
    if files.config["peft_type"] in ("LORA", "ADALORA"):
        updates = read_products(files)
        rules += _trained_rules(files, updates, commands)
        rules += _rank_rules(updates, max_lora_rank, commands)
        rules.append(_modules_rule(files, updates, base, commands))
        fitting = _fitting_rank(max(matrix.r for matrix in updates.matrices.values()))
    ok = all(rule.status != "failed" for rule in rules)
    serve = _serve_command(files, named, max_lora_rank or fitting) if ok else None
    return VllmReport(files.directory, ok, tuple(rules), serve)


def _serve_command(files: AdapterFiles, base: object, max_lora_rank: int | None) -> str:
    return shlex.join([
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", str(max_lora_rank),
        "--lora-modules", f"{files.directory.name}={files.directory}",
    ])  # fmt: skip


def _rule(name: str, fails: bool, found: str, run: str) -> VllmRule:
    return VllmRule(name, "failed" if fails else "ok", found, run if fails else None)


def _base_rule(base: object) -> VllmRule:
    found = str(base) if base else "none"
    run = 'write "base_model_name_or_path" into adapter_config.json'
    return _rule("base_model_name", not base, found, run)


def _method_rule(files: AdapterFiles, commands: _Commands) -> VllmRule:
    peft_type = files.config["peft_type"]
    run = commands.convert if peft_type == "ADALORA" else commands.merge
    return _rule("method", peft_type != "LORA", f"peft_type {peft_type}", run)


def _trained_rules(
    files: AdapterFiles, updates: Updates, commands: _Commands
) -> Iterator[VllmRule]:
    config = files.config
    dora = bool(config.get("use_dora"))
    yield _rule("dora", dora, "use_dora" if dora else "no DoRA", commands.merge)
    init = str(config.get("init_lora_weights", True)).lower()
    repeated = init.startswith(_REPEATED)
    yield _rule("initialization", repeated, f"init_lora_weights {init}", commands.convert)
    bias = "lora_bias" if config.get("lora_bias") else f"bias {config.get('bias', 'none')}"
    trains_bias = bias != "bias none" or bool(updates.biases)
    yield _rule("bias", trains_bias, bias, commands.merge)
    rows = row_names(updates.others)
    yield _rule(
        "new_tokens", bool(rows), f"rows of {listed(rows)}" if rows else "no rows of new tokens",
        commands.merge,
    )  # fmt: skip
    trained = [*dict.fromkeys(fully_trained(updates) or config.get("modules_to_save") or ())]
    yield _rule(
        "modules_to_save", bool(trained), f"fully trained: {listed(trained) or 'none'}",
        commands.merge,
    )  # fmt: skip


def _rank_rules(
    updates: Updates, max_lora_rank: int | None, commands: _Commands
) -> Iterator[VllmRule]:
    ranks = sorted({matrix.r for matrix in updates.matrices.values()})
    scalings = sorted({number(matrix.scaling) for matrix in updates.matrices.values()})
    configured = updates.config.get("r")
    found = f"r {_range(ranks)}, {configured} in adapter_config.json"
    yield _rule("one_rank", ranks != [configured], found, commands.convert)
    yield _rule("one_scaling", len(scalings) > 1, f"scaling {_range(scalings)}", commands.convert)
    limit = max_lora_rank or VLLM_RANKS[-1]
    fitting = _fitting_rank(ranks[-1])
    run = f"start vLLM with --max-lora-rank {fitting}" if fitting else commands.merge
    found = f"r {ranks[-1]}, max_lora_rank {limit}"
    yield _rule("max_lora_rank", ranks[-1] > limit, found, run)


def _fitting_rank(r: int) -> int | None:
    """The smallest ``--max-lora-rank`` for rank ``r`` that every version of vLLM accepts, None if
    there is none."""
    return next((rank for rank in VLLM_RANKS if rank >= r and rank not in NEWER_RANKS), None)


def _modules_rule(
    files: AdapterFiles, updates: Updates, base: str | None, commands: _Commands
) -> VllmRule:
    names = sorted({name.rpartition(".")[2] for name in updates.matrices})
    try:
        model_type = load_config(base_section(base, files)).model_type
    except LorakitError as error:
        return VllmRule("modules", "unknown", f"{listed(names)}: {error}")
    if (allowed := _MODULES.get(model_type)) is None:
        return VllmRule("modules", "unknown", f"{listed(names)} of {model_type}, not known here")
    wrong = [name for name in names if name not in allowed]
    if not allowed:
        found = f"vLLM has no LoRA for {model_type}"
    elif wrong:
        found = f"{listed(wrong)}: vLLM adapts {', '.join(allowed)} of {model_type}"
    else:
        found = f"{listed(names)} of {model_type}"
    return _rule("modules", bool(wrong), found, commands.merge)


def _range(values: list[int] | list[float | int]) -> str:
    first, last = values[0], values[-1]
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"
