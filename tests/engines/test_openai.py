"""`bot.engines.openai`: against a real `vllm serve`, and against servers that misbehave in many ways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from bot.engine import Chunk, Sampling
from bot.engines import openai as module
from bot.engines.openai import OpenAIEngine, Timeouts
from bot.errors import EngineBusy, EngineDead, EngineFailed, EngineNotReady, MerchantError
from bot.messages import Message
from tests.engines.tiny_model import ENDLESS, REPLY, needs_vllm, pieces_of

HELLO = [Message("system", "You help."), Message("user", "你好")]
ENDLESSLY = [Message("user", "endless")]
QUICK = Timeouts(connect_s=1.0, first_token_s=0.4, token_s=0.3, poll_s=0.1)


async def read(engine: OpenAIEngine, messages: list[Message] = HELLO, sampling: Sampling | None = None) -> list[Chunk]:
    async with aclosing(engine.stream(messages, sampling or Sampling())) as chunks:
        return [chunk async for chunk in chunks]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


# --- A server that does as it is told --------------------------------------------------------------------------------

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]
MODELS = {"object": "list", "data": [{"id": "m", "owned_by": "vllm", "max_model_len": 1000}]}


class Server:
    """Answers GET /v1/models by `models`, and each POST by the next of `answers` (the last one again and again)."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.models: tuple[int, Any] = (200, MODELS)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.n_open = 0

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.headers.append(head)
            if head.startswith("GET"):
                status, body = self.models
                await send(writer, status, json.dumps(body) if not isinstance(body, str) else body)
                return
            length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
            self.bodies.append(json.loads(await reader.readexactly(length)))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            await answer(reader, writer, self.bodies[-1])
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.n_open -= 1
            writer.close()


async def send(writer: asyncio.StreamWriter, status: int, body: str, *headers: str) -> None:
    lines = [f"HTTP/1.1 {status} X", "Connection: close", f"Content-Length: {len(body.encode())}", *headers]
    writer.write("\r\n".join([*lines, "", body]).encode())
    await writer.drain()


def event(text: str = "", finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]}) + "\n\n"


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}\n\n'
DONE = "data: [DONE]\n\n"
WHOLE = event("你") + event("好") + event("", "stop") + USAGE + DONE


