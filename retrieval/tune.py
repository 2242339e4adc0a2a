"""
`tune` and `calibrate --store`: a store's own questions -> a better ranking, a truer confidence, thresholds for a risk.

Nothing is taken on trust: a fifth of the questions is kept aside, the tuned retriever has to find more of them than the
untuned one (sign test), or nothing is kept. What the confidence is fitted on was never seen by the scores it is fitted
to: every example is scored by all others (`Learned.held_out`), and some passages are taken away so that "nothing here
answers this" is learned from questions of the same store. Knows passages and questions; knows no files (tuning.py).
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.calibrate import Examples, fit
from retrieval.confidence import N_FIRST, Calibration, Features, load_calibration, rivals
from retrieval.embedder import Embedder, Progress, VectorCache
from retrieval.errors import BadStore, Fault
from retrieval.evaluate import Outcome, Question, measures, risk_curve
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from retrieval.learned import Example, Learned
from retrieval.load import twin_key
from retrieval.passages import Passage
from retrieval.terms import Terms
from retrieval.tuning import Tuning, fit_learned

SEED = 7
N_LEAST = 60  # questions with an answer; with fewer a fifth says nothing
HELD_OUT = 5  # one in so many is kept aside
N_WEIGHING = 600  # questions the weight is chosen on
WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0)  # tried; the best on the questions learned from, each scored without itself
LEFT_OUT = 0.15  # share of the passages with questions that are taken away to see what "no answer" looks like
SURE = 0.05  # chance at which as many wins would come by luck, at most
PRIOR = 2e-3  # how strongly the shipped confidence holds where the store's questions say little
RISKS = (0.005, 0.01, 0.02, 0.05, 0.1)
MISSED = 0.02  # answerable questions that may fall under the "answer" threshold


@dataclass(frozen=True, slots=True)
class Problem:
    """What is tuned on: the knowledge, and questions with the ids that answer them (none: nothing does)."""

    passages: Sequence[Passage]
    questions: Sequence[Question]
    now: datetime
    terms: Terms


def wordings_aside(passages: Sequence[Passage]) -> tuple[list[Passage], list[Question]]:
    """
    Return the passages with every second further wording taken out, and those wordings as questions to them.

    A wording that stays in the index finds itself; taken out, it is a question the merchant has labelled.
    """
    kept: list[Passage] = []
    asked: list[Question] = []
    keys: dict[str, set[str]] = {}
    for passage in passages:
        keys.setdefault(twin_key(passage), set()).add(passage.id)
    for passage in passages:
        out = [wording for n, wording in enumerate(passage.questions) if n % 2 == 1] if passage.kind == "faq" else []
        kept.append(replace(passage, questions=tuple(w for w in passage.questions if w not in out)))
        asked += [Question(wording, frozenset(keys[twin_key(passage)])) for wording in out]
    return kept, asked


def tune(
    problem: Problem,
    embedder: Embedder,
    cache: VectorCache,
    *,
    risk: float | None = None,
    progress: Progress | None = None,
) -> tuple[Tuning | None, dict[str, Any]]:
    """
    Return the tuning, None where it did not win, and the report. Blocks: mostly for embedding the questions.

    With a `risk`, the share of direct answers that may be wrong, the tuning carries the bot's thresholds for it.

    Raises:
        BadStore: too few questions, or none that this knowledge answers.
        RetrievalError: the embedder failed.
    """
    bench = Bench(problem, embedder, cache, progress)
    answerable, aside, rest = bench.split()
    examples = bench.examples(rest)
    learned = fit_learned(examples, bench.plain.index, embedder, cache)
    weight = bench.best_weight(learned, examples)
    tuned = bench.retriever(bench.plain, learned, weight)
    before = [bench.outcome(bench.plain, question) for question in aside]
    after = [bench.outcome(tuned, question) for question in aside]
    compared = trial(before, after)
    fitted, curve, thresholds = bench.confidence(examples, weight, learned, risk)
    report: dict[str, Any] = {
        "n_questions": len(answerable),
        "n_held_out": len(aside),
        "weight": weight,
        **compared,
        "risk": risk,
        "thresholds": thresholds,
        "risk_curve": curve,
    }
    if not report["kept"]:
        return None, report
    return (
        Tuning(
            embedder=embedder.version,
            examples=tuple(bench.examples(answerable)),
            weight=weight,
            weights=_rounded(fitted.weights),
            bias=round(fitted.bias, 4),
            thresholds=thresholds,
            report=report,
        ),
        report,
    )


def trial(before: Sequence[Outcome], after: Sequence[Outcome]) -> dict[str, Any]:
    """Return how the questions kept aside came out without and with what was learned, and whether it is "kept"."""
    better = sum(new.rank == 1 != old.rank for new, old in zip(after, before, strict=True))
    worse = sum(old.rank == 1 != new.rank for new, old in zip(after, before, strict=True))
    luck = sign_test(better, worse)
    return {
        "untuned": _short(measures(before)),
        "tuned": _short(measures(after)),
        "better": better,
        "worse": worse,
        "p_by_luck": round(luck, 5),
        "kept": luck <= SURE and better > worse,
    }


def calibrate_store(
    problem: Problem,
    embedder: Embedder,
    cache: VectorCache,
    before: Tuning | None,
    *,
    risk: float | None = None,
    progress: Progress | None = None,
) -> tuple[Tuning, dict[str, Any]]:
    """
    Return `before` (or no tuning) with the confidence fitted on this store's questions, and the report.

    Raises:
        BadStore: too few questions.
        RetrievalError: the embedder failed.
    """
    bench = Bench(problem, embedder, cache, progress)
    answerable = [question for question in bench.questions if bench.keys_of(question)]
    if len(answerable) < N_LEAST:
        problem_text = f"{len(answerable)} questions with an answer, at least {N_LEAST} are needed; add some"
        raise BadStore([Fault("questions", None, None, problem_text)])
    usable = before is not None and before.embedder == embedder.version and bool(before.examples)
    weight = before.weight if before is not None and usable else 0.0
    lessons = [*before.examples] if before is not None and usable else []
    asked = bench.examples(answerable)
    learned = fit_learned([*lessons, *asked], bench.plain.index, embedder, cache) if usable else None
    fitted, curve, thresholds = bench.confidence(asked, weight, learned, risk)
    report = {
        "n_questions": len(answerable),
        "weights": _rounded(fitted.weights),
        "bias": round(fitted.bias, 4),
        "risk": risk,
        "thresholds": thresholds,
        "risk_curve": curve,
    }
    tuning = Tuning(
        embedder=embedder.version,
        examples=tuple(lessons),
        weight=weight,
        weights=_rounded(fitted.weights),
        bias=round(fitted.bias, 4),
        thresholds=thresholds,
        report=report,
    )
    return tuning, report


class Bench:
    """One store's questions with the untuned retriever they are put to."""

    def __init__(self, problem: Problem, embedder: Embedder, cache: VectorCache, progress: Progress | None) -> None:
        self.problem, self.embedder, self.cache = problem, embedder, cache
        self.shipped = load_calibration()
        index = build_index(problem.passages, embedder, cache, progress)
        self.plain = HybridRetriever(index, embedder, self.shipped, problem.terms)
        self.keys = {passage.id: twin_key(passage) for passage in problem.passages}
        self.questions = list({question.text: question for question in problem.questions}.values())
        texts = [question.text for question in self.questions]
        vectors = cache.embed(embedder, texts, as_query=True, progress=progress)
        self.vectors = dict(zip(texts, vectors, strict=True))

    def split(self) -> tuple[list[Question], list[Question], list[Question]]:
        """
        Return the questions with an answer, those of them kept aside, and the rest, which is learned from.

        Raises:
            BadStore: there are too few.
        """
        answerable = [question for question in self.questions if self.keys_of(question)]
        aside = [question for question in answerable if zlib.crc32(question.text.encode()) % HELD_OUT == 0]
        rest = [question for question in answerable if zlib.crc32(question.text.encode()) % HELD_OUT]
        if len(answerable) < N_LEAST or not aside:
            problem_text = f"{len(answerable)} questions with an answer, at least {N_LEAST} are needed; add some"
            raise BadStore([Fault("questions", None, None, problem_text)])
        return answerable, aside, rest

    def keys_of(self, question: Question) -> set[str]:
        """Return the twin keys of what answers `question` and is in the knowledge."""
        return {self.keys[one] for one in question.relevant if one in self.keys}

    def examples(self, questions: Sequence[Question]) -> list[Example]:
        """Return one example a question: of several passages that answer it the first in the store."""
        place = {key: n for n, key in enumerate(dict.fromkeys(self.keys.values()))}
        return [Example(question.text, min(self.keys_of(question), key=place.__getitem__)) for question in questions]

    def retriever(self, like: HybridRetriever, learned: Learned | None, weight: float) -> HybridRetriever:
        return HybridRetriever(
            like.index, self.embedder, self.shipped, self.problem.terms, learned=learned, learned_weight=weight
        )

    def rank(
        self, retriever: HybridRetriever, text: str, lessons: NDArray[np.float32] | None = None
    ) -> list[tuple[Passage, Features]]:
        retriever.remember([text], self.vectors[text][None])
        return retriever.rank(text, now=self.problem.now, lessons=lessons)

    def outcome(self, retriever: HybridRetriever, question: Question) -> Outcome:
        wanted = self.keys_of(question)
        ranked = self.rank(retriever, question.text)
        rank = next((n for n, (passage, _) in enumerate(ranked[:10], 1) if twin_key(passage) in wanted), None)
        return Outcome(rank, True, _first(retriever.calibration, ranked), 0.0)

    def best_weight(self, learned: Learned, examples: Sequence[Example]) -> float:
        """Return the weight that puts most examples' passages first, each scored by all others; of equals the least."""
        lessons = dict(zip(learned.examples, learned.held_out(), strict=True))
        sample = [example for example in examples if example in lessons]
        random.Random(SEED).shuffle(sample)
        found: dict[float, int] = {}
        for weight in WEIGHTS:
            retriever = self.retriever(self.plain, learned, weight)
            found[weight] = sum(
                twin_key(ranked[0][0]) == example.key
                for example in sample[:N_WEIGHING]
                if (ranked := self.rank(retriever, example.text, lessons[example]))
            )
        return max(found, key=lambda weight: (found[weight], -weight))

    def confidence(
        self, examples: Sequence[Example], weight: float, learned: Learned | None, risk: float | None
    ) -> tuple[Calibration, list[dict[str, float]], dict[str, float]]:
        """Return the fitted confidence, its risk curve, and the thresholds for `risk`."""
        lessons = dict(zip(learned.examples, learned.held_out(), strict=True)) if learned else {}
        retriever = self.retriever(self.plain, learned, weight)
        asked: list[tuple[str, list[tuple[Passage, Features]]]] = []  # key that answers it ("" for none), hits
        for example in examples:
            if learned is None or example in lessons:
                asked.append((example.key, self.rank(retriever, example.text, lessons.get(example))))
        keys = sorted({example.key for example in examples})
        gone = set(random.Random(SEED).sample(keys, int(LEFT_OUT * len(keys))))
        passages = [passage for passage in self.problem.passages if twin_key(passage) not in gone]
        index = build_index(passages, self.embedder, self.cache)
        kept = [example for example in examples if example.key not in gone]
        less = fit_learned(kept, index, self.embedder, self.cache) if learned else None
        poorer = HybridRetriever(
            index, self.embedder, self.shipped, self.problem.terms, learned=less, learned_weight=weight
        )
        asked += [("", self.rank(poorer, example.text)) for example in examples if example.key in gone]
        asked += [("", self.rank(retriever, q.text)) for q in self.questions if not q.relevant]
        known = Examples.of(
            ([features for _, features in ranked], [twin_key(passage) == key for passage, _ in ranked])
            for key, ranked in asked
        )
        fitted = fit([known], self.plain.calibration, PRIOR)
        outcomes = [
            Outcome(
                rank=1 if ranked and twin_key(ranked[0][0]) == key else None,
                answerable=key != "",
                confidence=_first(fitted, ranked),
                ms=0.0,
            )
            for key, ranked in asked
        ]
        return fitted, risk_curve(outcomes, RISKS), {} if risk is None else _thresholds(outcomes, risk)


