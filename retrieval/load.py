"""
A store folder -> passages, or every fault in it at once. Embeds and indexes nothing.

Knows the column names of the store folder (faqs.csv, promotions.csv, products.csv, policies/*.md, *.jsonl, knowledge/)
and how facts become sentences in a visitor's language; how bytes become rows and text is known to `importing/`. Of
store.toml it reads `timezone` and `languages` only; the rest is the bot's. All or nothing: one bad row and nothing is
returned, so that no half of a store goes live.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from retrieval.errors import BadStore, Fault
from retrieval.importing.columns import SheetKind
from retrieval.importing.files import knowledge_files, stamps
from retrieval.importing.limits import MAX_CELL_CHARS, MAX_ROWS
from retrieval.importing.plain import tables_as_facts
from retrieval.importing.reading import json_lines as json_lines  # evaluate.py reads its questions with it
from retrieval.importing.reading import read_file
from retrieval.importing.tables import Entry, Options, entry_id, source_entries
from retrieval.importing.text import read_csv, read_text
from retrieval.passages import Kind, Passage
from retrieval.recurrence import Recurrence, dump_repeats, load_repeats, parse_repeats
from retrieval.terms import MAX_GROUPS, MAX_IN_GROUP, MAX_TERM_CHARS, Terms
from retrieval.words import detect_lang, fold, squash

SECTION_CHARS = 600  # longer policy sections are cut at paragraphs: what is quoted to a visitor has to stay readable

_SIGNS = {
    "CNY": "¥", "RMB": "¥", "JPY": "JP¥", "USD": "$", "EUR": "€", "GBP": "£", "HKD": "HK$", "TWD": "NT$", "MOP": "MOP$",
    "KRW": "₩", "SGD": "S$", "AUD": "A$", "CAD": "C$", "NZD": "NZ$", "INR": "₹", "THB": "฿", "VND": "₫", "PHP": "₱",
}  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_TWIN_SUFFIX = re.compile(r"[-_.](zh|en|cn)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Clock:
    """The store's time zone and languages, as store.toml has them."""

    zone: tzinfo
    languages: tuple[str, ...]


def load_store(store_dir: Path, zone: tzinfo | None = None) -> list[Passage]:
    """
    Return every passage of the store folder, in file order: FAQs, policies, promotions, products, *.jsonl.

    Valid and invalid ones alike: an ended promotion is a passage too. `valid_from` and `valid_until` are aware, in the
    store's offset of that day (`zone`, by default store.toml's). Blocks on disk.

    Raises:
        BadStore: with every fault of every file; or with one fault where there is no knowledge at all.
    """
    faults: list[Fault] = []
    if not store_dir.is_dir():
        raise BadStore([Fault(str(store_dir), None, None, "no such folder; name the folder with store.toml in it")])
    clock = load_clock(store_dir, faults)
    if zone is not None:
        clock = Clock(zone, clock.languages)
    # Read again where a file changed in between: half of one state and half of another is a state nobody wrote.
    for _ in range(5):
        files = knowledge_files(store_dir)
        before = stamps(files)
        found: list[Fault] = []
        passages = _load_files(files, clock, found)
        after = knowledge_files(store_dir)
        # A staged file that an import moved away meanwhile is a fault of the moment.
        if stamps(after) == before and (not found or after == files):
            break
    faults.extend(found)
    faults.extend(_duplicate_ids(passages))
    _terms(store_dir, faults)
    if not passages and not faults:
        problem = "no knowledge: add faqs.csv, policies/*.md, promotions.csv or products.csv"
        faults.append(Fault(str(store_dir), None, None, problem))
    if faults:
        raise BadStore(faults)
    return passages


def load_terms(store_dir: Path) -> Terms:
    """
    Return the store's own terms, of terms.csv, with the shipped synonyms; the latter alone where there is no file.

    Raises:
        BadStore: with every fault of the file.
    """
    faults: list[Fault] = []
    groups = _terms(store_dir, faults)
    if faults:
        raise BadStore(faults)
    return Terms(groups)


