"""How long the steps of a run take: an estimate from what is known about the GPU."""

from __future__ import annotations

from lorakit.planning.batches import RunBatches
from lorakit.planning.devices import PlannedDevice
from lorakit.planning.passes import PassCosts

#: The share of a GPU's peak rate that large matrix products reach in training.
_PRODUCT_SHARE = 0.6
#: The products with a base in fp8 are twice as fast, but those of attention and the adapter.
_FP8_SPEEDUP = 1.5
#: The time of a kernel besides its work: launched from Python, or replayed.
_LAUNCH_SECONDS = {"eager": 10e-6, "cuda_graphs": 3.3e-6, "compiled_layers": 8e-6}
#: Results are written once and read about twice.
_PASSES_OVER_RESULTS = 3


def seconds_per_step(
    costs: PassCosts, batches: RunBatches, mode: str, fp8: bool, device: PlannedDevice
) -> float | None:
    """The mean time of a step, with a base in ``fp8`` or not; None if the rates of the device are
    unknown."""
    if device.gpu is None:
        return None
    share = batches.padded_tokens_per_step / costs.tokens  # of the largest batch
    rate = _PRODUCT_SHARE * device.gpu.flops_per_second * (_FP8_SPEEDUP if fp8 else 1)
    products = costs.flops / rate
    results = _PASSES_OVER_RESULTS * costs.written / device.gpu.bytes_per_second
    work = share * (products + results)
    launches = batches.passes_per_step * costs.kernels * _LAUNCH_SECONDS[mode]
    return work + launches if mode == "cuda_graphs" else max(work, launches)
