"""The seeded Fastfood projection compared with a dense P, its formula and its statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.kernels import fastfood
from lorakit.kernels.fastfood import Fastfood, hadamard, project

#: d and size: d a power of two or not, one value, less than a block, whole blocks, a part left.
SHAPES = [
    (1, 1), (1, 7), (2, 5), (3, 4), (8, 32), (8, 3), (13, 100), (64, 1), (100, 1000), (300, 40),
]  # fmt: skip

#: What the generator gives for the names in test_the_generator_is_pinned.
PINNED = [
    1.1092185, -1.0845003, -0.94285047, -3.0164542, -2.3635058,
    -0.65539581, -1.7232591, 1.081923, -2.9253392, 2.0316362,
]  # fmt: skip
PINNED_ORDER = [[3, 4, 0, 2, 1, 6, 5, 7]]
PINNED_SIGNS = [[1, -1, 1, 1, -1, -1, -1, 1]]


def _dense(d: int, size: int, seed: int = 1, stream: int = 0) -> Tensor:
    """Return P (size, d), column by column: P e_j."""
    basis = torch.eye(d, dtype=torch.float64)
    return torch.stack([project(column, size, seed, stream) for column in basis], dim=1)


def _sylvester(L: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < L:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    return H


@pytest.mark.parametrize("L", [1, 2, 4, 64])
def test_hadamard_is_the_sylvester_matrix(L: int) -> None:
    x = torch.randn(5, L, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ _sylvester(L).t())


@pytest.mark.parametrize(("d", "size"), SHAPES)
def test_the_matrix_is_the_formula(d: int, size: int) -> None:
    """P_b = H G Pi H S / sqrt(d L) from dense matrices, blocks stacked."""
    P = Fastfood(d, size, seed=1, stream=0)
    H, blocks = _sylvester(P.L), []
    for S, order, G in zip(*P.random_parts(torch.arange(-(-size // P.L))), strict=True):
        assert sorted(order.tolist()) == list(range(P.L))
        assert set(S.tolist()) <= {-1.0, 1.0}
        Pi = torch.eye(P.L, dtype=torch.float64)[order]
        blocks.append(H @ G.double().diag() @ Pi @ H @ S.double().diag() / (d * P.L) ** 0.5)
    torch.testing.assert_close(_dense(d, size), torch.cat(blocks)[:size, :d])


@pytest.mark.parametrize(("d", "size"), SHAPES)
def test_values_and_gradient_are_those_of_the_dense_matrix(d: int, size: int) -> None:
    P = _dense(d, size)
    theta = torch.randn(d, dtype=torch.float64, requires_grad=True)
    values = project(theta, size, 1, 0)
    torch.testing.assert_close(values, P @ theta)
    g = torch.randn(size, dtype=torch.float64)
    (got,) = torch.autograd.grad(values, theta, g)
    torch.testing.assert_close(got, P.t() @ g)


def test_gradients_of_both_orders() -> None:
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss(theta: Tensor) -> Tensor:
        return project(theta, 21, 1, 0).pow(3).sum()

    assert torch.autograd.gradcheck(loss, theta)
    assert torch.autograd.gradgradcheck(loss, theta)


@pytest.mark.parametrize(("d", "size"), [(1, 50), (13, 100), (100, 1000)])
@pytest.mark.parametrize("elements", [1, 48, 300])
def test_chunks_change_nothing(
    d: int, size: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta, g = torch.randn(d, requires_grad=True), torch.randn(size)
    whole = project(theta, size, 1, 0)
    (whole_grad,) = torch.autograd.grad(whole, theta, g)
    monkeypatch.setattr(fastfood, "CHUNK_ELEMENTS", {"cpu": elements})
    chunked = project(theta, size, 1, 0)
    (chunked_grad,) = torch.autograd.grad(chunked, theta, g)
    assert torch.equal(chunked, whole)
    torch.testing.assert_close(chunked_grad, whole_grad)


@pytest.mark.parametrize("d", [64, 100])
def test_scale_and_near_orthogonality_of_columns(d: int) -> None:
    """Rows have norm 1, columns sqrt(size / d). Two columns have a cosine of mean square 2 / size:
    in a block it is the mean of +-G_k^2, half of them negative, and G_k^2 has variance 2."""
    size = 20_000
    P = _dense(d, size)
    assert P.square().sum(dim=1).mean().item() == pytest.approx(1, abs=0.03)
    assert P.mean().item() == pytest.approx(0, abs=4 / (d * size) ** 0.5)
    gram = P.t() @ P * (d / size)
    torch.testing.assert_close(gram.diag(), torch.ones(d, dtype=gram.dtype), rtol=0, atol=0.1)
    cosines = gram - gram.diag().diag()
    assert cosines.abs().max() < 5.5 * (2 / size) ** 0.5
    assert cosines.square().sum().item() / (d * (d - 1)) == pytest.approx(2 / size, rel=0.15)


def test_rows_are_near_orthogonal_within_and_between_blocks() -> None:
    """Cosines have mean square 1/d between blocks, like independent vectors, and 2/d within."""
    d, blocks = 256, 6
    rows = torch.nn.functional.normalize(_dense(d, d * blocks), dim=1)
    cosines = (rows @ rows.t()).view(blocks, d, blocks, d).transpose(1, 2)
    same = torch.eye(blocks, dtype=torch.bool)
    within, between = cosines[same] - torch.eye(d), cosines[~same]
    assert between.square().mean().item() == pytest.approx(1 / d, rel=0.03)
    assert within.square().mean().item() == pytest.approx(2 / d, rel=0.3)
    assert max(within.abs().max(), between.abs().max()) < 0.5


def test_the_random_parts_are_uniform_and_normal() -> None:
    n, L = 2000, 64
    S, order, G = Fastfood(L, n * L, seed=3, stream=5).random_parts(torch.arange(n))
    assert abs(S.mean().item()) < 4 / (n * L) ** 0.5
    # Positions after the permutation: chi-square of the L x L table, mean L^2, deviation sqrt(2) L.
    table = torch.zeros(L, L).index_put_(
        (torch.arange(L).expand(n, L), order), torch.ones(()), accumulate=True
    )
    chi_square = ((table - n / L).square() / (n / L)).sum().item()
    assert abs(chi_square - L * L) < 5 * 2**0.5 * L
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(G.pow(power).mean().item() - moment) < 4 * (variance / (n * L)) ** 0.5
    for one, other in ((S, G), (S[1:], S[:-1]), (G[1:], G[:-1]), (G[:, 1:], G[:, :-1])):
        assert abs((one * other).mean().item()) < 4 / (n * L) ** 0.5


def test_a_name_gives_one_matrix() -> None:
    theta = torch.randn(20)
    values = project(theta, 500, seed=7, stream=3)
    torch.manual_seed(0)
    assert torch.equal(project(theta, 500, seed=7, stream=3), values)
    assert torch.equal(project(theta, 77, seed=7, stream=3), values[:77])
    others = [(8, 3), (7, 4), (3, 7), (7 + 2**32, 3), (2**64 - 1, 3), (7, 2**32 - 1), (0, 0)]
    matrices = [values, *(project(theta, 500, *name) for name in others)]
    cosines = torch.corrcoef(torch.stack(matrices)) - torch.eye(len(matrices))
    assert cosines.abs().max() < 0.25


def test_no_generator_of_torch_is_used_or_moved() -> None:
    before = torch.get_rng_state()
    project(torch.randn(3, generator=torch.Generator()), 10, 1, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_pinned() -> None:
    """A saved theta depends on these matrices: if this fails, every saved one has become
    invalid."""
    theta = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25])
    values = project(theta, 10, seed=42, stream=7)
    assert values.tolist() == pytest.approx(PINNED, rel=1e-6)
    S, order, _ = Fastfood(5, 10, seed=2**40 + 1, stream=2**20).random_parts(torch.tensor([9]))
    assert order.tolist() == PINNED_ORDER
    assert S.tolist() == PINNED_SIGNS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_arithmetic_is_float32(dtype: torch.dtype, default: torch.dtype) -> None:
    theta = torch.randn(20).to(dtype).requires_grad_()
    g = torch.randn(90)
    exact = theta.detach().double().requires_grad_()
    want = project(exact, 90, 1, 0)
    assert want.dtype == torch.float64
    torch.set_default_dtype(default)
    try:
        values = project(theta, 90, 1, 0)
        (grad,) = torch.autograd.grad(values, theta, g)
    finally:
        torch.set_default_dtype(torch.float32)
    (want_grad,) = torch.autograd.grad(want, exact, g.double())
    assert (values.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(values, want.float())
    torch.testing.assert_close(grad, want_grad.to(dtype))


def test_nothing_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    theta = torch.randn(30, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = project(theta, 1000, 1, 0)
    assert kept == []
    assert not any(isinstance(value, Tensor) for value in vars(values.grad_fn).values())
    values.sum().backward()
    assert theta.grad is not None


def test_trains_after_a_first_call_in_inference_mode() -> None:
    fastfood.gaussian_table.cache_clear()
    theta = torch.randn(4, requires_grad=True)
    with torch.inference_mode():
        project(theta, 10, 1, 0)
    project(theta, 10, 1, 0).square().sum().backward()
    assert theta.grad is not None


@pytest.mark.parametrize(
    ("theta", "size", "seed", "stream"),
    [
        (torch.zeros(2, 2), 3, 0, 0), (torch.zeros(0), 3, 0, 0), (torch.zeros(2), 0, 0, 0),
        (torch.zeros(2), 3, -1, 0), (torch.zeros(2), 3, 2**64, 0), (torch.zeros(2), 3, 0, -1),
        (torch.zeros(2), 3, 0, 2**32),
    ],
)  # fmt: skip
def test_invalid_arguments_are_rejected(theta: Tensor, size: int, seed: int, stream: int) -> None:
    with pytest.raises(AssertionError):
        project(theta, size, seed, stream)


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "size"), [*SHAPES, (500, 3_000_000)])
def test_cuda_gives_the_same_bits(d: int, size: int) -> None:
    P = Fastfood(d, size, seed=1, stream=2)
    blocks = torch.arange(min(-(-size // P.L), 100))
    for ours, theirs in zip(P.random_parts(blocks), P.random_parts(blocks.cuda()), strict=True):
        assert torch.equal(ours, theirs.cpu())
    theta, g = torch.randn(d, requires_grad=True), torch.randn(size)
    on_gpu = theta.detach().cuda().requires_grad_()
    values = project(theta, size, 1, 2)
    gpu_values = project(on_gpu, size, 1, 2)
    assert torch.equal(values, gpu_values.cpu())
    (grad,) = torch.autograd.grad(values, theta, g)
    (gpu_grad,) = torch.autograd.grad(gpu_values, on_gpu, g.cuda())
    torch.testing.assert_close(gpu_grad.cpu(), grad, rtol=1e-4, atol=1e-5 * size**0.5)


def test_torch_compile_does_not_trace_the_product() -> None:
    nodes: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    theta = torch.randn(24)
    compiled = torch.compile(lambda t: project(t * 2, 600, 3, 1) + 1, backend=backend)
    assert torch.equal(compiled(theta), project(theta * 2, 600, 3, 1) + 1)
    assert sum(nodes) < 12, "a step would wait minutes for the first one"
