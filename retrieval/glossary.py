"""
A question put word by word into the other language, for passages that no translation of is in the store. Pure, but for
one table read at import.

Knows the words of shops (`glossary.txt`) and how a sentence falls into them; knows no grammar, passages, scores or
vectors. Neither text is good Chinese or English: a gloss is read by the embedder and by BM25, never shown as an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from retrieval.terms import MAX_OTHERS, Slot
from retrieval.words import detect_lang, fold, stem, words

MAX_SLOTS = 12  # terms of one gloss that may be read another way; BM25 walks through the postings of each
MAX_PHRASE = 6  # words of the longest English phrase looked for
_HAN = re.compile(r"[\u3400-\u9fff]+")
_PIECE = re.compile(r"[\u3400-\u9fff]+|[a-z]*-?\d[a-z\d]*(?:[-.,][a-z\d]+)*%?|[a-z]+(?:'[a-z]+)*")
# What is said with numbers. 7折 is what is left to pay, "30% off" what is not.
_FOLD_OFF = re.compile(r"(?:打\s*)?(\d(?:\.\d)?)\s*折")
_PERCENT_OFF = re.compile(r"(\d{1,2})\s*(?:%|percent|per cent)\s*(?:off|discount)")
_CUT_ZH = re.compile(r"满\s*(\d+)\s*元?\s*[减省]\s*(\d+)")
_CUT_EN = re.compile(r"(\d+)\s*off\s*(?:(?:for|over|on|when|you|spend|orders?|above)\s+)*(\d+)")
_UNKNOWN = 2.5  # what a character that no term has costs, a term costing 1: 3 known terms beat one and an unknown


@dataclass(frozen=True, slots=True)
class Gloss:
    """A query in the other language, term by term."""

    lang: str  # "zh" or "en"
    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]  # where a term may be read as another than the usual one

    @property
    def text(self) -> str:
        """The gloss as one writes it, for the embedder."""
        return ("" if self.lang == "zh" else " ").join(self.pieces)

    @property
    def apart(self) -> str:
        """The same with its terms apart, for BM25: characters that only stand side by side are no word."""
        return " ".join(self.pieces)


class Glossary:
    """Terms of one language -> those of the other. Immutable; safe for any number of threads."""

    def __init__(self, groups: Iterable[tuple[Sequence[str], Sequence[str]]]) -> None:
        """Take (Chinese terms, English terms), the most usual first; an empty one: such words are left out."""
        self._to_en: dict[str, tuple[str, ...]] = {}
        self._to_zh: dict[str, tuple[str, ...]] = {}
        for chinese, english in groups:
            zh, en = [fold(term) for term in chinese], [fold(term) for term in english]
            dropped = "" in zh or "" in en
            for term in filter(None, zh):
                self._to_en[term] = _joined(self._to_en.get(term, ()), ("",) if dropped else en)
            for term in (" ".join(_PIECE.findall(term)) for term in en if term):
                self._to_zh[term] = _joined(self._to_zh.get(term, ()), ("",) if dropped else zh)
        # "returned" is found as it is written and, where no line has it, as a form of "return".
        self._stems: dict[str, str] = {}
        for term in self._to_zh:
            self._stems.setdefault(_stems(term.split()), term)
        self._longest = max(map(len, self._to_en), default=1)

    def with_own(self, groups: Iterable[Sequence[str]]) -> Glossary:
        """Return this one after a store's own groups of terms, where those are in both languages."""
        own = [
            ([term for term in group if _HAN.search(term)], [term for term in group if detect_lang(term) == "en"])
            for group in groups
        ]
        own = [(zh, en) for zh, en in own if zh and en]
        if not own:
            return self
        merged = Glossary(own)
        for mine, shipped in ((merged._to_en, self._to_en), (merged._to_zh, self._to_zh)):
            for term, others in shipped.items():
                mine[term] = _joined(mine.get(term, ()), others)
        merged._stems = self._stems | merged._stems
        merged._longest = max(merged._longest, self._longest)
        return merged

    def gloss(self, query: str) -> Gloss | None:
        """Return `query` in the other language of the two; None where no term of it is known."""
        folded = fold(query)
        found = self._in_english(folded) if detect_lang(folded) == "zh" else self._in_chinese(folded)
        return found if found.pieces and found.apart != " ".join(_PIECE.findall(folded)) else None

    def _in_english(self, folded: str) -> Gloss:
        folded = _FOLD_OFF.sub(lambda match: f" {100 - float(match[1]) * 10:g}% off ", folded)
        folded = _CUT_ZH.sub(r" spend \1 save \2 ", folded)
        found: list[tuple[str, tuple[str, ...]]] = []
        for match in _PIECE.finditer(folded):
            if _HAN.match(match.group()):
                found += [(term, self._to_en[term]) for term in self._terms(match.group())]
            else:
                found.append((match.group(), ()))
        return _gloss("en", found)

    def _terms(self, run: str) -> list[str]:
        """Return the known terms that a Chinese run falls into, with as few of them and of unknown characters."""
        best: list[tuple[float, int]] = [(0.0, 0)]  # of each beginning of `run`: its cost, where its last piece starts
        for end in range(1, len(run) + 1):
            options = [(best[end - 1][0] + _UNKNOWN, end - 1)]
            options += [
                (best[start][0] + 1.0, start)
                for start in range(max(0, end - self._longest), end)
                if run[start:end] in self._to_en
            ]
            best.append(min(options))
        found: list[str] = []
        end = len(run)
        while end:
            start = best[end][1]
            found.append(run[start:end])
            end = start
        return [term for term in reversed(found) if term in self._to_en]

    def _in_chinese(self, folded: str) -> Gloss:
        folded = _PERCENT_OFF.sub(lambda match: f" {(100 - int(match[1])) / 10:g}折 ", folded)
        folded = _CUT_EN.sub(r" 满\2减\1 ", folded)
        tokens = _PIECE.findall(folded)
        found: list[tuple[str, tuple[str, ...]]] = []
        at = 0
        while at < len(tokens):
            for n in range(min(MAX_PHRASE, len(tokens) - at), 0, -1):
                term = self._known(tokens[at : at + n])
                if term is not None:
                    found.append((term, self._to_zh[term]))
                    at += n
                    break
            else:
                found.append((tokens[at], ()))
                at += 1
        return _gloss("zh", found)

    def _known(self, tokens: Sequence[str]) -> str | None:
        written = " ".join(tokens)
        return written if written in self._to_zh else self._stems.get(_stems(tokens))


