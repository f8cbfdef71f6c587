"""What each weight of a model is for: attention, MLP, experts, routers, state space."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import nn

Part = Literal["attention", "MLP", "expert", "state-space", "router", "other"]

_ROUTER = re.compile(r"router|shared_expert_gate|indexer|gating|wg")
# To the end of the name: "Qwen3_5MoeGatedDeltaNet" is attention.
_ROUTER_CLASS = re.compile(r"Router|Indexer|(TopK|M[oO][eE](V\d+)?)(Gate|Gating)$")
_EXPERT = re.compile(r"(?!shared).*experts?(_?\d+)?")
_EXPERT_CLASS = re.compile(r"(?<!Shared)Experts?(GLU)?$")
#: For one module on the way to a weight, the first that fits: pattern of its name, of its class.
_PARTS: tuple[tuple[Part, re.Pattern[str], re.Pattern[str]], ...] = (
    (
        "attention",
        re.compile(r"(?i).*(attn|attention).*"),
        re.compile(r"Attention|Attn|DeltaNet|Retention|MLA$|MoA$|SelfOutput$"),
    ),
    (
        "MLP",
        re.compile(r"(?i).*(mlp|ffn|feed_?forward|intermediate|dense_.*h).*|ff|fc\d?|lin\d|output"),
        re.compile(r"MLP|Mlp|FFN|FeedForward|FF$|Intermediate|Output$|DenseActDense|DenseGated"),
    ),
    (
        "state-space",
        re.compile(r"mamba|ssm|rg_lru|mlstm_layer|short_?conv"),
        re.compile(r"Mamba|SSM|RgLru|Rglru|RecurrentBlock|LSTM|ShortConv|Hyena"),
    ),
)
#: Classes of which a model keeps lists beside those of its layers (XLM, BLT).
_WHOLE_CLASS: tuple[tuple[Part, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"(Attention|Attn)$")),
    ("MLP", re.compile(r"(MLP|FFN|FeedForward)$")),
)
_LINEAR_ATTENTION = re.compile(r"DeltaNet|DeltaAttention|LinearAttention|LightningAttention")


@dataclass(frozen=True)
class Weight:
    """A matrix or a stack of them: the parameter ``name`` of the module ``owner``.

    ``read_past_forward``, which is found for routers only: an adapter in place of the module would
    do nothing.
    """

    name: str
    owner: str
    parameters: int
    part: Part
    linear_attention: bool
    stacked: bool
    read_past_forward: bool


def weights(model: nn.Module, exclude: Collection[str] = ()) -> list[Weight]:
    """The weights of the model's layers, in its order: no embeddings, no vectors, and nothing of
    the modules ``exclude``. Shared ones count once."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    left_out = tuple(f"{name}." for name in exclude) or ("\0",)
    found = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        # RWKV has vectors of shape (1, 1, n).
        vector = parameter.squeeze().ndim < 2 and parameter.ndim != 2
        vector = vector or name.endswith("bias")
        if vector or isinstance(module, nn.Embedding) or name.startswith(left_out):
            continue
        # Three dimensions and no convolution: one matrix for each expert.
        stacked = parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
        path, part = _path(owner), part_of(owner, classes)
        found.append(
            Weight(
                name=name,
                owner=owner,
                parameters=parameter.numel(),
                part=part,
                linear_attention=any(_LINEAR_ATTENTION.search(classes[at]) for at in path),
                stacked=stacked,
                read_past_forward=part == "router" and reads_past_forward(model, owner),
            )
        )
    return found


def part_of(module: str, classes: dict[str, str]) -> Part:
    """The part that the module of that name belongs to; ``classes``: name -> class of all."""
    path = _path(module)
    ends = [name.rpartition(".")[2] for name in path]
    routes = any(_ROUTER.fullmatch(end) for end in ends)
    if routes or any(_ROUTER_CLASS.search(classes[name]) for name in path):
        return "router"
    if ends and ends[0] == "gate" and f"{module.rpartition('.')[0]}.experts" in classes:
        return "router"
    around = [*zip(path, ends, strict=True)]
    if is_routed_expert(module) or any(_EXPERT_CLASS.search(classes[name]) for name in path):
        # JetMoe's experts are query and output projections.
        inside = any(_fits("attention", name, end, classes) for name, end in around[1:])
        return "attention" if inside else "expert"
    # The weight's own module says least: "output" is a projection of attention or an MLP.
    for name, end in around[1:] + around[:1]:
        for part, _, _ in _PARTS:
            if _fits(part, name, end, classes):
                return part
    layer = classes.get(path[-1].rpartition(".")[0] if path else module, "")
    return next((part for part, of_class in _WHOLE_CLASS if of_class.search(layer)), "other")


def _fits(part: Part, name: str, end: str, classes: Mapping[str, str]) -> bool:
    return any(
        of_name.fullmatch(end) or of_class.search(classes[name])
        for own, of_name, of_class in _PARTS
        if own == part
    )


def reads_past_forward(model: nn.Module, name: str) -> bool:
    """Whether the code around the module of that name reads its weight and never calls it, as far
    as the source of the class that holds it says."""
    holder, _, own = name.rpartition(".")
    kind: Any = type(model.get_submodule(holder))
    return _reads_weight(kind, own)


@cache
def _reads_weight(holder: Any, attribute: str) -> bool:
    try:
        source = inspect.getsource(holder)
    except (OSError, TypeError):
        return False
    uses = re.findall(rf"self\.{re.escape(attribute)}\b(?!\s*=[^=])(\.(?:weight|bias)\b)?", source)
    return bool(uses) and all(uses)


def is_routed_expert(module: str) -> bool:
    """Whether the module of that name is one of several experts, which may get no token."""
    return any(_EXPERT.fullmatch(part) for part in module.split("."))


def layer_of(name: str) -> int | None:
    """The index of the layer that a module or parameter belongs to."""
    match = re.search(r"\.(\d+)\.", f".{name}.")
    return int(match[1]) if match else None


def _path(module: str) -> list[str]:
    """The module and those around it, the innermost first, up to and without its layer."""
    parts = module.split(".")
    layer = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
    return [".".join(parts[: depth + 1]) for depth in range(len(parts) - 1, layer, -1)]
