"""
Entries and documents + the store's files -> the files' new contents, and what changes in them. Writes nothing.

A row that does not change keeps its bytes, and so do columns and blank lines of the merchant's own: only changed rows
are written anew, new ones go to the end. A filled cell replaces, an empty one leaves what is there, wordings are added.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import tzinfo
from pathlib import Path
from typing import Any, Literal

from retrieval.errors import Fault
from retrieval.importing.columns import SheetKind
from retrieval.importing.files import Stamp, stamp_of
from retrieval.importing.tables import Entry, entry_id, key_of
from retrieval.importing.text import Dialect, Record, open_csv, read_text
from retrieval.load import parse_time
from retrieval.words import detect_lang

TARGETS: dict[SheetKind, str] = {"faqs": "faqs.csv", "products": "products.csv", "promotions": "promotions.csv"}
_COLUMNS: dict[SheetKind, tuple[str, ...]] = {
    "faqs": ("id", "question", "answer", "lang", "questions", "tags", "valid_from", "valid_until"),
    "products": ("id", "title", "description", "price", "currency", "url", "image", "category", "stock", "lang"),
    "promotions": ("id", "title", "description", "code", "starts_at", "ends_at", "lang", "products", "conditions"),
}
_NAME: dict[SheetKind, str] = {"faqs": "question", "products": "title", "promotions": "title"}
_BODY: dict[SheetKind, str] = {"faqs": "answer", "products": "description", "promotions": "description"}
_TIMES = ("valid_from", "valid_until", "starts_at", "ends_at")

How = Literal["added", "changed", "unchanged"]


@dataclass(frozen=True, slots=True)
class Change:
    """What an import does to one entry, section or file."""

    how: How
    id: str
    title: str
    source: str  # "faq.xlsx!Sheet1:12"
    fields: tuple[str, ...] = ()  # the store's columns that change


@dataclass(slots=True)
class Merged:
    """One file of the store after the import."""

    name: str
    seen: Stamp | None  # the file when it was read
    content: bytes | None = None  # None: as it is
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def merge_sheet(
    path: Path, kind: SheetKind, entries: Sequence[Entry], zone: tzinfo, faults: list[Fault]
) -> Merged | None:
    """Return `path` with the entries merged in, or None and faults; an entry is known by id, else by its question."""
    name = TARGETS[kind]
    merged = Merged(name, stamp_of(path))
    sheet = _Sheet(path, kind, merged.seen is not None, faults)
    if not sheet.readable:
        return None
    n_faults = len(faults)
    touched: dict[int, Entry] = {}
    counted: dict[int, Change] = {}
    for entry in entries:
        place = sheet.find(entry)
        if place is None:
            place = sheet.add(entry)
            touched[place] = entry
            change = Change("added", sheet.value(place, "id"), entry.values.get(_NAME[kind], ""), _place(entry))
        else:
            before = touched.setdefault(place, entry)
            if before is not entry and _disagree(before, entry, kind):
                problem = f"stands in {before.file}, row {before.row} too, and differs; keep one of them"
                label = entry.labels.get(_NAME[kind], _NAME[kind])
                faults.append(Fault(entry.file, entry.row, label, problem))
                continue
            fields = sheet.update(place, entry, zone)
            if before is not entry and not fields:
                continue  # the same entry once more: counted once
            title = sheet.value(place, _NAME[kind])
            change = Change(
                "changed" if fields else "unchanged", sheet.value(place, "id"), title, _place(entry), fields
            )
            if before is not entry and (earlier := counted[place]).how != "unchanged":
                change = replace(earlier, fields=(*earlier.fields, *fields))
        for other in sheet.also_wording(place) if kind == "faqs" and change.how == "added" else ():
            merged.notes.append(
                f"{_place(entry)}: {change.title!r} is also a wording of {other}; is one of them too many?"
            )
        counted[place] = change
    if len(faults) > n_faults:
        return None
    merged.changes = list(counted.values())
    merged.content = sheet.render()
    return merged


def _place(entry: Entry) -> str:
    return f"{entry.file}:{entry.row}"


def _disagree(one: Entry, other: Entry, kind: SheetKind) -> bool:
    return any(
        value and one.values.get(name) and one.values[name] != value
        for name, value in other.values.items()
        if name not in ("questions", "tags", "id", _NAME[kind])
    )


class _Sheet:
    """A CSV file of the store under way: its records, and which of them are written anew."""

    def __init__(self, path: Path, kind: SheetKind, exists: bool, faults: list[Fault]) -> None:
        self.kind = kind
        self.dialect = Dialect("utf-8", ",", "\n")
        self.records: list[Record] = []
        self.header: list[str] = list(_COLUMNS[kind])
        self.header_raw = ""
        self.hint = ""
        self.new_header = not exists
        self.anew: set[int] = set()
        self.readable = True
        if exists:
            n_faults = len(faults)
            opened = open_csv(path, path.name, faults)
            if opened is not None:
                self.dialect = opened[0]
                self.records = list(opened[1])
            self.readable = len(faults) == n_faults
            while self.records and not any(cell.strip() for cell in self.records[0].cells):
                self.header_raw += self.records.pop(0).raw
            if self.records:
                first = self.records.pop(0)
                self.hint = f"sep={self.dialect.delimiter}{self.dialect.newline}" if first.row == 2 else ""
                self.header = [cell.strip() for cell in first.cells]
                self.header_raw += first.raw
            else:
                self.new_header = True
        self.at = {name.lower(): position for position, name in enumerate(self.header)}
        self.cells = [list(record.cells) for record in self.records]
        self.by_id: dict[str, int] = {}
        self.by_name: dict[tuple[str, str], int] = {}
        self.by_wording: dict[tuple[str, str], list[int]] = {}
        for place in range(len(self.cells)):
            self._index(place)

    def _index(self, place: int) -> None:
        entry_id, name = self.value(place, "id"), self.value(place, _NAME[self.kind])
        if not entry_id:
            return
        lang = self._lang(place)
        self.by_id.setdefault(entry_id, place)
        self.by_name.setdefault((key_of(name) or name, lang), place)
        for wording in re.split(r"[|｜\n]", self.value(place, "questions")):
            if key_of(wording):
                self.by_wording.setdefault((key_of(wording), lang), []).append(place)

    def _lang(self, place: int) -> str:
        own = self.value(place, "lang").lower().replace("_", "-").split("-")[0]
        return own or detect_lang(self.value(place, _NAME[self.kind]) + self.value(place, _BODY[self.kind]))

    def value(self, place: int, name: str) -> str:
        position = self.at.get(name)
        cells = self.cells[place]
        return cells[position].strip() if position is not None and position < len(cells) else ""

    def find(self, entry: Entry) -> int | None:
        values = entry.values
        own = values.get("id", "")
        for entry_key in (own, entry_id(self.kind, values) if own else ""):
            if entry_key and entry_key in self.by_id:
                return self.by_id[entry_key]
        name = values.get(_NAME[self.kind], "")
        lang = values.get("lang") or detect_lang(name + values.get(_BODY[self.kind], ""))
        return self.by_name.get((key_of(name) or name, lang))

    def also_wording(self, place: int) -> list[str]:
        key = (key_of(self.value(place, _NAME[self.kind])), self._lang(place))
        return [self.value(other, "id") for other in self.by_wording.get(key, ()) if other != place]

    def add(self, entry: Entry) -> int:
        values = {**entry.values, "id": entry_id(self.kind, entry.values)}
        name = values.get(_NAME[self.kind], "")
        values["lang"] = values.get("lang") or detect_lang(name + values.get(_BODY[self.kind], ""))
        if values.get("questions"):
            values["questions"] = "|".join(_new_wordings("", name, values["questions"]))
        place = len(self.cells)
        self.cells.append([])
        for column, value in values.items():
            if value:
                self._set(place, column, value)
        self._index(place)
        return place

    def update(self, place: int, entry: Entry, zone: tzinfo) -> tuple[str, ...]:
        changed: list[str] = []
        for name, value in entry.values.items():
            if not value or name == "id":
                continue
            old = self.value(place, name)
            new = value
            if name == "questions":
                question = entry.values.get("question") or self.value(place, "question")
                more = _new_wordings(old, question, value)
                new = "|".join(part for part in (old.strip("|｜\n "), *more) if part) if more else old
            elif name == _NAME[self.kind] and key_of(old) and key_of(old) == key_of(new):
                new = old  # the same question with other signs or spaces is the same question
            elif name == "currency" and old:
                new = old if "currency" not in entry.labels else new  # a guess does not overrule the merchant
            elif old and _same(name, old, new, zone):
                new = old
            if new != old.replace("\r\n", "\n"):
                self._set(place, name, new)
                changed.append(name)
        return tuple(changed)

    def _set(self, place: int, name: str, value: str) -> None:
        if name not in self.at:
            self.at[name] = len(self.header)
            self.header.append(name)
            self.new_header = True
        cells = self.cells[place]
        cells.extend([""] * (self.at[name] + 1 - len(cells)))
        cells[self.at[name]] = value
        self.anew.add(place)

    def render(self) -> bytes | None:
        """Return the file's new bytes, None where nothing changed."""
        if not self.anew:
            return None
        parts = [self.hint, self._row(self.header) if self.new_header else self.header_raw]
        for place, cells in enumerate(self.cells):
            raw = self.records[place].raw if place < len(self.records) else ""
            if place in self.anew:
                raw = self._row([*cells, *[""] * (len(self.header) - len(cells))])
            if not parts[-1].endswith("\n") and parts[-1]:
                parts[-1] = parts[-1].rstrip("\r") + self.dialect.newline
            parts.append(raw)
        text = "".join(parts)
        try:
            if self.dialect.encoding in ("utf-16-le", "utf-16-be"):
                raise UnicodeError("was without a mark: write it so that every program can tell")
            return text.encode(self.dialect.encoding)
        except UnicodeError:
            return text.encode("utf-8-sig")

    def _row(self, cells: Sequence[str]) -> str:
        line = io.StringIO()
        csv.writer(line, delimiter=self.dialect.delimiter, lineterminator=self.dialect.newline).writerow(cells)
        return line.getvalue()


