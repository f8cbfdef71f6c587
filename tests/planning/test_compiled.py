"""What compiled layers keep: the same numbers as real tensors with the same division."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

import lorakit
from lorakit.planning.compiled import most_in_use
from tests.training.runs import recipe_for

SIZE = 4 * 256 * 256


def traced(function: object) -> fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.ones(256, 256)
    return make_fx(function, tracing_mode="fake")(x).graph  # type: ignore[arg-type]


def test_element_wise_results_are_not_stored() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        product = x @ x
        return (product.sin() * 2 + product.cos()) @ x

    # The first product, what the second one reads, and its result; but for that, never all three.
    assert most_in_use(traced(function), {}) == 2 * SIZE


def test_an_operator_has_memory_of_its_own() -> None:
    graph = traced(lambda x: x @ x)
    assert most_in_use(graph, {"aten.mm": lambda x, y: 7 * SIZE}) == 8 * SIZE


@pytest.mark.slow
def test_compiled_layers_keep_less_than_eager_ones(tiny_llama: Path, tmp_path: Path) -> None:
    kept = {}
    for compiled in (False, True):
        recipe = recipe_for(tmp_path, tiny_llama, model__dtype="bfloat16", train__compile=compiled)
        step = lorakit.plan(recipe, gpu="h100").step
        assert step.mode == ("compiled_layers" if compiled else "eager")
        kept[compiled] = step.costs.activations
    assert 0 < kept[True] < 0.9 * kept[False]
