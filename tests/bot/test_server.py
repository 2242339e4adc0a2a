"""Through the wire: a real uvicorn, real sockets, everything a visitor can send, and what is left behind (nothing)."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import socket
import sqlite3
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from bot.client import ConnectionLost, connect
from bot.engine import EngineState
from bot.errors import EngineFailed, MerchantError
from bot.server import IndexStatus, ServerLimits, create_app, listening_socket, origin_allowed, run
from tests.fakes import ScriptedAnswerer, ScriptedEngine
from tests.running import CuttingProxy, Running, Wire, parts_of, running_server, until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


async def get(server: Running, path: str, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.http_url, trust_env=False) as client:
        return await client.get(path, **options)


# The protocol


async def test_a_conversation_from_hello_to_close(database: Path) -> None:
    async with running_server(database) as server, Wire(server.ws_url) as tab:
        assert tab.socket.subprotocol == "zhanggui.v1"
        welcome = await tab.hello(locale="zh-CN")
        assert set(welcome) == {
            *("type", "conversation", "token", "seq", "state", "store", "greeting", "quick_replies", "limits")
        }
        assert welcome["store"] == {"name": "演示店", "languages": ["zh", "en"], "currency": "CNY"}
        assert (welcome["greeting"], welcome["quick_replies"], welcome["seq"]) == ("您好", ["什么时候发货？"], 0)

        reply = await tab.ask("a1", "有货吗 亲")
        assert [f["type"] for f in tab.heard] == [
            *("welcome", "ack", "event", "status", "status"),
            *["delta"] * len(tab.of("delta")),
            "event",
        ]
        assert tab.of("ack") == [{"type": "ack", "id": "a1", "seq": 1, "duplicate": False}]
        assert "".join(f["text"] for f in tab.of("delta")) == reply["text"] == "echo: 有货吗 亲"
        assert (reply["seq"], reply["outcome"], reply["finish"]) == (2, "generated", "stop")
        assert set(reply["citations"][0]) == {"id", "title", "source", "quote", "score"}
        assert set(reply["release"]) == {"model", "adapter", "prompt", "knowledge"}
        assert reply["at"].endswith("Z")

        await tab.say("rate", seq=2, value="up")
        assert (await tab.hear("event", kind="rating"))["seq"] == 3
        await tab.say("typing", on=True)
        await tab.say("handoff", reason="size")
        assert (await tab.hear("event", kind="state"))["state"] == "waiting"
        await tab.say("close", score=5)
        assert (await tab.hear("event", kind="state", state="closed"))["score"] == 5
        await tab.nothing_more()
    assert server.hub.n_live == server.hub.n_tasks == 0


async def test_a_client_that_asks_for_no_subprotocol_is_served(database: Path) -> None:
    async with running_server(database) as server, Wire(server.ws_url, subprotocol=None) as tab:
        assert tab.socket.subprotocol is None
        assert (await tab.hello(locale="en-GB"))["greeting"] == "Hello"


async def test_resuming_gives_what_was_missed_and_the_reply_under_way(database: Path) -> None:
    async with running_server(database) as server:
        async with Wire(server.ws_url) as first:
            welcome = await first.hello()
            await first.ask("a1", "one")
            server.answerer.delay_s = 0.01
            await first.say("ask", id="a2", text=" ".join(map(str, range(30))))
            await first.hear("delta", turn="a2")
        async with Wire(server.ws_url) as second:
            back = await second.hello(conversation=welcome["conversation"], token=welcome["token"], after=1)
            assert back["seq"] == 3
            final = await second.hear("event", role="bot", turn="a2")
            assert [f["seq"] for f in second.of("event")] == [2, 3, 4]
            (partial,) = second.of("partial")
            deltas = second.of("delta")
            assert partial["text"] + "".join(f["text"] for f in deltas) == final["text"]
            assert [f["index"] for f in deltas] == [partial["index"] + 1 + n for n in range(len(deltas))]
        async with Wire(server.ws_url) as third:  # without `after`: nothing again
            await third.hello(conversation=welcome["conversation"], token=welcome["token"])
            await third.nothing_more()
        async with Wire(server.ws_url) as fourth:
            await fourth.hello(conversation=welcome["conversation"], token=welcome["token"], after=0)
            assert [(await fourth.hear())["seq"] for _ in range(4)] == [1, 2, 3, 4]


async def test_five_sends_of_one_id_over_two_sockets_are_one_question(database: Path) -> None:
    async with running_server(database) as server, Wire(server.ws_url) as one, Wire(server.ws_url) as two:
        welcome = await one.hello()
        await two.hello(conversation=welcome["conversation"], token=welcome["token"], after=0)
        await asyncio.gather(*(tab.say("ask", id="a1", text="hi") for tab in (one, two, one, two, one)))
        for tab, n_acks in ((one, 3), (two, 2)):
            await tab.hear("event", role="bot")
            while len(tab.of("ack")) < n_acks:
                await tab.hear("ack")
            await tab.nothing_more()
        acks = one.of("ack") + two.of("ack")
        assert sorted(f["duplicate"] for f in acks) == [False, True, True, True, True]
        assert {f["seq"] for f in acks} == {1}
        assert [f["seq"] for f in one.of("event")] == [f["seq"] for f in two.of("event")] == [1, 2]
        assert server.answerer.asked == ["hi"]
        await one.say("ask", id="a1", text="another text")
        failed = await one.hear("failed")
        assert (failed["code"], failed["id"], failed["retryable"]) == ("conflict", "a1", False)


async def test_stop_is_heard_while_a_reply_streams(database: Path) -> None:
    async with running_server(database, ScriptedAnswerer(delay_s=0.01)) as server, Wire(server.ws_url) as tab:
        await tab.hello()
        await tab.say("ask", id="a1", text=" ".join(map(str, range(500))))
        await tab.hear("delta")
        await tab.say("stop", turn="a1")
        event = await tab.hear("event", role="bot")
        assert event["finish"] == "abort"
        assert event["text"] == "".join(f["text"] for f in tab.of("delta"))
        await tab.say("regenerate", turn="a1")
        await tab.hear("delta", turn="a1", index=0)
        await tab.say("stop", turn="a1")
        await tab.hear("event", role="bot")
        await tab.say("regenerate", turn="a9")
        assert (await tab.hear("failed", turn="a9"))["code"] == "bad_frame"


async def test_deltas_are_coalesced(database: Path) -> None:
    limits = ServerLimits(coalesce_s=0.05)
    answerer = ScriptedAnswerer(delay_s=0.002)
    async with running_server(database, answerer, limits=limits) as server, Wire(server.ws_url) as tab:
        await tab.hello()
        reply = await tab.ask("a1", " ".join(map(str, range(60))))
        assert len(tab.of("delta")) < 30
        assert "".join(f["text"] for f in tab.of("delta")) == reply["text"]


# Bad input


BAD_TEXTS = {
    "not JSON": ("{", "bad_frame"),
    "empty": ("", "bad_frame"),
    "a list": ("[]", "bad_frame"),
    "no type": ("{}", "bad_frame"),
    "an unknown type": ('{"type":"fly"}', "bad_frame"),
    "a field missing": ('{"type":"ask","id":"a1"}', "bad_frame"),
    "a wrong kind": ('{"type":"ask","id":7,"text":"hi"}', "bad_frame"),
    "an empty question": ('{"type":"ask","id":"a1","text":"  "}', "bad_frame"),
    "NaN": ('{"type":"ping","x":NaN}', "bad_frame"),
    "a lone surrogate": ('{"type":"ask","id":"a1","text":"\\ud800"}', "bad_frame"),
    "deep nesting": ('{"type":"ping","x":' + "[" * 7000 + "]" * 7000 + "}", "bad_frame"),
    "a long question": (json.dumps({"type": "ask", "id": "a1", "text": "x" * 2001}), "too_long"),
    "a long id": (json.dumps({"type": "ask", "id": "a" * 65, "text": "hi"}), "too_long"),
    "a long frame": (json.dumps({"type": "ping", "x": "x" * 20_000}), "too_long"),
    "a second hello": ('{"type":"hello","protocol":1}', "bad_frame"),
    "an unknown seq": ('{"type":"rate","seq":999,"value":"up"}', "bad_frame"),
    "a huge number": ('{"type":"rate","seq":' + "9" * 5000 + ',"value":"up"}', "bad_frame"),
    "a seq beyond the database": ('{"type":"rate","seq":99999999999999999999,"value":"up"}', "bad_frame"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
async def test_a_bad_frame_is_refused_and_the_connection_stays(
    name: str, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    text, code = BAD_TEXTS[name]
    async with running_server(database) as server, Wire(server.ws_url) as tab:
        await tab.hello()
        await tab.socket.send(text)
        failed = await tab.hear("failed")
        assert (failed["code"], failed["retryable"]) == (code, False)
        assert failed["message"]
        assert (await tab.ask("ok", "still here?"))["text"] == "echo: still here?"
        await tab.socket.close()
        await server.idle()
        await closed_quietly(caplog)


async def closed_quietly(caplog: pytest.LogCaptureFixture) -> None:
    """One line at open, one at close, no traceback, nothing else."""
    await until(lambda: "connection closed" in caplog.text)
    lines = [r for r in caplog.records if r.name.startswith(("bot", "uvicorn", "asyncio"))]
    assert [r.getMessage().split(":")[0] for r in lines if r.levelno >= logging.INFO and r.name == "bot.server"] == [
        "connection open",
        "connection closed",
    ]
    assert [r.getMessage() for r in lines if r.levelno >= logging.WARNING or r.exc_info] == []


async def test_a_binary_frame_is_refused_and_the_connection_stays(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running_server(database) as server, Wire(server.ws_url) as tab:
        await tab.socket.send(b"\x00\xff")
        assert "binary" in (await tab.hear("failed"))["message"]
        await tab.hello()
        await tab.ask("a1", "hi")
        await tab.socket.close()
        await server.idle()
        await closed_quietly(caplog)


async def test_a_megabyte_closes_cleanly_and_harms_nobody(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_server(database) as server:
        async with Wire(server.ws_url) as tab:
            await tab.hello()
            with suppress(ConnectionClosed):
                await tab.socket.send("x" * 1_000_000)
            with pytest.raises(ConnectionClosed) as closed:
                await tab.hear()
            code = closed.value.rcvd.code if closed.value.rcvd else 1006
            assert code in (1009, 1006)  # 1006: the close frame was lost behind what we still sent
        await server.idle()
        await closed_quietly(caplog)
        async with Wire(server.ws_url) as tab:
            await tab.hello()
            await tab.ask("a1", "hi")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x81\x82\x00\x00\x00\x00\xff\xfe",  # text that is not UTF-8
        b"\x83\x80\x00\x00\x00\x00",  # an opcode that does not exist
        b"\xc1\x80\x00\x00\x00\x00",  # a reserved bit
        b"\x81\x02hi",  # not masked
        b"\x89\xff\x00\x00\x00\x00\x00\x00\x00\x00",  # a ping that is too long
    ],
)
async def test_bad_bytes_close_the_connection_without_a_traceback(
    raw: bytes, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running_server(database) as server:
        async with Wire(server.ws_url) as tab:
            tab.socket.transport.write(raw)
            with pytest.raises(ConnectionClosed) as closed:
                await tab.hear()
            # uvicorn with wsproto cuts some of these without a close frame, which RFC 6455 7.1.7 allows.
            assert closed.value.rcvd is None or closed.value.rcvd.code in (1002, 1007)
        await server.idle()
        await closed_quietly(caplog)


async def test_ten_bad_frames_are_enough(database: Path) -> None:
    async with running_server(database) as server, Wire(server.ws_url) as tab:
        for _ in range(10):
            await tab.socket.send("?")
            await tab.hear("failed")
        with pytest.raises(ConnectionClosed) as closed:
            await tab.hear()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


async def test_nothing_but_hello_opens_a_conversation(database: Path) -> None:
    async with running_server(database) as server, Wire(server.ws_url) as tab:
        await tab.say("ask", id="a1", text="hi")
        failed = await tab.hear("failed")
        assert (failed["code"], failed["id"], failed["message"]) == ("bad_frame", "a1", "say hello first")
        await tab.say("ping")
        assert (await tab.hear())["type"] == "pong"
        await tab.say("hello", protocol=2)
        assert "this server speaks 1" in (await tab.hear("failed"))["message"]
        for wrong in ({"token": "x"}, {}, {"token": ""}):
            await tab.say("hello", protocol=1, conversation="c_nobody", **wrong)
            assert (await tab.hear("failed"))["code"] == "unknown_conversation"
        async with Wire(server.ws_url) as other:
            theirs = await other.hello()
        await tab.say("hello", protocol=1, conversation=theirs["conversation"], token="guess")
        assert (await tab.hear("failed"))["code"] == "unknown_conversation"
        await tab.hello()  # the connection is as good as new
        await tab.ask("a1", "hi")


async def test_who_never_says_hello_is_closed(database: Path) -> None:
    limits = ServerLimits(hello_timeout_s=0.05)
    async with running_server(database, limits=limits) as server, Wire(server.ws_url) as tab:
        with pytest.raises(ConnectionClosed) as closed:
            await tab.hear()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


async def test_a_bug_of_ours_is_a_code_for_the_visitor_and_a_traceback_in_the_log(
    database: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(database) as server, Wire(server.ws_url) as tab:
        await tab.hello()

        async def broken(*args: object, **kwargs: object) -> None:
            raise ZeroDivisionError("/secret/path")

        monkeypatch.setattr(server.hub, "handoff", broken)
        await tab.say("handoff")
        failed = await tab.hear("failed")
        assert failed["code"] == "internal"
        assert "/secret" not in json.dumps(failed)
        await tab.ask("a1", "hi")
    assert any(r.exc_info for r in caplog.records)


async def test_a_storage_that_is_gone_acknowledges_nothing_and_comes_back(database: Path) -> None:
    async with running_server(database) as server, Wire(server.ws_url) as tab:
        await tab.hello()
        holder = sqlite3.connect(database)
        holder.execute("ALTER TABLE events RENAME TO gone")
        holder.commit()
        await tab.say("ask", id="a1", text="hi")
        failed = await tab.hear("failed")
        assert (failed["code"], failed["id"], failed["retryable"]) == ("storage_unavailable", "a1", True)
        assert tab.of("ack") == []
        holder.execute("ALTER TABLE gone RENAME TO events")
        holder.commit()
        holder.close()
        assert (await tab.ask("a1", "hi"))["seq"] == 2


# Limits and origins


async def test_questions_are_limited_by_the_minute(database: Path) -> None:
    limits = ServerLimits(asks_per_minute=3, limit_loopback=True)
    async with running_server(database, limits=limits) as server, Wire(server.ws_url) as tab:
        await tab.hello()
        for n in range(3):
            await tab.ask(f"a{n}", "hi")
        await tab.say("ask", id="a3", text="hi")
        failed = await tab.hear("failed")
        assert (failed["code"], failed["id"], failed["retryable"]) == ("rate_limited", "a3", True)
        assert 0 < failed["retry_after_s"] <= 60
        await tab.nothing_more()


async def test_sockets_are_limited_by_address_and_places_come_back(database: Path) -> None:
    limits = ServerLimits(sockets_per_address=2, limit_loopback=True)
    async with running_server(database, limits=limits) as server:
        async with Wire(server.ws_url), Wire(server.ws_url), Wire(server.ws_url) as third:
            assert (await third.hear("failed"))["code"] == "rate_limited"
            with pytest.raises(ConnectionClosed):
                await third.hear()
        async with Wire(server.ws_url) as again:
            await again.hello()


async def test_a_page_of_another_site_is_refused_before_the_handshake(database: Path) -> None:
    async with running_server(database) as server:
        with pytest.raises(InvalidStatus) as refused:
            async with Wire(server.ws_url, origin="https://evil.example"):
                pass
        assert refused.value.response.status_code == 403
        async with Wire(server.ws_url, origin=server.http_url) as tab:
            await tab.hello()


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "expected"),
    [
        (None, "shop.example", (), True),
        ("https://shop.example", "shop.example", (), True),
        ("https://shop.example", "shop.example:443", (), True),
        ("http://shop.example:8000", "shop.example:8000", (), True),
        ("https://SHOP.example", "shop.EXAMPLE", (), True),
        ("https://shop.example:8000", "shop.example", (), False),
        ("https://shop.example.evil.example", "shop.example", (), False),
        ("https://evilshop.example", "shop.example", (), False),
        ("null", "shop.example", (), False),
        ("", "shop.example", (), False),
        ("https://", "", (), False),
        ("file://shop.example", "shop.example", (), False),
        ("https://www.shop.example", "chat.example", ("https://www.shop.example/",), True),
        ("https://www.shop.example.evil", "chat.example", ("https://www.shop.example",), False),
        ("https://anyone.example", "chat.example", ("*",), True),
    ],
)
def test_origins_are_compared_whole(origin: str | None, host: str, allowed: tuple[str, ...], expected: bool) -> None:
    assert origin_allowed(origin, host, allowed) is expected


async def test_other_socket_paths_are_refused_quietly(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running_server(database) as server:
        for path in ("/", "/nothing", "/store/images/x.svg"):
            with pytest.raises(InvalidStatus):
                async with Wire(f"ws://127.0.0.1:{server.port}{path}"):
                    pass
    assert not any(r.exc_info for r in caplog.records)


# Losing connections


@pytest.mark.timeout(180)
async def test_resuming_works_from_every_cut(database: Path) -> None:
    """
    The connection is cut after n bytes from the server, for n over the whole exchange; each conversation must end
    with the same events as one that was never cut.
    """
    questions = ["first question", "second 你好"]

    async def converse(url: str) -> list[tuple[Any, ...]]:
        async with connect(url, give_up_s=30) as client:
            for question in questions:
                assert (await client.ask(question))["text"] == f"echo: {question}"
            assert [f["seq"] for f in client.events] == [1, 2, 3, 4]
            return [(f["role"], f["text"]) for f in client.events]

    async with running_server(database) as server, CuttingProxy(server.port) as proxy:
        url = f"ws://127.0.0.1:{proxy.port}/ws"
        expected = await converse(url)
        n_bytes = proxy.n_bytes
        n_cuts, step = 0, n_bytes // 40
        for n in range(140, n_bytes, step):  # the first 140 bytes are the handshake: nothing to resume yet
            # Only the first connection is cut: else a small n never gets through.
            proxy.cut_after_bytes, before = n, proxy.n_cut
            task = asyncio.create_task(converse(url))
            await until(lambda before=before, task=task: proxy.n_cut > before or task.done())  # type: ignore[misc]
            proxy.cut_after_bytes = None
            try:
                assert await task == expected, f"cut after {n} bytes"
                n_cuts += 1
            except ConnectionLost:
                assert n < 700, f"cut after {n} bytes"  # before the welcome: the client has no conversation yet
        assert n_cuts >= 25
        await server.idle()


@pytest.mark.timeout(180)
async def test_under_random_cuts_no_reply_is_lost_doubled_or_out_of_order(database: Path) -> None:
    """200 questions, 8 conversations at a time, sockets cut at random all the while."""
    rng = random.Random(8)
    n_conversations, n_questions = 8, 25
    answerer = ScriptedAnswerer(delay_s=0.0005)

    async def converse(name: int, url: str) -> None:
        async with connect(url, give_up_s=30) as client:
            for n in range(n_questions):
                question = f"question {n} of {name} " + "x " * rng.randrange(8)
                event = await client.ask(question)
                assert event["text"] == f"echo: {question}"
            assert [f["seq"] for f in client.events] == list(range(1, 2 * n_questions + 1))
            turns = [f["turn"] for f in client.events]
            assert turns[::2] == turns[1::2]  # every question is followed by its own reply
            assert [f["role"] for f in client.events] == ["visitor", "bot"] * n_questions

    async with running_server(database, answerer) as server, CuttingProxy(server.port) as proxy:
        url = f"ws://127.0.0.1:{proxy.port}/ws"

        async def cut_at_random() -> None:
            while True:
                await asyncio.sleep(rng.uniform(0.01, 0.15))
                proxy.cut_one(rng)

        clients = [asyncio.create_task(converse(n, url)) for n in range(n_conversations)]
        await until(lambda: server.hub.n_live == n_conversations)
        cutter = asyncio.create_task(cut_at_random())
        try:
            await asyncio.gather(*clients)
        finally:
            cutter.cancel()
            await asyncio.gather(cutter, return_exceptions=True)
        assert proxy.n_cut >= 5
        assert len(answerer.asked) == n_conversations * n_questions  # none was made twice
        await server.idle()
        assert answerer.n_aborted == 0


async def test_a_slow_reader_is_dropped_and_the_reply_is_made_all_the_same(database: Path) -> None:
    limits = ServerLimits(coalesce_s=0.0, send_timeout_s=0.3, max_frames=64)
    answerer = ScriptedAnswerer(reply=lambda q: "x" * 100_000 + " ")
    async with running_server(database, answerer, limits=limits, user_timeout_ms=500) as server:
        async with Wire(server.ws_url) as honest:
            welcome = await honest.hello()
            deaf = _DeafClient(server.port)
            await deaf.connect(welcome["conversation"], welcome["token"])
            await until(lambda: server.hub.n_subscribers == 2)
            for n in range(20):
                await honest.ask(f"a{n}", "hi")
                if server.hub.n_subscribers == 1:
                    break
            await until(lambda: server.hub.n_subscribers == 1)  # dropped
            began = time.monotonic()
            await honest.ask("last", "hi")
            assert time.monotonic() - began < 5
            await deaf.is_cut_off()
        await server.idle()


class _DeafClient:
    """Says hello over a tiny receive buffer, and never reads."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        self.port = port

    async def connect(self, conversation: str, token: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", self.port))
        hello = json.dumps({"type": "hello", "protocol": 1, "conversation": conversation, "token": token}).encode()
        assert len(hello) > 125
        await loop.sock_sendall(
            self.socket,
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        await loop.sock_recv(self.socket, 1024)
        await loop.sock_sendall(
            self.socket, b"\x81" + bytes([0x80 | 126]) + len(hello).to_bytes(2, "big") + b"\x00" * 4 + hello
        )

    async def is_cut_off(self) -> None:
        """Return once the kernel says that the server has given this connection up."""
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # reset, broken pipe, timed out: whichever comes
            for _ in range(200):
                await loop.sock_sendall(self.socket, b"\x8a\x80\x00\x00\x00\x00")
                await asyncio.sleep(0.05)
            pytest.fail("still connected")
        self.socket.close()


# Killing the server


@pytest.mark.timeout(120)
async def test_after_kill_9_everything_acknowledged_is_there_and_answered(tmp_path: Path) -> None:
    """The server is killed while a reply streams and another question waits; a second one takes up the same file."""
    database = tmp_path / "log.db"
    process, port = await start_process(database, delay_s=0.05)
    url = f"ws://127.0.0.1:{port}/ws"
    long = " ".join(map(str, range(200)))
    async with Wire(url) as tab:
        welcome = await tab.hello()
        await tab.ask("a1", "one")
        await tab.say("ask", id="a2", text=long)
        await tab.hear("delta", turn="a2")
        await tab.say("ask", id="a3", text="three")
        await tab.hear("ack", id="a3")
        process.send_signal(signal.SIGKILL)
        await process.wait()
    connection = sqlite3.connect(database)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()

    process, port = await start_process(database, delay_s=0.0)
    try:
        async with Wire(f"ws://127.0.0.1:{port}/ws") as tab:
            await tab.hello(conversation=welcome["conversation"], token=welcome["token"], after=0)
            await tab.hear("event", role="bot", turn="a3")
            events = tab.of("event")
            assert [f["seq"] for f in events] == list(range(1, 7))
            assert Counter((f["role"], f["turn"]) for f in events) == Counter(
                (role, turn) for role in ("visitor", "bot") for turn in ("a1", "a2", "a3")
            )
            assert {f["turn"] for f in events if f.get("recovered")} == {"a2", "a3"}
            texts = {f["turn"]: f["text"] for f in events if f["role"] == "bot"}
            assert texts == {"a1": "echo: one", "a2": f"echo: {long}", "a3": "echo: three"}  # none half said
            await tab.say("ask", id="a2", text=long)  # the client, not knowing, sends it again
            assert (await tab.hear("ack"))["duplicate"]
            await tab.nothing_more()
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 0


async def start_process(database: Path, *, delay_s: float) -> tuple[asyncio.subprocess.Process, int]:
    """Start a server around a ScriptedAnswerer in a process of its own; return it and its port."""
    code = (
        "import sys, pathlib\n"
        "from bot.server import Server, create_app, listening_socket, uvicorn_config\n"
        "from tests.fakes import ScriptedAnswerer\n"
        "from tests.running import parts_of\n"
        "listening = listening_socket('127.0.0.1', 0)\n"
        "print(listening.getsockname()[1], flush=True)\n"
        "app = create_app(parts_of(pathlib.Path(sys.argv[1]), ScriptedAnswerer(delay_s=float(sys.argv[2]))))\n"
        "Server(uvicorn_config(app, '127.0.0.1', 0)).run(sockets=[listening])\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(database), str(delay_s)), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    port = int(await asyncio.wait_for(process.stdout.readline(), 30))

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    deadline = time.monotonic() + 30
    while not await asyncio.to_thread(answers):
        assert process.returncode is None
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    return process, port


async def test_stopping_the_server_tells_the_tabs_to_come_back(database: Path) -> None:
    async with running_server(database) as server:
        tab = await Wire(server.ws_url).__aenter__()
        await tab.hello()
    notice = await tab.hear()
    assert (notice["type"], notice["reason"]) == ("reconnect", "restart")
    assert 50 <= notice["after_ms"] <= 151
    with pytest.raises(ConnectionClosed) as closed:
        await tab.hear()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012


async def test_the_server_starts_and_closes_its_engine(database: Path) -> None:
    engine = ScriptedEngine(ready=False)
    async with running_server(database, engine=engine):
        await until(lambda: engine.n_started == 1)
    assert engine.n_closed == 1


# Pages, health, figures


async def test_readiness_says_what_is_missing(database: Path) -> None:
    class Loading(ScriptedEngine):
        async def start(self) -> None:
            await asyncio.Event().wait()

        def state(self) -> EngineState:
            return EngineState(False, "starting", "loading weights")

    index = IndexStatus(False, detail="embedding 3 of 9")
    async with running_server(database, engine=Loading(), index=lambda: index) as server:
        response = await get(server, "/readyz")
        body = response.json()
        assert (response.status_code, body["ready"], body["missing"]) == (503, False, ["index", "engine"])
        assert body["engine"] == {"ready": False, "name": "scripted", "phase": "starting", "detail": "loading weights"}
        assert body["index"]["detail"] == "embedding 3 of 9"
        assert (await get(server, "/readyz?soft=1")).status_code == 200
        assert (await get(server, "/healthz")).json() == {"ok": True}
    async with running_server(database.with_name("other.db")) as server:
        response = await get(server, "/readyz")
        assert (response.status_code, response.json()["engine"]["phase"]) == (200, "none")


async def test_an_engine_that_does_not_start_leaves_a_server_that_says_so(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ScriptedEngine):
        async def start(self) -> None:
            raise EngineFailed("no such weights")

    async with running_server(database, engine=Broken(ready=False)) as server:
        assert (await get(server, "/healthz")).status_code == 200
        assert (await get(server, "/readyz")).status_code == 503
    assert "the engine did not start: no such weights" in caplog.text


async def test_metrics_count_what_happened(database: Path) -> None:
    async with running_server(database, engine=ScriptedEngine()) as server:
        async with Wire(server.ws_url) as tab:
            await tab.hello()
            await tab.ask("a1", "hi")
            await tab.socket.send("?")
            await tab.hear("failed")
            server.answerer.errors = [EngineFailed("x")]
            await tab.say("ask", id="a2", text="hi")
            await tab.hear("failed")
            text = (await get(server, "/metrics")).text
        for line in (
            "zhanggui_connections 1.0",
            "zhanggui_asks_total 2.0",
            'zhanggui_replies_total{finish="stop",language="en",outcome="generated"} 1.0',
            'zhanggui_reply_failures_total{code="engine_failed"} 1.0',
            'zhanggui_failed_frames_total{code="bad_frame"} 1.0',
            'zhanggui_reply_first_text_seconds_count{outcome="generated"} 1.0',
            "zhanggui_hub_live_conversations 1.0",
            "zhanggui_index_passages 3.0",
            "zhanggui_engine_running 0.0",
        ):
            assert line in text.splitlines()


async def test_pages_are_served_with_a_strict_policy_and_revalidated(database: Path, tmp_path: Path) -> None:
    web = tmp_path / "web"
    web.mkdir()
    (web / "index.html").write_text("<p>shop</p>")
    (web / "inbox.html").write_text("<p>inbox</p>")
    (web / "widget.js").write_text("export {}")
    (web / ".env").write_text("secret")
    (web / "notes.md").write_text("secret")
    (tmp_path / "secret.html").write_text("secret")
    (web / "link.html").symlink_to(tmp_path / "secret.html")
    async with running_server(database, web_dir=web) as server:
        page = await get(server, "/")
        assert (page.status_code, page.text) == (200, "<p>shop</p>")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert (await get(server, "/inbox")).text == "<p>inbox</p>"
        script = await get(server, "/widget.js")
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        assert script.headers["access-control-allow-origin"] == "*"
        assert script.headers["x-content-type-options"] == "nosniff"
        again = await get(server, "/widget.js", headers={"If-None-Match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for path in ("/.env", "/notes.md", "/link.html", "/../secret.html", "/%2e%2e/secret.html", "/console", "/%00"):
            response = await get(server, path)
            assert response.status_code == 404, path
            assert "secret" not in response.text


async def test_the_real_pages_are_all_there(database: Path) -> None:
    async with running_server(database) as server:
        for file in sorted((ROOT / "bot" / "web").iterdir()):
            if file.suffix in (".html", ".js", ".css", ".svg"):
                assert (await get(server, f"/{file.name}")).status_code == 200, file.name


async def test_store_pictures_are_served_without_any_power(database: Path, tmp_path: Path) -> None:
    images = tmp_path / "store" / "images"
    images.mkdir(parents=True)
    (images / "lamp.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (images / "page.html").write_text("<script>alert(1)</script>")
    (tmp_path / "store" / "orders.csv").write_text("secret")
    async with running_server(database, store_dir=tmp_path / "store") as server:
        picture = await get(server, "/store/images/lamp.svg")
        assert picture.headers["content-type"] == "image/svg+xml"
        assert picture.headers["content-security-policy"] == "default-src 'none'; sandbox"
        for path in ("page.html", "../orders.csv", "%2e%2e/orders.csv", "none.svg", ".svg", ""):
            assert (await get(server, f"/store/images/{path}")).status_code == 404, path


async def test_the_shop_page_gets_its_store(database: Path) -> None:
    async with running_server(database) as server:
        body = (await get(server, "/store.json")).json()
        assert body["names"] == {"zh": "演示店", "en": "Demo"}
        assert body["promotions"] == [{"id": "p1", "title": "Double Eleven"}]
        assert body["products"][0]["id"] == "sku-1"
        assert "/v1/chat/completions" in (await get(server, "/openapi.json")).json()["paths"]


def test_a_port_that_is_taken_is_said_in_one_sentence() -> None:
    with listening_socket("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(MerchantError, match="choose another --host or --port"):
            listening_socket("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize("damage", ["a newer schema", "no database"])
def test_a_database_that_cannot_be_used_is_said_in_one_sentence(damage: str, database: Path) -> None:
    app = create_app(parts_of(database, ScriptedAnswerer()))
    asyncio.run(app.state.check_storage())
    if damage == "no database":
        database.write_text("something else, " * 100)
    else:
        connection = sqlite3.connect(database)
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
        connection.close()
    with pytest.raises(MerchantError, match=r"newer version|cannot be opened"):
        run(app, "127.0.0.1", 0)
