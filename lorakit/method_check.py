"""The contract of methods, run on tiny random models: ``lorakit methods --check FILE.py:CLASS``."""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit import registry
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.errors import LorakitError, UserError
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapted_modules, adapter_layers
from lorakit.methods.base import Method, RunHooks
from lorakit.models.master_weights import plain_name
from lorakit.recipe.sections import AdapterSection, TrainSection
from lorakit.user_code import locate_error

ROWS, COLUMNS, IDS = 12, 10, 20
STEPS, STOP = 8, 3
_TOLERANCE = 1e-5
_TRAIN = TrainSection(output_dir="none", max_steps=STEPS, weight_decay=0.01)


@dataclass(frozen=True)
class CheckResult:
    """``check`` states the requirement, ``module`` is the kind of module that was adapted;
    ``problem`` is None if the requirement is met."""

    check: str
    module: str
    problem: str | None = None


@dataclass(frozen=True)
class Case:
    """A kind of module to adapt: its name in the model and the ``target_modules`` that name it."""

    kind: str
    name: str
    targets: tuple[str, ...]
    config: SimpleNamespace


CASES = (
    Case("linear", "layer", ("layer",), SimpleNamespace()),
    Case("conv1d", "layer", ("layer",), SimpleNamespace()),
    Case("embedding", "layer", ("layer",), SimpleNamespace()),
    Case("slice", "c_attn", ("q", "v"), SimpleNamespace(model_type="gpt2", hidden_size=4)),
)
#: For methods that wrap nothing and train the base's own parameters.
BASE = Case("base", "layer", (), SimpleNamespace())