def _terms(store_dir: Path, faults: list[Fault]) -> list[tuple[str, ...]]:
    path = store_dir / "terms.csv"
    groups: list[tuple[str, ...]] = []
    if not path.is_file():
        return groups
    for row in _Rows(path, "terms.csv", faults).read(("term", "synonyms"), ("lang",)):
        group = [row.need("term")]
        group += [term.strip() for term in re.split(r"[|｜\n]", row.need("synonyms")) if term.strip()]
        if len(groups) == MAX_GROUPS:
            row.fault("term", f"more than {MAX_GROUPS:,} terms; remove those that no visitor uses")
            return groups
        if len(group) > MAX_IN_GROUP:
            row.fault("synonyms", f"{len(group) - 1} synonyms, more than {MAX_IN_GROUP - 1}; keep those visitors use")
        for field, term in zip(["term", *["synonyms"] * len(group)], group, strict=False):
            if term and len(squash(term)) < 2:
                row.fault(field, f"{term!r} is too short to be told from other words; write two characters or more")
            elif len(term) > MAX_TERM_CHARS:
                row.fault(field, f"{term[:20]!r}… is longer than {MAX_TERM_CHARS} characters; write the word alone")
        if not row.n_faults and len({fold(term) for term in group}) < 2:
            row.fault("synonyms", "says the term again; write other words for it")
        if not row.n_faults:
            groups.append(tuple(group))
    return groups


def _load_files(files: Mapping[str, Path], clock: Clock, faults: list[Fault]) -> list[Passage]:
    """Return the passages of all files of a store, in the order of the docstring above."""
    passages: list[Passage] = []
    for name, read in (("faqs.csv", _faqs), ("promotions.csv", _promotions), ("products.csv", _products)):
        if name in files:
            passages.extend(read(_Rows(files[name], name, faults), clock))
    for name in (name for name in files if name.startswith("policies/")):
        text = read_text(files[name], name, faults)
        if text is not None:
            passages.extend(_document(text, Path(name).stem, name, faults))
    for name in (name for name in files if name.endswith(".jsonl")):
        passages.extend(_knowledge(files[name], name, clock.zone, faults))
    for name in files:
        if name.startswith("knowledge/") and not name.endswith(".jsonl"):
            passages.extend(_foreign(files[name], name, clock, faults))
    return passages


def _foreign(path: Path, name: str, clock: Clock, faults: list[Fault]) -> Iterator[Passage]:
    """Yield the passages of a file in knowledge/: sheets are FAQs, products or promotions, documents are pages."""
    source = read_file(path, name, faults)
    if source is None:
        return
    if source.markdown is not None:
        yield from _document(source.markdown, Path(name).name, name, faults, kind="page")
        return
    for columns, entries in source_entries(source.tables, Options(), faults, []):
        yield from check_entries(columns.kind, entries, clock, faults)
    for row, entry in source.pages:
        passage = _entry(entry, f"{name}:{row}", clock.zone, name, row, faults)
        if passage is not None:
            yield passage


def check_entries(kind: SheetKind, entries: Sequence[Entry], clock: Clock, faults: list[Fault]) -> list[Passage]:
    """Return the passages of a sheet's entries; what is wrong with them goes to `faults`, by the sheet's own names."""
    read = {"faqs": _faqs, "promotions": _promotions, "products": _products}[kind]
    return list(read(_Entries(kind, entries, faults), clock))


def load_knowledge(path: Path, zone: tzinfo = UTC) -> list[Passage]:
    """
    Return the passages of one K.jsonl (see docs/protocol.md); naive times are in `zone`.

    Raises:
        BadStore: with every fault of the file.
    """
    faults: list[Fault] = []
    passages = _knowledge(path, path.name, zone, faults)
    faults.extend(_duplicate_ids(passages))
    if not passages and not faults:
        faults.append(Fault(path.name, None, None, "no knowledge: the file has no entries"))
    if faults:
        raise BadStore(faults)
    return passages


def load_clock(store_dir: Path, faults: list[Fault]) -> Clock:
    """Return time zone and languages of store.toml, or UTC, zh and en; append what is wrong to `faults`."""
    path = store_dir / "store.toml"
    zone: tzinfo = UTC
    languages: tuple[str, ...] = ("zh", "en")
    if not path.is_file():
        return Clock(zone, languages)
    text = read_text(path, "store.toml", faults)
    if text is None:
        return Clock(zone, languages)
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        faults.append(Fault("store.toml", None, None, f"not TOML ({exc}); correct that place"))
        return Clock(zone, languages)
    # The settings may stand at the top or in a [store] table; both are read so that this file need not know the bot's.
    inner = settings.get("store")
    table: dict[str, Any] = inner if isinstance(inner, dict) else {}
    name = settings.get("timezone", table.get("timezone"))
    if name is not None:
        try:
            zone = ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
            problem = f"{name!r} is no time zone; write an IANA name such as Asia/Shanghai"
            faults.append(Fault("store.toml", None, "timezone", problem))
    named = settings.get("languages", table.get("languages"))
    if isinstance(named, list) and all(isinstance(entry, str) for entry in named):
        languages = tuple(named)
    return Clock(zone, languages)


