"""The bot behind OpenAI's API, asked with OpenAI's own client, both kinds; and what is left when a client walks off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bot.errors import EngineBusy, EngineFailed
from bot.messages import Turn
from bot.server import ServerLimits
from tests.fakes import ScriptedAnswerer, ScriptedEngine
from tests.running import Running, running_server, until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "log.db", ScriptedAnswerer()) as server:
        yield server
        assert server.answerer.n_open == 0


@pytest.fixture
async def client(server: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.DefaultAsyncHttpxClient(trust_env=False) as http:
        yield openai.AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0, http_client=http)


def user(text: str) -> Any:
    return {"role": "user", "content": text}


async def test_a_whole_reply(client: openai.AsyncOpenAI, server: Running) -> None:
    completion = await client.chat.completions.create(model="any", messages=[user("hello there")])
    choice = completion.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        *("assistant", "echo: hello there", "stop"),
    )
    assert completion.model == "scripted"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    extra = completion.model_extra or {}
    assert extra["zhanggui"]["outcome"] == "generated"
    assert extra["zhanggui"]["citations"][0]["source"] == "faqs.csv:2"
    assert extra["zhanggui"]["release"]["knowledge"] == "k0"


async def test_a_streamed_reply(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="any", messages=[user("你好 朋友")], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "echo: 你好 朋友"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-2].model_extra or {})["zhanggui"]["outcome"] == "generated"


async def test_the_synchronous_client_works_too(server: Running) -> None:
    def ask() -> tuple[str | None, str]:
        with openai.DefaultHttpxClient(trust_env=False) as http:
            client = openai.OpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0, http_client=http)
            whole = client.chat.completions.create(model="any", messages=[user("hi")])
            with client.chat.completions.create(model="any", messages=[user("hi")], stream=True) as stream:
                pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
            return whole.choices[0].message.content, "".join(pieces)

    assert await asyncio.to_thread(ask) == ("echo: hi", "echo: hi")


async def test_earlier_messages_are_the_history_and_system_messages_are_not(
    client: openai.AsyncOpenAI, server: Running
) -> None:
    messages: Any = [
        {"role": "system", "content": "You are a pirate."},
        user("one"),
        user("two"),
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": [{"type": "text", "text": "three "}, {"type": "text", "text": "four"}]},
    ]
    await client.chat.completions.create(model="any", messages=messages)
    assert server.answerer.asked == ["three four"]
    assert server.answerer.histories == [[Turn("one\ntwo", "reply")]]


async def test_the_release_is_the_only_model(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["scripted"]
    assert (await client.models.retrieve("scripted")).id == "scripted"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("gpt-4o")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "Invalid JSON"),
        ("[]", 400, "object"),
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last one must be a user message"),
        ({"messages": [user(" ")]}, 400, "last one must be a user message"),
        ({"messages": [{"role": "visitor", "content": "x"}]}, 400, "role"),
        ({"messages": [user("hi")], "n": 3}, 400, "only one reply"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        ({"messages": [user("x" * 2001)]}, 400, "limit is 2000"),
        ({"messages": [user("x" * 300_000)]}, 413, "limit is 262144"),
    ],
)
async def test_a_bad_request_is_explained_in_openai_s_words(
    server: Running, body: Any, status: int, words: str
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    async with httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http:
        response = await http.post("/v1/chat/completions", content=content)
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_busy_engine_is_a_503_with_a_time_to_come_back(
    client: openai.AsyncOpenAI, server: Running, stream: bool
) -> None:
    server.answerer.errors = [EngineBusy(7.0)]
    with pytest.raises(openai.InternalServerError) as busy:
        await client.chat.completions.create(model="any", messages=[user("hi")], stream=stream)
    assert (busy.value.status_code, busy.value.code) == (503, "busy")
    assert busy.value.response.headers["retry-after"] == "7"


async def test_a_bug_shows_no_detail(
    client: openai.AsyncOpenAI, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    server.answerer.errors = [ZeroDivisionError("/secret/path")]
    with pytest.raises(openai.InternalServerError) as broken:
        await client.chat.completions.create(model="any", messages=[user("hi")])
    assert broken.value.status_code == 500
    assert "/secret" not in str(broken.value.body)
    assert any(r.exc_info for r in caplog.records)


async def test_a_stream_that_breaks_midway_raises_in_the_client(client: openai.AsyncOpenAI, server: Running) -> None:
    server.answerer.errors = [(2, EngineFailed("/secret/path"))]
    stream = await client.chat.completions.create(model="any", messages=[user("one two three")], stream=True)
    with pytest.raises(openai.APIError) as broken:
        async for _ in stream:
            pass
    assert broken.value.code == "engine_failed"
    assert "/secret" not in str(broken.value.body)


async def test_a_revised_reply_is_sent_whole_at_the_end_of_the_stream(
    client: openai.AsyncOpenAI, server: Running
) -> None:
    server.answerer.final = "Something else."
    stream = await client.chat.completions.create(model="any", messages=[user("hi")], stream=True)
    chunks = [chunk async for chunk in stream]
    extra = (chunks[-1].model_extra or {})["zhanggui"]
    assert (extra["revised"], extra["text"]) == (True, "Something else.")


async def test_closing_the_stream_early_gives_the_reply_up(client: openai.AsyncOpenAI, server: Running) -> None:
    server.answerer.delay_s = 0.01
    text = " ".join(map(str, range(400)))
    stream = await client.chat.completions.create(model="any", messages=[user(text)], stream=True)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    assert server.answerer.n_open == 1
    await stream.close()
    await until(lambda: server.answerer.n_aborted == 1)
    assert server.answerer.n_open == 0
    assert (await client.chat.completions.create(model="any", messages=[user("hi")])).choices  # the next one works


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_word_gives_the_reply_up(
    client: openai.AsyncOpenAI, server: Running, stream: bool
) -> None:
    server.answerer.gate.clear()
    call = asyncio.create_task(client.chat.completions.create(model="any", messages=[user("hi")], stream=stream))
    await until(lambda: server.answerer.n_open == 1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await until(lambda: server.answerer.n_open == 0)
    assert server.answerer.n_aborted == 1
    server.answerer.gate.set()


async def test_questions_over_http_are_limited_too(tmp_path: Path) -> None:
    limits = ServerLimits(asks_per_minute_and_address=1, limit_loopback=True)
    async with (
        running_server(tmp_path / "log.db", limits=limits, engine=ScriptedEngine()) as server,
        httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http,
    ):
        answers = [await http.post("/v1/chat/completions", json={"messages": [user("hi")]}) for _ in range(2)]
    assert [a.status_code for a in answers] == [200, 429]
    assert answers[1].json()["error"]["type"] == "rate_limit_error"
    assert int(answers[1].headers["retry-after"]) > 0