def _first(fitted: Calibration, ranked: Sequence[tuple[Passage, Features]]) -> float:
    """Return the confidence of the first hit, 0 where there is none."""
    hits = [features for _, features in ranked[:N_FIRST]]
    return fitted.confidence(hits[0], rivals(hits, 0)) if hits else 0.0


def _thresholds(outcomes: Sequence[Outcome], risk: float) -> dict[str, float]:
    """
    Return "direct": at or above it at most `risk` of the first hits are wrong; "answer": below it lie few right ones.

    "direct" is left out where no confidence is that safe.
    """
    found: dict[str, float] = {}
    point = risk_curve(outcomes, (risk,))[0]
    if point["coverage"] > 0:
        found["direct"] = point["confidence"]
    right = sorted(outcome.confidence for outcome in outcomes if outcome.rank == 1)
    if right:
        found["answer"] = round(min(right[int(MISSED * len(right))], found.get("direct", 1.0)), 4)
    return found


def sign_test(better: int, worse: int) -> float:
    """Return the chance of at least `better` wins in `better + worse` even matches: 1 where there were none."""
    n = better + worse
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(better, n + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def _short(found: dict[str, float | None]) -> dict[str, float | None]:
    return {name: found[name] for name in ("recall@1", "recall@3", "mrr@10")}


def _rounded(weights: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in weights.items()}