class TinyModel(nn.Module):
    """One module of a kind between two that are not adapted; the inputs are token ids."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.config = case.config
        self.name = case.name
        self.before: nn.Module = nn.Embedding(IDS, COLUMNS)
        layer: nn.Module = nn.Linear(COLUMNS, ROWS)
        if case.kind == "embedding":
            self.before, layer = nn.Identity(), nn.Embedding(IDS, ROWS)
        elif case.kind in ("conv1d", "slice"):
            layer = Conv1D(ROWS, COLUMNS)
        self.add_module(case.name, layer)
        self.after = nn.Linear(ROWS, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.get_submodule(self.name)(self.before(ids))
        out: Tensor = self.after(torch.tanh(hidden))
        return out


def check_method(name: str) -> list[CheckResult]:
    """Run the contract on a built-in method or on a user's ``FILE.py:CLASS``, whose code is run.

    Returns one result for each check and each kind of module that the method adapts; a kind for
    which parameters remain uninitialized has only that result. Needs no model or data, and does not
    change torch's default generator. Raises KeyError for an unknown name, UserError for a file that
    does not define a method, or whose method cannot adapt a model.
    """
    method: Method = registry.method(name)
    if required := [
        key for key, field in method.Config.model_fields.items() if field.is_required()
    ]:
        raise UserError(
            f"{name}: Config has no default for {', '.join(required)}; a check needs a default "
            "for every key"
        )
    cases = [case for case in CASES if case.kind in method.kinds] if method.kinds else [BASE]
    with torch.random.fork_rng(devices=[]):
        return [result for case in cases for result in _results(_Contract(method, case))]


def _results(contract: _Contract) -> Iterator[CheckResult]:
    if problem := contract.uninitialized():
        yield CheckResult("every parameter is initialized", contract.case.kind, problem)
        return
    checks: dict[str, Callable[[], str | None]] = {
        "the output is unchanged at the start": contract.unchanged_at_the_start,
        "only the method's own parameters get gradients": contract.gradients,
        "a saved adapter loads bit for bit": contract.saved_and_loaded,
        "the merged model equals the unmerged one": contract.merged,
        "a merge reads only the weight that it is given": contract.merged_on_meta,
        "a resumed run equals an uninterrupted one": contract.resumed,
        "a bfloat16 base keeps its precision": contract.half_precision,
        "the layers move to another device": contract.moved,
    }
    for check, run in checks.items():
        try:
            problem = run()
        except Exception as error:
            problem = _describe(error)
        yield CheckResult(check, contract.case.kind, problem)


def _describe(error: Exception) -> str:
    """The error in one line, with the place that raised it."""
    message = (str(error).splitlines() or [""])[0]
    if isinstance(error, LorakitError):
        return message
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename}:{frame.lineno}"
    return locate_error(error) or f"{place}: {type(error).__name__}: {message}"


class _Contract:
    """The checks of one method on one kind of module; each returns the problem that it finds."""

    def __init__(self, method: Method, case: Case) -> None:
        self.method, self.case = method, case
        targets: dict[str, Any] = {"target_modules": [*case.targets]} if case.targets else {}
        self.section: AdapterSection = method.Config(method=method.name, **targets)
        self.ids = torch.arange(IDS).reshape(4, 5)

    def uninitialized(self) -> str | None:
        """Memory that the method leaves uninitialized is NaN here."""
        state = self.injected().state_dict()
        nan = [name for name, value in state.items() if value.isnan().any()]
        return f"{', '.join(nan)}: not initialized" if nan else None

    def unchanged_at_the_start(self) -> str | None:
        return _difference(self.base()(self.ids), self.injected()(self.ids))

    def gradients(self) -> str | None:
        model = self.trained().train()
        self.loss(model).backward()
        found = {name for name, p in model.named_parameters() if p.grad is not None}
        trained = set(trainable_state(model))
        if extra := found - trained | trained - self.trainable_names(model):
            return f"{', '.join(sorted(extra))}: trained, but not a parameter of the method"
        if idle := trained - found:
            return f"{', '.join(sorted(idle))}: trained, but receives no gradient"
        return None if trained else "no parameter is trained"

    def saved_and_loaded(self) -> str | None:
        model, loaded = self.trained(), self.base()
        self.save_and_load(model, loaded)
        if self.method.folds or (self.case.kind == "slice" and not self._same_names(model, loaded)):
            return _difference(model(self.ids), loaded(self.ids))  # in another method's format
        have, want = trainable_state(loaded), trainable_state(model)
        if mismatched := sorted(set(have) ^ set(want)):
            name = mismatched[0]
            return f"{name}: {'not saved' if name in want else 'not trained before'}"
        if changed := [name for name in want if not torch.equal(have[name], want[name])]:
            return f"{changed[0]}: has a different value"
        equal = torch.equal(model(self.ids), loaded(self.ids))
        return None if equal else "the output differs, though all trained parameters are equal"

    def merged(self) -> str | None:
        model = self.trained()
        with torch.no_grad():
            unmerged = model(self.ids)
            if self.method.kinds and torch.equal(unmerged, self.base()(self.ids)):
                return "the adapter does nothing after its parameters have changed"
            for name, layer in adapted_modules(model).items():
                model.set_submodule(name, layer.merge())
            return _difference(unmerged, model(self.ids))

    def merged_on_meta(self) -> str | None:
        """A merge of files reads W separately, and places the adapter in a model on ``meta``."""
        model, empty = self.trained(), self.base().to("meta")
        self.save_and_load(model, empty)
        layers = adapted_modules(model)
        for name, layer in adapted_modules(empty).items():
            want = layers[name].fold(layers[name].weight)
            got = layer.fold(layers[name].weight)
            if got.is_meta or not torch.allclose(got, want, atol=_TOLERANCE, rtol=_TOLERANCE):
                return f"{name}: merged_weight needs more than its argument and what is saved"
        return None

    def resumed(self) -> str | None:
        straight = _Run(self, self.injected())
        straight.take(1, STOP)
        snapshot = straight.snapshot()
        straight.take(STOP + 1, STEPS)
        resumed = _Run(self, self.injected(seed=2))
        resumed.restore(snapshot)
        resumed.take(STOP + 1, STEPS)
        for name, value in straight.parameters.items():
            if not torch.equal(value, resumed.parameters[name]):
                return (
                    f"{name}: differs after resuming: it depends on random values that are neither "
                    "saved nor seeded"
                )
        return None

    def half_precision(self) -> str | None:
        """The parameters of adapters are float32, also beside a base in half precision."""
        model = self.injected(dtype=torch.bfloat16).train()
        output = model(self.ids)
        output.float().square().sum().backward()
        return None if output.dtype == torch.bfloat16 else f"the output is {output.dtype}"

    def moved(self) -> str | None:
        """A tensor that is neither parameter nor buffer stays where it is, and the layer fails."""
        self.injected().to("meta")(self.ids.to("meta"))
        return None

    def save_and_load(self, model: nn.Module, into: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as folder:
            directory = save_adapter(
                Path(folder) / "adapter",
                model,
                self.section,
                base_model_name_or_path="base",
                task_type="CAUSAL_LM",
            )
            load_adapter(into, directory, trainable=True)

    def base(self) -> TinyModel:
        torch.manual_seed(0)
        return TinyModel(self.case).eval()

    def injected(self, seed: int = 1, dtype: torch.dtype = torch.float32) -> TinyModel:
        model = self.base().to(dtype)
        torch.manual_seed(seed)
        with _nan_for_uninitialized_memory():
            inject(model, self.section)
        return model

    def trained(self) -> TinyModel:
        """A model as after training, with every trained parameter changed."""
        model = self.injected()
        with torch.no_grad():
            for parameter in trainable_state(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    def loss(self, model: nn.Module) -> Tensor:
        loss: Tensor = model(self.ids).float().square().sum()
        return loss

    def trainable_names(self, model: nn.Module) -> set[str]:
        """The names of the parameters that may be trained."""
        if not self.method.kinds:
            base = dict(self.base().named_parameters())
            return {name for name, _ in model.named_parameters() if plain_name(name) in base}
        layers = adapter_layers(model)
        return {f"{at}.{key}" for at, x in layers.items() for key in x.adapter_parameters()}

    @staticmethod
    def _same_names(model: nn.Module, loaded: nn.Module) -> bool:
        return set(trainable_state(model)) == set(trainable_state(loaded))


@contextmanager
def _nan_for_uninitialized_memory() -> Iterator[None]:
    """Let ``torch.empty`` and the like return NaN during the block."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class _Run:
    """The steps of a run with the method's parameter groups and hooks."""

    def __init__(self, contract: _Contract, model: TinyModel) -> None:
        method, section = contract.method, contract.section
        self.loss, self.model = contract.loss, model.train()
        parameters: dict[str, Any] = trainable_state(model)
        self.parameters = parameters
        layers = adapter_layers(model)
        groups = method.param_groups(parameters, layers, section, _TRAIN)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.hooks: RunHooks = method.hooks(layers, section, STEPS)

    def take(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            self.loss(self.model).backward()
            self.hooks.before_step(lambda value: value)
            self.optimizer.step()
            self.hooks.after_step(step)

    def snapshot(self) -> Any:
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return copy.deepcopy((values, self.optimizer.state_dict(), self.hooks.state()))

    @torch.no_grad()
    def restore(self, snapshot: Any) -> None:
        values, optimizer, state = snapshot
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self.optimizer.load_state_dict(optimizer)
        self.hooks.load_state(state)


def _difference(want: Tensor, got: Tensor) -> str | None:
    """Return a problem if the outputs differ by more than rounding."""
    if torch.allclose(got, want, atol=_TOLERANCE, rtol=_TOLERANCE):
        return None
    return f"the outputs differ by up to {(got - want).abs().max().item():.2g} (expected 0)"
