"""
What the inbox keeps in the database beside the event log: accounts, sessions, lists, drafts, canned replies.

Knows SQL, through `bot.storage`'s one writer; knows nothing of passwords, sockets or who may do what.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from bot import tables as t
from bot.agents.people import (
    Agent,
    CannedReply,
    Card,
    DraftStatus,
    FaqDraft,
    HandoffTimes,
    LeftMessage,
    Role,
    Session,
)
from bot.errors import Conflict, NotAllowed, NotFound
from bot.messages import Customer, Language
from bot.storage import Storage

MAX_LISTED = 200

_seq = (
    sa.select(sa.func.coalesce(sa.func.max(t.events.c.seq), 0))
    .where(t.events.c.conversation_id == t.conversations.c.id)
    .scalar_subquery()
    .label("seq")
)
_CARDS = sa.select(t.conversations, _seq)


class Records:
    """See the module; every operation may raise StorageUnavailable."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    # Accounts

    async def add_agent(self, login: str, name: str, role: Role, password_hash: str) -> Agent:
        """Return a new account; raises Conflict where the login is taken."""
        agent = Agent(f"a_{secrets.token_urlsafe(9)}", login.lower(), name, role)
        values = {
            "id": agent.id,
            "login": agent.login,
            "name": name,
            "role": role,
            "password_hash": password_hash,
            "created_at": datetime.now(UTC),
        }

        async def operation(connection: AsyncConnection) -> None:
            taken = await connection.execute(sa.select(t.agents.c.id).where(t.agents.c.login == agent.login))
            if taken.first() is not None:
                raise Conflict(login)
            await connection.execute(sa.insert(t.agents).values(**values))

        await self._storage.write(operation)
        return agent

    async def agents(self) -> list[Agent]:
        """Return all accounts, disabled ones too, by login."""
        return [_agent(row) for row in await self._storage.read(sa.select(t.agents).order_by(t.agents.c.login))]

    async def find_agent(self, login: str) -> tuple[Agent, str] | None:
        """Return the account of `login` that is not disabled, and its password hash; None where there is none."""
        query = sa.select(t.agents).where(t.agents.c.login == login.lower(), t.agents.c.disabled_at.is_(None))
        rows = await self._storage.read(query)
        return (_agent(rows[0]), str(rows[0].password_hash)) if rows else None

    async def set_password(self, agent: str, password_hash: str, *, keep_session: str | None = None) -> None:
        """Store another password hash; all sessions of the agent end, but `keep_session` (a token hash)."""

        async def operation(connection: AsyncConnection) -> None:
            await connection.execute(
                sa.update(t.agents).where(t.agents.c.id == agent).values(password_hash=password_hash)
            )
            ended = sa.delete(t.agent_sessions).where(t.agent_sessions.c.agent_id == agent)
            if keep_session is not None:
                ended = ended.where(t.agent_sessions.c.token_hash != keep_session)
            await connection.execute(ended)

        await self._storage.write(operation)

    async def rehash(self, agent: str, password_hash: str) -> None:
        """Store the same password, hashed with today's parameters."""

        async def operation(connection: AsyncConnection) -> None:
            await connection.execute(
                sa.update(t.agents).where(t.agents.c.id == agent).values(password_hash=password_hash)
            )

        await self._storage.write(operation)

    async def set_disabled(self, agent: str, disabled: bool) -> None:
        """Disable an account, which ends its sessions; or enable it again."""

        async def operation(connection: AsyncConnection) -> None:
            at = datetime.now(UTC) if disabled else None
            await connection.execute(sa.update(t.agents).where(t.agents.c.id == agent).values(disabled_at=at))
            if disabled:
                await connection.execute(sa.delete(t.agent_sessions).where(t.agent_sessions.c.agent_id == agent))

        await self._storage.write(operation)

    # Sessions

    async def add_session(self, agent: str, expires_at: datetime) -> str:
        """Return the secret of a new session. Only its hash is stored. Sessions that have expired are dropped."""
        token, now = secrets.token_urlsafe(32), datetime.now(UTC)

        async def operation(connection: AsyncConnection) -> None:
            await connection.execute(sa.delete(t.agent_sessions).where(t.agent_sessions.c.expires_at < now))
            await connection.execute(
                sa.insert(t.agent_sessions).values(
                    token_hash=hash_token(token), agent_id=agent, created_at=now, expires_at=expires_at
                )
            )

        await self._storage.write(operation)
        return token

    async def sessions(self, token_hashes: Sequence[str], now: datetime) -> dict[str, Session]:
        """Return those of the sessions that are good at `now`, by token hash."""
        query = (
            sa.select(t.agent_sessions.c.token_hash, t.agent_sessions.c.expires_at, t.agents)
            .join(t.agents, t.agents.c.id == t.agent_sessions.c.agent_id)
            .where(
                t.agent_sessions.c.token_hash.in_(token_hashes),
                t.agent_sessions.c.expires_at > now,
                t.agents.c.disabled_at.is_(None),
            )
        )
        rows = await self._storage.read(query)
        return {row.token_hash: Session(row.token_hash, _agent(row), row.expires_at) for row in rows}

    async def end_session(self, token_hash: str) -> None:
        async def operation(connection: AsyncConnection) -> None:
            await connection.execute(sa.delete(t.agent_sessions).where(t.agent_sessions.c.token_hash == token_hash))

        await self._storage.write(operation)

    # Lists of conversations

    async def cards(self, ids: Sequence[str]) -> list[Card]:
        """Return the cards of these conversations, in no order."""
        rows = await self._storage.read(_CARDS.where(t.conversations.c.id.in_(ids)))
        return [_card(row) for row in rows]

    async def queues(self) -> list[Card]:
        """Return the cards of all conversations that wait or that an agent has, longest in that state first."""
        query = _CARDS.where(t.conversations.c.state.in_(("waiting", "human"))).order_by(
            t.conversations.c.state_at, t.conversations.c.id
        )
        return [_card(row) for row in await self._storage.read(query)]

    async def owned(self) -> list[tuple[str, str]]:
        """Return (conversation, owner) of all in state human."""
        query = sa.select(t.conversations.c.id, t.conversations.c.owner).where(t.conversations.c.state == "human")
        return [(row.id, row.owner) for row in await self._storage.read(query) if row.owner is not None]

    async def waiting(self) -> list[str]:
        """Return the ids of the queue, next one first."""
        query = (
            sa.select(t.conversations.c.id)
            .where(t.conversations.c.state == "waiting")
            .order_by(t.conversations.c.state_at, t.conversations.c.id)
        )
        return [row.id for row in await self._storage.read(query)]

    async def n_human(self) -> int:
        query = sa.select(sa.func.count()).select_from(t.conversations).where(t.conversations.c.state == "human")
        return int((await self._storage.read(query))[0][0])

    async def list_cards(
        self,
        *,
        states: Sequence[str] = (),
        owner: str | None = None,
        text: str = "",
        before: datetime | None = None,
        limit: int = 50,
        only_handed_over: bool = False,
    ) -> list[Card]:
        """
        Return cards, newest first.

        Args:
            states: empty for all.
            text: in a message, or in the customer's id, name or e-mail.
            before: only those whose last event is older.
            only_handed_over: leave out those in which no human was ever asked for.
        """
        c = t.conversations.c
        query = _CARDS.order_by(c.last_at.desc(), c.id).limit(limit)
        if states:
            query = query.where(c.state.in_(states))
        if owner is not None:
            query = query.where(c.owner == owner)
        if before is not None:
            query = query.where(c.last_at < before)
        if only_handed_over:
            query = query.where(sa.exists().where(t.handoffs.c.conversation_id == c.id))
        if text:
            said = sa.exists().where(
                t.events.c.conversation_id == c.id,
                t.events.c.kind.in_(("message", "note")),
                t.events.c.data["text"].as_string().icontains(text, autoescape=True),
            )
            of_customer = [
                column.icontains(text, autoescape=True) for column in (c.customer_id, c.customer_name, c.customer_email)
            ]
            query = query.where(sa.or_(said, *of_customer))
        return [_card(row) for row in await self._storage.read(query)]

    async def was_handed_over(self, conversation: str) -> bool:
        """Return whether a human was ever asked for in it."""
        query = sa.select(t.handoffs.c.seq).where(t.handoffs.c.conversation_id == conversation).limit(1)
        return bool(await self._storage.read(query))

    async def handoff_times(self, since: datetime) -> HandoffTimes:
        """Return what happened to the hand-offs opened since then."""
        rows = await self._storage.read(sa.select(t.handoffs).where(t.handoffs.c.opened_at >= since))
        accepted = [row for row in rows if row.accepted_at is not None]
        # Transfers from agent to agent count as accepted at once: they say nothing of a wait.
        waited = [row for row in accepted if row.accepted_at != row.opened_at]
        ended = [row for row in accepted if row.ended_at is not None]
        return HandoffTimes(
            len(rows),
            len(accepted),
            len(ended),
            tuple((row.accepted_at - row.opened_at).total_seconds() for row in waited),
            tuple((row.ended_at - row.accepted_at).total_seconds() for row in ended),
        )

    async def recent_handling_s(self, n: int, since: datetime) -> list[float]:
        """Return how long the last `n` conversations that ended since then took their agents."""
        query = (
            sa.select(t.handoffs.c.accepted_at, t.handoffs.c.ended_at)
            .where(t.handoffs.c.accepted_at.is_not(None), t.handoffs.c.ended_at >= since)
            .order_by(t.handoffs.c.ended_at.desc())
            .limit(n)
        )
        return [(row.ended_at - row.accepted_at).total_seconds() for row in await self._storage.read(query)]

    # Messages left

    async def left_messages(self, *, only_open: bool = False) -> list[LeftMessage]:
        query = sa.select(t.left_messages).order_by(t.left_messages.c.at.desc()).limit(MAX_LISTED)
        if only_open:
            query = query.where(t.left_messages.c.done_at.is_(None))
        return [_left(row) for row in await self._storage.read(query)]

    async def left_at(self, conversation: str, seq: int) -> LeftMessage | None:
        """Return the message left as event `seq`, or None."""
        query = sa.select(t.left_messages).where(
            t.left_messages.c.conversation_id == conversation, t.left_messages.c.seq == seq
        )
        rows = await self._storage.read(query)
        return _left(rows[0]) if rows else None

    async def set_done(self, message: str, by: str | None) -> LeftMessage:
        """Mark a message left as seen to by an agent, or with None as open again; raises NotFound."""
        at = None if by is None else datetime.now(UTC)

        async def operation(connection: AsyncConnection) -> None:
            statement = sa.update(t.left_messages).where(t.left_messages.c.id == message)
            if (await connection.execute(statement.values(done_at=at, done_by=by))).rowcount == 0:
                raise NotFound("there is no such message")

        await self._storage.write(operation)
        rows = await self._storage.read(sa.select(t.left_messages).where(t.left_messages.c.id == message))
        return _left(rows[0])

    # Canned replies

    async def canned(self) -> list[CannedReply]:
        query = sa.select(t.canned_replies).order_by(t.canned_replies.c.shortcut)
        return [_canned(row) for row in await self._storage.read(query)]

    async def put_canned(self, id_: str | None, shortcut: str, zh: str, en: str) -> CannedReply:
        """
        Store a canned reply, a new one where `id_` is None.

        Raises:
            NotFound: there is none of this id. Conflict: another one has this shortcut.
        """
        reply = CannedReply(id_ or f"k_{secrets.token_urlsafe(9)}", shortcut, zh, en, _now())
        values = {"id": reply.id, "shortcut": shortcut, "zh": zh, "en": en, "updated_at": reply.updated_at}
        c = t.canned_replies.c

        async def operation(connection: AsyncConnection) -> None:
            if id_ is not None and (await connection.execute(sa.select(c.id).where(c.id == id_))).first() is None:
                raise NotFound("there is no such canned reply")
            same = sa.select(c.id).where(c.shortcut == shortcut, c.id != reply.id)
            if (await connection.execute(same)).first() is not None:
                raise Conflict(shortcut)
            if id_ is None:
                await connection.execute(sa.insert(t.canned_replies).values(**values))
            else:
                await connection.execute(sa.update(t.canned_replies).where(c.id == id_).values(**values))

        await self._storage.write(operation)
        return reply

    async def delete_canned(self, id_: str) -> None:
        async def operation(connection: AsyncConnection) -> None:
            statement = sa.delete(t.canned_replies).where(t.canned_replies.c.id == id_)
            if (await connection.execute(statement)).rowcount == 0:
                raise NotFound("there is no such canned reply")

        await self._storage.write(operation)

    # Drafts of FAQs

    async def drafts(self, status: DraftStatus | None = None) -> list[FaqDraft]:
        query = sa.select(t.faq_drafts).order_by(t.faq_drafts.c.created_at.desc()).limit(MAX_LISTED)
        if status is not None:
            query = query.where(t.faq_drafts.c.status == status)
        return [_draft(row) for row in await self._storage.read(query)]

    async def draft(self, id_: str) -> FaqDraft:
        """Return a draft; raises NotFound."""
        rows = await self._storage.read(sa.select(t.faq_drafts).where(t.faq_drafts.c.id == id_))
        if not rows:
            raise NotFound("there is no such draft")
        return _draft(rows[0])

    async def add_draft(
        self, conversation: str, seq: int, question: str, answer: str, lang: Language, source: str, by: str | None
    ) -> tuple[FaqDraft, bool]:
        """Return the draft made of the message at `seq`, and whether it is new: there is one a message."""
        c = t.faq_drafts.c
        of_message = sa.select(t.faq_drafts).where(c.conversation_id == conversation, c.seq == seq)

        async def operation(connection: AsyncConnection) -> tuple[FaqDraft, bool]:
            if (row := (await connection.execute(of_message)).first()) is not None:
                return _draft(row), False
            values = {
                "id": f"d_{secrets.token_urlsafe(9)}",
                "conversation_id": conversation,
                "seq": seq,
                "question": question,
                "answer": answer,
                "lang": lang,
                "status": "pending",
                "source": source,
                "created_at": _now(),
                "created_by": by,
            }
            await connection.execute(sa.insert(t.faq_drafts).values(**values))
            return _draft((await connection.execute(of_message)).one()), True

        return await self._storage.write(operation)

    async def edit_draft(self, id_: str, question: str, answer: str, lang: Language) -> FaqDraft:
        """Change a draft that nobody has decided on; raises NotFound, NotAllowed."""
        return await self._update_draft(id_, question=question, answer=answer, lang=lang)

    async def decide_draft(self, id_: str, status: DraftStatus, by: str, faq_id: str | None = None) -> FaqDraft:
        """Approve or reject a pending draft, once; raises NotFound, NotAllowed."""
        return await self._update_draft(id_, status=status, decided_at=_now(), decided_by=by, faq_id=faq_id)

    async def reopen_draft(self, id_: str) -> None:
        """Take an approval back whose row could not be written."""

        async def operation(connection: AsyncConnection) -> None:
            statement = sa.update(t.faq_drafts).where(t.faq_drafts.c.id == id_)
            await connection.execute(statement.values(status="pending", decided_at=None, decided_by=None, faq_id=None))

        await self._storage.write(operation)

    async def _update_draft(self, id_: str, **values: Any) -> FaqDraft:
        c = t.faq_drafts.c

        async def operation(connection: AsyncConnection) -> None:
            statement = sa.update(t.faq_drafts).where(c.id == id_, c.status == "pending").values(**values)
            if (await connection.execute(statement)).rowcount == 0:
                row = (await connection.execute(sa.select(c.status).where(c.id == id_))).first()
                if row is None:
                    raise NotFound("there is no such draft")
                raise NotAllowed(row.status, "decide")

        await self._storage.write(operation)
        return await self.draft(id_)


