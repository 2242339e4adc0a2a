"""
The whole bot behind OpenAI's chat API: POST /v1/chat/completions and GET /v1/models.

For batch clients, evaluations and other people's chat pages. Retrieval, guards and checks are those of the widget;
what is sampled and what the persona says is the store's, so `temperature`, `system` messages and the like are
accepted and ignored. Nothing is stored: the history is the caller's `messages`.

Beside OpenAI's fields a result has `zhanggui`: {outcome, citations, release, revised}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bot.conversations import Answerer, Recorder
from bot.engine import Engine
from bot.errors import BadFrame, BotError, ClientError, EngineFailed, RateLimited, TooLong
from bot.messages import Message, Release, Reply, Turn
from bot.stream import Delta, Phase
from bot.wire import MAX_TEXT_CHARS

logger = logging.getLogger(__name__)

T = TypeVar("T")
Steps = AsyncGenerator[Phase | Delta | Reply, None]

MAX_BODY_BYTES = 256 * 1024
REPLY_TIMEOUT_S = 180.0


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Part(_Model):
    type: str
    text: str | None = None


class ChatMessage(_Model):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    def text(self) -> str:
        """Return the message's text; raises BadFrame for pictures and sound, which nobody here can read."""
        if isinstance(self.content, list):
            if any(part.type != "text" for part in self.content):
                raise BadFrame("only text content is supported")
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class StreamOptions(_Model):
    include_usage: bool = False


class ChatRequest(_Model):
    messages: list[ChatMessage] = Field(min_length=1, max_length=500)
    model: str = ""  # any name is served by the one release there is
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    locale: str | None = None  # ours: BCP 47, for questions whose language does not show


# By hand, because the body is parsed by hand: FastAPI's own 422 is not OpenAI's error shape.
_BODY_POINTER = "#/paths/~1v1~1chat~1completions/post/requestBody/content/application~1json/schema"
_REQUEST_SCHEMA = ChatRequest.model_json_schema(ref_template=f"{_BODY_POINTER}/$defs/{{model}}")


@dataclass(frozen=True, slots=True)
class _Answering:
    """One request being answered, and what its result says besides the text."""

    steps: Steps
    id: str
    created: int
    model: str  # the release that answers
    messages: tuple[Message, ...]
    began: float


