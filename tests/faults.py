"""
A network that fails on purpose: a TCP proxy that cuts, delays or duplicates a connection at one chosen byte.

`Fault` says what happens where; every connection after the first goes through untouched, so that a client which comes
back can finish. Used by tests/test_faults.py (a part of the offsets) and bench/faults.py (all of them).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from bot.client import ConnectionLost, connect
from bot.storage import Storage

DELAY_S = 0.03


@dataclass(frozen=True, slots=True)
class Fault:
    """
    What befalls the first connection, once `offset` bytes went in `direction` ("up": to the server).

    cut: both sides are reset, and bytes beyond the offset never arrive. delay: the direction stands still for a while.
    duplicate: a second connection to the server repeats every byte the client sends, from the first one on (only "up").
    """

    kind: Literal["cut", "delay", "duplicate", "none"]
    direction: Literal["up", "down"]
    offset: int


@dataclass(slots=True)
class FaultyProxy:
    """The proxy of one run."""

    target_port: int
    fault: Fault
    port: int = 0
    n_up: int = 0  # bytes of the first connection
    n_down: int = 0
    n_connections: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.n_connections += 1
        first = self.n_connections == 1
        writers, copies = [writer], list[asyncio.StreamWriter]()
        pumps: list[asyncio.Task[None]] = []
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target_port)
            writers.append(upstream)
            pumps = [
                asyncio.create_task(self._pump("up", reader, upstream, first, copies)),
                asyncio.create_task(self._pump("down", upstream_reader, writer, first, copies)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for each in (*writers, *copies):
                each.transport.abort()  # as a lost network does: no close frame, no FIN
            for each in (*writers, *copies):
                with suppress(OSError):
                    await each.wait_closed()
            self._tasks.discard(task)

    async def _pump(
        self,
        direction: Literal["up", "down"],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: bool,
        copies: list[asyncio.StreamWriter],
    ) -> None:
        fault = self.fault if first and self.fault.direction == direction else Fault("none", direction, -1)
        sent = b""
        while data := await reader.read(4096):
            before = len(sent)
            if fault.kind == "cut" and before + len(data) >= fault.offset:
                data = data[: fault.offset - before]
            if fault.kind == "delay" and before <= fault.offset < before + len(data):
                writer.write(data[: fault.offset - before])
                await asyncio.sleep(DELAY_S)
                writer.write(data[fault.offset - before :])
            else:
                writer.write(data)
            sent += data if direction == "up" or len(sent) < 100_000 else b""
            if first and direction == "up":
                self.n_up += len(data)
            elif first:
                self.n_down += len(data)
            if fault.kind == "duplicate":
                if not copies and len(sent) >= fault.offset:
                    _, copy = await asyncio.open_connection("127.0.0.1", self.target_port)
                    copy.write(sent)
                    copies.append(copy)
                elif copies:
                    copies[0].write(data)
            await writer.drain()
            if fault.kind == "cut" and len(sent) >= fault.offset:
                return


QUESTIONS = ("how much is shipping?", "还有货吗？")


@dataclass(slots=True)
class Outcome:
    """What one run left behind."""

    seen: list[dict[str, Any]]  # the client's events
    stored: Sequence[tuple[int, str, str | None, str]]
    texts: list[str]  # of the replies, as their frames made them up
    proxy: FaultyProxy


async def converse(storage: Storage, port: int, fault: Fault) -> Outcome:
    """Have the scripted conversation through a proxy with `fault`, until every question has its reply."""
    conversation, token = await storage.create_conversation("en")
    texts: list[str] = []
    async with FaultyProxy(port, fault) as proxy:
        url = f"ws://127.0.0.1:{proxy.port}/ws"
        while True:
            try:
                # The first connection is tried once by the client, so that a wrong address is said at once.
                client = await connect(url, conversation=conversation, token=token, after=0).__aenter__()
                break
            except ConnectionLost:
                assert proxy.n_connections < 5, "the server cannot be reached at all"
        try:
            for n, question in enumerate(QUESTIONS):
                text = ""
                async for frame in client.stream(question, id=f"q{n}"):
                    if frame["type"] == "partial":
                        text = frame["text"]
                    elif frame["type"] == "delta":
                        text += frame["text"]
                texts.append(text)
            seen = list(client.events)
        finally:
            await client.close()
    stored = [(e.seq, e.kind, e.role, e.text) for e in await storage.events(conversation)]
    return Outcome(seen, stored, texts, proxy)


def check(outcome: Outcome) -> None:
    """Assert that nothing was lost, doubled or out of order, on disk and at the client."""
    expected = []
    for n, question in enumerate(QUESTIONS):
        expected += [(2 * n + 1, "message", "visitor", question), (2 * n + 2, "message", "bot", f"echo: {question}")]
    assert outcome.stored == expected
    assert [(f["seq"], f["kind"], f["role"], f["text"]) for f in outcome.seen] == expected
    # What was shown while it was written is never wrong; it may be short where the event came first after a resume.
    for text, question in zip(outcome.texts, QUESTIONS, strict=True):
        assert f"echo: {question}".startswith(text)
        assert outcome.proxy.n_connections > 1 or f"echo: {question}" == text
