"""
Write the prompts the server would send to its engine for the demo store's questions, one list of messages a line.

    .venv/bin/python bench/prompts.py --out bench/results/prompts.jsonl

The questions are those of examples/cases.jsonl that expect an answer, spread over both languages; the passages are
what the retriever finds for them. Input of bench/engines.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bot.answer import Answerer  # noqa: E402
from bot.demo import demo_store  # noqa: E402
from bot.evaluate import load_cases  # noqa: E402
from bot.language import reply_language  # noqa: E402
from bot.prompt import render_prompt  # noqa: E402
from bot.settings import default_cache_dir, load_store_profile  # noqa: E402
from retrieval.bilingual import default_embedder  # noqa: E402
from retrieval.retriever import LiveRetriever  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=24)
    arguments = parser.parse_args()
    store = demo_store(ROOT / "var" / "demo")
    retriever = LiveRetriever(store, default_embedder(), default_cache_dir() / "index")
    answerer = Answerer(retriever=retriever, engine=None, profile=load_store_profile(store))
    now = datetime.now(UTC)
    cases = [c for c in load_cases(ROOT / "examples" / "cases.jsonl") if c.expect == "answer" and len(c.turns) == 1]
    step = max(1, len(cases) // arguments.n)
    arguments.out.parent.mkdir(exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        for case in cases[::step][: arguments.n]:
            language = reply_language(case.turns[0])
            passages = [h.passage for h in retriever.search(case.turns[0], 4, now=now, lang=language)]
            prompt = render_prompt(answerer.prompt_store(now), (), case.turns[0], passages, language)
            file.write(json.dumps([asdict(m) for m in prompt], ensure_ascii=False) + "\n")
    answerer.close()
    retriever.close()


if __name__ == "__main__":
    main()
