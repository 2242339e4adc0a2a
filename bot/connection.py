"""
One WebSocket, from accept to close: a reader always in `receive`, a handler, a writer. Visitors' and agents' alike.

The reader does nothing else, because uvicorn stops reading after one message that nobody took: a handler that waits
would leave pongs, `stop` and the close frame unread. The writer is the only one that sends. Knows no frame by name:
a subclass parses and does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Generic, TypeVar

from starlette.websockets import WebSocket, WebSocketDisconnect

from bot.conversations import CLOSE_TRY_LATER, Subscriber
from bot.errors import BadFrame, BotError, TooLong

logger = logging.getLogger(__name__)

F = TypeVar("F")
CLOSE_POLICY = 1008


class Connection(ABC, Generic[F]):
    """See the module. `outbox` is what has yet to be sent."""

    def __init__(
        self,
        websocket: WebSocket,
        address: str,
        outbox: Subscriber,
        *,
        send_timeout_s: float,
        hello_timeout_s: float,
        max_bad_frames: int,
    ) -> None:
        self.websocket = websocket
        self.address = address
        self.outbox = outbox
        self.greeted = False  # hello was said; until then only so long is waited
        self.n_in = self.n_out = self.n_bad = 0
        self.code: int | None = None  # what it was closed with, by either side
        self.began = time.monotonic()
        self._inbox: asyncio.Queue[str | None] = asyncio.Queue(32)  # None is a binary message
        self._send_timeout_s = send_timeout_s
        self._hello_timeout_s = hello_timeout_s
        self._max_bad_frames = max_bad_frames

    @abstractmethod
    def parse(self, text: str) -> F:
        """Return the frame that `text` holds; raises TooLong, BadFrame."""

    @abstractmethod
    async def do(self, frame: F) -> None:
        """Do what a frame asks for; any BotError is told to the sender."""

    @abstractmethod
    def refuse(self, error: Exception, frame: F | None, text: str | None) -> None:
        """Tell the sender why a frame was not done; `frame` is None where it could not be parsed."""

    @abstractmethod
    def left(self) -> None:
        """The connection is over; called once, before its tasks end."""

    async def run(self) -> None:
        """Serve until either side closes. What was asked for goes on without the connection."""
        tasks = [asyncio.create_task(work()) for work in (self._read, self._handle, self._write)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.left()
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    logger.error("connection %s: a task of it broke", self.address, exc_info=result)
        if self.code is None:
            self.code = self.outbox.close_code or 1011
            await quietly(self.websocket.close(self.code, self.outbox.close_reason), self._send_timeout_s)

    async def _read(self) -> None:
        # Not websocket.iter_text(): a binary frame, which anyone may send, makes it raise KeyError.
        while (message := await self.websocket.receive())["type"] == "websocket.receive":
            self.n_in += 1
            await self._inbox.put(message.get("text"))
        self.code = message.get("code", 1006)

    async def _write(self) -> None:
        try:
            while (frame := await self.outbox.next_frame()) is not None:
                async with asyncio.timeout(self._send_timeout_s):
                    await self.websocket.send_text(frame)
                self.n_out += 1
        except TimeoutError:
            # They do not read; nor would they read a close frame. The kernel drops the rest (see listening_socket).
            self.code = CLOSE_TRY_LATER
        except (WebSocketDisconnect, RuntimeError, OSError):
            self.code = self.code or 1006  # gone meanwhile; the reader sees it too

    async def _handle(self) -> None:
        while not self.outbox.ended:
            try:
                async with asyncio.timeout(None if self.greeted else self._hello_timeout_s):
                    text = await self._inbox.get()
            except TimeoutError:
                self.outbox.end(CLOSE_POLICY, "no hello")
                break
            frame: F | None = None
            try:
                if text is None:
                    raise BadFrame("binary frames are not spoken here; send text")
                frame = self.parse(text)
                await self.do(frame)
            except (BadFrame, TooLong) as exc:
                self.refuse(exc, frame, text)
                self.n_bad += 1
                if self.n_bad >= self._max_bad_frames:
                    self.outbox.end(CLOSE_POLICY, "too many bad frames")
            except BotError as exc:
                self.refuse(exc, frame, text)
            except Exception as exc:  # a bug: the sender gets a code, the connection stays
                logger.exception("connection %s: %s failed", self.address, type(frame).__name__)
                self.refuse(exc, frame, text)
        # The writer sends what is queued, then closes; until then there is nothing to do here.
        await asyncio.Event().wait()


async def quietly(sending: Awaitable[None], timeout_s: float) -> None:
    """Send what the other side may no longer be there for."""
    try:
        async with asyncio.timeout(timeout_s):
            await sending
    except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
        pass