def load_zone(store_dir: Path) -> tzinfo:
    """
    Return the store's time zone.

    Raises:
        BadStore: store.toml cannot be read.
    """
    faults: list[Fault] = []
    clock = load_clock(store_dir, faults)
    if faults:
        raise BadStore(faults)
    return clock.zone


def twin_key(passage: Passage) -> str:
    """Return what a passage shares with its translation: its kind and its id without -zh or -en."""
    return f"{passage.kind}:{_TWIN_SUFFIX.sub('', passage.id)}"


def content_hash(passages: Iterable[Passage]) -> str:
    """Return the version of a body of knowledge: 16 hexadecimal digits over everything a visitor could be told."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps(dump_passage(passage), ensure_ascii=False, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def dump_passage(passage: Passage) -> dict[str, Any]:
    """Return `passage` as JSON values; `parse_passage` is its inverse."""
    return {
        "id": passage.id,
        "kind": passage.kind,
        "title": passage.title,
        "text": passage.text,
        "lang": passage.lang,
        "source": passage.source,
        "questions": list(passage.questions),
        "valid_from": passage.valid_from.isoformat() if passage.valid_from else None,
        "valid_until": passage.valid_until.isoformat() if passage.valid_until else None,
        "approved": passage.approved,
        "meta": dict(passage.meta),
        "repeats": dump_repeats(passage.repeats) if passage.repeats else None,
    }


def parse_passage(entry: Mapping[str, Any]) -> Passage:
    """
    Return the passage that `dump_passage` wrote.

    Raises:
        KeyError, TypeError, ValueError: `entry` is not one.
    """
    return Passage(
        id=entry["id"],
        kind=entry["kind"],
        title=entry["title"],
        text=entry["text"],
        lang=entry["lang"],
        source=entry["source"],
        questions=tuple(entry["questions"]),
        valid_from=datetime.fromisoformat(entry["valid_from"]) if entry["valid_from"] else None,
        valid_until=datetime.fromisoformat(entry["valid_until"]) if entry["valid_until"] else None,
        approved=entry["approved"],
        meta=MappingProxyType(entry["meta"]),
        repeats=load_repeats(entry["repeats"]) if entry["repeats"] else None,
    )


# --- one file, its rows and its cells ---------------------------------------------------------------------------------


class _Rows:
    """The rows of one CSV file; collects faults while they are read."""

    def __init__(self, path: Path, name: str, faults: list[Fault]) -> None:
        self.path = path
        self.name = name
        self.faults = faults

    def read(self, required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[_Row]:
        """Yield the rows with all their cells stripped; rows without any text are passed over."""
        header: list[str] = []
        n_faults = len(self.faults)
        for record in read_csv(self.path, self.name, self.faults):
            cells = record.cells
            if not header:
                header = [cell.strip().lower() for cell in cells]
                if not self._check_header(header, required, optional):
                    return
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
                problem = f"{len(cells)} cells under {len(header)} columns; put cells with commas in double quotes"
                self.faults.append(Fault(self.name, record.row, None, problem))
                continue
            values = dict(zip(header, (cell.strip() for cell in cells), strict=False))
            if self._fits(record.row, values):
                yield _Row(self, record.row, values)
        if not header and len(self.faults) == n_faults:
            self._check_header(header, required, optional)

    def _check_header(self, header: list[str], required: tuple[str, ...], optional: tuple[str, ...]) -> bool:
        n_faults = len(self.faults)
        known = required + optional
        for column in header:
            if column and header.count(column) > 1:
                self.faults.append(Fault(self.name, 1, column, "the column is there twice; rename or remove one"))
                return False
            # A mistyped `valid_until` would let an offer run for ever, so what is nearly a known name is a fault;
            # columns of the merchant's own are left alone.
            near = difflib.get_close_matches(column, [name for name in known if name not in header], 1, 0.85)
            if column not in known and near:
                self.faults.append(Fault(self.name, 1, column, f"unknown column; did you mean {near[0]}?"))
        for column in required:
            if column not in header:
                self.faults.append(Fault(self.name, 1, column, f"the column is missing; add a column named {column}"))
        return len(self.faults) == n_faults

    def _fits(self, row: int, values: Mapping[str, str]) -> bool:
        for column, cell in values.items():
            if len(cell) > MAX_CELL_CHARS:
                problem = f"{len(cell):,} characters, more than {MAX_CELL_CHARS:,}; split it into several rows"
                self.faults.append(Fault(self.name, row, column, problem))
                return False
        return True


class _Entries:
    """The entries of a merchant's sheet, read as the rows of the store's own files are."""

    def __init__(self, kind: SheetKind, entries: Sequence[Entry], faults: list[Fault]) -> None:
        self.kind = kind
        self.entries = entries
        self.faults = faults

    def read(self, required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[_Row]:
        """Yield the entries as rows, each with an id."""
        for entry in self.entries:
            self.name = entry.file
            values = {**entry.values, "id": entry_id(self.kind, entry.values)}
            long = next((name for name in values if len(values[name]) > MAX_CELL_CHARS), None)
            if long is not None:
                problem = f"{len(values[long]):,} characters, more than {MAX_CELL_CHARS:,}; split it into several rows"
                self.faults.append(Fault(entry.file, entry.row, entry.labels.get(long, long), problem))
                continue
            yield _Row(self, entry.row, values, entry.labels)


class _Row:
    """One row: its cells by name, and where to complain."""

    def __init__(
        self,
        rows: _Rows | _Entries,
        number: int,
        values: Mapping[str, str],
        labels: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.rows = rows
        self.name = rows.name
        self.number = number
        self.values = values
        self.labels = labels  # what the merchant calls a field, where not by its name
        self.n_faults = 0

    @property
    def source(self) -> str:
        return f"{self.name}:{self.number}"

    def fault(self, field: str, problem: str) -> None:
        self.n_faults += 1
        self.rows.faults.append(Fault(self.name, self.number, self.labels.get(field, field), problem))

    def cell(self, field: str) -> str:
        return self.values.get(field, "")

    def need(self, field: str) -> str:
        """Return the cell, with a fault where it is empty."""
        value = self.cell(field)
        if not value:
            self.fault(field, "is empty; fill it in or remove the row")
        return value

    def time(self, field: str, zone: tzinfo, *, until: bool) -> datetime | None:
        value = self.cell(field)
        if not value:
            return None
        try:
            return parse_time(value, zone, until=until)
        except ValueError:
            self.fault(field, f"{value[:40]!r} is no date; write 2026-11-30 or 2026-11-30T18:00")
            return None

    def period(self, start: str, end: str, zone: tzinfo) -> tuple[datetime | None, datetime | None]:
        starts_at = self.time(start, zone, until=False)
        ends_at = self.time(end, zone, until=True)
        if starts_at and ends_at and starts_at >= ends_at:
            self.fault(start, f"{self.cell(start)} is not before {end} {self.cell(end)}; swap or correct them")
        return starts_at, ends_at

    def repeats(self, zone: tzinfo, starts_at: datetime | None, ends_at: datetime | None) -> Recurrence | None:
        try:
            return repeats_within(self.cell("repeats"), zone, starts_at, ends_at)
        except ValueError as exc:
            self.fault("repeats", str(exc))
            return None

    def lang(self, text: str) -> str:
        return (self.cell("lang").lower().replace("_", "-").split("-")[0]) or detect_lang(text)


def parse_time(value: str, zone: tzinfo, *, until: bool) -> datetime:
    """
    Return the aware time `value` names; without an offset it is read in `zone`.

    A bare date is its midnight or, with `until`, the next midnight: a date that ends something counts in full. The
    result has a fixed offset: two times that share a ZoneInfo are compared by their wall clocks, which is wrong in the
    hour that a daylight-saving change repeats.

    Raises:
        ValueError: not a date.
    """
    text = value.strip().replace("年", "-").replace("月", "-").replace("日", " ").strip()
    text = re.sub(r"^(\d{4})[/.](\d{1,2})[/.](\d{1,2})", r"\1-\2-\3", text)
    text = re.sub(r"^(\d{4})-(\d{1,2})-(\d{1,2})", lambda m: f"{m[1]}-{int(m[2]):02d}-{int(m[3]):02d}", text)
    text = re.sub(r"^(\d{4}-\d{2}-\d{2}) +(\d):", r"\1 0\2:", text)
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        day = date.fromisoformat(text) + (timedelta(days=1) if until else timedelta())
        moment = datetime(day.year, day.month, day.day, tzinfo=zone)
    else:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone)
    return _fixed(moment, zone)


def repeats_within(text: str, zone: tzinfo, starts_at: datetime | None, ends_at: datetime | None) -> Recurrence | None:
    """
    Return the repetition that a `repeats` cell says, None where it is empty.

    Raises:
        ValueError: it says none, or one that never falls between the two times; the message is the fault.
    """
    if not text:
        return None
    recurrence = parse_repeats(text, zone, starts_at)
    if starts_at is not None and not recurrence.holds(starts_at):
        first = recurrence.next_start(starts_at)
        if first is None or (ends_at is not None and first >= ends_at):
            raise ValueError("never falls between the start and the end; correct one of the three")
    return recurrence


def _fixed(moment: datetime, zone: tzinfo) -> datetime:
    try:
        local = moment.astimezone(zone)
    except OverflowError as exc:
        raise ValueError("out of range") from exc
    return local.replace(tzinfo=timezone(local.utcoffset() or timedelta()))


# --- the kinds of knowledge -------------------------------------------------------------------------------------------


def _wordings(question: str, more: str) -> tuple[str, ...]:
    """Return `question` and the others of a cell with | or line breaks between them, each once."""
    return _unique([question, *re.split(r"[|｜\n]", more)])


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    seen: dict[str, str] = {}
    for text in texts:
        if text.strip():
            seen.setdefault(squash(text) or text.strip(), text.strip())
    return tuple(seen.values())


def _faqs(rows: _Rows | _Entries, clock: Clock) -> Iterator[Passage]:
    optional = ("lang", "questions", "tags", "valid_from", "valid_until", "repeats")
    for row in rows.read(("id", "question", "answer"), optional):
        faq_id, question, answer = row.need("id"), row.need("question"), row.need("answer")
        starts_at, ends_at = row.period("valid_from", "valid_until", clock.zone)
        repeats = row.repeats(clock.zone, starts_at, ends_at)
        if row.n_faults:
            continue
        tags = [tag.strip() for tag in re.split(r"[|｜,，;；\n]", row.cell("tags")) if tag.strip()]
        yield Passage(
            id=faq_id,
            kind="faq",
            title=question,
            text=answer,
            lang=row.lang(question + answer),
            source=row.source,
            questions=_wordings(question, row.cell("questions")),
            valid_from=starts_at,
            valid_until=ends_at,
            approved=True,
            meta=MappingProxyType({"tags": tags}),
            repeats=repeats,
        )


def _promotions(rows: _Rows | _Entries, clock: Clock) -> Iterator[Passage]:
    required = ("id", "title", "description", "starts_at", "ends_at")
    for row in rows.read(required, ("code", "lang", "products", "conditions", "repeats")):
        promotion_id, title = row.need("id"), row.need("title")
        starts_at, ends_at = row.period("starts_at", "ends_at", clock.zone)
        repeats = row.repeats(clock.zone, starts_at, ends_at)
        if row.n_faults:
            continue
        description, conditions, code = row.cell("description"), row.cell("conditions"), row.cell("code")
        lang = row.lang(title + description)
        zh = lang == "zh"
        sentences = [_sentence(description or title, zh)]
        if code:
            sentences.append(f"优惠码：{code}。" if zh else f"Code: {code}.")
        if conditions:
            sentences.append(_sentence(conditions, zh))
        sentences.append(_dates(starts_at, ends_at, zh, repeats))
        products = [entry.strip() for entry in re.split(r"[|｜,，;；、\n]", row.cell("products")) if entry.strip()]
        yield Passage(
            id=promotion_id,
            kind="promotion",
            title=title,
            text=_join(sentences, zh),
            lang=lang,
            source=row.source,
            questions=_unique([title]),
            valid_from=starts_at,
            valid_until=ends_at,
            meta=MappingProxyType(
                {
                    "code": code,
                    "products": products,
                    "conditions": conditions,
                    "description": description,
                    "starts_at": starts_at.isoformat() if starts_at else None,
                    "ends_at": ends_at.isoformat() if ends_at else None,
                }
            ),
            repeats=repeats,
        )


def _products(rows: _Rows | _Entries, clock: Clock) -> Iterator[Passage]:
    optional = ("description", "currency", "url", "image", "category", "stock", "lang", "sku")
    for row in rows.read(("id", "title", "price"), optional):
        product_id, title = row.need("id"), row.need("title")
        price = _price(row)
        stock: int | None = None
        if row.cell("stock"):
            try:
                stock = int(row.cell("stock").replace(",", ""))
            except ValueError:
                row.fault("stock", f"{row.cell('stock')[:40]!r} is no whole number; write 0, 12, or leave it empty")
        if row.n_faults or price is None:
            continue
        description, currency = row.cell("description"), row.cell("currency").upper()
        lang = row.lang(title + description)
        zh = lang == "zh"
        shown = money(price, currency)
        sentences = [_sentence(title, zh), f"价格：{shown}。" if zh else f"Price: {shown}."]
        if description:
            sentences.append(_sentence(description, zh))
        if stock is not None and stock > 0:
            sentences.append(f"现货库存 {stock} 件。" if zh else f"In stock: {stock}.")
        elif stock is not None:
            sentences.append("目前已售罄，暂时缺货。" if zh else "Sold out at the moment.")
        sku = row.cell("sku") or _TWIN_SUFFIX.sub("", product_id)
        yield Passage(
            id=product_id,
            kind="product",
            title=title,
            text=_join(sentences, zh),
            lang=lang,
            source=row.source,
            questions=_unique([title]),
            meta=MappingProxyType(
                {
                    "sku": sku,
                    "price": float(price),
                    "currency": currency,
                    "price_text": shown,
                    "description": description,
                    "category": row.cell("category"),
                    "stock": stock,
                    "url": row.cell("url"),
                    "image": row.cell("image"),
                }
            ),
        )


def _price(row: _Row) -> Decimal | None:
    value = row.need("price")
    if not value:
        return None
    # "¥1,299.00" and "1299 元" are what an export holds; "1.299,00" could be two prices, so it is a fault.
    bare = re.sub(r"^(?:[A-Z]{0,3}[¥￥$€£₩₹฿]|[A-Z]{3}\s)\s*|\s*(?:元|[A-Z]{3})$", "", value.strip())
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", bare):
        bare = bare.replace(",", "")
    try:
        price = Decimal(bare) if re.fullmatch(r"\d{1,12}(?:\.\d{1,4})?", bare) else None
    except InvalidOperation:
        price = None
    if price is None:
        row.fault("price", f"{value[:40]!r} is no price; write a number such as 129 or 129.90")
    return price


def money(amount: Decimal, currency: str) -> str:
    """Return an amount as the store writes it: ¥399, $12.50; without a known sign 399 XYZ."""
    number = f"{amount:f}" if amount == amount.to_integral_value() else f"{amount:.2f}"
    if amount == amount.to_integral_value():
        number = f"{amount.to_integral_value():f}"
    sign = _SIGNS.get(currency)
    return f"{sign}{number}" if sign else f"{number} {currency}".strip()


def _document(text: str, stem: str, name: str, faults: list[Fault], kind: Kind = "policy") -> Iterator[Passage]:
    """
    Yield one passage a section of a Markdown text: under the title and under each heading of two # and more.

    `stem` begins the ids. A line `<!-- page 3 -->` says that the text after it stands on page 3 of a PDF: without
    headings each page is a section, and a PDF's passages name the page as their source.
    """
    if not text.strip():
        faults.append(Fault(name, None, None, "is empty; write the policy or remove the file"))
        return
    base, _, suffix = (Path(stem).stem if kind == "page" else stem).rpartition(".")
    own = suffix.lower() if base and suffix.lower() in ("zh", "en") else ""
    whole = detect_lang(text)
    page = ""
    title, lines = stem, list[str]()
    headings: dict[int, str] = {}
    sections: list[tuple[str, str, str]] = []  # (headings below the title, joined by " > "; text; page)
    fenced = False
    begun = ""  # the page the section under way began on
    for line in _without_front_matter(text).splitlines():
        fenced ^= line.lstrip().startswith("```")
        mark = re.fullmatch(r"<!-- page (\d+) -->", line)
        if mark is not None:
            page = mark[1]
            if not headings:
                sections.append(("", "\n".join(lines).strip(), begun))
                lines, begun = [], page
            continue
        heading = None if fenced else re.match(r"(#{1,6})\s+(.*?)\s*#*$", line)
        if heading is None:
            lines.append(line)
            continue
        sections.append((" > ".join(headings.values()), "\n".join(lines).strip(), begun))
        lines, begun, depth = [], page, len(heading[1])
        if depth == 1:
            title, headings = heading[2], {}
        else:
            headings = {level: kept for level, kept in headings.items() if level < depth} | {depth: heading[2]}
    sections.append((" > ".join(headings.values()), "\n".join(lines).strip(), begun))
    anchors: dict[str, int] = {}
    for heading_path, body, on in sections:
        for part in _parts(_plain(body)):
            anchor = re.sub(r"[^\w]+", "-", heading_path.split(" > ")[-1].lower()).strip("-")
            anchor = anchor or (f"page-{on}" if on else "top")
            anchors[anchor] = anchors.get(anchor, 0) + 1
            if anchors[anchor] > 1:
                anchor = f"{anchor}-{anchors[anchor]}"
            if len(part) > MAX_CELL_CHARS:
                problem = f"a section of {len(part):,} characters, more than {MAX_CELL_CHARS:,}; split it"
                faults.append(Fault(name, None, heading_path or None, problem))
                continue
            yield Passage(
                id=f"{stem}#{anchor}",
                kind=kind,
                title=f"{title} > {heading_path}" if heading_path else title,
                text=part,
                lang=own or (detect_lang(part) if len(part) >= 20 else "") or whole,
                source=f"{name}#page-{on}" if on and name.lower().endswith(".pdf") else f"{name}#{anchor}",
                questions=_unique([heading_path.split(" > ")[-1]]),
                meta=MappingProxyType({"policy": base or stem}),
            )


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), count=1, flags=re.DOTALL)


def _plain(markdown: str) -> str:
    """Return Markdown as it is said: links by their words, no emphasis marks, no HTML comments; lists stay lists."""
    text = tables_as_facts(re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(\*\*|__|`)(.+?)\1", r"\2", text)
    return re.sub(r"^(\s*)\\(#|```|---)", r"\1\2", text, flags=re.MULTILINE).strip()


def _parts(body: str) -> list[str]:
    """Return a section in pieces of about SECTION_CHARS, cut between paragraphs only."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", body):
        if parts and len(parts[-1]) + len(paragraph) <= SECTION_CHARS:
            parts[-1] += "\n\n" + paragraph
        elif paragraph.strip():
            parts.append(paragraph.strip())
    return parts


