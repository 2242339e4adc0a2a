"""
How good a search is: recall, MRR, coverage at a risk. Pure numbers; the CLI brings the files.

Knows what was asked, what is relevant and what came back; knows not how it was found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval.embedder import Embedder, Progress, VectorCache
from retrieval.errors import BadStore, Fault
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from retrieval.load import json_lines
from retrieval.passages import Passage
from retrieval.terms import Terms
from retrieval.tuning import Tuning, tuned_retriever

DEPTH = 10


@dataclass(frozen=True, slots=True)
class Question:
    """A question of an evaluation set; nothing relevant means nothing in the knowledge answers it."""

    text: str
    relevant: frozenset[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search made of one question."""

    rank: int | None  # of the first relevant hit, from 1; None beyond DEPTH, or where nothing is relevant
    answerable: bool
    confidence: float  # of the first hit; 0 where nothing was found
    ms: float


def load_questions(path: Path) -> list[Question]:
    """
    Return the questions of a Q.jsonl.

    Raises:
        BadStore: with every fault of the file.
    """
    faults: list[Fault] = []
    found: list[Question] = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise BadStore([Fault(path.name, None, None, f"cannot be read ({exc}); give a UTF-8 file")]) from exc
    for number, entry in json_lines(lines, path.name, faults):
        text = entry.get("text") if isinstance(entry, dict) else None
        relevant = entry.get("relevant") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            faults.append(Fault(path.name, number, "text", "is missing or empty; give the question"))
        elif not isinstance(relevant, list) or not all(isinstance(one, str | int) for one in relevant):
            faults.append(Fault(path.name, number, "relevant", "is no list of ids; [] where nothing answers it"))
        else:
            found.append(Question(text, frozenset(str(one) for one in relevant)))
    if not found and not faults:
        faults.append(Fault(path.name, None, None, "no questions: the file has no entries"))
    if faults:
        raise BadStore(faults)
    return found


def evaluate(
    passages: Sequence[Passage],
    questions: Sequence[Question],
    embedder: Embedder,
    cache: VectorCache,
    *,
    now: datetime | None = None,
    terms: Terms | None = None,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """
    Build an index in memory, ask every question, return the numbers of `python -m retrieval eval`. Blocks.

    Times are of this machine, one question at a time; null where the questions allow no number.

    Raises:
        RetrievalError: the embedder failed.
    """
    began = time.perf_counter()
    index = build_index(passages, embedder, cache, progress)
    retriever = tuned_retriever(index, embedder, cache, terms or Terms(), tuning)
    build_s = time.perf_counter() - began
    outcomes = ask_all(retriever, questions, now=now or datetime.now(UTC))
    times = sorted(outcome.ms for outcome in outcomes)
    return {
        "n_passages": len(passages),
        "n_questions": len(questions),
        **measures(outcomes),
        "ms_per_query_p50": round(percentile(times, 0.5), 2),
        "ms_per_query_p99": round(percentile(times, 0.99), 2),
        "build_s": round(build_s, 2),
    }


def ask_all(retriever: HybridRetriever, questions: Sequence[Question], *, now: datetime) -> list[Outcome]:
    """Return what the retriever makes of each question, in order; repeated questions are not timed from the cache."""
    outcomes: list[Outcome] = []
    for question in questions:
        began = time.perf_counter()
        hits = retriever.search(question.text, DEPTH, now=now)
        ms = 1000 * (time.perf_counter() - began)
        rank = next((n for n, hit in enumerate(hits, start=1) if hit.passage.id in question.relevant), None)
        confidence = hits[0].confidence if hits else 0.0
        outcomes.append(Outcome(rank, bool(question.relevant), confidence, ms))
    return outcomes


def measures(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Return recall, MRR, AUC and coverage; the first two over answerable questions only."""
    ranks = [outcome.rank for outcome in outcomes if outcome.answerable]
    found = {f"recall@{k}": _share([rank is not None and rank <= k for rank in ranks]) for k in (1, 3, 10)}
    reciprocal = [1 / rank if rank is not None and rank <= DEPTH else 0.0 for rank in ranks]
    return {
        **found,
        "mrr@10": round(sum(reciprocal) / len(reciprocal), 4) if reciprocal else None,
        "no_answer_auc": _auc(
            [outcome.confidence for outcome in outcomes if outcome.answerable],
            [outcome.confidence for outcome in outcomes if not outcome.answerable],
        ),
        "coverage@1%risk": _coverage(outcomes, 0.01),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of ascending values, 0 where there are none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None


def _auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """Return the probability that a positive is above a negative, ties half; None where one side is empty."""
    if not positives or not negatives:
        return None
    ordered = sorted([(value, 1) for value in positives] + [(value, 0) for value in negatives])
    total, start = 0.0, 0
    while start < len(ordered):
        end = start
        while end < len(ordered) and ordered[end][0] == ordered[start][0]:
            end += 1
        mean_rank = (start + 1 + end) / 2
        total += mean_rank * sum(label for _, label in ordered[start:end])
        start = end
    n_positive = len(positives)
    return round((total - n_positive * (n_positive + 1) / 2) / (n_positive * len(negatives)), 4)


def risk_curve(outcomes: Sequence[Outcome], risks: Sequence[float]) -> list[dict[str, float]]:
    """
    Return for each risk the lowest confidence that keeps to it and the share of questions at or above it.

    Wrong, as in `_coverage`: the first hit is not relevant, or nothing is. A coverage of 0 comes with confidence 1.
    """
    ordered = sorted(outcomes, key=lambda outcome: -outcome.confidence)
    best = dict.fromkeys(risks, (1.0, 0))
    n_wrong = 0
    for n, outcome in enumerate(ordered, start=1):
        n_wrong += outcome.rank != 1
        if n < len(ordered) and ordered[n].confidence == outcome.confidence:
            continue
        best |= {risk: (outcome.confidence, n) for risk in risks if n_wrong <= risk * n}
    return [
        {"risk": risk, "confidence": math.floor(confidence * 1e4) / 1e4, "coverage": round(n / max(len(ordered), 1), 4)}
        for risk, (confidence, n) in best.items()
    ]


def _coverage(outcomes: Sequence[Outcome], risk: float) -> float | None:
    """
    Return the largest share of questions that can be answered, most confident first, with at most `risk` of them wrong.

    Wrong: the first hit is not relevant, or nothing is. Questions of equal confidence are answered together.
    """
    if not outcomes:
        return None
    ordered = sorted(outcomes, key=lambda outcome: -outcome.confidence)
    n_wrong, best = 0, 0
    for n, outcome in enumerate(ordered, start=1):
        n_wrong += outcome.rank != 1
        last_of_equals = n == len(ordered) or ordered[n].confidence != outcome.confidence
        if last_of_equals and n_wrong <= risk * n:
            best = n
    return round(best / len(ordered), 4)