def _new_wordings(old: str, question: str, new: str) -> list[str]:
    seen = {key_of(question), *(key_of(part) for part in re.split(r"[|｜\n]", old))}
    found: list[str] = []
    for part in re.split(r"[|｜\n]", new):
        key = key_of(part) or part.strip()
        if key and key not in seen:
            seen.add(key)
            found.append(part.strip())
    return found


def _same(name: str, old: str, new: str, zone: tzinfo) -> bool:
    """Return whether two cells say the same in other writing."""
    if name in _TIMES:
        try:
            until = name in ("valid_until", "ends_at")
            return parse_time(old, zone, until=until) == parse_time(new, zone, until=until)
        except ValueError:
            return False
    if name in ("tags", "products"):
        return set(re.split(r"[|｜,，;；、\s]+", old)) == set(re.split(r"[|｜,，;；、\s]+", new))
    if name in ("price", "stock"):
        bare = [re.sub(r"[^\d.]", "", text) for text in (old, new)]
        return all(re.fullmatch(r"\d+(?:\.\d+)?", text) for text in bare) and float(bare[0]) == float(bare[1])
    return " ".join(old.split()) == " ".join(new.split())


# --- documents --------------------------------------------------------------------------------------------------------


def merge_policy(
    path: Path, name: str, source: str, markdown: str, faults: list[Fault], *, copied: bool
) -> Merged | None:
    """
    Return policies/NAME.md made of a document; `copied`: the document is Markdown and is kept as it is.

    A made file carries where it is from and a checksum. One that was edited by hand since, or was never made from this
    document, is not overwritten.
    """
    merged = Merged(name, stamp_of(path))
    body = markdown if markdown.endswith("\n") else markdown + "\n"
    old = ""
    if merged.seen is not None:
        read = read_text(path, name, faults)
        if read is None:
            return None
        old = read.replace("\r\n", "\n")
    front = re.match(r"---\nimported_from: (.*)\nsha256: ([0-9a-f]{16})\n---\n", old)
    if old and not copied:
        if front is None or front[1] != source:
            problem = (
                f"{name} is there already and was not made from it; rename the document, or remove that file first"
            )
            faults.append(Fault(source, None, None, problem))
            return None
        if _digest(old[front.end() :]) != front[2]:
            problem = f"{name} was edited by hand since it was made; remove it to make it anew, or edit it on"
            faults.append(Fault(source, None, None, problem))
            return None
    new = body if copied else f"---\nimported_from: {source}\nsha256: {_digest(body)}\n---\n{body}"
    before, after = _sections(old[front.end() :] if front else old), _sections(body)
    for title, text in after.items():
        how: How = "added" if title not in before else "unchanged" if before[title] == text else "changed"
        merged.changes.append(
            Change(how, f"{Path(name).stem}#{title}" if title else Path(name).stem, title or text[:60], source)
        )
    if new != old:
        merged.content = new.encode()
    return merged


