"""
`tune` and `calibrate --store`: a store's own questions -> a better ranking, a truer confidence, thresholds for a risk.

Nothing is taken on trust: a fifth of the questions is kept aside, the tuned retriever has to find more of them than the
untuned one (sign test), or nothing is kept. Asked is what visitors ask, of the knowledge as it is live. The store's own
wordings are learned from and never asked: taken out to be asked, the tuning wins by giving them back, and asked one by
one they still speak for it where visitors do not (docs/experiments.md). Found is the labelled passage, its translation,
or a section that says the same (restated.py). The confidence is fitted by scores that never saw the question
(`Learned.held_out`), and takes the shipped one's place where it is nearer to the truth on questions it was not fitted
on. Knows passages and questions; knows no files (tuning.py).
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import NormalDist, fmean, pstdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.calibrate import Examples, fit
from retrieval.confidence import N_FIRST, Calibration, Features, load_calibration, rivals
from retrieval.embedder import Embedder, Progress, ReadQuestion, Reads, VectorCache
from retrieval.errors import BadStore, Fault
from retrieval.evaluate import Outcome, Question, measures, risk_curve
from retrieval.hybrid import HybridRetriever
from retrieval.index import Index, build_index
from retrieval.learned import Example, Learned
from retrieval.load import twin_key
from retrieval.passages import Passage
from retrieval.restated import restated
from retrieval.terms import Terms
from retrieval.tuning import Tuning, fit_learned
from retrieval.words import quietly

SEED = 7
N_LEAST = 60  # questions with an answer; with fewer a fifth says nothing
HELD_OUT = 5  # one in so many is kept aside
N_WEIGHING = 600  # questions the weight is chosen on
WEIGHTS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # tried; the best on the questions learned from, each without itself
N_UNANSWERED = 20  # questions nothing answers; with fewer they say nothing of how often that is
LEFT_OUT = 0.15  # where a tuning is fitted and they are fewer: share of the passages that are taken away for them
SURE = 0.05  # chance at which as many wins would come by luck, at most
# How strongly the shipped confidence holds, over the number of questions: 0.03 for the 300 that a store may label (with
# 0.002 the fit was worse than the shipped one on the store's other questions), 0.002 for thousands.
PRIOR = 10.0
LEAST_CHANCE = 1e-4  # given to what was held impossible: a log loss is bounded
RISKS = (0.005, 0.01, 0.02, 0.05, 0.1)
MISSED = 0.02  # answerable questions that may fall under the "answer" threshold


@dataclass(frozen=True, slots=True)
class Problem:
    """What is tuned on: the knowledge, and visitors' questions with the ids that answer them (none: nothing does)."""

    passages: Sequence[Passage]
    questions: Sequence[Question]
    now: datetime
    terms: Terms


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
    learned = fit_learned(bench.examples(rest), bench.plain.index, embedder, cache)
    weight = bench.best_weight(learned, rest)
    tuned = bench.retriever(bench.plain.index, learned, weight)
    compared = trial(bench.outcomes(bench.plain, aside), bench.outcomes(tuned, aside))
    confidence = bench.confidence(rest, weight, learned, risk) if compared["kept"] else Confidence()
    report: dict[str, Any] = {
        "n_questions": len(answerable),
        "n_held_out": len(aside),
        "weight": weight,
        **compared,
        **confidence.report(),
        "risk": risk,
    }
    if not report["kept"]:
        return None, report
    return (
        Tuning(
            embedder=embedder.version,
            examples=tuple(bench.examples(answerable)),
            weight=weight,
            weights=confidence.weights,
            bias=confidence.bias,
            thresholds=confidence.thresholds,
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
) -> tuple[Tuning | None, dict[str, Any]]:
    """
    Return `before` (or no tuning) with the confidence fitted on the questions, and the report.

    None comes back where the shipped confidence is as good and no `risk` asks for thresholds: there is nothing to keep.

    Raises:
        BadStore: too few questions.
        RetrievalError: the embedder failed.
    """
    bench = Bench(problem, embedder, cache, progress)
    answerable = [one for one in bench.questions if bench.keys_of(one)]
    unanswered = [one for one in bench.questions if not one.relevant]
    lessons: Sequence[Example] = ()
    weight = 0.0
    if before is not None and before.embedder == embedder.version and before.examples:
        lessons, weight = before.examples, before.weight
    if len(answerable) < N_LEAST or (not lessons and len(unanswered) < N_UNANSWERED):
        problem_text = (
            f"{len(answerable)} questions with an answer and {len(unanswered)} without, at least {N_LEAST} and"
            f" {N_UNANSWERED} are needed; add what visitors asked with --questions"
        )
        raise BadStore([Fault("questions", None, None, problem_text)])
    taught = [*lessons, *bench.examples(answerable)]
    learned = fit_learned(taught, bench.plain.index, embedder, cache) if lessons else None
    confidence = bench.confidence(answerable, weight, learned, risk)
    report = {
        "n_questions": len(answerable),
        "n_unanswered": len(unanswered),
        "weights": confidence.weights,
        "bias": confidence.bias,
        **confidence.report(),
        "risk": risk,
    }
    if not confidence.kept and risk is None:
        return None, report
    tuning = Tuning(
        embedder=embedder.version,
        examples=tuple(lessons),
        weight=weight,
        weights=confidence.weights,
        bias=confidence.bias,
        thresholds=confidence.thresholds,
        report=report,
    )
    return tuning, report


@dataclass(frozen=True, slots=True)
class Confidence:
    """The confidence that came nearer to the truth, and what it was found by."""

    weights: dict[str, float] = field(default_factory=dict)  # none where the shipped one stays
    bias: float = 0.0
    log_loss: dict[str, float] = field(default_factory=dict)  # "shipped" and "fitted", on questions not fitted on
    thresholds: dict[str, float] = field(default_factory=dict)
    risk_curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether the fitted one takes the place of the shipped one."""
        return bool(self.weights)

    def report(self) -> dict[str, Any]:
        return {
            "confidence_kept": self.kept,
            "log_loss": self.log_loss,
            "thresholds": self.thresholds,
            "risk_curve": self.risk_curve,
        }


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question and its first hits."""

    group: str  # what is asked for: questions for one thing are fitted on together or not at all
    hits: list[Features]
    answers: list[bool]  # which of them answer it
    answerable: bool

    @property
    def found(self) -> bool:
        return bool(self.answers) and self.answers[0]


class Bench:
    """One store's questions with the untuned retriever they are put to."""

    def __init__(self, problem: Problem, embedder: Embedder, cache: VectorCache, progress: Progress | None) -> None:
        self.problem, self.embedder, self.cache = problem, embedder, cache
        self.shipped = load_calibration()
        index = build_index(problem.passages, embedder, cache, progress)
        self.plain = HybridRetriever(index, embedder, self.shipped, problem.terms)
        self.keys = {passage.id: twin_key(passage) for passage in problem.passages}
        self.restated = restated(problem.passages)
        self.questions = list({question.text: question for question in problem.questions}.values())
        texts = [question.text for question in self.questions]
        vectors = cache.embed(embedder, texts, as_query=True, progress=progress)
        self.vectors = dict(zip(texts, vectors, strict=True))
        self._read: tuple[str, Sequence[ReadQuestion]] = ("", ())

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
            problem_text = (
                f"{len(answerable)} questions with an answer, at least {N_LEAST} are needed; add what visitors asked,"
                " in dialogues/ or with --questions or --conversations"
            )
            raise BadStore([Fault("questions", None, None, problem_text)])
        return answerable, aside, rest

    def keys_of(self, question: Question) -> set[str]:
        """Return the twin keys of what answers `question` and is in the knowledge."""
        return {self.keys[one] for one in question.relevant if one in self.keys}

    def right(self, question: Question) -> set[str]:
        """Return the twin keys of what may be found for `question`: its labels, and what says the same."""
        labelled = self.keys_of(question)
        return labelled.union(*(self.restated.get(key, ()) for key in labelled))

    def examples(self, questions: Sequence[Question]) -> list[Example]:
        """Return one example a question: of several passages that answer it the first in the store."""
        place = {key: n for n, key in enumerate(dict.fromkeys(self.keys.values()))}
        return [Example(question.text, min(self.keys_of(question), key=place.__getitem__)) for question in questions]

    def retriever(self, index: Index, learned: Learned | None, weight: float) -> HybridRetriever:
        return HybridRetriever(
            index, self.embedder, self.shipped, self.problem.terms, learned=learned, learned_weight=weight
        )

    def rank(
        self, retriever: HybridRetriever, text: str, lessons: NDArray[np.float32] | None = None
    ) -> list[tuple[Passage, Features]]:
        if retriever.reads and isinstance(self.embedder, Reads) and self._read[0] != text:
            # Once for all the weights that are tried: reading it takes as long as the rest of a search.
            self._read = text, self.embedder.read_queries([quietly(text)])[1]
        retriever.remember([text], self.vectors[text][None], self._read[1] if self._read[0] == text else ())
        return retriever.rank(text, now=self.problem.now, lessons=lessons)

    def outcomes(self, retriever: HybridRetriever, questions: Sequence[Question]) -> list[Outcome]:
        found: list[Outcome] = []
        for question in questions:
            wanted = self.right(question)
            ranked = self.rank(retriever, question.text)
            rank = next((n for n, (passage, _) in enumerate(ranked[:10], 1) if twin_key(passage) in wanted), None)
            found.append(Outcome(rank, True, 0.0, 0.0))
        return found

    def best_weight(self, learned: Learned, questions: Sequence[Question]) -> float:
        """Return the weight that finds most of `questions`, each scored by all others; of equals the least."""
        lessons = dict(zip(learned.examples, learned.held_out(), strict=True))
        sample = [pair for pair in zip(questions, self.examples(questions), strict=True) if pair[1] in lessons]
        random.Random(SEED).shuffle(sample)
        retrievers = {weight: self.retriever(self.plain.index, learned, weight) for weight in WEIGHTS}
        found = dict.fromkeys(WEIGHTS, 0)
        for question, example in sample[:N_WEIGHING]:
            wanted = self.right(question)
            for weight, retriever in retrievers.items():
                ranked = self.rank(retriever, question.text, lessons[example])
                found[weight] += bool(ranked) and twin_key(ranked[0][0]) in wanted
        return max(found, key=lambda weight: (found[weight], -weight))

    def confidence(
        self, questions: Sequence[Question], weight: float, learned: Learned | None, risk: float | None
    ) -> Confidence:
        """
        Return the better confidence for `questions` and those without an answer, and thresholds for `risk`.

        Where too few of those are known, passages are taken away and what they answer is asked.
        """
        asked = self._asked_live(questions, weight, learned)
        if sum(not one.answerable for one in asked) < N_UNANSWERED:
            asked += self._asked_poorer(questions, weight, learned)
        shipped = self.plain.calibration
        folds = [zlib.crc32(one.group.encode()) % HELD_OUT for one in asked]
        before = [_log_loss(shipped, one) for one in asked]
        after = [0.0] * len(asked)
        for fold in set(folds):
            fitted = _fit([one for one, its in zip(asked, folds, strict=True) if its != fold], shipped)
            for place, its in enumerate(folds):
                if its == fold:
                    after[place] = _log_loss(fitted, asked[place])
        kept = luck_of_mean([old - new for old, new in zip(before, after, strict=True)]) <= SURE
        better = _fit(asked, shipped) if kept else shipped
        outcomes = [Outcome(1 if one.found else None, one.answerable, _first(better, one.hits), 0.0) for one in asked]
        return Confidence(
            weights={name: round(value, 4) for name, value in better.weights.items()} if kept else {},
            bias=round(better.bias, 4) if kept else 0.0,
            log_loss={"shipped": round(fmean(before), 4), "fitted": round(fmean(after), 4)},
            thresholds={} if risk is None else _thresholds(outcomes, risk),
            risk_curve=risk_curve(outcomes, RISKS),
        )

    def _asked_live(self, questions: Sequence[Question], weight: float, learned: Learned | None) -> list[_Asked]:
        """Ask `questions`, each scored without itself, and those that nothing answers."""
        lessons = dict(zip(learned.examples, learned.held_out(), strict=True)) if learned else {}
        retriever = self.retriever(self.plain.index, learned, weight)
        asked: list[_Asked] = []
        for question, example in zip(questions, self.examples(questions), strict=True):
            if learned is None or example in lessons:
                ranked = self.rank(retriever, question.text, lessons.get(example))
                asked.append(_asked(example.key, ranked, self.right(question)))
        unanswered = [question.text for question in self.questions if not question.relevant]
        return asked + [_asked(text, self.rank(retriever, text), set()) for text in unanswered]

    def _asked_poorer(self, questions: Sequence[Question], weight: float, learned: Learned | None) -> list[_Asked]:
        """Ask those of `questions` that are for passages which are taken away, with all that says the same."""
        examples = self.examples(questions)
        keys = sorted({example.key for example in examples})
        gone = set(random.Random(SEED).sample(keys, int(LEFT_OUT * len(keys))))
        gone = gone.union(*(self.restated.get(key, ()) for key in gone))
        passages = [passage for passage in self.problem.passages if twin_key(passage) not in gone]
        index = build_index(passages, self.embedder, self.cache)
        kept = [example for example in examples if example.key not in gone]
        less = fit_learned(kept, index, self.embedder, self.cache) if learned else None
        poorer = self.retriever(index, less, weight)
        return [
            _asked(example.key, self.rank(poorer, question.text), self.right(question) - gone)
            for question, example in zip(questions, examples, strict=True)
            if example.key in gone
        ]


def _asked(group: str, ranked: Sequence[tuple[Passage, Features]], right: set[str]) -> _Asked:
    first = ranked[:N_FIRST]
    return _Asked(group, [features for _, features in first], [twin_key(one) in right for one, _ in first], bool(right))


def _fit(asked: Sequence[_Asked], shipped: Calibration) -> Calibration:
    """Return the confidence fitted on `asked`, `shipped` where they show nothing: all are for one passage, or exact."""
    known = Examples.of((one.hits, one.answers) for one in asked)
    return fit([known], shipped, PRIOR / len(asked)) if len(known.labels) else shipped


def _log_loss(calibration: Calibration, one: _Asked) -> float:
    """Return how far the confidence of the first hit is from whether it answers, in nats."""
    chance = _first(calibration, one.hits)
    return -math.log(max(chance if one.found else 1 - chance, LEAST_CHANCE))


def _first(fitted: Calibration, hits: Sequence[Features]) -> float:
    """Return the confidence of the first of `hits`, 0 where there is none."""
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


def luck_of_mean(gains: Sequence[float]) -> float:
    """Return the chance of so high a mean where nothing is gained, taken for normal: 1 where it is not above 0."""
    mean = fmean(gains) if gains else 0.0
    if mean <= 0:
        return 1.0
    error = pstdev(gains) / math.sqrt(len(gains))
    return 0.0 if error == 0 else 1 - NormalDist().cdf(mean / error)


def _short(found: dict[str, float | None]) -> dict[str, float | None]:
    return {name: found[name] for name in ("recall@1", "recall@3", "mrr@10")}
