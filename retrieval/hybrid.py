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
from retrieval.index import Index, side_of
from retrieval.load import twin_key
from retrieval.passages import Hit, Passage, is_valid
from retrieval.words import codes, detect_lang, squash, words

# The fused score is their weighted mean: centred cosines, and the share of the query's words (docs/experiments.md).
BODY = 2.0  # the passage as a whole, all its wordings with its text
BEST_WORDING = 1.0
ALL_WORDINGS = 0.5  # their mean
LEXICAL = 1.0
SAME_LANG = 0.05  # enough to turn a translation's lead, too little to bury the only answer there is
APPROVED = 0.06  # of a FAQ and a policy that say the same, the FAQ: 0.59 -> 0.61 recall@1 of FAQs against 0.03
EXACT = 2.0  # the query is a wording of a FAQ: nothing may stand before it
CODE = 1.0  # the query names an article or a coupon
N_DENSE = 160  # units of each language taken from the vector side
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
        vector = index.place(self._vector(query), query)
        # 1) Candidates: nearest units, most words shared, and whatever the query names by code or letter for letter.
        #    The nearest of each language by itself: across languages cosines are lower, not worse.
        across = index.sides != (side_of(query) == "zh")
        ours, others = (index.nearest(vector, allowed[index.owners] & side, N_DENSE)[1] for side in (~across, across))
        near = np.concatenate([ours, others])
        lexical, most = index.lexical.score(query)
        by_words = np.argsort(np.where(allowed, lexical, 0), kind="stable")[::-1][:N_LEXICAL]
        exact = {n for n in index.by_squash.get(squash(query), ()) if index.passages[n].kind in ("faq", "product")}
        named = {number for code in codes(query) for number in index.by_code.get(code, ())}
        found = np.concatenate([index.owners[near], by_words, np.fromiter(exact | named, dtype=np.int64)])
        owners = np.unique(found)
        owners = owners[allowed[owners] & (np.isin(owners, index.owners[near]) | (lexical[owners] > 0))]
        # 2) Every candidate scored all ways; its body is the last of its units.
        firsts, lasts = index.first_unit[owners], index.first_unit[owners + 1] - 1
        n_wordings = lasts - firsts
        numbers = np.concatenate([np.arange(a, b) for a, b in zip(firsts, lasts + 1, strict=True)])
        cosines = index.cosines(vector, numbers)
        cosines[across[numbers]] /= self.embedder.shared
        starts = np.cumsum(n_wordings + 1) - (n_wordings + 1)  # of each candidate, in numbers
        body = cosines[starts + n_wordings]
        as_wordings = cosines.copy()
        as_wordings[starts + n_wordings] = np.where(n_wordings == 0, body, -1.0)
        best_wording = np.maximum.reduceat(as_wordings, starts)
        sums = np.add.reduceat(cosines, starts) - body
        all_wordings = np.where(n_wordings == 0, body, sums / np.maximum(n_wordings, 1))
        coverage = np.minimum(lexical[owners] / most, 1.0) if most > 0 else np.zeros(len(owners))
        mixed = BODY * body + BEST_WORDING * best_wording + ALL_WORDINGS * all_wordings + LEXICAL * coverage
        mixed /= BODY + BEST_WORDING + ALL_WORDINGS + LEXICAL
        # 3) What is known beside likeness; then one of each pair of translations.
        place = {owner: position for position, owner in enumerate(owners.tolist())}
        fused = {
            owner: float(mixed[position])
            + SAME_LANG * (index.passages[owner].lang == lang)
            + APPROVED * index.passages[owner].approved
            + EXACT * (owner in exact)
            + CODE * (owner in named)
            for owner, position in place.items()
        }
        order = self._fold_twins(sorted(fused, key=lambda owner: (-fused[owner], owner)), fused, lang)
        # 4) What the confidence is made of.
        background = np.array([mixed[place[owner]] for owner in order])
        mean, spread = float(background.mean()), max(float(background.std()), 0.05)
        brevity = 1 / (1 + len(words(query)))
        features, wording = {}, {}
        for rank, owner in enumerate(order):
            rival = fused[order[1 if rank == 0 else 0]] if len(order) > 1 else fused[owner] - 0.1
            position = place[owner]
            features[owner] = Features(
                body=float(body[position]),
                wording=float(best_wording[position]),
                standout=(float(mixed[position]) - mean) / spread / 5 if len(order) > 2 else 0.4,
                margin=max(-1.0, min(1.0, fused[owner] - rival)),
                coverage=float(coverage[position]),
                exact=float(owner in exact),
                code=float(owner in named),
                brevity=brevity,
                other_lang=float(index.passages[owner].lang not in (lang, "")),
            )
            start = int(starts[position])
            best = int(np.argmax(as_wordings[start : start + int(n_wordings[position]) + 1]))
            wording[owner] = index.units[int(numbers[start + best])].text
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
