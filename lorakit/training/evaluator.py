"""The model's metrics as it stands, on the recipe's evaluation split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorakit.evaluation.evaluate import evaluate_model
from lorakit.models.causal import CausalParts
from lorakit.training.setup import Prepared
from lorakit.training.signals import StopRequest
from lorakit.training.tracking import throttled


@dataclass(frozen=True)
class Evaluator:
    """``generates``: whether to write text and score it, or to take the loss alone."""

    prepared: Prepared
    parts: CausalParts | None
    generates: bool
    stop: StopRequest
    say: Callable[[str], None]

    def __call__(self) -> dict[str, float]:
        """Raises EvaluationStopped if a signal arrives in between."""
        data, recipe = self.prepared.evaluation, self.prepared.recipe
        assert data is not None
        return evaluate_model(
            self.prepared.model,
            self.prepared.tokenizer,
            self.prepared.task,
            recipe.task,
            data.split,
            data.encoded,
            batch_size=recipe.eval_batch_size,
            parts=self.parts,
            generate=self.generates,
            seed=recipe.train.seed,
            on_progress=throttled(self.say),
            should_stop=lambda: bool(self.stop),
        ).metrics
