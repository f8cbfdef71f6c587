"""Writes ``golden.json``: what the E2E challenge's own scripts say of ``constructed.instances()``.

    python -m tests.metrics.make_golden CHECKOUT > tests/metrics/golden.json

CHECKOUT is one of https://github.com/tuetschek/e2e-metrics at commit
1b9c4d87fd0bbb171ea966741cdc012588581ed4, which needs Java, NumPy and the package ``future``. It is
run as it stands. Of each corpus of ``constructed.blocks()``:

- ``coco``: [ROUGE-L, CIDEr] of its pycocoevalcap, of all predictions;
- ``tokens``: a hash of the tokens that its PTBTokenizer gives, of all texts;
- ``pymteval``: [BLEU, NIST] of its metrics/pymteval.py, only of ``constructed.five_words``: it
  counts the n-grams of an output of fewer than n tokens otherwise than mteval-v13a.

So of the shorter predictions BLEU and NIST are not from there: test_texts.py has sacrebleu and
a plain formula for them. The figures of ``test_released_rows`` in tests/tasks/test_e2e_nlg.py are
of the same scripts, in the order BLEU, NIST, ROUGE-L, CIDEr; no output there is that short.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.metrics.constructed import blocks, five_words, instances
from tests.metrics.hashing import tokens_hash


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    predictions, references = instances()
    tokenized = _tokenized([[text] for text in predictions]), _tokenized(references)
    corpora = []
    for block in blocks():
        ours, theirs = tokenized[0][block], tokenized[1][block]
        texts = [text.split(" ") if text else [] for group in [*ours, *theirs] for text in group]
        mteval = _mteval(*five_words(block))
        corpora.append(
            {"pymteval": mteval, "coco": _coco(ours, theirs), "tokens": tokens_hash(texts)}
        )
    json.dump({"corpora": corpora}, sys.stdout, indent=1)
    print()


def _tokenized(groups: list[list[str]]) -> list[list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # type: ignore[import-not-found]

    captions = {i: [{"caption": text} for text in group] for i, group in enumerate(groups)}
    found: dict[int, list[str]] = PTBTokenizer().tokenize(captions)
    return [found[i] for i in range(len(groups))]


def _mteval(predictions: list[str], references: list[list[str]]) -> list[float]:
    from metrics.pymteval import BLEUScore, NISTScore  # type: ignore[import-not-found]

    scorers = [BLEUScore(), NISTScore()]
    for prediction, group in zip(predictions, references, strict=True):
        for scorer in scorers:
            scorer.append(prediction, group)
    return [float(scorer.score()) for scorer in scorers]


def _coco(predictions: list[list[str]], references: list[list[str]]) -> list[float]:
    from pycocoevalcap.cider.cider import Cider  # type: ignore[import-not-found]
    from pycocoevalcap.rouge.rouge import Rouge  # type: ignore[import-not-found]

    ours: dict[int, Any] = dict(enumerate(predictions))
    theirs: dict[int, Any] = dict(enumerate(references))
    return [float(scorer.compute_score(theirs, ours)[0]) for scorer in (Rouge(), Cider())]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
