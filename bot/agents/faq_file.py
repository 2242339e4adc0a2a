"""
Approved drafts -> rows at the end of the store's faqs.csv. Knows the file's form; does not know who approved.

The file is the merchant's: what stands in it is kept byte for byte, a row is added in its own encoding, separator and
columns. Written beside and renamed, so that a server that watches the folder never reads half a file.
"""

from __future__ import annotations

import asyncio
import codecs
import csv
import io
import os
from pathlib import Path

from bot.errors import StoreUnwritable

COLUMNS = ("id", "question", "answer", "lang", "questions", "tags", "valid_from", "valid_until")
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
TAG = "from-agent"


class FaqFile:
    """faqs.csv of one store folder."""

    def __init__(self, store_dir: Path) -> None:
        self._path = store_dir / "faqs.csv"
        self._one_at_a_time = asyncio.Lock()

    async def append(self, id_: str, question: str, answer: str, lang: str) -> None:
        """
        Add a row; nothing where there is one of this id already (the file is written before the draft is decided on).

        Raises:
            StoreUnwritable: the file cannot be read or written; says why.
        """
        async with self._one_at_a_time:
            try:
                await asyncio.to_thread(self._append, id_, question, answer, lang)
            except (OSError, UnicodeError, csv.Error) as exc:
                raise StoreUnwritable(f"faqs.csv: {getattr(exc, 'strerror', None) or type(exc).__name__}") from exc

    def _append(self, id_: str, question: str, answer: str, lang: str) -> None:
        raw = self._path.read_bytes() if self._path.exists() else b""
        encoding = _encoding_of(raw)
        text = raw.decode(encoding)
        text = text.removeprefix("\ufeff")
        header = text.splitlines()[0] if text.strip() else ""
        separator = "," if "," in header else ";" if ";" in header else "\t" if "\t" in header else ","
        columns = next(csv.reader([header], delimiter=separator)) if header else list(COLUMNS)
        names = [column.strip().lower() for column in columns]
        if "id" in names:
            at = names.index("id")
            if any(len(row) > at and row[at] == id_ for row in csv.reader(io.StringIO(text), delimiter=separator)):
                return
        values = {"id": id_, "question": _plain(question), "answer": _plain(answer), "lang": lang, "tags": TAG}
        newline = "\r\n" if "\r\n" in text else "\n"
        out = io.StringIO()
        writer = csv.writer(out, delimiter=separator, lineterminator=newline)
        if not header:
            writer.writerow(columns)
        elif not text.endswith(("\n", "\r")):
            out.write(newline)
        writer.writerow([values.get(name, "") for name in names])
        beside = self._path.with_name(f"faqs.csv.{os.getpid()}.new")
        try:
            with beside.open("wb") as file:
                file.write(raw + out.getvalue().encode(encoding))
                file.flush()
                os.fsync(file.fileno())
            if self._path.exists():
                beside.chmod(self._path.stat().st_mode & 0o777)
            beside.replace(self._path)
        finally:
            beside.unlink(missing_ok=True)


def _encoding_of(raw: bytes) -> str:
    """Return the file's encoding as docs/store.md has it; its byte order mark stays in front, where it is."""
    for bom, encoding in _BOMS:
        if raw.startswith(bom):
            return encoding
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return "gb18030"
    return "utf-8"


def _plain(text: str) -> str:
    """
    Return a cell that no spreadsheet takes for a formula: the question is a visitor's, and the file is opened in Excel.

    See OWASP, "CSV Injection". Leading signs say nothing in a question or an answer; a list's first dash becomes a dot.
    """
    text = text.strip()
    if text.startswith("-"):
        text = "• " + text.lstrip("- \t")
    return text.lstrip("=+@\t\r")
