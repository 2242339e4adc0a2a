"""
A merchant's file in any format -> its tables or its text. The one way in for `retrieval/load.py` and for the import.

Text formats are read here, line by line and within the limits; every other format in a child process of its own
(`child.py`), so that this one can neither be crashed nor filled by a file. Knows formats; no columns, no store.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrieval.errors import Fault
from retrieval.importing.limits import (
    CHILD_CPU_S,
    CHILD_CPU_S_PER_MIB,
    CHILD_WALL_FACTOR,
    MAX_COLUMNS,
    MAX_DOCUMENT_CHARS,
    MAX_FILE_BYTES,
    MAX_JSON_LINE_CHARS,
    MAX_ROWS,
    MAX_TEXT_CHARS,
    MiB,
)
from retrieval.importing.plain import to_markdown
from retrieval.importing.refused import TOO_LARGE, TOO_SLOW
from retrieval.importing.tables import Table
from retrieval.importing.text import read_csv, read_text

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".xlsx": "xlsx", ".xlsm": "xlsx", ".json": "json", ".jsonl": "jsonl",
    ".ndjson": "jsonl", ".md": "markdown", ".markdown": "markdown", ".txt": "text", ".text": "text", ".html": "html",
    ".htm": "html", ".xhtml": "html", ".pdf": "pdf", ".docx": "docx",
}  # fmt: skip
SHEETS = ("csv", "tsv", "xlsx", "json", "jsonl")
_INSTEAD = {
    ".xls": "save it as .xlsx", ".et": "save it as .xlsx", ".ods": "save it as .xlsx", ".numbers": "export it as .xlsx",
    ".doc": "save it as .docx", ".wps": "save it as .docx", ".odt": "save it as .docx", ".rtf": "save it as .docx",
    ".pages": "export it as .docx", ".ppt": "save it as PDF", ".pptx": "save it as PDF", ".zip": "unpack it first",
    ".png": "recognise its text first (OCR)", ".jpg": "recognise its text first (OCR)",
}  # fmt: skip
_MAGIC = (
    (b"PK\x03\x04", "an Office file or a ZIP archive"),
    (b"%PDF-", "a PDF"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
)
_N_KEPT = 64


@dataclass(frozen=True, slots=True)
class Source:
    """What one file holds."""

    name: str
    form: str
    tables: Sequence[Table] = ()
    markdown: str | None = None
    pages: Sequence[tuple[int, Mapping[str, Any]]] = ()  # JSON entries with a text of their own: (row, entry)
    notes: Sequence[str] = field(default=())  # for the merchant: what was left out


def read_file(path: Path, name: str, faults: list[Fault]) -> Source | None:
    """
    Return what a file holds, or None and a fault; blocks, for seconds where the file is large.

    What a child process read is remembered as long as the file's time and size stay, for a reload reads every file.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        known = ", ".join(sorted(FORMATS))
        remedy = _INSTEAD.get(path.suffix.lower(), f"what can be read is {known}")
        faults.append(Fault(name, None, None, f"no format that can be read; {remedy}"))
        return None
    try:
        stat = path.stat()
        if not path.is_file():
            faults.append(Fault(name, None, None, "is a folder; name the files in it"))
            return None
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as exc:
        faults.append(
            Fault(name, None, None, f"cannot be read ({exc.strerror or exc}); check its name and permissions")
        )
        return None
    if stat.st_size > MAX_FILE_BYTES:
        limit = MAX_FILE_BYTES // MiB
        faults.append(Fault(name, None, None, f"{stat.st_size / MiB:.0f} MiB, more than {limit} MiB; split the file"))
        return None
    if not stat.st_size:
        faults.append(Fault(name, None, None, "is empty; fill it in or leave it out"))
        return None
    if form in ("csv", "tsv", "text", "markdown", "json", "jsonl"):
        for magic, what in _MAGIC:
            if head.startswith(magic):
                faults.append(Fault(name, None, None, f"is {what} under a wrong name; give it its own ending"))
                return None
    if form in ("csv", "tsv"):
        return _csv(path, name, form, faults)
    if form in ("markdown", "text"):
        return _text(path, name, form, faults)
    if form == "jsonl":
        return _jsonl(path, name, faults)
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    records = _kept.get(key)
    if records is None:
        records = list(_child(form, path))
        if sum(len(record.get("cells", "1")) for record in records) < 100_000:
            _kept.put(key, records)
    return _assemble(records, name, form, faults)


