"""
Query -> hits: dense and lexical scores fused, validity before ranking, one of every pair of translations.

Knows the scores and the clock's verdict; knows no files and no threads (retriever.py). The one place that says what
"found" means; the weights below were measured, see docs/experiments.md.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from retrieval.candidates import Across, Candidates, find_candidates
from retrieval.confidence import N_FIRST, NAMES, Calibration, Features, load_calibration, rivals
from retrieval.embedder import Embedder, ReadPassage, ReadQuestion, Reads, Vectors
from retrieval.errors import RetrievalError
from retrieval.explain import Explanation, HitReasons, LeftOut
from retrieval.glossary import SHIPPED as GLOSSARY
from retrieval.index import LANGS, Index, side_of
from retrieval.learned import Learned
from retrieval.lexical import Query
from retrieval.load import twin_key
from retrieval.names import without_names
from retrieval.passages import Hit, Passage, is_valid, last_valid_end, next_valid
from retrieval.recurrence import Recurrence
from retrieval.spelling import Reader, as_heard
from retrieval.terms import Slot, Terms
from retrieval.words import bare_code, detect_lang, named_codes, quietly, weight, words

# The fused score is their weighted mean: centred cosines, and the share of the query's words (docs/experiments.md).
# Fitted on a store of examples/training with encoders tuned on the other four: recall@1 0.58 -> 0.64 there.
BODY = 6.0  # the passage as a whole, all its wordings with its text
BEST_WORDING = 0.5
ALL_WORDINGS = 0.5  # their mean
LEXICAL = 1.5
# A passage that only the other language has: its cosine is the mean of the question's and of its gloss's (glossary.py),
# times what makes cosines across languages as high as within one; fitted on the same store, cut into its languages.
GLOSS = 0.35
ACROSS = 1.1
SAME_LANG = 0.05  # enough to turn a translation's lead, too little to bury the only answer there is
# A section has one body where a FAQ has many wordings, and answers the details beside them. Fitted on two of the stores
# in examples/training: recall@1 0.53 -> 0.57 there, and 0.83 -> 0.84 on the demo store, which had no part in it.
SECTION = 0.05
APPROVED = 0.02  # of a FAQ and a passage of another kind that say the same, the FAQ
# A Chinese passage that is nothing but one question has no body: its share goes to the wording, and so much of that to
# the words (0.648 -> 0.655 recall@1 on zh_tonghuashun; 0 gives 0.650). English ones lose by it (banking77 0.575 ->
# 0.553), since the English model reads a body as well as a question; several wordings together are worth a body.
BARE_WORDS = 0.25
# What the logit that a passage answers, read beside the question, adds to the score of the first few; the reranker's is
# the mean of all that are read of a passage and its translation. Fitted on the five stores that neither encoders nor
# readers were trained on (docs/experiments.md).
READ = 0.08
N_READ = 6
# Of those so many are read closer, by the cross-encoder; its share of their logit. Their translations are not: that
# bought nothing beside the mean above.
N_CLOSER = 3
CLOSER = 0.5
DOUBT = 0.3  # a message is searched whole where that is surer than the question in it by more than this
EXACT = 2.0  # the query is a wording of a FAQ: nothing may stand before it
CODE = 1.0  # the query names an article or a coupon
N_TAUGHT = 16  # keys whose passages become candidates because the store's tuning says so
N_LEFT_OUT = 10  # in an explanation
QUERY_CACHE = 1024  # vectors; 1.5 KiB each
MAX_QUERY_CHARS = 2_000  # the wire's limit for a question; a CLI may bring more


@dataclass(frozen=True, slots=True)
class _Ranked:
    """The candidates of one query, best first, before translations are folded together."""

    order: list[int]  # passage numbers, best first, one of each pair of translations
    owners: NDArray[np.int64]  # passage numbers of all candidates (n_candidates,), ascending
    scores: NDArray[np.float64]  # theirs; where a translation gave way, the better one's
    features: dict[int, Features]
    wording: dict[int, str]
    parts: dict[str, NDArray[np.float64]]  # what each candidate's score is the sum of, by name, (n_candidates,) each
    folded: dict[int, int]  # passage left out for its translation -> that translation
    slots: tuple[Slot, ...] = ()  # where the query was read another way as well
    across: Across | None = None  # the query in the other language, where that was asked as well

    def place(self, number: int) -> int:
        """Return where a candidate stands in `owners` and in all that is beside them."""
        return int(np.searchsorted(self.owners, number))

    def score(self, number: int) -> float:
        """Return the fused score of a candidate."""
        return float(self.scores[self.place(number)])

    def rivals(self, place: int) -> list[Features]:
        """Return the features of what the hit at `place` has to beat."""
        return [self.features[number] for number in rivals(self.order, place)]


def _nothing(slots: tuple[Slot, ...] = ()) -> _Ranked:
    return _Ranked([], np.zeros(0, dtype=np.int64), np.zeros(0), {}, {}, {}, {}, slots)


class HybridRetriever:
    """Searches one index. Immutable but for a small cache of query vectors; safe for any number of threads."""

    def __init__(
        self,
        index: Index,
        embedder: Embedder,
        calibration: Calibration | None = None,
        terms: Terms | None = None,
        learned: Learned | None = None,
        learned_weight: float = 0.0,
        *,
        reads: bool = True,
    ) -> None:
        """
        `terms` are the store's own, by default the shipped synonyms alone; `learned` is the store's tuning (tuning.py),
        and `learned_weight` what a score of 1 from it adds to a passage's. Without `reads` the reranker has no part.

        Raises:
            RetrievalError: the index was built by another embedder.
        """
        if index.embedder_version != embedder.version:
            raise RetrievalError(f"index of {index.embedder_version!r}, embedder {embedder.version!r}; rebuild it")
        self.index = index
        self.embedder = embedder
        self._listener = embedder if reads and isinstance(embedder, Reads) else None
        self._reader = self._listener if index.readings else None
        self._reads_closer = index.readings is not None and index.readings.are_closer
        given = calibration or load_calibration()
        self.calibration = given if self._reader else given.plain
        self.version = index.version  # of the knowledge: equal content, equal version
        dated = [n for n, p in enumerate(index.passages) if p.valid_from is not None or p.valid_until is not None]
        self._dated = np.array(dated, dtype=np.int64)  # only these are asked for the time: of 10^6, few
        self._starts = np.array([_seconds(index.passages[n].valid_from, -np.inf) for n in dated], dtype=np.float64)
        self._ends = np.array([_seconds(index.passages[n].valid_until, np.inf) for n in dated], dtype=np.float64)
        self._lang_numbers = {"": 0}  # numbers, as of 10^6 passages the texts would be 32 MB
        self._langs = np.array(
            [self._lang_numbers.setdefault(p.lang, len(self._lang_numbers)) for p in index.passages], dtype=np.int32
        )
        self._approved = np.array([passage.approved for passage in index.passages], dtype=np.bool_)
        self._sections = np.array([passage.kind == "policy" for passage in index.passages], dtype=np.bool_)
        # What was allowed last, by what decides on it: of 10^6 passages the same array, not one that is equal.
        self._lately: dict[object, tuple[object, NDArray[np.bool_]]] = {}
        recurring: dict[Recurrence, list[int]] = {}  # each asked once a query, however many passages it has
        for number, passage in enumerate(index.passages):
            if passage.repeats is not None:
                recurring.setdefault(passage.repeats, []).append(number)
        self._recurring = [(repeats, np.array(numbers)) for repeats, numbers in recurring.items()]
        self.reader = Reader(index.lexical.vocabulary, terms or Terms())
        self._by_code: dict[str, list[int]] = {}
        for code, owners in index.by_code.items():
            self._by_code.setdefault(bare_code(code), []).extend(owners)
        keys = [twin_key(passage) for passage in index.passages]
        key_numbers = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        self._twins = np.array([key_numbers[key] for key in keys], dtype=np.int32)  # equal for translations
        self._glossary = GLOSSARY.with_own(self.reader.terms.own)
        self._untranslated = {lang: self._lacking(lang, keys) for lang in LANGS}
        self._bare = np.array([_is_bare(passage) for passage in index.passages], dtype=np.bool_)
        self.thresholds: Mapping[str, float] = {}  # of the store's tuning, see tuning.py; the bot's
        self.learned = learned
        self.learned_weight = learned_weight
        known = {key: n for n, key in enumerate(learned.keys)} if learned else {}
        # Of each passage its place among the keys, -1 for none.
        self._lesson = np.array([known.get(key, -1) for key in keys], dtype=np.int64)
        self._taught: dict[int, list[int]] = {}  # and its passages
        if learned:
            for owner in np.flatnonzero(self._lesson >= 0).tolist():
                self._taught.setdefault(int(self._lesson[owner]), []).append(owner)
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._read: OrderedDict[str, ReadQuestion] = OrderedDict()
        self._lock = threading.Lock()

    def gist(self, message: str, *, now: datetime) -> str:
        """
        Return the part of `message` that is its question and not talk around it ("hi, I'm Emily"), as it is searched.

        Whole is left what the store knows as a wording, and what finds more whole: there the talk was none. Where all
        of it is talk it is "", though searching for it looks for all of it.

        Raises:
            RetrievalError: the embedder failed.
        """
        message = _cut(message)
        core = self._core(message)
        if core in ("", message):
            return core
        return self._heard(message, core, self._valid(now), detect_lang(message), N_FIRST)[0]

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
        valid = self._valid(now)
        return self._hits(query, k, self._again("expired", valid, lambda: ~valid), lang, kinds)

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]:
        """Return every passage of `kind` valid at `now`, in file order; with `lang` only those in that language."""
        return [
            passage
            for passage in (self.index.passages[number] for number in self.index.by_kind.get(kind, ()))
            if (lang is None or passage.lang == lang) and is_valid(passage, now)
        ]

    def get(self, passage_id: str) -> Passage | None:
        """Return the passage of this id, valid or not."""
        number = self.index.by_id.get(passage_id)
        return None if number is None else self.index.passages[number]

    @property
    def reads(self) -> bool:
        """Whether a reranker reads the first hits."""
        return self._reader is not None

    def rank(
        self,
        query: str,
        *,
        now: datetime,
        lang: str | None = None,
        kinds: Collection[str] | None = None,
        lessons: NDArray[np.float32] | None = None,
    ) -> list[tuple[Passage, Features]]:
        """
        Return every candidate of `query` with what its confidence is made of, best first; for fitting and tests.

        `lessons`, (len(learned.keys),), take the place of `learned.scores`: for a question that was learned from.
        """
        query = _cut(query)
        ranked = self._rank(query, self._mask(self._valid(now), kinds), lang or detect_lang(query), lessons)
        return [(self.index.passages[number], ranked.features[number]) for number in ranked.order]

    def explain(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> Explanation:
        """
        Return what `search` returns with every reason for it; twice the work of a search.

        What is left out are passages that would stand among the hits but for their dates, their kind or a translation,
        at most `N_LEFT_OUT`, best first.
        """
        valid, spoken = self._valid(now), lang or detect_lang(query)
        allowed = self._mask(valid, kinds)
        whole = _cut(query)
        query, ranked = self._heard(whole, self._core(whole), allowed, spoken)
        hits = self._top(ranked, k)
        everything = self._rank(query, np.ones_like(valid), spoken)
        floor = hits[-1].score if hits and len(hits) == k else -np.inf
        left_out: list[LeftOut] = []
        for place in np.argsort(-everything.scores, kind="stable").tolist():
            number, score = int(everything.owners[place]), float(everything.scores[place])
            if number in ranked.features or score < floor or len(left_out) == N_LEFT_OUT:
                continue
            left_out.append(self._left_out(number, round(score, 6), everything, ranked, now, bool(valid[number])))
        asked = [self.index.lexical.query(query, ranked.slots)]
        if ranked.across is not None:
            asked.append(self.index.lexical.query(ranked.across.gloss.apart, ranked.across.gloss.slots))
        return Explanation(
            query=whole,
            gist=query,
            lang=spoken,
            read_as=ranked.slots,
            gloss=ranked.across.gloss.apart if ranked.across else "",
            unknown=tuple(
                word
                for word in dict.fromkeys(words(query))
                if weight(word) > 0.2 and word not in self.index.lexical.vocabulary
            ),
            hits=tuple(
                HitReasons(
                    hit=hit,
                    parts={name: float(values[ranked.place(number)]) for name, values in ranked.parts.items()},
                    features=dict(zip(NAMES, ranked.features[number].values(), strict=True)),
                    logit=self.calibration.terms(ranked.features[number], ranked.rivals(place)),
                    words=self._shared(number, asked),
                )
                for place, (hit, number) in enumerate(zip(hits, ranked.order, strict=False))
            ),
            left_out=tuple(left_out),
        )

    def _shared(self, number: int, asked: Sequence[Query]) -> tuple[tuple[str, float], ...]:
        """Return the words that a passage shares with the question, or with its gloss where those are more."""
        shares = [one.shares(number) for one in asked]
        return max(shares, key=lambda found: sum(share for _, share in found))

    def _left_out(
        self, number: int, score: float, everything: _Ranked, ranked: _Ranked, now: datetime, valid: bool
    ) -> LeftOut:
        passage = self.index.passages[number]
        features = everything.features.get(number)
        confidence = None
        if features is not None:
            others = everything.rivals(everything.order.index(number))
            confidence = round(self.calibration.confidence(features, others), 4)
        if number in ranked.folded:
            return LeftOut(passage, score, None, "translation", self.index.passages[ranked.folded[number]].id)
        if valid:
            return LeftOut(passage, score, confidence, "kind")
        following = next_valid(passage, now)
        if following is None:
            return LeftOut(passage, score, confidence, "ended", since=last_valid_end(passage, now))
        begun = passage.valid_from is None or passage.valid_from <= now
        return LeftOut(passage, score, confidence, "outside its times" if begun else "not begun", next_on=following)

    def _valid(self, now: datetime) -> NDArray[np.bool_]:
        if now.tzinfo is None:
            raise ValueError("now has no time zone; pass datetime.now(timezone.utc)")
        moment = now.timestamp()
        held = np.logical_and(self._starts <= moment, moment < self._ends)
        windows = tuple(repeats.holds(now) for repeats, _ in self._recurring)

        def find() -> NDArray[np.bool_]:
            valid = np.ones(len(self.index.passages), dtype=np.bool_)
            valid[self._dated] = held
            # `is_valid`, with its last line asked once for all that share it.
            for (_, numbers), holds in zip(self._recurring, windows, strict=True):
                if not holds:
                    valid[numbers] = False
            return valid

        return self._again("valid", (held.tobytes(), windows), find)

    def _mask(self, allowed: NDArray[np.bool_], kinds: Collection[str] | None) -> NDArray[np.bool_]:
        if kinds is None:
            return allowed
        known = frozenset(self.index.by_kind).intersection(kinds)

        def find() -> NDArray[np.bool_]:
            wanted = np.zeros(len(self.index.passages), dtype=np.bool_)
            for kind in known:
                wanted[self.index.by_kind[kind]] = True
            return np.logical_and(allowed, wanted, dtype=np.bool_)

        return self._again(("kinds", known), allowed, find)

    def _again(self, name: object, decided_by: object, find: Callable[[], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Return what `find` does, or found when it was last asked for `name` and the same decided on it."""
        last = self._lately.get(name)
        if last is not None and (
            last[0] is decided_by or (not isinstance(decided_by, np.ndarray) and last[0] == decided_by)
        ):
            return last[1]
        found = find()
        self._lately[name] = (decided_by, found)
        return found

    def _hits(
        self, query: str, k: int, allowed: NDArray[np.bool_], lang: str | None, kinds: Collection[str] | None
    ) -> list[Hit]:
        k = max(k, 0)
        n = max(k, N_FIRST)  # rivals are known even where they are not asked for
        query = _cut(query)
        spoken = lang or detect_lang(query)
        return self._top(self._heard(query, self._core(query), self._mask(allowed, kinds), spoken, n)[1], k)

    def _heard(
        self, message: str, core: str, allowed: NDArray[np.bool_], lang: str, n: int | None = None
    ) -> tuple[str, _Ranked]:
        """Return what of `message`, whose `_core` is given, is searched for, and the candidates for it; see `_rank`."""
        core = core or message
        ranked = self._rank(core, allowed, lang, n=n)
        if core == message or self._sure(ranked) + DOUBT >= 1:
            return core, ranked
        # "Can't log in, forgot my password": where more is found for the whole, what was cut off was no talk.
        whole = self._rank(message, allowed, lang, n=n)
        return (message, whole) if self._sure(whole) > self._sure(ranked) + DOUBT else (core, ranked)

    def _sure(self, ranked: _Ranked) -> float:
        """Return the confidence of the first of `ranked`; 0 where there is none."""
        return max((hit.confidence for hit in self._top(ranked, 1)), default=0.0)

    def _top(self, ranked: _Ranked, k: int) -> list[Hit]:
        return [
            Hit(
                passage=self.index.passages[number],
                score=round(ranked.score(number), 6),
                confidence=round(self.calibration.confidence(ranked.features[number], ranked.rivals(place)), 4),
                wording=ranked.wording[number],
            )
            for place, number in enumerate(ranked.order[: max(k, 0)])
        ]

    def _rank(
        self,
        query: str,
        allowed: NDArray[np.bool_],
        lang: str,
        lessons: NDArray[np.float32] | None = None,
        n: int | None = None,
    ) -> _Ranked:
        """
        Rank all candidates for `query`, as `_cut` returned it.

        With `n`, features and wordings are there for the first `n` of them only.
        """
        if not query or not allowed.any():
            return _nothing()
        index = self.index
        slots = self.reader.slots(query)
        meant = as_heard(query, slots)
        raw = self._meaning(query, meant)
        vector = index.place(raw, query)
        # 1) Candidates: nearest units, most words shared, and whatever the query names by code or letter for letter.
        named = {number for code in named_codes(query) for number in self._by_code.get(code, ())}
        if lessons is None and self.learned is not None:
            lessons = self.learned.scores(query, vector)
        taught = set() if lessons is None else self._brought_by(lessons)
        across = self._across(query, allowed)
        found = find_candidates(index, query, raw, vector, allowed, slots, named | taught, across)
        owners, coverage, exact = found.owners, found.coverage, found.exact
        # 2) Every candidate scored all ways; its body is the last of its units.
        firsts, lasts = index.first_unit[owners], index.first_unit[owners + 1] - 1
        n_wordings = lasts - firsts
        if not len(owners):
            return _nothing(slots)
        starts = np.cumsum(n_wordings + 1) - (n_wordings + 1)  # of each candidate, in numbers
        numbers = np.repeat(firsts - starts, n_wordings + 1) + np.arange(int(np.sum(n_wordings + 1)))
        cosines = self._cosines(vector, numbers, found)
        cosines[index.sides[numbers] != (side_of(query) == "zh")] /= self.embedder.shared
        if across is not None:
            theirs = np.flatnonzero(
                across.only[index.owners[numbers]] & (index.sides[numbers] == (across.gloss.lang == "zh"))
            )
            glossed = index.cosines(across.placed, numbers[theirs])
            cosines[theirs] = np.minimum(ACROSS * ((1 - GLOSS) * cosines[theirs] + GLOSS * glossed), 1.0)
        body = cosines[starts + n_wordings]
        as_wordings = cosines.copy()
        as_wordings[starts + n_wordings] = np.where(n_wordings == 0, body, -1.0)
        best_wording = np.maximum.reduceat(as_wordings, starts)
        sums = np.add.reduceat(cosines, starts) - body
        all_wordings = np.where(n_wordings == 0, body, sums / np.maximum(n_wordings, 1))
        # A score is the sum of these parts and of nothing else: what `explain` shows is what ranks.
        weights = BODY + BEST_WORDING + ALL_WORDINGS + LEXICAL
        bare = self._bare[owners]
        body = np.where(bare, (1 - BARE_WORDS) * best_wording + BARE_WORDS * coverage, body)
        parts: dict[str, NDArray[np.float64]] = {
            "body": BODY / weights * body,
            "best_wording": BEST_WORDING / weights * best_wording,
            "all_wordings": ALL_WORDINGS / weights * all_wordings,
            "words": LEXICAL / weights * coverage,
        }
        mixed = np.sum(list(parts.values()), axis=0)
        # 3) What is known beside likeness; then one of each pair of translations.
        is_exact, is_named = _among(owners, exact), _among(owners, named)
        # What has no translation to give way to is not behind for its language.
        spoken = (self._langs[owners] == self._lang_numbers.get(lang, -1)) | self._untranslated[side_of(query)][owners]
        beside = {
            "same_lang": SAME_LANG * spoken,
            "approved": APPROVED * self._approved[owners],
            "section": SECTION * self._sections[owners],
            "exact": EXACT * is_exact,
            "code": CODE * is_named,
        }
        parts |= {name: np.asarray(values, dtype=np.float64) for name, values in beside.items()}
        learned = np.zeros(len(owners))
        if lessons is not None:
            learned = np.where(self._lesson[owners] >= 0, lessons[self._lesson[owners]], 0.0).astype(np.float64)
            parts["learned"] = self.learned_weight * learned
        scores = np.sum(list(parts.values()), axis=0)
        kept, folded, parts["translation"] = self._fold_twins(owners, scores, lang)
        # The first few are read beside the question, word by word.
        logits = self._logits(query if meant is None else meant, owners, kept, scores)
        if logits is not None:
            parts["read"] = READ * logits
            scores += parts["read"]
            kept = kept[np.argsort(-scores[kept], kind="stable")]
        # 4) What the confidence is made of. From here on in the order of the hits.
        background, lessons_kept = mixed[kept], learned[kept]
        read = np.zeros(len(kept)) if logits is None else logits[kept] / 10
        read_first, read_second = _two_best(read)
        mean, spread = float(background.mean()), max(float(background.std()), 0.05)
        brevity = 1 / (1 + found.n_words)
        features, wording = {}, {}
        # The margin is of what was there before the tuning and the reading, so that it means the same with and without
        # them.
        before = scores[kept] - self.learned_weight * lessons_kept - parts.get("read", np.zeros(len(owners)))[kept]
        first, second = _two_best(before)
        lead_first, lead_second = (first, second) if lessons is None else _two_best(lessons_kept)
        order: list[int] = owners[kept].tolist()
        for rank, (owner, position) in enumerate(zip(order[:n], kept.tolist(), strict=False)):  # the few that are hits
            rival = before[second if rank == first else first] if len(order) > 1 else before[rank] - 0.1
            taught_best = lead_second if rank == lead_first else lead_first
            lead_by = float(learned[position] - lessons_kept[taught_best]) if len(order) > 1 else 0.0
            features[owner] = Features(
                body=float(body[position]),
                wording=float(best_wording[position]),
                standout=(float(mixed[position]) - mean) / spread / 5 if len(order) > 2 else 0.4,
                margin=max(-1.0, min(1.0, float(before[rank] - rival))),
                coverage=float(coverage[position]),
                exact=float(is_exact[position]),
                code=float(is_named[position]),
                brevity=brevity,
                other_lang=float(index.passages[owner].lang not in (lang, "")),
                learned=float(learned[position]),
                learned_lead=lead_by,
                read=float(read[rank]),
                read_lead=float(read[rank] - read[read_second if rank == read_first else read_first]),
            )
            start = int(starts[position])
            best = int(np.argmax(as_wordings[start : start + int(n_wordings[position]) + 1]))
            wording[owner] = index.units[int(numbers[start + best])].text
        return _Ranked(order, owners, scores, features, wording, parts, folded, slots, across)

    def _cosines(
        self, vector: NDArray[np.float32], numbers: NDArray[np.int64], found: Candidates
    ) -> NDArray[np.float32]:
        """Return the cosines of the units `numbers`: what the search for the nearest computed, and the others'."""
        if not len(found.units):
            return self.index.cosines(vector, numbers)
        places = np.minimum(np.searchsorted(found.units, numbers), len(found.units) - 1)
        cosines: NDArray[np.float32] = found.cosines[places]
        unknown = np.flatnonzero(found.units[places] != numbers)
        cosines[unknown] = self.index.cosines(vector, numbers[unknown])
        return cosines

    def _fold_twins(
        self, owners: NDArray[np.int64], scores: NDArray[np.float64], lang: str
    ) -> tuple[NDArray[np.int64], dict[int, int], NDArray[np.float64]]:
        """
        Keep one of each passage and its translation, in the better one's place: the one in `lang` if there is.

        Returns the places of those kept, best first (of equals the first in the store); what each left out gave way
        to; and what each of `owners` gained by its better twin, which is added to `scores`.
        """
        best_first = np.argsort(-scores, kind="stable")
        lead = np.zeros(len(owners))
        twins = self._twins[owners[best_first]].tolist()
        if len(set(twins)) == len(twins):
            return best_first, {}, lead
        spoken = (self._langs[owners] == self._lang_numbers.get(lang, -1)).tolist()
        chosen: dict[int, int] = {}
        for key, place in zip(twins, best_first.tolist(), strict=True):
            other = chosen.setdefault(key, place)
            if spoken[place] and not spoken[other]:
                lead[place] = scores[other] - scores[place]
                scores[place] = scores[other]
                chosen[key] = place
        numbers = owners.tolist()
        folded = {
            numbers[place]: numbers[chosen[key]]
            for key, place in zip(twins, best_first.tolist(), strict=True)
            if chosen[key] != place
        }
        return np.fromiter(chosen.values(), dtype=np.int64, count=len(chosen)), folded, lead

    def _lacking(self, lang: str, keys: Sequence[str]) -> NDArray[np.bool_]:
        """
        Return which passages (n_passages,) are in another language than `lang` and have no translation in it.

        `keys` are all passages' `twin_key`.
        """

        def topic(number: int) -> str:
            # What a passage and its translation share; of a document, whose sections differ, its name.
            passage = self.index.passages[number]
            return f"{passage.kind}:{passage.meta['policy']}" if "policy" in passage.meta else keys[number]

        spoken = self._langs == self._lang_numbers.get(lang, -1)
        lacking: NDArray[np.bool_] = ~spoken & (self._langs != self._lang_numbers[""])
        said = {topic(number) for number in np.flatnonzero(spoken).tolist()} if lacking.any() else ()
        if said:
            elsewhere = np.flatnonzero(lacking).tolist()
            lacking[[number for number in elsewhere if topic(number) in said]] = False
        return lacking

    def _across(self, query: str, allowed: NDArray[np.bool_]) -> Across | None:
        """Return `query` in the other language; None where every allowed passage is in the query's own as well."""
        side = side_of(query)
        lacking = self._untranslated[side]
        alone = self._again(("alone", side), allowed, lambda: lacking & allowed)
        if not alone.any():
            return None
        gloss = self._glossary.gloss(query)
        if gloss is None or side_of(gloss.text) == side:  # nothing, or too little, could be said in the other language
            return None
        raw = self._vector(gloss.text)
        return Across(gloss, raw, self.index.place(raw, gloss.text), lacking, alone)

    def _brought_by(self, lessons: NDArray[np.float32]) -> set[int]:
        """Return the passages that the tuning would put first, whether or not anything else finds them."""
        best = np.argsort(-lessons, kind="stable")[:N_TAUGHT]
        return {owner for key in best.tolist() if lessons[key] > 0 for owner in self._taught.get(key, ())}

    def _logits(
        self, query: str, owners: NDArray[np.int64], kept: NDArray[np.int64], scores: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        """
        Return of each of `owners` the logit that it answers `query`; None where nothing is read.

        Only the first `N_READ` of `kept`, places among the owners, are read, with their translations, and of these the
        best few once more by the cross-encoder. The others are given at most the lowest of theirs, so that none comes
        before one that was read.
        """
        if self._reader is None or self.index.readings is None or not len(kept):
            return None
        twins = self._twins[owners]
        read = np.flatnonzero(np.isin(twins, twins[kept[:N_READ]]))
        question = self._reading(query)
        found = self._reader.logits(question, self._kept_of(owners[read])).astype(np.float64)
        _, pairs = np.unique(twins[read], return_inverse=True)
        means = np.bincount(pairs, found) / np.bincount(pairs)
        logits = np.full(len(owners), means.min())
        logits[read] = means[pairs]
        if self._reads_closer:
            best = kept[np.argsort(-(scores + READ * logits)[kept], kind="stable")[:N_CLOSER]]
            found = (1 - CLOSER) * logits[best] + CLOSER * self._reader.closer(question, self._kept_of(owners[best]))
            logits = np.minimum(logits, found.min())
            logits[best] = found
        return logits

    def _kept_of(self, numbers: NDArray[np.int64]) -> list[ReadPassage]:
        """Return what a reranker reads of the passages `numbers`."""
        assert self.index.readings is not None
        return [self.index.readings.of(number) for number in numbers.tolist()]

    def _core(self, message: str) -> str:
        """Return `message` without what its words alone say is talk around the question; "" where all of it is."""
        if not message or self._listener is None or self.index.worded(message):
            return message
        with self._lock:
            is_given = message in self._vectors and message not in self._read
        if is_given and self._reader is None:  # its vector was remembered, and nothing else needs it to be read
            return message
        said = quietly(message)
        core = self._listener.gist(said, self._reading(message))
        # What stands in brackets was put there in the place of a name, when the message was masked.
        if named_codes(core) != named_codes(said) or core.count("[") != said.count("["):
            return message
        begin = said.find(core)
        return message[begin : begin + len(core)]

    def _reading(self, query: str) -> ReadQuestion:
        """Return what a reranker reads of `query`."""
        with self._lock:
            known = self._read.get(query)
        return self._embed(query)[1] if known is None else known

    def remember(self, queries: Sequence[str], vectors: Vectors, read: Sequence[ReadQuestion] = ()) -> None:
        """Put vectors of `queries` (n, dim) into the cache, and what is `read` of them, made by the same embedder."""
        with self._lock:
            self._vectors.update(zip(queries, vectors, strict=True))
            self._read.update(zip(queries, read, strict=len(read) > 0))

    def _meaning(self, query: str, meant: str | None = None) -> NDArray[np.float32]:
        """
        Return the vector (dim,) of `query`: the mean of all the ways to say it.

        With the store's own terms in it there is another, with a name that half the store's questions have one without,
        and where all it says was typed by its sound what was `meant`.
        """
        others = (self.reader.terms.rewritten(query), without_names(query, self.index.names), meant)
        vectors = [self._vector(text) for text in (query, *others) if text is not None]
        return np.mean(vectors, axis=0, dtype=np.float32) if len(vectors) > 1 else vectors[0]

    def _vector(self, query: str) -> NDArray[np.float32]:
        with self._lock:
            known = self._vectors.get(query)
            if known is not None:
                self._vectors.move_to_end(query)
                return known
        return self._embed(query)[0]

    def _embed(self, query: str) -> tuple[NDArray[np.float32], ReadQuestion]:
        """Return the vector (dim,) of `query` and what a reranker reads of it, nothing where there is none."""
        read: ReadQuestion = ()
        vectors: Vectors
        if self._listener is None:
            vectors = self.embedder.embed_queries([quietly(query)])
        else:
            vectors, (read,) = self._listener.read_queries([quietly(query)])
        with self._lock:
            self._vectors[query], self._read[query] = vectors[0], read
            for cache in (self._vectors, self._read):
                while len(cache) > QUERY_CACHE:
                    cache.popitem(last=False)
        return vectors[0], read


def _cut(query: str) -> str:
    return query.strip()[:MAX_QUERY_CHARS]


def _seconds(moment: datetime | None, otherwise: float) -> float:
    return otherwise if moment is None else moment.timestamp()


def _is_bare(passage: Passage) -> bool:
    if len(passage.questions) > 1 or passage.text not in ("", passage.title, *passage.questions):
        return False
    return side_of(passage.text or passage.title or "".join(passage.questions)) == "zh"


def _among(owners: NDArray[np.int64], chosen: Collection[int]) -> NDArray[np.bool_]:
    """Return which of `owners` are `chosen`, shape (len(owners),)."""
    return np.isin(owners, list(chosen)) if chosen else np.zeros(len(owners), dtype=np.bool_)


def _two_best(scores: NDArray[np.float64]) -> tuple[int, int]:
    """Return where the highest score is and where the next, the first of equals; one alone is both."""
    first = int(np.argmax(scores))
    if len(scores) == 1:
        return first, first
    others = scores.copy()
    others[first] = -np.inf
    return first, int(np.argmax(others))
