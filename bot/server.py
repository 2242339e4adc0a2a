"""
The web server: WebSocket `/ws`, the store's pages and pictures, health, metrics. `bot.openai_api` has OpenAI's API.

Knows sockets, headers and limits; knows neither SQL nor how a reply is made. `serve.py` makes the `Parts` and calls
`create_app` and `run`. docs/protocol.md is the long form of what goes over the socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, WebSocket
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from bot.access import KeyGate
from bot.agents.api import inbox_routes, is_agent, session_of
from bot.agents.desk import Desk
from bot.agents.frames import SUBPROTOCOL as AGENT_SUBPROTOCOL
from bot.agents.socket import AgentConnection, refuse_unsigned
from bot.asyncapi import asyncapi
from bot.attachments import MAX_FILE_BYTES, MAX_PER_MESSAGE, SUFFIXES, AttachmentStore
from bot.connection import Connection, quietly
from bot.conversations import CLOSE_RESTART, CLOSE_TRY_LATER, Answerer, ConversationHub, Subscriber
from bot.engine import Engine, EngineState, ReleaseStatus
from bot.errors import (
    BadFrame,
    BadIdentity,
    BotError,
    ClientError,
    MerchantError,
    Restarting,
    StorageUnavailable,
    UnknownConversation,
)
from bot.fine_tuning_api import FineTuning, fine_tuning_routes
from bot.identity import Identities
from bot.language import reply_language
from bot.limits import Places, RateLimit, is_loopback
from bot.messages import Customer, Release
from bot.metrics import CONTENT_TYPE, Metrics
from bot.openai_api import openai_routes
from bot.settings import StoreProfile
from bot.storage import Conversation, Storage
from bot.uploads import attachment_routes
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
    LeaveMessage,
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
TYPING_EVERY_S = 0.5


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
    uploads_per_minute: int = 30  # files of one address
    drain_s: float = 4.0  # replies under way may go on so long after SIGTERM
    reconnect_after_ms: tuple[int, int] = (500, 2500)  # when to come back; each connection gets its own moment


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
    attachments: AttachmentStore | None = None  # None: no files are taken
    desk: Desk | None = None  # None: there are no agents
    identities: Identities = field(default_factory=lambda: Identities(None))
    fine_tuning: FineTuning | None = None  # files and jobs; None: there are none
    api_key: str | None = None  # for metrics and OpenAI's API; None: this machine only
    limits: ServerLimits = field(default_factory=ServerLimits)
    releases: Callable[[], ReleaseStatus] | None = None  # None: the engine is no release's
    jobs: tuple[Callable[[], Awaitable[None]], ...] = ()  # run from start to end beside the server: building an index


class App(FastAPI):
    """
    FastAPI for requests; sockets go straight to their endpoint.

    The way through middlewares, router and dependencies would stay on the stack of every open socket: 8 KiB each.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sockets: dict[str, Callable[[WebSocket], Awaitable[None]]] = {}  # path -> endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and (endpoint := self.sockets.get(scope["path"])) is not None:
            await endpoint(WebSocket(scope, receive, send))
        else:
            await super().__call__(scope, receive, send)


