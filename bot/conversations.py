"""
Conversations while they are alive: who listens, which reply is under way, which questions wait for theirs.

A reply belongs to its conversation, not to the connection that asked: closing a tab loses nothing, a second tab sees
the same, and a new connection resumes where the old one ended. Knows storage and the answerer; does not know
WebSockets (a connection is a `Subscriber` here) nor how a reply is made.

Order, and why nothing is lost or doubled: whatever appends to a conversation, and whatever joins it, holds its lock
from reading or writing the log until every subscriber has the result in its queue. Text of a reply under way is not
queued at all: a subscriber remembers how much of it was sent, so a slow one gets fewer, longer deltas.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol, TypeVar

from bot.errors import (
    BadFrame,
    BotError,
    EngineDead,
    EngineFailed,
    NotAllowed,
    NotYours,
    ReplyInProgress,
    ReplyInterrupted,
    Restarting,
    Taken,
    UnknownConversation,
)
from bot.language import reply_language
from bot.messages import Customer, Event, EventKind, Language, Release, Reply, State, Turn, reply_data, turns_of
from bot.phrases import said_by_server
from bot.settings import HandoffPolicy
from bot.skills.handoff import given_up
from bot.states import Action, Actor, next_state
from bot.storage import Asked, Conversation, Sent, Storage, Unanswered
from bot.stream import Delta, Phase, PhaseName
from bot.wire import MAX_TEXT_CHARS, dump_event, dump_failed, dump_frame

logger = logging.getLogger(__name__)

T = TypeVar("T")

HISTORY_EVENTS = 60  # more than any prompt has room for; the log itself is kept whole
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)

CLOSE_RESTART = 1012  # "service restart": come back, the conversation is kept
CLOSE_TRY_LATER = 1013


class Answerer(Protocol):
    """Makes replies; `bot.answer` has the real one. One instance serves all conversations of a process."""

    def answer(
        self,
        history: Sequence[Turn],
        question: str,
        *,
        locale: str | None,
        stop: asyncio.Event,
        release: str | None = None,
    ) -> AsyncGenerator[Phase | Delta | Reply, None]:
        """
        Yield phases and deltas, and last exactly one `Reply`. `release`: name of who is to answer; None: the default.

        Once `stop` is set, a reply with finish "abort" and the text so far comes soon. Closing the generator gives
        the reply up.

        Raises:
            BotError: EngineBusy, EngineNotReady, EngineFailed, EngineDead.
        """
        ...

    def release(self) -> Release:
        """Return what answers right now; stamped on a reply that was cut before it could say so itself."""
        ...


class Queue(Protocol):
    """Whoever knows the agents; `bot.agents.desk` has the real one. The hub tells it what happens."""

    async def joining(self) -> dict[str, Any]:
        """
        Return what one who joins the queue now is told.

        `position`, `expected_wait_s` (None is unknown), `open`, `opens_at`; and `opens_text`, the latter in words, by
        language. Any may be missing.
        """
        ...

    def happened(self, conversation: str, event: Event) -> None:
        """An event was stored and published. Must not block, nor call the hub back."""
        ...

    def came_or_went(self, conversation: str) -> None:
        """A visitor's connection to it opened or closed. Must not block, nor call the hub back."""
        ...


class NoQueue:
    """There are no agents here."""

    async def joining(self) -> dict[str, Any]:
        return {}

    def happened(self, conversation: str, event: Event) -> None:
        pass

    def came_or_went(self, conversation: str) -> None:
        pass


class Recorder(Protocol):
    """Whoever counts; `bot.metrics` has the real one."""

    def asked(self) -> None: ...

    def replied(self, reply: Reply, ttft_s: float | None, total_s: float) -> None:
        """Count a stored reply. Times are since the question was taken up; `ttft_s` is None where no text came."""
        ...

    def reply_failed(self, code: str) -> None: ...


class NullRecorder:
    """Counts nothing."""

    def asked(self) -> None:
        pass

    def replied(self, reply: Reply, ttft_s: float | None, total_s: float) -> None:
        pass

    def reply_failed(self, code: str) -> None:
        pass


@dataclass(slots=True, eq=False)
class ReplyUnderWay:
    """A reply as it grows."""

    turn: str
    turns: list[str] | None = None  # all the messages it answers, where there is more than one
    text: str = ""
    phase: PhaseName | None = None
    release: Release | None = None  # what makes it, once that is known
    top_index: int = -1  # highest delta index that any subscriber was given; a resumed one goes on from there


