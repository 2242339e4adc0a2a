"""
How a query may be read otherwise than it is written: typing errors, and the store's terms. Pure, but for one table.

Knows a store's vocabulary; knows no passages, scores or vectors. The table, `pinyin.txt`, has one syllable and its
characters a line, made from pypinyin (MIT), without tones: the package itself is ten times as large and reads phrases,
which a typing error has none of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import OSA
from rapidfuzz.process import extract

from retrieval.terms import MAX_SLOTS, Slot, Terms
from retrieval.words import fold, is_quantity, stem, weight

TELLING = 0.6  # of a character's weight: below it are those that make no word ("我", "怎", "吗")
_LATIN = re.compile(r"[a-z]+(?:'[a-z]+)?")
_HAN = re.compile(r"[\u3400-\u9fff]+")


@lru_cache(maxsize=1)
def _pinyin() -> dict[str, tuple[str, ...]]:
    """Return each character's syllables; read when the first store is searched, as an import needs none."""
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


class Spelling:
    """Words a store does not have -> words of it that they may be typing errors of."""

    MIN_CHARS = 5  # shorter words have too many neighbours: "bag", "rag"
    TWO_FROM = 9  # from this length on two errors are forgiven
    MAX_WORDS = 200_000  # a store with more has every likely error as a word of its own

    def __init__(self, vocabulary: Collection[str]) -> None:
        """Take the index words of a store; some µs a word."""
        self._known = vocabulary
        self._sounds = _pinyin()
        by_length: dict[tuple[str, int], list[str]] = {}
        self._by_sound: dict[tuple[str, str], list[str]] = {}
        for word in self._known if len(vocabulary) <= self.MAX_WORDS else ():
            if len(word) >= 4 and word.isascii() and word.isalpha():
                by_length.setdefault((word[0], len(word)), []).append(word)
            elif len(word) == 2 and word[0] in self._sounds and word[1] in self._sounds:
                for first in self._sounds[word[0]]:
                    for second in self._sounds[word[1]]:
                        self._by_sound.setdefault((first, second), []).append(word)
        self._by_length = {key: (pool, _letters(pool)) for key, pool in by_length.items()}
        self.likely = lru_cache(maxsize=4_096)(self._likely)

    def __contains__(self, word: str) -> bool:
        return word in self._known

    def _likely(self, word: str) -> tuple[str, ...]:
        """Return the known words nearest to an unknown Latin one: of one first letter, one or two errors away."""
        if len(word) < self.MIN_CHARS:
            return ()
        most = 2 if len(word) >= self.TWO_FROM else 1
        near: list[tuple[int, str]] = []
        mine = _letters([word])[0]
        # One error takes away at most one letter and brings at most one: most of a pool is out at a glance.
        for length in range(len(word) - most, len(word) + most + 1):
            if (word[0], length) not in self._by_length:
                continue
            pool, letters = self._by_length[word[0], length]
            likely = [pool[place] for place in np.flatnonzero(np.bitwise_count(letters ^ mine) <= 2 * most).tolist()]
            found = extract(word, likely, scorer=OSA.distance, score_cutoff=most, limit=3)
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
            if place <= taken or pair in self._known or min(weight(run[place]), weight(run[place + 1])) < TELLING:
                continue
            meant: list[str] = []
            for first in self._sounds.get(pair[0], ()):
                for second in self._sounds.get(pair[1], ()):
                    # One of the two is right: where both differ it is more often another word.
                    meant += [
                        w for w in self._by_sound.get((first, second), ()) if (w[0] == pair[0]) != (w[1] == pair[1])
                    ]
            meant = [word for word in dict.fromkeys(meant) if min(weight(word[0]), weight(word[1])) >= TELLING][:3]
            if not meant:
                continue
            # Only what differs is read again: the other character counts as it is.
            wrong = [n for n in (0, 1) if any(word[n] != pair[n] for word in meant)]
            written = (pair, *(pair[n] for n in wrong))
            others = tuple((word, *(word[n] for n in wrong)) for word in meant)
            found.append(Slot(pair, written, tuple(meant), others, "typo"))
            taken = place + 1
        return found


def as_heard(query: str, slots: Sequence[Slot]) -> str | None:
    """
    Return a Chinese `query` with the words that were typed by their sound as they may be meant, None where none was.

    For encoders, which take such a word as it stands. Only where nothing else in the query says anything ("怎么腿货"):
    a third of all Chinese questions have two characters that sound like a word of the store and are none of its words
    (docs/experiments.md).
    """
    folded = heard = rest = fold(query)
    for slot in slots:
        if slot.why == "typo" and not slot.shown.isascii():
            heard, rest = heard.replace(slot.shown, slot.meant[0]), rest.replace(slot.shown, " ")
    says = any(character.isalnum() and weight(character) >= TELLING for character in rest)
    return None if says or heard == folded else heard


def _letters(pool: Sequence[str]) -> NDArray[np.uint64]:
    """Return which letters each word of one length has, (len(pool),): a bit for the first of a kind, one for more."""
    letters = np.frombuffer("".join(pool).encode("ascii"), dtype=np.uint8).reshape(len(pool), -1).astype(np.uint64)
    once = twice = np.zeros(len(pool), dtype=np.uint64)
    for place in range(letters.shape[1]):
        bit = np.uint64(1) << (letters[:, place] - np.uint64(ord("a")))
        once, twice = once | bit, twice | (once & bit)
    return once | (twice << np.uint64(26))


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
