"""The GPUs: which torch can use, their memory, and whether they are partitions (MIG)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.doctor.finding import Finding
from lorakit.doctor.versions import driver_version, nvidia_smi
from lorakit.errors import memory_size

_AREA = "gpu"
#: A smaller share of free memory means that another process uses the GPU.
_LEAST_FREE_SHARE = 0.5
_DEVICE = Path("/dev/nvidia0")


def gpu_findings(torch: Any) -> Iterator[Finding]:
    """What torch sees of the GPUs; without any, training runs on the CPU."""
    if not torch.cuda.is_available():
        yield _without_gpu(torch)
        return
    for index in range(torch.cuda.device_count()):
        yield from _device(torch, index)
    mode = nvidia_smi("mig.mode.current")
    partitioned = "MIG" in torch.cuda.get_device_name(0)
    text = "a partition of a GPU" if partitioned else f"mode: {mode or 'unknown'}"
    yield Finding(_AREA, "mig", partitioned, text)


def _without_gpu(torch: Any) -> Finding:
    if torch.backends.mps.is_available():
        return Finding(_AREA, "devices", ["mps"], "Apple GPU")
    nothing = "none: training runs on the CPU"
    if not (_DEVICE.exists() or driver_version()):
        return Finding(_AREA, "devices", [], nothing)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        problem, hint = "this build of torch is for the CPU", "pip install --force-reinstall torch"
        hint += " --index-url https://download.pytorch.org/whl/cu128"
    elif hidden is not None and hidden.strip() in ("", "-1"):
        problem, hint = "CUDA_VISIBLE_DEVICES hides the GPUs", "unset CUDA_VISIBLE_DEVICES"
    else:
        problem = f"torch with CUDA {torch.version.cuda} cannot use the driver"
        hint = f"nvidia-smi; install a driver for CUDA {torch.version.cuda} or newer"
    return Finding(_AREA, "devices", [], f"{nothing}, because {problem}", "warning", hint)


def _device(torch: Any, index: int) -> Iterator[Finding]:
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    yield Finding(_AREA, f"cuda:{index}", name, f"{name}, compute capability {major}.{minor}")
    architectures = torch.cuda.get_arch_list()
    newest = max((int(a.rpartition("_")[2].rstrip("af")) for a in architectures), default=0)
    if architectures and 10 * major + minor > newest and not _runs_newer(architectures, major):
        yield Finding(
            _AREA, f"cuda:{index} kernels", architectures,
            f"torch has no kernels for compute capability {major}.{minor}", "error",
            "pip install --upgrade torch",
        )  # fmt: skip
        return
    free, total = torch.cuda.mem_get_info(index)
    text = f"{memory_size(free)} free of {memory_size(total)}"
    value = {"free_bytes": free, "total_bytes": total}
    if free < _LEAST_FREE_SHARE * total:
        hint = "nvidia-smi lists the processes that use the GPU"
        yield Finding(_AREA, f"cuda:{index} memory", value, text, "warning", hint)
    else:
        yield Finding(_AREA, f"cuda:{index} memory", value, text)


def _runs_newer(architectures: list[str], major: int) -> bool:
    """Whether torch has code for the same major version, or PTX that the driver compiles."""
    same = any(a.startswith(f"sm_{major}") for a in architectures)
    return same or any(a.startswith("compute_") for a in architectures)
