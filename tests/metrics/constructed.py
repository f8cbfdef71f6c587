"""520 constructed predictions with one to eight references each, generated from a seed. The
sentences are invented; they are altered in the ways in which outputs and references differ: words,
order, case, punctuation, numbers, money, hyphens, quotes, entities, other scripts.
"""

from __future__ import annotations

import random
from collections.abc import Callable

COUNT, BLOCK = 520, 20

_NAMES = ["The Copper Kettle", "Zizou's", "Café Lumière", "St. Anne's Inn", "O'Malley's", "B&B 42"]
_KINDS = ["pub", "coffee shop", "family-friendly restaurant", "take-away", "five-star bistro"]
_FOODS = ["Thai", "Peruvian", "fish & chips", "rock 'n' roll burgers", "jalapeño", "crème brûlée"]
_PRICES = [
    "£20-25", "less than £20", "£3.50", "more than £30", "£20-£25", "$1,200.75", "cheap", "€15",
    "between 20 and 25 pounds", "20-25", "under 5.5 pounds", "low-cost",
]  # fmt: skip
_RATINGS = ["5 out of 5", "3/5", "low", "one-star", "4.5", "average", "a 3-star rating of 3", "50%"]
_PLACES = ["riverside", "city centre", "Mr. Green's", "No. 7 High St.", "U.S. embassy", "5th Ave."]
_FORMS = [
    "{name} is a {kind} near the {place} that serves {food} food for {price}. Its rating is {rating}.",
    "Near the {place}, {name} offers {food} food. It's {price} and rated {rating}!",
    "{name}, a {kind}, isn't far from the {place}; prices are {price} ({rating}).",
    "There is a {kind} called \"{name}\" in the {place}. They don't serve {food}, e.g. at {price}.",
    "If you'd like {food}: try '{name}' by the {place} - it costs {price}, i.e. {rating} at 8 p.m.",
    "{name} ... {rating}, {price}. You can't and/or won't find {food} at the {place}?!",
    "A {kind} with {food} food is {name}. The customer rating is {rating}. Located at {place}.",
]  # fmt: skip


def instances() -> tuple[list[str], list[list[str]]]:
    """Return ``COUNT`` predictions and the references of each."""
    draw = random.Random(20170706)
    predictions, references = [], []
    for index in range(COUNT):
        facts = {
            "name": draw.choice(_NAMES), "kind": draw.choice(_KINDS), "food": draw.choice(_FOODS),
            "price": draw.choice(_PRICES), "rating": draw.choice(_RATINGS),
            "place": draw.choice(_PLACES),
        }  # fmt: skip
        group = [form.format(**facts) for form in draw.choices(_FORMS, k=draw.randint(1, 8))]
        text = draw.choice(group)
        for change in draw.choices(_CHANGES, k=draw.randint(0, 3)):
            text = change(text, draw)
        if index % BLOCK == 7:
            text = draw.choice(["", "The", "£5", "a b", "...", "It's", "family-friendly pub ."])
        predictions.append(text)
        references.append(group)
    return predictions, references


def blocks() -> list[slice]:
    """Return the corpora to score: blocks of ``BLOCK`` predictions, and all together."""
    return [*(slice(i, i + BLOCK) for i in range(0, COUNT, BLOCK)), slice(0, COUNT)]


def five_words(block: slice) -> tuple[list[str], list[list[str]]]:
    """Return the instances of a block whose prediction has at least five words."""
    pairs = zip(*(half[block] for half in instances()), strict=True)
    kept = [pair for pair in pairs if len(pair[0].split()) >= 5]
    return [prediction for prediction, _ in kept], [group for _, group in kept]


def _drop(text: str, draw: random.Random) -> str:
    return " ".join(word for word in text.split() if draw.random() > 0.2)


def _swap(text: str, draw: random.Random) -> str:
    words = text.split()
    for _ in range(min(3, len(words) - 1)):
        i = draw.randrange(len(words) - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def _repeat(text: str, draw: random.Random) -> str:
    words = text.split()
    if not words:
        return text
    i = draw.randrange(len(words))
    return " ".join(words[: i + 3] + words[i:])


def _insert(text: str, draw: random.Random) -> str:
    extra = [
        "&amp;", "&quot;quoted&quot;", "&lt;3", "naïve", "日本", "--", "\u2013", "(bar)", "[sic]", "1/2",
        "well-known", "3.50", "1,000", "'80s", "'em", "cannot", "gonna", "we've", "children\u2019s",
        "“fine”", "Dr. Who", "etc.", "10am-5pm", "@home", "#1", "a*b", "x_y", "e.g.", "!!", "½",
        "Q&A", "kids'", "5.", "...", "good.It", "food,drinks", "centre.,", "it's-a", "<b>",
    ]  # fmt: skip
    words = text.split()
    words.insert(draw.randint(0, len(words)), draw.choice(extra))
    return " ".join(words)


def _case(text: str, draw: random.Random) -> str:
    return draw.choice([text.upper(), text.lower(), text.title()])


def _marks(text: str, draw: random.Random) -> str:
    old, new = draw.choice(
        [(".", ""), (".", " ."), (",", " ,"), ("-", " - "), ("-", " "), ("'", "\u2019"), ("£", ""),
         (" ", "  "), (" ", "\u00a0"), (".", ";"), (".", "!"), ("£", "GBP "), (". ", "."),
         ("is", "was"), ("&", "and"), (" ", "\n"), ("20", "30"), (", ", ",")]
    )  # fmt: skip
    return text.replace(old, new)


def _cut(text: str, draw: random.Random) -> str:
    words = text.split()
    return " ".join(words[: draw.randint(0, len(words))])


_CHANGES: list[Callable[[str, random.Random], str]] = [
    _drop, _swap, _repeat, _insert, _insert, _case, _marks, _marks, _cut
]  # fmt: skip
