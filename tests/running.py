"""
A real server around fakes, in the test's own event loop and over real sockets; a bare client; a proxy that cuts.

The loop is shared so that a test can look into the hub while frames go over the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_socket
from websockets.typing import Origin, Subprotocol

from bot.agents.accounts import Accounts
from bot.agents.desk import Desk, DeskRules
from bot.agents.faq_file import FaqFile
from bot.agents.passwords import Passwords
from bot.agents.records import Records
from bot.attachments import AttachmentStore
from bot.conversations import ConversationHub
from bot.engine import Engine
from bot.fine_tuning_api import FineTuning
from bot.identity import Identities
from bot.metrics import Metrics
from bot.server import IndexStatus, Parts, Server, ServerLimits, create_app, listening_socket, uvicorn_config
from bot.settings import StoreProfile
from bot.storage import Storage
from bot.wire import ServerFrame
from tests.fakes import RELEASE, ScriptedAnswerer, store_profile

WEB_DIR = Path(__file__).parent.parent / "bot" / "web"

Frame = dict[str, Any]
# Every frame that a test hears is one that the published schemas know, to its last field.
SERVER_FRAME: TypeAdapter[ServerFrame] = TypeAdapter(ServerFrame)


@dataclass(slots=True)
class Running:
    """What a test may look at and reach."""

    port: int
    parts: Parts
    answerer: ScriptedAnswerer
    hub: ConversationHub
    storage: Storage

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def idle(self) -> None:
        """Return once nothing is left behind: no conversation, no task, no reply being made."""
        await until(lambda: not (self.hub.n_live or self.hub.n_tasks or self.answerer.n_open))


class LoopServer(Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the test runner's own handlers stay


def parts_of(
    database: Path,
    answerer: ScriptedAnswerer,
    *,
    engine: Engine | None = None,
    index: Callable[[], IndexStatus] = lambda: IndexStatus(True, "k0", 3),
    web_dir: Path = WEB_DIR,
    store_dir: Path | None = None,
    limits: ServerLimits | None = None,
    attachments: bool = True,
    agents: bool = False,
    desk_rules: DeskRules | None = None,
    store: StoreProfile | None = None,
    identity_secret: str | None = None,
    api_key: str | None = None,
    fine_tuning: tuple[FineTuning, Callable[[], Awaitable[None]]] | None = None,
    **hub_options: Any,
) -> Parts:
    """Return the parts of a server around fakes; with `agents` there is an inbox."""
    storage, metrics, store = Storage(database), Metrics(), store or store_profile()
    hub = ConversationHub(storage, answerer, recorder=metrics, **hub_options)
    records = Records(storage)
    desk = Desk(
        hub=hub,
        records=records,
        accounts=Accounts(records, passwords=Passwords(rounds=1, memory_kib=64)),
        answerer=answerer,
        engine=engine,
        store=store,
        recorder=metrics,
        faq_file=FaqFile(store_dir) if store_dir is not None else None,
        rules=desk_rules,
    )
    return Parts(
        storage=storage,
        hub=hub,
        answerer=answerer,
        engine=engine,
        index=index,
        release=lambda: RELEASE,
        store=store,
        promotions=lambda: [{"id": "p1", "title": "Double Eleven"}],
        products=lambda: [{"id": "sku-1", "title": "Lamp", "price": "59.00"}],
        metrics=metrics,
        web_dir=web_dir,
        store_dir=store_dir,
        attachments=AttachmentStore(database.parent / "attachments") if attachments else None,
        desk=desk if agents else None,
        identities=Identities(identity_secret),
        fine_tuning=fine_tuning and fine_tuning[0],
        jobs=() if fine_tuning is None else (fine_tuning[1],),
        api_key=api_key,
        limits=limits or ServerLimits(coalesce_s=0.0, drain_s=1.0, reconnect_after_ms=(50, 150)),
    )


@asynccontextmanager
async def running_server(
    database: Path, answerer: ScriptedAnswerer | None = None, *, user_timeout_ms: int = 10_000, **options: Any
) -> AsyncIterator[Running]:
    """Run a server on a free port until the block ends; `options` are those of `parts_of`."""
    answerer = answerer or ScriptedAnswerer()
    parts = parts_of(database, answerer, **options)
    with listening_socket("127.0.0.1", 0, user_timeout_ms=user_timeout_ms) as listening:
        port = listening.getsockname()[1]
        config = uvicorn_config(create_app(parts), "127.0.0.1", port, log_config=None, graceful_s=1)
        server = LoopServer(config)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            await until(lambda: server.started or task.done())
            if task.done():
                task.result()
            yield Running(port, parts, answerer, parts.hub, parts.storage)
        finally:
            server.should_exit = True
            await task


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Return once `condition()` holds; fail when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


class Wire:
    """A bare client: says exactly what it is told, and keeps all it hears."""

    def __init__(self, url: str, *, origin: str | None = None, subprotocol: str | None = "zhanggui.v1") -> None:
        self.url = url
        self.origin = origin
        self.subprotocol = subprotocol
        self.heard: list[Frame] = []

    async def __aenter__(self) -> Self:
        self.socket: ClientConnection = await open_socket(
            self.url,
            origin=Origin(self.origin) if self.origin else None,
            subprotocols=[Subprotocol(self.subprotocol)] if self.subprotocol else None,
            compression=None,
            proxy=None,
            close_timeout=2.0,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.socket.close()

    async def say(self, type_: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": type_, **fields}))

    async def hear(self, type_: str | None = None, timeout_s: float = 30.0, **fields: Any) -> Frame:
        """Return the next frame, or the next one of this type and with these fields."""
        async with asyncio.timeout(timeout_s):
            while True:
                frame: Frame = json.loads(await self.socket.recv())
                SERVER_FRAME.validate_python(frame)
                self.heard.append(frame)
                if type_ in (None, frame["type"]) and fields.items() <= frame.items():
                    return frame

    async def hello(self, **fields: Any) -> Frame:
        await self.say("hello", protocol=1, **fields)
        return await self.hear("welcome")

    async def ask(self, id_: str, text: str) -> Frame:
        """Ask, and return the reply's event."""
        await self.say("ask", id=id_, text=text)
        return await self.hear("event", role="bot", turn=id_)

    async def nothing_more(self) -> None:
        """Check that no frame waits: a pong comes next."""
        await self.say("ping")
        assert (await self.hear())["type"] == "pong"

    def of(self, type_: str, **fields: Any) -> list[Frame]:
        return [f for f in self.heard if f["type"] == type_ and fields.items() <= f.items()]


