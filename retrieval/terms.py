"""
What a visitor may have meant by other words: the store's own terms and synonyms of shops. Pure, but for one table read
at import, `synonyms.txt`, one group a line.

Knows words; knows no passages, scores or vectors. A `Slot` says: where the query has these words, those may stand
instead. What is meant never replaces what is written; whichever fits a text better counts. Typing errors are slots too,
see spelling.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retrieval.words import detect_lang, fold, words

MAX_SLOTS = 8  # a query; what comes after them is read as it is written
MAX_OTHERS = 4  # of a group, the most alike in length first
MAX_GROUPS = 2_000
MAX_TERM_CHARS = 40
MAX_IN_GROUP = 20
TRUST = {
    "term": 1.0,
    "synonym": 0.9,
    "code": 1.0,
    "typo": 0.85,
    "gloss": 0.9,
}  # what an other word is worth beside the written one

Why = Literal["term", "synonym", "code", "typo", "gloss"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a query that may be read another way."""

    shown: str  # what stands there, folded
    written: tuple[str, ...]  # its index words
    meant: tuple[str, ...]  # how it may be read
    others: tuple[tuple[str, ...], ...]  # their index words, in the same order
    why: Why

    @property
    def trust(self) -> float:
        """What a reading counts beside what is written, in (0, 1]."""
        return TRUST[self.why]


class Terms:
    """Groups of terms that mean the same: the store's own and the shipped ones. Immutable."""

    def __init__(self, own: Sequence[Sequence[str]] = ()) -> None:
        """Take the store's own groups, of two terms and more; see `retrieval.load.load_terms`."""
        self.own = tuple(tuple(group) for group in own)
        self._own = _by_term(self.own)
        self._all: dict[str, tuple[str, ...]] = {**_by_term(_SHIPPED), **self._own}
        self._pattern = _pattern_of(self._all)
        self._own_pattern = _pattern_of(self._own)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Terms) and other.own == self.own

    def __hash__(self) -> int:
        return hash(self.own)

    def slots(self, folded: str) -> list[Slot]:
        """Return where a folded query has a term with synonyms, in order; longer terms first where two overlap."""
        found: dict[str, Slot] = {}
        for match in self._pattern.finditer(folded):
            term = match.group()
            if term in found or len(found) == MAX_SLOTS:
                continue
            others = self._all[term][:MAX_IN_GROUP]
            if term not in self._own:
                # A synonym of the other language says what the vectors know already, and makes rare words of it.
                lang = detect_lang(term)
                others = tuple(other for other in others if detect_lang(other) == lang)[:MAX_OTHERS]
            if others:
                read = tuple(tuple(dict.fromkeys(words(other))) for other in others)
                why: Why = "term" if term in self._own else "synonym"
                found[term] = Slot(term, tuple(dict.fromkeys(words(term))), others, read, why)
        return list(found.values())

    def rewritten(self, query: str) -> str | None:
        """Return `query` with the store's own terms said the other way; None where it has none. For the vector side."""
        if not self._own:
            return None
        folded = fold(query)

        def other(match: re.Match[str]) -> str:
            term = match.group()
            lang = detect_lang(term)
            of_lang = [entry for entry in self._own[term] if detect_lang(entry) == lang]
            return (of_lang or list(self._own[term]))[0]

        turned = self._own_pattern.sub(other, folded)
        return None if turned == folded else turned


def _by_term(groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return each folded term with the others of its group."""
    found: dict[str, tuple[str, ...]] = {}
    for group in groups:
        folded = list(dict.fromkeys(fold(term) for term in group))
        for term in folded:
            others = (*found.get(term, ()), *(other for other in folded if other != term))
            found[term] = tuple(dict.fromkeys(others))
    return {term: others for term, others in found.items() if term and others}


def _pattern_of(terms: Mapping[str, object]) -> re.Pattern[str]:
    if not terms:
        return re.compile(r"(?!)")
    longest_first = sorted(terms, key=lambda term: (-len(term), term))
    latin = [re.escape(term) for term in longest_first if term[0].isascii()]
    han = [re.escape(term) for term in longest_first if not term[0].isascii()]
    alternatives = [rf"(?<![a-z0-9])(?:{'|'.join(latin)})(?![a-z0-9])"] if latin else []
    return re.compile("|".join([*han, *alternatives]))


def _read_groups(name: str) -> list[tuple[str, ...]]:
    lines = (Path(__file__).parent / name).read_text("utf-8").splitlines()
    return [tuple(term.strip() for term in line.split("|")) for line in lines if line and not line.startswith("#")]


_SHIPPED = _read_groups("synonyms.txt")
