"""
Bytes -> text: which encoding a merchant's file is in, and CSV rows out of it within the limits. No foreign library.

Knows the encodings that Excel and editors write in China and the West; knows nothing of columns or passages. Used for
the store's own files and for imported ones alike, so that both read the same.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from retrieval.errors import Fault
from retrieval.importing.limits import (
    MAX_CELL_CHARS,
    MAX_CELLS,
    MAX_COLUMNS,
    MAX_FILE_BYTES,
    MAX_LINE_CHARS,
    MAX_ROW_SEPARATORS,
    MAX_ROWS,
)

_CHUNK = 2**20
_SAMPLE_CHARS = 20_000  # characters that are not ASCII, looked at to tell one legacy encoding from another
# What Western Excel puts into an English text: curly quotes, dashes, currency, accented letters.
_WESTERN = frozenset("‘’“”–—…€£¢¥©®™°·•×÷«»¿¡§±½¼¾\u00a0ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜàáâãäåæçèéêëìíîïñòóôõöøùúûüßœ")
_SAVE_AS = "save it again as CSV UTF-8"


class NotText(Exception):
    """The bytes are no text of an encoding that is known; the message says why and what to do."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row  # a line of the file, from 1


def read_bytes(path: Path, name: str, faults: list[Fault]) -> bytes | None:
    """Return a file's bytes, or None and a fault: not there, not readable, too large."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            limit = MAX_FILE_BYTES // 2**20
            faults.append(Fault(name, None, None, f"{size / 2**20:.0f} MiB, more than {limit} MiB; split the file"))
            return None
        return path.read_bytes()
    except OSError as exc:
        faults.append(Fault(name, None, None, f"cannot be read ({exc.strerror or exc}); check its permissions"))
        return None


def read_text(path: Path, name: str, faults: list[Fault]) -> str | None:
    """Return a file's text, or None and a fault."""
    raw = read_bytes(path, name, faults)
    if raw is None:
        return None
    try:
        return raw.decode(find_encoding(raw))
    except NotText as exc:
        faults.append(Fault(name, exc.row, None, str(exc)))
        return None


def find_encoding(raw: bytes) -> str:
    """
    Return the encoding of `raw`, which then decodes without an error.

    In order: a byte order mark; UTF-16 without one, where the zero bytes leave no doubt; UTF-8; then whichever of
    GB18030, Big5 and Windows-1252 makes common characters of it. GB18030 takes nearly any bytes, so what it makes of
    them is looked at: a curly quote of Western Excel would become a Chinese character nobody writes.

    Raises:
        NotText: none of these, or damaged.
    """
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if raw.startswith(mark):
            if _decodes(raw, encoding):
                return _without_nul(raw, encoding)
            name = encoding.removesuffix("-sig").upper()
            raise NotText(f"begins as {name} and is not: damaged or cut off; export it again", _bad_line(raw, encoding))
    if b"\0" in raw:
        wide = _wide(raw)
        if wide is None:
            line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
            raise NotText("holds a NUL byte: not a text file; export it again as CSV UTF-8", line)
        return wide
    if _decodes(raw, "utf-8"):
        return "utf-8"
    decoded = raw.decode("utf-8", "replace")
    foreign = sum(character > "\x7f" for character in decoded[: 50 * _SAMPLE_CHARS])
    n_bad = decoded[: 50 * _SAMPLE_CHARS].count("\ufffd") or decoded.count("\ufffd")
    legacy = [
        (encoding, _share(raw, encoding, usual))
        for encoding, usual in (("gb18030", _usual_gb), ("cp950", _usual_big5), ("cp1252", _usual_western))
    ]
    encoding, share = max(legacy, key=lambda pair: pair[1])
    binary = re.search(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]", raw) is not None
    if share >= (0.9 if encoding == "cp1252" else 0.6) and not binary and not (foreign > 50 and n_bad * 50 < foreign):
        return encoding
    if n_bad * 5 < foreign:
        problem = f"is UTF-8 with damaged characters, or cut off in the middle of one; {_SAVE_AS}"
        raise NotText(problem, _bad_line(raw, "utf-8"))
    raise NotText(f"is neither UTF-8 nor GB18030; {_SAVE_AS}")


