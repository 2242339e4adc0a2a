"""
Follow-ups: how often what answers a message that goes on from the one before it is found first.

    .venv/bin/python bench/followups.py [--stores books,wine] [--json]

Asked are the dialogues in examples/training/*/followups.jsonl (two or three messages, the last one cannot be understood
alone), by default of the five stores on which neither encoders nor reranker were trained. Beside them pairs of
questions drawn from those stores, the second a new subject: what understands follow-ups must not pull those back. Three
ways to search, in one run over one index: the last message alone; the message before and it in one string, as one does
without a model that rewrites; and the server's (`bot.answer.search_in_context`). The chance that a message goes on was
fitted on all of these dialogues; figures with one store left out in turn are in docs/experiments.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bot.answer import search_in_context  # noqa: E402
from bot.followup import Query, complete  # noqa: E402
from bot.messages import Turn  # noqa: E402
from retrieval.bilingual import default_embedder  # noqa: E402
from retrieval.calibrate import KEPT_OUT, STORES, training_store  # noqa: E402
from retrieval.embedder import VectorCache  # noqa: E402
from retrieval.hybrid import HybridRetriever  # noqa: E402
from retrieval.index import build_index  # noqa: E402
from retrieval.passages import Hit, Passage  # noqa: E402

N_RANDOM = 30  # a store and language
NOW = datetime(2026, 11, 22, tzinfo=UTC)


@dataclass(frozen=True)
class Dialogue:
    """Messages of a visitor, the passages that answered all but the last, and those that answer the last."""

    lang: str
    kind: str
    turns: tuple[str, ...]
    answered: tuple[str, ...]
    relevant: frozenset[str]


def dialogues(store: str) -> list[Dialogue]:
    """Return the store's follow-ups, and as many changes of subject as `N_RANDOM` says, drawn from its questions."""
    found = []
    for line in (STORES / store / "followups.jsonl").read_text("utf-8").splitlines():
        raw = json.loads(line)
        found.append(_dialogue(raw["lang"], raw["kind"], raw["turns"], raw["answered"], raw["relevant"]))
    asked = [json.loads(line) for line in (STORES / store / "questions.jsonl").read_text("utf-8").splitlines()]
    chance = random.Random(store)
    for lang in ("zh", "en"):
        own = [q for q in asked if q["lang"] == lang and len(q["relevant"]) == 1]
        for _ in range(N_RANDOM):
            first, second = chance.sample(own, 2)
            if first["relevant"] != second["relevant"]:
                texts = [first["text"], second["text"]]
                found.append(_dialogue(lang, "change", texts, first["relevant"], second["relevant"]))
    return found


def _dialogue(lang: str, kind: str, turns: list[str], answered: list[str], relevant: list[str]) -> Dialogue:
    ids = [[f"{pair}-{lang}" for pair in pairs] for pairs in (answered, relevant)]
    return Dialogue(lang, kind, tuple(turns), tuple(ids[0]), frozenset(ids[1]))


def searches(passages: dict[str, Passage], retriever: HybridRetriever) -> dict[str, Callable[[Dialogue], list[Hit]]]:
    """Return the ways to search by name."""

    def alone(dialogue: Dialogue) -> list[Hit]:
        return retriever.search(dialogue.turns[-1], 1, now=NOW, lang=dialogue.lang)

    def joined(dialogue: Dialogue) -> list[Hit]:
        return retriever.search(" ".join(dialogue.turns[-2:]), 1, now=NOW, lang=dialogue.lang)

    def served(dialogue: Dialogue) -> list[Hit]:
        turns = [
            Turn(question, passages[answer].text, (answer,))
            for question, answer in zip(dialogue.turns, dialogue.answered, strict=False)
        ]
        gist = partial(retriever.gist, now=NOW)
        query: Query = complete(gist(dialogue.turns[-1]) or dialogue.turns[-1], turns, gist=gist)
        query = replace(query, topic=passages[dialogue.answered[-1]].title)
        return search_in_context(retriever, query, 4, now=NOW, lang=dialogue.lang)

    return {"alone": alone, "joined": joined, "served": served}


def measure(stores: list[str]) -> dict[str, Any]:
    """Return for each way the share of last messages answered by the first hit, by kind."""
    embedder = default_embedder(2)
    right: dict[str, dict[str, list[bool]]] = {}
    with tempfile.TemporaryDirectory() as work:
        cache = VectorCache(Path(work) / "vectors.sqlite")
        for store in stores:
            problem = training_store(STORES / store)
            retriever = HybridRetriever(build_index(problem.passages, embedder, cache), embedder)
            passages = {passage.id: passage for passage in problem.passages}
            for name, search in searches(passages, retriever).items():
                for dialogue in dialogues(store):
                    hits = search(dialogue)
                    ok = bool(hits) and hits[0].passage.id in dialogue.relevant
                    kinds = [dialogue.kind] if dialogue.kind in ("change", "new") else [dialogue.kind, "follow-ups"]
                    for kind in kinds:
                        right.setdefault(name, {}).setdefault(kind, []).append(ok)
        cache.close()
    return {
        name: {kind: {"n": len(each), "first": round(sum(each) / len(each), 3)} for kind, each in by_kind.items()}
        for name, by_kind in right.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--stores", default=",".join(KEPT_OUT), help="folders of examples/training, by commas; all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    every = sorted(path.parent.name for path in STORES.glob("*/followups.jsonl"))
    found = measure(every if options.stores == "all" else options.stores.split(","))
    if options.json:
        print(json.dumps(found))
        return
    kinds = ["follow-ups", "other", "detail", "case", "new", "change"]
    print("first hit right".ljust(18) + "".join(f"{kind:>12}" for kind in kinds))
    for name, by_kind in found.items():
        print(name.ljust(18) + "".join(f"{by_kind[kind]['first']:12.3f}" for kind in kinds))
    print("n".ljust(18) + "".join(f"{found['served'][kind]['n']:12}" for kind in kinds))
    ratio = found["served"]["follow-ups"]["first"] / found["joined"]["follow-ups"]["first"]
    print(f"follow-ups: {ratio:.2f} times as many as joined")


if __name__ == "__main__":
    main()
