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
from typing import Any, Protocol, TypeVar

from bot.errors import BadFrame, BotError, EngineDead, EngineFailed, EngineNotReady, ReplyInProgress
from bot.language import reply_language
from bot.messages import Event, EventKind, Language, Reply, State, Turn, reply_data, turns_of
from bot.storage import Asked, Conversation, Storage
from bot.stream import Delta, Phase, PhaseName
from bot.wire import dump_event, dump_failed, dump_frame

logger = logging.getLogger(__name__)

T = TypeVar("T")

HUMAN_ASKED_FOR: dict[Language, str] = {
    "zh": "已为您呼叫人工客服，请稍候。等待期间您可以继续提问。",
    "en": "We have asked a human colleague to join; please stay here. You can go on asking meanwhile.",
}

HISTORY_EVENTS = 60  # more than any prompt has room for; the log itself is kept whole

CLOSE_RESTART = 1012  # "service restart": come back, the conversation is kept
CLOSE_TRY_LATER = 1013


class Answerer(Protocol):
    """Makes replies; `bot.answer` has the real one. One instance serves all conversations of a process."""

    def answer(
        self, history: Sequence[Turn], question: str, *, locale: str | None, stop: asyncio.Event
    ) -> AsyncGenerator[Phase | Delta | Reply, None]:
        """
        Yield phases and deltas, and last exactly one `Reply`.

        Once `stop` is set, a reply with finish "abort" and the text so far comes soon. Closing the generator gives
        the reply up.

        Raises:
            BotError: EngineBusy, EngineNotReady, EngineFailed, EngineDead.
        """
        ...


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
    text: str = ""
    phase: PhaseName | None = None
    top_index: int = -1  # highest delta index that any subscriber was given; a resumed one goes on from there


class Subscriber:
    """
    What one connection has yet to be sent: frames in order, and its place in the reply under way.

    Filled by the hub and by the connection itself, emptied by the connection's one writer. Never blocks whoever
    fills it: a connection that does not empty it is ended with 1013 instead.
    """

    def __init__(self, *, max_frames: int = 256, coalesce_s: float = 0.04) -> None:
        """
        Args:
            max_frames: frames that may wait, replayed events aside.
            coalesce_s: least time between two deltas; text that comes sooner is joined to the next.
        """
        self.close_code: int | None = None  # set once no more frames will be taken
        self.close_reason = ""
        self.live: _Live | None = None  # the hub's own note of where this subscriber is
        self._max_frames = max_frames
        self._coalesce_s = coalesce_s
        self._frames: deque[str] = deque()
        self._wake = asyncio.Event()
        self._reply: ReplyUnderWay | None = None
        self._sent_chars = 0
        self._index = -1
        self._due = 0.0

    @property
    def ended(self) -> bool:
        return self.close_code is not None

    def push(self, frame: str, *, replay: bool = False) -> None:
        """Queue one frame; ignored once ended. `replay`: part of a resume, not bounded."""
        if self.ended:
            return
        if not replay and len(self._frames) >= self._max_frames:
            self._frames.clear()
            self.end(CLOSE_TRY_LATER, "too slow; reconnect and resume")
            return
        self._frames.append(frame)
        self._wake.set()

    def end(self, code: int, reason: str = "") -> None:
        """Take no more frames; those already queued are still sent."""
        if not self.ended:
            self.close_code, self.close_reason = code, reason
            self._reply = None
            self._wake.set()

    async def next_frame(self) -> str | None:
        """Return the next frame to send, waiting for one; None once ended and empty."""
        clock = asyncio.get_running_loop().time
        while True:
            if self._frames:
                return self._frames.popleft()
            if self.ended:
                return None
            wait_s: float | None = None
            if self._reply is not None and len(self._reply.text) > self._sent_chars:
                wait_s = self._due - clock()
                if wait_s <= 0:
                    self._due = clock() + self._coalesce_s
                    return self._take_delta(self._reply)
            self._wake.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

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
        self.push(dump_frame("partial", turn=reply.turn, index=self._index, text=reply.text), replay=True)
        if reply.phase is not None:
            self.push(dump_frame("status", turn=reply.turn, phase=reply.phase), replay=True)

    def grown(self) -> None:
        """The reply under way has new text."""
        self._wake.set()

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


