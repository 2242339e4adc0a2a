"""
Alembic's entry point. Knows nothing of URLs or settings: `bot.storage` hands it an open connection.

By hand, for a new revision: `alembic -c /dev/null` does not work here on purpose; write the file in `versions/`
(they are short) and let tests/bot/test_storage.py upgrade to it from every earlier one.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

connection: Connection = context.config.attributes["connection"]

# render_as_batch: SQLite cannot alter most of a table in place.
context.configure(connection=connection, render_as_batch=True, transaction_per_migration=False)

with context.begin_transaction():
    context.run_migrations()
