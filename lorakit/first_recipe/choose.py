"""Choose the task that fits the columns of the rows, and the task's keys that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit import registry
from lorakit.errors import DataError, listed
from lorakit.first_recipe.columns import Column

#: Names of columns, the likeliest first. Case is ignored. Columns of the first ones are labels
#: whatever they contain, those of the others if their values repeat or are numbers.
_SURE_LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "gold_label")
_LABELS = (
    "topic", "emotion", "target", "polarity", "rating", "stars", "score", "genre", "tag", "tags",
)  # fmt: skip
_TEXTS = (
    "text", "sentence", "content", "review", "body", "message", "comment", "utterance", "tweet",
    "document", "article", "abstract", "description", "headline", "title", "question", "query",
)  # fmt: skip
_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("text", "text_pair"),
    ("question", "sentence"), ("query", "document"), ("query", "passage"),
)  # fmt: skip
_QUESTIONS = ("prompt", "question", "query", "instruction", "input", "source", "problem")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "target", "reply")
_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "upos", "labels", "ner")
#: More different whole numbers than this are a quantity, not classes.
_MAX_NUMBERED_CLASSES = 20
#: The tasks that the message about columns that fit none explains.
_TASKS_SHOWN = ("chat", "completion", "classification", "token_classification", "text", "wikisql")

Columns = Mapping[str, Column]


@dataclass(frozen=True)
class Choice:
    """A task, the keys of its section that the columns call for, and the reason in words."""

    task: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Given:
    """What is known besides the columns: the kinds of tasks that the model can be trained on,
    whether it has a chat template (None: not known), and the keys of ``task`` that are set."""

    kinds: tuple[str, ...] = ("causal", "encoder")
    has_chat_template: bool | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)


def choose_task(columns: Columns, given: Given, source: str, wanted: str | None = None) -> Choice:
    """Choose a task for rows with ``columns``, which ``source`` names in messages; only ``wanted``
    if that is set. Raises DataError if the rows fit none."""
    if len(columns) == 1 and any(mark in name for name in columns for mark in ";\t|"):
        raise DataError(
            f"--data {source}: the only column is {next(iter(columns))!r}; allowed: cells that are "
            "separated by commas in .csv, by tabs in .tsv"
        )
    for choice in _choices(columns, given, wanted):
        kind = registry.tasks()[choice.task].kind
        if choice.task == wanted or (wanted is None and kind in given.kinds):
            return choice
    if wanted is not None:
        return _as_named(columns, source, wanted, given)
    tasks = registry.tasks()
    shown = [name for name in _TASKS_SHOWN if tasks[name].kind in given.kinds]
    needs = "; ".join(f"{name} ({needed(name)})" for name in shown)
    of_model = "" if len(given.kinds) > 1 else f" for the model, an {given.kinds[0]}"
    raise DataError(
        f"--data {source}: the columns {listed(map(repr, columns), 12)} fit no task{of_model}; "
        f"allowed: {needs}; hint: --task TASK with --set task.KEY=COLUMN names other columns"
    )


def needed(task: str) -> str:
    """The columns that rows of a task need, in words."""
    if task == "classification":
        return "a text or two, and a label"
    return " or ".join(", ".join(names) for names in registry.tasks()[task].needed_columns(task))


def _as_named(columns: Columns, source: str, wanted: str, given: Given) -> Choice:
    """The task that was asked for, with the keys that are set. Raises DataError if the columns
    that it needs by default are absent, and no key names others."""
    if registry.is_user_task(wanted) or wanted == "auto" or given.keys:
        return Choice(wanted)
    ways = registry.tasks()[wanted].needed_columns(wanted)
    if not any(set(names) <= set(columns) for names in ways):
        raise DataError(
            f"--data {source}: the columns {listed(map(repr, columns), 12)} do not fit --task "
            f"{wanted}, which needs {needed(wanted)}; hint: --set task.KEY=COLUMN names others"
        )
    return Choice(wanted)


def _choices(columns: Columns, given: Given, wanted: str | None) -> Iterator[Choice]:
    """All that fits, the likeliest first."""
    choosers: Sequence[Callable[[Columns, Given], Choice | None]] = (
        _fixed_columns, _chat, _words, _instructions, _classification, _answers, _text,
    )  # fmt: skip
    for choose in choosers:
        if (choice := choose(columns, given)) is not None:
            yield choice
    if wanted == "completion" and {"instruction", "output"} <= set(columns):
        yield Choice("completion", {}, "columns instruction and output (Alpaca)")


def _first(columns: Columns, names: Sequence[str], *kinds: str) -> str | None:
    """The first of ``names`` that a column of one of ``kinds`` has."""
    found = {name.lower(): name for name, column in columns.items() if column.kind in kinds}
    return next((found[name] for name in names if name in found), None)


def _fixed_columns(columns: Columns, given: Given) -> Choice | None:
    for task in ("wikisql", "e2e_nlg"):
        (needs,) = registry.tasks()[task].needed_columns(task)
        needs = tuple(name for name in needs if name not in ("header", "types"))  # of the tables
        if set(needs) <= set(columns):
            return Choice(task, {}, f"columns {', '.join(needs)}")
    return None


def _chat(columns: Columns, given: Given) -> Choice | None:
    if column := given.keys.get("messages_column"):
        return Choice("chat", {}, f"messages in column {column}")
    for name, title in (("messages", "OpenAI messages"), ("conversations", "ShareGPT")):
        if name in columns and columns[name].kind == "chat":
            return Choice("chat", _format(columns, name), f"{title} in column {name}")
    if {"prompt", "completion"} <= set(columns) and columns["completion"].kind == "chat":
        return Choice("chat", {}, "messages in prompt and completion")
    chats = [name for name, column in columns.items() if column.kind == "chat"]
    if len(chats) == 1:
        return Choice("chat", {"messages_column": chats[0]}, f"messages in column {chats[0]}")
    return None


def _format(columns: Columns, name: str) -> dict[str, str]:
    """The format, if the columns match several."""
    others = ({"messages"}, {"conversations"}, {"instruction", "output"}, {"prompt", "completion"})
    if sum(needs <= set(columns) for needs in others) < 2:
        return {}
    return {"format": "messages" if name == "messages" else "sharegpt"}


def _words(columns: Columns, given: Given) -> Choice | None:
    words = given.keys.get("tokens_column") or _first(columns, _WORDS, "words")
    tags = given.keys.get("tags_column") or _first(columns, _TAGS, "words", "ids")
    if words is None or tags is None:
        return None
    keys = {"tokens_column": words, "tags_column": tags}
    defaults = {"tokens_column": "tokens", "tags_column": "tags"}
    keys = {key: name for key, name in keys.items() if name != defaults[key]}
    return Choice("token_classification", keys, f"words in {words} and their tags in {tags}")


def _instructions(columns: Columns, given: Given) -> Choice | None:
    names = set(columns)
    further = [name for name in ("history", "tools") if columns.get(name, _NONE).kind != "empty"]
    if {"instruction", "output"} <= names:
        task = "chat" if given.has_chat_template or further else "completion"
        if {"prompt", "completion"} <= names:
            return Choice(task, {"format": "alpaca"}, "columns instruction and output (Alpaca)")
        return Choice(task, {}, "columns instruction and output (Alpaca)")
    if {"prompt", "completion"} <= names:
        return Choice("chat" if further else "completion", {}, "columns prompt and completion")
    return None


_NONE = Column("", "empty", 0, 0)


def _classification(columns: Columns, given: Given) -> Choice | None:
    keys = given.keys
    texts = [name for name, column in columns.items() if column.kind == "text"]
    label, label_keys, reason = _label(columns, given)
    if label is None and not label_keys:
        return None
    texts = [name for name in texts if name != label]
    pair = None if "text_column" in keys else _pair(texts)
    text = keys.get("text_column") or (pair[0] if pair else _main_text(columns, texts))
    if text is None:
        return None
    found: dict[str, Any] = {} if text == "text" else {"text_column": text}
    if pair:
        found["text_pair_column"] = pair[1]
    found |= label_keys
    read = f"texts in {pair[0]} and {pair[1]}" if pair else f"texts in {text}"
    return Choice("classification", found, f"{read}, {reason}")


def _pair(texts: Sequence[str]) -> tuple[str, str] | None:
    found = {name.lower(): name for name in texts}
    pairs = (pair for pair in _PAIRS if pair[0] in found and pair[1] in found)
    return next(((found[first], found[second]) for first, second in pairs), None)


def _main_text(columns: Columns, texts: Sequence[str]) -> str | None:
    """A column named as texts usually are, or else the longest."""
    named = _first({name: columns[name] for name in texts}, _TEXTS, "text")
    return named or max(texts, key=lambda name: columns[name].mean_characters, default=None)


def _label(columns: Columns, given: Given) -> tuple[str | None, dict[str, Any], str]:
    """The column of labels, the keys for it, and what is in it, in words."""
    keys = given.keys
    if keys.get("label_columns"):
        return None, {"label_columns": keys["label_columns"]}, "labels in several columns"
    label = keys.get("label_column") or _label_column(columns)
    if label is None:
        flags = [name for name, column in columns.items() if column.kind == "flag"]
        if len(flags) > 1:
            return None, {"label_columns": flags}, f"a 0 or 1 for each label in {listed(flags)}"
        return None, {}, ""
    column = columns.get(label, _NONE)
    found: dict[str, Any] = {} if label == "label" else {"label_column": label}
    if column.kind in ("words", "ids"):
        return label, {**found, "multi_label": True}, f"several labels per row in {label}"
    many = column.kind == "integer" and column.distinct > _MAX_NUMBERED_CLASSES
    if column.kind == "number" or many:
        return label, {**found, "regression": True}, f"a number in {label}"
    return label, found, f"{column.distinct} classes in {label}"


def _label_column(columns: Columns) -> str | None:
    """A column named as labels usually are, or else the only one whose values repeat as those of
    classes do."""
    kinds = ("text", "flag", "integer", "number", "words", "ids")
    if (sure := _first(columns, _SURE_LABELS, *kinds)) is not None:
        return sure
    named = _first(columns, _LABELS, *kinds)
    if named is not None and (columns[named].kind != "text" or columns[named].can_be_classes):
        return named
    classes = [name for name, column in columns.items() if column.can_be_classes]
    return classes[0] if len(classes) == 1 else None


def _answers(columns: Columns, given: Given) -> Choice | None:
    """Two columns of texts named as questions and answers usually are. A template sets them apart,
    as rows of prompt and completion are joined as they stand."""
    if given.keys.keys() & {"template", "completion_template", "prompt_column"}:
        return Choice("completion", {}, "the given columns")
    question = _first(columns, _QUESTIONS, "text")
    answer = _first(columns, _ANSWERS, "text", "integer", "number", "flag")
    if question is None or answer is None:
        return None
    keys = {
        "template": f"{question.capitalize()}: {{{question}}}\n{answer.capitalize()}:",
        "completion_template": f" {{{answer}}}",
    }
    return Choice("completion", keys, f"questions in {question} and answers in {answer}")


def _text(columns: Columns, given: Given) -> Choice | None:
    if column := given.keys.get("text_column"):
        return Choice("text", {}, f"texts in {column}")
    texts = [name for name, column in columns.items() if column.kind == "text"]
    text = _first(columns, _TEXTS, "text") or (texts[0] if len(texts) == 1 else None)
    if text is None:
        return None
    return Choice("text", {} if text == "text" else {"text_column": text}, f"texts in {text}")
