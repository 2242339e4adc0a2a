"""
An asyncio client of the WebSocket protocol: for the command line, load runs, tests, and other people's programs.

    async with connect("ws://127.0.0.1:8000/ws") as client:
        event = await client.ask("Do you ship to Canada?")
        print(event["text"], event["outcome"])

Knows frames and how to come back after a lost connection (`hello` with `after`, open questions sent again with
their id, the pause that a restarting server asks for). Does not know the server's code: only `bot.wire`'s numbers and
`bot.errors`. `bot/web/client.js` behaves the same; tests/clients.json holds both to it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_socket
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.typing import Subprotocol

from bot.errors import BotError
from bot.limits import is_loopback
from bot.wire import PROTOCOL, SUBPROTOCOL, dump_frame

logger = logging.getLogger(__name__)

Frame = dict[str, Any]

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
FINAL_CODES = {1008, 1009}  # what this client said is not wanted: saying it again helps nobody


class RequestFailed(BotError):
    """The server answered with a `failed` frame; `code`, `retryable` and `retry_after_s` are the frame's."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        self.code = str(frame.get("code", "internal"))
        self.retryable = bool(frame.get("retryable", False))
        self.retry_after_s = frame.get("retry_after_s")
        self.message = str(frame.get("message", ""))

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ConnectionLost(BotError):
    """The server could not be reached (again) within the time given."""

    code = "connection_lost"
    retryable = True

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"no connection to {self.url}: {self.reason}"


@dataclass(slots=True, eq=False)
class _Turn:
    id: str
    text: str
    attachments: tuple[str, ...] = ()
    n_failed: int = 0
    acknowledged: bool = False  # since it was sent last: stored
    frames: asyncio.Queue[Frame | BotError] = field(default_factory=asyncio.Queue)


def connect(
    url: str,
    *,
    conversation: str | None = None,
    token: str | None = None,
    after: int | None = None,
    locale: str | None = None,
    identity: str | None = None,
    n_retries: int = 0,
    open_timeout_s: float = 10.0,
    give_up_s: float = 60.0,
) -> Client:
    """
    Return a client; entering it connects and says hello.

    Args:
        url: ws:// or wss://, with the path: ws://127.0.0.1:8000/ws.
        conversation, token, after: of an earlier client, to go on where it ended.
        locale: BCP 47; the language of greetings, and of replies to questions whose language does not show.
        identity: signed by the store's backend; see docs/protocol.md.
        n_retries: how often a question is sent again, with the same id, after a failure that says it is retryable.
        give_up_s: how long to try to come back after a lost connection.
    """
    return Client(url, conversation, token, after, locale, identity, n_retries, open_timeout_s, give_up_s)


