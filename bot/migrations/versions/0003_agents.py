"""
Agents: accounts, sessions, who has which conversation, hand-offs, messages left, canned replies, FAQ drafts; customers.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_CONVERSATION_COLUMNS = (
    ("state_at", sa.DateTime(timezone=True)),
    ("reason", sa.String(200)),
    ("owner", sa.String(64)),
    ("last_at", sa.DateTime(timezone=True)),
    ("last_role", sa.String(16)),
    ("last_text", sa.String(200)),
    ("customer_id", sa.String(200)),
    ("customer_name", sa.String(200)),
    ("customer_email", sa.String(254)),
)
_TABLES = ("faq_drafts", "canned_replies", "agent_sessions", "agents", "left_messages", "handoffs", "agent_sends")


def _conversation_id(*, primary_key: bool = False) -> sa.Column[str]:
    return sa.Column(
        "conversation_id",
        sa.String(64),
        sa.ForeignKey("conversations.id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
    )


def _time(name: str, *, nullable: bool = True) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    for name, type_ in _CONVERSATION_COLUMNS:
        # Not as a batch, which would copy the table and every row that refers to it: columns that may be null are
        # added in place by SQLite as well.
        op.add_column("conversations", sa.Column(name, type_, nullable=True))
    _fill(op.get_bind())
    op.create_index("ix_conversations_state", "conversations", ["state", "last_at"])
    op.create_index("ix_conversations_last_at", "conversations", ["last_at"])
    op.create_index("ix_conversations_customer", "conversations", ["customer_id"])

    op.create_table(
        "agent_sends",
        _conversation_id(primary_key=True),
        sa.Column("agent_id", sa.String(64), primary_key=True),
        sa.Column("client_id", sa.String(64), primary_key=True),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("text_hash", sa.String(64), nullable=False),
    )
    op.create_table(
        "handoffs",
        _conversation_id(primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        _time("opened_at", nullable=False),
        sa.Column("reason", sa.String(200)),
        _time("accepted_at"),
        sa.Column("agent_id", sa.String(64)),
        _time("ended_at"),
        sa.Column("ended_as", sa.String(16)),
    )
    op.create_index("ix_handoffs_opened_at", "handoffs", ["opened_at"])
    op.create_table(
        "left_messages",
        sa.Column("id", sa.String(64), primary_key=True),
        _conversation_id(),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        _time("at", nullable=False),
        _time("done_at"),
        sa.Column("done_by", sa.String(64)),
    )
    op.create_index("ix_left_messages_at", "left_messages", ["at"])
    op.create_table(
        "agents",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("login", sa.String(64), nullable=False, unique=True),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("password_hash", sa.String(200), nullable=False),
        _time("created_at", nullable=False),
        _time("disabled_at"),
    )
    op.create_table(
        "agent_sessions",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        sa.Column("agent_id", sa.String(64), sa.ForeignKey("agents.id", ondelete="CASCADE"), nullable=False),
        _time("created_at", nullable=False),
        _time("expires_at", nullable=False),
    )
    op.create_index("ix_agent_sessions_agent", "agent_sessions", ["agent_id"])
    op.create_table(
        "canned_replies",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("shortcut", sa.String(40), nullable=False, unique=True),
        sa.Column("zh", sa.Text, nullable=False),
        sa.Column("en", sa.Text, nullable=False),
        _time("updated_at", nullable=False),
    )
    op.create_table(
        "faq_drafts",
        sa.Column("id", sa.String(64), primary_key=True),
        _conversation_id(),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("lang", sa.String(8), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        _time("created_at", nullable=False),
        sa.Column("created_by", sa.String(64)),
        _time("decided_at"),
        sa.Column("decided_by", sa.String(64)),
        sa.Column("faq_id", sa.String(200)),
        sa.UniqueConstraint("conversation_id", "seq", name="uq_faq_drafts_message"),
    )
    op.create_index("ix_faq_drafts_status", "faq_drafts", ["status", "created_at"])


def _fill(bind: sa.Connection) -> None:
    conversations = sa.table(
        "conversations",
        *(sa.column(name) for name in ("id", "created_at", "state", "state_at", "last_at", "last_role", "last_text")),
    )
    events = sa.table("events", *(sa.column(name) for name in ("conversation_id", "seq", "at", "kind", "data")))
    of_this = events.c.conversation_id == conversations.c.id
    newest = sa.select(sa.func.max(events.c.at)).where(of_this).scalar_subquery()
    entered = sa.select(sa.func.max(events.c.at)).where(of_this, events.c.kind == "state").scalar_subquery()
    bind.execute(
        sa.update(conversations).values(
            last_at=sa.func.coalesce(newest, conversations.c.created_at),
            state_at=sa.func.coalesce(entered, conversations.c.created_at),
        )
    )
    last: dict[str, tuple[str, str]] = {}
    for row in bind.execute(
        sa.select(events.c.conversation_id, events.c.data).where(events.c.kind == "message").order_by(events.c.seq)
    ):
        # The table above has no types, so SQLite hands JSON out as text and PostgreSQL as an object.
        data = json.loads(row.data) if isinstance(row.data, str) else row.data
        if data.get("role") in ("visitor", "bot", "agent"):
            last[row.conversation_id] = (data["role"], str(data.get("text", ""))[:200])
    for id_, (role, text) in last.items():
        bind.execute(sa.update(conversations).where(conversations.c.id == id_).values(last_role=role, last_text=text))


def downgrade() -> None:
    for table in _TABLES:
        op.drop_table(table)
    for index in ("ix_conversations_customer", "ix_conversations_last_at", "ix_conversations_state"):
        op.drop_index(index, "conversations")
    with op.batch_alter_table("conversations") as batch:
        for name, _ in reversed(_CONVERSATION_COLUMNS):
            batch.drop_column(name)