def openai_routes(
    *,
    answerer: Answerer,
    release: Callable[[], Release],
    engine: Engine | None,
    recorder: Recorder,
    admit: Callable[[Request], None],
) -> APIRouter:
    """
    Return the routes.

    Args:
        admit: raises RateLimited where the caller has asked too often.
    """
    router = APIRouter(prefix="/v1", tags=["OpenAI-compatible"])
    created = int(time.time())

    def model_object() -> dict[str, Any]:
        current = release()
        return {
            "id": _model_id(current),
            "object": "model",
            "created": created,
            "owned_by": "zhanggui",
            "zhanggui": {"release": asdict(current)},
        }

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """List the one release that answers."""
        return {"object": "list", "data": [model_object()]}

    @router.get("/models/{name:path}", response_model=None)
    async def get_model(name: str) -> dict[str, Any] | Response:
        """Return the release, or 404 where `name` is another."""
        if (model := model_object())["id"] == name:
            return model
        return _error(404, f"there is no model {name[:100]!r}; see /v1/models", code="model_not_found", param="model")

    @router.post(
        "/chat/completions",
        response_model=None,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _REQUEST_SCHEMA}}}},
    )
    async def chat_completions(request: Request) -> Response:
        """Answer the last user message; earlier ones are the history."""
        try:
            admit(request)
            body = _parse_body(await _read_body(request))
            history, question = _split(body.messages)
        except ClientError as exc:
            return _error_of(exc)
        answering = _Answering(
            answerer.answer(history, question, locale=body.locale, stop=asyncio.Event()),
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=_model_id(release()),
            messages=tuple(
                Message(m.role, m.text()) for m in body.messages if m.role in ("system", "user", "assistant")
            ),
            began=time.monotonic(),
        )
        try:
            if not body.stream:
                async with aclosing(answering.steps):
                    return await _unless_gone(request, whole(answering))
            # The first text is waited for here, so that a busy engine is a 503 and not a broken stream.
            first, answers = await _unless_gone(request, _first(answering.steps))
            if answers is not None:
                answering = replace(answering, model=_model_id(answers))
        except _ClientGone:
            await answering.steps.aclose()
            return Response(status_code=499)
        except Exception as exc:
            await answering.steps.aclose()
            recorder.reply_failed(getattr(exc, "code", "internal"))
            return _error_of(exc)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return _EventStream(answering.steps, streamed(answering, first, include_usage=include_usage))

    async def whole(answering: _Answering) -> Response:
        recorder.asked()
        reply: Reply | None = None
        ttft_s = None
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            async for step in answering.steps:
                if isinstance(step, Reply):
                    reply = step
                elif isinstance(step, Delta):
                    ttft_s = ttft_s or time.monotonic() - answering.began
        if reply is None:
            raise EngineFailed("the answerer ended without a reply")
        recorder.replied(reply, ttft_s, time.monotonic() - answering.began)
        return JSONResponse(
            {
                "id": answering.id,
                "object": "chat.completion",
                "created": answering.created,
                "model": _model_id(reply.release),
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": reply.text, "refusal": None},
                        "logprobs": None,
                        "finish_reason": _finish_reason(reply),
                    }
                ],
                "usage": _usage(engine, answering.messages, reply.text),
                "zhanggui": _extra(reply),
            }
        )

    async def streamed(answering: _Answering, first: Delta | Reply, *, include_usage: bool) -> AsyncIterator[str]:
        def chunk(delta: dict[str, Any] | None, finish: str | None = None, **fields: Any) -> str:
            choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
            frame = {
                "id": answering.id,
                "object": "chat.completion.chunk",
                "created": answering.created,
                "model": answering.model,
                "choices": choices,
            }
            if include_usage:
                frame["usage"] = None
            return _sse({**frame, **fields})

        recorder.asked()
        ttft_s = time.monotonic() - answering.began if isinstance(first, Delta) else None
        text = ""
        try:
            yield chunk({"role": "assistant", "content": ""})
            async for step in _from(first, answering.steps):
                if isinstance(step, Delta):
                    text += step.text
                    yield chunk({"content": step.text})
                elif isinstance(step, Reply):
                    recorder.replied(step, ttft_s, time.monotonic() - answering.began)
                    extra = _extra(step)
                    if step.text != text:
                        if step.text.startswith(text):
                            yield chunk({"content": step.text[len(text) :]})
                        else:
                            extra |= {"revised": True, "text": step.text}
                    yield chunk({}, _finish_reason(step), zhanggui=extra)
                    if include_usage:
                        yield chunk(None, usage=_usage(engine, answering.messages, step.text))
            yield "data: [DONE]\n\n"
        except Exception as exc:
            # The status line has gone out; OpenAI's own clients raise on an `error` in the stream.
            recorder.reply_failed(getattr(exc, "code", "internal"))
            yield _sse(_error_body(exc))

    return router


class _EventStream(StreamingResponse):
    """A server-sent stream that closes its answerer however it ends, even before its first byte."""

    def __init__(self, steps: Steps, content: AsyncIterator[str]) -> None:
        super().__init__(
            content,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},  # nginx would collect the stream
        )
        self._steps = steps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._steps.aclose()


class _ClientGone(Exception):
    pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, cancelling it and raising _ClientGone when the client closes the connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch, task = asyncio.create_task(gone()), asyncio.create_task(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGone
        return task.result()
    finally:
        for each in (watch, task):
            each.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)


async def _first(steps: Steps) -> tuple[Delta | Reply, Release | None]:
    """Return the first of the reply, and what answers, where that was said before it."""
    release: Release | None = None
    async with asyncio.timeout(REPLY_TIMEOUT_S):
        async for step in steps:
            if isinstance(step, Phase):
                release = step.release or release
            else:
                return step, release
    raise EngineFailed("the answerer ended without a reply")


