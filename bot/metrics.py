"""
What /metrics says, in Prometheus' text format. The only file that knows prometheus_client.

Counts what it is told (`Recorder`), and asks hub, engine and index for their figures when it is scraped. Has a
registry of its own, so that two servers in one process (tests) do not meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from bot.messages import Reply

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From an approved answer out of memory (milliseconds) to a generated one on a laptop's CPU.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LONG_S = (5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0, 14400.0)  # people's times


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._connections = Gauge("zhanggui_connections", "Open WebSockets", registry=self.registry)
        self._connections_total = Counter("zhanggui_connections_opened", "WebSockets opened", registry=self.registry)
        self._asks = Counter("zhanggui_asks", "Questions stored (duplicates are not counted)", registry=self.registry)
        self._replies = Counter(
            "zhanggui_replies", "Replies stored", ["outcome", "language", "finish"], registry=self.registry
        )
        self._reply_failures = Counter(
            "zhanggui_reply_failures", "Replies that failed, by code", ["code"], registry=self.registry
        )
        self._failed_frames = Counter(
            "zhanggui_failed_frames", "Frames of visitors that were refused, by code", ["code"], registry=self.registry
        )
        self._reply_s = Histogram(
            "zhanggui_reply_seconds",
            "From taking up a question to its stored reply",
            ["outcome"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._ttft_s = Histogram(
            "zhanggui_reply_first_text_seconds",
            "From taking up a question to the first text of its reply",
            ["outcome"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )

        self._handoffs = Counter("zhanggui_handoffs", "Humans asked for, by reason", ["reason"], registry=self.registry)
        self._accept_lost = Counter(
            "zhanggui_accept_conflicts", "Accepts that another agent was faster with", registry=self.registry
        )
        self._wait_s = Histogram(
            "zhanggui_handoff_wait_seconds", "From asking for a human to one", buckets=LONG_S, registry=self.registry
        )
        self._handling_s = Histogram(
            "zhanggui_handling_seconds", "From an agent's accept to the end", buckets=LONG_S, registry=self.registry
        )

    def watch(self, prefix: str, figures: Callable[[], Mapping[str, float]]) -> None:
        """Report `figures()` as gauges named `zhanggui_<prefix>_<name>` on every scrape."""
        self.registry.register(_Figures(prefix, figures))

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    # Recorder

    def asked(self) -> None:
        self._asks.inc()

    def replied(self, reply: Reply, ttft_s: float | None, total_s: float) -> None:
        self._replies.labels(reply.outcome, reply.language, reply.finish).inc()
        self._reply_s.labels(reply.outcome).observe(total_s)
        if ttft_s is not None:
            self._ttft_s.labels(reply.outcome).observe(ttft_s)

    def reply_failed(self, code: str) -> None:
        self._reply_failures.labels(code).inc()

    # Agents

    def handed_over(self, reason: str) -> None:
        self._handoffs.labels(reason).inc()

    def accepted(self, wait_s: float) -> None:
        self._wait_s.observe(wait_s)

    def accept_lost(self) -> None:
        self._accept_lost.inc()

    def handled(self, handling_s: float) -> None:
        self._handling_s.observe(handling_s)

    # Connections

    def connection_opened(self) -> None:
        self._connections.inc()
        self._connections_total.inc()

    def connection_closed(self) -> None:
        self._connections.dec()

    def frame_failed(self, code: str) -> None:
        self._failed_frames.labels(code).inc()


class _Figures(Collector):
    """Somebody else's figures, read when scraped."""

    def __init__(self, prefix: str, figures: Callable[[], Mapping[str, float]]) -> None:
        self._prefix = prefix
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return []  # else the registry would ask for the figures while the engine is still loading

    def collect(self) -> Iterable[Metric]:
        for name, value in self._figures().items():
            full = re.sub(r"[^a-zA-Z0-9_]", "_", f"zhanggui_{self._prefix}_{name}")
            yield GaugeMetricFamily(full, f"{self._prefix}: {name.replace('_', ' ')}", value=value)
