"""The event log: numbering, idempotence, secrets, restarts, schema, and what happens when the disk says no."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncTransaction

from bot.agents.records import Records
from bot.errors import Conflict, MerchantError, StorageUnavailable, UnknownConversation
from bot.storage import Storage, upgrade_schema
from bot.tables import METADATA

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[Storage]:
    storage = Storage(tmp_path / "log.db")
    await storage.open()
    yield storage
    await storage.close()


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def test_events_are_numbered_without_gaps_however_they_come(storage: Storage) -> None:
    a, _ = await storage.create_conversation("zh-CN")
    b, _ = await storage.create_conversation(None)
    await asyncio.gather(*(storage.append(c, "note", {"n": n}) for n in range(50) for c in (a, b)))
    for conversation in (a, b):
        events = await storage.events(conversation)
        assert [e.seq for e in events] == list(range(1, 51))
        assert sorted(e.data["n"] for e in events) == list(range(50))
    assert [e.seq for e in await storage.events(a, after=47)] == [48, 49, 50]
    assert [e.seq for e in await storage.events(a, last=2)] == [49, 50]
    assert (await storage.get(a)).seq == 50
    assert (await storage.get(a)).locale == "zh-CN"


async def test_an_event_reads_as_it_was_written(storage: Storage) -> None:
    conversation, _ = await storage.create_conversation(None)
    data = {"role": "bot", "text": "满299减40 👍🏽 \u202e ￥", "citations": [{"score": 0.5}]}
    written = await storage.append(conversation, "message", data)
    (read,) = await storage.events(conversation)
    assert read == written
    assert read.at.tzinfo is not None
    assert abs(read.at - datetime.now(UTC)) < timedelta(seconds=30)


async def test_several_events_are_stored_all_or_none(storage: Storage) -> None:
    conversation, _ = await storage.create_conversation(None)
    with pytest.raises(StorageUnavailable):
        await storage.append_all(conversation, [("note", {"n": 1}), ("note", {"n": object()})])
    assert await storage.events(conversation) == []
    await storage.append(conversation, "note", {"n": 2})
    assert [e.seq for e in await storage.events(conversation)] == [1]


async def test_one_bad_write_does_not_take_its_neighbours_along(storage: Storage) -> None:
    conversation, _ = await storage.create_conversation(None)
    good = [storage.append(conversation, "note", {"n": n}) for n in range(5)]
    bad = storage.append(conversation, "note", {"n": object()})
    outcomes = await asyncio.gather(*good, bad, return_exceptions=True)
    assert sum(isinstance(o, BaseException) for o in outcomes) == 1
    assert [e.seq for e in await storage.events(conversation)] == [1, 2, 3, 4, 5]


async def test_the_same_question_is_stored_once(storage: Storage) -> None:
    conversation, _ = await storage.create_conversation(None)
    asked = await asyncio.gather(*(storage.append_ask(conversation, "a1", "hi") for _ in range(5)))
    assert sorted(a.duplicate for a in asked) == [False, True, True, True, True]
    assert {a.event.seq for a in asked} == {1}
    with pytest.raises(Conflict):
        await storage.append_ask(conversation, "a1", "something else")
    assert len(await storage.events(conversation)) == 1
    other, _ = await storage.create_conversation(None)
    assert not (await storage.append_ask(other, "a1", "something else")).duplicate  # ids are a conversation's own


async def test_a_token_opens_its_conversation_only_and_is_not_stored(storage: Storage, tmp_path: Path) -> None:
    a, token_a = await storage.create_conversation(None)
    b, _ = await storage.create_conversation(None)
    await storage.authenticate(a, token_a)
    for conversation, token in ((b, token_a), (a, ""), (a, token_a + "x"), ("c_nobody", token_a), ("c_nobody", "")):
        with pytest.raises(UnknownConversation):
            await storage.authenticate(conversation, token)
    await storage.close()
    assert all(token_a.encode() not in file.read_bytes() for file in tmp_path.iterdir())


async def test_an_unknown_conversation_takes_no_events(storage: Storage) -> None:
    for operation in (
        storage.append("c_nobody", "note", {}),
        storage.append_ask("c_nobody", "a1", "hi"),
        storage.get("c_nobody"),
    ):
        with pytest.raises(UnknownConversation):
            await operation
    assert await storage.events("c_nobody") == []


async def test_questions_without_a_reply_are_found_until_they_have_one(storage: Storage) -> None:
    conversation, _ = await storage.create_conversation(None)
    await storage.append_ask(conversation, "a1", "first")
    await storage.append_ask(conversation, "a2", "second")
    await storage.append(conversation, "message", {"role": "bot", "turn": "a1", "text": "reply"})
    (due,) = await storage.unanswered(since=LONG_AGO)
    assert (due.conversation, due.client_id, due.seq, due.text) == (conversation, "a2", 2, "second")
    assert await storage.unanswered(since=datetime.now(UTC) + timedelta(seconds=1)) == []
    found = await storage.find_ask(conversation, "a1")
    assert found is not None
    assert found.answered
    await storage.append(conversation, "state", {"state": "human"})
    assert await storage.unanswered(since=LONG_AGO) == []  # a human's now
    assert (await storage.get(conversation)).state == "human"


async def test_everything_is_there_after_closing_and_opening(tmp_path: Path) -> None:
    first = Storage(tmp_path / "log.db")
    await first.open()
    conversation, token = await first.create_conversation("en")
    await first.append_ask(conversation, "a1", "hi")
    await first.close()
    await first.close()  # twice is once
    second = Storage(f"sqlite+aiosqlite:///{tmp_path / 'log.db'}")
    await second.open()
    await second.authenticate(conversation, token)
    assert (await second.append_ask(conversation, "a1", "hi")).duplicate
    await second.close()


async def test_a_cancelled_caller_leaves_the_writer_working(storage: Storage) -> None:
    conversation, _ = await storage.create_conversation(None)
    writes = [asyncio.create_task(storage.append(conversation, "note", {"n": n})) for n in range(10)]
    await asyncio.sleep(0)
    for write in writes[::2]:
        write.cancel()
    await asyncio.gather(*writes, return_exceptions=True)
    await storage.append(conversation, "note", {})
    seqs = [e.seq for e in await storage.events(conversation)]
    assert seqs == list(range(1, len(seqs) + 1))


async def test_a_full_disk_stores_nothing_says_so_and_recovers(storage: Storage, tmp_path: Path) -> None:
    """SQLite's own page limit gives the same error (SQLITE_FULL) as a full disk."""
    conversation, _ = await storage.create_conversation(None)
    await storage.append(conversation, "note", {"n": 0})

    connection = storage._connection
    assert connection is not None
    await connection.exec_driver_sql("PRAGMA max_page_count=1")  # below the present size: SQLite takes that
    await connection.rollback()
    with pytest.raises(StorageUnavailable):
        await storage.append(conversation, "note", {"text": "x" * 200_000})
    assert len(await storage.events(conversation)) == 1  # reading still works
    # The limit was the connection's; the next one has none, as a disk with space again.
    assert (await storage.append(conversation, "note", {"n": 1})).seq == 2