def hash_token(token: str) -> str:
    """Return what is stored of a session's secret; 256 random bits cannot be guessed back from it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _now() -> datetime:
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def _agent(row: sa.Row[Any]) -> Agent:
    return Agent(row.id, row.login, row.name, cast(Role, row.role), row.disabled_at is not None)


def _card(row: sa.Row[Any]) -> Card:
    customer = None
    if row.customer_id is not None:
        customer = Customer(row.customer_id, row.customer_name, row.customer_email)
    return Card(
        row.id,
        row.state,
        row.state_at or row.created_at,
        row.created_at,
        row.last_at or row.created_at,
        row.seq,
        row.locale,
        row.owner,
        row.reason,
        customer,
        row.last_role,
        row.last_text,
    )


def _left(row: sa.Row[Any]) -> LeftMessage:
    return LeftMessage(row.id, row.conversation_id, row.seq, row.email, row.text, row.at, row.done_at, row.done_by)


def _canned(row: sa.Row[Any]) -> CannedReply:
    return CannedReply(row.id, row.shortcut, row.zh, row.en, row.updated_at)


def _draft(row: sa.Row[Any]) -> FaqDraft:
    return FaqDraft(
        row.id,
        row.conversation_id,
        row.seq,
        row.question,
        row.answer,
        cast(Language, row.lang),
        cast(DraftStatus, row.status),
        row.source,
        row.created_at,
        row.created_by,
        row.decided_at,
        row.decided_by,
        row.faq_id,
    )
