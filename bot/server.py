"""
The web server: WebSocket `/ws`, the store's pages and pictures, health, metrics. `bot.openai_api` has OpenAI's API.

Knows sockets, headers and limits; knows neither SQL nor how a reply is made. `serve.py` makes the `Parts` and calls
`create_app` and `run`. docs/protocol.md is the long form of what goes over the socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, WebSocket
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope
from starlette.websockets import WebSocketDisconnect

from bot.conversations import Answerer, ConversationHub, Subscriber
from bot.engine import Engine, EngineState
from bot.errors import BadFrame, BotError, ClientError, MerchantError, StorageUnavailable, TooLong, UnknownConversation
from bot.language import reply_language
from bot.limits import Places, RateLimit, is_loopback
from bot.messages import Release
from bot.metrics import CONTENT_TYPE, Metrics
from bot.openai_api import openai_routes
from bot.settings import StoreProfile
from bot.storage import Conversation, Storage
from bot.wire import (
    LIMITS,
    MAX_ID_CHARS,
    PROTOCOL,
    SUBPROTOCOL,
    Ask,
    ClientFrame,
    Close,
    Handoff,
    Hello,
    Ping,
    Rate,
    Regenerate,
    Stop,
    Typing,
    dump_failed,
    dump_frame,
    parse_frame,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024  # above this the socket is closed with 1009; above wire.MAX_FRAME_BYTES a frame says so
CLOSE_POLICY = 1008
CLOSE_TRY_LATER = 1013


@dataclass(frozen=True, slots=True)
class IndexStatus:
    """What /readyz and /metrics say about the index."""

    ready: bool
    version: str = ""
    n_passages: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a visitor may do; see `bot.settings.Settings` for those a merchant sets."""

    allowed_origins: tuple[str, ...] = ()  # besides the server's own; "*" for any
    asks_per_minute: int = 20  # of one conversation
    asks_per_minute_and_address: int = 120  # of all conversations behind one address (a household, an office)
    sockets_per_address: int = 64
    limit_loopback: bool = False  # this machine's own tools (bench, eval) and tests are not limited
    max_bad_frames: int = 10  # then the connection is closed
    hello_timeout_s: float = 30.0
    send_timeout_s: float = 10.0
    coalesce_s: float = 0.04
    max_frames: int = 256  # that may wait for a slow reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the server is made of. The server opens, starts and closes storage, engine and hub; nothing else."""

    storage: Storage
    hub: ConversationHub
    answerer: Answerer
    engine: Engine | None  # None: approved answers only
    index: Callable[[], IndexStatus]
    release: Callable[[], Release]
    store: StoreProfile
    promotions: Callable[[], Sequence[Mapping[str, Any]]]  # those on now
    products: Callable[[], Sequence[Mapping[str, Any]]]  # for the demo page: id, title, price, image, lang, …
    metrics: Metrics
    web_dir: Path
    store_dir: Path | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)
    jobs: tuple[Callable[[], Awaitable[None]], ...] = ()  # run from start to end beside the server: building an index


def create_app(parts: Parts) -> FastAPI:
    """Return the ASGI app. Its lifespan opens the storage, starts the engine, and closes what it opened."""
    server = _Server(parts)
    app = FastAPI(
        title="Zhanggui",
        description="Customer-service bot of an online store. The WebSocket protocol of /ws is in docs/protocol.md.",
        version=_own_version(),
        lifespan=lambda _app: server.running(),
        docs_url=None,  # both pages load scripts from a CDN
        redoc_url=None,
    )
    app.add_api_route("/healthz", server.healthz, tags=["operations"])
    app.add_api_route("/readyz", server.readyz, tags=["operations"], response_model=None)
    app.add_api_route("/metrics", server.scrape, tags=["operations"], response_model=None)
    app.add_api_route("/store.json", server.storefront, tags=["store"], response_model=None)
    app.add_api_websocket_route("/ws", server.chat)
    app.include_router(
        openai_routes(
            answerer=parts.answerer,
            release=parts.release,
            engine=parts.engine,
            recorder=parts.metrics,
            admit=server.admit_request,
        )
    )
    if parts.store_dir is not None and (parts.store_dir / "images").is_dir():
        app.mount("/store/images", StoreImages(directory=parts.store_dir / "images"))
    app.mount("/", Pages(directory=parts.web_dir, html=True, check_dir=False))
    app.state.check_storage = server.check_storage
    return app


