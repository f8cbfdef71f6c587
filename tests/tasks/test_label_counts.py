from __future__ import annotations

from lorakit.tasks.checks import counts_line, label_counts, similar_labels


def test_counts_are_in_the_order_of_the_labels() -> None:
    counts = label_counts(["b", "a", "never"], [1, 1, 0, 1])
    assert counts == {"b": 1, "a": 3, "never": 0}
    assert counts_line(counts) == "b 1, a 3, never 0"


def test_of_many_labels_the_ends_are_shown() -> None:
    counts = {f"intent-{n}": 1000 - n for n in range(150)} | {"rare": 1, "never": 0}
    line = counts_line(counts)
    assert line.startswith("152, most frequent intent-0 1,000, intent-1 999, ")
    assert line.endswith("least frequent intent-148 852, intent-149 851, rare 1; 1 in no row")
    assert len(line) < 250


def test_labels_that_look_alike_are_named_with_their_counts() -> None:
    counts = {"positive ": 3, "negative": 2, "Positive": 1, "no\u00a0idea": 1, "no idea": 1}
    assert similar_labels(counts) == [
        "warning: labels that differ only by case or white space are separate classes: "
        '"positive " (3 rows), "Positive" (1 row)',
        "warning: labels that differ only by case or white space are separate classes: "
        '"no\\xa0idea" (1 row), "no idea" (1 row)',
    ]
    assert similar_labels({"positive": 1, "negative": 1, "posi tive": 1}) == []
    many = {name: 1 for n in range(8) for name in (f"label{n}", f"Label{n}")}
    assert len(similar_labels(many)) == 6
    assert similar_labels(many)[-1] == "warning: 3 more such groups of labels"
    assert '"positive "' in counts_line(counts)