def create_app(parts: Parts) -> FastAPI:
    """Return the ASGI app. Its lifespan opens the storage, starts the engine, and closes what it opened."""
    server = _Server(parts)
    app = App(
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
    app.add_api_route("/asyncapi.json", lambda: JSONResponse(asyncapi()), tags=["operations"], response_model=None)
    app.add_api_route("/store.json", server.storefront, tags=["store"], response_model=None)
    app.sockets["/ws"] = server.chat
    app.include_router(
        openai_routes(
            answerer=parts.answerer,
            release=parts.release,
            engine=parts.engine,
            recorder=parts.metrics,
            admit=server.admit_request,
        )
    )
    if parts.fine_tuning is not None:
        app.include_router(fine_tuning_routes(parts.fine_tuning, own_origin=own_origin))
    if parts.attachments is not None:
        app.routes.extend(
            attachment_routes(
                parts.attachments,
                authenticate=server.authenticate_files,
                is_agent=server.is_agent,
                allows=server.allows,
                admit=server.admit_upload,
            )
        )
    if parts.desk is not None:
        app.include_router(
            inbox_routes(parts.desk, own_origin=own_origin, address_of=lambda request: _address(request.scope))
        )
        app.sockets["/ws/agent"] = server.agent
    app.add_middleware(KeyGate, key=parts.api_key)
    if parts.store_dir is not None and (parts.store_dir / "images").is_dir():
        app.mount("/store/images", StoreImages(directory=parts.store_dir / "images"))
    app.mount("/", Pages(directory=parts.web_dir, html=True, check_dir=False))
    app.state.check_storage = server.check_storage
    app.state.drain = server.drain
    return app


class _Server:
    """One running server: its limits, its counts, and the endpoints."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        limits = parts.limits
        self.places = Places(limits.sockets_per_address)
        self.conversation_asks = RateLimit(limits.asks_per_minute)
        self.address_asks = RateLimit(limits.asks_per_minute_and_address)
        self.address_uploads = RateLimit(limits.uploads_per_minute)
        self.connections: set[ChatConnection] = set()
        self.agents: set[AgentConnection] = set()
        self.draining = False
        parts.metrics.watch("hub", self._hub_figures)
        if parts.desk is not None:
            parts.metrics.watch("desk", parts.desk.figures)
        parts.metrics.watch("index", self._index_figures)
        if parts.fine_tuning is not None:
            parts.metrics.watch("jobs", parts.fine_tuning.figures)
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
        parts.hub.hold_recovery()  # until index and engine can answer
        tasks = [asyncio.create_task(self._bring_up(), name="bring-up")]
        desk_jobs = () if parts.desk is None else (parts.desk.run,)
        tasks += [asyncio.create_task(_logged(job), name="job") for job in (*desk_jobs, *parts.jobs)]
        try:
            yield
        finally:
            # The sockets are closed by now. Replies are made to their end first: they need engine and storage.
            await parts.hub.close(1.0 if self.draining else 5.0)
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

    async def drain(self) -> None:
        """
        Before the server stops: tell each connection when to come back, let replies under way end, close with 1012.

        Everyone at once would be the new server's first load; each gets a moment of its own.
        """
        self.draining = True
        earliest, latest = self.parts.limits.reconnect_after_ms
        latest += len(self.connections)
        everyone: list[Connection[Any]] = [*self.connections, *self.agents]
        for connection in everyone:
            notice = dump_frame("reconnect", after_ms=random.randint(earliest, latest), reason="restart")
            connection.outbox.push(notice)
        await self.parts.hub.drain(self.parts.limits.drain_s)
        everyone = [*self.connections, *self.agents]
        for connection in everyone:
            connection.outbox.end(CLOSE_RESTART, "restarting")  # those without a conversation, too
        deadline = time.monotonic() + 1.0
        while (self.connections or self.agents) and time.monotonic() < deadline:  # noqa: ASYNC110 - what is queued is still sent
            await asyncio.sleep(0.01)

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
            "release": None if self.parts.releases is None else asdict(self.parts.releases()),
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

    async def authenticate_files(self, conversation: str, token: str, identity: str | None) -> None:
        """
        Return if whoever has `token` may have the files of `conversation`: a customer's are that customer's alone.

        Raises:
            UnknownConversation: the token, or the identity that a customer's conversation needs, is not the right one.
        """
        await self.parts.storage.authenticate(conversation, token)
        owner = (await self.parts.storage.get(conversation)).customer
        if owner is None:
            return
        try:
            customer = self.parts.identities.verify(identity) if identity else None
        except BadIdentity:
            customer = None
        if customer is None or customer.id != owner.id:
            raise UnknownConversation

    def admit_upload(self, request: Request) -> None:
        """Count one file; raises RateLimited, or Restarting."""
        if self.draining:
            raise Restarting
        address = _address(request.scope)
        if self.limited(address):
            self.address_uploads.hit(address)

    def allows(self, request: Request) -> bool:
        """Return whether a page of the request's origin may use what visitors may."""
        headers = request.headers
        return origin_allowed(headers.get("origin"), headers.get("host"), self.parts.limits.allowed_origins)

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
            await quietly(websocket.send_text(frame), limits.send_timeout_s)
            await quietly(websocket.close(CLOSE_TRY_LATER, "too many connections"), limits.send_timeout_s)
            return
        connection = ChatConnection(self, websocket, address)
        self.connections.add(connection)
        self.parts.metrics.connection_opened()
        logger.info("connection open: %s (%d open)", address, len(self.connections))
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)
            self.parts.metrics.connection_closed()
            if self.limited(address):
                self.places.leave(address)
            logger.info("connection closed: %s %s", address, connection.summary())

    async def agent(self, websocket: WebSocket) -> None:
        """An agent's socket: the inbox's own page, with its session's cookie."""
        parts, limits = self.parts, self.parts.limits
        assert parts.desk is not None
        address = _address(websocket.scope)
        # A cookie goes along with any page's handshake: only our own page may use it, and a browser says whose it is.
        if websocket.headers.get("origin") is None or not own_origin(websocket):
            logger.info("agent refused: %s, origin %.100r", address, websocket.headers.get("origin"))
            await websocket.close()  # before accepting: a 403
            return
        try:
            session = await session_of(parts.desk, websocket)
        except BotError as exc:
            await quietly(refuse_unsigned(websocket, exc), limits.send_timeout_s)
            return
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(AGENT_SUBPROTOCOL if AGENT_SUBPROTOCOL in offered else None)
        connection = AgentConnection(
            parts.desk,
            session,
            websocket,
            address,
            max_frames=4 * limits.max_frames,  # of all the conversations that are open in it
            coalesce_s=limits.coalesce_s,
            send_timeout_s=limits.send_timeout_s,
            hello_timeout_s=limits.hello_timeout_s,
            max_bad_frames=limits.max_bad_frames,
        )
        self.agents.add(connection)
        logger.info("agent %s here: %s", session.agent.id, address)
        try:
            await connection.run()
        finally:
            self.agents.discard(connection)
            logger.info("agent %s gone: %s, code %s", session.agent.id, address, connection.code)

    async def is_agent(self, request: Request) -> bool:
        """Return whether a signed-in agent asks."""
        return self.parts.desk is not None and await is_agent(self.parts.desk, request)


