"""The numbers of a first recipe."""

from __future__ import annotations

import pytest

from lorakit import registry
from lorakit.errors import UserError
from lorakit.first_recipe.model import parameters_in
from lorakit.first_recipe.settings import (
    GIB,
    Hardware,
    Lengths,
    batches,
    held_out_share,
    learning_rate,
    max_length,
    quantizes,
    read_hardware,
    too_large,
)

CPU, GPU = Hardware("cpu"), Hardware("gpu", 24 * GIB)


@pytest.mark.parametrize(
    ("method", "parameters", "rate"),
    [
        ("lora", 22_000_000, 1e-3),
        ("lora", 8_000_000_000, 2e-4),
        ("lora", 630_000_000, 4e-4),  # halfway, on a logarithmic scale
        ("adalora", 22_000_000, 5e-3),
        ("lora_plus", 8_000_000_000, 4e-5),
        ("full", 22_000_000, 1e-4),
    ],
)
def test_learning_rate(method: str, parameters: int, rate: float) -> None:
    usual = registry.method(method).Config.usual_learning_rates
    assert learning_rate(usual, parameters) == rate


def test_the_rates_of_methods_relate_to_those_of_lora() -> None:
    rates = {name: m.Config.usual_learning_rates for name, m in registry.methods().items()}
    for size in (0, 1):
        assert 5 * rates["lora"][size] <= rates["adalora"][size] <= 10 * rates["lora"][size]
        assert 5 * rates["lora_plus"][size] <= rates["lora"][size]
    assert learning_rate(None, 10**8) is None


@pytest.mark.parametrize(
    ("text", "hardware"),
    [("gpu:24", GPU), ("GPU:24GB", GPU), ("gpu:80gib", Hardware("gpu", 80 * GIB)), ("cpu", CPU)],
)
def test_hardware(text: str, hardware: Hardware) -> None:
    assert read_hardware(text) == hardware


@pytest.mark.parametrize("text", ["tpu", "", "cpu:8", "gpu:", "gpu:0", "gpu:-1", "gpu:x"])
def test_other_hardware_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--hardware .*: allowed: cpu, gpu, or gpu:24"):
        read_hardware(text)


@pytest.mark.parametrize(
    ("longest", "hardware", "positions", "length"),
    [
        (50, CPU, None, 64),
        (52, CPU, None, 96),
        (5000, CPU, None, 1024),
        (5000, GPU, None, 2048),
        (400, CPU, 256, 256),
    ],
)
def test_max_length(longest: int, hardware: Hardware, positions: int | None, length: int) -> None:
    assert max_length(Lengths([1, longest]), hardware, positions) == length


def test_batches_fit_the_data() -> None:
    short, long = Lengths([10] * 100), Lengths([900] * 100)
    assert batches(CPU, "encoder", short, 32, 20_000).rows == 32
    assert batches(CPU, "causal", long, 1024, 20_000) == batches(CPU, "causal", long, 1024, None)
    few = batches(CPU, "causal", long, 1024, 100)
    assert (few.rows, few.rows_per_step, few.accumulation, few.epochs) == (4, 8, 2, 5)
    on_gpu = batches(GPU, "causal", long, 1024, 20_000)
    assert (on_gpu.rows, on_gpu.rows_per_step, on_gpu.accumulation) == ("auto", 32, 1)


def test_4_bits_only_where_16_do_not_fit() -> None:
    assert not quantizes("lora", 7_000_000_000, GPU)
    assert quantizes("lora", 14_000_000_000, GPU)
    assert not quantizes("lora", 14_000_000_000, Hardware("gpu", 80 * GIB))
    assert not quantizes("full", 14_000_000_000, GPU)
    assert not quantizes("lora", 14_000_000_000, CPU)
    assert not quantizes("lora", None, GPU)


def test_the_share_for_validation() -> None:
    assert held_out_share(9) is None
    assert held_out_share(500) == 0.1
    assert held_out_share(1_000_000) == 0.001


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen3-8B", 8_000_000_000),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000),
        ("meta-llama/Llama-3.2-1.5b", 1_500_000_000),
        ("mistralai/Mixtral-8x7B-v0.1", 56_000_000_000),
        ("some/model", None),
        ("8B/model", None),
    ],
)
def test_parameters_in_a_name(name: str, parameters: int | None) -> None:
    assert parameters_in(name) == parameters


@pytest.mark.parametrize(
    ("method", "parameters", "need"),
    [
        ("lora", 8_000_000_000, None),
        ("lora", 70_000_000_000, "48 GiB"),  # quantized to 4 bits, with its scales and the rest
        ("bitfit", 8_000_000_000, None),  # biases only: no gradients of the weights
        ("bitfit", 14_000_000_000, "28 GiB"),
        ("full", 1_000_000_000, None),
        ("full", 8_000_000_000, "134 GiB"),
    ],
)
def test_what_does_not_fit_on_the_gpu(method: str, parameters: int, need: str | None) -> None:
    note = too_large(method, parameters, GPU)
    assert note is None if need is None else f"about {need} to train" in str(note)
    assert too_large(method, parameters, CPU) is None