def merge_copy(path: Path, name: str, source: str, content: bytes) -> Merged:
    """Return knowledge/NAME: the merchant's file as it is, read by the server itself."""
    merged = Merged(name, stamp_of(path))
    old = path.read_bytes() if merged.seen is not None else None
    how: How = "added" if old is None else "unchanged" if old == content else "changed"
    merged.changes.append(Change(how, name, source, source))
    if how != "unchanged":
        merged.content = content
    return merged


def merge_pages(
    path: Path, name: str, source: str, pages: Sequence[tuple[int, Mapping[str, Any]]], faults: list[Fault]
) -> Merged | None:
    """Return knowledge/NAME.jsonl with the entries merged in by id."""
    merged = Merged(name, stamp_of(path))
    lines: list[str] = []
    place: dict[str, int] = {}
    if merged.seen is not None:
        text = read_text(path, name, faults)
        if text is None:
            return None
        lines = text.rstrip("\n").split("\n")
        for number, line in enumerate(lines):
            try:
                place[str(json.loads(line)["id"])] = number
            except (ValueError, KeyError, TypeError):
                continue  # load_store names what is wrong with it
    changed = False
    for row, entry in pages:
        said = str(entry.get("title") or entry.get("question") or entry["text"])
        digest = hashlib.sha256(said.encode()).hexdigest()[:8]
        own = {**entry, "id": str(entry.get("id") or f"page-{digest}")}
        line = json.dumps(own, ensure_ascii=False)
        at = place.get(own["id"])
        how: How = "added"
        if at is None:
            place[own["id"]] = len(lines)
            lines.append(line)
        else:
            how = "unchanged" if json.loads(lines[at]) == own else "changed"
            lines[at] = lines[at] if how == "unchanged" else line
        changed |= how != "unchanged"
        merged.changes.append(Change(how, own["id"], said[:60], f"{source}:{row}"))
    if changed:
        merged.content = ("\n".join(lines) + "\n").encode()
    return merged


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _sections(markdown: str) -> dict[str, str]:
    """Return heading -> text; what stands before the first heading is under ""."""
    found: dict[str, str] = {}
    title = ""
    for line in markdown.split("\n"):
        heading = re.match(r"#{1,6}\s+(.*?)\s*#*$", line)
        if heading is not None:
            title = heading[1]
            while title in found:
                title += " '"
            found[title] = ""
        elif line.strip() and not line.startswith("<!--"):
            found[title] = found.get(title, "") + line.strip() + "\n"
    return {title: text for title, text in found.items() if text or title}


