"""
An agent's WebSocket, `/ws/agent`: frames in, frames out. What they mean is in `bot.agents.desk`.

Each conversation that is open here is followed through a `Subscriber` of its own, as a visitor's tab follows it; its
frames get the conversation's id and go out through the connection's one writer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.websockets import WebSocket

from bot.agents.desk import CLOSE_SIGNED_OUT, Desk
from bot.agents.frames import (
    MAX_OPEN,
    SUBPROTOCOL,
    Accept,
    Action,
    AgentClose,
    AgentFrame,
    AgentHello,
    AgentPing,
    AgentTyping,
    Leave,
    Note,
    Open,
    Return,
    Say,
    SetPresence,
    Suggest,
    Summarize,
    TakeOver,
    Transfer,
    parse_agent_frame,
    with_conversation,
)
from bot.agents.people import Agent, Session
from bot.agents.summary import summary_of
from bot.connection import Connection
from bot.conversations import Subscriber
from bot.errors import BadFrame, BotError, Taken
from bot.storage import Conversation, Sent
from bot.wire import PROTOCOL, dump_failed, dump_frame

logger = logging.getLogger(__name__)


class AgentConnection(Connection[AgentFrame]):
    """One tab of one agent; a `Seat` of the desk."""

    def __init__(
        self,
        desk: Desk,
        session: Session,
        websocket: WebSocket,
        address: str,
        *,
        max_frames: int,
        coalesce_s: float,
        send_timeout_s: float,
        hello_timeout_s: float,
        max_bad_frames: int,
    ) -> None:
        super().__init__(
            websocket,
            address,
            Subscriber(max_frames=max_frames, coalesce_s=coalesce_s, audience="agent"),
            send_timeout_s=send_timeout_s,
            hello_timeout_s=hello_timeout_s,
            max_bad_frames=max_bad_frames,
        )
        self._desk = desk
        self._session = session
        self._coalesce_s = coalesce_s
        self._open: dict[str, tuple[Subscriber, asyncio.Task[None]]] = {}
        self._thinking: set[asyncio.Task[None]] = set()
        self._early: list[str] = []

    # Seat

    @property
    def agent(self) -> Agent:
        return self._session.agent

    @property
    def token_hash(self) -> str:
        return self._session.token_hash

    def push(self, frame: str) -> None:
        if self.greeted:
            self.outbox.push(frame)
        else:  # the lists of `welcome` are being read: what changes meanwhile comes after them
            self._early.append(frame)

    def end(self, code: int, reason: str) -> None:
        self.outbox.end(code, reason)

    def left(self) -> None:
        self.outbox.end(1000)
        self._desk.leave(self)
        for conversation in list(self._open):
            self._leave(conversation)
        for task in self._thinking:
            task.cancel()

    # Frames

    def parse(self, text: str) -> AgentFrame:
        return parse_agent_frame(text)

    def refuse(self, error: Exception, frame: AgentFrame | None, text: str | None) -> None:
        code = error.code if isinstance(error, BotError) else "internal"
        if code != "taken":
            logger.info("agent %s: %s refused: %s", self.agent.id, getattr(frame, "type", "a frame"), code)
        fields: dict[str, Any] = {}
        if frame is not None:
            fields = {"type_of": frame.type, "conversation": getattr(frame, "conversation", None)}
        if isinstance(error, Taken):
            name = self._desk.name_of(error.owner_id) or ""
            fields["owner"] = {"id": error.owner_id, "name": name}
        self.outbox.push(dump_failed(error, id_=getattr(frame, "id", None), **fields))

    async def do(self, frame: AgentFrame) -> None:
        if isinstance(frame, AgentPing):
            self.outbox.push(dump_frame("pong"))
            return
        if isinstance(frame, AgentHello):
            await self._hello(frame)
            return
        if not self.greeted:
            raise BadFrame("say hello first")
        desk, agent, hub = self._desk, self.agent, self._desk.hub
        match frame:
            case Open():
                await self._follow(frame.conversation, frame.after)
            case Leave():
                self._leave(frame.conversation)
            case Accept() | TakeOver() | Transfer() | Return() | AgentClose():
                await self._act(frame)
            case Say():
                await hub.say(frame.conversation, agent.who(), frame.id, frame.text, ack=self._ack(frame))
            case Note():
                await desk.card(agent, frame.conversation)
                await hub.note(frame.conversation, agent.who(), frame.id, frame.text, ack=self._ack(frame))
            case AgentTyping():
                await desk.typing(agent, frame.conversation, frame.on)
            case Suggest():
                await desk.card(agent, frame.conversation)
                self._think(frame, self._suggest(frame))
            case Summarize():
                await desk.card(agent, frame.conversation)
                self._think(frame, self._summarize(frame))
            case SetPresence():
                desk.set_presence(agent, frame.status)

    async def _hello(self, frame: AgentHello) -> None:
        if self.greeted:
            raise BadFrame("hello was said already")
        if frame.protocol != PROTOCOL:
            raise BadFrame(f"protocol {frame.protocol} is not spoken here; this server speaks {PROTOCOL}")
        self._desk.arrive(self)
        fields = await self._desk.welcome(self.agent)
        for each in (dump_frame("welcome", **fields), *self._early):
            self.outbox.push(each)
        self._early.clear()
        self.greeted = True

    async def _act(self, frame: Action) -> None:
        desk, agent, conversation = self._desk, self.agent, frame.conversation
        match frame:
            case Accept():
                await desk.accept(agent, conversation)
            case TakeOver():
                await desk.take_over(agent, conversation)
            case Transfer():
                await desk.transfer(agent, conversation, frame.to, frame.note)
            case Return():
                await desk.give_back(agent, conversation)
            case AgentClose():
                await desk.close(agent, conversation)
        self.outbox.push(dump_frame("done", conversation=conversation, type_of=frame.type, id=frame.id))

    def _ack(self, frame: Say | Note) -> Callable[[Sent], None]:
        def push(sent: Sent) -> None:
            seq, duplicate = sent.event.seq, sent.duplicate
            self.outbox.push(
                dump_frame("ack", conversation=frame.conversation, id=frame.id, seq=seq, duplicate=duplicate)
            )

        return push

    # Following conversations

    async def _follow(self, conversation: str, after: int) -> None:
        card = await self._desk.card(self.agent, conversation)
        self._leave(conversation)
        if len(self._open) >= MAX_OPEN:
            raise BadFrame(f"{MAX_OPEN} conversations are open already; leave one first")
        summary = summary_of(await self._desk.hub.storage.events(conversation), card.reason, card.language)
        shown = self._desk.card_object(card)

        def opened(head: Conversation) -> str:
            return dump_frame("opened", conversation=shown, summary=summary, seq=head.seq)

        view = Subscriber(coalesce_s=self._coalesce_s, audience="agent")
        self._open[conversation] = (view, asyncio.create_task(self._pass_on(conversation, view)))
        try:
            await self._desk.hub.subscribe(view, conversation, after=after, welcome=opened)
        except BotError:
            self._leave(conversation)
            raise

    async def _pass_on(self, conversation: str, view: Subscriber) -> None:
        replaying = True
        while (frame := await view.next_frame()) is not None:
            if frame.startswith('{"type":"opened"'):
                self.outbox.push(frame, replay=True)
            else:
                # A long log is replayed faster than it can be sent; what comes after it is bounded as ever.
                replaying = replaying and view.has_more
                self.outbox.push(with_conversation(frame, conversation), replay=replaying)
        if view.close_code not in (None, 1000):
            self.outbox.end(view.close_code or 1011, view.close_reason)

    def _leave(self, conversation: str) -> None:
        if (followed := self._open.pop(conversation, None)) is not None:
            view, task = followed
            self._desk.hub.unsubscribe(view)
            task.cancel()

    # What takes a while

    def _think(self, frame: Suggest | Summarize, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._told(frame, work))
        self._thinking.add(task)
        task.add_done_callback(self._thinking.discard)

    async def _told(self, frame: Suggest | Summarize, work: Awaitable[None]) -> None:
        try:
            await work
        except BotError as exc:
            self.refuse(exc, frame, None)
        except Exception as exc:  # a bug: the agent gets a code, the connection stays
            logger.exception("agent %s: %s failed", self.agent.id, frame.type)
            self.refuse(exc, frame, None)

    async def _suggest(self, frame: Suggest) -> None:
        found = await self._desk.suggest(self.agent, frame.conversation, frame.text)
        self.outbox.push(dump_frame("suggestion", conversation=frame.conversation, id=frame.id, **found))

    async def _summarize(self, frame: Summarize) -> None:
        summary = await self._desk.think_summary(self.agent, frame.conversation)
        self.outbox.push(dump_frame("summary", conversation=frame.conversation, id=frame.id, summary=summary))


async def refuse_unsigned(websocket: WebSocket, error: BotError) -> None:
    """Accept, say that there is no session, close: a page cannot read why a handshake was refused."""
    await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in websocket.scope.get("subprotocols", []) else None)
    await websocket.send_text(dump_failed(error))
    await websocket.close(CLOSE_SIGNED_OUT, "sign in first")
