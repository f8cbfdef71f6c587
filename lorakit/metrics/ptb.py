"""Penn-Treebank tokens without punctuation, as coco-caption's PTBTokenizer gives them.

coco-caption runs Stanford's PTBTokenizer (CoreNLP 3.4.1, ``-preserveLines -lowerCase``) and drops
the tokens of ``_DROPPED``. This states its rules for English prose; not covered are emoticons and
the telephone numbers that it keeps together.
"""

from __future__ import annotations

import re

_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", ";"])

#: What becomes another text; brackets are not dropped, since lower-casing has changed their names.
_RENAMED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4",
    **dict.fromkeys('"«»\u2018\u2019\u201c\u201d\u2013\u2014\u2015\u2025\u2026', "'"),
}  # fmt: skip

_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES), re.IGNORECASE)

#: Abbreviations that keep their full stop: in any case, only capitalised, only before a number.
_ANY_CASE = """
    adm al ala alex apr ariz assn asst atty aug ave bhd bldg blvd brig bros calif capt cf cmdr
    co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec esq est etc ext feb fla
    fri ft ga gen gov hon inc ind insp intl jan jr jul jun kan kans ky lieut lt ltd maj mar md
    messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn
    plc pres prof pvt rd rep rev rt sen sep sept sgt sq sr st supt sys tel tenn thu thurs treas
    tue tues univ va vs vt wed wis wyo
"""
_CAPITALISED = "Ark Del Ill La Mass Miss Mo Ore Pa Tex Wash"
_BEFORE_NUMBER = "ca no nos art fig figs pp"
#: Words that begin a sentence, so that the full stop after a single letter ends one.
_STARTS = """
    The This That There It In At A An But He She They We You If However What When While Then These
    Their Our Her As So Some Many One Now Here Other Such After Since Yet Last
"""


def _words(text: str) -> str:
    return "|".join(text.split())


_QUOTE = "['\u2019]"
_LETTER = r"[^\W\d_²³¹º¼½¾]"
_ALNUM = r"[^\W_²³¹º¼½¾]"
_BEFORE_PAUSE = r"\.(?=[,;:])"  # then a full stop is taken for an abbreviation's
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
  | (?:(?i:{_words(_ANY_CASE)})|{_words(_CAPITALISED + " " + _CAPITALISED.upper())})\.(?!{_LETTER})
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
    """Lower-cased tokens of ``text``: clitics apart (``it 's``, ``do n't``), words with hyphens
    whole, currency signs as ``#`` and ``$``, and no punctuation. A space within a token (``1 3/5``)
    is U+00A0."""
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
    """Beyond the 16 bits of a Java character, which the tokeniser leaves out."""
    return len(token) == 1 and ord(token) > 0xFFFF
