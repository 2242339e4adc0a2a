"""
Where conversations are kept: an ordered event log in SQL. The only file that knows SQLAlchemy and alembic.

Knows ids, sequence numbers, tokens and which question has a reply. Does not know sockets, frames or engines, nor
what a message says.

What it promises:
- An event is on disk (committed) before `append` returns; its `seq` follows the one before without a gap.
- The same question sent twice (same client id) is stored once.
- SQLite: `synchronous=NORMAL` in WAL mode. A killed process loses nothing that was acknowledged; a power cut may
  lose the commits since the last checkpoint, never the file. (FULL costs an fsync a commit: measured about 58 times
  slower for single rows; group commit below would win part of it back.)

All writes go through one task, which commits whatever waits as one transaction (group commit): with one writer,
sequence numbers need no retry, and SQLite's one-writer rule is never met as an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import IO, Any, TypeVar, cast

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from bot.errors import (
    ClientError,
    Conflict,
    MerchantError,
    NotAllowed,
    NotYours,
    StorageUnavailable,
    Taken,
    UnknownConversation,
)
from bot.messages import Customer, Event, EventKind, State
from bot.tables import agent_sends as _agent_sends
from bot.tables import asks as _asks
from bot.tables import conversations as _conversations
from bot.tables import events as _events
from bot.tables import handoffs as _handoffs
from bot.tables import left_messages as _left_messages

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two servers on one file are then not noticed
    fcntl = None

logger = logging.getLogger(__name__)

MIGRATIONS_DIR = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_MS = 5_000
MAX_SEQ = 2**31 - 1
MAX_LAST_CHARS = 200
MAX_BATCH = 64  # operations in one commit; more gains nothing and makes the first one wait

T = TypeVar("T")


# The statements of every question and reply, built once: building them took as long as running them.
_last = sa.func.coalesce(
    sa.select(sa.func.max(_events.c.seq)).where(_events.c.conversation_id == sa.bindparam("c")).scalar_subquery(), 0
).label("last")
_is_conversation = _conversations.c.id == sa.bindparam("c")
_is_ask = sa.and_(_asks.c.conversation_id == sa.bindparam("c"), _asks.c.client_id == sa.bindparam("i"))
_of_ask = sa.and_(_events.c.conversation_id == _asks.c.conversation_id, _events.c.seq == _asks.c.seq)
_after = sa.and_(_events.c.conversation_id == sa.bindparam("c"), _events.c.seq > sa.bindparam("after"))

_SELECT_HEAD = sa.select(
    _conversations.c.locale,
    _conversations.c.state,
    _conversations.c.owner,
    _conversations.c.customer_id,
    _conversations.c.customer_name,
    _conversations.c.customer_email,
    _conversations.c.created_at,
    _last,
).where(_is_conversation)
_SELECT_HEAD_AND_ASK = (
    sa.select(_last, _asks.c.text_hash).select_from(_conversations.outerjoin(_asks, _is_ask)).where(_is_conversation)
)
_SELECT_ASK = sa.select(_events, _asks.c.text_hash, _asks.c.answered_seq).join(_asks, _of_ask).where(_is_ask)
_SELECT_EVENTS = sa.select(_events).where(_after).order_by(_events.c.seq)
_SELECT_LAST_EVENTS = sa.select(_events).where(_after).order_by(_events.c.seq.desc()).limit(sa.bindparam("last"))
_INSERT_EVENT = sa.insert(_events)
_INSERT_ASK = sa.insert(_asks)
_SET_STATE = (
    sa.update(_conversations)
    .where(_is_conversation)
    .values(
        state=sa.bindparam("new"),
        state_at=sa.bindparam("now"),
        owner=sa.bindparam("agent"),
        reason=sa.bindparam("why"),
    )
)
# One statement decides who gets a conversation: of two at once one updates a row, the other none.
_SWAP_STATE = (
    sa.update(_conversations)
    .where(
        _is_conversation,
        _conversations.c.state == sa.bindparam("old"),
        _conversations.c.owner.is_not_distinct_from(sa.bindparam("old_owner")),
    )
    .values(state=sa.bindparam("new"), owner=sa.bindparam("new_owner"))
)
_SELECT_OWNER = sa.select(_conversations.c.state, _conversations.c.owner).where(_is_conversation)
_SET_LAST = (
    sa.update(_conversations)
    .where(_is_conversation)
    .values(last_at=sa.bindparam("now"), last_role=sa.bindparam("role"), last_text=sa.bindparam("text"))
)
_SET_LAST_AT = sa.update(_conversations).where(_is_conversation).values(last_at=sa.bindparam("now"))
_SETTLE_ASKS = (
    sa.update(_asks)
    .where(_asks.c.conversation_id == sa.bindparam("c"), _asks.c.answered_seq.is_(None))
    .values(answered_seq=sa.bindparam("new"))
)
_OPEN_HANDOFF = sa.and_(_handoffs.c.conversation_id == sa.bindparam("c"), _handoffs.c.ended_at.is_(None))
_END_HANDOFF = (
    sa.update(_handoffs).where(_OPEN_HANDOFF).values(ended_at=sa.bindparam("now"), ended_as=sa.bindparam("how"))
)
_ACCEPT_HANDOFF = (
    sa.update(_handoffs).where(_OPEN_HANDOFF).values(accepted_at=sa.bindparam("now"), agent_id=sa.bindparam("agent"))
)
_INSERT_HANDOFF = sa.insert(_handoffs)
_SELECT_SEND = (
    sa.select(_agent_sends.c.text_hash, _events)
    .join(
        _events,
        sa.and_(_events.c.conversation_id == _agent_sends.c.conversation_id, _events.c.seq == _agent_sends.c.seq),
    )
    .where(
        _agent_sends.c.conversation_id == sa.bindparam("c"),
        _agent_sends.c.agent_id == sa.bindparam("a"),
        _agent_sends.c.client_id == sa.bindparam("i"),
    )
)
_SET_ANSWERED = sa.update(_asks).where(_is_ask).values(answered_seq=sa.bindparam("new"))


@dataclass(frozen=True, slots=True)
class Conversation:
    """The head of a log: what can be said of a conversation without reading its events."""

    id: str
    locale: str | None
    state: State
    seq: int  # of the last event; 0 where there is none
    owner: str | None = None  # id of the agent who has it, in state human
    customer: Customer | None = None  # whom the store's backend signed for; None is nobody: no order data
    created_at: datetime | None = None  # aware; None only for one that no database holds


@dataclass(frozen=True, slots=True)
class Log:
    """A conversation with all its events, for those who look back on many."""

    id: str
    created_at: datetime
    locale: str | None
    state: State
    customer: str | None  # id of whom the store signed for
    events: list[Event]


@dataclass(frozen=True, slots=True)
class Sent:
    """A stored message or note of an agent."""

    event: Event
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A stored question."""

    event: Event
    duplicate: bool  # it was stored before; nothing was written now
    answered: bool


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A stored question without a reply."""

    conversation: str
    client_id: str
    seq: int
    text: str
    asked_at: datetime


@dataclass(slots=True)
class _Write:
    operation: Callable[[AsyncConnection], Awaitable[Any]]
    done: asyncio.Future[Any]


class Storage:
    """
    The event log of all conversations of a process.

    Operations may be called from many tasks of one event loop. Cancelling a write while it waits leaves it open
    whether it was stored; a caller that must know shields it.

    Raises (every operation): StorageUnavailable, when the database cannot be read or written. Nothing was stored
    then, and later operations work again once the cause is gone.
    """

    def __init__(self, url: str | Path) -> None:
        """
        Args:
            url: an SQLAlchemy URL with an async driver (`sqlite+aiosqlite:///var/zhanggui.db`,
                `postgresql+asyncpg://…`), or the path of an SQLite file.
        """
        self._url = _parse_url(url)
        self._engine: AsyncEngine | None = None
        self._connection: AsyncConnection | None = None  # the writer's
        self._lock_file: IO[str] | None = None
        self._writes: asyncio.Queue[_Write | None] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None

    # Opening and closing

    async def open(self, *, shared: bool = False, must_exist: bool = False) -> None:
        """
        Connect, bring the schema up to date, start writing.

        Args:
            shared: beside a running server: for a command that appends no events (accounts of agents).
            must_exist: for a command that looks back: an SQLite file that is not there is not made.

        Raises:
            MerchantError: another process has the file open, a newer version of this program wrote it, or it is
                missing.
            StorageUnavailable: the database cannot be reached.
        """
        if self._url.get_backend_name() == "sqlite":
            self._lock_sqlite_file(shared=shared, must_exist=must_exist)
        self._engine = create_async_engine(
            self._url,
            pool_pre_ping=self._url.get_backend_name() != "sqlite",
            json_serializer=lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
        )
        if self._url.get_backend_name() == "sqlite":
            _prepare_sqlite(self._engine)
        try:
            await self._migrate()
        except BaseException:
            await self.close()
            raise
        self._writes = asyncio.Queue()  # a new one: the old one belongs to the loop it was used in
        self._writer = asyncio.create_task(self._write_loop(), name="storage-writer")

    async def close(self) -> None:
        """Finish what waits to be written, then disconnect. May be called twice."""
        if self._writer is not None:
            self._writes.put_nowait(None)
            await self._writer
            self._writer = None
        await self._drop_write_connection()
        if self._engine is not None:
            await self._engine.dispose()
            self._engine = None
        if self._lock_file is not None:
            self._lock_file.close()  # closing drops the lock
            self._lock_file = None

    async def ping(self) -> None:
        """Return if the database answers (for /readyz)."""
        await self.read(sa.select(sa.literal(1)))

    # Conversations

    async def create_conversation(self, locale: str | None, customer: Customer | None = None) -> tuple[str, str]:
        """Return (id, token) of a new conversation. Only a hash of the token is stored: keep it, or lose it."""
        id_, token = f"c_{secrets.token_urlsafe(12)}", secrets.token_urlsafe(32)
        statement = sa.insert(_conversations).values(
            id=id_,
            token_hash=_hash(token),
            created_at=(now := datetime.now(UTC)),
            locale=locale,
            state="bot",
            state_at=now,
            last_at=now,
            customer_id=customer.id if customer else None,
            customer_name=customer.name if customer else None,
            customer_email=customer.email if customer else None,
        )

        async def operation(connection: AsyncConnection) -> None:
            await connection.execute(statement)

        await self.write(operation)
        return id_, token

    async def authenticate(self, conversation: str, token: str) -> None:
        """
        Return if `token` is the secret of `conversation`.

        Raises:
            UnknownConversation: no such conversation, or another token; which of the two is not said.
        """
        rows = await self.read(sa.select(_conversations.c.token_hash).where(_conversations.c.id == conversation))
        # An unknown id is compared as well, so that the time taken does not tell it from a wrong token.
        expected = rows[0].token_hash if rows else _hash("")
        if not hmac.compare_digest(expected, _hash(token)) or not rows:
            raise UnknownConversation

    async def get(self, conversation: str) -> Conversation:
        """Return the head of `conversation`, or raise UnknownConversation."""
        rows = await self.read(_SELECT_HEAD, {"c": conversation})
        if not rows:
            raise UnknownConversation
        row = rows[0]
        return Conversation(
            conversation, row.locale, cast(State, row.state), row.last, row.owner, _customer_of(row), row.created_at
        )

    async def set_customer(self, conversation: str, customer: Customer) -> None:
        """
        Tie `conversation` to the customer the store signed for.

        Raises:
            UnknownConversation: there is none of this id, or it is another customer's.
        """
        statement = (
            sa.update(_conversations)
            .where(
                _conversations.c.id == conversation,
                sa.or_(_conversations.c.customer_id.is_(None), _conversations.c.customer_id == customer.id),
            )
            .values(customer_id=customer.id, customer_name=customer.name, customer_email=customer.email)
        )

        async def operation(connection: AsyncConnection) -> None:
            if (await connection.execute(statement)).rowcount == 0:
                raise UnknownConversation

        await self.write(operation)

    # Events

    async def append(self, conversation: str, kind: EventKind, data: dict[str, Any]) -> Event:
        """
        Store one event and return it with its sequence number.

        An event of kind `state` also sets the conversation's state; a message of a bot or an agent with a `turn`
        also marks that question as answered, and one with `turns` all of those.

        Raises:
            UnknownConversation: there is none of this id.
        """
        return (await self.append_all(conversation, [(kind, data)]))[0]

    async def append_all(self, conversation: str, entries: Sequence[tuple[EventKind, dict[str, Any]]]) -> list[Event]:
        """Store several events, all or none, with consecutive sequence numbers; see `append`."""

        async def operation(connection: AsyncConnection) -> list[Event]:
            return await _insert_all(connection, conversation, entries)

        return await self.write(operation)

    async def change(
        self,
        conversation: str,
        entries: Sequence[tuple[EventKind, dict[str, Any]]],
        *,
        state: State,
        owner: str | None,
        new_owner: str | None,
        settle: bool = False,
    ) -> list[Event]:
        """
        Store `entries`, the last state event of which moves the conversation from (`state`, `owner`) to its new state.

        One statement compares and swaps: where somebody else was faster, nothing is stored.

        Args:
            settle: count the questions that have no reply as answered, so that the bot does not take them up later.

        Raises:
            Taken: it is another agent's by now. NotAllowed: it is in another state. UnknownConversation.
        """
        new: State = next(data["state"] for kind, data in reversed(entries) if kind == "state")

        async def operation(connection: AsyncConnection) -> list[Event]:
            swap = {"c": conversation, "old": state, "old_owner": owner, "new": new, "new_owner": new_owner}
            if (await connection.execute(_SWAP_STATE, swap)).rowcount == 0:
                found = (await connection.execute(_SELECT_OWNER, {"c": conversation})).one_or_none()
                if found is None:
                    raise UnknownConversation
                if found.owner is not None and found.owner != owner:
                    raise Taken(found.owner)
                raise NotAllowed(found.state, new)
            events = await _insert_all(connection, conversation, entries)
            if settle:
                await connection.execute(_SETTLE_ASKS, {"c": conversation, "new": events[-1].seq})
            return events

        return await self.write(operation)

    async def append_sent(
        self,
        conversation: str,
        agent: str,
        client_id: str,
        kind: EventKind,
        data: dict[str, Any],
        *,
        only_owner: bool,
    ) -> Sent:
        """
        Store an agent's message or note, once per agent and `client_id`.

        Raises:
            Conflict: the id was used before for another text. NotYours: with `only_owner`, somebody else has the
            conversation. UnknownConversation. Nothing was stored.
        """

        async def operation(connection: AsyncConnection) -> Sent:
            row = (
                await connection.execute(_SELECT_SEND, {"c": conversation, "a": agent, "i": client_id})
            ).one_or_none()
            if row is not None:
                if row.text_hash != _hash(data["text"]):
                    raise Conflict(client_id)
                return Sent(_event(row), duplicate=True)
            head = (await connection.execute(_SELECT_OWNER, {"c": conversation})).one_or_none()
            if head is None:
                raise UnknownConversation
            if only_owner and (head.state != "human" or head.owner != agent):
                raise NotYours
            (event,) = await _insert_all(connection, conversation, [(kind, data)])
            if kind == "message":  # whatever was asked before has its answer
                await connection.execute(_SETTLE_ASKS, {"c": conversation, "new": event.seq})
            await connection.execute(
                sa.insert(_agent_sends).values(
                    conversation_id=conversation,
                    agent_id=agent,
                    client_id=client_id,
                    seq=event.seq,
                    text_hash=_hash(data["text"]),
                )
            )
            return Sent(event, duplicate=False)

        return await self.write(operation)

    async def append_left(
        self, conversation: str, client_id: str, email: str, text: str, said: dict[str, Any]
    ) -> tuple[Asked, list[Event]]:
        """
        Store a message left for later, once per `client_id`, and what the server says to it.

        Returns:
            the message (as a question that is answered: the bot is not asked), and all new events in order.

        Raises:
            Conflict, UnknownConversation: nothing was stored.
        """

        async def operation(connection: AsyncConnection) -> tuple[Asked, list[Event]]:
            _, text_hash = await _last_seq_and_ask(connection, conversation, client_id)
            if text_hash is not None:
                if text_hash != _hash(text):
                    raise Conflict(client_id)
                row = (await connection.execute(_SELECT_ASK, {"c": conversation, "i": client_id})).one()
                return Asked(_event(row), duplicate=True, answered=True), []
            data = {"role": "visitor", "turn": client_id, "text": text, "left": True, "email": email}
            events = await _insert_all(connection, conversation, [("message", data), ("message", said)])
            seq, at = events[0].seq, events[0].at
            await connection.execute(
                _INSERT_ASK,
                {
                    "conversation_id": conversation,
                    "client_id": client_id,
                    "seq": seq,
                    "text_hash": _hash(text),
                    "answered_seq": seq,
                    "asked_at": at,
                },
            )
            await connection.execute(
                sa.insert(_left_messages).values(
                    id=f"l_{secrets.token_urlsafe(9)}",
                    conversation_id=conversation,
                    seq=seq,
                    email=email,
                    text=text,
                    at=at,
                )
            )
            return Asked(events[0], duplicate=False, answered=True), events

        return await self.write(operation)

    async def append_ask(
        self, conversation: str, client_id: str, text: str, attachments: Sequence[dict[str, Any]] = ()
    ) -> Asked:
        """
        Store a visitor's question, once per `client_id`.

        Args:
            attachments: what goes into the event; each has an `id`.

        Raises:
            Conflict: the id was used before for another text, or other attachments; nothing was stored.
            UnknownConversation: there is none of this id.
        """

        # The lone text is what was hashed before there were attachments.
        hash_ = _hash("\0".join((text, *(str(each["id"]) for each in attachments))))

        async def operation(connection: AsyncConnection) -> Asked:
            seq, text_hash = await _last_seq_and_ask(connection, conversation, client_id)
            if text_hash is not None:
                if text_hash != hash_:
                    raise Conflict(client_id)
                row = (await connection.execute(_SELECT_ASK, {"c": conversation, "i": client_id})).one()
                return Asked(_event(row), duplicate=True, answered=row.answered_seq is not None)
            data: dict[str, Any] = {"role": "visitor", "turn": client_id, "text": text}
            if attachments:
                data["attachments"] = list(attachments)
            event = await _insert_event(connection, conversation, seq + 1, "message", data)
            await connection.execute(
                _INSERT_ASK,
                {
                    "conversation_id": conversation,
                    "client_id": client_id,
                    "seq": event.seq,
                    "text_hash": hash_,
                    "asked_at": event.at,
                },
            )
            return Asked(event, duplicate=False, answered=False)

        return await self.write(operation)

    async def find_ask(self, conversation: str, client_id: str) -> Asked | None:
        """Return the question stored under `client_id`, or None."""
        rows = await self.read(_SELECT_ASK, {"c": conversation, "i": client_id})
        return Asked(_event(rows[0]), duplicate=True, answered=rows[0].answered_seq is not None) if rows else None

    async def events(self, conversation: str, after: int = 0, *, last: int | None = None) -> list[Event]:
        """Return the events with a sequence number over `after`, in order; with `last`, only the last so many."""
        after = min(after, MAX_SEQ)  # visitors may say any number; drivers raise on one that does not fit
        query = _SELECT_EVENTS if last is None else _SELECT_LAST_EVENTS
        rows = await self.read(query, {"c": conversation, "after": after, "last": last})
        events = [_event(row) for row in rows]
        return events if last is None else events[::-1]

    async def logs(self, *, since: datetime, page: int = 200) -> AsyncGenerator[Log, None]:
        """Yield every conversation with an event at or after `since` (aware), oldest first, `page` read at a time."""
        c = _conversations.c
        recent = sa.select(_events.c.conversation_id).where(_events.c.at >= since)
        rows = await self.read(sa.select(c.id).where(c.id.in_(recent)).order_by(c.created_at, c.id))
        ids = [row.id for row in rows]
        for n in range(0, len(ids), page):
            chosen = ids[n : n + page]
            heads = {row.id: row for row in await self.read(sa.select(_conversations).where(c.id.in_(chosen)))}
            events: dict[str, list[Event]] = {id_: [] for id_ in chosen}
            query = sa.select(_events).where(_events.c.conversation_id.in_(chosen)).order_by(_events.c.seq)
            for row in await self.read(query):
                events[row.conversation_id].append(_event(row))
            for id_ in chosen:
                head = heads[id_]
                state = cast(State, head.state)
                yield Log(id_, head.created_at, head.locale, state, head.customer_id, events[id_])

    async def unanswered(self, *, since: datetime, conversation: str | None = None) -> list[Unanswered]:
        """
        Return the questions asked at or after `since` (aware) that have no reply, oldest first.

        Those of conversations that a human has or that are closed are left out: no reply of the bot is due.
        """
        query = (
            sa.select(_asks.c.conversation_id, _asks.c.client_id, _asks.c.seq, _asks.c.asked_at, _events.c.data)
            .join(_events, sa.and_(_events.c.conversation_id == _asks.c.conversation_id, _events.c.seq == _asks.c.seq))
            .join(_conversations, _conversations.c.id == _asks.c.conversation_id)
            .where(
                _asks.c.answered_seq.is_(None),
                _asks.c.asked_at >= since,
                _conversations.c.state.in_(("bot", "waiting")),
            )
            .order_by(_asks.c.asked_at, _asks.c.conversation_id, _asks.c.seq)
        )
        if conversation is not None:
            query = query.where(_asks.c.conversation_id == conversation)
        rows = await self.read(query)
        return [Unanswered(r.conversation_id, r.client_id, r.seq, str(r.data["text"]), r.asked_at) for r in rows]

    # Reading and writing

    async def read(self, query: sa.Select[Any], values: dict[str, Any] | None = None) -> Sequence[sa.Row[Any]]:
        """Return all rows of one statement; raises StorageUnavailable."""
        try:
            async with self._open_engine().connect() as connection:
                rows: Sequence[sa.Row[Any]] = (await connection.execute(query, values)).all()
                return rows
        except (SQLAlchemyError, OSError) as exc:
            logger.error("cannot read the database: %s", _reason(exc))
            raise StorageUnavailable from exc

    async def write(self, operation: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """
        Run `operation` inside the writer's transaction; return its result once that is committed.

        An operation raises a ClientError only before its first statement that writes: it shares the transaction.
        """
        if self._writer is None or self._writer.done():
            raise StorageUnavailable
        write = _Write(operation, asyncio.get_running_loop().create_future())
        self._writes.put_nowait(write)
        return cast(T, await write.done)

    async def _write_loop(self) -> None:
        while (first := await self._writes.get()) is not None:
            batch, more = [first], True
            while more and len(batch) < MAX_BATCH and not self._writes.empty():
                following = self._writes.get_nowait()
                if following is None:
                    self._writes.put_nowait(None)  # stop after this batch
                    more = False
                else:
                    batch.append(following)
            await self._commit(batch)
        # Whoever asked to write after `close` hears of it.
        while not self._writes.empty():
            late = self._writes.get_nowait()
            if late is not None and not late.done.done():
                late.done.set_exception(StorageUnavailable())

    async def _commit(self, batch: list[_Write]) -> None:
        """
        Commit a batch as one transaction.

        When an operation breaks it, they are tried one by one. When the commit itself fails they are not: over a
        network it may have happened all the same, and an event would be stored twice.
        """
        outcomes: list[tuple[_Write, Any, BaseException | None]] = []
        committing = False
        try:
            connection = await self._write_connection()
            async with connection.begin() as transaction:
                for write in batch:
                    try:
                        outcomes.append((write, await write.operation(connection), None))
                    except ClientError as exc:
                        outcomes.append((write, None, exc))
                committing = True
                await transaction.commit()
        except Exception as exc:  # any error at all: an operation that hangs its caller is worse than a wrong code
            await self._drop_write_connection()
            if len(batch) > 1 and not committing:
                for write in batch:
                    await self._commit([write])
                return
            error: BaseException = exc
            if isinstance(exc, SQLAlchemyError | OSError | StorageUnavailable):
                logger.error("cannot write the database: %s", _reason(exc))
                error = StorageUnavailable()
                error.__cause__ = exc
            outcomes = [(write, None, error) for write in batch]
        for write, result, failure in outcomes:
            if write.done.done():
                continue  # its caller was cancelled
            if failure is None:
                write.done.set_result(result)
            else:
                write.done.set_exception(failure)

    async def _write_connection(self) -> AsyncConnection:
        # Kept between commits: taking one from the pool and giving it back cost a third of a short write.
        if self._connection is None:
            connection = await self._open_engine().connect()
            self._connection = await connection.execution_options(zhanggui_writes=True)
        return self._connection

    async def _drop_write_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close()
            except (SQLAlchemyError, OSError) as exc:
                logger.warning("a broken database connection did not close: %s", _reason(exc))

    def _open_engine(self) -> AsyncEngine:
        if self._engine is None:
            raise StorageUnavailable
        return self._engine

    # Schema

    async def _migrate(self) -> None:
        try:
            async with self._open_engine().connect() as connection:
                connection = await connection.execution_options(zhanggui_writes=True)
                async with connection.begin():
                    await connection.run_sync(upgrade_schema)
        except (SQLAlchemyError, OSError) as exc:
            logger.error("cannot open the database: %s", _reason(exc))
            raise StorageUnavailable from exc

    def _lock_sqlite_file(self, *, shared: bool, must_exist: bool) -> None:
        """Take the file for this process: two servers would each number events and answer the same question."""
        name = self._url.database
        if not name or name == ":memory:" or name.startswith("file:"):
            raise MerchantError(f"database {name!r}: give the path of a file; a database in memory is not supported")
        path = Path(name)
        if must_exist and not path.is_file():
            raise MerchantError(f"database {str(path)!r}: no such file; name the server's conversations.sqlite3")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shared:
                return
            self._lock_file = path.with_name(f"{path.name}.lock").open("a", encoding="ascii")  # held while open
        except OSError as exc:
            raise MerchantError(f"database {str(path)!r} cannot be opened: {exc.strerror}") from exc
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            self._lock_file = None
            raise MerchantError(
                f"database {str(path)!r} is in use by another process; stop it, or name another file"
            ) from None


def upgrade_schema(connection: sa.Connection, revision: str = "head") -> None:
    """
    Bring the database of `connection` to `revision`, inside its transaction.

    Raises:
        MerchantError: its schema is of a revision that this version does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIR))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise MerchantError(
            f"the database was written by a newer version (schema {current!r}, this version knows up to "
            f"{scripts.get_current_head()!r}): start that version, or name another database"
        )
    if current != scripts.get_revision(revision).revision:
        command.upgrade(config, revision)


