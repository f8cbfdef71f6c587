"""``glue/cola`` to ``glue/wnli``: the nine tasks of GLUE (Wang et al. 2018), for an encoder.

Columns and label ids are those of the Hub's ``nyu-mll/glue``. ``glue/mnli`` evaluates on
``validation_matched``, or on ``validation`` if local files lack it; ``validation_mismatched`` is a
separate split. Test labels are hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lorakit.data.paths import split_files
from lorakit.recipe.sections import TaskSection
from lorakit.tasks.classification import LabelledTask
from lorakit.tasks.labelling import Labelling

HUB_DATASET = "nyu-mll/glue"

_BOTH = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")


def _classes(
    columns: tuple[str, ...], labels: tuple[str, ...], metrics: tuple[str, ...] = ("accuracy",)
) -> Labelling:
    text, pair = (*columns, None)[:2]
    assert text is not None, "there is at least one column"
    return Labelling(text, pair, "label", labels, metrics)


_LABELLINGS = {
    "cola": _classes(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": _classes(("sentence",), ("negative", "positive")),
    "mrpc": _classes(_BOTH, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": _classes(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Labelling(*_BOTH, "label", None, ("pearson", "spearmanr"), minimum=0.0, maximum=5.0),
    "mnli": _classes(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": _classes(("question", "sentence"), _ENTAILMENT),
    "rte": _classes(_BOTH, _ENTAILMENT),
    "wnli": _classes(_BOTH, ("not_entailment", "entailment")),
}

#: What is predicted, and the paper that the dataset is from.
_ABOUT = {
    "cola": ("is the sentence grammatical", "Warstadt et al. 2019"),
    "sst2": ("is the review positive", "Socher et al. 2013"),
    "mrpc": ("do both sentences say the same", "Dolan, Brockett 2005"),
    "qqp": ("are both questions the same", "Iyer et al. 2017"),
    "stsb": ("similarity of sentences, 0 to 5", "Cer et al. 2017"),
    "mnli": ("entailment, neutral, contradiction", "Williams et al. 2018"),
    "qnli": ("does the sentence answer it", "Rajpurkar et al. 2016"),
    "rte": ("is the second sentence entailed", "Dagan et al. 2005"),
    "wnli": ("is the pronoun resolved correctly", "Levesque et al. 2012"),
}


class GlueConfig(TaskSection):
    """No additional keys. ``path`` null reads the Hub's ``nyu-mll/glue``."""


class Glue(LabelledTask):
    names = tuple(f"glue/{name}" for name in _LABELLINGS)
    summary = "classes of sentences and of pairs (stsb: a number)"
    source = "Wang et al. 2018"
    Config = GlueConfig

    def summary_of(self, name: str) -> str:
        return _ABOUT[name.removeprefix("glue/")][0]

    def source_of(self, name: str) -> str:
        return _ABOUT[name.removeprefix("glue/")][1]

    def labelling(self, config: Any) -> Labelling:
        return _LABELLINGS[_short(config)]

    def read_columns(self, config: Any, columns: Sequence[str]) -> Collection[str] | None:
        return (*self.columns(config), "idx")

    def hub_source(self, config: Any) -> tuple[str, str | None] | None:
        return (HUB_DATASET, _short(config))

    def eval_split(self, config: Any) -> str:
        if _short(config) != "mnli":
            return "validation"
        local = config.path is not None and not split_files(config.path, "validation_matched")
        return "validation" if local else "validation_matched"


def _short(config: Any) -> str:
    return str(config.name).removeprefix("glue/")


TASK = Glue()
