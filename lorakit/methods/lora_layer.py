"""The layers of LoRA and MoSLoRA, and how the factors of a low-rank update are initialized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.base_weight import RowView
from lorakit.errors import AdapterError, TargetError
from lorakit.kernels.fp8 import Fp8Weight, fp8_linear
from lorakit.kernels.lora_linear import lora_linear
from lorakit.kernels.low_rank import LowRankDelta, RowSlice, is_covered_by, lora_add_
from lorakit.layers import AdapterLayer, CompositeLayer
from lorakit.models.fp8 import Fp8Linear, can_quantize, quantize_linear
from lorakit.models.nf4 import Nf4Linear, Nf4Stack, stack
from lorakit.models.quantized import QuantizedLinear

#: Matrices no larger than this in one dimension are decomposed exactly.
_EXACT_SVD = 1024


class LoraLayer(AdapterLayer):
    """y = W x + b + scaling * B A dropout(x): ``lora_A`` (r, in) and ``lora_B`` (out, r), or (E, r,
    in) and (E, out, r) for a stack of E matrices.

    With ``init: pissa`` the product of the initial factors, ``initial_A`` and ``initial_B``, is
    subtracted again, so that W itself is not modified and the initial output is the base's.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None
    staged: tuple[Tensor, Tensor] | None = None  # ``factors`` of the pass that runs, already cast
    fused: bool = False  # whether one operator may compute the output in compiled models
    shared_input: SharedInput | None = None
    slot: int = 0  # in shared_input

    def __init__(
        self, base_layer: nn.Module, *, r: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer, r=r, scaling=scaling)
        self.lora_A = self.new_parameter(*self.stack, r, self.in_features)
        self.lora_B = self.new_parameter(*self.stack, self.out_features, r)
        self.lora_dropout = nn.Dropout(dropout)
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)

    def reset_parameters(self, init: str, name: str) -> None:
        """Initialize as ``adapter.init`` says; ``name``, the module's, is for errors.

        - ``default``: A Kaiming-uniform as in loralib, B zero; an embedding has A zero and B
          standard Gaussian, as in loralib.
        - ``b_gaussian``: A zero, B Gaussian of variance 1 / r, so that B h is about as large as h.
        - ``pissa`` (Meng et al. 2024, arXiv 2404.02948, section 3): with W = U S V^T,
          A = (S_r / scaling)^(1/2) V_r^T and B = U_r (S_r / scaling)^(1/2), as in PEFT.
        - ``orthogonal``: A is made from one half of the rows of a random orthogonal Q (r, r) and B
          from the other, mixed with Gaussians of standard deviation 0.1, so that B A = 0 although
          neither is zero.

        Random values come from torch's default generator. Raises TargetError for an odd r with
        ``orthogonal``, and for an r above the rank of W with ``pissa``.
        """
        if init == "pissa":
            self._start_from_principal(name)
        elif init == "orthogonal":
            self._start_orthogonal(name)
        else:
            self._start_at_zero(b_random=init == "b_gaussian" or self.kind == "embedding")

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update; with ``pissa``, the trained and the initial ones concatenated."""
        if self.initial_A is None or self.initial_B is None:
            return self.staged or (self.lora_A, self.lora_B)
        A = torch.cat([self.lora_A, self.initial_A])
        return A, torch.cat([self.lora_B, -self.initial_B], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and torch.compiler.is_compiling() and self.is_plain():
            y = None if self.shared_input is None else self.shared_input.output(self.slot, x)
            if y is None:
                flat = x.reshape(-1, self.in_features)
                [y] = _product(flat, self.base_layer, [self.factors()], [self.scaling])
            return y.view(*x.shape[:-1], self.out_features)
        return super().forward(x)

    def is_plain(self) -> bool:
        """Whether one operator computes the output: without dropout, on a linear layer that is
        stored in half precision or quantized from it."""
        base = self.base_layer
        if type(base) is nn.Linear:
            dtype = base.weight.dtype
        elif isinstance(base, QuantizedLinear):
            dtype = base.dtype
        else:
            return False
        half = dtype in (torch.bfloat16, torch.float16)
        dropout = self.training and self.lora_dropout.p > 0
        return half and not dropout and type(self).update is LoraLayer.update

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return lora_add_(y, self.lora_dropout(x), *self.factors(), self.scaling)

    def embed(self, ids: Tensor) -> Tensor:
        return self.add_embedding(self.base_forward(ids), ids, *self.factors())

    def add_embedding(self, y: Tensor, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """``y`` plus the columns of scaling * B A for the ids."""
        update = F.linear(F.embedding(ids, A.t()).to(y.dtype), B.to(y.dtype))
        return y + update * (self.scaling * self.embed_scale)

    def delta_weight(self) -> Tensor:
        """scaling * B A, float32 (out, in), or a stack of these."""
        A, B = self.factors()
        return LowRankDelta(A, B, self.scaling).dense()

    def low_rank(self) -> LowRankDelta | None:
        own = type(self)
        if self.stack or own.delta_weight is not LoraLayer.delta_weight:
            return None
        if own.merged_weight is not AdapterLayer.merged_weight:
            return None
        A, B = self.factors()
        return LowRankDelta(A.detach(), B.detach(), self.scaling)

    @property
    def saved_rank(self) -> int:
        return self.r if self.initial_A is None else 2 * self.r

    @classmethod
    def join(cls, composite: CompositeLayer) -> LoraLayer:
        """Stack the A of the parts, and place each B in its own rows and columns, with zeros
        elsewhere: the same update bit for bit, whose rank is the sum of the parts' ranks."""
        parts = {
            name: part for name, part in composite.parts.items() if isinstance(part, LoraLayer)
        }
        factors = {name: part.factors() for name, part in parts.items()}
        A = torch.cat([A.detach() for A, _ in factors.values()])
        first = next(iter(parts.values()))
        layer = cls(composite.base_layer, r=len(A), scaling=first.scaling)
        B = A.new_zeros(layer.out_features, layer.r)
        at = 0
        for name, (_, own) in factors.items():
            columns = B[:, at : at + own.shape[1]]
            scale = parts[name].scaling / first.scaling
            composite.rows(name).put(columns, own.detach() * scale)
            at += own.shape[1]
        layer.set_factors(A, B)
        layer.lora_dropout = first.lora_dropout
        return layer

    def split(self, parts: Mapping[str, tuple[RowSlice, int]]) -> CompositeLayer:
        for name, (rows, _) in parts.items():
            if not rows.fit(self.out_features):
                raise AdapterError(
                    f"the part {name}, {rows}, does not fit {self.out_features} rows"
                )
        if not is_covered_by(self.lora_B, parts.values()):
            raise AdapterError(f"the parts {', '.join(parts)} do not cover all of lora_B")
        found, at = {}, 0
        for name, (rows, r) in parts.items():
            columns = slice(at, at + r)
            part = type(self)(RowView(self.base_layer, rows), r=r, scaling=self.scaling)
            B = rows.of(self.lora_B[:, columns])
            part.set_factors(self.lora_A[columns].detach().clone(), B.detach().clone())
            part.lora_dropout = self.lora_dropout
            found[name] = part
            at += r
        return CompositeLayer(self.base_layer, found)

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Replace A and B by frozen parameters with these values."""
        self.lora_A = nn.Parameter(A, requires_grad=False)
        self.lora_B = nn.Parameter(B, requires_grad=False)

    def _start_at_zero(self, b_random: bool) -> None:
        nn.init.zeros_(self.lora_A if b_random else self.lora_B)
        if self.kind == "embedding":
            nn.init.normal_(self.lora_B)
        elif b_random:
            nn.init.normal_(self.lora_B, std=1 / math.sqrt(self.r))
        else:
            nn.init.kaiming_uniform_(self.lora_A.detach().flatten(0, -2), a=math.sqrt(5))

    @torch.no_grad()
    def _start_from_principal(self, name: str) -> None:
        if self.r > (limit := min(self.base_shape)):
            raise TargetError(
                f"adapter.r = {self.r}: init: pissa on {name}; allowed: up to {limit}"
            )
        left, values, right = _principal(self.dense_weight().float(), self.r)
        root = (values / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * right.t())
        self.lora_B.copy_(left * root)
        self.initial_A, self.initial_B = self.lora_A.clone(), self.lora_B.clone()

    @torch.no_grad()
    def _start_orthogonal(self, name: str) -> None:
        if self.r % 2:
            raise TargetError(
                f"adapter.r = {self.r}: init: orthogonal on {name}; allowed: even ranks"
            )
        half = self.r // 2
        q, _ = torch.linalg.qr(torch.randn(self.r, self.r))
        mix_A = torch.randn(self.in_features, half) * 0.1
        mix_B = torch.randn(self.out_features, half) * 0.1
        self.lora_A.copy_((mix_A @ q[:half]).t())
        self.lora_B.copy_(mix_B @ q[half:])


class SharedInput:
    """LoRA layers that read one tensor, such as q, k and v, as a single product in compiled models.

    ``layers`` are plain, their bases of one class, and in the order in which the model calls them.
    With ``stacks``, their frozen weights are stacked in memory, and each stays a view of its rows.
    The first layer computes the outputs of all, and the others return theirs if they are called
    with the same tensor.
    """

    base: nn.Linear | Fp8Linear | Nf4Stack | None = None  # the stacked weights

    def __init__(self, layers: Sequence[LoraLayer], stacks: bool = True) -> None:
        self.layers = list(layers)
        quantized = [b for layer in layers if isinstance(b := layer.base_layer, Nf4Linear)]
        if quantized:
            self.base = stack(quantized)
        elif stacks:
            self.base = _stacked(layers)
        for slot, layer in enumerate(layers):
            layer.shared_input, layer.slot = self, slot
        self._x: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def quantize(self) -> bool:
        """Keep the stacked weights in fp8, of which each layer gets a view of its rows; False if
        fp8 does not support them."""
        if not (isinstance(self.base, nn.Linear) and can_quantize(self.base)):
            return False
        self.base = quantize_linear(self.base)
        start = 0
        for layer in self.layers:
            rows = slice(start, start + layer.out_features)
            by_row, row_scale, by_column, column_scale = self.base.quantized
            own = Fp8Weight(by_row[rows], row_scale[:, rows], by_column[:, rows], column_scale)
            layer.base_layer = Fp8Linear(own, layer.bias, self.base.dtype)
            start = rows.stop
        return True

    def output(self, slot: int, x: Tensor) -> Tensor | None:
        """The output (n, out_features) of the layer ``slot`` for ``x`` (..., in_features); None if
        the first layer was called with another tensor."""
        if slot == 0:
            self._x, self._outputs = x, self._compute(x.reshape(-1, x.shape[-1]))
        elif self._x is not x:
            return None
        y = self._outputs[slot]
        if slot == len(self.layers) - 1:
            self._x, self._outputs = None, ()
        return y

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        factors = [layer.factors() for layer in self.layers]
        scaling = [layer.scaling for layer in self.layers]
        if self.base is not None:
            return _product(x, self.base, factors, scaling)
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        return lora_linear(x, [layer.weight for layer in self.layers], bias, factors, scaling)


class MosLoraLayer(LoraLayer):
    """y = W x + b + scaling * B M A dropout(x), with a trained ``lora_mixer`` M (r, r)."""

    def __init__(
        self, base_layer: nn.Module, *, r: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer, r=r, scaling=scaling, dropout=dropout)
        self.lora_mixer = self.new_parameter(r, r)

    def reset_parameters(self, init: str, name: str) -> None:
        super().reset_parameters(init, name)
        nn.init.orthogonal_(self.lora_mixer)

    def factors(self) -> tuple[Tensor, Tensor]:
        """LoRA's A and B of the same update: M A and B."""
        return self.lora_mixer @ self.lora_A, self.lora_B

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """In evaluation, compute what the plain LoRA that is saved computes: in half precision, a
        separate product with the mixer would round once more, and the metrics would differ from
        those of the saved adapter."""
        if not self.training:
            return super().update(x, y)
        x = self.lora_dropout(x)
        h = F.linear(x, self.lora_A.to(x.dtype))
        return lora_add_(y, h, self.lora_mixer, self.lora_B, self.scaling)

    def embed(self, ids: Tensor) -> Tensor:
        """In training, use B M and A, since M A would be as large as the vocabulary."""
        if not self.training:
            return super().embed(ids)
        B = self.lora_B @ self.lora_mixer
        return self.add_embedding(self.base_forward(ids), ids, self.lora_A, B)

    @classmethod
    def join(cls, composite: CompositeLayer) -> LoraLayer:
        """Join the parts as a LoRA layer, with the mixers folded in."""
        return LoraLayer.join(composite)