class _Server:
    """One running server: its limits, its counts, and the endpoints."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        limits = parts.limits
        self.places = Places(limits.sockets_per_address)
        self.conversation_asks = RateLimit(limits.asks_per_minute)
        self.address_asks = RateLimit(limits.asks_per_minute_and_address)
        self.n_connections = 0
        parts.metrics.watch("hub", self._hub_figures)
        parts.metrics.watch("index", self._index_figures)
        if parts.engine is not None:
            parts.metrics.watch("engine", parts.engine.figures)

    def _hub_figures(self) -> dict[str, float]:
        hub = self.parts.hub
        return {
            "live_conversations": hub.n_live,
            "subscribers": hub.n_subscribers,
            "replies_under_way": hub.n_generating,
            "questions_waiting": hub.n_waiting,
            "tasks": hub.n_tasks,
        }

    def _index_figures(self) -> dict[str, float]:
        index = self.parts.index()
        return {"ready": index.ready, "passages": index.n_passages}

    # Lifespan

    async def check_storage(self) -> None:
        """
        Open the storage, bring its schema up to date, close it again.

        Raises:
            MerchantError: it cannot be used; says why. (Raised inside the lifespan, uvicorn would print a traceback.)
        """
        try:
            await self.parts.storage.open()
        except StorageUnavailable as exc:
            raise MerchantError(f"the database cannot be opened: {exc.__cause__}") from exc
        await self.parts.storage.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        parts = self.parts
        await parts.storage.open()
        tasks = [asyncio.create_task(self._bring_up(), name="bring-up")]
        tasks += [asyncio.create_task(_logged(job), name="job") for job in parts.jobs]
        try:
            yield
        finally:
            # The sockets are closed by now. Replies are made to their end first: they need engine and storage.
            await parts.hub.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if parts.engine is not None:
                await parts.engine.close()
            await parts.storage.close()

    async def _bring_up(self) -> None:
        """Start the engine while the server already serves, then answer what a restart left unanswered."""
        if self.parts.engine is not None:
            try:
                await self.parts.engine.start()
            except BotError as exc:
                logger.error("the engine did not start: %s", exc)  # /readyz goes on saying so
            except Exception:
                logger.exception("the engine did not start")
        while self._missing():  # noqa: ASYNC110 - engine and index only have a state to ask for
            await asyncio.sleep(0.2)
        try:
            await self.parts.hub.recover()
        except BotError as exc:
            logger.warning("unanswered questions were not looked up: %s", exc.code)

    # Health

    async def healthz(self) -> dict[str, bool]:
        """The process lives."""
        return {"ok": True}

    def _engine_state(self) -> EngineState:
        return EngineState(True, "none") if self.parts.engine is None else self.parts.engine.state()

    def _missing(self) -> list[str]:
        ready = {"index": self.parts.index().ready, "engine": self._engine_state().ready}
        return [name for name, is_ready in ready.items() if not is_ready]

    async def readyz(self, soft: bool = False) -> JSONResponse:
        """
        200 once index and engine are ready, else 503 with what is missing.

        `soft=1` always answers 200, for pages that only show the state (browsers log every 503 as an error).
        """
        index, engine, missing = self.parts.index(), self._engine_state(), self._missing()
        body = {
            "ready": not missing,
            "index": {
                "ready": index.ready,
                "version": index.version,
                "n_passages": index.n_passages,
                "detail": index.detail,
            },
            "engine": {
                "ready": engine.ready,
                "name": "none" if self.parts.engine is None else self.parts.engine.name,
                "phase": engine.phase,
                "detail": engine.detail,
            },
            "missing": missing,
        }
        headers = {"Cache-Control": "no-store", "Access-Control-Allow-Origin": "*"}  # the widget asks from shop pages
        return JSONResponse(body, 200 if soft or not missing else 503, headers)

    async def scrape(self) -> Response:
        """Everything that is counted, in Prometheus' text format."""
        return Response(self.parts.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def storefront(self) -> JSONResponse:
        """What the demo shop page shows: the store, what it sells, what is on now."""
        store = self.parts.store
        body = {
            "name": store.name,
            "names": store.names,
            "languages": store.languages,
            "currency": store.currency,
            "timezone": str(store.timezone),
            "contact": store.contact,
            "business_hours": store.business_hours,
            "greeting": store.greeting,
            "quick_replies": store.quick_replies,
            "promotions": [dict(p) for p in self.parts.promotions()],
            "products": [dict(p) for p in self.parts.products()],
        }
        return JSONResponse(body, headers={"Cache-Control": "no-cache", "Access-Control-Allow-Origin": "*"})

    # Limits

    def limited(self, address: str) -> bool:
        return self.parts.limits.limit_loopback or not is_loopback(address)

    def admit_request(self, request: Request) -> None:
        """Count one question over HTTP; raises RateLimited."""
        address = _address(request.scope)
        if self.limited(address):
            self.address_asks.hit(address)

    def admit_ask(self, address: str, conversation: str | None) -> None:
        """Count one question (or a new conversation) over a socket; raises RateLimited."""
        if self.limited(address):
            if conversation is not None:
                self.conversation_asks.hit(conversation)
            self.address_asks.hit(address)

    # The socket

    async def chat(self, websocket: WebSocket) -> None:
        limits = self.parts.limits
        address = _address(websocket.scope)
        # CORS does not cover WebSockets: without this any page could talk as its visitor.
        if not origin_allowed(websocket.headers.get("origin"), websocket.headers.get("host"), limits.allowed_origins):
            logger.info("connection refused: %s, origin %.100r", address, websocket.headers.get("origin"))
            await websocket.close()  # before accepting: a 403
            return
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        if self.limited(address) and not self.places.take(address):
            # Accepted first, because a page cannot read why a handshake was refused.
            frame = dump_frame(
                "failed", code="rate_limited", message="too many connections", retryable=True, retry_after_s=30.0
            )
            await _quietly(websocket.send_text(frame), limits.send_timeout_s)
            await _quietly(websocket.close(CLOSE_TRY_LATER, "too many connections"), limits.send_timeout_s)
            return
        self.n_connections += 1
        self.parts.metrics.connection_opened()
        logger.info("connection open: %s (%d open)", address, self.n_connections)
        connection = ChatConnection(self, websocket, address)
        try:
            await connection.run()
        finally:
            self.n_connections -= 1
            self.parts.metrics.connection_closed()
            if self.limited(address):
                self.places.leave(address)
            logger.info("connection closed: %s %s", address, connection.summary())


class ChatConnection:
    """
    One WebSocket, from accept to close: a reader always in `receive`, a handler, a writer.

    The reader does nothing else, because uvicorn stops reading after one message that nobody took: a handler that
    waits would leave pongs, `stop` and the close frame unread. The writer is the only one that sends.
    """

    def __init__(self, server: _Server, websocket: WebSocket, address: str) -> None:
        self._server = server
        self._hub = server.parts.hub
        self._limits = server.parts.limits
        self._websocket = websocket
        self._address = address
        self._conversation: str | None = None
        self._outbox = Subscriber(max_frames=self._limits.max_frames, coalesce_s=self._limits.coalesce_s)
        self._inbox: asyncio.Queue[str | None] = asyncio.Queue(32)  # None is a binary message
        self._n_in = self._n_out = self._n_bad = 0
        self._code: int | None = None  # what the connection was closed with, by either side
        self._began = time.monotonic()

    def summary(self) -> str:
        """Return what the log says of a closed connection; nothing a visitor wrote."""
        return (
            f"code {self._code}, conversation {self._conversation}, {self._n_in} frames in ({self._n_bad} bad), "
            f"{self._n_out} out, {time.monotonic() - self._began:.1f} s"
        )

    async def run(self) -> None:
        """Serve until either side closes. What was asked for goes on without the connection."""
        tasks = [asyncio.create_task(work()) for work in (self._read, self._handle, self._write)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._hub.unsubscribe(self._outbox)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    logger.error("connection %s: a task of it broke", self._address, exc_info=result)
        if self._code is None:
            self._code = self._outbox.close_code or 1011
            await _quietly(self._websocket.close(self._code, self._outbox.close_reason), self._limits.send_timeout_s)

    async def _read(self) -> None:
        # Not websocket.iter_text(): a binary frame, which anyone may send, makes it raise KeyError.
        while (message := await self._websocket.receive())["type"] == "websocket.receive":
            self._n_in += 1
            await self._inbox.put(message.get("text"))
        self._code = message.get("code", 1006)

    async def _write(self) -> None:
        try:
            while (frame := await self._outbox.next_frame()) is not None:
                async with asyncio.timeout(self._limits.send_timeout_s):
                    await self._websocket.send_text(frame)
                self._n_out += 1
        except TimeoutError:
            # They do not read; nor would they read a close frame. The kernel drops the rest (see listening_socket).
            self._code = CLOSE_TRY_LATER
        except (WebSocketDisconnect, RuntimeError, OSError):
            self._code = self._code or 1006  # gone meanwhile; the reader sees it too

    async def _handle(self) -> None:
        while not self._outbox.ended:
            try:
                timeout_s = self._limits.hello_timeout_s if self._conversation is None else None
                async with asyncio.timeout(timeout_s):
                    text = await self._inbox.get()
            except TimeoutError:
                self._outbox.end(CLOSE_POLICY, "no hello")
                break
            frame: ClientFrame | None = None
            try:
                if text is None:
                    raise BadFrame("binary frames are not spoken here; send text")
                frame = parse_frame(text)
                await self._do(frame)
            except (BadFrame, TooLong) as exc:
                self._refuse(exc, frame, text)
                self._n_bad += 1
                if self._n_bad >= self._limits.max_bad_frames:
                    self._outbox.end(CLOSE_POLICY, "too many bad frames")
            except BotError as exc:
                self._refuse(exc, frame, text)
            except Exception as exc:  # a bug: the visitor gets a code, the connection stays
                logger.exception("conversation %s: %s failed", self._conversation, type(frame).__name__)
                self._refuse(exc, frame, text)
        # The writer sends what is queued, then closes; until then there is nothing to do here.
        await asyncio.Event().wait()

    def _refuse(self, error: Exception, frame: ClientFrame | None, text: str | None) -> None:
        code = error.code if isinstance(error, BotError) else "internal"
        self._server.parts.metrics.frame_failed(code)
        if not isinstance(error, ClientError):
            logger.warning("conversation %s: frame refused: %s", self._conversation, code)
        id_ = frame.id if isinstance(frame, Ask) else _id_in(text) if frame is None else None
        turn = frame.turn if isinstance(frame, Stop | Regenerate) else None
        self._outbox.push(dump_failed(error, id_=id_, turn=turn))

    async def _do(self, frame: ClientFrame) -> None:
        if isinstance(frame, Ping):
            self._outbox.push(dump_frame("pong"))
            return
        if isinstance(frame, Hello):
            await self._hello(frame)
            return
        conversation = self._conversation
        if conversation is None:
            raise BadFrame("say hello first")
        match frame:
            case Ask():
                self._server.admit_ask(self._address, conversation)
                await self._hub.ask(conversation, frame.id, frame.text, by=self._outbox)
            case Stop():
                self._hub.stop(conversation, frame.turn)
            case Regenerate():
                self._server.admit_ask(self._address, conversation)
                await self._hub.regenerate(conversation, frame.turn)
            case Rate():
                await self._hub.rate(conversation, frame.seq, frame.value, frame.comment)
            case Handoff():
                await self._hub.handoff(conversation, frame.reason)
            case Close():
                await self._hub.set_state(
                    conversation, "closed", reason="visitor", score=frame.score, comment=frame.comment
                )
            case Typing():
                pass  # for agents, once there are any; nothing is stored

    async def _hello(self, hello: Hello) -> None:
        if self._conversation is not None:
            raise BadFrame("hello was said already; open another connection for another conversation")
        if hello.protocol != PROTOCOL:
            raise BadFrame(f"protocol {hello.protocol} is not spoken here; this server speaks {PROTOCOL}")
        if hello.conversation is None:
            self._server.admit_ask(self._address, None)
            self._conversation = await self._hub.start(
                self._outbox, hello.locale, lambda head, token: self._welcome(head, token, hello.locale)
            )
            return
        token = hello.token
        if token is None:
            raise UnknownConversation
        await self._server.parts.storage.authenticate(hello.conversation, token)
        await self._hub.subscribe(
            self._outbox,
            hello.conversation,
            after=hello.after,
            welcome=lambda head: self._welcome(head, token, hello.locale or head.locale),
        )
        self._conversation = hello.conversation

    def _welcome(self, head: Conversation, token: str, locale: str | None) -> str:
        store = self._server.parts.store
        language = reply_language("", (), locale, store.languages[0])
        if language not in store.languages:
            language = store.languages[0]
        return dump_frame(
            "welcome",
            conversation=head.id,
            token=token,
            seq=head.seq,
            state=head.state,
            store={"name": store.names[language], "languages": list(store.languages), "currency": store.currency},
            greeting=store.greeting[language],
            quick_replies=list(store.quick_replies.get(language, ())),
            limits={**LIMITS, "asks_per_minute": self._limits.asks_per_minute},
        )


# Files


CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".txt": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
IMAGE_SUFFIXES = {".svg", ".png", ".jpg", ".webp"}

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


class Pages(StaticFiles):
    """
    The files of bot/web, by name: the demo page, the widget and its modules, later inbox and console.

    Only file types that a page is made of, and never a hidden file. Revalidated on every use (ETag): an update is
    seen at the next load, and costs a 304 otherwise.
    """

    async def get_response(self, path: str, scope: Scope) -> Response:
        name = PurePosixPath(path)
        if any(part.startswith(".") for part in name.parts):
            raise HTTPException(404)
        if path != "." and not name.suffix:
            path, name = f"{path}.html", name.with_suffix(".html")  # /inbox, /console
        if path != "." and name.suffix not in CONTENT_TYPES:
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        if response.status_code in (200, 304):
            content_type = CONTENT_TYPES[name.suffix or ".html"]
            response.headers["Content-Type"] = content_type
            response.headers["Cache-Control"] = "no-cache"
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Referrer-Policy"] = "strict-origin-when-cross-origin"
            if content_type.startswith("text/html"):
                response.headers["Content-Security-Policy"] = PAGE_POLICY
            else:
                # The widget and its modules are loaded by the store's own pages.
                response.headers["Access-Control-Allow-Origin"] = "*"
                response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        return response


class StoreImages(StaticFiles):
    """The store's own pictures. Merchants' files: whatever is in them, no script of theirs runs on our origin."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        suffix = PurePosixPath(path).suffix
        if suffix not in IMAGE_SUFFIXES or path.startswith("."):
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers["Content-Type"] = CONTENT_TYPES[suffix]
        response.headers["Cache-Control"] = "public, max-age=300"
        response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        return response


# Running


LOG_CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "INFO"},
    "loggers": {
        # uvicorn logs three lines a socket, query strings included; ours are one at open and one at close.
        "uvicorn": {"level": "WARNING"},
        "uvicorn.error": {"level": "WARNING"},
        "uvicorn.access": {"level": "WARNING"},
        "httpx": {"level": "WARNING"},
        "alembic": {"level": "WARNING"},
    },
}


def uvicorn_config(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    trusted_proxies: str = "127.0.0.1",
    log_config: dict[str, Any] | None = LOG_CONFIG,
    graceful_s: int = 4,
) -> uvicorn.Config:
    """
    Return the server's settings, each measured or reasoned in docs/operations.md.

    Args:
        trusted_proxies: addresses whose X-Forwarded-For names the visitor, comma-separated.
        graceful_s: how long open requests may go on after SIGTERM; replies get 5 s more (`ConversationHub.close`).
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        # wsproto: the default (websockets-sansio) prints a traceback for every bad UTF-8 frame, which anyone may send,
        # and fails Autobahn 7.1.5. Without compression it took 30 KiB a connection and the shortest burst p99.
        ws="wsproto",
        ws_per_message_deflate=False,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        lifespan="on",
        access_log=False,
        log_config=log_config,
        proxy_headers=True,
        forwarded_allow_ips=trusted_proxies,
        server_header=False,
        backlog=2048,
        timeout_graceful_shutdown=graceful_s,
    )


def listening_socket(host: str, port: int, *, user_timeout_ms: int = 10_000) -> socket.socket:
    """
    Return a bound TCP socket whose connections are dropped when their client stops reading.

    uvicorn closes such a connection only once its unsent bytes are gone, which is never (measured: 48 s and counting);
    TCP_USER_TIMEOUT makes the kernel give up after `user_timeout_ms`. Accepted sockets inherit it.

    Args:
        port: 0 for any free one.

    Raises:
        MerchantError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Bounds what the kernel holds for one slow reader; it would grow to 4 MiB by itself.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)
        listening.bind((host, port))
    except OSError as exc:
        listening.close()
        raise MerchantError(f"cannot listen on {host}:{port}: {exc.strerror}; choose another --host or --port") from exc
    return listening


def run(app: FastAPI, host: str, port: int, **options: Any) -> None:
    """
    Serve until SIGINT or SIGTERM; `options` are those of `uvicorn_config`. Blocks.

    Raises:
        MerchantError: the address is taken, or the database cannot be used.
    """
    with listening_socket(host, port) as listening:
        asyncio.run(app.state.check_storage())
        Server(uvicorn_config(app, host, port, **options)).run(sockets=[listening])


class Server(uvicorn.Server):
    """uvicorn, but being asked to stop and stopping is a success: exit status 0."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        # Else the signal is raised again once all is closed, and the process is reported as killed by it.
        self._captured_signals.clear()


# Small things


def origin_allowed(origin: str | None, host: str | None, allowed: Sequence[str]) -> bool:
    """
    Return whether a page at `origin` may open the socket of a server reached as `host`.

    No Origin header: not a browser, which is what the header protects. Compared as a whole, never by suffix.
    """
    if origin is None or "*" in allowed or origin.lower() in {each.lower().rstrip("/") for each in allowed}:
        return True
    scheme, _, rest = origin.lower().partition("://")
    default_port = {"http": ":80", "https": ":443"}.get(scheme)
    if default_port is None or not host:
        return False
    return rest.removesuffix(default_port) == host.lower().removesuffix(default_port)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _id_in(text: str | None) -> str | None:
    """Return the id of a frame that was refused, so that its sender can tell which one; None where it has none."""
    try:
        id_ = json.loads(text or "").get("id")
    except (ValueError, RecursionError, AttributeError):
        return None
    valid = isinstance(id_, str) and 0 < len(id_) <= MAX_ID_CHARS and id_.isprintable()
    return id_ if valid else None


async def _quietly(sending: Awaitable[None], timeout_s: float) -> None:
    """Send what the other side may no longer be there for."""
    try:
        async with asyncio.timeout(timeout_s):
            await sending
    except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
        pass


async def _logged(job: Callable[[], Awaitable[None]]) -> None:
    try:
        await job()
    except MerchantError as exc:
        logger.error("%s", exc)
    except Exception:
        logger.exception("a background job broke")


def _own_version() -> str:
    try:
        return version("zhanggui")
    except PackageNotFoundError:
        return "0"