def _decodes(raw: bytes, encoding: str) -> bool:
    """Return whether all of `raw` is `encoding`; in pieces, since the text can be four times as large."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for start in range(0, len(raw), _CHUNK):
            decoder.decode(raw[start : start + _CHUNK])
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        return False
    return True


def _without_nul(raw: bytes, encoding: str) -> str:
    if encoding == "utf-8-sig" and b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise NotText("holds a NUL byte: not a text file; export it again as CSV UTF-8", line)
    return encoding


def _bad_line(raw: bytes, encoding: str) -> int | None:
    if not encoding.startswith("utf-8"):
        return None
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as exc:
        return raw.count(b"\n", 0, exc.start) + 1
    return None


def _wide(raw: bytes) -> str | None:
    """Return UTF-16 without a mark as little or big endian, or None where that is not clear."""
    head = raw[: 2**16]
    for encoding, zeros, others in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if zeros.count(0) < 2 or others.count(0) or len(raw) % 2:
            continue
        sample = head.decode(encoding, "ignore")
        # Every ASCII character has its zero byte; ASCII read in pairs would be Chinese without one line break.
        plain = sum(character in "\r\n\t" or " " <= character <= "~" or _usual_gb(character) for character in sample)
        if any(mark in sample for mark in "\n,\t") and plain >= 0.9 * len(sample) and _decodes(raw, encoding):
            return encoding
    return None


def _share(raw: bytes, encoding: str, usual: Callable[[str], bool]) -> float:
    """Return the share of common characters among those that are not ASCII, 0 where `raw` is not `encoding`."""
    if not _decodes(raw, encoding):
        return 0.0
    decoder = codecs.getincrementaldecoder(encoding)()
    seen = n_usual = 0
    known: dict[str, bool] = {}
    for start in range(0, len(raw), _CHUNK):
        for character in decoder.decode(raw[start : start + _CHUNK]):
            if character > "\x7f":
                if character not in known:
                    known[character] = usual(character)
                seen += 1
                n_usual += known[character]
                if seen >= _SAMPLE_CHARS:
                    return n_usual / seen
    return n_usual / seen if seen else 0.0


def _usual_gb(character: str) -> bool:
    """The signs and the 3,755 everyday characters of GB 2312; ordinary Chinese is made of these to 97 in 100."""
    lead = _lead(character, "gb2312")
    return 0xA1 <= lead <= 0xA3 or 0xB0 <= lead <= 0xD7


def _usual_big5(character: str) -> bool:
    """The signs and the 5,401 everyday characters of Big5."""
    return 0xA1 <= _lead(character, "big5") <= 0xC6


def _usual_western(character: str) -> bool:
    return character in _WESTERN


def _lead(character: str, encoding: str) -> int:
    try:
        return character.encode(encoding)[0]
    except UnicodeEncodeError:
        return 0


# --- CSV --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a CSV file."""

    row: int  # as a spreadsheet counts, from 1
    cells: list[str]  # not stripped
    raw: str  # the text it was read from, line ends included


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a CSV file is written."""

    encoding: str
    delimiter: str
    newline: str


class _TooWide(Exception):
    pass


class _Lines:
    """The lines of a CSV file, counted while csv.reader takes them: what no row can hold never becomes a list."""

    def __init__(self, file: io.TextIOBase, delimiter: str) -> None:
        self.file = file
        self.delimiter = delimiter
        self.taken: list[str] = []
        self.n_separators = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_LINE_CHARS + 1)
        if not line:
            raise StopIteration
        self.taken.append(line)
        self.n_separators += line.count(self.delimiter)
        if self.n_separators > MAX_ROW_SEPARATORS:
            raise _TooWide(f"at least {self.n_separators + 1:,} columns, more than {MAX_COLUMNS:,}; is this a table?")
        if len(line) > MAX_LINE_CHARS or len(self.taken) > MAX_CELL_CHARS:
            raise _TooWide("has no end: is a double quote never closed? Double those inside a cell")
        return line

    def take(self) -> str:
        """Return the text of the row just read, and begin the next."""
        text = "".join(self.taken)
        self.taken, self.n_separators = [], 0
        return text


def read_csv(path: Path, name: str, faults: list[Fault], delimiter: str | None = None) -> Iterator[Record]:
    """
    Yield the rows of a CSV or TSV file, empty ones too; the first fault ends it.

    Without `delimiter` it is what the first line has most of: comma, semicolon, tab or full-width comma.
    """
    opened = open_csv(path, name, faults, delimiter)
    if opened is not None:
        yield from opened[1]


def open_csv(
    path: Path, name: str, faults: list[Fault], delimiter: str | None = None
) -> tuple[Dialect, Iterator[Record]] | None:
    """Return how the file is written and its rows, or None and a fault."""
    raw = read_bytes(path, name, faults)
    if raw is None:
        return None
    try:
        encoding = find_encoding(raw)
    except NotText as exc:
        faults.append(Fault(name, exc.row, None, str(exc)))
        return None
    file = io.TextIOWrapper(io.BytesIO(raw), encoding, newline="")
    head = file.readline(2**16)
    hint = re.fullmatch(r"sep=(.)\s*", head)
    if hint is None:
        file.seek(0)
    dialect = Dialect(
        encoding, delimiter or (hint[1] if hint else _delimiter(head)), "\r\n" if "\r\n" in head else "\n"
    )
    return dialect, _records(file, dialect.delimiter, 1 if hint is None else 2, name, faults)


def _delimiter(head: str) -> str:
    bare = re.sub(r'"[^"]*"', "", head)
    # A semicolon or tab file is what Excel writes under a European or "text" setting.
    best = max(",;\t", key=bare.count)
    if bare.count(best) == 0 and "，" in bare:
        return "，"
    return "," if bare.count(",") and bare.count(best) <= 2 * bare.count(",") else best


def _records(file: io.TextIOBase, delimiter: str, first: int, name: str, faults: list[Fault]) -> Iterator[Record]:
    lines = _Lines(file, delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    row, n_cells = first - 1, 0
    try:
        for row, cells in enumerate(reader, start=first):
            n_cells += len(cells)
            if row > MAX_ROWS + 1:
                faults.append(Fault(name, row, None, f"more than {MAX_ROWS:,} rows; split the file"))
                return
            if len(cells) > MAX_COLUMNS or n_cells > MAX_CELLS:
                what = f"{len(cells):,} columns, more than {MAX_COLUMNS:,}; remove those without knowledge"
                if n_cells > MAX_CELLS:
                    what = f"more than {MAX_CELLS:,} cells; split the file"
                faults.append(Fault(name, row, None, what))
                return
            yield Record(row, cells, lines.take())
    except csv.Error as exc:
        # Raised for the row under way: the one after the last that came out whole.
        problem = f"not CSV ({exc}); check the double quotes, double those inside a cell"
        if "field larger" in str(exc):
            problem = f"a cell has more than {MAX_CELL_CHARS:,} characters; split it, or close its double quote"
        faults.append(Fault(name, row + 1, None, problem))
    except _TooWide as exc:
        faults.append(Fault(name, row + 1, None, str(exc)))
