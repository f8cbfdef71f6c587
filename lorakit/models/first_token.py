"""Skip what a classifier does not read of an encoder's last layer.

BERT and its relatives classify by the first token. After the attention of the last layer, tokens do
not interact any more, so its other rows are neither needed nor have a gradient. For MiniLM that is
an eighth of the matrix products.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

#: With fewer rows, the matrix products of MKL round differently.
_ROWS_PER_THREAD = 8


def skip_unread_tokens(model: PreTrainedModel) -> bool:
    """In training, compute what follows the attention of the last layer for the first token only.

    On the CPU, losses and gradients stay the same to the bit, with dropout too: it draws as many
    random numbers as before. A few more tokens are computed for a small batch. Returns whether the
    model allows this: its layers are built as BERT's, nothing in the skipped part is trained, and
    the logits of a few rows are verified to stay the same.
    """
    parts = after_attention(model)
    trained = any(p.requires_grad for part in parts for p in part.parameters())
    if not parts or trained:
        return False
    expected = _training_logits(model)
    tokens = _FirstTokens()
    handles = tokens.attach(parts)
    if _agree(_training_logits(model), expected):
        tokens.draws_all = model.device.type == "cpu"
        return True
    for handle in handles:
        handle.remove()
    return False


class _FirstTokens:
    """Hooks that reduce (batch, length, size) to (batch, kept, size) in training, where ``kept`` is
    1 unless the batch has few rows.

    With ``draws_all``, a dropout still gets ``length`` rows, so that its random numbers are those
    of whole sequences.
    """

    length = kept = 1
    draws_all = True

    def attach(self, parts: list[nn.Module]) -> list[torch.utils.hooks.RemovableHandle]:
        """``parts`` are called in order, the first one with whole sequences."""
        handles = [parts[0].register_forward_pre_hook(self._cut)]
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, nn.Dropout) and module.p > 0:
                handles.append(module.register_forward_pre_hook(self._pad))
                handles.append(module.register_forward_hook(self._cut_again))
        return handles

    def _cut(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training:
            return None
        batch, self.length = inputs[0].shape[:2]
        rows = _ROWS_PER_THREAD * torch.get_num_threads()
        self.kept = min(self.length, math.ceil(rows / batch))
        return tuple(value[:, : self.kept].contiguous() for value in inputs)

    def _pad(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        missing = self.length - self.kept
        pads = module.training and self.draws_all
        return F.pad(inputs[0], (0, 0, 0, missing)) if pads else None

    def _cut_again(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        return output[:, : self.kept].contiguous() if module.training else None


def after_attention(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of the last layer that follow its attention, in order; none if it is not
    BERT's."""
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    names = ("attention.output", "intermediate", "output")
    try:
        return [layers[-1].get_submodule(name) for name in names]
    except AttributeError:
        return []


@torch.no_grad()
def _training_logits(model: PreTrainedModel) -> Tensor | None:
    """The logits of some rows in training, always with the same dropout; None after an error."""
    device, was_training = next(model.parameters()).device, model.training
    batch = _ROWS_PER_THREAD * torch.get_num_threads()
    mask = torch.ones(batch, 8, dtype=torch.long, device=device)
    mask[1, 5:] = 0
    model.train()
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(0)
            ids = torch.arange(batch * 8, device=device).view_as(mask) % model.config.vocab_size
            logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits
    except Exception:  # the model may raise anything; without the hooks it still works
        return None
    finally:
        model.train(was_training)


def _agree(logits: Tensor | None, expected: Tensor | None) -> bool:
    if logits is None or expected is None or logits.shape != expected.shape:
        return False
    tolerance = 1e-2 if logits.dtype == torch.float32 else 5e-2
    largest = float(expected.abs().max())
    return torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * largest)
