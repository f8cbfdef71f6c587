"""``cider`` and ``rouge_l`` of a corpus with several references, as in coco-caption.

Text is tokenized as by Stanford's PTBTokenizer (CoreNLP 3.4.1, ``-preserveLines -lowerCase``),
without punctuation. ``tokenize`` implements its rules for English prose, except for emoticons and
telephone numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Ngram = tuple[str, ...]

_CIDER_ORDER = 4
_SIGMA = 6.0  # in bigrams
#: ROUGE-L weights recall beta^2 times as much as precision.
_BETA = 1.2

_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", ";"])

#: Replacements of tokens. Brackets are not dropped, since their names are lower-cased.
_RENAMED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4",
    **dict.fromkeys('"«»\u2018\u2019\u201c\u201d\u2013\u2014\u2015\u2025\u2026', "'"),
}  # fmt: skip

_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES), re.IGNORECASE)

#: Abbreviations that keep their period: in any case, only capitalized, only before a number.
_ANY_CASE = """
    adm al ala alex apr ariz assn asst atty aug ave bhd bldg blvd brig bros calif capt cf cmdr
    co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec esq est etc ext feb fla
    fri ft ga gen gov hon inc ind insp intl jan jr jul jun kan kans ky lieut lt ltd maj mar md
    messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn
    plc pres prof pvt rd rep rev rt sen sep sept sgt sq sr st supt sys tel tenn thu thurs treas
    tue tues univ va vs vt wed wis wyo
"""
_CAPITALIZED = "Ark Del Ill La Mass Miss Mo Ore Pa Tex Wash"
_BEFORE_NUMBER = "ca no nos art fig figs pp"
#: Words that begin a sentence: a period between a single letter and one of them ends a sentence.
_STARTS = """
    The This That There It In At A An But He She They We You If However What When While Then These
    Their Our Her As So Some Many One Now Here Other Such After Since Yet Last
"""


def _words(text: str) -> str:
    return "|".join(text.split())


_QUOTE = "['\u2019]"
_LETTER = r"[^\W\d_²³¹º¼½¾]"
_ALNUM = r"[^\W_²³¹º¼½¾]"
_BEFORE_PAUSE = r"\.(?=[,;:])"  # a period here belongs to an abbreviation
_TOKEN = re.compile(
    rf"""
    </?[A-Za-z!][^<>]*>  |  [0-9]+[ ][0-9]+/[0-9]+
  | https?://[^\s"<>]*[^\s"<>.,;:!?()']
  | [A-Za-z0-9][\w.-]*@[A-Za-z][\w-]*(?:\.\w+)*  |  [@#][A-Za-z][A-Za-z_]*
  | '[tT](?=is\b|was\b)  |  (?i:{_QUOTE}(?:n{_QUOTE}|(?:em|til|cause|n|[0-9]0s)\b))
  | (?i:ol|dunkin|somethin|nothin){_QUOTE}(?!\w)  |  [Yy]{_QUOTE}(?=[a-z])  |  [Mm]a{_QUOTE}am\b
  | (?i:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b))
  | (?P<contraction> (?i:{_QUOTE}(?:[sdm]|ll|re|ve)(?!{_LETTER})  |  n{_QUOTE}t{_LETTER}*) )
  | {_LETTER}+?(?=[nN]{_QUOTE}[tT])
  | [CcDdLlOo]{_QUOTE}{_LETTER}{_ALNUM}*(?:-{_ALNUM}+)*
  | [A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*){{1,2}}
  | {_ALNUM}(?:{_ALNUM}|[.,])*(?:-{_ALNUM}+)+(?:{_BEFORE_PAUSE})?
  | [A-Z]+(?:&[A-Z]+)+
  | [A-Za-z](?=\.\s+(?:{_words(_STARTS)})(?!\S))
  | Ph\.D\.  |  (?:[A-Za-z]\.)+(?!\w*{_LETTER})
  | (?:(?i:{_words(_ANY_CASE)})|{_words(_CAPITALIZED + " " + _CAPITALIZED.upper())})\.(?!{_LETTER})
  | (?i:{_words(_BEFORE_NUMBER)})\.(?=\s?[0-9])
  | {_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*(?:_{_ALNUM}+)*(?:{_BEFORE_PAUSE})?
  | [0-9]+{_LETTER}{_ALNUM}*(?:{_BEFORE_PAUSE})?
  | [-+]?[0-9]*(?:[.,:]?[0-9]+)+(?:{_BEFORE_PAUSE})?
  | (?P<run> -{{2,}} | \.{{2,}} | ``|'' )  |  [!?]{{2,}}  |  \*+  |  _+
  | \S
    """,
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Lower-cased Penn Treebank tokens without punctuation: clitics are separate (``it 's``,
    ``do n't``), hyphenated words are not, currency signs become ``#`` and ``$``. A space within a
    token (``1 3/5``) is U+00A0."""
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0].lower()], text).replace("\u00ad", "")
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if match["contraction"]:
            token = token.replace("\u2019", "'")
        token = _RENAMED.get(token, token).lower()
        if token not in _DROPPED and not match["run"] and not _is_unreadable(token):
            tokens.append(token.replace(" ", "\u00a0"))
    return tokens