class _Kept:
    """The last files' records, by file, time and size."""

    def __init__(self) -> None:
        self._records: OrderedDict[tuple[str, int, int], list[dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> list[dict[str, Any]] | None:
        with self._lock:
            if key in self._records:
                self._records.move_to_end(key)
            return self._records.get(key)

    def put(self, key: tuple[str, int, int], records: list[dict[str, Any]]) -> None:
        with self._lock:
            self._records[key] = records
            while len(self._records) > _N_KEPT:
                self._records.popitem(last=False)


_kept = _Kept()


# --- formats read here ------------------------------------------------------------------------------------------------


def _csv(path: Path, name: str, form: str, faults: list[Fault]) -> Source | None:
    n_faults = len(faults)
    rows = [
        (record.row, record.cells)
        for record in read_csv(path, name, faults, "\t" if form == "tsv" else None)
        if any(cell.strip() for cell in record.cells)
    ]
    return None if len(faults) > n_faults else Source(name, form, [Table(name, rows)])


def _text(path: Path, name: str, form: str, faults: list[Fault]) -> Source | None:
    text = read_text(path, name, faults)
    if text is None:
        return None
    if not text.strip():
        faults.append(Fault(name, None, None, "is empty; fill it in or leave it out"))
        return None
    if len(text) > MAX_DOCUMENT_CHARS:
        problem = f"{len(text):,} characters of text, more than {MAX_DOCUMENT_CHARS:,}; split it"
        faults.append(Fault(name, None, None, problem))
        return None
    return Source(name, form, markdown=text if form == "markdown" else to_markdown(text))


def json_lines(lines: Sequence[str], name: str, faults: list[Fault]) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of JSONL; blank lines are left out, lines that are no JSON go to `faults`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(line) > MAX_JSON_LINE_CHARS:
            problem = f"a line of {len(line):,} characters, more than {MAX_JSON_LINE_CHARS:,}; one object a line"
            faults.append(Fault(name, number, None, problem))
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as exc:
            faults.append(Fault(name, number, None, f"not JSON ({exc}); one object a line"))
            continue
        yield number, value


def _jsonl(path: Path, name: str, faults: list[Fault]) -> Source | None:
    n_faults = len(faults)
    text = read_text(path, name, faults)
    if text is None:
        return None
    lines = text.split("\n")
    if len(lines) > MAX_ROWS + 1:
        faults.append(Fault(name, None, None, f"more than {MAX_ROWS:,} lines; split the file"))
        return None
    objects: list[tuple[int, Mapping[str, Any]]] = []
    for number, entry in json_lines(lines, name, faults):
        if isinstance(entry, dict):
            objects.append((number, entry))
        else:
            faults.append(Fault(name, number, None, 'not a JSON object; write {"question": …, "answer": …}'))
    if not objects and len(faults) == n_faults:
        faults.append(Fault(name, None, None, "holds no entries; one JSON object a line"))
    return None if len(faults) > n_faults else _objects(objects, name, "jsonl", (), faults)


def _objects(
    objects: Sequence[tuple[int, Mapping[str, Any]]], name: str, form: str, notes: Sequence[str], faults: list[Fault]
) -> Source | None:
    """Return JSON entries as a table whose header is their names; those with a text of their own stay as they are."""
    pages = [
        (row, entry)
        for row, entry in objects
        if entry.get("text") and not (entry.get("question") and entry.get("answer"))
    ]
    own = {row for row, _ in pages}
    header: dict[str, int] = {}
    rows: list[tuple[int, list[str]]] = []
    for row, entry in objects:
        if row in own:
            continue
        for key in entry:
            header.setdefault(key, len(header))
        if len(header) > MAX_COLUMNS:
            faults.append(Fault(name, row, None, f"more than {MAX_COLUMNS:,} different names; is this a table?"))
            return None
        cells = [""] * len(header)
        for key, value in entry.items():
            cells[header[key]] = _cell(value)
        rows.append((row, cells))
    tables = [Table(name, [(0, list(header)), *rows], keyed=True)] if rows else []
    return Source(name, form, tables, pages=pages, notes=notes)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return "\n".join(str(item).replace("\n", " ") for item in value)
    if isinstance(value, dict | list):
        return "\0nested"  # a fault where the column is wanted, nothing where it is not
    return str(value)


# --- formats read in a child process ----------------------------------------------------------------------------------


def _child(form: str, path: Path) -> Iterator[dict[str, Any]]:
    """Yield what the child reads; ends with {"refused"} where it, or its end, says so."""
    # -I -S and the path by hand: nothing of the environment or the working directory is imported, and it starts faster.
    start = "from retrieval.importing.child import main; sys.exit(main(*sys.argv[1:]))"
    code = f"import sys; sys.path[:] = {sys.path!r}; {start}"
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, form, str(path.absolute())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stdout is not None
    wall_s = (CHILD_CPU_S + path.stat().st_size / MiB * CHILD_CPU_S_PER_MIB) * CHILD_WALL_FACTOR
    overdue = threading.Timer(wall_s, process.kill)
    overdue.start()
    n_chars = 0
    ended = False
    try:
        for line in process.stdout:
            n_chars += len(line)
            if n_chars > MAX_TEXT_CHARS:
                yield {
                    "refused": f"more than {MAX_TEXT_CHARS // 10**6} million characters; split it into several files"
                }
                return
            record = json.loads(line)
            if "allow" in record:
                overdue.cancel()
                more_s = record["allow"] / MiB * CHILD_CPU_S_PER_MIB * CHILD_WALL_FACTOR
                overdue = threading.Timer(wall_s + more_s, process.kill)
                overdue.start()
                continue
            ended = ended or "done" in record or "refused" in record
            if "done" not in record:
                yield record
    except ValueError:  # cut off in the middle of a line
        ended = False
    finally:
        overdue.cancel()
        process.kill()
        process.stdout.close()
        status = process.wait()
    if not ended:
        slow = status in (-signal.SIGXCPU, -signal.SIGKILL)
        yield {"refused": TOO_SLOW if slow else TOO_LARGE if status else "is damaged; save it again"}


def _assemble(records: Sequence[dict[str, Any]], name: str, form: str, faults: list[Fault]) -> Source | None:
    """Return the records of a child as a source, or None and the fault it ended with."""
    refused = next((record["refused"] for record in records if "refused" in record), None)
    if refused is not None:
        faults.append(Fault(name, None, None, refused))
        return None
    notes = [record["note"] for record in records if "note" in record]
    if form == "json":
        return _objects([(r["row"], r["object"]) for r in records if "object" in r], name, form, notes, faults)
    if form != "xlsx":
        return Source(name, form, markdown=next(r["markdown"] for r in records if "markdown" in r), notes=notes)
    tables: list[Table] = []
    rows: list[tuple[int, list[str]]] = []
    for record in records:
        if "sheet" in record:
            rows = []
            tables.append(Table(f"{name}!{record['sheet']}", rows, hidden=record["hidden"]))
        elif "row" in record:
            rows.append((record["row"], record["cells"]))
    return Source(name, form, tables, notes=notes)
