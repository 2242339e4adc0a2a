"""The same promises on PostgreSQL: the log, the race for a conversation, everything the inbox keeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from bot.agents.records import Records, hash_token
from bot.errors import Conflict, NotAllowed, NotYours, Taken, UnknownConversation
from bot.messages import Customer
from bot.storage import Storage, upgrade_schema
from bot.tables import METADATA
from tests.postgres import running_postgres

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture
async def storage(url: str) -> AsyncIterator[Storage]:
    storage = Storage(url)
    await storage.open()
    yield storage
    await storage.close()


def columns_of(connection: sa.Connection, table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(connection).get_columns(table)}


async def test_the_schema_is_what_the_code_says(storage: Storage, url: str) -> None:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        for table in METADATA.tables.values():
            columns = await connection.run_sync(columns_of, table.name)
            assert columns == {column.name for column in table.columns}
    async with engine.begin() as connection:
        await connection.run_sync(upgrade_schema, "head")  # again: nothing to do
    await engine.dispose()


async def test_the_log_numbers_stores_once_and_finds_what_has_no_reply(storage: Storage) -> None:
    conversation, token = await storage.create_conversation("zh-CN", Customer("cust-1", "李", "li@example.com"))
    await storage.authenticate(conversation, token)
    with pytest.raises(UnknownConversation):
        await storage.authenticate(conversation, "guess")
    asked = await asyncio.gather(*(storage.append_ask(conversation, f"a{n}", f"问 {n} 👍🏽") for n in range(20)))
    assert sorted(a.event.seq for a in asked) == list(range(1, 21))
    assert (await storage.append_ask(conversation, "a3", "问 3 👍🏽")).duplicate
    with pytest.raises(Conflict):
        await storage.append_ask(conversation, "a3", "other")
    await storage.append(conversation, "message", {"role": "bot", "turn": "a0", "text": "答"})
    due = [u.client_id for u in await storage.unanswered(since=LONG_AGO, conversation=conversation)]
    assert sorted(due) == sorted(f"a{n}" for n in range(1, 20))
    assert [e.seq for e in await storage.events(conversation, after=18)] == [19, 20, 21]
    head = await storage.get(conversation)
    assert (head.seq, head.customer) == (21, Customer("cust-1", "李", "li@example.com"))
    await storage.set_customer(conversation, Customer("cust-1", "李四"))
    with pytest.raises(UnknownConversation):
        await storage.set_customer(conversation, Customer("cust-2"))


async def test_one_of_many_gets_a_conversation(storage: Storage, url: str) -> None:
    other = Storage(url)  # another process, for all the database knows
    await other.open()
    conversation, _ = await storage.create_conversation(None)
    await storage.append(conversation, "state", {"state": "waiting", "reason": "visitor"})

    async def accept(through: Storage, agent: str) -> str:
        state = {"state": "human", "agent": {"id": agent, "name": agent}}
        try:
            await through.change(conversation, [("state", state)], state="waiting", owner=None, new_owner=agent)
        except Taken as exc:
            return exc.owner_id
        return agent

    owners = await asyncio.gather(*(accept((storage, other)[n % 2], f"a_{n}") for n in range(20)))
    assert len(set(owners)) == 1
    (owner,) = set(owners)
    assert (await storage.get(conversation)).owner == owner
    with pytest.raises(NotYours):
        await storage.append_sent(conversation, "a_x", "m1", "message", {"text": "hi"}, only_owner=True)
    data = {"role": "agent", "text": "hi", "agent": {"id": owner, "name": "x"}}
    first = await storage.append_sent(conversation, owner, "m1", "message", data, only_owner=True)
    again = await storage.append_sent(conversation, owner, "m1", "message", data, only_owner=True)
    assert (first.event, again.duplicate) == (again.event, True)
    closed = [("state", {"state": "closed"})]
    with pytest.raises(Taken):
        await storage.change(conversation, closed, state="human", owner=None, new_owner=None)  # type: ignore[arg-type]
    await storage.change(conversation, closed, state="human", owner=owner, new_owner=None, settle=True)  # type: ignore[arg-type]
    times = await Records(storage).handoff_times(LONG_AGO)
    assert (times.n_opened, times.n_accepted, times.n_ended) == (1, 1, 1)
    await other.close()


async def test_what_the_inbox_keeps(storage: Storage) -> None:
    records = Records(storage)
    agent = await records.add_agent("Li", "李", "merchant", "hash")
    with pytest.raises(Conflict):
        await records.add_agent("LI", "x", "agent", "hash")
    assert await records.find_agent("li") == (agent, "hash")
    token = await records.add_session(agent.id, datetime.now(UTC) + timedelta(hours=1))
    sessions = await records.sessions([hash_token(token)], datetime.now(UTC))
    assert [s.agent for s in sessions.values()] == [agent]
    await records.set_disabled(agent.id, True)
    assert await records.sessions([hash_token(token)], datetime.now(UTC)) == {}

    conversation, _ = await storage.create_conversation(None, Customer("cust-9"))
    await storage.append_ask(conversation, "q1", "Where is 我的包裹 100%?")
    await storage.append(conversation, "state", {"state": "waiting", "reason": "visitor"})
    for text in ("我的包裹", "WHERE", "100%", "CUST-9"):
        assert [c.id for c in await records.list_cards(text=text)] == [conversation]
    assert await records.list_cards(text="message") == []  # words of the frames are no words of the visitor
    (card,) = await records.cards([conversation])
    assert (card.state, card.last_role, card.last_text) == ("waiting", "visitor", "Where is 我的包裹 100%?")
    assert conversation in await records.waiting()

    asked, events = await storage.append_left(
        conversation, "l1", "a@example.com", "hi", {"role": "system", "text": "ok"}
    )
    assert [e.seq for e in events] == [asked.event.seq, asked.event.seq + 1]
    assert (await storage.append_left(conversation, "l1", "a@example.com", "hi", {}))[0].duplicate
    (left,) = await records.left_messages(only_open=True)
    assert (await records.set_done(left.id, agent.id)).done_by == agent.id

    canned = await records.put_canned(None, "hi", "您好", "Hello")
    with pytest.raises(Conflict):
        await records.put_canned(None, "hi", "", "x")
    assert [c.id for c in await records.canned()] == [canned.id]
    draft, new = await records.add_draft(conversation, 1, "问", "答", "zh", "agent", agent.id)
    assert (new, (await records.add_draft(conversation, 1, "x", "y", "en", "agent", None))[1]) == (True, False)
    assert (await records.decide_draft(draft.id, "approved", agent.id, "faq-1")).faq_id == "faq-1"
    with pytest.raises(NotAllowed):
        await records.decide_draft(draft.id, "rejected", agent.id)
