"""
BM25 over words: texts -> what a query shares with each of them, and which share most. Numpy postings, no I/O.

Knows `words.words` and the formula; knows nothing of passages, validity or vectors. A "text" here is the body of one
passage; who owns it is the index's affair. Every score is exact; at large sizes the search for the best looks only at
postings that can still change the outcome, and at most at `BUDGET` of them.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import IndexDamaged
from retrieval.terms import Slot
from retrieval.words import weight, words

# The usual k1; of b = 0.3, 0.5, 0.75 the middle one had the best mean recall@1 of BM25 alone over ten sets.
K1 = 1.2
B = 0.5
DENSE_TEXTS = 20_000  # up to here every text is scored: 0.2 ms at 10^4, and nothing is left to chance
# Postings one query may walk through, at about 8 ns each. What is left after it are words that a large part of all
# texts has; they still count in the score of every text that the rarer words brought.
BUDGET = 200_000
LONG = 4_096  # before a word with more texts than this it is asked whether it can still matter
LOOKED_UP = 4_096  # texts for which the words not walked through are looked up one by one


class Lexical:
    """
    An inverted index; built once, then read by any number of threads.

    The postings of all words lie end to end in two arrays, 8 bytes for each word of each text; of a dictionary of
    lists the same would take ten times as much.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """Index `texts`; about 0.05 ms a text."""
        vocabulary: dict[str, int] = {}
        found, lengths = array("i"), array("i")
        for text in texts:
            numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
            found.extend(numbers)
            lengths.append(len(numbers))
        n_texts = len(lengths)
        n_words = np.frombuffer(lengths, dtype=np.int32) if lengths else np.zeros(0, np.int32)
        mean = float(n_words.mean()) if n_texts and n_words.any() else 1.0
        norms = (K1 * (1 - B + B * n_words.astype(np.float32) / mean)).astype(np.float32)  # (n_texts,)
        # Word and text in one number, sorted: each word's texts lie together, in ascending order.
        pairs = np.frombuffer(found, dtype=np.int32).astype(np.int64) if found else np.zeros(0, np.int64)
        del found
        pairs *= max(n_texts, 1)
        pairs += np.repeat(np.arange(n_texts, dtype=np.int64), n_words)
        pairs.sort()
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        n_times = np.diff(starts, append=len(pairs)).astype(np.float32)
        pairs = pairs[starts]
        found_in = (pairs % max(n_texts, 1)).astype(np.int32)
        pairs //= max(n_texts, 1)
        first = np.searchsorted(pairs, np.arange(len(vocabulary) + 1))
        del pairs, starts
        saturated = n_times * np.float32(K1 + 1) / (n_times + norms[found_in])
        self._take(n_texts, vocabulary, first, found_in, saturated)

    @classmethod
    def of(cls, n_texts: int, vocabulary: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Lexical:
        """
        Return the index of `n_texts` texts that had this `vocabulary` and these `arrays()`.

        Raises:
            IndexDamaged: they do not fit each other.
        """
        first, texts, saturated = (arrays[f"words-{name}.npy"] for name in ("first", "texts", "saturated"))
        numbers = {word: n for n, word in enumerate(vocabulary)}
        good = all(isinstance(word, str) for word in numbers) and len(numbers) == len(vocabulary) == len(first) - 1
        good = good and int(first[0]) == 0 and int(first[-1]) == len(texts) == len(saturated)
        good = good and bool((np.diff(first) > 0).all())
        good = good and (not len(texts) or (int(texts.min()) >= 0 and int(texts.max()) < n_texts))
        good = good and (not len(texts) or (float(saturated.min()) > 0 and float(saturated.max()) <= K1 + 1))
        if not good:
            raise IndexDamaged("the words do not fit the snapshot")
        lexical = cls.__new__(cls)
        lexical._take(n_texts, numbers, first, texts, saturated)
        return lexical

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `of` needs beside the number of texts and the vocabulary: to be kept."""
        return {"words-first.npy": self._first, "words-texts.npy": self._texts, "words-saturated.npy": self._saturated}

    def _take(
        self,
        n_texts: int,
        vocabulary: dict[str, int],
        first: NDArray[np.int64],
        texts: NDArray[np.int32],
        saturated: NDArray[np.float32],
    ) -> None:
        self.n_texts = n_texts
        self._vocabulary = vocabulary
        self._first = first  # of each word, in the postings
        self._texts = texts  # which texts have it, ascending
        self._saturated = saturated  # what it gives to each of them, but for its idf
        n_with = np.diff(self._first)
        self._idf = np.log(1 + (self.n_texts - n_with + 0.5) / (n_with + 0.5))
        self._most = np.maximum.reduceat(self._saturated, self._first[:-1]) if len(vocabulary) else np.zeros(0)
        # A word nobody wrote is as telling as one that a single text holds: a query full of them is not covered.
        self._idf_unknown = math.log(1 + (self.n_texts + 0.5) / 0.5)
        self._mine = threading.local()  # a thread's scores, zero between two queries

    @property
    def vocabulary(self) -> Collection[str]:
        """Every word of every text."""
        return self._vocabulary

    def query(self, text: str, slots: Sequence[Slot] = ()) -> Query:
        """Return `text` as a query to this index; at `slots` it may be read another way."""
        return Query(self, text, slots)

    def score(self, text: str, slots: Sequence[Slot] = ()) -> tuple[NDArray[np.float32], float]:
        """Return BM25 of every text, shape (n_texts,), and the most a text could have got; see `Query`."""
        query = self.query(text, slots)
        return query.all(), query.most

    def scratch(self) -> NDArray[np.float32]:
        """Return this thread's scores (n_texts,), all zero; who takes them puts the zeros back."""
        scores: NDArray[np.float32] | None = getattr(self._mine, "scores", None)
        if scores is None:
            scores = self._mine.scores = np.zeros(self.n_texts, dtype=np.float32)
        return scores


class _Word:
    """One word of a query: what it adds to which texts."""

    __slots__ = ("gain", "most", "saturated", "text", "texts")

    def __init__(self, index: Lexical, text: str, number: int, factor: float) -> None:
        self.text = text
        part = slice(index._first[number], index._first[number + 1])
        self.texts, self.saturated = index._texts[part], index._saturated[part]
        self.gain = np.float32(factor * index._idf[number])
        self.most = float(self.gain * index._most[number])

    def of(self, numbers: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return what this word adds to each of `numbers`."""
        # Of one type with the postings: searchsorted would copy them all into the wider one.
        places = np.minimum(np.searchsorted(self.texts, numbers), len(self.texts) - 1)
        added: NDArray[np.float32] = np.where(self.texts[places] == numbers, self.gain * self.saturated[places], 0)
        return added


class _Either(_Word):
    """A place that may be read in several ways: a text gets what the best of them gives it."""

    __slots__ = ()

    def __init__(self, text: str, readings: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]]) -> None:
        """Take each reading's texts (ascending) and what it adds to them."""
        self.text = text
        self.gain = np.float32(1)
        held = [reading for reading in readings if len(reading[0])]
        if len(held) <= 1:
            self.texts, self.saturated = (held or readings)[0]
            self.most = float(self.saturated.max()) if held else 0.0
            return
        texts = np.concatenate([found for found, _ in readings])
        order = np.argsort(texts, kind="stable")
        self.texts, firsts = np.unique(texts[order], return_index=True)
        added = np.concatenate([values for _, values in readings])[order]
        self.saturated = np.maximum.reduceat(added, firsts)
        self.most = float(self.saturated.max())


class Query:
    """
    One query's words against the index.

    `most` is what a text could have got. The quotient of a score and it is the weighted share of the query's words
    that the text has: at most a little above 1, comparable across queries and stores, unlike BM25 itself.
    """

    def __init__(self, index: Lexical, text: str, slots: Sequence[Slot] = ()) -> None:
        self._index = index
        self.most = 0.0
        self._all: NDArray[np.float32] | None = None
        self._words: list[_Word] = []
        written = words(text)
        self.n_words = len(written)
        left = dict.fromkeys(written)
        for slot in slots:
            there = [word for word in dict.fromkeys(slot.written) if word in left]
            either = self._read(there, slot) if there else None
            if either is not None:
                if len(either.texts):
                    self._words.append(either)
                for word in there:
                    del left[word]
        self._take(left, self._words)
        # What can add most first: the rest may then be unable to change who is best.
        self._words.sort(key=lambda word: -word.most)

    def _take(self, taken: Iterable[str], found: list[_Word]) -> None:
        """Add what `taken` can give to `most`, and those of them that the index has to `found`."""
        index = self._index
        for word in taken:
            factor = weight(word)
            number = index._vocabulary.get(word)
            if number is None:
                self.most += factor * index._idf_unknown
                continue
            self.most += factor * float(index._idf[number])
            found.append(_Word(index, word, number, factor))

    def _read(self, written: Sequence[str], slot: Slot) -> _Either | None:
        """Return a place as `written` or as one of the slot's others; None where that would be too much to walk."""
        before = self.most
        as_written: list[_Word] = []
        self._take(written, as_written)
        worth = self.most - before
        readings = [_sum(as_written, 1.0)]
        n_postings = len(readings[0][0])
        for other in slot.others:
            start, found = self.most, list[_Word]()
            self._take(other, found)
            most, self.most = self.most - start, start
            n_postings += sum(len(word.texts) for word in found)
            # An other word that is rarer or commoner than the written one is worth what that is, less some doubt.
            readings.append(_sum(found, slot.trust * worth / most if most else 0.0))
            if n_postings > BUDGET // 2:
                self.most = before
                return None
        return _Either(slot.shown, readings)

    def all(self) -> NDArray[np.float32]:
        """Return the score of every text, shape (n_texts,); not to be written to."""
        if self._all is None:
            scores = np.zeros(self._index.n_texts, dtype=np.float32)
            for word in self._words:
                scores[word.texts] += word.gain * word.saturated
            self._all = scores
        return self._all

    def of(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the scores of the texts `numbers`, shape (len(numbers),)."""
        if self._all is not None:
            return self._all[numbers]
        narrow = numbers.astype(np.int32)
        scores = np.zeros(len(numbers), dtype=np.float32)
        for word in self._words:
            scores += word.of(narrow)
        return scores

    def shares(self, number: int) -> tuple[tuple[str, float], ...]:
        """Return which words of the query the text `number` has, with the share of `most` each gives; most first."""
        at = np.array([number], dtype=np.int32)
        gained = [(word.text, float(word.of(at)[0]) / self.most) for word in self._words] if self.most else []
        return tuple(sorted(((text, share) for text, share in gained if share > 0), key=lambda pair: -pair[1]))

    def best(self, allowed: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
        """
        Return the `n` allowed texts (n_texts,) that score highest and above zero; of equals the later ones.

        Exact up to `DENSE_TEXTS` texts, and beyond while the words that decide are in at most `BUDGET` texts.
        """
        if self._index.n_texts <= DENSE_TEXTS:
            scores = np.where(allowed, self.all(), np.float32(0))
            texts = np.flatnonzero(scores)
            return _top(texts, scores[texts], n)
        texts, found = self._likely(allowed, n)
        return _top(texts, found, n)

    def _likely(self, allowed: NDArray[np.bool_], n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return allowed texts with their scores, among them the `n` best."""
        scores = self._index.scratch()
        left = sum(word.most for word in self._words) + 1e-3  # the most that words not walked through yet can add
        touched: list[NDArray[np.int32]] = []
        n_touched, n_walked, done = 0, 0, 0
        try:
            for word in self._words:
                if n_touched >= n and (n_walked + len(word.texts) > BUDGET):
                    break
                if n_touched >= n and len(word.texts) > LONG and left < _nth(scores[np.concatenate(touched)], n):
                    break  # a text without any word so far cannot get among the best any more
                texts, saturated = word.texts[: BUDGET - n_walked], word.saturated[: BUDGET - n_walked]
                fresh = texts[scores[texts] == 0]
                fresh = fresh[allowed[fresh]]
                scores[texts] += word.gain * saturated
                touched.append(fresh)
                n_touched += len(fresh)
                n_walked += len(texts)
                if len(texts) < len(word.texts):  # so common that a part of its texts is as good as all
                    break
                left -= word.most
                done += 1
            reached = np.concatenate(touched) if touched else np.zeros(0, dtype=np.int32)
            found = scores[reached]
        finally:
            for word in self._words[: done + 1]:
                scores[word.texts[:BUDGET]] = 0
        rest = self._words[done:]
        if rest and len(reached) > n:
            kept = np.flatnonzero(found + np.float32(left) >= _nth(found, n))
            if len(kept) > LOOKED_UP:
                kept = kept[np.argpartition(found[kept], -LOOKED_UP)[-LOOKED_UP:]]
            reached, found = reached[kept], found[kept]
        for word in rest:  # in the order of the words, as `of` adds them
            found = found + word.of(reached)
        return reached.astype(np.int64), found


def _sum(found: Sequence[_Word], factor: float) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the texts (ascending) that have one of these words, and `factor` times what all of them add."""
    if not found:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    if len(found) == 1:
        alone = (found[0].gain * found[0].saturated).astype(np.float64) * factor
        return found[0].texts, alone.astype(np.float32)
    texts, places = np.unique(np.concatenate([word.texts for word in found]), return_inverse=True)
    added = np.concatenate([word.gain * word.saturated for word in found])
    sums = np.bincount(places, added, len(texts)) * factor
    return texts, sums.astype(np.float32)


def _nth(scores: NDArray[np.float32], n: int) -> float:
    """Return the `n`-th highest of at least `n` scores."""
    return float(np.partition(scores, len(scores) - n)[len(scores) - n])


def _top(texts: NDArray[np.int64], scores: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Return the `n` of `texts` (ascending or not) with the highest `scores`, best first, the later of equals first."""
    if len(texts) > n:
        likely = np.flatnonzero(scores >= _nth(scores, n))
        texts, scores = texts[likely], scores[likely]
    best: NDArray[np.int64] = texts[np.lexsort((texts, scores))[::-1][:n]]
    return best