class ChatConnection(Connection[ClientFrame]):
    """A visitor's WebSocket."""

    def __init__(self, server: _Server, websocket: WebSocket, address: str) -> None:
        limits = server.parts.limits
        super().__init__(
            websocket,
            address,
            Subscriber(max_frames=limits.max_frames, coalesce_s=limits.coalesce_s),
            send_timeout_s=limits.send_timeout_s,
            hello_timeout_s=limits.hello_timeout_s,
            max_bad_frames=limits.max_bad_frames,
        )
        self._server = server
        self._hub = server.parts.hub
        self._limits = limits
        self._conversation: str | None = None
        self._typing = False
        self._typed_at = 0.0

    def summary(self) -> str:
        """Return what the log says of a closed connection; nothing a visitor wrote."""
        return (
            f"code {self.code}, conversation {self._conversation}, {self.n_in} frames in ({self.n_bad} bad), "
            f"{self.n_out} out, {time.monotonic() - self.began:.1f} s"
        )

    def left(self) -> None:
        self._hub.unsubscribe(self.outbox)

    def parse(self, text: str) -> ClientFrame:
        return parse_frame(text)

    def refuse(self, error: Exception, frame: ClientFrame | None, text: str | None) -> None:
        code = error.code if isinstance(error, BotError) else "internal"
        self._server.parts.metrics.frame_failed(code)
        if not isinstance(error, ClientError):
            logger.warning("conversation %s: frame refused: %s", self._conversation, code)
        id_ = frame.id if isinstance(frame, Ask | LeaveMessage) else _id_in(text) if frame is None else None
        turn = frame.turn if isinstance(frame, Stop | Regenerate) else None
        self.outbox.push(dump_failed(error, id_=id_, turn=turn))
        if isinstance(error, Restarting) and self._conversation is None:
            self.outbox.end(CLOSE_RESTART, "restarting")

    async def do(self, frame: ClientFrame) -> None:
        if isinstance(frame, Ping):
            self.outbox.push(dump_frame("pong"))
            return
        if isinstance(frame, Hello):
            await self._hello(frame)
            return
        conversation = self._conversation
        if conversation is None:
            raise BadFrame("say hello first")
        match frame:
            case Ask():
                self._server.admit_ask(self.address, conversation)
                self._typing = False  # they have sent what they typed
                files = await self._files(conversation, frame.attachments)
                await self._hub.ask(conversation, frame.id, frame.text, attachments=files, by=self.outbox)
            case Stop():
                self._hub.stop(conversation, frame.turn)
            case Regenerate():
                self._server.admit_ask(self.address, conversation)
                await self._hub.regenerate(conversation, frame.turn)
            case Rate():
                await self._hub.rate(conversation, frame.seq, frame.value, frame.comment)
            case Handoff():
                await self._hub.handoff(conversation, frame.reason)
            case Close():
                await self._hub.close_by_visitor(conversation, frame.score, frame.comment)
            case LeaveMessage():
                self._server.admit_ask(self.address, conversation)
                await self._hub.leave_message(conversation, frame.id, frame.email, frame.text, by=self.outbox)
            case Typing():
                await self._type(conversation, frame.on)

    async def _files(self, conversation: str, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return what the event says of the files that a message brings; raises BadFrame."""
        if not ids:
            return []
        store = self._server.parts.attachments
        found = [] if store is None else await store.find(conversation, ids)
        missing = set(ids) - {file.id for file in found}
        if missing:
            raise BadFrame(f"'attachments': {min(missing)!r} is no file of this conversation; upload it first")
        return [file.data() for file in found]

    async def _type(self, conversation: str, on: bool) -> None:
        """Relay that the visitor types, at most so often; that they stopped, whenever it was said that they type."""
        now = time.monotonic()
        if (on and now - self._typed_at < TYPING_EVERY_S) or (not on and not self._typing):
            return
        self._typing, self._typed_at = on, now
        await self._hub.typing(conversation, "visitor", on, by=self.outbox)

    async def _hello(self, hello: Hello) -> None:
        if self._conversation is not None:
            raise BadFrame("hello was said already; open another connection for another conversation")
        if hello.protocol != PROTOCOL:
            raise BadFrame(f"protocol {hello.protocol} is not spoken here; this server speaks {PROTOCOL}")
        customer = self._customer(hello.identity)
        if hello.conversation is None:
            self._server.admit_ask(self.address, None)
            self.outbox.customer = customer
            self._conversation = await self._hub.start(
                self.outbox, hello.locale, lambda head, token: self._welcome(head, token, hello.locale), customer
            )
            self.greeted = True
            return
        token = hello.token
        if token is None:
            raise UnknownConversation
        await self._server.parts.storage.authenticate(hello.conversation, token)
        self.outbox.customer = customer
        await self._hub.tie(hello.conversation, customer)
        await self._hub.subscribe(
            self.outbox,
            hello.conversation,
            after=hello.after,
            welcome=lambda head: self._welcome(head, token, hello.locale or head.locale),
        )
        self._conversation = hello.conversation
        self.greeted = True

    def _customer(self, identity: str | None) -> Customer | None:
        """Return whom the store signed for; a bad signature is told, and the visitor goes on as nobody we know."""
        if identity is None:
            return None
        try:
            return self._server.parts.identities.verify(identity)
        except BadIdentity as exc:
            self._server.parts.metrics.frame_failed(exc.code)
            self.outbox.push(dump_failed(exc))
            return None

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
            limits={**LIMITS, "asks_per_minute": self._limits.asks_per_minute, **self._attachment_limits()},
            customer=None if head.customer is None else _named(head.customer.id, head.customer.name),
            **self._human(head),
        )

    def _human(self, head: Conversation) -> dict[str, Any]:
        """Return what `welcome` says of agents; nothing where there are none."""
        desk = self._server.parts.desk
        if desk is None:
            return {}
        agent = desk.name_of(head.owner)
        return {"human": desk.availability(head.id), "agent": None if agent is None else {"name": agent}}

    def _attachment_limits(self) -> dict[str, Any]:
        if self._server.parts.attachments is None:
            return {}
        return {
            "attachment_bytes": MAX_FILE_BYTES,
            "attachments": MAX_PER_MESSAGE,
            "attachment_types": list(SUFFIXES),
        }


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
    The files of bot/web, by name: the demo page, the widget and its modules, the inbox.

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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the visitors first: uvicorn itself would only cut them."""
        drain = getattr(getattr(self.config.app, "state", None), "drain", None)
        if drain is not None and not self.force_exit:
            await drain()
        await super().shutdown(sockets)

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


def _named(id_: str, name: str | None) -> dict[str, str]:
    return {"id": id_} if name is None else {"id": id_, "name": name}


def own_origin(connection: HTTPConnection) -> bool:
    """Return whether a request or socket comes from a page of this server itself, or from no browser."""
    return origin_allowed(connection.headers.get("origin"), connection.headers.get("host"), ())


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