def _stacked(layers: Sequence[LoraLayer]) -> nn.Linear:
    """The bases of ``layers`` as one, of which each gets a view of its rows."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    weight = torch.cat([layer.weight for layer in layers])
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        base.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    rows = weight.split([layer.out_features for layer in layers])
    for layer, own in zip(layers, rows, strict=True):
        layer.base_layer.weight = nn.Parameter(own, requires_grad=False)
    return base


def _product(
    x: Tensor, base: Any, factors: list[tuple[Tensor, Tensor]], scaling: list[float]
) -> tuple[Tensor, ...]:
    """The outputs of LoRA layers whose weights are stacked in ``base``."""
    if isinstance(base, Fp8Linear):
        return fp8_linear(x, base.quantized, base.bias, factors, scaling)
    weight = base.quantized if isinstance(base, Nf4Linear) else base.weight
    return lora_linear(x, weight, base.bias, factors, scaling)


def _principal(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), V (in, r): exact for small matrices, else by subspace iteration."""
    if min(weight.shape) <= _EXACT_SVD:
        left, values, right_t = torch.linalg.svd(weight, full_matrices=False)
        right = right_t.t()
    else:
        left, values, right = torch.svd_lowrank(weight, q=r + 8, niter=8)
    return left[:, :r], values[:r], right[:, :r]
