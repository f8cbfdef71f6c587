"""The parts of a model: the role of each weight, the modules that can be adapted, and the rows of
q, k and v in a fused projection."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.base_weight import ADAPTABLE, dense_weight
from lorakit.kernels.low_rank import RowSlice
from lorakit.models.quantized import QuantizedLinear

Part = Literal["attention", "MLP", "expert", "state-space", "router", "other"]

_ROUTER = re.compile(r"router|shared_expert_gate|indexer|gating|wg")
# To the end of the name: "Qwen3_5MoeGatedDeltaNet" is attention.
_ROUTER_CLASS = re.compile(r"Router|Indexer|(TopK|M[oO][eE](V\d+)?)(Gate|Gating)$")
_EXPERT = re.compile(r"(?!shared).*experts?(_?\d+)?")
_EXPERT_CLASS = re.compile(r"(?<!Shared)Experts?(GLU)?$")
#: Part, pattern of a module's name, pattern of its class: the first match decides.
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
#: Classes that some models keep in separate lists instead of in layers (XLM, BLT).
_LISTED_CLASSES: tuple[tuple[Part, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"(Attention|Attn)$")),
    ("MLP", re.compile(r"(MLP|FFN|FeedForward)$")),
)
_LINEAR_ATTENTION = re.compile(r"DeltaNet|DeltaAttention|LinearAttention|LightningAttention")


@dataclass(frozen=True)
class Weight:
    """A matrix or a stack of matrices: the parameter ``name`` of the module ``owner``.

    ``read_past_forward`` is determined for routers only: the model reads the weight without calling
    the module, so an adapter would have no effect.
    """

    name: str
    owner: str
    parameters: int
    part: Part
    linear_attention: bool
    stacked: bool
    read_past_forward: bool


def weights(model: nn.Module, exclude: Collection[str] = ()) -> list[Weight]:
    """The weights of the model's layers, in its order, without embeddings, vectors and the modules
    ``exclude``. A shared weight is listed once."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    excluded = tuple(f"{name}." for name in exclude)
    found = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        # RWKV has vectors of shape (1, 1, n).
        vector = parameter.squeeze().ndim < 2 and parameter.ndim != 2
        vector = vector or name.endswith("bias")
        if vector or isinstance(module, nn.Embedding) or name.startswith(excluded):
            continue
        # Three dimensions and not a convolution: one matrix for each expert.
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
    """The part that ``module`` belongs to; ``classes``: the class of each module, by name."""
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
    # The weight's own module comes last: "output" may be in attention or in an MLP.
    for name, end in around[1:] + around[:1]:
        for part, _, _ in _PARTS:
            if _fits(part, name, end, classes):
                return part
    layer = classes.get(path[-1].rpartition(".")[0] if path else module, "")
    return next((part for part, of_class in _LISTED_CLASSES if of_class.search(layer)), "other")


def _fits(part: Part, name: str, end: str, classes: Mapping[str, str]) -> bool:
    return any(
        of_name.fullmatch(end) or of_class.search(classes[name])
        for candidate, of_name, of_class in _PARTS
        if candidate == part
    )


def reads_past_forward(model: nn.Module, name: str) -> bool:
    """Whether the parent of the module ``name`` reads the module's weight but never calls it,
    according to the source code of the parent's class."""
    parent, _, attribute = name.rpartition(".")
    parent_class: Any = type(model.get_submodule(parent))
    return _reads_weight(parent_class, attribute)


@cache
def _reads_weight(parent_class: Any, attribute: str) -> bool:
    try:
        source = inspect.getsource(parent_class)
    except (OSError, TypeError):
        return False
    uses = re.findall(rf"self\.{re.escape(attribute)}\b(?!\s*=[^=])(\.(?:weight|bias)\b)?", source)
    return bool(uses) and all(uses)


def is_routed_expert(module: str) -> bool:
    """Whether ``module`` is, or is in, one of several experts, which may get no tokens."""
    return any(_EXPERT.fullmatch(part) for part in module.split("."))


def _path(module: str) -> list[str]:
    """The module and its parents, innermost first, up to its layer, which is excluded."""
    parts = module.split(".")
    layer = next((at for at, part in enumerate(parts) if part.isdigit()), -1)
    return [".".join(parts[: depth + 1]) for depth in range(len(parts) - 1, layer, -1)]


#: Packages of quantized linear layers, which override ``forward`` and are linear nevertheless.
_QUANTIZED = ("bitsandbytes.", "torchao.", "transformers.integrations.", "compressed_tensors.")


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that can be adapted, by name, in the model's order.

    These are linear layers, Conv1D and embeddings of the language model, except subclasses that
    compute something else (Llama 4's router, position embeddings with an offset) and the modules
    inside nn.MultiheadAttention, whose weights are read without calling them.
    """
    multihead = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    outside = outside_language_model(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*ADAPTABLE, QuantizedLinear))
        and not name.startswith(multihead)
        and not is_within(name, outside)
        and behaves_as_its_class(module)
    }


def behaves_as_its_class(module: nn.Module) -> bool:
    """Whether ``module(x)`` is W x + b or, for an embedding, the rows of W for the ids x."""
    forward = type(module).forward
    if isinstance(module, nn.Embedding):
        # Gemma's embeddings multiply by ``embed_scale``, and so do adapter layers.
        return forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, Conv1D):
        return forward is Conv1D.forward
    quantized = isinstance(module, QuantizedLinear) or type(module).__module__.startswith(
        _QUANTIZED
    )
    if forward is nn.Linear.forward or quantized:
        return True
    return _is_linear_map(module)


@torch.no_grad()
def _is_linear_map(module: Any) -> bool:
    """Whether a subclass of nn.Linear that overrides ``forward`` is linear for a test input."""
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
    """The outermost modules of a multimodal model that text does not pass through, such as vision
    and audio towers and projectors. Empty for a text model."""
    if not isinstance(model, PreTrainedModel):
        return ()
    text = model.config.get_text_config()
    if text is model.config:  # a text model
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
    """Whether ``model`` is the language model of a multimodal base, loaded without the rest."""
    config = getattr(model, "config", None)
    return getattr(config, "base_config_key", "") == "text_config"


def is_within(name: str, modules: tuple[str, ...] | list[str]) -> bool:
    """Whether ``name`` is one of ``modules`` or inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def outermost(names: Collection[str]) -> list[str]:
    """The modules of ``names`` that are not within another one."""
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]


#: Fused projections: q, k and v in one matrix (GPT-2, GPT-NeoX and BLOOM, Phi-3, ModernBERT).
FUSED = r"(?:^|\.)(?:c_attn|query_key_value|qkv_proj|Wqkv)$"


def fused_rows(module: nn.Module, model: nn.Module) -> dict[str, RowSlice]:
    """The rows of q, k and v in ``module``, a fused projection of ``model``; empty if the model's
    layout is unknown or the matrix does not have the size that the layout needs."""
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
    """q, k and v of a head, then those of the next head."""
    return (config.hidden_size // config.num_attention_heads,) * 3


def _grouped_queries(config: Any) -> tuple[int, ...]:
    """All of q, then all of k and of v, which have fewer heads."""
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


def layer_drops(config: object) -> list[str]:
    """The settings of a model by which its layers are dropped at random in training."""
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    return [name for name in names if getattr(config, name, 0.0)]


def transformer_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of the largest stack in ``model``, by values (a quantized weight is not a
    parameter); empty if there is none."""
    stacks = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(map(_size, stack)), default=[])


def _size(module: nn.Module) -> int:
    return sum(value.numel() for value in (*module.parameters(), *module.buffers()))
