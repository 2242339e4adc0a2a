"""
Passages quoted to the questions of stores that nothing was trained on: with the model's second look, and without it.

The stores are the five of examples/training that neither search nor default release has seen; the turns are whole ones
(bot/answer.py) with the default engine, below the direct threshold nothing is generated. Both arms in one run, each
question once with either, in turns.

    python bench/second_look.py            # some four minutes on two cores; --step 1 asks every question
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bot.answer import DIRECT, Answerer, Rules  # noqa: E402
from bot.catalog import load_catalog  # noqa: E402
from bot.engines.vllm import VllmEngine  # noqa: E402
from bot.messages import Reply  # noqa: E402
from bot.releases import default_release, resolve_release  # noqa: E402
from bot.settings import default_cache_dir, load_store_profile  # noqa: E402
from retrieval.bilingual import BilingualEmbedder  # noqa: E402
from retrieval.calibrate import KEPT_OUT, STORES, training_store  # noqa: E402
from retrieval.embedder import VectorCache  # noqa: E402
from retrieval.evaluate import Question  # noqa: E402
from retrieval.hybrid import HybridRetriever  # noqa: E402
from retrieval.index import build_index  # noqa: E402

NOW = datetime(2026, 11, 1, tzinfo=UTC)
ARMS = {"without": 0.0, "with": Rules().sure_confidence}  # below which confidence the model is asked

Row = tuple[str, float]  # what came of a question, and the seconds it took


async def measure(step: int) -> dict[str, list[Row]]:
    """Return for each arm what came of every question."""
    engine = VllmEngine(resolve_release(default_release(), default_cache_dir(), None), load_catalog().default_name)
    await engine.start()
    profile = load_store_profile(HERE.parent / "examples" / "demo")
    embedder = BilingualEmbedder(2)
    found: dict[str, list[Row]] = {arm: [] for arm in ARMS}
    try:
        for name in KEPT_OUT:
            problem = training_store(STORES / name)
            index = build_index(problem.passages, embedder, VectorCache(None))
            # Each arm with a search of its own: a question's vectors are kept.
            bots = {
                arm: Answerer(
                    retriever=HybridRetriever(index, embedder),
                    engine=engine,
                    profile=profile,
                    rules=Rules(sure_confidence=sure, answer_confidence=DIRECT),
                    clock=lambda: NOW,
                )
                for arm, sure in ARMS.items()
            }
            for question in problem.questions[::step]:
                for arm, bot in bots.items():
                    found[arm].append(await ask(bot, question))
            for bot in bots.values():
                bot.close()
    finally:
        await engine.close()
    return found


async def ask(bot: Answerer, question: Question) -> Row:
    """Return what came of the question, and the seconds to the whole reply, of which nothing is generated."""
    began = time.perf_counter()
    replies = [step async for step in bot.answer((), question.text) if isinstance(step, Reply)]
    took = time.perf_counter() - began
    if replies[0].outcome != "direct" or not replies[0].citations:
        return "not quoted", took
    if not question.relevant:
        return "quoted where nothing answers", took
    right = replies[0].citations[0].id in question.relevant
    return "quoted, right" if right else "quoted, another passage", took


def main() -> None:
    parser = argparse.ArgumentParser(description="Quotations with the model's second look and without it.")
    parser.add_argument("--step", type=int, default=3, help="ask every STEPth question (3)")
    found = asyncio.run(measure(parser.parse_args().step))
    wrong: dict[str, int] = {}
    for arm, rows in found.items():
        outcomes = [outcome for outcome, _ in rows]
        counts = {name: outcomes.count(name) for name in sorted(set(outcomes))}
        quoted = [took for outcome, took in rows if outcome.startswith("quoted")]
        wrong[arm] = counts.get("quoted where nothing answers", 0)
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        tail = sorted(quoted)[int(0.95 * len(quoted))]
        times = f"a quotation takes {1000 * statistics.median(quoted):.0f} ms (median), {1000 * tail:.0f} (95 %)"
        print(f"{arm:8s} {len(rows)} questions: {shown}; {times}")
    print(f"quoted where nothing answers, with / without: {wrong['with'] / max(wrong['without'], 1):.2f}")


if __name__ == "__main__":
    main()
