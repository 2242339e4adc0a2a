"""
Which questions have a reply, so that a restart finds the ones that do not without reading every log.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("asks") as batch:
        batch.add_column(sa.Column("answered_seq", sa.Integer, nullable=True))
        batch.add_column(sa.Column("asked_at", sa.DateTime(timezone=True), nullable=True))
    _fill(op.get_bind())
    op.create_index("ix_asks_unanswered", "asks", ["answered_seq", "asked_at"])


def _fill(bind: sa.Connection) -> None:
    events = sa.table("events", *(sa.column(name) for name in ("conversation_id", "seq", "at", "kind", "data")))
    asks = sa.table(
        "asks", *(sa.column(name) for name in ("conversation_id", "client_id", "seq", "answered_seq", "asked_at"))
    )
    asked_at = (
        sa.select(events.c.at)
        .where(events.c.conversation_id == asks.c.conversation_id, events.c.seq == asks.c.seq)
        .scalar_subquery()
    )
    bind.execute(sa.update(asks).values(asked_at=asked_at))
    for row in bind.execute(sa.select(events.c.conversation_id, events.c.seq, events.c.data).order_by(events.c.seq)):
        # The table above has no types, so SQLite hands JSON out as text and PostgreSQL as an object.
        data = json.loads(row.data) if isinstance(row.data, str) else row.data
        if data.get("role") in ("bot", "agent") and data.get("turn"):
            bind.execute(
                sa.update(asks)
                .where(asks.c.conversation_id == row.conversation_id, asks.c.client_id == data["turn"])
                .values(answered_seq=row.seq)
            )


def downgrade() -> None:
    op.drop_index("ix_asks_unanswered", "asks")
    with op.batch_alter_table("asks") as batch:
        batch.drop_column("asked_at")
        batch.drop_column("answered_seq")
