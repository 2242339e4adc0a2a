"""
Uploaded files, and the database that files and jobs share: `<data>/fine_tuning.sqlite3` and `<data>/files/`.

Knows bytes, names and purposes; nothing of HTTP and nothing of training. What is kept here may hold customers' words as they
were said, so files and database are readable by their owner alone, and deleting a file deletes its bytes.
"""  # noqa: E501

from __future__ import annotations

import os
import secrets
import sqlite3
import string
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from bot.errors import BadRequest, MerchantError, TooLong

# What OpenAI's SDK lets a client upload; `fine-tune-results` are made here.
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
RESULTS = "fine-tune-results"
MIN_EXPIRES_S, MAX_EXPIRES_S = 3_600, 2_592_000
MAX_PAGE = 10_000
_LETTERS = string.ascii_letters + string.digits

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE TABLE IF NOT EXISTS jobs (
    n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, stage TEXT NOT NULL,
    created_at INTEGER NOT NULL, finished_at INTEGER, request TEXT NOT NULL, state TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, n);
CREATE TABLE IF NOT EXISTS events (
    n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL, level TEXT NOT NULL, message TEXT NOT NULL, type TEXT NOT NULL, data TEXT);
CREATE INDEX IF NOT EXISTS events_by_job ON events (job, n);
CREATE TABLE IF NOT EXISTS checkpoints (
    n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE (job, step));
"""


def new_id(kind: str) -> str:
    """Return an id as OpenAI's look: `kind`-, then 24 letters and digits, which nobody can guess."""
    return f"{kind}-{''.join(secrets.choice(_LETTERS) for _ in range(24))}"


class Database:
    """The SQLite file. One connection behind a lock: every statement is short, and processes share it by WAL."""

    def __init__(self, path: Path) -> None:
        """
        Open or make the file.

        Raises:
            MerchantError: it cannot be opened, or is no database.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its other files the same mode
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            # FULL: what was acknowledged is there after a power cut. A job writes a few rows a second at most.
            self._connection.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {_SCHEMA}")
        except (OSError, sqlite3.Error) as exc:
            raise MerchantError(f"{path}: cannot be opened as the database of jobs ({exc})") from None
        self._lock = threading.RLock()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection inside a transaction of this thread; all of it is kept, or none."""
        with self._lock:
            if self._connection.in_transaction:  # inside another one of this thread
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Return what a reading statement finds."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def page(
        self, table: str, *, where: Mapping[str, Any], after: str | None, limit: int, newest_first: bool = True
    ) -> tuple[list[sqlite3.Row], bool]:
        """
        Return (up to `limit` rows behind the one with the id `after`, whether there are more). Names are our own.

        Raises:
            BadRequest: there is no row `after` among those asked for.
        """
        conditions, values = [f"{name} = ?" for name in where], list(where.values())
        if after is not None:
            query = f"SELECT n FROM {table} WHERE {' AND '.join(['id = ?', *conditions])}"  # noqa: S608
            found = self.rows(query, [after, *values])
            if not found:
                raise BadRequest(f"after: there is no {after[:100]!r} in this list", param="after")
            conditions.append("n < ?" if newest_first else "n > ?")
            values.append(found[0]["n"])
        query = f"SELECT * FROM {table} WHERE {' AND '.join(conditions or ['1'])}"  # noqa: S608
        query += f" ORDER BY n {'DESC' if newest_first else 'ASC'} LIMIT ?"
        rows = self.rows(query, [*values, limit + 1])
        return rows[:limit], len(rows) > limit

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class Upload:
    """A file that is coming in: written piece by piece, then finished or thrown away. Use it as a context."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self._path = store.folder / f".upload-{secrets.token_hex(12)}"
        self._file = os.fdopen(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")
        self.size_bytes = 0

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def write(self, data: bytes) -> None:
        """
        Append `data`. Blocks on the disk.

        Raises:
            TooLong: over the store's limit; nothing of it is written.
        """
        if self.size_bytes + len(data) > self._store.max_bytes:
            raise TooLong("file", self.size_bytes + len(data), self._store.max_bytes, "bytes")
        self._file.write(data)
        self.size_bytes += len(data)

    def finish(self, filename: str, purpose: str, expires_after_s: int | None = None) -> dict[str, Any]:
        """Return the file object once the bytes are on the disk under their id."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._store.adopt(self._path, filename, purpose, self.size_bytes, expires_after_s)

    def discard(self) -> None:
        """Throw away what came; harmless after `finish`."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class FileStore:
    """Files by id. Safe from several threads and processes."""

    def __init__(self, database: Database, folder: Path, *, max_bytes: int = 512 * 2**20) -> None:
        self._db, self.folder, self.max_bytes = database, folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)

    def upload(self) -> Upload:
        """Return a place for a new file's bytes."""
        return Upload(self)

    def add(self, data: bytes, filename: str, purpose: str) -> dict[str, Any]:
        """Keep a small file that was made here, and return its object."""
        with self.upload() as upload:
            upload.write(data)
            return upload.finish(filename, purpose)

    def adopt(
        self, path: Path, filename: str, purpose: str, size_bytes: int, expires_after_s: int | None
    ) -> dict[str, Any]:
        """Take over the finished upload at `path`; see `Upload.finish`."""
        id_, now = new_id("file"), int(time.time())
        expires_at = None if expires_after_s is None else now + expires_after_s
        # The row is committed last: a file without a row is swept, a row without a file would be a promise broken.
        with self._db.transaction() as db:
            path.rename(self.folder / id_)
            db.execute(
                "INSERT INTO files (id, filename, purpose, bytes, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)",
                (id_, plain_name(filename), purpose, size_bytes, now, expires_at),
            )
        return self.get(id_)

    def get(self, id_: str) -> dict[str, Any]:
        """
        Return a file object.

        Raises:
            BadRequest: there is none (any more).
        """
        for row in self._db.rows("SELECT * FROM files WHERE id = ?", (id_,)):
            if row["expires_at"] is None or row["expires_at"] > time.time():
                return _file_object(row)
        raise BadRequest(f"No such File object: {id_[:100]}", param="id", status=404)

    def path(self, id_: str) -> Path:
        """Return where the bytes of a file are; raises as `get`."""
        return self.folder / str(self.get(id_)["id"])

    def list(
        self, *, purpose: str | None = None, after: str | None = None, limit: int = MAX_PAGE, newest_first: bool = True
    ) -> tuple[Sequence[dict[str, Any]], bool]:
        """Return (file objects behind `after`, whether there are more)."""
        self.sweep()
        where = {} if purpose is None else {"purpose": purpose}
        rows, more = self._db.page("files", where=where, after=after, limit=limit, newest_first=newest_first)
        return [_file_object(row) for row in rows], more

    def delete(self, id_: str) -> None:
        """Delete a file and its bytes; raises as `get`. A job that began with it has a link of its own."""
        self.get(id_)
        with self._db.transaction() as db:
            db.execute("DELETE FROM files WHERE id = ?", (id_,))
        (self.folder / id_).unlink(missing_ok=True)

    def sweep(self, unfinished_after_s: float = 24 * 3600.0) -> None:
        """Delete files whose time is over, and what interrupted uploads left."""
        now = time.time()
        for row in self._db.rows("SELECT id FROM files WHERE expires_at <= ?", (now,)):
            with self._db.transaction() as db:
                db.execute("DELETE FROM files WHERE id = ?", (row["id"],))
            (self.folder / row["id"]).unlink(missing_ok=True)
        known = {row["id"] for row in self._db.rows("SELECT id FROM files")}
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process was faster
                if path.name not in known and now - path.stat().st_mtime > unfinished_after_s:
                    path.unlink()