async def _from(first: Delta | Reply, rest: Steps) -> AsyncIterator[Phase | Delta | Reply]:
    yield first
    async for step in rest:
        yield step


async def _read_body(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise TooLong("body", len(body), MAX_BODY_BYTES, "bytes")
    return body


def _parse_body(body: bytes) -> ChatRequest:
    try:
        parsed = ChatRequest.model_validate_json(body)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in error["loc"]) or "body"
        raise BadFrame(f"{where}: {error['msg']}") from None
    if parsed.n not in (None, 1):
        raise BadFrame("n: only one reply is made")
    return parsed


def _split(messages: Sequence[ChatMessage]) -> tuple[list[Turn], str]:
    """Return (history, question): the last message is the question, and must be the user's."""
    said = [(m.role, m.text()) for m in messages if m.role in ("user", "assistant")]
    if not said or said[-1][0] != "user" or not said[-1][1].strip():
        raise BadFrame("messages: the last one must be a user message with text")
    question = said[-1][1]
    if len(question) > MAX_TEXT_CHARS:
        raise TooLong("content", len(question), MAX_TEXT_CHARS)
    turns: list[Turn] = []
    asked: list[str] = []
    for role, text in said[:-1]:
        if role == "user":
            asked.append(text)
        elif asked:
            turns.append(Turn("\n".join(asked), text))
            asked = []
    return turns, question


def _model_id(release: Release) -> str:
    return f"{release.model}+{release.adapter}" if release.adapter else release.model


def _finish_reason(reply: Reply) -> str:
    return "length" if reply.finish == "length" else "stop"


def _extra(reply: Reply) -> dict[str, Any]:
    return {
        "outcome": reply.outcome,
        "citations": [asdict(citation) for citation in reply.citations],
        "release": asdict(reply.release),
        "revised": reply.revised,
    }


def _usage(engine: Engine | None, messages: Sequence[Message], text: str) -> dict[str, int]:
    """Return token counts of what went over this API (the passages in the prompt are ours and not counted)."""

    def count(counted: Sequence[Message]) -> int:
        if engine is not None:
            return engine.count_tokens(counted)
        return sum(len(message.content.encode()) // 4 + 1 for message in counted)

    n_prompt, n_reply = count(messages), count([Message("assistant", text)])
    return {"prompt_tokens": n_prompt, "completion_tokens": n_reply, "total_tokens": n_prompt + n_reply}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error_of(exc: Exception) -> Response:
    body = _error_body(exc)
    headers = {}
    if isinstance(exc, BotError) and exc.retry_after_s is not None:
        headers["Retry-After"] = str(int(exc.retry_after_s + 0.999))
    if isinstance(exc, RateLimited):
        status = 429
    elif isinstance(exc, TooLong) and exc.unit == "bytes":
        status = 413
    elif isinstance(exc, ClientError):
        status = 400
    else:
        status = 503 if isinstance(exc, BotError) and exc.retryable else 500
    return JSONResponse(body, status, headers)


def _error_body(exc: Exception) -> dict[str, Any]:
    """Return OpenAI's error object; of our own faults only the code is told, the log has the rest."""
    if isinstance(exc, ClientError):
        kind = "rate_limit_error" if isinstance(exc, RateLimited) else "invalid_request_error"
        return {"error": {"message": str(exc), "type": kind, "param": None, "code": exc.code}}
    if isinstance(exc, BotError) and exc.code in ("busy", "engine_not_ready"):
        logger.warning("no reply: %s", exc.code)
    else:
        logger.error("no reply", exc_info=exc)
    code = exc.code if isinstance(exc, BotError) else "internal"
    return {"error": {"message": "no reply could be made", "type": "server_error", "param": None, "code": code}}


def _error(status: int, message: str, *, code: str, param: str | None = None) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": body}, status)
