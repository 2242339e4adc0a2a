"""
The engine on another machine: any server that speaks OpenAI's chat completions (vLLM, its router, a cloud).

The only file that knows that protocol from the client's side, and the only one here that imports httpx. Has no
tokenizer, so counts are estimates. Format: https://platform.openai.com/docs/api-reference/chat-streaming and
server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from bot.engine import Chunk, EngineState, Sampling
from bot.errors import EngineBusy, EngineDead, EngineFailed, EngineNotReady, MerchantError
from bot.messages import Finish, Message

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 20  # of one event; a server that sends more is not speaking this protocol
_RETRIED_STATUS = (408, 500, 502, 504)  # a broken upstream; 429 and 503 are EngineBusy and left to the visitor

# "content_filter" and "tool_calls" end a reply like "stop": there is nothing more to read.
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass(frozen=True, slots=True)
class Timeouts:
    """All in seconds."""

    connect_s: float = 5.0
    first_token_s: float = 60.0  # from the request to the first text, queueing included
    token_s: float = 30.0  # between two events of one reply
    poll_s: float = 10.0  # between two looks at GET /models


class _TryAgain(Exception):
    """This attempt failed before its first token; `error` is what to raise if there is no other."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class OpenAIEngine:
    """Generates at `base_url` (with its /v1). `name` is for the release; the model's where not given."""

    adapter: str | None = None

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        name: str | None = None,
        max_model_len: int = 4096,
        reply_tokens: int = 512,
        timeouts: Timeouts | None = None,
        n_retries: int = 2,
        retry_wait_s: float = 0.25,
        send_priority: bool = False,
    ) -> None:
        """
        `max_model_len` is used where the server does not tell (vLLM does). `send_priority` needs a vLLM server with
        --scheduling-policy priority; others refuse the field.
        """
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.name = name or model
        self._api_key = api_key
        self._max_model_len = max_model_len
        self._reply_tokens = reply_tokens
        self._timeouts = timeouts or Timeouts()
        self._n_retries = n_retries
        self._retry_wait_s = retry_wait_s
        self._send_priority = send_priority
        self._is_vllm = False  # then top_k is understood
        self._client: httpx.AsyncClient | None = None
        self._poller: asyncio.Task[None] | None = None
        self._state = EngineState(False, "none")
        self._under_way: set[asyncio.Task[Any]] = set()
        self._counters = dict.fromkeys(("requests", "failures", "retries", "prompt_tokens", "generated_tokens"), 0)

    # Start and end

    async def start(self) -> None:
        """
        Return once the server answers and knows the model; for as long as that takes.

        Raises:
            MerchantError: it answers, but refuses the key or has no such model.
        """
        assert self._client is None, "an engine is started once"
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=self._timeouts.connect_s),  # the others are asyncio's, see _attempt
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=not _is_loopback(self.base_url),  # a proxy of the environment is not for this machine
        )
        self._state = EngineState(False, "starting", f"waiting for {_place(self.base_url)}")
        wait_s = 0.5
        while not await self._look():
            await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
            wait_s = min(2 * wait_s, self._timeouts.poll_s)
        self._poller = asyncio.create_task(self._poll(), name="openai-engine-poll")

    async def close(self) -> None:
        self._state = EngineState(False, "stopped")
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
        if self._client is not None:
            await self._client.aclose()  # what is being read ends with a ReadError, hence EngineDead

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._timeouts.poll_s)
            try:
                await self._look()
            except MerchantError as exc:
                self._state = EngineState(False, "restarting", str(exc))

    async def _look(self) -> bool:
        """Ask for the models; set the state and return whether ours is there."""
        assert self._client is not None
        place = _place(self.base_url)
        try:
            async with asyncio.timeout(self._timeouts.connect_s + 5):
                response = await self._client.get(f"{self.base_url}/models")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as exc:
            if isinstance(exc, (httpx.InvalidURL, httpx.UnsupportedProtocol)):
                raise MerchantError(f"{self.base_url!r} is not the address of a server: {exc}") from exc
            self._lost(f"no answer from {place}")
            return False
        if response.status_code in (401, 403):
            raise MerchantError(f"{place} refuses the API key")
        if response.status_code in (404, 405):  # some servers have no such list: believe in the model
            self._state = EngineState(True, "ready", "the server has no list of models")
            return True
        if response.status_code != 200:
            self._lost(f"{place} answers with status {response.status_code}")
            return False
        try:
            cards = {str(card["id"]): card for card in response.json()["data"]}
        except (ValueError, KeyError, TypeError):
            self._lost(f"{place} answers, but not with a list of models")
            return False
        if self.model not in cards:
            raise MerchantError(f"{place} has no model {self.model!r}; it has {', '.join(sorted(cards)) or 'none'}")
        card = cards[self.model]
        self._is_vllm = card.get("owned_by") == "vllm"
        if isinstance(card.get("max_model_len"), int):
            self._max_model_len = card["max_model_len"]
        self._state = EngineState(True, "ready")
        return True

    def _lost(self, detail: str) -> None:
        self._state = EngineState(False, "restarting" if self._poller else "starting", detail)

    async def check_health(self) -> None:
        """Raise EngineDead after `close()`. A server that is away is not dead: it is asked again until it is back."""
        if self._state.phase == "stopped":
            raise EngineDead("the engine was closed")

    def state(self) -> EngineState:
        return self._state

    # Prompts

    @property
    def max_prompt_tokens(self) -> int:
        return self._max_model_len - min(self._reply_tokens, self._max_model_len // 2)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Return an estimate, rather too high: one for a Chinese character, one for three others, eight a message."""
        n_wide = sum(1 for m in messages for c in m.content if c >= "\u2e80")
        n_all = sum(len(m.content) for m in messages)
        return n_wide + (n_all - n_wide + 2) // 3 + 8 * len(messages)

    # Replies

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """
        Generate a reply, as `bot.engine.Engine` promises. Tokens are counted on the last chunk only.

        A failure before the first text is tried again, after it never: the visitor has read that much.
        """
        if self._client is None:
            raise EngineNotReady("the engine was not started")
        if self._state.phase == "stopped":
            raise EngineDead("the engine was closed")
        self._counters["requests"] += 1
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        body = self._body(messages, sampling)
        try:
            for attempt in range(self._n_retries + 1):
                try:
                    async with contextlib.aclosing(self._attempt(body)) as chunks:
                        async for chunk in chunks:
                            yield chunk
                    return
                except _TryAgain as exc:
                    if attempt == self._n_retries or self._state.phase == "stopped":
                        raise exc.error from exc.__cause__
                    self._counters["retries"] += 1
                    logger.info("try %d at %s failed: %s", attempt + 1, _place(self.base_url), exc.error)
                await asyncio.sleep(self._retry_wait_s * 2**attempt * random.uniform(0.75, 1.25))
        except (EngineFailed, EngineNotReady):
            self._counters["failures"] += 1
            if self._state.phase == "stopped":
                raise EngineDead("the engine was closed") from None
            raise
        finally:
            self._under_way.discard(task)

    def _body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.n_likely:
            body |= {"logprobs": True, "top_logprobs": sampling.n_likely}
        if self._is_vllm and sampling.temperature > 0:
            body["top_k"] = sampling.top_k
        if self._send_priority and sampling.priority:
            body["priority"] = sampling.priority
        return body

    async def _attempt(self, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Send the request once. Leaving closes the HTTP stream, by which the server knows to abort."""
        assert self._client is not None
        place, began, seen = _place(self.base_url), time.monotonic(), False
        finish: Finish | None = None
        n_deltas = 0
        usage: dict[str, Any] = {}
        untold: _Likely = ()  # a token without a whole character has no text to come with
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._timeouts.first_token_s):
                    request = self._client.stream("POST", f"{self.base_url}/chat/completions", json=body)
                    response = await stack.enter_async_context(request)
                    if response.status_code != 200:
                        raise await _refusal(response, place)
                events = _events(response)
                while True:
                    left_s = began + self._timeouts.first_token_s - time.monotonic()
                    async with asyncio.timeout(self._timeouts.token_s if seen else left_s):
                        event = await anext(events, None)
                    if event is None:
                        break
                    text, ended, used, likely = _parse_event(event)
                    usage, untold = used or usage, untold or likely
                    finish = ended or finish
                    if text:
                        seen = True
                        n_deltas += 1
                        yield Chunk(text, likely=untold)
                        untold = ()
        # 1) Never reached: worth another try, and "not ready" rather than "failed".
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            raise _TryAgain(EngineNotReady(f"no answer from {place}")) from exc
        # 2) Too slow. Not tried again: the server is there, and busy with this very request.
        except TimeoutError as exc:
            limit_s = self._timeouts.token_s if seen else self._timeouts.first_token_s
            raise EngineFailed(f"{place} gave no text for {limit_s:g} s") from exc
        # 3) The connection broke, or what came is not the protocol.
        except (httpx.HTTPError, httpx.StreamError, _BadEvent) as exc:
            error = EngineFailed(f"the reply of {place} broke off: {exc or type(exc).__name__}")
            raise (error if seen else _TryAgain(error)) from exc
        if finish is None:
            error = EngineFailed(f"the reply of {place} ended early")
            raise error if seen else _TryAgain(error)
        n_tokens, n_prompt = _count(usage, "completion_tokens", n_deltas), _count(usage, "prompt_tokens", 0)
        self._counters["prompt_tokens"] += n_prompt
        self._counters["generated_tokens"] += n_tokens
        n_cached = _count(usage.get("prompt_tokens_details") or {}, "cached_tokens", 0)
        yield Chunk("", finish, n_tokens, n_prompt, n_cached, untold)

    # Figures

    def figures(self) -> dict[str, float]:
        """Return this process's own counts; the server has its own /metrics."""
        return {"running": float(len(self._under_way))} | {k: float(v) for k, v in self._counters.items()}


class _BadEvent(Exception):
    """What came is not an event of this protocol."""


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """
    Yield the events of a reply up to [DONE].

    Cut at newlines only: httpx's aiter_lines also cuts at U+2028 and U+0085, which JSON may hold as they are.
    """
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise _BadEvent(f"a line of more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            if not line.startswith(b"data:"):  # comments (keep-alive), "event:", "id:", empty lines
                if line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                    raise _BadEvent(f"not an event: {line[:80]!r}")
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                return
            try:
                event = json.loads(payload)
            except ValueError as exc:
                raise _BadEvent(f"not JSON: {payload[:80]!r}") from exc
            if not isinstance(event, dict):
                raise _BadEvent(f"not an object: {payload[:80]!r}")
            yield event


_Likely = tuple[tuple[str, float], ...]


def _parse_event(event: dict[str, Any]) -> tuple[str, Finish | None, dict[str, Any] | None, _Likely]:
    """
    Return the event's text, finish, usage, and what its first token might have been.

    Raises:
        EngineFailed: the event reports an error.
    """
    if "error" in event:
        raise EngineFailed(f"the server gave up: {str(event['error'])[:200]}")
    try:
        usage = event.get("usage")
        if not event.get("choices"):
            return "", None, usage, ()
        choice = event["choices"][0]
        text = (choice.get("delta") or {}).get("content") or ""
        reason = choice.get("finish_reason")
        if not isinstance(text, str) or not (usage is None or isinstance(usage, dict)):
            raise TypeError("content or usage of a wrong type")
        tokens = (choice.get("logprobs") or {}).get("content") or [{}]
        likely = tuple((str(one["token"]), float(one["logprob"])) for one in tokens[0].get("top_logprobs") or ())
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as exc:
        raise _BadEvent(f"not a chunk of a completion: {str(event)[:80]}") from exc
    return text, _FINISH.get(str(reason), "stop") if reason else None, usage, likely


def _count(usage: dict[str, Any], name: str, otherwise: int) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else otherwise


async def _refusal(response: httpx.Response, place: str) -> Exception:
    """Return what a status other than 200 means to the caller."""
    status = response.status_code
    if status in (429, 503):
        return EngineBusy(_retry_after_s(response.headers.get("retry-after")))
    try:
        body = (await response.aread())[:300].decode(errors="replace")
    except httpx.HTTPError:
        body = ""
    error = EngineFailed(f"{place} answered with status {status}: {body}")
    return _TryAgain(error) if status in _RETRIED_STATUS else error


def _retry_after_s(header: str | None) -> float:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3: a number or a date), within [1, 600]; 5 if none."""
    if header is None:
        return 5.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 5.0
    return min(600.0, max(1.0, seconds)) if seconds == seconds else 5.0


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _place(url: str) -> str:
    """Return host and port for messages: the rest of a URL may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
