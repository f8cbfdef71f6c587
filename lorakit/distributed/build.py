"""Choose the strategy that the launcher asks for."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment

from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.launcher import check_no_deepspeed, is_launched, uses_fsdp
from lorakit.distributed.strategy import DataParallel, Strategy
from lorakit.errors import UserError


def build_strategy(dtype: str) -> Strategy:
    """Return the strategy for a model in precision ``dtype``: ``single``, or if a launcher started
    several processes ``ddp``, or ``fsdp2`` if it asks for FSDP.

    Raises UserError for another strategy of the launcher, or for float16 on the CPU.
    """
    check_no_deepspeed()
    half = dtype == "float16"
    AcceleratorState._reset_state()  # an earlier run of this process may have another precision
    # Accelerate's own FSDP would shard what is trained, too. It would start a group for any
    # LOCAL_RANK, which some platforms set for a single process.
    single = {} if is_launched() else {"LOCAL_RANK": "-1"}
    with patch_environment(ACCELERATE_USE_FSDP="false", **single):
        accelerator = Accelerator(mixed_precision="fp16" if half else "no")
    if half and accelerator.device.type == "cpu":
        raise UserError(
            "model.dtype = 'float16': needs a GPU; allowed on the CPU: bfloat16, float32"
        )
    if rank_and_world_size()[1] == 1:
        return Strategy(accelerator)
    if not uses_fsdp():
        return DataParallel(accelerator)
    from lorakit.distributed.fsdp2 import Fsdp2  # takes time to import

    return Fsdp2(accelerator)
