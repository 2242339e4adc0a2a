"""
Thirty times `kill -9`, and graceful restarts, while visitors talk.

What was acknowledged is there once, at its place, and answered once; visitors see it all once and in order.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bot.client import Client, connect
from bot.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
N_KILLS = 30
N_RESTARTS = 3


class Witness:
    """Writes down what the server acknowledged: (conversation, id) -> seq."""

    def __init__(self) -> None:
        self.acknowledged: dict[tuple[str, str], int] = {}
        self.asked: list[tuple[str, str]] = []

    def watch(self, client: Client) -> None:
        take = client._take

        def note(frame: dict[str, Any]) -> None:
            if frame["type"] == "ack":
                assert client.conversation is not None
                key = (client.conversation, frame["id"])
                assert self.acknowledged.setdefault(key, frame["seq"]) == frame["seq"], "acknowledged at two places"
            take(frame)

        client._take = note  # type: ignore[method-assign]

    def check(self, database: Path) -> None:
        """Assert, on the file a dead server left, that every acknowledged message is at its place."""
        acknowledged = dict(self.acknowledged)
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            rows = connection.execute("SELECT conversation_id, seq, data FROM events WHERE kind = 'message'").fetchall()
        stored = {(c, seq): json.loads(data) for c, seq, data in rows}
        for (conversation, id_), seq in acknowledged.items():
            message = stored.get((conversation, seq))
            assert message is not None, f"{id_} was acknowledged and is lost"
            assert (message["role"], message["turn"]) == ("visitor", id_)


@pytest.mark.timeout(150)
async def test_thirty_kills_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    n_recovered = await talk_through(tmp_path / "log.db", signal.SIGKILL, n_times=N_KILLS, n_visitors=8)
    assert n_recovered > N_KILLS  # most kills met replies under way


@pytest.mark.timeout(60)
async def test_twenty_visitors_talk_through_restarts_without_a_gap(tmp_path: Path) -> None:
    await talk_through(tmp_path / "log.db", signal.SIGTERM, n_times=N_RESTARTS, n_visitors=20)


async def talk_through(database: Path, signal_: signal.Signals, *, n_times: int, n_visitors: int) -> int:
    """End the server `n_times` while visitors talk, check all there is to check, return how many replies it cut."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.reborn", str(database)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    port = int(await asyncio.wait_for(process.stdout.readline(), 30))

    async def birth() -> int:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"go\n")
        return int(await asyncio.wait_for(process.stdout.readline(), 30))

    witness, over, rng = Witness(), asyncio.Event(), random.Random(30)

    async def visit(n: int) -> list[dict[str, Any]]:
        async with connect(f"ws://127.0.0.1:{port}/ws", open_timeout_s=30.0) as client:
            witness.watch(client)
            assert client.conversation is not None
            turn = 0
            while not over.is_set():
                turn += 1
                id_ = f"v{n}-{turn}"
                witness.asked.append((client.conversation, id_))
                reply = await client.ask(f"question {turn} of visitor {n}, in some words", id=id_)
                assert reply["text"] == f"echo: question {turn} of visitor {n}, in some words"
            return client.events

    async def until_acknowledged(n: int) -> None:
        async with asyncio.timeout(30):
            while len(witness.acknowledged) < n:
                await asyncio.sleep(0.01)
                for each in visitors:
                    if each.done():
                        each.result()

    pid = await birth()
    visitors = [asyncio.create_task(visit(n)) for n in range(n_visitors)]
    try:
        await until_acknowledged(n_visitors)
        for _ in range(n_times):
            await asyncio.sleep(rng.uniform(0.05, 0.25))
            before = len(witness.acknowledged)
            os.kill(pid, signal_)
            await wait_for_end(pid)
            witness.check(database)
            pid = await birth()
            await until_acknowledged(before + n_visitors // 2)  # it lives, and they go on
        over.set()
        seen = await asyncio.wait_for(asyncio.gather(*visitors), 60)
    finally:
        for each in visitors:
            each.cancel()
        await asyncio.gather(*visitors, return_exceptions=True)
        os.kill(pid, signal.SIGTERM)
        process.stdin.close()
        await process.wait()

    await wait_for_end(pid)
    witness.check(database)
    storage = Storage(database)
    await storage.open()
    try:
        n_recovered = 0
        for events in seen:
            (conversation,) = {c for c, id_ in witness.asked if events and id_ == events[0]["turn"]}
            stored = await storage.events(conversation)
            assert [e.seq for e in stored] == list(range(1, len(stored) + 1))
            assert [f["seq"] for f in events] == [e.seq for e in stored]  # the client saw each once, in order
            asked = Counter(id_ for c, id_ in witness.asked if c == conversation)
            assert Counter(e.data["turn"] for e in stored if e.role == "visitor") == asked
            assert Counter(e.data["turn"] for e in stored if e.role == "bot") == asked
            n_recovered += sum(e.data.get("recovered", False) for e in stored)
    finally:
        await storage.close()
    # An acknowledgement that was cut off may be followed by the reply itself after the resume.
    assert witness.acknowledged.keys() <= set(witness.asked)
    assert len(witness.acknowledged) > n_times * n_visitors // 2
    return n_recovered


async def wait_for_end(pid: int) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.02)
