"""What each weight of a model is for: attention, MLP, experts, routers, state space.

Which modules of a model can be adapted: those that compute what their class says.

Where q, k and v lie in a projection that holds all three.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.kernels.low_rank import RowSlice
from lorakit.layers import ADAPTABLE, dense_weight

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


#: Packages whose linear layers hold quantised weights: their ``forward`` is their own, and linear.
_QUANTISED = ("bitsandbytes.", "torchao.", "transformers.integrations.", "compressed_tensors.")


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module for all that a target may name, in the model's order.

    Linear layers, Conv1D and embeddings of the language model. Left out are subclasses that
    compute something else (Llama 4's router, position embeddings with an offset) and what
    nn.MultiheadAttention reads past ``forward``.
    """
    multihead = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    outside = outside_language_model(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ADAPTABLE)
        and not name.startswith(multihead or ("\0",))
        and not is_within(name, outside)
        and behaves_as_its_class(module)
    }


def behaves_as_its_class(module: nn.Module) -> bool:
    """Whether ``module(x)`` is W x + b, or for an embedding the rows of W that x names."""
    forward = type(module).forward
    if isinstance(module, nn.Embedding):
        # Scaled embeddings (Gemma) multiply by ``embed_scale``, which the adapter does too.
        return forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, Conv1D):
        return forward is Conv1D.forward
    if forward is nn.Linear.forward or type(module).__module__.startswith(_QUANTISED):
        return True
    return _is_linear_map(module)


@torch.no_grad()
def _is_linear_map(module: Any) -> bool:
    """Try a subclass of nn.Linear that has a ``forward`` of its own."""
    weight: Tensor = module.weight
    if weight.is_meta or weight.ndim != 2 or not weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype)
    x = x.view(1, 2, -1)
    try:
        y = module(x)
    except Exception:
        return False
    want = F.linear(x, weight, module.bias)
    return (
        isinstance(y, Tensor)
        and y.shape == want.shape
        and torch.allclose(y.to(want.dtype), want, rtol=1e-2, atol=1e-3)
    )


def outside_language_model(model: nn.Module) -> tuple[str, ...]:
    """The outermost modules of a multimodal model that text does not pass through: vision and
    audio towers, projectors. Empty for a model of text alone."""
    if not isinstance(model, PreTrainedModel):
        return ()
    text = model.config.get_text_config()
    if text is model.config:  # text alone
        return ()
    parts = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and type(module.config) is type(text)
    ]
    if not parts:
        return ()
    output = model.get_output_embeddings()
    kept = [*parts, *(name for name, module in model.named_modules() if module is output)]
    if "Classification" in type(model).__name__:  # the head
        kept += [n for n, child in model.named_children() if isinstance(child, nn.Linear)]
    above = {name[:at] for name in kept for at, letter in enumerate(name) if letter == "."}
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or name in above or is_within(name, (*kept, *found)):
            continue
        if name.count(".") and name.rpartition(".")[0] not in above:
            continue
        if any(True for _ in module.parameters()):
            found.append(name)
    return tuple(found)


def is_text_part(model: nn.Module) -> bool:
    """Whether ``model`` is the language model of a multimodal base, loaded alone."""
    config = getattr(model, "config", None)
    return getattr(config, "base_config_key", "") == "text_config"


def is_within(name: str, modules: tuple[str, ...] | list[str]) -> bool:
    """Whether ``name`` is one of ``modules`` or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


#: Projections that hold q, k and v in one matrix (GPT-2, GPT-NeoX and BLOOM, Phi-3, ModernBERT).
FUSED = r"(?:^|\.)(?:c_attn|query_key_value|qkv_proj|Wqkv)$"


def fused_rows(module: nn.Module, model: nn.Module) -> dict[str, RowSlice]:
    """Role -> its rows in ``module``, a fused projection of ``model``; empty if the model's
    layout is not known, or the matrix is not of the size that it should have."""
    config: Any = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if get_text_config else config
    sizes = _LAYOUTS.get(getattr(config, "model_type", ""), _unknown)(config)
    out_features = dense_weight(module).shape[0]
    period = sum(sizes)
    if not sizes or out_features % period or (out_features != period and len(set(sizes)) > 1):
        return {}
    starts = (0, sizes[0], sizes[0] + sizes[1])
    return {
        role: RowSlice(start, start + size, period)
        for role, start, size in zip("qkv", starts, sizes, strict=True)
    }


def _thirds(config: Any) -> tuple[int, ...]:
    """All of q, then all of k, then all of v."""
    return (config.hidden_size,) * 3


def _by_head(config: Any) -> tuple[int, ...]:
    """A head's q, k and v, then the next head's."""
    return (config.hidden_size // config.num_attention_heads,) * 3


def _grouped_queries(config: Any) -> tuple[int, ...]:
    """All of q, then of k and v, which have fewer heads."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    key_heads = config.num_key_value_heads
    return (config.num_attention_heads * head_dim, key_heads * head_dim, key_heads * head_dim)


def _unknown(_config: Any) -> tuple[int, ...]:
    return ()


#: The sizes of q, k and v in a period, by ``model_type``.
_LAYOUTS = {
    "gpt2": _thirds,
    "modernbert": _thirds,
    "gpt_neox": _by_head,
    "bloom": _by_head,
    "phi3": _grouped_queries,
}
