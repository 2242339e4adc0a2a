"""
Query -> hits: dense and lexical scores fused, validity before ranking, one of every pair of translations.

Knows the scores and the clock's verdict; knows no files and no threads (retriever.py). The one place that says what
"found" means; the weights below were measured, see docs/experiments.md.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from retrieval.confidence import Calibration, Features, load_calibration
from retrieval.embedder import Embedder, Vectors
from retrieval.errors import RetrievalError
from retrieval.index import Index
from retrieval.load import twin_key
from retrieval.passages import Hit, Passage, is_valid
from retrieval.words import codes, detect_lang, squash, words

LEXICAL = 0.4  # what a full word match is worth in centred cosines
SAME_LANG = 0.05  # cosines; enough to turn a translation's lead, too little to bury the only answer there is
EXACT = 2.0  # the query is a wording: nothing may stand before it
CODE = 1.0  # the query names an article or a coupon
N_DENSE = 256  # units taken from the vector side
N_LEXICAL = 64  # passages taken from the word side that the vector side did not bring
QUERY_CACHE = 1024  # vectors; 1.5 KiB each
MAX_QUERY_CHARS = 2_000  # the wire's limit for a question; a CLI may bring more


@dataclass(frozen=True, slots=True)
class _Ranked:
    """The candidates of one query, best first, before translations are folded together."""

    order: list[int]  # passage numbers
    fused: dict[int, float]
    features: dict[int, Features]
    wording: dict[int, str]


class HybridRetriever:
    """Searches one index. Immutable but for a small cache of query vectors; safe for any number of threads."""

    def __init__(self, index: Index, embedder: Embedder, calibration: Calibration | None = None) -> None:
        """
        Raises:
            RetrievalError: the index was built by another embedder.
        """
        if index.embedder_version != embedder.version:
            raise RetrievalError(f"index of {index.embedder_version!r}, embedder {embedder.version!r}; rebuild it")
        self.index = index
        self.embedder = embedder
        self.calibration = calibration or load_calibration()
        self.version = index.version  # of the knowledge: equal content, equal version
        self._starts = np.array([_seconds(p.valid_from, -np.inf) for p in index.passages], dtype=np.float64)
        self._ends = np.array([_seconds(p.valid_until, np.inf) for p in index.passages], dtype=np.float64)
        self._twins = [twin_key(passage) for passage in index.passages]
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def search(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        """
        Return at most `k` hits valid at `now` (aware), best first; blocks 10 to 50 ms, call it in a thread.

        Of a passage and its translation only one comes back: the one in `lang`, by default the query's language.
        `kinds` keeps to these kinds of passage.

        Raises:
            RetrievalError: the embedder failed.
            ValueError: `now` is naive.
        """
        return self._hits(query, k, self._valid(now), lang, kinds)

    def expired(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        """Return the same over the passages that do not hold at `now`, ended or not begun: never to be quoted as on."""
        return self._hits(query, k, ~self._valid(now), lang, kinds)

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]:
        """Return every passage of `kind` valid at `now`, in file order; with `lang` only those in that language."""
        return [
            passage
            for passage in self.index.passages
            if passage.kind == kind and (lang is None or passage.lang == lang) and is_valid(passage, now)
        ]

    def get(self, passage_id: str) -> Passage | None:
        """Return the passage of this id, valid or not."""
        number = self.index.by_id.get(passage_id)
        return None if number is None else self.index.passages[number]

    def rank(
        self, query: str, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[tuple[Passage, Features]]:
        """Return every candidate of `query` with what its confidence is made of, best first; for fitting and tests."""
        ranked = self._rank(query, self._mask(self._valid(now), kinds), lang or detect_lang(query))
        return [(self.index.passages[number], ranked.features[number]) for number in ranked.order]

    def _valid(self, now: datetime) -> NDArray[np.bool_]:
        if now.tzinfo is None:
            raise ValueError("now has no time zone; pass datetime.now(timezone.utc)")
        moment = now.timestamp()
        valid: NDArray[np.bool_] = np.logical_and(self._starts <= moment, moment < self._ends)
        return valid

    def _mask(self, allowed: NDArray[np.bool_], kinds: Collection[str] | None) -> NDArray[np.bool_]:
        if kinds is None:
            return allowed
        wanted = np.fromiter((passage.kind in kinds for passage in self.index.passages), dtype=np.bool_)
        return np.logical_and(allowed, wanted, dtype=np.bool_)

    def _hits(
        self, query: str, k: int, allowed: NDArray[np.bool_], lang: str | None, kinds: Collection[str] | None
    ) -> list[Hit]:
        ranked = self._rank(query, self._mask(allowed, kinds), lang or detect_lang(query))
        return [
            Hit(
                passage=self.index.passages[number],
                score=round(ranked.fused[number], 6),
                confidence=round(self.calibration.confidence(ranked.features[number]), 4),
                wording=ranked.wording[number],
            )
            for number in ranked.order[: max(k, 0)]
        ]

    def _rank(self, query: str, allowed: NDArray[np.bool_], lang: str) -> _Ranked:
        query = query.strip()[:MAX_QUERY_CHARS]
        if not query or not allowed.any():
            return _Ranked([], {}, {}, {})
        index = self.index
        vector = index.place(self._vector(query))
        # 1) Candidates: nearest units, most words shared, and whatever the query names by code or letter for letter.
        allowed_units = allowed[index.owners]
        _, near = index.nearest(vector, allowed_units, N_DENSE)
        lexical, most = index.lexical.score(query)
        lexical[~allowed_units] = 0
        best_lexical = np.zeros(len(index.passages), dtype=np.float32)
        np.maximum.at(best_lexical, index.owners, lexical)
        by_words = np.argsort(best_lexical, kind="stable")[::-1][:N_LEXICAL]
        exact = set(index.by_squash.get(squash(query), ()))
        named = {number for code in codes(query) for number in index.by_code.get(code, ())}
        chosen = set(index.owners[near].tolist())
        chosen.update(by_words[best_lexical[by_words] > 0].tolist())
        chosen.update(number for number in exact | named if allowed[number])
        # 2) Every unit of every candidate, scored both ways.
        numbers = np.flatnonzero(np.isin(index.owners, np.fromiter(chosen, dtype=np.int32)))
        cosines = index.cosines(vector, numbers)
        coverage = np.minimum(lexical[numbers] / most, 1.0) if most > 0 else np.zeros(len(numbers), dtype=np.float32)
        fused_units = cosines + LEXICAL * coverage
        # 3) A passage is as good as its best unit.
        best: dict[int, int] = {}  # passage -> position in numbers
        best_cosine: dict[int, float] = {}
        for position, owner in enumerate(index.owners[numbers].tolist()):
            if owner not in best or fused_units[position] > fused_units[best[owner]]:
                best[owner] = position
            best_cosine[owner] = max(best_cosine.get(owner, -1.0), float(cosines[position]))
        fused = {
            owner: float(fused_units[position])
            + SAME_LANG * (index.passages[owner].lang == lang)
            + EXACT * (owner in exact)
            + CODE * (owner in named)
            for owner, position in best.items()
        }
        order = self._fold_twins(sorted(fused, key=lambda owner: (-fused[owner], owner)), fused, lang)
        # 4) What the confidence is made of.
        background = np.array([best_cosine[owner] for owner in order])
        mean, spread = float(background.mean()), max(float(background.std()), 0.05)
        n_words = len(words(query))
        features = {}
        for rank, owner in enumerate(order):
            rival = fused[order[1 if rank == 0 else 0]] if len(order) > 1 else fused[owner] - 0.2
            position = best[owner]
            features[owner] = Features(
                cosine=best_cosine[owner],
                standout=(best_cosine[owner] - mean) / spread / 5 if len(order) > 2 else 0.4,
                margin=max(-1.0, min(1.0, fused[owner] - rival)),
                coverage=float(coverage[position]),
                exact=float(owner in exact),
                code=float(owner in named),
                brevity=1 / (1 + n_words),
                other_lang=float(index.passages[owner].lang not in (lang, "")),
                body=float(index.is_body[numbers[position]]),
            )
        wording = {owner: index.units[numbers[best[owner]]].text for owner in order}
        return _Ranked(order, fused, features, wording)

    def _fold_twins(self, order: list[int], fused: dict[int, float], lang: str) -> list[int]:
        """Keep one of each passage and its translation, in the better one's place: the one in `lang` if there is."""
        chosen: dict[str, int] = {}
        for owner in order:
            key = self._twins[owner]
            if key not in chosen:
                chosen[key] = owner
            elif self.index.passages[owner].lang == lang != self.index.passages[chosen[key]].lang:
                fused[owner] = fused[chosen[key]]
                chosen[key] = owner
        return list(chosen.values())

    def remember(self, queries: Sequence[str], vectors: Vectors) -> None:
        """Put vectors of `queries` (n, dim) into the cache, made elsewhere by the same embedder."""
        with self._lock:
            self._vectors.update(zip(queries, vectors, strict=True))

    def _vector(self, query: str) -> NDArray[np.float32]:
        with self._lock:
            known = self._vectors.get(query)
            if known is not None:
                self._vectors.move_to_end(query)
                return known
        vector: NDArray[np.float32] = self.embedder.embed_queries([query])[0]
        with self._lock:
            self._vectors[query] = vector
            while len(self._vectors) > QUERY_CACHE:
                self._vectors.popitem(last=False)
        return vector


def _seconds(moment: datetime | None, otherwise: float) -> float:
    return otherwise if moment is None else moment.timestamp()
