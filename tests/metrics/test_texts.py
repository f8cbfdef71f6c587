"""BLEU, NIST, ROUGE-L and CIDEr compared with the challenge's scripts and plain formulas."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lorakit.metrics import coco_caption
from lorakit.metrics.coco_caption import cider, rouge_l
from lorakit.metrics.mteval import bleu, nist, tokenize
from tests.metrics.constructed import COUNT, blocks, five_words, instances
from tests.metrics.hashing import tokens_hash

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))["corpora"]
SCORES = [bleu, nist, rouge_l, cider]
Group = list[str]


@pytest.mark.parametrize("index", range(len(blocks())))
def test_scores_equal_the_official_scripts(index: int) -> None:
    predictions, references = instances()
    block, golden = blocks()[index], GOLDEN[index]
    ours, theirs = predictions[block], references[block]
    texts = [*ours, *(text for group in theirs for text in group)]
    assert tokens_hash([coco_caption.tokenize(text) for text in texts]) == golden["tokens"]
    assert [rouge_l(ours, theirs), cider(ours, theirs)] == pytest.approx(golden["coco"], abs=1e-9)
    ours, theirs = five_words(block)
    assert min(len(tokenize(text)) for text in ours) >= 5
    assert [bleu(ours, theirs), nist(ours, theirs)] == pytest.approx(golden["pymteval"], abs=1e-9)


def test_the_constructed_corpus() -> None:
    predictions, references = instances()
    assert len(predictions) == len(references) == COUNT >= 500
    assert len(GOLDEN) == len(blocks())
    assert {"", "The", "£5"} <= set(predictions)
    assert {len(group) for group in references} == set(range(1, 9))
    assert sum(p in group for p, group in zip(predictions, references, strict=True)) < COUNT / 2


def plain_corpus() -> tuple[Group, list[Group]]:
    """Return 500 lower-case texts that every tokenizer splits at spaces only."""
    draw = random.Random(5)
    words = ["red", "river", "cat", "near", "old", "food", "with", "view", "from", "to", "nine"]

    def text(low: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, 14)))

    references = [[text(5) for _ in range(draw.randint(1, 4))] for _ in range(500)]
    predictions = []
    for group in references:
        kept = [word for word in draw.choice(group).split() if draw.random() < 0.9]
        predictions.append(" ".join(kept) if len(kept) >= 5 else text(5))
    return predictions, references


def grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def clipped(prediction: str, group: Group, n: int) -> dict[tuple[str, ...], int]:
    own = grams(prediction, n)
    return {g: min(own.count(g), max(grams(r, n).count(g) for r in group)) for g in set(own)}


def plain_bleu(predictions: Group, references: list[Group]) -> float:
    pairs = list(zip(predictions, references, strict=True))
    precisions = [
        sum(sum(clipped(p, group, n).values()) for p, group in pairs)
        / sum(len(grams(p, n)) for p in predictions)
        for n in (1, 2, 3, 4)
    ]
    length = sum(len(p.split()) for p in predictions)
    closest = 0
    for p, group in pairs:
        sizes = np.array(sorted(len(r.split()) for r in group))
        closest += int(sizes[np.abs(sizes - len(p.split())).argmin()])
    penalty = 1.0 if length > closest else math.exp(1 - closest / length)
    return penalty * float(np.prod(precisions)) ** 0.25


def plain_nist(predictions: Group, references: list[Group]) -> float:
    every = [text for group in references for text in group]
    count = {n: {} for n in range(1, 6)}  # type: dict[int, dict[tuple[str, ...], int]]
    for n, table in count.items():
        for text in every:
            for gram in grams(text, n):
                table[gram] = table.get(gram, 0) + 1
    words = sum(len(text.split()) for text in every)
    total = 0.0
    for n in range(1, 6):
        gained = 0.0
        for p, group in zip(predictions, references, strict=True):
            for gram, hit in clipped(p, group, n).items():
                if hit:
                    before = count[n - 1][gram[:-1]] if n > 1 else words
                    gained += hit * math.log(before / count[n][gram]) / math.log(2)
        total += gained / sum(len(grams(p, n)) for p in predictions)
    mean = sum(np.mean([len(r.split()) for r in group]) for group in references)
    ratio = min(1.0, sum(len(p.split()) for p in predictions) / mean)
    return total * 0.5 ** ((math.log(ratio) / math.log(1.5)) ** 2)


def plain_rouge_l(predictions: Group, references: list[Group]) -> float:
    def common(a: Sequence[str], b: Sequence[str]) -> int:
        @cache
        def size(i: int, j: int) -> int:
            if i == len(a) or j == len(b):
                return 0
            if a[i] == b[j]:
                return 1 + size(i + 1, j + 1)
            return max(size(i + 1, j), size(i, j + 1))

        return size(0, 0)

    scores = []
    for p, group in zip(predictions, references, strict=True):
        own = p.split()
        lengths = [(common(own, r.split()), len(r.split())) for r in group]
        precision = max(length for length, _ in lengths) / len(own)
        recall = max(length / size for length, size in lengths)
        scores.append(2.44 * precision * recall / (recall + 1.44 * precision) if recall else 0.0)
    return float(np.mean(scores))


def plain_cider(predictions: Group, references: list[Group]) -> float:
    total = np.zeros(len(predictions))
    for n in (1, 2, 3, 4):
        every = [*predictions, *(r for group in references for r in group)]
        names = {gram: i for i, gram in enumerate({g for text in every for g in grams(text, n)})}
        frequency = np.zeros(len(names))
        for group in references:
            frequency[[names[g] for g in {g for r in group for g in grams(r, n)}]] += 1
        idf = math.log(len(predictions)) - np.log(np.maximum(frequency, 1))

        def vector(text: str, names=names, idf=idf, n=n):  # type: ignore[no-untyped-def]
            counts = np.bincount([names[g] for g in grams(text, n)], minlength=len(names))
            return counts * idf

        for index, (p, group) in enumerate(zip(predictions, references, strict=True)):
            own = vector(p)
            for r in group:
                other = vector(r)
                cosine = np.minimum(own, other) @ other
                cosine /= np.linalg.norm(own) * np.linalg.norm(other)
                gap = len(p.split()) - len(r.split())
                total[index] += cosine * math.exp(-(gap**2) / 72) / len(group) / 4
    return 10 * float(total.mean())


@pytest.mark.parametrize(
    ("score", "plain"),
    [(bleu, plain_bleu), (nist, plain_nist), (rouge_l, plain_rouge_l), (cider, plain_cider)],
)
def test_scores_equal_the_formulas(
    score: Callable[[Group, list[Group]], float], plain: Callable[[Group, list[Group]], float]
) -> None:
    predictions, references = plain_corpus()
    assert len(predictions) == 500
    found = score(predictions, references)
    assert found == pytest.approx(plain(predictions, references), abs=1e-9)
    assert found < score([group[0] for group in references], references)


@pytest.mark.parametrize("empty", ["", " \n", "..."])
def test_empty_texts_score_zero(empty: str) -> None:
    references = [["a pub near the river"], ["a cheap pub", "a pub"]]
    for score in SCORES:
        assert score([empty] * 2, references) == pytest.approx(0, abs=1e-4)


def test_short_predictions() -> None:
    references = [["a pub"], ["the pub"], ["food"]]
    assert 0 < bleu(["a pub", "the pub", "food"], references) < 2e-3, "there is no 4-gram"
    assert nist(["a pub", "the pub", "food"], references) > 0
    assert rouge_l(["a pub", "the pub", "food"], references) == 1
    assert cider(["a pub"], [["a pub"]]) == 0, "log 1 = 0: every word is in every instance"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Vaults, it's £20-25.", "the vaults it 's # 20-25"),
        ("£20-£25 or €5", "# 20 - # 25 or $ 5".replace(" - ", " ")),
        ("I can't, won't; cannot!", "i ca n't wo n't can not"),
        ("kids' 'Zizzi\u2019s' o'clock", "kids zizzi 's o'clock"),
        ("Mr. Low of St. Ives, etc.", "mr. low of st. ives etc."),
        ("at 5 p.m. in the U.S.", "at 5 p.m. in the u.s."),
        ("No. 5, not no. Go", "no. 5 not no go"),
        ("(bar) [x] {y}", "-lrb- bar -rrb- -lsb- x -rsb- -lcb- y -rcb-"),
        ("a -- b \u2013 c ... d?!", "a b c d ?!"),
        ("well-known and/or 3/5", "well-known and/or 3/5"),
        ("fish &amp; chips, Q&A", "fish & chips q&a"),
        ("city center., near food,drinks", "city center. near food drinks"),
        ("about 25 L. The end", "about 25 l the end"),
        ("good.It 5.It", "good.it 5 it"),
        ("x 8 3/5 <b>", "x 8\u00a03/5 <b>"),
        ("\U0001f600 caf\u00e9", "caf\u00e9"),
        ("", ""),
    ],
)
def test_treebank_tokens(text: str, tokens: str) -> None:
    assert coco_caption.tokenize(text) == [word for word in tokens.split(" ") if word]