@dataclass(slots=True, eq=False)
class _Ask:
    """A question that waits for its reply, or is getting it."""

    turn: str
    question: str
    seq: int
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    deadline: asyncio.Timeout | None = None  # set while the reply is being made


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
    failed: set[str] = field(default_factory=set)  # turns that wait for the visitor to try again
    users: int = 0  # operations in progress

    @property
    def state(self) -> State:
        assert self.head is not None
        return self.head.state

    def find(self, turn: str) -> _Ask | None:
        """Return the question of `turn` if its reply is under way or waits."""
        if self.current is not None and self.current.turn == turn:
            return self.current
        return next((ask for ask in self.waiting if ask.turn == turn), None)

    def publish(self, event: Event) -> None:
        """Give an event to every subscriber; the caller holds the lock since before it was numbered."""
        if event.kind == "state":
            assert self.head is not None
            self.head = replace(self.head, state=event.data["state"])
        frame = dump_event(event)
        for subscriber in self.subscribers:
            subscriber.push(frame)


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
        max_waiting: int = 5,
        reply_timeout_s: float = 180.0,
        stop_timeout_s: float = 10.0,
        resume_age_s: float = 24 * 3600.0,
    ) -> None:
        """
        Args:
            max_waiting: questions that may wait while a reply is under way.
            reply_timeout_s: longest a reply may take; then it fails and may be asked for again.
            stop_timeout_s: longest a stopped reply may take to end.
            resume_age_s: questions without a reply that are older are not taken up when a visitor comes back.
        """
        self.storage = storage
        self.answerer = answerer
        self.recorder = recorder or NullRecorder()
        self.max_waiting = max_waiting
        self.reply_timeout_s = reply_timeout_s
        self.stop_timeout_s = stop_timeout_s
        self.resume_age_s = resume_age_s
        self._live: dict[str, _Live] = {}
        self._operations: set[asyncio.Task[Any]] = set()
        self._closing = False

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
        return sum(len(live.waiting) for live in self._live.values())

    @property
    def n_tasks(self) -> int:
        """Tasks of ours that are not done; 0 when nothing is going on."""
        return len(self._operations) + sum(live.task is not None for live in self._live.values())

    # Joining

    async def start(
        self, subscriber: Subscriber, locale: str | None, welcome: Callable[[Conversation, str], str]
    ) -> str:
        """
        Make a conversation, subscribe to it, return its id.

        Args:
            welcome: makes the `welcome` frame of the conversation and its token.
        """
        id_, token = await self.storage.create_conversation(locale)
        if not subscriber.ended:
            live = self._live.setdefault(id_, _Live(id_))
            live.head = Conversation(id_, locale, "bot", 0)
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
        async with self._using(conversation) as live:
            live.head = await self.storage.get(conversation)
            events = [] if after is None else await self.storage.events(conversation, after)
            due = await self.storage.unanswered(since=since, conversation=conversation)
            if subscriber.ended:  # the connection closed meanwhile, and will not unsubscribe again
                return
            subscriber.push(welcome(live.head), replay=True)
            for event in events:
                subscriber.push(dump_event(event), replay=True)
            self._add(live, subscriber)
            if live.reply is not None:
                subscriber.join(live.reply)
            for ask in due:
                self._enqueue(live, _Ask(ask.client_id, ask.text, ask.seq), retry=False)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a subscriber, wherever it is in joining. The reply under way goes on."""
        subscriber.end(1000)
        live = subscriber.live
        if live is not None and subscriber in live.subscribers:
            live.subscribers.remove(subscriber)
            self._drop_if_idle(live)

    # What a visitor can do

    async def ask(self, conversation: str, id_: str, text: str, *, by: Subscriber | None = None) -> Asked:
        """
        Store a question once, acknowledge it to `by`, and see to its reply.

        The same id again is acknowledged as a duplicate; if its reply failed, it is made again.

        Raises:
            Conflict: the id was used for another text.
            ReplyInProgress: too many questions wait already; nothing was stored.
            UnknownConversation, StorageUnavailable: nothing was stored.
        """
        return await self._finish(self._ask(conversation, id_, text, by))

    async def _ask(self, conversation: str, id_: str, text: str, by: Subscriber | None) -> Asked:
        async with self._using(conversation) as live:
            if len(live.waiting) >= self.max_waiting and await self.storage.find_ask(conversation, id_) is None:
                raise ReplyInProgress
            asked = await self.storage.append_ask(conversation, id_, text)
            if by is not None:
                by.push(dump_frame("ack", id=id_, seq=asked.event.seq, duplicate=asked.duplicate))
            if not asked.duplicate:
                self.recorder.asked()
                live.publish(asked.event)
                if live.state == "closed":
                    await self._append(live, ("state", {"state": "bot", "reason": "reopened"}))
            if not asked.answered and live.state in ("bot", "waiting"):
                self._enqueue(live, _Ask(id_, text, asked.event.seq), retry=True)
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

        Raises:
            BadFrame: there is no such turn.
            ReplyInProgress: its reply is under way, or too many wait.
        """
        async with self._using(conversation) as live:
            asked = await self.storage.find_ask(conversation, turn)
            if asked is None:
                raise BadFrame(f"there is no turn {turn[:64]!r} in this conversation")
            if live.find(turn) is not None or len(live.waiting) >= self.max_waiting:
                raise ReplyInProgress
            self._enqueue(live, _Ask(turn, asked.event.text, asked.event.seq), retry=True)

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

    async def handoff(self, conversation: str, reason: str | None) -> None:
        """Ask for a human: tell the visitor, and set the state to waiting. Nothing where one was asked for already."""
        await self._finish(self._handoff(conversation, reason))

    async def _handoff(self, conversation: str, reason: str | None) -> None:
        async with self._using(conversation) as live:
            if live.state in ("waiting", "human"):
                return
            assert live.head is not None
            said = [e.text for e in await self.storage.events(conversation, last=HISTORY_EVENTS) if e.role == "visitor"]
            language = reply_language("", [Turn(text, "") for text in said], live.head.locale)
            await self._append(
                live,
                ("message", {"role": "system", "text": HUMAN_ASKED_FOR[language]}),
                ("state", {"state": "waiting", "reason": reason or "visitor"}),
            )

    async def set_state(self, conversation: str, state: State, **data: Any) -> None:
        """Move a conversation to `state`; `human` and `closed` also stop what the bot is saying."""
        await self._finish(self._set_state(conversation, state, data))

    async def _set_state(self, conversation: str, state: State, data: dict[str, Any]) -> None:
        async with self._using(conversation) as live:
            if live.state == state:
                return
            if state in ("human", "closed"):
                for ask in (live.current, *live.waiting):
                    if ask is not None:
                        self._stop(ask)
            await self._append(live, ("state", _without_none(state=state, **data)))

    # At start and at the end

    async def recover(self, max_age_s: float = 600.0) -> int:
        """
        Take up the questions that were acknowledged but never answered; return how many.

        Call it once the answerer can answer. Older ones are taken up when their visitor comes back.
        """
        n = 0
        for due in await self.storage.unanswered(since=datetime.now(UTC) - timedelta(seconds=max_age_s)):
            async with self._using(due.conversation) as live:
                # Looked up again under the lock: its visitor may have come back meanwhile, and have the reply.
                asked = await self.storage.find_ask(due.conversation, due.client_id)
                if asked is None or asked.answered:
                    continue
                n += self._enqueue(live, _Ask(due.client_id, due.text, due.seq), retry=True)
        if n:
            logger.info("answering %d questions that a restart left without a reply", n)
        return n

    async def close(self, timeout_s: float = 5.0) -> None:
        """
        Let replies under way end within `timeout_s`, give the rest up, leave no task behind.

        A reply that was given up is not stored, half or at all: its question is answered after the restart.
        """
        self._closing = True
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
            for subscriber in live.subscribers:
                subscriber.end(CLOSE_RESTART, "restarting")

    # Replies

    def _enqueue(self, live: _Live, ask: _Ask, *, retry: bool) -> bool:
        """Queue a question unless it is there already, or (without `retry`) failed before; return whether it was."""
        if self._closing or live.find(ask.turn) is not None or (ask.turn in live.failed and not retry):
            return False
        live.waiting.append(ask)
        if live.task is None:
            live.task = asyncio.create_task(self._answer_all(live), name=f"replies-{live.id}")
        return True

    async def _answer_all(self, live: _Live) -> None:
        """Answer what waits, one at a time: a later question may lean on the reply to an earlier one."""
        try:
            while live.waiting:
                live.current = live.waiting.popleft()
                await self._answer_one(live, live.current)
        finally:
            live.current = live.task = None
            self._drop_if_idle(live)

    async def _answer_one(self, live: _Live, ask: _Ask) -> None:
        reply = live.reply = ReplyUnderWay(ask.turn)
        live.failed.discard(ask.turn)
        for subscriber in live.subscribers:
            subscriber.begin(reply)
        try:
            await self._reply(live, ask, reply)
        # Nobody awaits this task: what is not handled here leaves the visitor waiting for ever.
        except (EngineFailed, EngineDead) as exc:
            logger.exception("conversation %s: no reply", live.id)
            self._fail(live, reply, exc)
        except BotError as exc:  # busy, still loading, storage: known causes, logged where they arose
            logger.warning("conversation %s: no reply: %s", live.id, exc.code)
            self._fail(live, reply, exc)
        except Exception as exc:
            logger.exception("conversation %s: no reply", live.id)
            self._fail(live, reply, exc)
        finally:
            live.reply = None
            for subscriber in live.subscribers:
                subscriber.finish(reply, flush=False)

    async def _reply(self, live: _Live, ask: _Ask, reply: ReplyUnderWay) -> None:
        """Make the reply, telling the subscribers as it grows; store it whole; publish it."""
        clock = asyncio.get_running_loop().time
        began, first_text = clock(), None
        final: Reply | None = None
        assert live.head is not None

        # 1) Make it.
        history = history_of(await self.storage.events(live.id, last=HISTORY_EVENTS), before=ask.seq)
        try:
            async with asyncio.timeout(self.reply_timeout_s) as ask.deadline:
                steps = self.answerer.answer(history, ask.question, locale=live.head.locale, stop=ask.stop)
                async with aclosing(steps):
                    async for step in steps:
                        if isinstance(step, Delta):
                            first_text = first_text or clock()
                            reply.text += step.text
                            for subscriber in live.subscribers:
                                subscriber.grown()
                        elif isinstance(step, Phase):
                            reply.phase = step.name
                            for subscriber in live.subscribers:
                                subscriber.push(dump_frame("status", turn=ask.turn, phase=step.name))
                        else:
                            final = step
        except TimeoutError:
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
        entries: list[tuple[EventKind, dict[str, Any]]] = [("message", reply_data(final, ask.turn))]
        async with live.lock:
            if final.outcome == "handoff" and live.state == "bot":
                entries.append(("state", {"state": "waiting", "reason": "bot"}))
            stored = await self.storage.append_all(live.id, entries)
            for subscriber in live.subscribers:
                subscriber.finish(reply, flush=not final.revised)
            for event in stored:
                live.publish(event)
        self.recorder.replied(final, None if first_text is None else first_text - began, clock() - began)

    def _fail(self, live: _Live, reply: ReplyUnderWay, error: Exception) -> None:
        live.failed.add(reply.turn)
        self.recorder.reply_failed(error.code if isinstance(error, BotError) else "internal")
        frame = dump_failed(error, turn=reply.turn)
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

    async def _append(self, live: _Live, *entries: tuple[EventKind, dict[str, Any]]) -> None:
        """Store and publish; the caller holds the lock."""
        for event in await self.storage.append_all(live.id, entries):
            live.publish(event)

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
            raise EngineNotReady
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


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
