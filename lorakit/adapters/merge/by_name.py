"""Resolves a base from its files alone, for common decoders and plain LoRA.

transformers reads every tensor of these decoders under its own name, and every matrix except the
embedding as an nn.Linear. An adapter's modules can therefore be found in the checkpoint itself,
which saves the seconds that it takes to import transformers and build a model. Everything else is
left to ``resolve_by_class``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakit.adapters.merge.checkpoint import Checkpoint
from lorakit.adapters.merge.updates import LowRankUpdate, ResolvedBase, Weighted
from lorakit.adapters.peft.initialization import reinitializes
from lorakit.adapters.peft.ranks import peft_rank, peft_scaling
from lorakit.adapters.peft.read import AdapterFiles, split_key
from lorakit.adapters.peft.schema import LINEAR_FACTORS
from lorakit.adapters.peft.targets import is_targeted
from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import LowRankDelta
from lorakit.methods.base import Method
from lorakit.methods.lora import Lora

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_GATED, _UNGATED = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")


@dataclass(frozen=True)
class Bias:
    """Whether linear layers have a bias: the value of ``key``, or ``default`` if it is not set."""

    key: str = ""
    default: bool = False

    def is_set(self, settings: Mapping[str, Any]) -> bool:
        return bool(settings.get(self.key, self.default))


_NO_BIAS, _ALWAYS = Bias(), Bias(default=True)
_ATTENTION, _MLP, _ANY = Bias("attention_bias"), Bias("mlp_bias"), Bias("use_bias")


@dataclass(frozen=True)
class PlainDecoder:
    """The tensors of a decoder class, by its configuration.

    ``tied``: whether the embeddings are tied by default. The last module of ``mlp`` projects back
    to the hidden size. ``qk_norms``: ``head`` (one norm for all heads) or ``all`` (over the
    concatenated heads). ``own_head_dim``: the class has its own default for it. ``unless``: keys
    that add or remove tensors.
    """

    class_name: str
    tied: bool = False
    norms: tuple[str, ...] = _TWO_NORMS
    norm_bias: bool = False
    final_norm: bool = True
    qk_norms: str = ""
    mlp: tuple[str, ...] = _GATED
    qkv_bias: Bias = _NO_BIAS
    o_bias: Bias = _NO_BIAS
    mlp_bias: Bias = _NO_BIAS
    own_head_dim: bool = False
    unless: tuple[str, ...] = ()

    def is_tied(self, settings: Mapping[str, Any]) -> bool:
        return bool(settings.get("tie_word_embeddings", self.tied))

    def shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        """The shapes of all tensors by name, including the output layer. None if ``config.json``
        lacks a size, whose default depends on the class."""
        if any(settings.get(key) for key in self.unless):
            return None
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads")  # fmt: skip
        sizes = [settings.get(key) for key in keys]
        if any(type(size) is not int or size < 1 for size in sizes):
            return None
        vocabulary, hidden, inner, layers, heads, pairs = (int(size or 0) for size in sizes)
        head_dim = settings.get("head_dim") or (not self.own_head_dim and hidden // heads)
        if type(head_dim) is not int:
            return None
        q, kv = heads * head_dim, pairs * head_dim
        layer = self._layer(settings, hidden, inner, q, kv, head_dim)
        found = {
            f"{EMBEDDING}.weight": (vocabulary, hidden),
            f"{HEAD}.weight": (vocabulary, hidden),
        }
        named = {
            f"model.layers.{i}.{end}": shape for i in range(layers) for end, shape in layer.items()
        }
        final = self._norm("model.norm", hidden) if self.final_norm else {}
        return {**found, **named, **final}

    def _layer(
        self, settings: Mapping[str, Any], hidden: int, inner: int, q: int, kv: int, head_dim: int
    ) -> dict[str, tuple[int, ...]]:
        qkv_bias, o_bias = self.qkv_bias.is_set(settings), self.o_bias.is_set(settings)
        mlp_bias = self.mlp_bias.is_set(settings)
        found: dict[str, tuple[int, ...]] = {}
        for role, rows in (("q", q), ("k", kv), ("v", kv)):
            found |= _linear(f"self_attn.{role}_proj", rows, hidden, qkv_bias)
        found |= _linear("self_attn.o_proj", hidden, q, o_bias)
        for name in self.mlp[:-1]:
            found |= _linear(f"mlp.{name}", inner, hidden, mlp_bias)
        found |= _linear(f"mlp.{self.mlp[-1]}", hidden, inner, mlp_bias)
        for name in self.norms:
            found |= self._norm(name, hidden)
        if self.qk_norms:
            per_head = self.qk_norms == "head"
            found["self_attn.q_norm.weight"] = (head_dim if per_head else q,)
            found["self_attn.k_norm.weight"] = (head_dim if per_head else kv,)
        return found

    def _norm(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        ends = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{name}.{end}": (size,) for end in ends}


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    own: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return own | ({f"{name}.bias": (rows,)} if bias else {})


def _decoder(class_name: str, bias: Bias = _NO_BIAS, **keys: Any) -> PlainDecoder:
    """A decoder with ``bias`` in all attention projections."""
    return PlainDecoder(class_name, **{"qkv_bias": bias, "o_bias": bias, **keys})


#: By model_type.
PLAIN = {
    "arcee": _decoder("ArceeForCausalLM", _ATTENTION, mlp=_UNGATED, mlp_bias=_MLP),
    "cohere": _decoder("CohereForCausalLM", _ATTENTION, tied=True, norms=("input_layernorm",),
                       unless=("use_qk_norm",)),
    "cohere2": _decoder("Cohere2ForCausalLM", _ATTENTION, tied=True, norms=("input_layernorm",)),
    "ernie4_5": _decoder("Ernie4_5ForCausalLM", _ANY, tied=True, mlp_bias=_ANY, own_head_dim=True),
    "gemma": _decoder("GemmaForCausalLM", _ATTENTION, tied=True, own_head_dim=True),
    "gemma2": _decoder("Gemma2ForCausalLM", _ATTENTION, tied=True, norms=_FOUR_NORMS,
                       own_head_dim=True),
    "gemma3_text": _decoder("Gemma3ForCausalLM", _ATTENTION, tied=True, norms=_FOUR_NORMS,
                            qk_norms="head", own_head_dim=True),
    "granite": _decoder("GraniteForCausalLM", _ATTENTION, mlp_bias=_MLP),
    "llama": _decoder("LlamaForCausalLM", _ATTENTION, mlp_bias=_MLP),
    "ministral3": _decoder("Ministral3ForCausalLM", own_head_dim=True),
    "mistral": _decoder("MistralForCausalLM"),
    "nemotron": _decoder("NemotronForCausalLM", _ATTENTION, mlp=_UNGATED, mlp_bias=_MLP,
                         norm_bias=True),
    "olmo": _decoder("OlmoForCausalLM", _ATTENTION, norms=(), final_norm=False),
    "olmo2": _decoder("Olmo2ForCausalLM", _ATTENTION, norms=_POST_NORMS, qk_norms="all"),
    "olmo3": _decoder("Olmo3ForCausalLM", _ATTENTION, norms=_POST_NORMS, qk_norms="all"),
    "qwen2": _decoder("Qwen2ForCausalLM", qkv_bias=_ALWAYS),
    "qwen3": _decoder("Qwen3ForCausalLM", _ATTENTION, qk_norms="head", own_head_dim=True),
    "seed_oss": _decoder("SeedOssForCausalLM", qkv_bias=Bias("attention_bias", True),
                         o_bias=Bias("attention_out_bias"), mlp_bias=_MLP, own_head_dim=True),
    "stablelm": _decoder("StableLmForCausalLM", qkv_bias=Bias("use_qkv_bias"), norm_bias=True,
                         unless=("qk_layernorm", "use_parallel_residual")),
    "starcoder2": _decoder("Starcoder2ForCausalLM", Bias("use_bias", True), tied=True,
                           mlp=("c_fc", "c_proj"), mlp_bias=Bias("use_bias", True), norm_bias=True),
}  # fmt: skip


def resolve_by_name(
    settings: Mapping[str, Any], checkpoint: Checkpoint, adapters: Sequence[Weighted]
) -> ResolvedBase | None:
    """Resolve the base with the ``config.json`` ``settings``; None if the class is needed, even if
    only to report a mismatch."""
    decoder = PLAIN.get(str(settings.get("model_type")))
    if decoder is None or settings.get("architectures") != [decoder.class_name]:
        return None
    if "auto_map" in settings:
        return None
    matrices = _matrices(decoder, settings, checkpoint)
    if matrices is None:
        return None
    updates: dict[str, list[LowRankUpdate]] = {}
    for adapter in adapters:
        products = _products(matrices, adapter)
        if products is None:
            return None
        for name, product in products.items():
            updates.setdefault(f"{name}.weight", []).append(product)
    names = [f"{HEAD}.weight", f"{EMBEDDING}.weight"]
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    return ResolvedBase(
        plain={name: name for name in checkpoint.tensors},
        shapes=shapes,
        ties=[names] if decoder.is_tied(settings) else [],
        updates=updates,
        class_name=decoder.class_name,
    )


def _matrices(
    decoder: PlainDecoder, settings: Mapping[str, Any], checkpoint: Checkpoint
) -> dict[str, tuple[int, ...]] | None:
    """Module -> the shape of its matrix. None unless the checkpoint has exactly the tensors of the
    class; a tied output layer need not be stored."""
    shapes = decoder.shapes(settings)
    if shapes is None:
        return None
    stored = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    head = f"{HEAD}.weight"
    if decoder.is_tied(settings):
        stored.setdefault(head, shapes[head])
    if stored != shapes:
        return None
    return {n.removesuffix(".weight"): shape for n, shape in shapes.items() if len(shape) == 2}


def _products(
    matrices: Mapping[str, tuple[int, ...]], adapter: Weighted
) -> dict[str, LowRankUpdate] | None:
    """Module -> its update. None unless the adapter consists of LoRA factors for linear layers of
    the decoder, and has those of every layer that its configuration names."""
    files = adapter.files
    if not _is_plain_lora(files):
        return None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in files.tensors.items():
        name, end = split_key(key, matrices)
        if name in ("", EMBEDDING, HEAD) or end not in LINEAR_FACTORS:
            return None
        factors.setdefault(name, {})[end] = value
    if {name for name in matrices if is_targeted(files.config, name)} - set(factors):
        return None
    products = {}
    for name, own in factors.items():
        product = _product(name, own, matrices[name], adapter)
        if product is None:
            return None
        products[name] = product
    return products


def _is_plain_lora(files: AdapterFiles) -> bool:
    method, config = files.method, files.config
    return (
        not files.classifies
        and isinstance(method, Lora)
        and type(method).layer_class is Lora.layer_class
        and config["peft_type"] == "LORA"
        and type(method).from_peft is Method.from_peft
        and type(method).link is Method.link
        and not config.get("modules_to_save")
        and not config.get("trainable_token_indices")
        and config.get("bias") in (None, "none")
        and config.get("target_modules") != "all-linear"
        and not config.get("target_parameters")
        and not reinitializes(config)
    )


def _product(
    name: str, factors: Mapping[str, Tensor], shape: Sequence[int], adapter: Weighted
) -> LowRankUpdate | None:
    config = adapter.files.config
    A, B = factors.get(LINEAR_FACTORS.A), factors.get(LINEAR_FACTORS.B)
    if A is None or B is None or name in adapter.files.parts:
        return None
    r = peft_rank(config, name)
    if (tuple(A.shape), tuple(B.shape)) != ((r, shape[1]), (shape[0], r)):
        return None
    try:
        scaling = peft_scaling(config, name, r)
    except AdapterError:
        return None
    return LowRankUpdate(LowRankDelta(A, B, scaling), adapter.weight)
