"""How the tokens of a continuation are chosen. No tensor library is loaded here."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.tasks.base import GenerationSection


@dataclass(frozen=True)
class Decoding:
    """One way to continue a prompt, at most ``max_new_tokens`` long.

    ``num_beams`` 1 takes a token at a time: the likeliest, or with ``temperature`` above 0 one
    that is drawn from softmax(logits / temperature), among the likeliest whose probabilities add
    up to ``top_p``. What is drawn is a function of ``seed``, the row's number and the position.
    More beams search, and the continuation of the greatest sum of log probabilities / length **
    ``length_penalty`` is taken; ``lorakit.evaluation.beams`` says how. No ``no_repeat_ngram_size``
    tokens occur twice in a continuation (0: they may). It ends before the first text of ``stop``
    behind its first visible character. With ``fit_window`` a prompt that leaves fewer than
    ``max_new_tokens`` of the model's window gets as many as it leaves; else it is an error.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    fit_window: bool = False

    def __post_init__(self) -> None:
        assert self.max_new_tokens > 0
        assert self.num_beams > 0
        assert self.no_repeat_ngram_size >= 0
        assert self.temperature >= 0
        assert 0 < self.top_p <= 1
        assert self.num_beams == 1 or self.temperature == 0, "a search draws nothing"
        assert all(self.stop), "an empty text stands everywhere"

    @property
    def draws(self) -> bool:
        return self.temperature > 0


def task_decoding(config: GenerationSection, stop: tuple[str, ...], seed: int) -> Decoding:
    """What a recipe's ``task`` section and the task's own stop texts say."""
    return Decoding(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        temperature=config.temperature,
        top_p=config.top_p,
        stop=stop,
        seed=seed,
    )
