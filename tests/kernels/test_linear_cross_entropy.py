"""Chunked linear cross entropy compared with torch on the full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels import linear_cross_entropy as module
from lorakit.kernels.linear_cross_entropy import (
    IGNORED,
    LogitTransform,
    checkpointed_cross_entropy,
    linear_cross_entropy,
    rows_per_chunk,
)

VOCAB, WIDTH = 50, 12


@pytest.fixture(params=[1, 3, 8, 100], ids=lambda rows: f"{rows}-rows-a-chunk")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Eight rows in chunks of one, of three (the last one is shorter), of eight, and of more."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": request.param * VOCAB})
    rows: int = request.param
    return rows


def _case(
    dtype: torch.dtype = torch.float32, rows: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    return hidden, weight, bias, torch.randint(VOCAB, (rows,), generator=generator)


def _reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    label_smoothing: float,
    transform: LogitTransform,
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return F.cross_entropy(
        logits.float(), targets, reduction="sum", label_smoothing=label_smoothing
    )


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.3), LogitTransform(1.0, 5.0), LogitTransform(2.0, 3.0)]
)  # fmt: skip
def test_value_and_gradient(
    transform: LogitTransform, label_smoothing: float, with_bias: bool
) -> None:
    hidden, weight, bias, targets = _case()
    arguments = (weight, bias if with_bias else None, targets, label_smoothing, transform)
    loss = linear_cross_entropy(hidden, *arguments)
    (got,) = torch.autograd.grad(loss * 0.25, hidden)
    want_loss = _reference(hidden, *arguments)
    (want,) = torch.autograd.grad(want_loss * 0.25, hidden)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_bfloat16(label_smoothing: float) -> None:
    """The loss is summed in float32; the gradient is as accurate as bfloat16 logits allow."""
    hidden, weight, bias, targets = _case(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, bias, targets, label_smoothing)
    (got,) = torch.autograd.grad(loss, hidden)
    assert (loss.dtype, got.dtype) == (torch.float32, torch.bfloat16)
    exact = hidden.detach().float().requires_grad_()
    want_loss = _reference(
        exact, weight.float(), bias.float(), targets, label_smoothing, LogitTransform()
    )
    (want,) = torch.autograd.grad(want_loss, exact)
    torch.testing.assert_close(loss, want_loss, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2)


def test_no_rows_cost_nothing() -> None:
    hidden, weight, bias, targets = _case(rows=0)
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None


def test_without_gradients_the_hidden_states_get_none() -> None:
    hidden, weight, bias, targets = _case()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, bias, targets)
    assert not loss.requires_grad
    want = _reference(hidden, weight, bias, targets, 0.0, LogitTransform())
    torch.testing.assert_close(loss, want.detach())


@pytest.mark.usefixtures("chunk")
def test_ignored_rows_have_no_loss_and_no_gradient() -> None:
    hidden, weight, bias, targets = _case()
    targets[[1, 6]] = IGNORED
    loss = linear_cross_entropy(hidden, weight, bias, targets, 0.1)
    (got,) = torch.autograd.grad(loss, hidden)
    want_loss = _reference(hidden, weight, bias, targets, 0.1, LogitTransform())
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(got, torch.autograd.grad(want_loss, hidden)[0])
    assert not got[[1, 6]].any()


def test_the_logits_of_all_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 2 * VOCAB})
    seen: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    hidden, weight, bias, targets = _case(rows=16)
    with Watch():
        linear_cross_entropy(hidden, weight, bias, targets).backward()
    assert 2 * VOCAB in seen
    assert max(seen) < 16 * VOCAB


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_checkpointed_form_also_trains_the_head(label_smoothing: float) -> None:
    hidden, weight, bias, targets = _case()
    head = torch.nn.Linear(WIDTH, VOCAB)
    head.weight.data, head.bias.data = weight, bias
    inputs = [hidden, head.weight, head.bias]
    loss = checkpointed_cross_entropy(head, hidden, targets, VOCAB, label_smoothing)
    got = torch.autograd.grad(loss, inputs)
    want_loss = _reference(
        hidden, head.weight, head.bias, targets, label_smoothing, LogitTransform()
    )
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    for mine, reference in zip(got, torch.autograd.grad(want_loss, inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_weights_of_rows(label_smoothing: float, dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = _case(dtype)
    targets[3] = IGNORED
    row_weights = torch.tensor([0.25, 1, 3, 7, 0, 2, 1e-3, 1])
    each = F.cross_entropy(
        F.linear(hidden, weight, bias).float(),
        targets,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    want_loss = (each * row_weights).sum()
    (want,) = torch.autograd.grad(want_loss * 0.25, hidden)
    options = {"label_smoothing": label_smoothing, "row_weights": row_weights}
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for loss in (
        linear_cross_entropy(hidden, weight, bias, targets, **options),  # type: ignore[arg-type]
        checkpointed_cross_entropy(
            lambda rows: F.linear(rows, weight, bias), hidden, targets, VOCAB, **options
        ),  # type: ignore[arg-type]
    ):
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
        (got,) = torch.autograd.grad(loss * 0.25, hidden)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("vocab", "rows"), [(128_256, 2048), (32_000, 8192), (2**20, 256), (3 * 2**20, 85), (2**30, 1)]
)
def test_chunks_on_a_gpu_are_whole_tiles(vocab: int, rows: int) -> None:
    assert rows_per_chunk(vocab, torch.device("cuda"), fused=True) == rows
