"""
The whole bot on the demo store, through its socket: right answers, and how long they take.

    .venv/bin/python bench/chat.py

Starts `serve.py` with the default engine, as `make serve` does, and again with the direct path off (every answer is
generated from four passages, the recipe tutorials give), and once without a model. Asks the 120 cases of
examples/cases.jsonl; then times direct answers (the FAQs' own wordings) and generated ones (the cases' questions,
direct path off) with one visitor and with eight. Prints the figures and writes bench/results/chat.json.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bot.bench import bench  # noqa: E402
from bot.evaluate import evaluate, load_cases  # noqa: E402

CASES = ROOT / "examples" / "cases.jsonl"


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, float]]:
    """Run serve.py with `arguments`; yield its socket's URL once ready, and the seconds that took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as data, Path(data, "log").open("wb") as log:
        began = time.monotonic()
        command = [sys.executable, "serve.py", "--port", str(port), "--data", data, *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                        break
                except OSError:
                    if process.poll() is not None or time.monotonic() - began > 900:
                        raise RuntimeError(Path(data, "log").read_text(errors="replace")[-3000:]) from None
                    time.sleep(0.2)
            yield f"ws://127.0.0.1:{port}/ws", time.monotonic() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def faq_wordings(n: int) -> list[str]:
    """Return `n` wordings of FAQs, both languages alike, the same every time."""
    with (ROOT / "examples" / "demo" / "faqs.csv").open(encoding="utf-8", newline="") as file:
        words = [w for row in csv.DictReader(file) for w in row["questions"].split("|") if len(w) > 5]
    return random.Random(7).sample(words, n)


def brief(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k != "failures"}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", default="default,none,model-alone", help="comma-separated")
    parser.add_argument("--generated", type=int, default=24, help="questions of the timing of generated answers")
    arguments = parser.parse_args()
    cases = load_cases(CASES)
    out: dict[str, Any] = {}
    arms = arguments.arms.split(",")

    def show(name: str, value: dict[str, Any]) -> None:
        out[name] = value
        print(name, json.dumps(value, ensure_ascii=False), flush=True)

    if "none" in arms:
        with server("--engine", "none") as (url, ready_s):
            result = await evaluate(url, cases)
            show("none", {"ready_s": round(ready_s, 1), **brief(result)})
            show("direct answers, 1 visitor", await bench(url, faq_wordings(100), 1))
            show("direct answers, 8 visitors", await bench(url, faq_wordings(100), 8))
    if "default" in arms:
        with server() as (url, ready_s):
            result = await evaluate(url, cases)
            show("default", {"ready_s": round(ready_s, 1), **brief(result), "failures": result["failures"]})
            show("default: direct answers, 1 visitor", await bench(url, faq_wordings(60), 1))
    if "model-alone" in arms:
        with server("--direct", "off") as (url, _):
            questions = [c.turns[0] for c in cases if c.expect == "answer"][:: max(1, 100 // arguments.generated)]
            show("generated answers, 1 visitor", await bench(url, questions, 1))
            show("generated answers, 8 visitors", await bench(url, questions, 8))
            show("model alone", brief(await evaluate(url, cases, concurrency=8)))
    target = ROOT / "bench" / "results" / "chat.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