def _gloss(lang: str, found: Sequence[tuple[str, tuple[str, ...]]]) -> Gloss:
    """Return the gloss of terms with what they are in the other language; what has nothing there stays as it is."""
    pieces: list[str] = []
    slots: dict[str, Slot] = {}
    for term, others in found:
        first = others[0] if others else term
        if not first:
            continue
        pieces.append(first)
        if len(others) > 1 and first not in slots and len(slots) < MAX_SLOTS:
            slots[first] = _slot(first, tuple(other for other in others[1:] if other)[:MAX_OTHERS])
    return Gloss(lang, tuple(pieces), tuple(slots.values()))


@lru_cache(maxsize=4_096)
def _slot(first: str, meant: tuple[str, ...]) -> Slot:
    read = tuple(tuple(dict.fromkeys(words(other))) for other in meant)
    return Slot(first, tuple(dict.fromkeys(words(first))), meant, read, "gloss")


def _joined(before: Iterable[str], after: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*before, *after]))


def _stems(tokens: Sequence[str]) -> str:
    return " ".join(stem(token) for token in tokens)


def _read() -> Glossary:
    lines = (Path(__file__).parent / "glossary.txt").read_text("utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return Glossary(
        ([term.strip() for term in zh.split("|")], [term.strip() for term in en.split("|")]) for zh, _, en in pairs
    )


SHIPPED = _read()