def _knowledge(path: Path, name: str, zone: tzinfo, faults: list[Fault]) -> list[Passage]:
    text = read_text(path, name, faults)
    found: list[Passage] = []
    if text is None:
        return found
    lines = text.split("\n")
    if len(lines) > MAX_ROWS + 1:
        faults.append(Fault(name, None, None, f"more than {MAX_ROWS:,} lines; split the file"))
        return found
    for number, entry in json_lines(lines, name, faults):
        if not isinstance(entry, dict):
            faults.append(Fault(name, number, None, 'not a JSON object; write {"id": …, "text": …}'))
            continue
        passage = _entry(entry, f"{name}:{number}", zone, name, number, faults)
        if passage is not None:
            found.append(passage)
    return found


def _entry(
    entry: Mapping[str, Any], source: str, zone: tzinfo, name: str, number: int, faults: list[Fault]
) -> Passage | None:
    n_faults = len(faults)

    def text_of(field: str) -> str:
        value = entry.get(field)
        if value is None:
            return ""
        if field == "id" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            faults.append(Fault(name, number, field, "is not a text; put it in double quotes"))
            return ""
        if len(value) > MAX_CELL_CHARS:
            problem = f"{len(value):,} characters, more than {MAX_CELL_CHARS:,}; split it into several entries"
            faults.append(Fault(name, number, field, problem))
        return value.strip()

    def time_of(field: str, *, until: bool) -> datetime | None:
        value = text_of(field)
        try:
            return parse_time(value, zone, until=until) if value else None
        except ValueError:
            problem = f"{value[:40]!r} is no date; write 2026-11-30 or 2026-11-30T18:00"
            faults.append(Fault(name, number, field, problem))
            return None

    entry_id, question, answer, body = text_of("id"), text_of("question"), text_of("answer"), text_of("text")
    title, lang = text_of("title"), text_of("lang")
    starts_at, ends_at = time_of("valid_from", until=False), time_of("valid_until", until=True)
    more = entry.get("questions", [])
    if more is None:
        more = []
    if not isinstance(more, list) or not all(isinstance(wording, str) for wording in more):
        faults.append(Fault(name, number, "questions", 'is not a list of texts; write ["…", "…"]'))
        more = []
    if not entry_id and len(faults) == n_faults:
        faults.append(Fault(name, number, "id", "is missing; give every entry an id of its own"))
    if starts_at and ends_at and starts_at >= ends_at:
        faults.append(Fault(name, number, "valid_from", "is not before valid_until; swap or correct them"))
    repeats: Recurrence | None = None
    try:
        repeats = repeats_within(text_of("repeats"), zone, starts_at, ends_at)
    except ValueError as exc:
        faults.append(Fault(name, number, "repeats", str(exc)))
    if not (answer or body or question or title) and len(faults) == n_faults:
        faults.append(Fault(name, number, "text", "nothing to quote; give a text, or a question and an answer"))
    if len(faults) > n_faults:
        return None
    kind: Kind = "faq" if question and answer else "page"
    said = answer or body or question or title
    return Passage(
        id=entry_id,
        kind=kind,
        title=title or question or said.split("\n", 1)[0][:80],
        text=said if not (answer and body) else f"{answer}\n\n{body}",
        lang=lang.lower().replace("_", "-").split("-")[0] or detect_lang(question + said),
        source=source,
        questions=_unique([question, *more] if question else [title, *more]),
        valid_from=starts_at,
        valid_until=ends_at,
        approved=kind == "faq",
        meta=MappingProxyType({}),
        repeats=repeats,
    )