def _parse_url(url: str | Path) -> URL:
    if isinstance(url, Path) or "://" not in url:
        return URL.create("sqlite+aiosqlite", database=os.fspath(url))
    try:
        parsed = make_url(url)
    except ArgumentError:
        # The text is not shown: it may hold a password.
        raise MerchantError("the database URL cannot be read; write sqlite+aiosqlite:///FILE") from None
    if parsed.drivername == "sqlite":
        return parsed.set(drivername="sqlite+aiosqlite")
    return parsed


def _prepare_sqlite(engine: AsyncEngine) -> None:
    @sa.event.listens_for(engine.sync_engine, "connect")
    def on_connect(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # the driver's own BEGIN comes too late for reads before writes
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        # IMMEDIATE: a transaction that reads first and then writes could otherwise meet SQLITE_BUSY in its middle,
        # which busy_timeout does not cover.
        # A read is one statement, which is a snapshot by itself: no BEGIN, one step less.
        if connection.get_execution_options().get("zhanggui_writes"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")


async def _last_seq(connection: AsyncConnection, conversation: str) -> int:
    row = (await connection.execute(_SELECT_HEAD, {"c": conversation})).one_or_none()
    if row is None:
        raise UnknownConversation
    return int(row.last)


async def _last_seq_and_ask(connection: AsyncConnection, conversation: str, client_id: str) -> tuple[int, str | None]:
    """Return the last sequence number, and the hash of the text stored under `client_id` or None."""
    row = (await connection.execute(_SELECT_HEAD_AND_ASK, {"c": conversation, "i": client_id})).one_or_none()
    if row is None:
        raise UnknownConversation
    return int(row.last), row.text_hash


async def _insert_all(
    connection: AsyncConnection, conversation: str, entries: Sequence[tuple[EventKind, dict[str, Any]]]
) -> list[Event]:
    """Insert events with consecutive numbers; raises UnknownConversation."""
    seq = await _last_seq(connection, conversation)
    return [
        await _insert_event(connection, conversation, seq + n, kind, data) for n, (kind, data) in enumerate(entries, 1)
    ]


async def _insert_event(
    connection: AsyncConnection, conversation: str, seq: int, kind: EventKind, data: dict[str, Any]
) -> Event:
    # Milliseconds, as on the wire: an event reads the same live and replayed.
    now = datetime.now(UTC)
    event = Event(seq, now.replace(microsecond=now.microsecond // 1000 * 1000), kind, data)
    values = {"conversation_id": conversation, "seq": seq, "at": event.at, "kind": kind, "data": data}
    await connection.execute(_INSERT_EVENT, values)
    if kind == "state":
        await _enter_state(connection, conversation, event)
    if kind == "message" and event.role in ("visitor", "bot", "agent"):
        last = {"c": conversation, "now": event.at, "role": event.role, "text": event.text[:MAX_LAST_CHARS]}
        await connection.execute(_SET_LAST, last)
    else:
        await connection.execute(_SET_LAST_AT, {"c": conversation, "now": event.at})
    if kind == "message" and event.role in ("bot", "agent") and data.get("turn"):
        for turn in data.get("turns") or [data["turn"]]:
            await connection.execute(_SET_ANSWERED, {"c": conversation, "i": turn, "new": seq})
    return event


async def _enter_state(connection: AsyncConnection, conversation: str, event: Event) -> None:
    """Set the conversation's state, owner and reason from a state event, and keep the account of its hand-offs."""
    new, now, reason = event.data["state"], event.at, event.data.get("reason")
    agent = event.data["agent"]["id"] if new == "human" and "agent" in event.data else None
    why = None if reason is None or new == "bot" else str(reason)[:200]
    await connection.execute(_SET_STATE, {"c": conversation, "new": new, "now": now, "agent": agent, "why": why})
    handed_over = False
    if new == "human":
        query = sa.select(_handoffs.c.accepted_at).where(_OPEN_HANDOFF)
        rows = (await connection.execute(query, {"c": conversation})).all()
        handed_over = not rows or rows[0].accepted_at is not None
        if not handed_over:
            await connection.execute(_ACCEPT_HANDOFF, {"c": conversation, "now": now, "agent": agent})
    if new != "human" or handed_over:
        await connection.execute(_END_HANDOFF, {"c": conversation, "now": now, "how": new})
    if new == "waiting" or handed_over:
        await connection.execute(
            _INSERT_HANDOFF,
            {
                "conversation_id": conversation,
                "seq": event.seq,
                "opened_at": now,
                "reason": why,
                "accepted_at": now if handed_over else None,
                "agent_id": agent,
            },
        )


def _customer_of(row: sa.Row[Any]) -> Customer | None:
    return None if row.customer_id is None else Customer(row.customer_id, row.customer_name, row.customer_email)


def _event(row: sa.Row[Any]) -> Event:
    return Event(row.seq, row.at, cast(EventKind, row.kind), row.data)


def _hash(secret: str) -> str:
    # Tokens are 256 random bits, so a plain hash cannot be guessed back; texts are only compared.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _reason(exc: BaseException) -> str:
    """Return the driver's own words without SQLAlchemy's, which quote the statement's values (visitors' texts)."""
    cause = getattr(exc, "orig", None) or exc
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
