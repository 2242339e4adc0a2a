"""
Questions with talk around them: what is found of them, by the search as it is and by one that takes messages whole.

The stores are the five of examples/training that no encoder, reranker or gist was trained on; the talk is
`talk.jsonl`, beginnings and ends that were written without sight of what the gist (retrieval/gist.py) learned from.
Whole messages are what every other search is given: both arms are the same index, and the second one hears no gist.

    python bench/talk.py                   # two or three minutes on two cores; --step 1 asks every question
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from retrieval.bilingual import BilingualEmbedder  # noqa: E402
from retrieval.calibrate import KEPT_OUT, STORES, training_store  # noqa: E402
from retrieval.embedder import VectorCache  # noqa: E402
from retrieval.hybrid import HybridRetriever  # noqa: E402
from retrieval.index import build_index  # noqa: E402
from retrieval.words import detect_lang  # noqa: E402

NOW = datetime(2026, 11, 1, tzinfo=UTC)
QUOTED = 0.5  # confidence from which on the bot answers in the store's own words


class Deaf:
    """An embedder that takes every message whole."""

    def __init__(self, embedder: BilingualEmbedder) -> None:
        self._embedder = embedder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def gist(self, text: str, question: object) -> str:
        return text


def talked_around(questions: list[str]) -> list[str]:
    """Return `questions` with what somebody says before and after each."""
    rows = [json.loads(line) for line in (HERE / "talk.jsonl").read_text("utf-8").splitlines()]
    chance = random.Random(0)
    found = []
    for question in questions:
        around = chance.choice([row for row in rows if row["lang"] == detect_lang(question)])
        found.append(f"{around['pre']}{question}{around['post']}")
    return found


def measure(step: int) -> dict[str, dict[str, float]]:
    """Return for each arm the figures over all stores."""
    embedder = BilingualEmbedder(2)
    deaf: Any = Deaf(embedder)
    asked: dict[str, list[tuple[float, bool, bool, float]]] = {}
    for name in KEPT_OUT:
        problem = training_store(STORES / name)
        hearing = HybridRetriever(build_index(problem.passages, embedder, VectorCache(None)), embedder)
        whole = HybridRetriever(hearing.index, deaf)
        questions = problem.questions[::step]
        plain = [question.text for question in questions]
        talk = talked_around(plain)
        arms = {
            "the question alone": (hearing, plain),
            "with talk, ours": (hearing, talk),
            "with talk, whole": (whole, talk),
        }
        for arm, (retriever, texts) in arms.items():
            for question, text in zip(questions, texts, strict=True):
                began = time.perf_counter()
                hits = retriever.search(text, 1, now=NOW)
                took = time.perf_counter() - began
                right = bool(hits) and hits[0].passage.id in question.relevant
                confidence = hits[0].confidence if hits else 0.0
                asked.setdefault(arm, []).append((confidence, right, bool(question.relevant), took))
    return {arm: _figures(rows) for arm, rows in asked.items()}


def _figures(rows: list[tuple[float, bool, bool, float]]) -> dict[str, float]:
    yes = [row for row in rows if row[2]]
    no = [row for row in rows if not row[2]]
    above = [(a[0] > b[0]) + 0.5 * (a[0] == b[0]) for a in yes for b in no]
    return {
        "n": len(rows),
        "recall@1": round(statistics.mean(row[1] for row in yes), 4),
        "no_answer_auc": round(statistics.mean(above), 4),
        "quoted, right": sum(row[1] and row[0] >= QUOTED for row in yes),
        "quoted where nothing answers": sum(row[0] >= QUOTED for row in no),
        "ms_p50": round(1000 * statistics.median(row[3] for row in rows), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions with talk around them.")
    parser.add_argument("--step", type=int, default=3, help="ask every STEPth question (3)")
    found = measure(parser.parse_args().step)
    for arm, figures in found.items():
        print(f"{arm:20s}", ", ".join(f"{name} {value}" for name, value in figures.items()))
    ours, whole = found["with talk, ours"], found["with talk, whole"]
    print(f"right answers quoted, ours / whole: {ours['quoted, right'] / whole['quoted, right']:.2f}")


if __name__ == "__main__":
    main()