@dataclass(slots=True)
class CuttingProxy:
    """A TCP proxy to a server that cuts each connection after so many bytes from the server; None: never."""

    target_port: int
    cut_after_bytes: int | None = None
    port: int = 0
    n_cut: int = 0
    n_bytes: int = 0  # from the server, over all connections
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)  # connections that may be cut
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [*self._tasks, *self._closing]
        self.cut_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def n_open(self) -> int:
        return len(self._tasks)

    def cut_all(self) -> None:
        """Cut every open connection now."""
        for task in list(self._tasks):
            task.cancel()

    def cut_one(self, rng: random.Random) -> None:
        """Cut one open connection, if there is any."""
        if self._tasks:
            self.n_cut += 1
            rng.choice(sorted(self._tasks, key=lambda task: task.get_name())).cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers, up, left = [writer], None, self.cut_after_bytes
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            writers.append(upstream_writer)
            up = asyncio.create_task(_pump(reader, upstream_writer))
            while data := await upstream_reader.read(4096):
                if left is not None:
                    data, left = data[:left], left - len(data)
                self.n_bytes += len(data)
                writer.write(data)
                await writer.drain()
                if left is not None and left <= 0:
                    self.n_cut += 1
                    break
        except (asyncio.CancelledError, OSError):
            pass
        finally:
            self._tasks.discard(task)  # nobody cuts it again while it closes
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            for each in writers:
                each.transport.abort()  # as a lost network does: no close frame, no FIN
            if up is not None:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)
            for each in writers:
                with suppress(OSError):
                    await each.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
