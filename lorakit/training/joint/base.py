"""The base model and the data of several runs: loaded once, and each run gets a view."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.models.load import Pretrained
from lorakit.notes import Say
from lorakit.pipeline.encoding import StreamedRows
from lorakit.pipeline.task_data import TaskData, load_training_data
from lorakit.recipe.sections import Recipe
from lorakit.training.batching import LoadedStep, StepLoader
from lorakit.training.setup import Inputs, Prepared, adapt, encode_inputs, load_task_model


class SharedBase:
    """Loads the model and each dataset once.

    A view is a model of its own, with its own modules and configuration, whose tensors are those of
    the shared model until they are trained.
    """

    def __init__(self) -> None:
        self._model: Pretrained | None = None
        self._models: dict[Hashable, Pretrained] = {}
        self._inputs: dict[Hashable, Inputs] = {}
        self._data: dict[Hashable, TaskData] = {}
        self._on_device: dict[int, Tensor] = {}
        self._steps: dict[Hashable, dict[int, LoadedStep]] = {}

    def prepare(self, recipe: Recipe, say: Say) -> Prepared:
        """``setup.prepare`` with a view of the shared model. Raises the same UserError as
        ``setup.prepare``."""
        prepared = adapt(recipe, self._inputs_of(recipe, say), say)
        loaded = (known.model for known in self._models.values())
        shared = {p.data_ptr() for model in loaded for p in model.parameters()}
        for parameter in prepared.model.parameters():
            if parameter.requires_grad and parameter.data_ptr() in shared:
                parameter.data = parameter.data.clone()
        return prepared

    def share_steps(self, prepared: Prepared, loader: StepLoader) -> int:
        """Let ``loader`` share its steps with those of other runs with the same batches. Returns
        an id that runs with the same batches share."""
        rows, recipe = prepared.train, prepared.recipe
        if isinstance(rows, StreamedRows):
            self._steps[object()] = {}
            return len(self._steps) - 1
        names = (
            "seed", "group_by_length", "per_device_batch_size", "gradient_accumulation_steps",
            "max_tokens_per_batch",
        )  # fmt: skip
        settings = tuple(getattr(recipe.train, name) for name in names)
        key = (id(rows), recipe.task.packing, recipe.task.max_length, *settings)
        loader.share(self._steps.setdefault(key, {}))
        return list(self._steps).index(key)

    def view(self) -> Any:
        """A view of the shared model, without an adapter, in evaluation mode."""
        assert self._model is not None, "a run has been prepared"
        return _view(self._model).model

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Move the tensors of a view that are shared to ``device``, all of them once."""
        if device.type == "cpu":
            return
        for tensor in self._tensors():
            if tensor.data_ptr() not in self._on_device and tensor.numel():
                self._on_device[tensor.data_ptr()] = tensor.to(device)
        for parameter in model.parameters():
            parameter.data = self._on_device.get(parameter.data_ptr(), parameter.data)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = self._on_device.get(buffer.data_ptr(), buffer)

    def _tensors(self) -> Iterator[Tensor]:
        if self._model is not None:
            for tensor in (*self._model.model.parameters(), *self._model.model.buffers()):
                yield tensor.detach()

    def _inputs_of(self, recipe: Recipe, say: Say) -> Inputs:
        key = (recipe.model.model_dump_json(), recipe.task.model_dump_json())
        if key not in self._data:
            self._data[key] = load_training_data(recipe, say)
        data = self._data[key]
        if data.stream is not None:  # each run reads the rows for itself
            del self._data[key]
        loaded = self._pretrained(recipe, data, say)
        if key in self._inputs:
            return replace(self._inputs[key], loaded=loaded)
        inputs = encode_inputs(recipe, data, loaded, say)
        if not isinstance(inputs.encoded.train, StreamedRows):
            self._inputs[key] = replace(inputs, loaded=_view(loaded))
        return inputs

    def _pretrained(self, recipe: Recipe, data: TaskData, say: Say) -> Pretrained:
        key = (recipe.model.model_dump_json(), str(data.labels), data.problem)
        known = self._models.get(key) or self._models.get((*key, recipe.train.seed))
        if known is None:
            known = load_task_model(recipe, data)
            for note in known.notes:
                say(note)
            if self._model is None:
                self._model = known
            _share(self._model, known)
            self._models[(*key, recipe.train.seed) if known.new_modules else key] = known
        return _view(known)


def _share(base: Pretrained, other: Pretrained) -> None:
    """Let the tensors of ``other`` be those of ``base``, except for new modules."""
    if base is other:
        return
    theirs = dict(base.model.named_parameters())
    for name, parameter in other.model.named_parameters():
        new = any(name.startswith(f"{module}.") for module in other.new_modules)
        if not new and name in theirs and theirs[name].shape == parameter.shape:
            parameter.data = theirs[name].data


def _view(loaded: Pretrained) -> Pretrained:
    memo: dict[int, Any] = {}
    for parameter in loaded.model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in loaded.model.buffers():
        memo[id(buffer)] = buffer
    return replace(loaded, model=copy.deepcopy(loaded.model, memo))
