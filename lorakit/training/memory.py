"""What to say and do when the device has no memory left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorakit.data.collate import Batch
from lorakit.models.load import device_memory_bytes
from lorakit.recipe.sections import Recipe
from lorakit.training.setup import Prepared

#: Memory outside of PyTorch's reserve that is not this process's own CUDA context and libraries,
#: which take up to 0.7 GiB.
_OTHERS_BYTES = 2**30


def out_of_memory(prepared: Prepared, step: int, micro_batches: Sequence[Batch]) -> str:
    """A message about step ``step``, which ran out of memory: its largest batch, what was
    allocated, and the keys of the recipe that lower it."""
    rows, length = max((batch.input_ids.shape for batch in micro_batches), default=(0, 0))
    model = prepared.model
    device = model.device
    text = f"step {step}: out of memory on {device} with a batch of {rows} x {length:,} tokens"
    if device.type == "cuda":
        total = device_memory_bytes(device)
        text += (
            f": at most {_gib(torch.cuda.max_memory_allocated(device))} of {_gib(total)} GiB were "
            f"allocated, {_gib(_weight_bytes(model))} of them for the weights and "
            f"{_gib(_training_bytes(model))} for gradients and AdamW's state"
        )
        free, total = torch.cuda.mem_get_info(device)
        text += held_by_others(free, total, torch.cuda.memory_reserved(device))
    return f"{text}; {'; or '.join(memory_advice(prepared.recipe))}"


def evaluation_memory_advice(recipe: Recipe, measures_loss: bool, generates: bool) -> str:
    """The changes to the recipe, also that of a resumed run, that lower the memory of an
    evaluation."""
    found = []
    if measures_loss:
        found.append(f"lower train.per_device_eval_batch_size ({recipe.eval_batch_size})")
    if generates:
        rows = getattr(recipe.task, "generation_batch_size", None)
        key = "task.generation_batch_size"
        found.append(f"lower {key} ({rows})" if rows else f"set {key}, such as to 1")
    return "; or ".join(found)


def fewer_members(doing: str, most: int) -> str:
    """A note that members of a sweep do not fit together."""
    size = f"at most {most} members together" if most > 1 else "members one after another"
    return f"out of memory: {doing} {size} from now on"


def drop_frames(error: BaseException | None) -> None:
    """Forget the frames of an error that is kept: they refer to activations on the device."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def held_by_others(free_bytes: int, total_bytes: int, reserved_bytes: int) -> str:
    """What to say of the memory of a device beside the ``reserved_bytes`` of this process; empty if
    that is little."""
    others = total_bytes - free_bytes - reserved_bytes
    if others <= _OTHERS_BYTES:
        return ""
    return f"; other processes hold {_gib(others)} GiB: end them or use another GPU"


def memory_advice(recipe: Recipe) -> list[str]:
    """The changes to the recipe that lower the memory of a step, the best one first."""
    section, found = recipe.train, []
    if section.gradient_checkpointing is False:
        found.append("set train.gradient_checkpointing: true")
    elif section.gradient_checkpointing is True:
        found.append("set train.gradient_checkpointing: offload")
    if section.max_tokens_per_batch:
        found.append(f"lower train.max_tokens_per_batch ({section.max_tokens_per_batch})")
    elif (size := section.units_per_batch or 1) > 1:
        steps = section.gradient_accumulation_steps
        found.append(
            f"lower train.per_device_batch_size ({size}) and raise "
            f"train.gradient_accumulation_steps ({steps}), which gives the same steps"
        )
    if recipe.model.base_precision is None and recipe.adapter.method not in ("full", "bitfit"):
        found.append("set model.base_precision: nf4")
    found.append(f"lower task.max_length ({recipe.task.max_length})")
    return found


def _weight_bytes(model: nn.Module) -> int:
    return _bytes([*model.parameters(), *model.buffers()])


def _training_bytes(model: nn.Module) -> int:
    """Those of the gradient and the two averages of each trained parameter."""
    return 3 * _bytes(p for p in model.parameters() if p.requires_grad)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