def check_purpose(purpose: str | None) -> str:
    """Return the purpose of an upload, or raise BadRequest."""
    if not purpose:
        raise BadRequest("'purpose' is a required property", param="purpose", code="missing_required_parameter")
    if purpose not in PURPOSES:
        allowed = ", ".join(f"'{p}'" for p in PURPOSES)
        raise BadRequest(f"'{purpose[:60]}' is not one of [{allowed}]", param="purpose")
    return purpose


def check_expiry(anchor: str | None, seconds: str | None) -> int | None:
    """Return the seconds of `expires_after`, None where it was not given; raises BadRequest."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadRequest("only 'created_at' is an anchor", param="expires_after[anchor]")
    if not (seconds or "").isdecimal() or not MIN_EXPIRES_S <= int(seconds or 0) <= MAX_EXPIRES_S:
        bounds = f"a number of seconds from {MIN_EXPIRES_S} to {MAX_EXPIRES_S}"
        raise BadRequest(f"expected {bounds}", param="expires_after[seconds]")
    return int(seconds or 0)


def plain_name(filename: str) -> str:
    """Return the last part of a client's file name, printable and short: it is shown, and tells a file's format."""
    last = PurePath(filename.replace("\\", "/")).name
    name = "".join(c for c in last if c.isprintable())
    stem, dot, suffix = name.rpartition(".")
    if len(name) > 200:
        name = f"{stem[:180]}{dot}{suffix[:16]}" if dot else name[:200]
    return name.strip() or "upload"


def _file_object(row: sqlite3.Row) -> dict[str, Any]:
    found = {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }
    return found if row["expires_at"] is None else {**found, "expires_at": row["expires_at"]}