def question_pairs(markdown: str) -> list[tuple[int, str, str]]:
    """
    Return (line, question, answer) of a document that is a list of questions and answers.

    Written as `问：… 答：…` (Q: … A: …), or as headings that end in a question mark with the answer under them.
    """
    found: list[tuple[int, list[str], list[str]]] = []
    state = ""
    for number, line in enumerate(markdown.split("\n"), start=1):
        text = re.sub(r"^(?:#{1,6}\s+|[-*]\s+|>\s+|\*\*)+", "", line).strip().replace("**", "")
        asked = re.match(r"(?:\d+[.、)]\s*)?(?:问题?|提问|question|q)\s*\d*\s*[:：.、]\s*(.+)", text, re.IGNORECASE)
        answered = re.match(r"(?:答案?|回答|回复|answer|a)\s*\d*\s*[:：]\s*(.*)", text, re.IGNORECASE)
        heading = re.match(r"#{1,6}\s", line) is not None
        if asked or (heading and text.endswith(("?", "？"))):
            found.append((number, [asked[1] if asked else text], []))
            state = "answer" if heading and not asked else "question"
        elif answered and found:
            found[-1][2].append(answered[1])
            state = "answer"
        elif heading:
            state = ""
        elif text and state and found and not line.startswith("<!--"):
            (found[-1][1] if state == "question" else found[-1][2]).append(text)
    return [
        (number, " ".join(question), "\n".join(part for part in answer if part)) for number, question, answer in found
    ]
