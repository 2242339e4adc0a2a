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
from collections.abc import Awaitable, Callable, Sequence
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

from bot.errors import Conflict, MerchantError, StorageUnavailable, UnknownConversation
from bot.messages import Event, EventKind, State

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two servers on one file are then not noticed
    fcntl = None

logger = logging.getLogger(__name__)

MIGRATIONS_DIR = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_MS = 5_000
MAX_SEQ = 2**31 - 1
MAX_BATCH = 64  # operations in one commit; more gains nothing and makes the first one wait

T = TypeVar("T")


class _Utc(sa.TypeDecorator[datetime]):
    """Aware datetimes, in and out; SQLite itself forgets the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is not None and value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        return value


_METADATA = sa.MetaData()

_conversations = sa.Table(
    "conversations",
    _METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("token_hash", sa.String(64), nullable=False),
    sa.Column("created_at", _Utc, nullable=False),
    sa.Column("locale", sa.String(35)),
    sa.Column("state", sa.String(16), nullable=False),
)
_events = sa.Table(
    "events",
    _METADATA,
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", _Utc, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)
_asks = sa.Table(
    "asks",
    _METADATA,
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("client_id", sa.String(64), primary_key=True),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("text_hash", sa.String(64), nullable=False),
    sa.Column("answered_seq", sa.Integer),
    sa.Column("asked_at", _Utc),
)


# The statements of every question and reply, built once: building them took as long as running them.
_last = sa.func.coalesce(
    sa.select(sa.func.max(_events.c.seq)).where(_events.c.conversation_id == sa.bindparam("c")).scalar_subquery(), 0
).label("last")
_is_conversation = _conversations.c.id == sa.bindparam("c")
_is_ask = sa.and_(_asks.c.conversation_id == sa.bindparam("c"), _asks.c.client_id == sa.bindparam("i"))
_of_ask = sa.and_(_events.c.conversation_id == _asks.c.conversation_id, _events.c.seq == _asks.c.seq)
_after = sa.and_(_events.c.conversation_id == sa.bindparam("c"), _events.c.seq > sa.bindparam("after"))

_SELECT_HEAD = sa.select(_conversations.c.locale, _conversations.c.state, _last).where(_is_conversation)
_SELECT_HEAD_AND_ASK = (
    sa.select(_last, _asks.c.text_hash).select_from(_conversations.outerjoin(_asks, _is_ask)).where(_is_conversation)
)
_SELECT_ASK = sa.select(_events, _asks.c.text_hash, _asks.c.answered_seq).join(_asks, _of_ask).where(_is_ask)
_SELECT_EVENTS = sa.select(_events).where(_after).order_by(_events.c.seq)
_SELECT_LAST_EVENTS = sa.select(_events).where(_after).order_by(_events.c.seq.desc()).limit(sa.bindparam("last"))
_INSERT_EVENT = sa.insert(_events)
_INSERT_ASK = sa.insert(_asks)
_SET_STATE = sa.update(_conversations).where(_is_conversation).values(state=sa.bindparam("new"))
_SET_ANSWERED = sa.update(_asks).where(_is_ask).values(answered_seq=sa.bindparam("new"))


@dataclass(frozen=True, slots=True)
class Conversation:
    """The head of a log: what can be said of a conversation without reading its events."""

    id: str
    locale: str | None
    state: State
    seq: int  # of the last event; 0 where there is none


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

    async def open(self) -> None:
        """
        Connect, bring the schema up to date, start writing.

        Raises:
            MerchantError: another process has the file open, or a newer version of this program wrote it.
            StorageUnavailable: the database cannot be reached.
        """
        if self._url.get_backend_name() == "sqlite":
            self._lock_sqlite_file()
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
        await self._read(sa.select(sa.literal(1)))

    # Conversations

    async def create_conversation(self, locale: str | None) -> tuple[str, str]:
        """Return (id, token) of a new conversation. Only a hash of the token is stored: keep it, or lose it."""
        id_, token = f"c_{secrets.token_urlsafe(12)}", secrets.token_urlsafe(32)
        statement = sa.insert(_conversations).values(
            id=id_, token_hash=_hash(token), created_at=datetime.now(UTC), locale=locale, state="bot"
        )

        async def operation(connection: AsyncConnection) -> None:
            await connection.execute(statement)

        await self._write(operation)
        return id_, token

    async def authenticate(self, conversation: str, token: str) -> None:
        """
        Return if `token` is the secret of `conversation`.

        Raises:
            UnknownConversation: no such conversation, or another token; which of the two is not said.
        """
        rows = await self._read(sa.select(_conversations.c.token_hash).where(_conversations.c.id == conversation))
        # An unknown id is compared as well, so that the time taken does not tell it from a wrong token.
        expected = rows[0].token_hash if rows else _hash("")
        if not hmac.compare_digest(expected, _hash(token)) or not rows:
            raise UnknownConversation

    async def get(self, conversation: str) -> Conversation:
        """Return the head of `conversation`, or raise UnknownConversation."""
        rows = await self._read(_SELECT_HEAD, {"c": conversation})
        if not rows:
            raise UnknownConversation
        return Conversation(conversation, rows[0].locale, cast(State, rows[0].state), rows[0].last)

    # Events

    async def append(self, conversation: str, kind: EventKind, data: dict[str, Any]) -> Event:
        """
        Store one event and return it with its sequence number.

        An event of kind `state` also sets the conversation's state; a message of a bot or an agent with a `turn`
        also marks that question as answered.

        Raises:
            UnknownConversation: there is none of this id.
        """
        return (await self.append_all(conversation, [(kind, data)]))[0]

    async def append_all(self, conversation: str, entries: Sequence[tuple[EventKind, dict[str, Any]]]) -> list[Event]:
        """Store several events, all or none, with consecutive sequence numbers; see `append`."""

        async def operation(connection: AsyncConnection) -> list[Event]:
            seq = await _last_seq(connection, conversation)
            events = []
            for kind, data in entries:
                seq += 1
                events.append(await _insert_event(connection, conversation, seq, kind, data))
            return events

        return await self._write(operation)

    async def append_ask(self, conversation: str, client_id: str, text: str) -> Asked:
        """
        Store a visitor's question, once per `client_id`.

        Raises:
            Conflict: the id was used before for another text; nothing was stored.
            UnknownConversation: there is none of this id.
        """

        async def operation(connection: AsyncConnection) -> Asked:
            seq, text_hash = await _last_seq_and_ask(connection, conversation, client_id)
            if text_hash is not None:
                if text_hash != _hash(text):
                    raise Conflict(client_id)
                row = (await connection.execute(_SELECT_ASK, {"c": conversation, "i": client_id})).one()
                return Asked(_event(row), duplicate=True, answered=row.answered_seq is not None)
            data = {"role": "visitor", "turn": client_id, "text": text}
            event = await _insert_event(connection, conversation, seq + 1, "message", data)
            await connection.execute(
                _INSERT_ASK,
                {
                    "conversation_id": conversation,
                    "client_id": client_id,
                    "seq": event.seq,
                    "text_hash": _hash(text),
                    "asked_at": event.at,
                },
            )
            return Asked(event, duplicate=False, answered=False)

        return await self._write(operation)

    async def find_ask(self, conversation: str, client_id: str) -> Asked | None:
        """Return the question stored under `client_id`, or None."""
        rows = await self._read(_SELECT_ASK, {"c": conversation, "i": client_id})
        return Asked(_event(rows[0]), duplicate=True, answered=rows[0].answered_seq is not None) if rows else None

    async def events(self, conversation: str, after: int = 0, *, last: int | None = None) -> list[Event]:
        """Return the events with a sequence number over `after`, in order; with `last`, only the last so many."""
        after = min(after, MAX_SEQ)  # visitors may say any number; drivers raise on one that does not fit
        query = _SELECT_EVENTS if last is None else _SELECT_LAST_EVENTS
        rows = await self._read(query, {"c": conversation, "after": after, "last": last})
        events = [_event(row) for row in rows]
        return events if last is None else events[::-1]

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
        rows = await self._read(query)
        return [Unanswered(r.conversation_id, r.client_id, r.seq, str(r.data["text"]), r.asked_at) for r in rows]

    # Reading and writing

    async def _read(self, query: sa.Select[Any], values: dict[str, Any] | None = None) -> Sequence[sa.Row[Any]]:
        try:
            async with self._open_engine().connect() as connection:
                rows: Sequence[sa.Row[Any]] = (await connection.execute(query, values)).all()
                return rows
        except (SQLAlchemyError, OSError) as exc:
            logger.error("cannot read the database: %s", _reason(exc))
            raise StorageUnavailable from exc

    async def _write(self, operation: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """
        Run `operation` inside the writer's transaction; return its result once that is committed.

        An operation raises a BotError only before its first statement that writes: it shares the transaction.
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
                    except (Conflict, UnknownConversation) as exc:
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

    def _lock_sqlite_file(self) -> None:
        """Take the file for this process: two servers would each number events and answer the same question."""
        name = self._url.database
        if not name or name == ":memory:" or name.startswith("file:"):
            raise MerchantError(f"database {name!r}: give the path of a file; a database in memory is not supported")
        path = Path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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