def _is_unreadable(token: str) -> bool:
    """Whether the token is a character beyond 16 bits, which the Java tokenizer omits."""
    return len(token) == 1 and ord(token) > 0xFFFF


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), 0 to 10: 10 * mean over predictions, their references and
    n = 1..4 of exp(-(l_c - l_r)^2 / (2 sigma^2)) * sum_g min(c_g, r_g) r_g / (|c| |r|).

    c and r are the n-gram vectors of a prediction and a reference: count * (log N - log df), with N
    the number of predictions and df that of predictions with the n-gram in a reference (at least
    1). Tokens are not stemmed. ``references[i]`` are those of ``predictions[i]``, at least one; a
    single prediction scores 0, since log N = 0.

    Source: pycocoevalcap/cider of tuetschek/e2e-metrics. As there, the lengths l_c and l_r are
    counted in bigrams.
    """
    assert len(predictions) == len(references) > 0
    candidates = [_counts(prediction) for prediction in predictions]
    groups = [[_counts(text) for text in texts] for texts in references]
    frequency: Counter[Ngram] = Counter()
    for group in groups:
        frequency.update(set().union(*group))
    idf = _Idf(math.log(len(predictions)), frequency)
    total = 0.0
    for candidate, group in zip(candidates, groups, strict=True):
        vector = idf.vector(candidate)
        scores = [_similarity(vector, idf.vector(reference)) for reference in group]
        total += sum(scores) / len(scores)
    return 10 * total / len(predictions)


def _counts(text: str) -> Counter[Ngram]:
    tokens = " ".join(tokenize(text)).split()  # also splits at U+00A0
    return Counter(
        tuple(tokens[i : i + n])
        for n in range(1, _CIDER_ORDER + 1)
        for i in range(len(tokens) - n + 1)
    )


@dataclass(frozen=True)
class _Vector:
    weights: dict[Ngram, float]
    norms: list[float]  # by n - 1
    length: int  # in bigrams


@dataclass(frozen=True)
class _Idf:
    log_count: float
    frequency: Counter[Ngram]

    def vector(self, counts: Counter[Ngram]) -> _Vector:
        weights = {
            ngram: count * (self.log_count - math.log(max(1, self.frequency[ngram])))
            for ngram, count in counts.items()
        }
        squares = [0.0] * _CIDER_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Vector(weights, [math.sqrt(square) for square in squares], length)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    products = [0.0] * _CIDER_ORDER
    for ngram, weight in candidate.weights.items():
        other = reference.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    cosines = [
        product / (a * b) if a and b else 0.0
        for product, a, b in zip(products, candidate.norms, reference.norms, strict=True)
    ]
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * _SIGMA**2))
    return penalty * sum(cosines) / _CIDER_ORDER


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L (Lin 2004), 0 to 1: mean over predictions of (1 + beta^2) P R / (R + beta^2 P).

    With L the length of the longest common subsequence in tokens, P is the largest
    L / len(prediction) and R the largest L / len(reference) over the references, possibly of
    different ones. ``references[i]`` are those of ``predictions[i]``, at least one.

    Source: pycocoevalcap/rouge of tuetschek/e2e-metrics. As there, a text without tokens has one,
    which is empty.
    """
    assert len(predictions) == len(references) > 0
    pairs = zip(predictions, references, strict=True)
    return sum(_score(prediction, texts) for prediction, texts in pairs) / len(predictions)


def _score(prediction: str, references: Sequence[str]) -> float:
    tokens = tokenize(prediction) or [""]
    others = [tokenize(text) or [""] for text in references]
    lengths = [_common_subsequence(tokens, other) for other in others]
    precision = max(lengths) / len(tokens)
    recall = max(length / len(other) for length, other in zip(lengths, others, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for j, other in enumerate(right, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
