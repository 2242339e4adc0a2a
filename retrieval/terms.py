"""
What a visitor may have meant by other words: the store's own terms, synonyms of shops, typing errors. Pure, but for
two tables read at import.

Knows words and a store's vocabulary; knows no passages, scores or vectors. A `Slot` says: where the query has these
words, those may stand instead. What is meant never replaces what is written; whichever fits a text better counts.
The tables: `synonyms.txt`, one group a line; `pinyin.txt`, one syllable and its characters a line, made from pypinyin
(MIT), without tones: the package itself is ten times as large and reads phrases, which a typing error has none of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rapidfuzz.distance import OSA
from rapidfuzz.process import extract

from retrieval.words import detect_lang, fold, is_quantity, stem, weight, words

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
_LATIN = re.compile(r"[a-z]+(?:'[a-z]+)?")
_HAN = re.compile(r"[\u3400-\u9fff]+")

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


# --- typing errors ----------------------------------------------------------------------------------------------------


def _read_pinyin() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "pinyin.txt").read_text("utf-8").splitlines():
        syllable, _, characters = line.partition(" ")
        for character in characters:
            found.setdefault(character, []).append(_blurred(syllable))
    return {character: tuple(dict.fromkeys(syllables)) for character, syllables in found.items()}


def _blurred(syllable: str) -> str:
    """Return a syllable without what many speakers do not tell apart: zh/z, ch/c, sh/s, -ng/-n, l/n at the start."""
    syllable = re.sub(r"^([zcs])h", r"\1", syllable)
    return re.sub(r"^l", "n", re.sub(r"([aei])ng$", r"\1n", syllable))


_PINYIN = _read_pinyin()


class Spelling:
    """Words a store does not have -> words of it that they may be typing errors of."""

    MIN_CHARS = 5  # shorter words have too many neighbours: "bag", "rag"
    TWO_FROM = 9  # from this length on two errors are forgiven
    MAX_WORDS = 200_000  # a store with more has every likely error as a word of its own

    def __init__(self, vocabulary: Collection[str]) -> None:
        """Take the index words of a store; some µs a word."""
        self._known = vocabulary
        self._by_length: dict[tuple[str, int], list[str]] = {}
        self._by_sound: dict[tuple[str, str], list[str]] = {}
        for word in self._known if len(vocabulary) <= self.MAX_WORDS else ():
            if len(word) >= 4 and word.isascii() and word.isalpha():
                self._by_length.setdefault((word[0], len(word)), []).append(word)
            elif len(word) == 2 and word[0] in _PINYIN and word[1] in _PINYIN:
                for first in _PINYIN[word[0]]:
                    for second in _PINYIN[word[1]]:
                        self._by_sound.setdefault((first, second), []).append(word)
        self.likely = lru_cache(maxsize=4_096)(self._likely)

    def __contains__(self, word: str) -> bool:
        return word in self._known

    def _likely(self, word: str) -> tuple[str, ...]:
        """Return the known words nearest to an unknown Latin one: of one first letter, one or two errors away."""
        if len(word) < self.MIN_CHARS:
            return ()
        most = 2 if len(word) >= self.TWO_FROM else 1
        near: list[tuple[int, str]] = []
        for length in range(len(word) - most, len(word) + most + 1):
            pool = self._by_length.get((word[0], length), ())
            found = extract(word, pool, scorer=OSA.distance, score_cutoff=most, limit=3)
            near += [(int(distance), known) for known, distance, _ in found]
        near.sort()
        return tuple(known for distance, known in near if distance == near[0][0])[:2]

    def slots(self, folded: str) -> list[Slot]:
        """Return the unknown words of a folded query that are likely typing errors, with what may be meant."""
        found: list[Slot] = []
        for match in _LATIN.finditer(folded):
            if match.start() and folded[match.start() - 1].isdigit():
                continue
            word = stem(match.group())
            if word not in self._known and weight(match.group()) == 1.0 and (near := self.likely(word)):
                found.append(Slot(match.group(), (word,), near, tuple((known,) for known in near), "typo"))
        for match in _HAN.finditer(folded):
            found += self._misheard(match.group())
        return found

    def _misheard(self, run: str) -> list[Slot]:
        """Return pairs of characters that the store does not have but another pair of the same sound."""
        found: list[Slot] = []
        taken = -1
        for place in range(len(run) - 1):
            pair = run[place : place + 2]
            # Two characters that only stand side by side ("我|要") are no word, and neither has a typing error.
            if place <= taken or pair in self._known or min(weight(run[place]), weight(run[place + 1])) < 0.6:
                continue
            meant: list[str] = []
            for first in _PINYIN.get(pair[0], ()):
                for second in _PINYIN.get(pair[1], ()):
                    # One of the two is right: where both differ it is more often another word.
                    meant += [
                        w for w in self._by_sound.get((first, second), ()) if (w[0] == pair[0]) != (w[1] == pair[1])
                    ]
            meant = [word for word in dict.fromkeys(meant) if min(weight(word[0]), weight(word[1])) >= 0.6][:3]
            if not meant:
                continue
            # Only what differs is read again: the other character counts as it is.
            wrong = [n for n in (0, 1) if any(word[n] != pair[n] for word in meant)]
            written = (pair, *(pair[n] for n in wrong))
            others = tuple((word, *(word[n] for n in wrong)) for word in meant)
            found.append(Slot(pair, written, tuple(meant), others, "typo"))
            taken = place + 1
        return found


_SPACED_CODE = re.compile(r"(?<![a-z0-9])([a-z]{1,8}) (\d{2,10})(?![a-z0-9%])")


class Reader:
    """Reads queries with a store's terms and vocabulary. Immutable but for a cache; safe for any number of threads."""

    def __init__(self, vocabulary: Collection[str], terms: Terms) -> None:
        self.terms = terms
        self.spelling = Spelling(vocabulary)

    def slots(self, query: str) -> tuple[Slot, ...]:
        """Return where `query` may be read another way, at most `MAX_SLOTS`; no word belongs to two of them."""
        folded = fold(query)
        found: list[Slot] = []
        used: set[str] = set()
        codes = [
            Slot(match.group(), (match[1], match[2]), (match[1] + match[2],), ((match[1] + match[2],),), "code")
            for match in _SPACED_CODE.finditer(folded)
            if match[1] + match[2] in self.spelling
        ]
        for slot in [*codes, *self.terms.slots(folded), *self.spelling.slots(folded)]:
            if len(found) == MAX_SLOTS:
                break
            if used.isdisjoint(slot.written) and any(self._helps(other) for other in slot.others):
                found.append(slot)
                used.update(slot.written)
        return tuple(found)

    def _helps(self, other: tuple[str, ...]) -> bool:
        """Whether the store has a word of this reading that says something."""
        return any(word in self.spelling for word in other if len(word) > 1 and not is_quantity(word))