async def _insert_event(
    connection: AsyncConnection, conversation: str, seq: int, kind: EventKind, data: dict[str, Any]
) -> Event:
    # Milliseconds, as on the wire: an event reads the same live and replayed.
    now = datetime.now(UTC)
    event = Event(seq, now.replace(microsecond=now.microsecond // 1000 * 1000), kind, data)
    values = {"conversation_id": conversation, "seq": seq, "at": event.at, "kind": kind, "data": data}
    await connection.execute(_INSERT_EVENT, values)
    if kind == "state":
        await connection.execute(_SET_STATE, {"c": conversation, "new": data["state"]})
    if kind == "message" and event.role in ("bot", "agent") and data.get("turn"):
        await connection.execute(_SET_ANSWERED, {"c": conversation, "i": data["turn"], "new": seq})
    return event


def _event(row: sa.Row[Any]) -> Event:
    return Event(row.seq, row.at, cast(EventKind, row.kind), row.data)


def _hash(secret: str) -> str:
    # Tokens are 256 random bits, so a plain hash cannot be guessed back; texts are only compared.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _reason(exc: BaseException) -> str:
    """Return the driver's own words without SQLAlchemy's, which quote the statement's values (visitors' texts)."""
    cause = getattr(exc, "orig", None) or exc
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
