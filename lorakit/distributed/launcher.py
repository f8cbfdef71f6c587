"""What ``torchrun`` and ``accelerate launch`` tell the processes that they start."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UserError, shown

#: Variables that ``accelerate launch`` sets from ``fsdp_config``, and the values allowed. The first
#: is assumed if it sets none.
_FSDP_SETTINGS = {
    "FSDP_VERSION": ("2",),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    # Transformers would load the weights in one process of each host only.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "false"),
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap",),
}


def is_launched() -> bool:
    """Whether a launcher started several processes."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")


def check_variables() -> None:
    """Raise UserError if a variable that a launcher sets is missing, no number, or too large."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
        if value.isdecimal() if name != "MASTER_ADDR" else value:
            continue
        raise UserError(
            f"{name} = {shown(value)}: invalid with WORLD_SIZE = "
            f"{shown(os.environ['WORLD_SIZE'])}; hint: start several processes with torchrun, or "
            "unset WORLD_SIZE"
        )
    local = os.environ.get("LOCAL_WORLD_SIZE") or "1"
    if not local.isdecimal() or local == "0":
        raise UserError(f"LOCAL_WORLD_SIZE = {shown(local)}: allowed: an integer > 0")
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if int(rank) >= int(world_size):
        raise UserError(f"RANK = {rank}: allowed with WORLD_SIZE = {world_size}: 0 to "
                        f"{int(world_size) - 1}")  # fmt: skip
    if not 0 < int(os.environ["MASTER_PORT"]) < 65536:
        raise UserError(f"MASTER_PORT = {os.environ['MASTER_PORT']}: allowed: 1 to 65535")


def launch_id() -> str | None:
    """A name that processes share with those that the same launcher started in their place before;
    None without torchrun, which ``accelerate launch`` uses, too.

    It is the directory of this launch's logs, in which each start has its own.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # LAUNCH/attempt_N/RANK/error.json
    return str(Path(file).parent.parent.parent) if file else None


def own_store() -> dict[str, Any]:
    """Arguments of ``init_process_group``: where the processes that torchrun has started together
    meet. torchrun's own store is not used directly: after a restart it still holds the addresses
    and messages of the previous processes."""
    from torch.distributed import is_initialized
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if "TORCHELASTIC_RESTART_COUNT" not in os.environ or is_initialized():
        return {}
    store, rank, world_size = next(rendezvous("env://"))
    name = _name_of_start(store, rank, world_size)
    return {"store": PrefixStore(name, store), "rank": rank, "world_size": world_size}


def _name_of_start(store: Any, rank: int, world_size: int) -> str:
    """A name for this start, chosen by process 0 and sent to the others, since torchrun's restart
    count may differ between hosts.

    Each process accepts only the answer to its own random question, and process 0 answers until all
    have one, so leftovers of earlier starts are ignored.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"lorakit/question/{rank}", own)
        name: str = store.get(f"lorakit/answer/{own}").decode()
        store.add(f"lorakit/taken/{name}", 1)
        return name
    questions = [f"lorakit/question/{each}" for each in range(1, world_size)]
    deadline = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"lorakit/taken/{own}", 0) < len(questions):
        for question in questions:
            if store.check([question]):
                store.set(f"lorakit/answer/{store.get(question).decode()}", own)
        if time.monotonic() > deadline:
            raise LorakitError("not all processes have started")
        time.sleep(0.02)
    return own


def warn_of_launch(say: Callable[[str], None]) -> None:
    """Warn if ``accelerate launch`` was asked for several processes and started only one, as it
    does with ``--cpu``."""
    if is_launched() or not {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys():
        return
    say(
        "warning: accelerate launch has started a single process; for several, use torchrun, or "
        "configs/ddp.yaml without --cpu, which also works on the CPU"
    )


def uses_fsdp() -> bool:
    """Whether ``accelerate launch`` asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check_no_deepspeed() -> None:
    """Raise UserError if ``accelerate launch`` asks for DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise UserError(
            "accelerate launch: DeepSpeed is not supported; allowed: distributed_type MULTI_GPU or "
            "MULTI_CPU (configs/ddp.yaml), or FSDP (configs/fsdp2.yaml)"
        )


def check_whole_models(reason: str) -> None:
    """Raise UserError, with the ``reason``, if ``accelerate launch`` asks for FSDP or DeepSpeed,
    which shard a model over the processes."""
    check_no_deepspeed()
    if uses_fsdp():
        raise UserError(
            f"accelerate launch: FSDP: {reason}; allowed: distributed_type MULTI_GPU or MULTI_CPU "
            "(configs/ddp.yaml)"
        )


def check_fsdp_settings() -> None:
    """Raise UserError for a setting of accelerate's ``fsdp_config`` that lorakit does not follow.
    Those that it ignores change neither results nor memory."""
    for variable, allowed in _FSDP_SETTINGS.items():
        value = os.environ.get(variable, allowed[0]).lower()
        if value not in allowed:
            raise UserError(
                f"accelerate launch: {variable.lower()} = {value}: not supported; allowed: "
                f"{', '.join(allowed)} (configs/fsdp2.yaml)"
            )