async def test_a_commit_that_fails_is_not_tried_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a network it may have happened: the caller is told, and nothing is stored twice."""
    conversation, _ = await storage.create_conversation(None)

    async def lost(transaction: AsyncTransaction) -> None:
        await commit(transaction)
        raise sa.exc.OperationalError("COMMIT", None, Exception("connection lost"))

    commit = AsyncTransaction.commit
    monkeypatch.setattr(AsyncTransaction, "commit", lost)
    writes = [storage.append(conversation, "note", {"n": n}) for n in range(3)]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    monkeypatch.undo()
    assert all(isinstance(outcome, StorageUnavailable) for outcome in outcomes)
    assert [e.seq for e in await storage.events(conversation)] == [1, 2, 3]
    assert (await storage.append(conversation, "note", {})).seq == 4


async def test_a_locked_database_is_an_error_not_a_hang_and_blocks_no_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bot.storage.BUSY_TIMEOUT_MS", 100)
    storage = Storage(tmp_path / "log.db")
    await storage.open()
    conversation, _ = await storage.create_conversation(None)
    holder = sqlite3.connect(tmp_path / "log.db")
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable):
        await storage.append(conversation, "note", {})
    assert await storage.events(conversation) == []
    holder.rollback()
    holder.close()
    assert (await storage.append(conversation, "note", {})).seq == 1
    await storage.close()


async def test_after_closing_nothing_is_taken(storage: Storage) -> None:
    await storage.close()
    with pytest.raises(StorageUnavailable):
        await storage.create_conversation(None)
    with pytest.raises(StorageUnavailable):
        await storage.events("c_x")


async def test_a_log_line_of_a_failure_holds_no_text_of_a_visitor(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    conversation, _ = await storage.create_conversation(None)
    engine = storage._engine
    assert engine is not None
    async with engine.begin() as connection:
        await connection.exec_driver_sql("DROP TABLE events")
    with pytest.raises(StorageUnavailable):
        await storage.append_ask(conversation, "a1", "my card is 4111 1111")
    assert "4111" not in caplog.text
    assert "no such table" in caplog.text


# Files


async def test_two_servers_on_one_file_are_refused(storage: Storage, tmp_path: Path) -> None:
    second = Storage(tmp_path / "log.db")
    with pytest.raises(MerchantError, match="in use by another process"):
        await second.open()


async def test_a_database_in_memory_or_a_bad_url_is_refused_with_the_remedy() -> None:
    with pytest.raises(MerchantError, match="give the path of a file"):
        await Storage("sqlite+aiosqlite:///:memory:").open()
    with pytest.raises(MerchantError, match="cannot be read"):
        Storage("://")


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_text("this is not a database, " * 100)
    with pytest.raises(StorageUnavailable):
        await Storage(tmp_path / "log.db").open()


# Schema


async def test_the_schema_is_what_the_code_says(storage: Storage, tmp_path: Path) -> None:
    for table in METADATA.tables.values():
        columns = {row[1] for row in rows(tmp_path / "log.db", f"PRAGMA table_info({table.name})")}
        assert columns == {column.name for column in table.columns}
    assert rows(tmp_path / "log.db", "PRAGMA journal_mode") == [("wal",)]


async def test_a_log_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        upgrade_schema(connection, "0001")
        connection.exec_driver_sql(
            "INSERT INTO conversations VALUES ('c_old', 'hash', '2026-11-01 10:00:00.000000', 'zh', 'bot')"
        )
        for seq, data in enumerate(
            (
                {"role": "visitor", "turn": "a1", "text": "有货吗"},
                {"role": "bot", "turn": "a1", "text": "有"},
                {"role": "visitor", "turn": "a2", "text": "多少钱"},
            ),
            start=1,
        ):
            connection.exec_driver_sql(
                "INSERT INTO events VALUES ('c_old', ?, '2026-11-01 10:00:00.000000', 'message', ?)",
                (seq, json.dumps(data)),
            )
        connection.exec_driver_sql("INSERT INTO asks VALUES ('c_old', 'a1', 1, 'h1')")
        connection.exec_driver_sql("INSERT INTO asks VALUES ('c_old', 'a2', 3, 'h2')")
    engine.dispose()

    storage = Storage(path)
    await storage.open()
    assert [e.text for e in await storage.events("c_old")] == ["有货吗", "有", "多少钱"]
    (due,) = await storage.unanswered(since=LONG_AGO)
    assert (due.client_id, due.asked_at) == ("a2", datetime(2026, 11, 1, 10, tzinfo=UTC))
    (card,) = await Records(storage).cards(["c_old"])
    assert (card.state, card.last_role, card.last_text) == ("bot", "visitor", "多少钱")
    assert card.last_at == card.state_at == datetime(2026, 11, 1, 10, tzinfo=UTC)
    assert (await storage.append("c_old", "note", {})).seq == 4
    await storage.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "log.db")
    await storage.open()
    await storage.close()
    connection = sqlite3.connect(tmp_path / "log.db")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    with pytest.raises(MerchantError, match="newer version"):
        await Storage(tmp_path / "log.db").open()
    assert rows(tmp_path / "log.db", "SELECT version_num FROM alembic_version") == [("9999",)]


async def test_a_migration_that_is_interrupted_leaves_the_old_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bot import storage as module

    def broken(connection: sa.Connection, revision: str = "head") -> None:
        upgrade_schema(connection, "0001")
        raise sa.exc.OperationalError("power", None, Exception("cut"))

    monkeypatch.setattr(module, "upgrade_schema", broken)
    with pytest.raises(StorageUnavailable):
        await Storage(tmp_path / "log.db").open()
    assert rows(tmp_path / "log.db", "SELECT name FROM sqlite_master") == []
    monkeypatch.undo()
    storage = Storage(tmp_path / "log.db")
    await storage.open()
    await storage.create_conversation(None)
    await storage.close()
