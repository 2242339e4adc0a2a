"""
`python -m bot bench`: a load run through the socket; field names as `vllm bench serve` prints them.

Every question is a conversation of its own, on a connection opened before its clock starts.
TTFT: ask sent -> first delta. TPOT: (last delta - first delta) / (generated tokens - 1), generated replies only.
E2EL: ask sent -> the message event. Tokens are the engine's own count (`usage` of the event); direct answers have none.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bot.client import connect
from bot.errors import BotError


@dataclass(frozen=True, slots=True)
class _Sample:
    ttft_ms: float
    e2el_ms: float
    tpot_ms: float | None
    n_tokens: int
    outcome: str


async def bench(
    url: str,
    questions: Sequence[str],
    concurrency: int,
    *,
    timeout_s: float = 300.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Ask all `questions`, `concurrency` at a time, and return the figures of the run."""
    places = asyncio.Semaphore(concurrency)
    samples: list[_Sample] = []
    failed = 0

    async def one(question: str) -> None:
        nonlocal failed
        async with places:
            try:
                async with asyncio.timeout(timeout_s), connect(url) as client:
                    samples.append(await _ask(client, question))
            except (BotError, OSError, TimeoutError):
                failed += 1
        progress(len(samples) + failed, len(questions))

    started = time.perf_counter()
    await asyncio.gather(*map(one, questions))
    duration = time.perf_counter() - started
    ttft, e2el = [s.ttft_ms for s in samples], [s.e2el_ms for s in samples]
    tpot = [s.tpot_ms for s in samples if s.tpot_ms is not None]
    return {
        "concurrency": concurrency,
        "completed": len(samples),
        "failed": failed,
        "duration": round(duration, 3),
        "total_output_tokens": sum(s.n_tokens for s in samples),
        "request_throughput": round(len(samples) / duration, 3),
        "output_throughput": round(sum(s.n_tokens for s in samples) / duration, 3),
        **_spread("ttft", ttft),
        **_spread("tpot", tpot),
        **_spread("e2el", e2el),
        "outcomes": {o: sum(s.outcome == o for s in samples) for o in sorted({s.outcome for s in samples})},
    }


async def _ask(client: Any, question: str) -> _Sample:
    started = time.perf_counter()
    first = last = 0.0
    event: dict[str, Any] = {}
    async for frame in client.stream(question):
        now = time.perf_counter()
        if frame["type"] == "delta":
            first, last = first or now, now
        elif frame["type"] == "event" and frame.get("role") == "bot":
            event, first = frame, first or now
    ended = time.perf_counter()
    n_tokens = int(event.get("usage", {}).get("output_tokens", 0))
    tpot = (last - first) * 1000 / (n_tokens - 1) if n_tokens > 1 and last > first else None
    return _Sample((first - started) * 1000, (ended - started) * 1000, tpot, n_tokens, event.get("outcome", ""))


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, median and 99th percentile in ms; None where nothing was measured."""
    if not values:
        return {f"mean_{name}_ms": None, f"median_{name}_ms": None, f"p99_{name}_ms": None}
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return {
        f"mean_{name}_ms": round(statistics.fmean(values), 2),
        f"median_{name}_ms": round(statistics.median(values), 2),
        f"p99_{name}_ms": round(p99, 2),
    }