class Client:
    """
    One conversation over as many connections as it takes.

    Entering raises ConnectionLost when the server cannot be reached and RequestFailed when it refuses the hello.
    Several tasks may ask at once; the server answers in order.
    """

    def __init__(
        self,
        url: str,
        conversation: str | None,
        token: str | None,
        after: int | None,
        locale: str | None,
        identity: str | None,
        n_retries: int,
        open_timeout_s: float,
        give_up_s: float,
    ) -> None:
        self.url = url
        self.conversation = conversation
        self.token = token
        self.seq = after or 0  # of the last event seen
        self.welcome: Frame = {}  # the latest
        self.events: list[Frame] = []  # every event seen, in order, each once
        self.n_connections = 0
        self.restarting = False  # the server said that it restarts, and is not back yet
        self._identity = identity
        self._hold_s: float | None = None  # the server asked to wait this long before coming back
        self._groups: dict[str, list[str]] = {}  # last turn -> all turns that its reply answers
        self._resume_from_start = after is not None
        self._locale = locale
        self._n_retries = n_retries
        self._open_timeout_s = open_timeout_s
        self._give_up_s = give_up_s
        self._turns: dict[str, _Turn] = {}
        self._socket: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._later: set[asyncio.TimerHandle] = set()
        self._sending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(opened), name="zhanggui-client")
        try:
            await opened
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; the conversation stays, and a reply under way is still stored."""
        for handle in self._later:
            handle.cancel()
        self._later.clear()
        for task in (self._task, *self._sending):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._task = None

    # Asking

    async def ask(self, text: str, *, id: str | None = None, attachments: Sequence[str] = ()) -> Frame:
        """
        Ask, and return the `event` frame of the reply.

        Messages sent quickly one after the other may all get the same reply: its `turns` names them.

        Args:
            attachments: ids that `attach` gave; with some, `text` may be empty.

        Raises:
            RequestFailed: the server refused the question, or the reply failed; `retryable` says if to try again.
            ConnectionLost: the connection was lost and did not come back.
        """
        last: Frame = {}
        async with aclosing(self.stream(text, id=id, attachments=attachments)) as frames:
            async for frame in frames:
                last = frame
        return last

    async def stream(
        self, text: str, *, id: str | None = None, attachments: Sequence[str] = ()
    ) -> AsyncGenerator[Frame, None]:
        """
        Ask, and yield `status`, `delta` and `partial` frames as they come; last the reply's `event`.

        A `partial` (after a lost connection) replaces the deltas before it. Closing the generator early stops the
        reply. Raises as `ask`.
        """
        turn = _Turn(id or uuid.uuid4().hex, text, tuple(attachments))
        self._turns[turn.id] = turn
        over = False
        try:
            if self._task is None or self._task.done():
                raise ConnectionLost(self.url, "the client is closed")
            await self._send_ask(turn)
            while not over:
                frame = await turn.frames.get()
                if isinstance(frame, BotError):
                    over = True
                    raise frame
                over = frame["type"] == "event"
                yield frame
        finally:
            self._turns.pop(turn.id, None)
            if not over:
                await self.send("stop", turn=turn.id)

    async def attach(self, file: bytes | Path, name: str = "") -> Frame:
        """
        Upload a picture or a PDF, and return what the server says of it: {id, kind, mime, name, size_bytes, …}.

        Raises:
            RequestFailed: it was refused: too long, of another type, too many.
            ConnectionLost: the server could not be reached.
        """
        parts = urlsplit(self.url)
        scheme = {"wss": "https"}.get(parts.scheme, "http")
        path = parts.path.rpartition("/")[0]
        url = f"{scheme}://{parts.netloc}{path}/v1/conversations/{self.conversation}/attachments"
        if isinstance(file, Path):
            name = name or file.name
            file = await asyncio.to_thread(file.read_bytes)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/octet-stream"}
        if self._identity:
            headers["X-Zhanggui-Identity"] = self._identity
        try:
            async with httpx.AsyncClient(trust_env=not self._is_local, timeout=60.0) as http:
                response = await http.post(f"{url}?name={quote(name)}", content=file, headers=headers)
                said: Frame = response.json()
        except (httpx.HTTPError, ValueError) as exc:
            raise ConnectionLost(url, str(exc) or type(exc).__name__) from exc
        if response.status_code != 201:
            raise RequestFailed(said.get("error", {}))
        return said

    async def send(self, type_: str, **fields: Any) -> None:
        """Send one frame if connected; whether it arrived is not known (questions: use `ask`)."""
        if self._socket is not None:
            with suppress(ConnectionClosed):  # the run loop sees it too, and comes back
                await self._socket.send(dump_frame(type_, **fields))

    # Connecting

    async def _run(self, opened: asyncio.Future[None]) -> None:
        try:
            await self._stay_connected(opened)
        except Exception as exc:  # nobody awaits this task: whoever waits for a reply must hear of it
            logger.exception("the client broke")
            self._end(opened, ConnectionLost(self.url, repr(exc)))

    async def _stay_connected(self, opened: asyncio.Future[None]) -> None:
        """Connect, and come back whenever the connection is lost, until it stays away for too long."""
        clock = asyncio.get_running_loop().time
        lost_at = clock()
        delay_s = FIRST_DELAY_S
        while True:
            reason = "closed by the server"
            try:
                async with asyncio.timeout(self._open_timeout_s):
                    socket = await self._open()
                try:
                    async with asyncio.timeout(self._open_timeout_s):
                        await self._hello(socket)
                    self._socket = socket
                    self.n_connections += 1
                    if not opened.done():
                        opened.set_result(None)
                    # Those acknowledged are the server's: on joining it tells of replies, and of failed ones.
                    for turn in list(self._turns.values()):
                        if not turn.acknowledged:
                            await self._send_ask(turn)
                    async for message in socket:
                        lost_at, delay_s = clock(), FIRST_DELAY_S  # it works: start counting anew
                        self._take(json.loads(message))
                    lost_at = clock()
                finally:
                    self._socket = None
                    await socket.close()
            except RequestFailed as exc:
                if not exc.retryable:
                    self._end(opened, exc)
                    return
                reason, self._hold_s = str(exc), exc.retry_after_s
            except ConnectionClosed as exc:
                reason = str(exc)
                if exc.rcvd is not None and exc.rcvd.code in FINAL_CODES:
                    self._end(opened, ConnectionLost(self.url, reason))
                    return
            except InvalidURI as exc:
                self._end(opened, ConnectionLost(self.url, str(exc)))
                return
            except (OSError, TimeoutError, WebSocketException, ValueError, KeyError) as exc:  # last two: not our server
                reason = str(exc) or type(exc).__name__
            if not opened.done() or clock() - lost_at > self._give_up_s:
                self._end(opened, ConnectionLost(self.url, reason))
                return
            # Half of it at random: after a crash all clients come back at once otherwise.
            hold_s, self._hold_s = self._hold_s, None
            await asyncio.sleep(random.uniform(delay_s / 2, delay_s) if hold_s is None else hold_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    async def _open(self) -> ClientConnection:
        return await open_socket(
            self.url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,
            proxy=None if self._is_local else True,  # a proxy of the environment cannot reach this machine
            open_timeout=None,
            close_timeout=2.0,
            max_size=1 << 20,
        )

    @property
    def _is_local(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        return host == "localhost" or is_loopback(host)

    async def _hello(self, socket: ClientConnection) -> None:
        resuming = self.conversation is not None
        after = self.seq if resuming and (self.n_connections or self._resume_from_start) else None
        await socket.send(
            dump_frame(
                "hello",
                protocol=PROTOCOL,
                conversation=self.conversation,
                token=self.token,
                after=after,
                locale=self._locale,
                identity=self._identity,
            )
        )
        frame = json.loads(await socket.recv())
        while frame["type"] == "failed" and frame.get("code") == "bad_identity":
            logger.warning("the server did not accept the identity: %s", frame.get("message"))
            self._identity = None  # it goes on unsigned
            frame = json.loads(await socket.recv())
        if frame["type"] == "failed":
            raise RequestFailed(frame)
        self.welcome, self.restarting = frame, False
        self.conversation, self.token = frame["conversation"], frame["token"]
        if after is None:
            self.seq = frame["seq"]

    def _end(self, opened: asyncio.Future[None], error: BotError) -> None:
        if not opened.done():
            opened.set_exception(error)
        for turn in self._turns.values():
            turn.frames.put_nowait(error)

    async def _send_ask(self, turn: _Turn) -> None:
        turn.acknowledged = False
        await self.send("ask", id=turn.id, text=turn.text, attachments=list(turn.attachments) or None)

    # Frames

    def _take(self, frame: Frame) -> None:
        type_ = frame["type"]
        if type_ == "reconnect":
            self.restarting, self._hold_s = True, frame["after_ms"] / 1000
            return
        if type_ == "failed" and frame.get("code") == "restarting":
            return  # not stored; it is sent again after the next welcome
        id_ = frame.get("turn") or frame.get("id") or ""
        if "turns" in frame:  # several messages get one reply, and all who wait for it hear of it
            self._groups[id_] = frame["turns"]
        turns = [self._turns[each] for each in self._groups.get(id_, (id_,)) if each in self._turns]
        if type_ == "event":
            if frame["seq"] <= self.seq:
                return
            self.seq = frame["seq"]  # numbers may be left out: agents' notes are not for visitors
            self.events.append(frame)
            if frame.get("kind") == "message" and frame.get("role") != "visitor":
                self._groups.pop(id_, None)
                for turn in turns:
                    turn.frames.put_nowait(frame)
        elif not turns:
            if type_ == "failed":
                logger.warning("the server refused a frame: %s", frame.get("message"))
        elif type_ == "failed":
            for turn in turns:
                # Before the acknowledgement it tells of an earlier try: the question is on its way again.
                if turn.acknowledged or "turn" not in frame:
                    self._failed(turn, RequestFailed(frame))
        elif type_ == "ack":
            turns[0].acknowledged = True
        else:
            for turn in turns:
                turn.frames.put_nowait(frame)

    def _failed(self, turn: _Turn, error: RequestFailed) -> None:
        if not error.retryable or turn.n_failed >= self._n_retries:
            turn.frames.put_nowait(error)
            return
        turn.n_failed += 1

        def again() -> None:
            self._later.discard(handle)
            task = asyncio.create_task(self._send_ask(turn))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

        handle = asyncio.get_running_loop().call_later(error.retry_after_s or 1.0, again)
        self._later.add(handle)
