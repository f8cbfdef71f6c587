"""The numbers of a first run: lengths, batches, learning rate, precision."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.errors import UserError

GIB = 2**30
#: Memory that is assumed of a GPU that is not in this machine.
ASSUMED_GPU_BYTES = 24 * GIB
#: Models are large or small from these numbers of parameters on.
LARGE, SMALL = 2e9, 2e8
#: At most this many tokens a row, unless the recipe is changed: memory grows with the longest row.
_MOST_TOKENS = {"cpu": 1024, "gpu": 2048}
#: Tokens of a batch on the CPU.
_CPU_BATCH_TOKENS = 4096
_MAX_ROWS = {"encoder": 32, "causal": 8}
#: Steps that a first run should have, within the bounds on its epochs.
_STEPS = 200
_HARDWARE = re.compile(r"(cpu|gpu)(?::(\d+(?:\.\d+)?)(?:gi?b)?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Hardware:
    """``cpu`` or ``gpu``; ``memory_bytes`` of the GPU, None if it is not known."""

    kind: str
    memory_bytes: int | None = None

    def __str__(self) -> str:
        memory = f":{self.memory_bytes / GIB:.0f}" if self.memory_bytes else ""
        return f"{self.kind}{memory}"


def read_hardware(text: str) -> Hardware:
    """Parse ``cpu``, ``gpu`` or ``gpu:24``, with the memory in GiB; without it, that of this
    machine's GPU. Raises UserError for anything else."""
    match = _HARDWARE.fullmatch(text.strip())
    if match is None or (match[1].lower() == "cpu" and match[2]) or match[2] in ("0", "0.0"):
        raise UserError(f"--hardware {text}: allowed: cpu, gpu, or gpu:24 for one of 24 GiB")
    kind = match[1].lower()
    if match[2]:
        return Hardware(kind, int(float(match[2]) * GIB))
    found = find_hardware()
    return found if found.kind == kind else Hardware(kind)


def find_hardware() -> Hardware:
    """The GPU of this machine, else its CPU."""
    from lorakit.models.load import default_device, device_memory_bytes

    device = default_device()
    return Hardware("cpu") if device.type == "cpu" else Hardware("gpu", device_memory_bytes(device))


@dataclass(frozen=True)
class Lengths:
    """Tokens of the sampled rows, ascending; ``is_estimate`` if they were not tokenized."""

    tokens: Sequence[int]
    is_estimate: bool = False

    def quantile(self, share: float) -> int:
        return self.tokens[min(len(self.tokens) - 1, int(share * len(self.tokens)))]


def max_length(lengths: Lengths | None, hardware: Hardware, positions: int | None) -> int:
    """The longest row and a quarter, as a multiple of 32, but at most what the hardware trains in
    reasonable time and the model has positions for."""
    most = min(_MOST_TOKENS[hardware.kind], positions or 2**30)
    if lengths is None:
        return min(128, most)
    return min(most, math.ceil(lengths.tokens[-1] * 1.25 / 32) * 32)


def learning_rate(usual: tuple[float, float] | None, parameters: float) -> float | None:
    """The rate for a model of this size, between the usual ones of large and of small models; with
    one digit. None if the method has no usual rate."""
    if usual is None:
        return None
    large, small = usual
    size = min(max(parameters, SMALL), LARGE)
    share = math.log(LARGE / size) / math.log(LARGE / SMALL)
    return float(f"{large * (small / large) ** share:.0e}")


@dataclass(frozen=True)
class Batches:
    """Rows of a batch, or ``auto``, and of a step, and the epochs."""

    rows: int | str
    rows_per_step: int
    epochs: int

    @property
    def accumulation(self) -> int:
        return 1 if isinstance(self.rows, str) else max(1, self.rows_per_step // self.rows)


def batches(
    hardware: Hardware, kind: str, lengths: Lengths | None, max_tokens: int, rows: int | None
) -> Batches:
    """Rows per step so that a small dataset has steps enough, and rows per batch so that it fits:
    on a GPU, whatever fits; on the CPU, a few thousand tokens."""
    step_rows = 32 if rows is None or rows >= 1000 else 16 if rows >= 200 else 8
    if hardware.kind == "gpu" and sys.platform != "darwin":  # needs CUDA or ROCm
        size: int | str = "auto"
    else:
        typical = min(max_tokens, lengths.quantile(0.95) if lengths else max_tokens)
        fitting = max(1, _CPU_BATCH_TOKENS // max(1, typical))
        size = min(_power_of_two(fitting), _MAX_ROWS[kind], step_rows)
    steps = max(1, (rows or 10_000) // step_rows)
    least, most = (3, 20) if kind == "encoder" else (1, 5)
    return Batches(size, step_rows, min(most, max(least, math.ceil(_STEPS / steps))))


def _power_of_two(number: int) -> int:
    """The largest power of 2 up to ``number``."""
    return 1 << (number.bit_length() - 1)


def quantizes(method: str, parameters: int | None, hardware: Hardware) -> bool:
    """Whether the base has to be kept in 4 bits: its weights in bfloat16 and 2 GiB for the rest are
    more than nine tenths of the GPU's memory."""
    if hardware.kind == "cpu" or parameters is None or method in ("full", "bitfit"):
        return False
    memory = hardware.memory_bytes or ASSUMED_GPU_BYTES
    return 2 * parameters + 2 * GIB > 0.9 * memory


def too_large(method: str, parameters: int | None, hardware: Hardware) -> str | None:
    """A note if the run will not fit on the GPU."""
    if hardware.kind == "cpu" or parameters is None:
        return None
    memory = hardware.memory_bytes or ASSUMED_GPU_BYTES
    if method == "full":  # 2 bytes for the bf16 model; float32 weights, gradients, AdamW's state
        need = 18.0 * parameters
    else:  # the base in bf16, or where it may be quantized in 4 bits
        need = (2 if method == "bitfit" else 0.7) * parameters + 2 * GIB
    if need <= memory:
        return None
    return (
        f"the model needs about {need / GIB:.0f} GiB to train with {method}, and the GPU has "
        f"{memory / GIB:.0f}; see docs/distributed.md for several GPUs"
    )


def held_out_share(rows: int) -> float | None:
    """A tenth of the rows, or about 1,000, for validation; None if there are too few."""
    if rows < 10:
        return None
    return float(f"{min(0.1, 1000 / rows):.1g}")
