"""The device that a run is planned for: this machine's, or another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.errors import UserError, did_you_mean, parse_size, shown
from lorakit.models.load import default_device, device_memory_bytes
from lorakit.training.batch_size import USABLE_SHARE

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """``memory_bytes`` as PyTorch reports it; the peak rate of products in bfloat16 without
    sparsity, and the bandwidth of its memory."""

    name: str
    memory_bytes: int
    flops_per_second: float
    bytes_per_second: float


#: By the name of ``--gpu``. Rates are those of the vendor's data sheets.
GPUS = {
    "l4": Gpu("NVIDIA L4", int(22.0 * _GIB), 121e12, 0.30e12),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", int(23.6 * _GIB), 71e12, 0.94e12),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", int(23.6 * _GIB), 165e12, 1.01e12),
    "a10g": Gpu("NVIDIA A10G", int(22.1 * _GIB), 70e12, 0.60e12),
    "l40s": Gpu("NVIDIA L40S", int(44.4 * _GIB), 362e12, 0.86e12),
    "a100-40gb": Gpu("NVIDIA A100 40GB", int(39.4 * _GIB), 312e12, 1.56e12),
    "a100": Gpu("NVIDIA A100 80GB", int(79.2 * _GIB), 312e12, 2.04e12),
    "h100": Gpu("NVIDIA H100 80GB", int(79.2 * _GIB), 989e12, 3.35e12),
    "h200": Gpu("NVIDIA H200", int(139.8 * _GIB), 989e12, 4.80e12),
}


@dataclass(frozen=True)
class PlannedDevice:
    """``memory_bytes`` is what the device has; ``gpu`` is None if its rates are unknown."""

    device: torch.device
    memory_bytes: int
    name: str
    gpu: Gpu | None = None

    @property
    def usable_bytes(self) -> int:
        """What a run can use of the memory."""
        return int(USABLE_SHARE * self.memory_bytes)


def planned_device(gpu: str | None = None, memory: str | int | None = None) -> PlannedDevice:
    """The device of a plan: ``gpu``, a key of ``GPUS``, a GPU with this much ``memory``, such as
    ``80GB``, or else this machine's. Raises UserError for other values."""
    size = None if memory is None else parse_size(memory, "--device-memory")
    if gpu is not None:
        key = gpu.lower()
        if key not in GPUS and (base := key.partition("-")[0]) in GPUS:
            raise UserError(
                f"--gpu = {shown(gpu)}: unknown GPU (did you mean {base!r}?); its memory is set by "
                "--device-memory"
            )
        if key not in GPUS:
            message = did_you_mean(f"--gpu = {shown(gpu)}: unknown GPU", key, GPUS)
            raise UserError(f"{message}; allowed: {', '.join(GPUS)}, or --device-memory 24GB")
        found = GPUS[key]
        return PlannedDevice(torch.device("cuda"), size or found.memory_bytes, found.name, found)
    if size is not None:
        return PlannedDevice(torch.device("cuda"), size, "a GPU")
    return _own()


def _own() -> PlannedDevice:
    device = default_device()
    memory_bytes = device_memory_bytes(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return PlannedDevice(device, memory_bytes, name, _known(name))
    kind = "the Apple GPU" if device.type == "mps" else "the CPU"
    return PlannedDevice(device, memory_bytes, kind)


def _known(name: str) -> Gpu | None:
    """The GPU whose name is the beginning of ``name``, the longest such one."""
    matching = [gpu for gpu in GPUS.values() if name.startswith(gpu.name)]
    return max(matching, key=lambda gpu: len(gpu.name), default=None)
