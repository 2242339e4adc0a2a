"""
The tables of the database. Columns only: what is done with them is in `bot.storage` and `bot.agents.records`.

The schema of a real database comes from `bot/migrations`; tests hold that both say the same.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa


class Utc(sa.TypeDecorator[datetime]):
    """Aware datetimes, in and out; SQLite itself forgets the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is not None and value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        return value


METADATA = sa.MetaData()

conversations = sa.Table(
    "conversations",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("token_hash", sa.String(64), nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("locale", sa.String(35)),
    sa.Column("state", sa.String(16), nullable=False),
    # What lists of conversations show, kept up with each event: reading it out of the log took a query a row.
    sa.Column("state_at", Utc),
    sa.Column("reason", sa.String(200)),  # why a human was asked for
    sa.Column("owner", sa.String(64)),  # the agent who has it, in state human
    sa.Column("last_at", Utc),
    sa.Column("last_role", sa.String(16)),
    sa.Column("last_text", sa.String(200)),
    # Signed by the store's backend; null where the visitor is nobody we know.
    sa.Column("customer_id", sa.String(200)),
    sa.Column("customer_name", sa.String(200)),
    sa.Column("customer_email", sa.String(254)),
)
events = sa.Table(
    "events",
    METADATA,
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", Utc, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)
asks = sa.Table(
    "asks",
    METADATA,
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("client_id", sa.String(64), primary_key=True),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("text_hash", sa.String(64), nullable=False),
    sa.Column("answered_seq", sa.Integer),
    sa.Column("asked_at", Utc),
)
# Ids that agents' clients gave to messages and notes: each is stored once.
agent_sends = sa.Table(
    "agent_sends",
    METADATA,
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("agent_id", sa.String(64), primary_key=True),
    sa.Column("client_id", sa.String(64), primary_key=True),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("text_hash", sa.String(64), nullable=False),
)
# One row for each time in the queue: what waits and handling times are read from.
handoffs = sa.Table(
    "handoffs",
    METADATA,
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),  # of the state event that began it
    sa.Column("opened_at", Utc, nullable=False),
    sa.Column("reason", sa.String(200)),
    sa.Column("accepted_at", Utc),
    sa.Column("agent_id", sa.String(64)),
    sa.Column("ended_at", Utc),
    sa.Column("ended_as", sa.String(16)),  # the state it ended in; "human": handed to a colleague
)
left_messages = sa.Table(
    "left_messages",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("email", sa.String(254), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("at", Utc, nullable=False),
    sa.Column("done_at", Utc),
    sa.Column("done_by", sa.String(64)),
)
agents = sa.Table(
    "agents",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("login", sa.String(64), nullable=False, unique=True),
    sa.Column("name", sa.String(80), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("password_hash", sa.String(200), nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("disabled_at", Utc),
)
agent_sessions = sa.Table(
    "agent_sessions",
    METADATA,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("agent_id", sa.String(64), sa.ForeignKey("agents.id"), nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("expires_at", Utc, nullable=False),
)
canned_replies = sa.Table(
    "canned_replies",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("shortcut", sa.String(40), nullable=False, unique=True),
    sa.Column("zh", sa.Text, nullable=False),
    sa.Column("en", sa.Text, nullable=False),
    sa.Column("updated_at", Utc, nullable=False),
)
faq_drafts = sa.Table(
    "faq_drafts",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("question", sa.Text, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("lang", sa.String(8), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("created_by", sa.String(64)),
    sa.Column("decided_at", Utc),
    sa.Column("decided_by", sa.String(64)),
    sa.Column("faq_id", sa.String(200)),
    sa.UniqueConstraint("conversation_id", "seq", name="uq_faq_drafts_message"),
)