def says(*parts: str | bytes | float) -> Answer:
    """Stream the parts: text as it is, numbers as pauses in seconds; then cut the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for part in parts:
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                writer.write(part.encode() if isinstance(part, str) else part)
                await writer.drain()

    return answer


def again(part: str, pause_s: float) -> list[str | float]:
    return [part, pause_s] * 1000


def refuses(status: int, *headers: str) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        await send(writer, status, '{"error": "no"}', *headers)

    return answer


@contextlib.asynccontextmanager
async def talking_to(*answers: Answer, **options: Any) -> AsyncIterator[tuple[Server, OpenAIEngine]]:
    async with Server(*answers) as server:
        engine = OpenAIEngine(server.url, "m", timeouts=QUICK, retry_wait_s=0.01, **options)
        await engine.start()
        try:
            yield server, engine
        finally:
            await engine.close()


class TestReplies:
    async def test_a_reply_is_streamed_and_counted(self) -> None:
        async with talking_to(says(WHOLE)) as (_, engine):
            chunks = await read(engine)
            assert text_of(chunks) == "你好"
            assert chunks[-1] == Chunk("", "stop", 5, 9, 0)
            assert {chunk.finish for chunk in chunks[:-1]} == {None}
            assert engine.figures() == {
                "running": 0, "requests": 1, "failures": 0, "retries": 0, "prompt_tokens": 9, "generated_tokens": 5
            }  # fmt: skip

    async def test_bytes_may_be_cut_anywhere(self) -> None:
        data = WHOLE.replace("\n", "\r\n").encode()
        async with talking_to(says(*[data[i : i + 3] for i in range(0, len(data), 3)])) as (_, engine):
            assert text_of(await read(engine)) == "你好"

    async def test_line_separators_within_a_text_are_text(self) -> None:
        raw = 'data: {"choices": [{"delta": {"content": "a\u2028b\u0085c"}, "finish_reason": "stop"}]}\n\n' + DONE
        async with talking_to(says(raw)) as (_, engine):
            assert text_of(await read(engine)) == "a\u2028b\u0085c"

    async def test_comments_and_other_fields_are_passed_over(self) -> None:
        async with talking_to(says(": ping\n\n", "event: x\nid: 1\n", WHOLE)) as (_, engine):
            assert text_of(await read(engine)) == "你好"

    async def test_tokens_are_estimated_where_the_server_counts_none(self) -> None:
        async with talking_to(says(event("a"), event("b"), event("", "length"), DONE)) as (_, engine):
            assert (await read(engine))[-1] == Chunk("", "length", 2)

    async def test_the_request_says_what_the_sampling_says_and_extensions_only_to_vllm(self) -> None:
        sampling = Sampling(max_tokens=7, temperature=0.5, top_k=9, stop=("x",), seed=1, priority=10)
        async with talking_to(says(WHOLE), api_key="secret") as (server, engine):
            await read(engine, HELLO, sampling)
            server.models = (200, {"data": [{"id": "m", "owned_by": "somebody"}]})
            await asyncio.sleep(0.3)
            await read(engine, HELLO, sampling)
            first, second = server.bodies
            assert first["messages"] == [
                {"role": "system", "content": "You help."}, {"role": "user", "content": "你好"}
            ]  # fmt: skip
            assert (first["max_tokens"], first["temperature"], first["top_k"], first["seed"]) == (7, 0.5, 9, 1)
            assert (first["stop"], first["stream"]) == (["x"], True)
            assert "priority" not in first
            assert "top_k" not in second
            assert all("authorization: bearer secret" in head.lower() for head in server.headers)

    async def test_the_likeliest_first_tokens_are_asked_for_and_told(self) -> None:
        top = [{"token": "Sorry", "logprob": -0.1, "bytes": None}, {"token": "B", "logprob": -2.5, "bytes": None}]
        choice = {"delta": {"content": "Sorry"}, "logprobs": {"content": [{"token": "Sorry", "top_logprobs": top}]}}
        told = f"data: {json.dumps({'choices': [choice | {'finish_reason': 'length'}]})}\n\n"
        async with talking_to(says(told, DONE), says(WHOLE)) as (server, engine):
            first, _ = await read(engine, HELLO, Sampling(max_tokens=1, n_likely=20))
            assert first.likely == (("Sorry", -0.1), ("B", -2.5))
            assert (server.bodies[0]["logprobs"], server.bodies[0]["top_logprobs"]) == (True, 20)
            assert not any(chunk.likely for chunk in await read(engine))  # a server that does not tell
            assert "logprobs" not in server.bodies[1]

    async def test_prompt_limits_come_from_the_server(self) -> None:
        async with talking_to(says(WHOLE)) as (_, engine):
            assert engine.max_prompt_tokens == 500
            assert engine.count_tokens([Message("user", "你好abc")]) == 2 + 1 + 8


class TestFailures:
    @pytest.mark.parametrize(
        ("answer", "what"),
        [
            (says(event("a")), "ended early"),
            (says(event("a"), "data: {not json\n\n"), "not JSON"),
            (says(event("a"), "data: 7\n\n"), "not an object"),
            (says(event("a"), 'data: {"choices": [{"delta": {"content": 7}}]}\n\n'), "not a chunk"),
            (says(event("a"), 'data: {"choices": 3}\n\n'), "not a chunk"),
            (says(event("a"), "<html>oops</html>\n"), "not an event"),
            (says(event("a"), b"\xff\xfe\n"), "not an event"),
            (says(event("a"), 'data: {"error": {"message": "out of memory"}}\n\n'), "out of memory"),
            (says(event("a"), 2.0), r"no text for 0\.3 s"),
            (says(event("a"), "data: " + "x" * (module.MAX_LINE_BYTES + 10)), "a line of more than"),
        ],
    )
    async def test_a_reply_that_breaks_off_fails_and_is_not_tried_again(self, answer: Answer, what: str) -> None:
        async with talking_to(answer) as (server, engine):
            async with aclosing(engine.stream(HELLO, Sampling())) as chunks:
                assert await anext(chunks) == Chunk("a")
                with pytest.raises(EngineFailed, match=what):
                    await anext(chunks)
            assert len(server.bodies) == 1
            assert engine.figures()["failures"] == 1

    @pytest.mark.parametrize("bad", [says(), says("garbage\n"), refuses(500), refuses(502), says(event(""))])
    async def test_what_fails_before_the_first_text_is_tried_again(self, bad: Answer) -> None:
        async with talking_to(bad, bad, says(WHOLE)) as (server, engine):
            assert text_of(await read(engine)) == "你好"
            assert len(server.bodies) == 3
            assert engine.figures()["retries"] == 2

    async def test_three_tries_are_enough(self) -> None:
        async with talking_to(refuses(500)) as (server, engine):
            with pytest.raises(EngineFailed, match="status 500"):
                await read(engine)
            assert len(server.bodies) == 3

    async def test_a_refused_request_is_not_tried_again(self) -> None:
        async with talking_to(refuses(400)) as (server, engine):
            with pytest.raises(EngineFailed, match="status 400"):
                await read(engine)
            assert len(server.bodies) == 1

    async def test_a_server_that_hangs_is_left_after_the_limit(self) -> None:
        async with talking_to(says(5.0)) as (server, engine):
            began = time.monotonic()
            with pytest.raises(EngineFailed, match=r"no text for 0\.4 s"):
                await read(engine)
            assert time.monotonic() - began < 2
            assert len(server.bodies) == 1

    async def test_a_server_that_sends_only_comments_hangs_too(self) -> None:
        async with talking_to(says(*again(": ping\n\n", 0.1))) as (_, engine):
            with pytest.raises(EngineFailed, match=r"no text for 0\.4 s"):
                await read(engine)

    @pytest.mark.parametrize(
        ("status", "header", "seconds"),
        [
            (429, "Retry-After: 7", 7.0),
            (503, "Retry-After: 0", 1.0),
            (503, "X-Nothing: 1", 5.0),
            (429, "Retry-After: soon", 5.0),
            (429, "Retry-After: 99999", 600.0),
            (429, "Retry-After: nan", 5.0),
        ],
    )
    async def test_a_busy_server_says_when_to_come_back(self, status: int, header: str, seconds: float) -> None:
        async with talking_to(refuses(status, header)) as (server, engine):
            with pytest.raises(EngineBusy) as busy:
                await read(engine)
            assert busy.value.retry_after_s == seconds
            assert len(server.bodies) == 1

    def test_a_date_to_come_back_at_is_understood(self) -> None:
        assert 25 < module._retry_after_s(formatdate(time.time() + 30, usegmt=True)) <= 30

    async def test_leaving_closes_the_connection(self) -> None:
        async with talking_to(says(*again(event("a"), 0.01))) as (server, engine):
            chunks = engine.stream(HELLO, Sampling())
            await anext(chunks)
            assert (server.n_open, engine.figures()["running"]) == (1, 1)
            await chunks.aclose()
            await gone(server)
            assert engine.figures()["running"] == 0

            task = asyncio.create_task(read(engine))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone(server)

    async def test_closing_the_engine_ends_what_is_under_way(self) -> None:
        async with talking_to(says(*again(event("a"), 0.05))) as (server, engine):
            task = asyncio.create_task(read(engine))
            await asyncio.sleep(0.1)
            await engine.close()
            with pytest.raises(EngineDead):
                await asyncio.wait_for(task, 2)
            with pytest.raises(EngineDead):
                await read(engine)
            await gone(server)


async def gone(server: Server) -> None:
    deadline = time.monotonic() + 2
    while server.n_open:
        assert time.monotonic() < deadline, "the connection is still open"
        await asyncio.sleep(0.01)


class TestState:
    async def test_start_waits_for_a_server_that_is_not_there_yet(self) -> None:
        async with Server(says(WHOLE)) as server:
            url = server.url
        engine = OpenAIEngine(url, "m", timeouts=QUICK)
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0.2)
        assert not start.done()
        assert engine.state().phase == "starting"
        assert "127.0.0.1" in engine.state().detail
        late = await asyncio.start_server(Server(says(WHOLE))._serve, "127.0.0.1", int(url.split(":")[2].split("/")[0]))
        await asyncio.wait_for(start, 5)
        assert engine.state().ready
        late.close()
        await engine.close()

    async def test_a_server_that_goes_away_is_noticed_and_found_again(self) -> None:
        async with talking_to(says(WHOLE)) as (server, engine):
            server.models = (500, "oops")
            await asyncio.sleep(0.3)
            assert engine.state().phase == "restarting"
            server.models = (200, MODELS)
            await asyncio.sleep(0.3)
            assert engine.state().ready

    async def test_without_a_server_a_request_finds_nobody(self) -> None:
        async with talking_to(says(WHOLE)) as (server, engine):
            await server.__aexit__()
            with pytest.raises(EngineNotReady, match="no answer"):
                await read(engine)

    @pytest.mark.parametrize(
        ("models", "what"),
        [
            ((401, "{}"), "refuses the API key"),
            ((200, {"data": [{"id": "other"}]}), "no model 'm'; it has other"),
        ],
    )
    async def test_a_wrong_key_or_model_is_the_merchants_mistake(self, models: tuple[int, Any], what: str) -> None:
        async with Server(says(WHOLE)) as server:
            server.models = models
            engine = OpenAIEngine(server.url, "m", "secret", timeouts=QUICK)
            with pytest.raises(MerchantError, match=what) as error:
                await engine.start()
            assert "secret" not in str(error.value)
            await engine.close()

    async def test_an_address_that_is_none_is_the_merchants_mistake(self) -> None:
        engine = OpenAIEngine("localhost:8000/v1", "m", timeouts=QUICK)
        with pytest.raises(MerchantError, match="not the address of a server"):
            await engine.start()
        await engine.close()

    async def test_a_server_without_a_list_of_models_is_believed(self) -> None:
        async with Server(says(WHOLE)) as server:
            server.models = (404, "{}")
            engine = OpenAIEngine(server.url, "m", timeouts=QUICK, max_model_len=800)
            await engine.start()
            assert engine.max_prompt_tokens == 400
            assert text_of(await read(engine)) == "你好"
            await engine.close()


@needs_vllm
@pytest.mark.timeout(300)
class TestWithVllmServe:
    async def test_replies_lengths_aborts_and_figures(self, vllm_server: str) -> None:
        engine = OpenAIEngine(vllm_server, "tiny", timeouts=Timeouts(first_token_s=30))
        await engine.start()
        assert engine.max_prompt_tokens == 2048 - 512

        chunks = await read(engine, HELLO, Sampling(max_tokens=100))
        assert text_of(chunks) == REPLY
        assert chunks[-1].finish == "stop"
        assert chunks[-1].n_tokens == len(pieces_of(REPLY)) + 1
        assert chunks[-1].n_prompt_tokens > 10

        first, *_ = await read(engine, ENDLESSLY, Sampling(max_tokens=1, n_likely=20))
        assert max(first.likely, key=lambda one: one[1])[0] == first.text == ENDLESS[: len(first.text)] != ""

        short = await read(engine, ENDLESSLY, Sampling(max_tokens=7))
        assert (short[-1].finish, short[-1].n_tokens) == ("length", 7)
        sampled = await read(engine, ENDLESSLY, Sampling(max_tokens=7, temperature=1.0, seed=1))
        assert sampled[-1].n_tokens == 7

        stream = engine.stream(ENDLESSLY, Sampling(max_tokens=1900))
        await anext(stream)
        await stream.aclose()
        async with httpx.AsyncClient(trust_env=False) as client:
            deadline = time.monotonic() + 5
            while "vllm:num_requests_running{" in (
                metrics := (await client.get(vllm_server.removesuffix("/v1") + "/metrics")).text
            ):
                (line,) = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
                if line.endswith(" 0.0"):
                    break
                assert time.monotonic() < deadline, "the server goes on"
                await asyncio.sleep(0.05)
        assert text_of(await read(engine)) == REPLY

        with pytest.raises(EngineFailed, match="status 400"):
            await read(engine, [Message("user", "长" * 3000)])
        await engine.close()
