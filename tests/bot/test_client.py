"""The asyncio client against the real server, and against servers that are gone, rude, or somebody else's."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve

from bot.client import ConnectionLost, RequestFailed, connect
from bot.errors import EngineBusy, EngineFailed
from bot.server import ServerLimits, listening_socket
from tests.fakes import ScriptedAnswerer
from tests.running import CuttingProxy, Wire, running_server, until


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


async def test_asking_returns_the_event_and_streaming_its_frames(database: Path) -> None:
    async with running_server(database) as server, connect(server.ws_url, locale="en") as client:
        assert client.welcome["greeting"] == "Hello"
        event = await client.ask("hi")
        assert (event["type"], event["role"], event["text"]) == ("event", "bot", "echo: hi")
        frames = [frame async for frame in client.stream("one two")]
        assert [f["type"] for f in frames if f["type"] != "status"] == [
            *["delta"] * sum(f["type"] == "delta" for f in frames),
            "event",
        ]
        assert [f["seq"] for f in client.events] == [1, 2, 3, 4]
    assert server.hub.n_live == 0


async def test_several_questions_at_once_all_get_the_reply_that_answers_them(database: Path) -> None:
    async with running_server(database) as server, connect(server.ws_url) as client:
        server.answerer.delay_s = 0.01
        events = await asyncio.gather(*(client.ask(f"q{n}", id=f"a{n}") for n in range(5)))
        for n, event in enumerate(events):
            assert f"q{n}" in event["text"].removeprefix("echo: ").splitlines()
            assert f"a{n}" in event.get("turns", [event["turn"]])
        assert len({e["seq"] for e in events}) < 5


async def test_a_refusal_is_raised_with_its_code(database: Path) -> None:
    async with running_server(database) as server, connect(server.ws_url) as client:
        with pytest.raises(RequestFailed) as failed:
            await client.ask("x" * 3000)
        assert (failed.value.code, failed.value.retryable) == ("too_long", False)
        assert "limit is 2000" in str(failed.value)
        server.answerer.errors = [EngineFailed("x")]
        with pytest.raises(RequestFailed) as failed:
            await client.ask("hi")
        assert (failed.value.code, failed.value.retryable) == ("engine_failed", True)
        assert (await client.ask("hi"))["text"] == "echo: hi"


async def test_retries_send_the_same_id_and_stop_at_their_number(database: Path) -> None:
    async with running_server(database) as server, connect(server.ws_url, n_retries=2) as client:
        server.answerer.errors = [EngineBusy(0.01), EngineBusy(0.01)]
        assert (await client.ask("hi", id="a1"))["text"] == "echo: hi"
        assert [e.text for e in await server.storage.events(str(client.conversation))] == ["hi", "echo: hi"]
        server.answerer.errors = [EngineBusy(0.01)] * 3
        with pytest.raises(RequestFailed):
            await client.ask("again")


async def test_leaving_a_stream_early_stops_the_reply(database: Path) -> None:
    async with running_server(database, ScriptedAnswerer(delay_s=0.01)) as server, connect(server.ws_url) as client:
        async with aclosing(client.stream(" ".join(map(str, range(500))))) as frames:
            async for frame in frames:
                if frame["type"] == "delta":
                    break
        await until(lambda: server.answerer.n_open == 0)
        await until(lambda: len(client.events) == 2)
        assert client.events[1]["finish"] == "abort"


async def test_a_lost_connection_is_resumed_and_the_reply_arrives(database: Path) -> None:
    async with running_server(database, ScriptedAnswerer(delay_s=0.01)) as server, CuttingProxy(server.port) as proxy:
        async with connect(f"ws://127.0.0.1:{proxy.port}/ws") as client:
            frames = []
            async for frame in client.stream(" ".join(map(str, range(40)))):
                frames.append(frame)
                if frame["type"] == "delta" and frame["index"] == 2:
                    proxy.cut_all()
            assert client.n_connections == 2
            types = [f["type"] for f in frames]
            assert "partial" in types
            resumed = frames[types.index("partial") :]
            text = "".join(f["text"] for f in resumed if f["type"] in ("partial", "delta"))
            assert text == frames[-1]["text"]
            assert [f["seq"] for f in client.events] == [1, 2]
        assert len(server.answerer.asked) == 1


@pytest.mark.parametrize("n_retries", [0, 1])
async def test_a_failure_that_was_lost_with_the_connection_is_told_on_return(database: Path, n_retries: int) -> None:
    """A `failed` frame is not stored: the server says it again to who comes back."""
    async with (
        running_server(database) as server,
        CuttingProxy(server.port) as proxy,
        connect(f"ws://127.0.0.1:{proxy.port}/ws", n_retries=n_retries) as client,
        Wire(server.ws_url) as other_tab,
    ):
        await other_tab.hello(conversation=client.conversation, token=client.token)  # keeps the failure in memory
        server.answerer.gate.clear()
        server.answerer.errors = [(1, EngineFailed("x"))]
        question = asyncio.create_task(client.ask("one two"))
        await until(lambda: server.answerer.n_open == 1)
        proxy.cut_all()
        server.answerer.gate.set()
        await other_tab.hear("failed")
        if n_retries:
            assert (await question)["text"] == "echo: one two"
        else:
            with pytest.raises(RequestFailed, match="engine_failed"):
                await question


async def test_another_client_goes_on_where_the_first_ended(database: Path) -> None:
    async with running_server(database) as server:
        async with connect(server.ws_url) as first:
            await first.ask("hi")
        async with connect(server.ws_url, conversation=first.conversation, token=first.token, after=1) as second:
            assert (await second.ask("and?"))["seq"] == 4
            assert [f["seq"] for f in second.events] == [2, 3, 4]
        async with connect(server.ws_url, conversation=first.conversation, token=first.token) as third:
            assert third.seq == 4
        with pytest.raises(RequestFailed, match="unknown_conversation"):
            async with connect(server.ws_url, conversation=first.conversation, token="guess"):
                pass


async def test_no_server_is_said_at_once() -> None:
    with listening_socket("127.0.0.1", 0) as bound:  # bound, but nobody listens
        port = bound.getsockname()[1]
        with pytest.raises(ConnectionLost, match="no connection to"):
            async with connect(f"ws://127.0.0.1:{port}/ws"):
                pass
    with pytest.raises(ConnectionLost):
        async with connect("not a url"):
            pass


async def test_a_server_that_stays_away_ends_the_question(database: Path) -> None:
    async with running_server(database) as server:
        server.answerer.gate.clear()
        proxy = CuttingProxy(server.port)
        await proxy.__aenter__()
        async with connect(f"ws://127.0.0.1:{proxy.port}/ws", give_up_s=0.2) as client:
            question = asyncio.create_task(client.ask("hi"))
            await until(lambda: server.answerer.n_open == 1)
            await proxy.__aexit__(None, None, None)
            with pytest.raises(ConnectionLost):
                await question
            with pytest.raises(ConnectionLost):
                await client.ask("again")
        server.answerer.gate.set()


async def test_a_server_that_is_not_ours_is_an_error_not_a_hang() -> None:
    async def chatter(socket: ServerConnection) -> None:
        await socket.send("hello, I am something else")
        await socket.wait_closed()

    async with serve(chatter, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionLost):
            async with connect(f"ws://127.0.0.1:{port}/"):
                pass


async def test_a_slow_hello_times_out(database: Path) -> None:
    async def silent(socket: ServerConnection) -> None:
        await socket.wait_closed()

    async with serve(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionLost):
            async with connect(f"ws://127.0.0.1:{port}/", open_timeout_s=0.1):
                pass


async def test_too_many_connections_is_raised(database: Path) -> None:
    limits = ServerLimits(sockets_per_address=1, limit_loopback=True)
    async with running_server(database, limits=limits) as server, connect(server.ws_url):
        with pytest.raises((RequestFailed, ConnectionLost), match=r"rate_limited|too many connections"):
            async with connect(server.ws_url):
                pass