class Subscriber:
    """
    What one connection has yet to be sent: frames in order, and its place in the reply under way.

    Filled by the hub and by the connection itself, emptied by the connection's one writer. Never blocks whoever
    fills it: a connection that does not empty it is ended with 1013 instead.
    """

    def __init__(
        self, *, max_frames: int = 256, coalesce_s: float = 0.04, audience: Literal["visitor", "agent"] = "visitor"
    ) -> None:
        """
        Args:
            audience: whose connection it is; some frames are for one of the two only.
            max_frames: frames that may wait, replayed events aside.
            coalesce_s: least time between two deltas; text that comes sooner is joined to the next.
        """
        self.close_code: int | None = None  # set once no more frames will be taken
        self.close_reason = ""
        self.audience = audience
        self.customer: Customer | None = None  # whom the store signed for on this connection
        self.live: _Live | None = None  # the hub's own note of where this subscriber is
        self._max_frames = max_frames
        self._coalesce_s = coalesce_s
        # A list and a future where a deque and an Event would do: 2 KiB less for each silent visitor.
        self._frames: list[str] = []
        self._waiter: asyncio.Future[None] | None = None
        self._reply: ReplyUnderWay | None = None
        self._sent_chars = 0
        self._index = -1
        self._due = 0.0

    @property
    def ended(self) -> bool:
        return self.close_code is not None

    @property
    def has_more(self) -> bool:
        """Whether a whole frame waits."""
        return bool(self._frames)

    def push(self, frame: str, *, replay: bool = False) -> None:
        """Queue one frame; ignored once ended. `replay`: part of a resume, not bounded."""
        if self.ended:
            return
        if not replay and len(self._frames) >= self._max_frames:
            self._frames.clear()
            self.end(CLOSE_TRY_LATER, "too slow; reconnect and resume")
            return
        self._frames.append(frame)
        self._wake()

    def push_event(self, event: Event, *, replay: bool = False) -> None:
        """Queue an event as this audience may see it: notes are for agents, and so are the ids of agents' clients."""
        if self.audience == "visitor":
            if event.kind == "note":
                return
            if "client_id" in event.data:
                event = replace(event, data={k: v for k, v in event.data.items() if k != "client_id"})
        self.push(dump_event(event), replay=replay)

    def end(self, code: int, reason: str = "") -> None:
        """Take no more frames; those already queued are still sent."""
        if not self.ended:
            self.close_code, self.close_reason = code, reason
            self._reply = None
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_frame(self) -> str | None:
        """Return the next frame to send, waiting for one; None once ended and empty."""
        loop = asyncio.get_running_loop()
        clock = loop.time
        while True:
            if self._frames:
                return self._frames.pop(0)
            if self.ended:
                return None
            wait_s: float | None = None
            if self._reply is not None and len(self._reply.text) > self._sent_chars:
                wait_s = self._due - clock()
                if wait_s <= 0:
                    self._due = clock() + self._coalesce_s
                    return self._take_delta(self._reply)
            self._waiter = loop.create_future()
            try:
                if wait_s is None:
                    await self._waiter
                else:
                    async with asyncio.timeout(wait_s):
                        await self._waiter
            except TimeoutError:
                pass
            finally:
                self._waiter = None

    # The reply under way, driven by the hub

    def begin(self, reply: ReplyUnderWay) -> None:
        """Follow a reply from its beginning."""
        if not self.ended:
            self._reply, self._sent_chars, self._index, self._due = reply, 0, -1, 0.0

    def join(self, reply: ReplyUnderWay) -> None:
        """Follow a reply that is already under way: send what there is as `partial`, the rest as deltas."""
        self.begin(reply)
        self._sent_chars = len(reply.text)
        self._index = max(reply.top_index, 0)
        partial = dump_frame("partial", turn=reply.turn, turns=reply.turns, index=self._index, text=reply.text)
        self.push(partial, replay=True)
        if reply.phase is not None:
            self.push(dump_frame("status", turn=reply.turn, phase=reply.phase), replay=True)

    def grown(self) -> None:
        """The reply under way has new text."""
        self._wake()

    def finish(self, reply: ReplyUnderWay, *, flush: bool) -> None:
        """Follow `reply` no longer; with `flush` its unsent text is queued first."""
        if self._reply is reply:
            if flush and len(reply.text) > self._sent_chars:
                self.push(self._take_delta(reply))
            self._reply = None

    def _take_delta(self, reply: ReplyUnderWay) -> str:
        text = reply.text[self._sent_chars :]
        self._sent_chars = len(reply.text)
        self._index += 1
        reply.top_index = max(reply.top_index, self._index)
        return dump_frame("delta", turn=reply.turn, index=self._index, text=text)


@dataclass(frozen=True, slots=True)
class _Message:
    """A visitor's stored message that a reply is due to."""

    turn: str
    text: str
    seq: int