def _duplicate_ids(passages: Iterable[Passage]) -> Iterator[Fault]:
    first: dict[str, str] = {}
    for passage in passages:
        if passage.id in first:
            file, _, place = passage.source.partition(":")
            row = int(place) if place.isdigit() else None
            problem = f"{passage.id!r} is already used in {first[passage.id]}; give each its own id"
            yield Fault(file.partition("#")[0], row, "id", problem)
        else:
            first[passage.id] = passage.source


# --- facts as sentences -----------------------------------------------------------------------------------------------


def _sentence(text: str, zh: bool) -> str:
    return text if text[-1:] in "。．.!！?？；;…" else text + ("。" if zh else ".")


def _join(sentences: Iterable[str], zh: bool) -> str:
    return ("" if zh else " ").join(sentence for sentence in sentences if sentence)


def _dates(starts_at: datetime | None, ends_at: datetime | None, zh: bool, repeats: Recurrence | None = None) -> str:
    """
    Return the validity as a sentence, in the offset the times carry, "" where there is none; two where it repeats.

    An end at midnight is said as the day before, inclusive: nobody reads "until 1 December" as "not on 1 December".
    """
    last = ends_at - timedelta(days=1) if ends_at and _is_midnight(ends_at) else ends_at
    inclusive = ends_at is not None and _is_midnight(ends_at)
    year_of_start = starts_at is not None and (last is None or starts_at.year != last.year)
    if zh:
        since = _day_zh(starts_at, True) if starts_at else ""
        until = _day_zh(last, starts_at is None or year_of_start, inclusive) if last else ""
        ending = "（含）" if inclusive else ""
        if repeats is not None:
            within = f"{since}至{until}{ending}" if since and until else f"{since}起" if since else f"至{until}{ending}"
            return f"活动时间：{repeats.describe('zh')}。" + (f"有效期：{within}。" if since or until else "")
        if since and until:
            return f"活动时间：{since}至{until}{ending}。"
        if until:
            return f"活动截止：{until}{ending}。"
        return f"活动时间：{since}起，长期有效。" if since else "长期有效。"
    since = _day_en(starts_at, year_of_start) if starts_at else ""
    until = _day_en(last, True, inclusive) if last else ""
    ending = " (inclusive)" if inclusive else ""
    if repeats is not None:
        within = f"{f'from {since} to' if since else 'until'} {until}{ending}" if until else f"from {since}"
        return f"Runs {repeats.describe('en')}." + (f" Valid {within}." if since or until else "")
    if since and until:
        return f"Runs from {since} to {until}{ending}."
    if until:
        return f"Runs until {until}{ending}."
    return f"Runs from {since}, with no end date." if since else "No end date."


def _is_midnight(moment: datetime) -> bool:
    return (moment.hour, moment.minute, moment.second) == (0, 0, 0)


def _day_zh(moment: datetime, with_year: bool, bare: bool = False) -> str:
    day = f"{moment.year}年" * with_year + f"{moment.month}月{moment.day}日"
    return day if bare or _is_midnight(moment) else f"{day}{moment:%H:%M}"


def _day_en(moment: datetime, with_year: bool, bare: bool = False) -> str:
    day = f"{moment.day} {_MONTHS[moment.month - 1]}" + f" {moment.year}" * with_year
    return day if bare or _is_midnight(moment) else f"{day} {moment:%H:%M}"
