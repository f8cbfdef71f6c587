"""What is no longer finite, or on its way there, and the likely cause.

Check in the first step that every adapted module trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.anatomy import adaptable_modules, is_routed_expert, is_within, layer_of
from lorakit.errors import TargetError
from lorakit.layers import (
    AdapterLayer,
    BaseWrapper,
    CompositeLayer,
    adapted_modules,
    adapter_layers,
)
from lorakit.module_names import as_yaml_list, covering_targets, describe_modules
from lorakit.training.tracking import LateValues

#: So many steps at the end of a run are averaged.
_LAST_STEPS = 10


def divergence(learning_rate: float, advice: str | None) -> str:
    """Why weights are likely to diverge; ``advice`` is what the method has to say to it."""
    return f"train.learning_rate ({learning_rate:g}) too high" + (
        f", or {advice}" if advice else ""
    )


def broken_step(values: LateValues, scaled: bool, cause: str) -> str | None:
    """The first step whose loss or gradient is not finite, in words.

    ``scaled``: float16's gradient scaler leaves out a step whose gradient is not finite.
    ``cause``: of a divergence.
    """
    for index, (loss, norm) in enumerate(zip(values.losses, values.grad_norms, strict=True)):
        step = values.known["step"] - len(values.losses) + 1 + index
        why = _likely_cause(values, index, scaled, cause)
        if not math.isfinite(loss):
            return f"step {step}: the loss is {loss}; {why}"
        if not math.isfinite(norm) and not scaled:
            return f"step {step}: the gradient is not finite; {why}"
    return None


def broken_weight(weights: Mapping[str, Tensor]) -> str | None:
    """The first weight that is not finite; waits for the device once."""
    finite = torch.stack([weight.detach().isfinite().all() for weight in weights.values()])
    return next(
        (name for name, fine in zip(weights, finite.tolist(), strict=True) if not fine), None
    )


def grown_loss(values: LateValues, first: float, cause: str) -> str | None:
    """A finite loss far above that of the run's ``first`` log line, in words: more than 3 times
    it and more than 1 above it, so that neither a small loss nor an ordinary swing is one."""
    if not (values.loss > 3 * first and values.loss > first + 1):
        return None
    return (
        f"step {values.known['step']}: the loss is {values.loss:.4g}, at the start it was "
        f"{first:.4g}; likely cause: {cause}"
    )


@dataclass
class LossHistory:
    """``start`` is the loss of the first step, whose weights are the untrained ones; ``peak`` the
    highest of a step; ``last`` those of the last steps, oldest first."""

    start: float | None = None
    peak: float = -math.inf
    last: list[float] = field(default_factory=list)

    def add(self, losses: Sequence[float]) -> None:
        """The losses of the next steps."""
        if self.start is None and losses:
            self.start = losses[0]
        self.peak = max(self.peak, *losses)
        self.last = [*self.last, *losses][-_LAST_STEPS:]


def diverged(history: LossHistory, again: float | None) -> bool:
    """Whether a run with finite losses left the model worse than it was.

    ``again`` is the loss that the first step's rows have after the training (None: not known); it
    is compared with ``history.start``, the loss of the same rows before, so that no difference
    between rows counts. The run diverged if ``again`` and the mean of the last steps are both more
    than 1.5 times the start and more than 1 above it; or if a step's loss was more than 10 times
    the start and more than 10 above it, and both ended above 0.9 of the start.
    """
    if history.start is None:
        return False
    start, mean = history.start, sum(history.last) / len(history.last)
    end = mean if again is None else min(again, mean)
    if not math.isfinite(end):
        return True
    if end > max(1.5 * start, start + 1):
        return True
    return history.peak > max(10 * start, start + 10) and end > 0.9 * start


def divergence_note(history: LossHistory, again: float | None, cause: str) -> str:
    """What a run that ``diverged`` says at its end."""
    assert history.start is not None
    before = f"{history.start:.4g} at the start, {history.peak:.4g} at its highest"
    if again is not None:
        now = f"and {again:.4g} at the end, on the rows of the first step"
    else:
        now = f"and {sum(history.last) / len(history.last):.4g} at the end"
    return f"the run diverged: the loss was {before} {now}; likely cause: {cause}"


def _likely_cause(values: LateValues, index: int, scaled: bool, cause: str) -> str:
    earlier = [norm for norm in values.grad_norms[:index] if math.isfinite(norm)]
    if earlier and max(earlier) > 100:
        return f"the gradient grew to {max(earlier):.3g} before: {cause}"
    overflow = ", or float16 overflow (bfloat16 has the range)" if scaled else ""
    return f"likely cause: {cause}{overflow}"


_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


class FirstStep:
    """Watches the adapted modules of ``model`` until ``check``, called once, when the gradients of
    the first step are there.

    ``whole`` are modules that train whole and must get gradients too. With ``counts`` hooks count
    the rows that each module is called with; a compiled model goes without. ``say`` gets
    warnings.
    """

    def __init__(
        self,
        model: nn.Module,
        say: Callable[[str], None],
        whole: Sequence[str] = (),
        counts: bool = True,
    ) -> None:
        self._say = say
        self._layers = adapter_layers(model)
        self._model = model
        self._whole = {name: model.get_submodule(name) for name in whole}
        self._rows: dict[str, int] | None = dict.fromkeys(self._layers, 0) if counts else None
        modules = adapted_modules(model) if counts else {}
        self._hooks = [m.register_forward_hook(self._counter(n, m)) for n, m in modules.items()]
        # Layers that are skipped at random may miss a step.
        config = getattr(model, "config", None)
        self._skips = any(getattr(config, key, 0.0) for key in _LAYER_DROPS)

    def check(self) -> None:
        """Raise TargetError for modules that would never train: no gradient reaches them, as the
        model reads their weight without calling them, or does not use their output. Experts that
        got no token in this step are passed over.

        ``say`` gets a line for modules whose gradient is exactly zero, which a gate that starts at
        zero or rows of a single token cause. Waits for the device once.
        """
        for hook in self._hooks:
            hook.remove()
        if dead := [name for name, layer in self._layers.items() if self._is_dead(name, layer)]:
            raise TargetError(
                f"adapter.target_modules: no gradient reaches {describe_modules(dead)}: "
                f"{self._cause(dead)}, so the adapter there would never train; "
                f"{self._advice(dead)}"
            )
        if dead := [name for name, module in self._whole.items() if not _gradients(module)]:
            raise TargetError(
                f"adapter.modules_to_save: no gradient reaches {describe_modules(dead)}: the model "
                "does not use it in this task; leave it out"
            )
        if zero := _zero_gradients(self._layers):
            self._say(
                f"the gradient of {describe_modules(zero)} is exactly zero in the first step; if "
                "it stays so, the adapter there does not train"
            )

    def _is_dead(self, name: str, layer: AdapterLayer) -> bool:
        expert = is_routed_expert(name)
        if self._rows is not None and not self._rows[name]:
            return not (expert or self._skips)
        trained = [p for p in layer.own_parameters().values() if p.requires_grad]
        lacks = bool(trained) and all(parameter.grad is None for parameter in trained)
        return lacks and not (expert and self._rows is None)

    def _cause(self, dead: Sequence[str]) -> str:
        if self._rows is not None and not any(self._rows[name] for name in dead):
            return "the model never calls these modules (it reads their weights, or skips them)"
        return "the model reads their weights without calling them, or does not use their output"

    def _advice(self, dead: Sequence[str]) -> str:
        """What to write in place of the targets that took ``dead`` along."""
        rest = [name for name in self._layers if name not in set(dead)]
        if not rest:
            return "name other targets"
        linear = adaptable_modules(self._model)
        others = [n for n in linear if not is_within(n, tuple(self._layers))]
        layers = {None, *map(layer_of, rest)}  # the recipe may choose some
        targets = covering_targets(rest, [*dead, *(n for n in others if layer_of(n) in layers)])
        return f"to adapt the rest: target_modules: {as_yaml_list(targets)}"

    def _counter(
        self, name: str, module: BaseWrapper
    ) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        parts = module.parts if isinstance(module, CompositeLayer) else ()
        names = [f"{name}.{role}" for role in parts] or [name]

        def count(_module: nn.Module, inputs: tuple[object, ...], _output: object) -> None:
            assert self._rows is not None
            for each in names:
                self._rows[each] += sum(x.numel() for x in inputs if isinstance(x, Tensor))

        return count


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def _zero_gradients(layers: Mapping[str, AdapterLayer]) -> list[str]:
    largest = {
        name: torch.stack([gradient.abs().max().float() for gradient in gradients]).max()
        for name, layer in layers.items()
        if (gradients := _gradients(layer))
    }
    values = torch.stack(list(largest.values())).tolist() if largest else []
    return [name for name, value in zip(largest, values, strict=True) if value == 0]