@dataclass(slots=True, eq=False)
class _Ask:
    """What waits for a reply, or is getting it: one message, or several that were sent quickly and get one reply."""

    messages: list[_Message]  # oldest first
    recovered: bool = False  # a restart cut its reply, or kept it from being begun
    joinable: bool = True  # until the visitor has seen text of the reply
    joined: bool = False  # a message came meanwhile: begin again, with it
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    deadline: asyncio.Timeout | None = None  # set while the reply is being made
    dropped: bool = False  # an agent took over, or it was closed: whatever comes is thrown away

    @property
    def turn(self) -> str:
        """The turn the reply carries: that of the last message, so that it stands behind all of them."""
        return self.messages[-1].turn

    @property
    def turns(self) -> list[str] | None:
        return [m.turn for m in self.messages] if len(self.messages) > 1 else None

    @property
    def question(self) -> str:
        return "\n".join(m.text for m in self.messages if m.text.strip())

    def takes(self, messages: Sequence[_Message], most: int) -> bool:
        """Return whether `messages` may still get the same reply; at most `most` in all."""
        n_chars = sum(len(m.text) + 1 for m in (*self.messages, *messages)) - 1
        fits = n_chars <= MAX_TEXT_CHARS and len(self.messages) + len(messages) <= most
        return self.joinable and fits and not self.stop.is_set()


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why messages have no reply, for those who join later."""

    messages: list[_Message]
    error: Exception


@dataclass(slots=True, eq=False)
class _Live:
    """One conversation in memory."""

    id: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    head: Conversation | None = None  # locale and state; true while in memory, since only this process writes
    subscribers: list[Subscriber] = field(default_factory=list)
    waiting: deque[_Ask] = field(default_factory=deque)
    current: _Ask | None = None
    reply: ReplyUnderWay | None = None
    task: asyncio.Task[None] | None = None
    failed: dict[str, _Failure] = field(default_factory=dict)  # turns that wait for the visitor to try again
    users: int = 0  # operations in progress
    visitor_types: bool = False  # since their last message

    @property
    def state(self) -> State:
        assert self.head is not None
        return self.head.state

    def find(self, turn: str) -> _Ask | None:
        """Return what `turn` is a message of if its reply is under way or waits."""
        asks = self.waiting if self.current is None else (self.current, *self.waiting)
        return next((ask for ask in asks if any(m.turn == turn for m in ask.messages)), None)

    @property
    def n_waiting(self) -> int:
        """Messages that wait behind the reply under way, those that joined it counted."""
        joined = len(self.current.messages) - 1 if self.current is not None else 0
        return joined + sum(len(ask.messages) for ask in self.waiting)

    def end(self) -> None:
        """End every connection, because the server stops."""
        for subscriber in self.subscribers:
            subscriber.end(CLOSE_RESTART, "restarting")

    def publish(self, event: Event) -> None:
        """Give an event to every subscriber; the caller holds the lock since before it was numbered."""
        assert self.head is not None
        if event.kind == "state":
            owner = event.data["agent"]["id"] if event.data["state"] == "human" and "agent" in event.data else None
            self.head = replace(self.head, state=event.data["state"], owner=owner)
        self.head = replace(self.head, seq=event.seq)
        for subscriber in self.subscribers:
            subscriber.push_event(event)


class ConversationHub:
    """
    All live conversations of a process.

    What writes is finished even if its caller is cancelled (a connection that closes just then): a stored event that
    nobody was told of would be a gap for the other tabs. Conversations nobody follows and that have nothing under way
    are forgotten at once; the log has them.
    """

    def __init__(
        self,
        storage: Storage,
        answerer: Answerer,
        *,
        recorder: Recorder | None = None,
        queue: Queue | None = None,
        policy: HandoffPolicy | None = None,
        assign: Callable[[Conversation], str | None] = lambda conversation: None,
        max_waiting: int = 5,
        typing_wait_s: float = 1.5,
        reply_timeout_s: float = 180.0,
        stop_timeout_s: float = 10.0,
        resume_age_s: float = 24 * 3600.0,
    ) -> None:
        """
        Args:
            queue: who is told of everything that happens; may be set later (`watch`).
            policy: when a human is called without being asked for.
            assign: which release answers a conversation, asked for each reply; None is the default one.
            max_waiting: questions that may wait while a reply is under way.
            typing_wait_s: longest the first text of a reply is held back for a visitor who is writing more.
            reply_timeout_s: longest a reply may take; then it fails and may be asked for again.
            stop_timeout_s: longest a stopped reply may take to end.
            resume_age_s: questions without a reply that are older are not taken up when a visitor comes back.
        """
        self.storage = storage
        self.answerer = answerer
        self.recorder = recorder or NullRecorder()
        self.policy = policy or HandoffPolicy()
        self._assign = assign
        self._queue: Queue = queue or NoQueue()
        self.max_waiting = max_waiting
        self.typing_wait_s = typing_wait_s
        self.reply_timeout_s = reply_timeout_s
        self.stop_timeout_s = stop_timeout_s
        self.resume_age_s = resume_age_s
        self._live: dict[str, _Live] = {}
        self._operations: set[asyncio.Task[Any]] = set()
        self._draining = self._closing = False
        self._recovering = False  # questions a restart left are not taken up yet: nothing can answer them

    def watch(self, queue: Queue) -> None:
        """Tell `queue` of everything that happens from now on."""
        self._queue = queue

    # Figures

    @property
    def n_live(self) -> int:
        """Conversations in memory."""
        return len(self._live)

    @property
    def n_subscribers(self) -> int:
        return sum(len(live.subscribers) for live in self._live.values())

    @property
    def n_generating(self) -> int:
        """Replies under way."""
        return sum(live.current is not None for live in self._live.values())

    @property
    def n_waiting(self) -> int:
        """Questions that wait behind a reply under way."""
        return sum(live.n_waiting for live in self._live.values())

    @property
    def n_tasks(self) -> int:
        """Tasks of ours that are not done; 0 when nothing is going on."""
        return len(self._operations) + sum(live.task is not None for live in self._live.values())

    # Joining

    async def start(
        self,
        subscriber: Subscriber,
        locale: str | None,
        welcome: Callable[[Conversation, str], str],
        customer: Customer | None = None,
    ) -> str:
        """
        Make a conversation, subscribe to it, return its id.

        Args:
            customer: whom the store's backend signed for; the conversation is theirs from now on.
            welcome: makes the `welcome` frame of the conversation and its token.
        """
        if self._draining:
            raise Restarting
        id_, token = await self.storage.create_conversation(locale, customer)
        if not subscriber.ended:
            live = self._live.setdefault(id_, _Live(id_))
            live.head = Conversation(id_, locale, "bot", 0, customer=customer, created_at=datetime.now(UTC))
            subscriber.push(welcome(live.head, token))
            self._add(live, subscriber)
        return id_

    async def subscribe(
        self,
        subscriber: Subscriber,
        conversation: str,
        *,
        after: int | None,
        welcome: Callable[[Conversation], str],
    ) -> None:
        """
        Queue `welcome`, every event after `after`, the reply so far where one is under way; then follow.

        Questions that a restart left without a reply are taken up again. The caller has checked the token.

        Args:
            after: last sequence number the visitor has; None for no replay.

        Raises:
            UnknownConversation, StorageUnavailable.
        """
        since = datetime.now(UTC) - timedelta(seconds=self.resume_age_s)
        if self._draining:
            raise Restarting
        async with self._using(conversation) as live:
            live.head = await self.storage.get(conversation)
            events = [] if after is None else await self.storage.events(conversation, after)
            due = await self.storage.unanswered(since=LONG_AGO, conversation=conversation)
            if subscriber.ended:  # the connection closed meanwhile, and will not unsubscribe again
                return
            subscriber.push(welcome(live.head), replay=True)
            for event in events:
                subscriber.push_event(event, replay=True)
            self._add(live, subscriber)
            if subscriber.audience == "agent":
                if live.reply is not None:
                    subscriber.join(live.reply)
                return
            if live.reply is not None:
                subscriber.join(live.reply)
            for ask in due:
                if ask.asked_at >= since and not self._recovering and ask.client_id not in live.failed:
                    self._enqueue(live, [_message(ask)], recovered=True, alone=True)
            # What nobody makes now is said, so that it can be asked for again: a `failed` frame may have been lost.
            told: set[str] = set()
            for ask in due:
                failure = live.failed.get(ask.client_id) or _Failure([_message(ask)], ReplyInterrupted())
                waits = live.find(ask.client_id) is not None or (ask.asked_at >= since and self._recovering)
                if not waits and ask.client_id not in told:
                    turns = [m.turn for m in failure.messages]
                    told.update(turns)
                    subscriber.push(_failed_frame(failure.error, turns), replay=True)

    async def tie(self, conversation: str, customer: Customer | None) -> None:
        """
        See to it that whoever joins `conversation` may: one of a customer is joined by that customer only.

        One that was nobody's is the customer's from now on; connections of it that are not theirs are ended.

        Raises:
            UnknownConversation: it is a customer's, and this is not them.
        """
        await self._finish(self._tie(conversation, customer))

    async def _tie(self, conversation: str, customer: Customer | None) -> None:
        async with self._using(conversation) as live:
            assert live.head is not None
            owner = live.head.customer
            if owner is not None and (customer is None or customer.id != owner.id):
                raise UnknownConversation
            if customer is None or customer == owner:
                return
            await self.storage.set_customer(conversation, customer)
            live.head = replace(live.head, customer=customer)
            for subscriber in live.subscribers:
                theirs = subscriber.customer is not None and subscriber.customer.id == customer.id
                if subscriber.audience == "visitor" and not theirs:
                    subscriber.end(CLOSE_RESTART, "signed in elsewhere; reconnect")

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a subscriber, wherever it is in joining. The reply under way goes on."""
        subscriber.end(1000)
        live = subscriber.live
        if live is not None and subscriber in live.subscribers:
            live.subscribers.remove(subscriber)
            self._drop_if_idle(live)
            if subscriber.audience == "visitor":
                self._queue.came_or_went(live.id)

    # What a visitor can do

    async def ask(
        self,
        conversation: str,
        id_: str,
        text: str,
        *,
        attachments: Sequence[dict[str, Any]] = (),
        by: Subscriber | None = None,
    ) -> Asked:
        """
        Store a question once, acknowledge it to `by`, and see to its reply.

        The same id again is acknowledged as a duplicate; if its reply failed, it is made again. A message that comes
        before the reply to the one before has shown any text gets one reply together with it.

        Raises:
            Conflict: the id was used for another text.
            ReplyInProgress: too many questions wait already; nothing was stored.
            Restarting, UnknownConversation, StorageUnavailable: nothing was stored.
        """
        return await self._finish(self._ask(conversation, id_, text, attachments, by))

    async def _ask(
        self, conversation: str, id_: str, text: str, attachments: Sequence[dict[str, Any]], by: Subscriber | None
    ) -> Asked:
        if self._draining:
            raise Restarting
        async with self._using(conversation) as live:
            live.visitor_types = False
            if live.n_waiting >= self.max_waiting and await self.storage.find_ask(conversation, id_) is None:
                raise ReplyInProgress
            asked = await self.storage.append_ask(conversation, id_, text, attachments)
            if by is not None:
                by.push(dump_frame("ack", id=id_, seq=asked.event.seq, duplicate=asked.duplicate))
            if not asked.duplicate:
                self.recorder.asked()
                self._publish(live, [asked.event])
                if live.state == "closed":
                    state = next_state("closed", "reopen", "visitor")
                    data = {"state": state, "reason": "reopened", "by": {"role": "visitor"}}
                    await self._append(live, ("state", data))
            if not asked.answered and live.state in ("bot", "waiting"):
                failure = live.failed.get(id_)
                again = [_Message(id_, text, asked.event.seq)] if failure is None else failure.messages
                self._enqueue(live, again)
            return asked

    def stop(self, conversation: str, turn: str) -> None:
        """End the reply of `turn` with what there is; a turn that is over or unknown is not an error (a race)."""
        live = self._live.get(conversation)
        ask = live.find(turn) if live is not None else None
        if ask is not None:
            self._stop(ask)

    async def regenerate(self, conversation: str, turn: str) -> None:
        """
        Answer the question of `turn` again; the new reply is one more event of the same turn, and the one that counts.

        Where one reply answered several messages, any of their turns means all of them.

        Raises:
            BadFrame: there is no such turn.
            ReplyInProgress: its reply is under way, or too many wait.
            Restarting: nothing was begun.
        """
        if self._draining:
            raise Restarting
        async with self._using(conversation) as live:
            asked = await self.storage.find_ask(conversation, turn)
            if asked is None:
                raise BadFrame(f"there is no turn {turn[:64]!r} in this conversation")
            if live.state == "human":
                raise NotAllowed("human", "regenerate")
            if live.find(turn) is not None or live.n_waiting >= self.max_waiting:
                raise ReplyInProgress
            messages = [_Message(turn, asked.event.text, asked.event.seq)]
            if turn in live.failed:
                messages = live.failed[turn].messages
            elif asked.answered:
                messages = await self._answered_with(conversation, messages[0])
            self._enqueue(live, messages, alone=True)

    async def _answered_with(self, conversation: str, message: _Message) -> list[_Message]:
        """Return the messages that the last reply to `message` answered, oldest first."""
        turns: list[str] = []
        for event in await self.storage.events(conversation, message.seq):
            if event.role == "bot" and message.turn in event.data.get("turns", ()):
                turns = event.data["turns"]
        found = [await self.storage.find_ask(conversation, each) for each in turns]
        return [_Message(str(a.event.data["turn"]), a.event.text, a.event.seq) for a in found if a] or [message]

    async def typing(
        self,
        conversation: str,
        role: Literal["visitor", "agent"],
        on: bool,
        *,
        name: str | None = None,
        by: Subscriber | None = None,
    ) -> None:
        """Tell the other side, and agents' other tabs, that somebody types or stopped; nothing is stored."""
        live = self._live.get(conversation)
        if live is None:
            return
        if role == "visitor":
            live.visitor_types = on
        frame = dump_frame("typing", role=role, on=on, name=name)
        for subscriber in live.subscribers:
            if subscriber is not by and (role == "agent" or subscriber.audience == "agent"):
                subscriber.push(frame)

    async def rate(self, conversation: str, seq: int, value: str, comment: str | None) -> None:
        """
        Store what the visitor thinks of the reply at `seq`; the last rating of a reply counts.

        Raises:
            BadFrame: there is no reply at `seq`.
        """
        await self._finish(self._rate(conversation, seq, value, comment))

    async def _rate(self, conversation: str, seq: int, value: str, comment: str | None) -> None:
        async with self._using(conversation) as live:
            found = await self.storage.events(conversation, seq - 1)
            if not found or found[0].seq != seq or found[0].role not in ("bot", "agent"):
                raise BadFrame(f"'seq' {seq} is no reply of this conversation")
            # Not "seq": that name is the event's own on the wire.
            await self._append(live, ("rating", _without_none(rated=seq, value=value, comment=comment)))

    async def leave_message(
        self, conversation: str, id_: str, email: str, text: str, *, by: Subscriber | None = None
    ) -> Asked:
        """
        Store a message that agents answer by e-mail, once per id; the bot is not asked.

        Raises:
            Conflict: the id was used for another text.
            Restarting, UnknownConversation, StorageUnavailable: nothing was stored.
        """
        return await self._finish(self._leave_message(conversation, id_, email, text, by))

    async def _leave_message(self, conversation: str, id_: str, email: str, text: str, by: Subscriber | None) -> Asked:
        if self._draining:
            raise Restarting
        async with self._using(conversation) as live:
            said = said_by_server("message_left", reply_language(text, (), self._locale(live)), email=email)
            asked, events = await self.storage.append_left(conversation, id_, email, text, said)
            if by is not None:
                by.push(dump_frame("ack", id=id_, seq=asked.event.seq, duplicate=asked.duplicate))
            self._publish(live, events)
            return asked

    # Who talks: every change of state

    async def handoff(self, conversation: str, reason: str | None) -> None:
        """Ask for a human: tell the visitor, and set the state to waiting. Nothing where one was asked for already."""
        await self._finish(self._handoff(conversation, reason))

    async def _handoff(self, conversation: str, reason: str | None) -> None:
        async with self._using(conversation) as live:
            if live.state in ("waiting", "human"):
                return
            who = {"role": "visitor"}
            if live.state == "closed":
                state = next_state("closed", "reopen", "visitor")
                await self._append(live, ("state", {"state": state, "reason": "reopened", "by": who}))
            next_state(live.state, "request", "visitor")
            await self._append(live, *await self._request(live, reason or "visitor", who, await self._language(live)))

    async def close_by_visitor(self, conversation: str, score: int | None, comment: str | None) -> None:
        """Close a conversation; what the bot is saying ends. Closed already: only a score or comment is stored."""
        await self._finish(self._close_by_visitor(conversation, score, comment))

    async def _close_by_visitor(self, conversation: str, score: int | None, comment: str | None) -> None:
        async with self._using(conversation) as live:
            if live.state == "closed" and score is None and comment is None:
                return
            who = {"role": "visitor"}
            data = _without_none(state="closed", reason="visitor", by=who, score=score, comment=comment)
            if live.state == "closed":
                await self._append(live, ("state", data))
                return
            next_state(live.state, "close", "visitor")
            await self._change(live, [("state", data)], new_owner=None)

    async def move(
        self,
        conversation: str,
        actions: Sequence[Action],
        actor: Actor,
        *,
        by: dict[str, Any],
        agent: dict[str, Any] | None = None,
        reason: str | None = None,
        only_owner: str | None = None,
        said: str | None = None,
        note: str | None = None,
        name: str = "",
    ) -> bool:
        """
        Take a conversation through `actions`, one state event each; all or none.

        Args:
            by: who does it: {"role", "id"?, "name"?}, kept in the events.
            agent: {"id", "name"} of who has it afterwards, for accept and transfer.
            only_owner: refuse unless this agent has it (in state human).
            said: code of what the server tells the visitor, filled in with `name`.
            note: a note for agents, stored with it.

        Returns:
            False where it was so already (an agent accepts twice); nothing was stored then.

        Raises:
            Taken: another agent has it. NotYours. NotAllowed: not in this state.
            Restarting, UnknownConversation, StorageUnavailable.
        """
        return await self._finish(
            self._move(conversation, actions, actor, by, agent, reason, only_owner, said, note, name)
        )

    async def _move(
        self,
        conversation: str,
        actions: Sequence[Action],
        actor: Actor,
        by: dict[str, Any],
        agent: dict[str, Any] | None,
        reason: str | None,
        only_owner: str | None,
        said: str | None,
        note: str | None,
        name: str,
    ) -> bool:
        async with self._using(conversation) as live:
            assert live.head is not None
            if actions[-1] == "accept" and live.state == "human" and agent is not None:
                if live.head.owner == agent["id"]:
                    return False
                raise Taken(live.head.owner or "")
            if only_owner is not None and live.state == "human" and live.head.owner != only_owner:
                raise NotYours
            state, states = live.state, []
            for action in actions:
                state = next_state(state, action, actor)
                states.append(state)
            entries: list[tuple[EventKind, dict[str, Any]]] = []
            if note:
                entries.append(("note", {"text": note, "by": {k: v for k, v in by.items() if k != "role"}}))
            if said is not None:
                entries.append(("message", said_by_server(said, await self._language(live), name=name)))
            for n, new in enumerate(states):
                data = _without_none(state=new, reason=reason, by=by)
                if new == "human":
                    data["agent"] = agent
                elif new == "waiting" and n == len(states) - 1:
                    data |= (await self._joining())[0]
                entries.append(("state", data))
            new_owner = agent["id"] if state == "human" and agent is not None else None
            await self._change(live, entries, new_owner=new_owner)
            if state == "bot" or actor == "server":  # what the agent has left unanswered is the bot's again
                since = datetime.now(UTC) - timedelta(seconds=self.resume_age_s)
                for due in await self.storage.unanswered(since=since, conversation=conversation):
                    self._enqueue(live, [_message(due)])
            return True

    async def say(
        self,
        conversation: str,
        agent: dict[str, Any],
        id_: str,
        text: str,
        *,
        attachments: Sequence[dict[str, Any]] = (),
        ack: Callable[[Sent], None],
    ) -> Sent:
        """
        Store an agent's message once per id, acknowledge it, give it to the visitor.

        Raises:
            NotYours: somebody else has the conversation, or the bot. Conflict: the id was used for another text.
            Restarting, UnknownConversation, StorageUnavailable: nothing was stored.
        """
        data: dict[str, Any] = {"role": "agent", "text": text, "agent": agent, "client_id": id_}
        if attachments:
            data["attachments"] = list(attachments)
        return await self._finish(self._send(conversation, agent["id"], id_, "message", data, ack))

    async def note(
        self, conversation: str, agent: dict[str, Any], id_: str, text: str, *, ack: Callable[[Sent], None]
    ) -> Sent:
        """Store a note for agents once per id; visitors never get it. Raises as `say`, but not NotYours."""
        data = {"text": text, "by": agent, "client_id": id_}
        return await self._finish(self._send(conversation, agent["id"], id_, "note", data, ack))

    async def _send(
        self,
        conversation: str,
        agent: str,
        id_: str,
        kind: EventKind,
        data: dict[str, Any],
        ack: Callable[[Sent], None],
    ) -> Sent:
        if self._draining:
            raise Restarting
        async with self._using(conversation) as live:
            sent = await self.storage.append_sent(conversation, agent, id_, kind, data, only_owner=kind == "message")
            ack(sent)
            if not sent.duplicate:
                self._publish(live, [sent.event])
            return sent

    def tell(self, conversation: str, frame: str) -> None:
        """Give a transient frame to the visitor's connections."""
        live = self._live.get(conversation)
        for subscriber in live.subscribers if live is not None else ():
            if subscriber.audience == "visitor":
                subscriber.push(frame)

    def has_visitor(self, conversation: str) -> bool:
        """Return whether the visitor has a connection open."""
        live = self._live.get(conversation)
        return live is not None and any(s.audience == "visitor" for s in live.subscribers)

    async def _request(
        self, live: _Live, reason: str, by: dict[str, Any], language: Language, *, confirm: bool = True
    ) -> list[tuple[EventKind, dict[str, Any]]]:
        """Return what is stored when a human is asked for; the caller holds the lock and has asked `next_state`."""
        told, opens_text = await self._joining()
        entries: list[tuple[EventKind, dict[str, Any]]] = []
        if told.get("open") is False:
            # A reply that promises to connect somebody says nothing of when: so this is told in any case.
            entries.append(("message", said_by_server("handoff_closed", language, opens_text=opens_text)))
        elif confirm:
            entries.append(("message", said_by_server("handoff", language, **told)))
        entries.append(("state", {"state": "waiting", "reason": reason, "by": by, **told}))
        return entries

    async def _joining(self) -> tuple[dict[str, Any], dict[Language, str] | None]:
        """Return what the event says of the queue, and when agents are back in words."""
        told = await self._queue.joining()
        opens_text = told.pop("opens_text", None)
        return _without_none(**told), opens_text

    async def _change(
        self, live: _Live, entries: list[tuple[EventKind, dict[str, Any]]], *, new_owner: str | None
    ) -> None:
        """
        Store and publish entries that move the state; the caller holds the lock and has asked `next_state`.

        Where the bot falls silent by it, what it has said so far is stored in front of them, and whatever it still
        says is thrown away.
        """
        assert live.head is not None
        new = entries[-1][1]["state"]
        ask, reply = live.current, live.reply
        silenced = new in ("human", "closed")
        if silenced:
            live.waiting.clear()  # the agent sees them; they are not taken up behind the agent's back
            if ask is not None:
                ask.dropped = True
                self._stop(ask)
            if ask is not None and reply is not None and reply.text:
                said = Reply(
                    text=reply.text,
                    outcome="generated",
                    finish="abort",
                    language=reply_language(reply.text, (), live.head.locale),
                    release=reply.release or self.answerer.release(),
                )
                entries = [("message", reply_data(said, ask.turn, turns=ask.turns, recovered=ask.recovered)), *entries]
        try:
            events = await self.storage.change(
                live.id,
                entries,
                state=live.head.state,
                owner=live.head.owner,
                new_owner=new_owner,
                settle=new == "closed",
            )
        except BotError as exc:
            if silenced and ask is not None and reply is not None:
                ask.dropped = False  # nobody has it: the visitor may ask again
                self._fail(live, ask, reply, exc)
            if isinstance(exc, Taken | NotAllowed):  # another server on the same database was faster
                live.head = await self.storage.get(live.id)
            raise
        if silenced and reply is not None:
            for subscriber in live.subscribers:
                subscriber.finish(reply, flush=True)
        self._publish(live, events)

    async def _language(self, live: _Live) -> Language:
        """Return the language the visitor writes, else that of their page."""
        said = [e.text for e in await self.storage.events(live.id, last=HISTORY_EVENTS) if e.role == "visitor"]
        return reply_language("", [Turn(text, "") for text in said], self._locale(live))

    @staticmethod
    def _locale(live: _Live) -> str | None:
        return None if live.head is None else live.head.locale

    def _publish(self, live: _Live, events: Sequence[Event]) -> None:
        """Give stored events to all who follow; the caller holds the lock."""
        for event in events:
            live.publish(event)
            self._queue.happened(live.id, event)

    # At start and at the end

    async def recover(self, max_age_s: float = 600.0) -> int:
        """
        Take up the questions that were acknowledged but never answered; return how many.

        Call it once the answerer can answer. Older ones are taken up when their visitor comes back, or now where they
        did already.
        """
        self._recovering = False
        now = datetime.now(UTC)
        since = now - timedelta(seconds=max_age_s)
        n = 0
        for due in await self.storage.unanswered(since=now - timedelta(seconds=max(max_age_s, self.resume_age_s))):
            here = self._live.get(due.conversation)
            if due.asked_at < since and (here is None or not here.subscribers):
                continue
            async with self._using(due.conversation) as live:
                # Looked up again under the lock: its visitor may have come back meanwhile, and have the reply.
                asked = await self.storage.find_ask(due.conversation, due.client_id)
                if asked is None or asked.answered:
                    continue
                n += self._enqueue(live, [_message(due)], recovered=True, alone=True)
        if n:
            logger.info("answering %d questions that a restart left without a reply", n)
        return n

    def hold_recovery(self) -> None:
        """Take up no question that a restart left until `recover` is called: nothing can answer it yet."""
        self._recovering = True

    async def drain(self, timeout_s: float) -> None:
        """
        Take no more questions, let replies under way end within `timeout_s`, and end each connection then.

        A connection is ended as soon as its conversation has no reply under way. What waits or is given up has been
        stored, and is answered after the restart.
        """
        self._draining = True
        for live in self._live.values():
            live.waiting.clear()
            if live.task is None:
                live.end()
        tasks = {live.task: live for live in self._live.values() if live.task is not None}
        clock = asyncio.get_running_loop().time
        until = clock() + timeout_s
        while tasks and clock() < until:
            done, _ = await asyncio.wait(tasks, timeout=until - clock(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                tasks.pop(task).end()
        for live in tasks.values():
            live.end()

    async def close(self, timeout_s: float = 5.0) -> None:
        """
        Let replies under way end within `timeout_s`, give the rest up, leave no task behind.

        A reply that was given up is not stored, half or at all: its question is answered after the restart.
        """
        self._draining = self._closing = True
        for live in self._live.values():
            live.waiting.clear()
        tasks = [live.task for live in self._live.values() if live.task is not None] + list(self._operations)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            if late:
                logger.warning("%d replies were given up; they are made after the restart", len(late))
        for live in list(self._live.values()):
            live.end()

    # Replies

    def _enqueue(
        self, live: _Live, messages: Sequence[_Message], *, recovered: bool = False, alone: bool = False
    ) -> bool:
        """
        See to it that `messages` get a reply; return False where one is due already.

        They join the reply under way where it has shown nothing yet; `alone`: they do not, and nothing joins them.
        """
        if self._draining or live.state == "human" or any(live.find(m.turn) is not None for m in messages):
            return False
        current = live.current
        if current is not None and not alone and not live.waiting and current.takes(messages, self.max_waiting + 1):
            current.messages.extend(messages)
            current.joined = True
            if current.deadline is not None and not current.deadline.expired():
                current.deadline.reschedule(asyncio.get_running_loop().time())  # begin again at once
            return True
        live.waiting.append(_Ask(list(messages), recovered, joinable=not alone))
        if live.task is None:
            live.task = asyncio.create_task(self._answer_all(live), name=f"replies-{live.id}")
        return True

    async def _answer_all(self, live: _Live) -> None:
        """Answer what waits, one reply at a time: a later question may lean on the reply to an earlier one."""
        try:
            while live.waiting:
                ask = live.current = live.waiting.popleft()
                # What was written while another reply was under way gets one reply, too.
                while live.waiting and live.waiting[0].joinable and not live.waiting[0].stop.is_set():
                    if not ask.takes(live.waiting[0].messages, self.max_waiting + 1):
                        break
                    ask.messages.extend(live.waiting.popleft().messages)
                await self._answer_one(live, ask)
        finally:
            live.current = live.task = None
            self._drop_if_idle(live)

    async def _answer_one(self, live: _Live, ask: _Ask) -> None:
        ask.joined = True
        while ask.joined:
            ask.joined = False
            reply = live.reply = ReplyUnderWay(ask.turn, ask.turns)
            for message in ask.messages:
                live.failed.pop(message.turn, None)
            for subscriber in live.subscribers:
                subscriber.begin(reply)
            try:
                await self._reply(live, ask, reply)
            # Nobody awaits this task: what is not handled here leaves the visitor waiting for ever.
            except (EngineFailed, EngineDead) as exc:
                logger.exception("conversation %s: no reply", live.id)
                self._fail(live, ask, reply, exc)
            except BotError as exc:  # busy, still loading, storage: known causes, logged where they arose
                logger.warning("conversation %s: no reply: %s", live.id, exc.code)
                self._fail(live, ask, reply, exc)
            except Exception as exc:
                logger.exception("conversation %s: no reply", live.id)
                self._fail(live, ask, reply, exc)
            finally:
                live.reply = None
                for subscriber in live.subscribers:
                    subscriber.finish(reply, flush=False)

    async def _reply(self, live: _Live, ask: _Ask, reply: ReplyUnderWay) -> None:
        """
        Make the reply, telling the subscribers as it grows; store it whole; publish it.

        Returns with `ask.joined` set, and nothing shown, where another message came before the first text.
        """
        clock = asyncio.get_running_loop().time
        began, first_text = clock(), None
        final: Reply | None = None
        assert live.head is not None

        # 1) Make it.
        history = history_of(await self.storage.events(live.id, last=HISTORY_EVENTS), before=ask.messages[0].seq)
        try:
            async with asyncio.timeout(self.reply_timeout_s) as ask.deadline:
                steps = self.answerer.answer(
                    history,
                    ask.question,
                    locale=live.head.locale,
                    stop=ask.stop,
                    release=self._assign(live.head),
                )
                async with aclosing(steps):
                    async for step in steps:
                        if ask.dropped:
                            return
                        if ask.joinable and not isinstance(step, Phase):
                            await self._hold(live, ask)
                            if ask.joined or ask.dropped:
                                return
                            ask.joinable = False
                        if isinstance(step, Delta):
                            first_text = first_text or clock()
                            reply.text += step.text
                            for subscriber in live.subscribers:
                                subscriber.grown()
                        elif isinstance(step, Phase):
                            reply.phase = step.name
                            reply.release = step.release or reply.release
                            for subscriber in live.subscribers:
                                subscriber.push(dump_frame("status", turn=ask.turn, turns=ask.turns, phase=step.name))
                        else:
                            final = step
        except TimeoutError:
            if ask.joined or ask.dropped:
                return
            raise EngineFailed("the reply took too long") from None
        finally:
            ask.deadline = None
        if final is None:
            raise EngineFailed("the answerer ended without a reply")

        # 2) Keep the promise that joined deltas are the text, or say that they are not.
        if final.text != reply.text and not final.revised:
            if final.text.startswith(reply.text):
                reply.text = final.text
            else:
                final = replace(final, revised=True)

        # 3) Store and publish.
        data = reply_data(final, ask.turn, turns=ask.turns, recovered=ask.recovered)
        entries: list[tuple[EventKind, dict[str, Any]]] = [("message", data)]
        async with live.lock:
            if ask.dropped:  # an agent accepted while this was being finished
                return
            entries += await self._asks_for_human(live, ask, final)
            stored = await self.storage.append_all(live.id, entries)
            for subscriber in live.subscribers:
                subscriber.finish(reply, flush=not final.revised)
            self._publish(live, stored)
        self.recorder.replied(final, None if first_text is None else first_text - began, clock() - began)

    async def _asks_for_human(self, live: _Live, ask: _Ask, final: Reply) -> list[tuple[EventKind, dict[str, Any]]]:
        """Return the events that call a human after this reply, if it or what came before it asks for one."""
        if live.state != "bot":
            return []
        reason: str | None = None
        if final.outcome == "handoff":
            reason = final.handoff or "bot"
        elif final.outcome == "no_answer" and self.policy.after_no_answers:
            past = await self.storage.events(live.id, last=HISTORY_EVENTS)
            outcomes = [*_outcomes(past, ask.turns or [ask.turn]), final.outcome]
            reason = "no_answer" if given_up(outcomes, self.policy) else None
        if reason is None:
            return []
        next_state(live.state, "request", "bot")
        confirm = final.outcome != "handoff"  # else the reply says so itself
        return await self._request(live, reason, {"role": "bot"}, final.language, confirm=confirm)

    async def _hold(self, live: _Live, ask: _Ask) -> None:
        """Wait a little with the first text for a visitor who is writing on: the next message may belong to it."""
        clock = asyncio.get_running_loop().time
        until = clock() + self.typing_wait_s
        while live.visitor_types and not ask.joined and not ask.stop.is_set() and clock() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    def _fail(self, live: _Live, ask: _Ask, reply: ReplyUnderWay, error: Exception) -> None:
        if ask.dropped:  # an agent has it; there is nothing to try again
            return
        ask.joined = False  # with the message that came last: all of them may be asked again
        failure = _Failure(list(ask.messages), error)
        live.failed.update({m.turn: failure for m in ask.messages})
        self.recorder.reply_failed(error.code if isinstance(error, BotError) else "internal")
        frame = _failed_frame(error, [m.turn for m in ask.messages])
        for subscriber in live.subscribers:
            subscriber.finish(reply, flush=False)
            subscriber.push(frame)

    def _stop(self, ask: _Ask) -> None:
        ask.stop.set()
        if ask.deadline is not None and not ask.deadline.expired():
            loop = asyncio.get_running_loop()
            ask.deadline.reschedule(min(ask.deadline.when() or 0.0, loop.time() + self.stop_timeout_s))

    # Plumbing

    def _add(self, live: _Live, subscriber: Subscriber) -> None:
        live.subscribers.append(subscriber)
        subscriber.live = live
        if subscriber.audience == "visitor":
            self._queue.came_or_went(live.id)

    async def _append(self, live: _Live, *entries: tuple[EventKind, dict[str, Any]]) -> None:
        """Store and publish; the caller holds the lock."""
        self._publish(live, await self.storage.append_all(live.id, entries))

    @asynccontextmanager
    async def _using(self, conversation: str) -> AsyncIterator[_Live]:
        """Hold a conversation in memory, locked, with its head loaded; raises UnknownConversation."""
        live = self._live.setdefault(conversation, _Live(conversation))
        live.users += 1
        try:
            async with live.lock:
                if live.head is None:
                    live.head = await self.storage.get(conversation)
                yield live
        finally:
            live.users -= 1
            self._drop_if_idle(live)

    def _drop_if_idle(self, live: _Live) -> None:
        busy = live.users or live.subscribers or live.waiting or live.task is not None
        if not busy and self._live.get(live.id) is live:
            del self._live[live.id]

    async def _finish(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run `operation` to its end even if the caller is cancelled meanwhile."""
        if self._closing:
            operation.close()
            raise Restarting
        task = asyncio.create_task(operation)
        self._operations.add(task)
        task.add_done_callback(self._operation_done)
        return await asyncio.shield(task)

    def _operation_done(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Whoever waits gets it; where the caller has gone, reading it here keeps asyncio from complaining.
            logger.debug("operation ended with %r", task.exception())


def history_of(events: Sequence[Event], *, before: int) -> list[Turn]:
    """
    Return the turns before the question at `before`, oldest first.

    Each question is followed by its own last reply: one that was asked while another reply was under way comes
    before that reply in the log, and a regenerated reply takes its predecessor's place.
    """
    last_reply = {e.data["turn"]: e for e in events if e.role in ("bot", "agent") and e.data.get("turn") and e.text}
    ordered: list[Event] = []
    for event in events:
        if event.kind != "message" or (event.data.get("turn") and event.role != "visitor"):
            continue
        if event.seq >= before:
            break
        ordered.append(event)
        if event.role == "visitor" and (reply := last_reply.get(event.data.get("turn", ""))) is not None:
            ordered.append(reply)
    return turns_of(ordered)


def _outcomes(events: Sequence[Event], turns: Sequence[str]) -> list[str]:
    """Return the outcomes of the bot's replies since the last change of state, one a turn, but those of `turns`."""
    outcomes: dict[str, str] = {}
    for event in events:
        if event.kind == "state":
            outcomes.clear()
        elif event.role == "bot" and event.data.get("finish") != "abort":
            turn = str(event.data.get("turn"))
            outcomes.pop(turn, None)
            outcomes[turn] = str(event.data.get("outcome"))
    return [outcome for turn, outcome in outcomes.items() if turn not in turns]


def _message(due: Unanswered) -> _Message:
    return _Message(due.client_id, due.text, due.seq)


def _failed_frame(error: Exception, turns: list[str]) -> str:
    return dump_failed(error, turn=turns[-1], turns=turns if len(turns) > 1 else None)


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
