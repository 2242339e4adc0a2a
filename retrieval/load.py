"""
A store folder -> passages, or every fault in it at once. Reads files; embeds and indexes nothing.

Knows the column names of the store folder (faqs.csv, promotions.csv, products.csv, policies/*.md, *.jsonl) and how
facts become sentences in a visitor's language. Of store.toml it reads `timezone` and `languages` only; the rest is the
bot's. All or nothing: one bad row and nothing is returned, so that no half of a store goes live.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
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
from retrieval.passages import Kind, Passage
from retrieval.words import detect_lang, squash

MAX_FILE_BYTES = 64 * 2**20
MAX_ROWS = 10**6
MAX_COLUMNS = 1_000
MAX_CELL_CHARS = 100_000
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
    passages: list[Passage] = []
    for name, read in (("faqs.csv", _faqs), ("promotions.csv", _promotions), ("products.csv", _products)):
        path = store_dir / name
        if path.is_file():
            passages.extend(read(_Rows(path, name, faults), clock))
    for path in sorted((store_dir / "policies").glob("*.md")):
        passages.extend(_policy(path, f"policies/{path.name}", faults))
    for path in sorted([*store_dir.glob("*.jsonl"), *(store_dir / "knowledge").glob("*.jsonl")]):
        passages.extend(_knowledge(path, path.relative_to(store_dir).as_posix(), clock.zone, faults))
    faults.extend(_duplicate_ids(passages))
    if not passages and not faults:
        problem = "no knowledge: add faqs.csv, policies/*.md, promotions.csv or products.csv"
        faults.append(Fault(str(store_dir), None, None, problem))
    if faults:
        raise BadStore(faults)
    return passages


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
    text = _read_text(path, "store.toml", faults)
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
    )


# --- one file, its rows and its cells ---------------------------------------------------------------------------------


def _read_text(path: Path, name: str, faults: list[Fault]) -> str | None:
    """Return a file's text, or None and a fault. UTF-8 first, then what Excel writes in China (GB18030)."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            limit = MAX_FILE_BYTES // 2**20
            faults.append(Fault(name, None, None, f"{size / 2**20:.0f} MiB, more than {limit} MiB; split the file"))
            return None
        raw = path.read_bytes()
    except OSError as exc:
        faults.append(Fault(name, None, None, f"cannot be read ({exc.strerror or exc}); check its permissions"))
        return None
    # BOMs first: UTF-16 bytes are valid GB18030 often enough to come out as nonsense.
    order = ("utf-16",) if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030")
    for encoding in order:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            faults.append(Fault(name, line, None, "holds a NUL byte: not a text file; export it again as CSV UTF-8"))
            return None
        return text
    faults.append(Fault(name, None, None, "is neither UTF-8 nor GB18030; save it again as CSV UTF-8"))
    return None


class _Rows:
    """The rows of one CSV file; collects faults while they are read."""

    def __init__(self, path: Path, name: str, faults: list[Fault]) -> None:
        self.path = path
        self.name = name
        self.faults = faults

    def read(self, required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[_Row]:
        """Yield the rows with all their cells stripped; rows without any text are passed over."""
        text = _read_text(self.path, self.name, self.faults)
        if text is None:
            return
        head = text.split("\n", 1)[0]
        # A semicolon or tab file is what Excel writes under a European or "text" setting.
        delimiter = max(",;\t", key=head.count) if head.count(",") == 0 else ","
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        row = 1
        try:
            header = [cell.strip().lower() for cell in next(reader, [])]
            if not self._check_header(header, required, optional):
                return
            for row, cells in enumerate(reader, start=2):
                if row > MAX_ROWS + 1:
                    self.faults.append(Fault(self.name, row, None, f"more than {MAX_ROWS:,} rows; split the file"))
                    return
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
                    problem = f"{len(cells)} cells under {len(header)} columns; put cells with commas in double quotes"
                    self.faults.append(Fault(self.name, row, None, problem))
                    continue
                values = dict(zip(header, (cell.strip() for cell in cells), strict=False))
                if self._fits(row, values):
                    yield _Row(self, row, values)
        except csv.Error as exc:
            # Raised for the row under way: the one after the last that came out whole.
            problem = f"not CSV ({exc}); check the double quotes, double those inside a cell"
            if "field larger" in str(exc):
                problem = f"a cell has more than {MAX_CELL_CHARS:,} characters; split it, or close its double quote"
            self.faults.append(Fault(self.name, row + 1, None, problem))

    def _check_header(self, header: list[str], required: tuple[str, ...], optional: tuple[str, ...]) -> bool:
        if len(header) > MAX_COLUMNS:
            self.faults.append(Fault(self.name, 1, None, f"{len(header):,} columns, more than {MAX_COLUMNS:,}"))
            return False
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


class _Row:
    """One row: its cells by name, and where to complain."""

    def __init__(self, rows: _Rows, number: int, values: Mapping[str, str]) -> None:
        self.rows = rows
        self.number = number
        self.values = values
        self.n_faults = 0

    @property
    def source(self) -> str:
        return f"{self.rows.name}:{self.number}"

    def fault(self, field: str, problem: str) -> None:
        self.n_faults += 1
        self.rows.faults.append(Fault(self.rows.name, self.number, field, problem))

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


def _faqs(rows: _Rows, clock: Clock) -> Iterator[Passage]:
    optional = ("lang", "questions", "tags", "valid_from", "valid_until")
    for row in rows.read(("id", "question", "answer"), optional):
        faq_id, question, answer = row.need("id"), row.need("question"), row.need("answer")
        starts_at, ends_at = row.period("valid_from", "valid_until", clock.zone)
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
        )


def _promotions(rows: _Rows, clock: Clock) -> Iterator[Passage]:
    required = ("id", "title", "description", "starts_at", "ends_at")
    for row in rows.read(required, ("code", "lang", "products", "conditions")):
        promotion_id, title = row.need("id"), row.need("title")
        starts_at, ends_at = row.period("starts_at", "ends_at", clock.zone)
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
        sentences.append(_dates(starts_at, ends_at, zh))
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
        )


def _products(rows: _Rows, clock: Clock) -> Iterator[Passage]:
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


def _policy(path: Path, name: str, faults: list[Fault]) -> Iterator[Passage]:
    """Yield one passage a section: under the title and under each heading of two # and more."""
    text = _read_text(path, name, faults)
    if text is None:
        return
    if not text.strip():
        faults.append(Fault(name, None, None, "is empty; write the policy or remove the file"))
        return
    stem, _, suffix = path.stem.rpartition(".")
    lang = suffix.lower() if stem and suffix.lower() in ("zh", "en") else detect_lang(text)
    title, lines = path.stem, list[str]()
    headings: dict[int, str] = {}
    sections: list[tuple[str, str]] = []  # (headings below the title, joined by " > "; text)
    fenced = False
    for line in _without_front_matter(text).splitlines():
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else re.match(r"(#{1,6})\s+(.*?)\s*#*$", line)
        if heading is None:
            lines.append(line)
            continue
        sections.append((" > ".join(headings.values()), "\n".join(lines).strip()))
        lines, depth = [], len(heading[1])
        if depth == 1:
            title, headings = heading[2], {}
        else:
            headings = {level: kept for level, kept in headings.items() if level < depth} | {depth: heading[2]}
    sections.append((" > ".join(headings.values()), "\n".join(lines).strip()))
    anchors: dict[str, int] = {}
    for heading_path, body in sections:
        for part in _parts(_plain(body)):
            anchor = re.sub(r"[^\w]+", "-", heading_path.split(" > ")[-1].lower()).strip("-") or "top"
            anchors[anchor] = anchors.get(anchor, 0) + 1
            if anchors[anchor] > 1:
                anchor = f"{anchor}-{anchors[anchor]}"
            if len(part) > MAX_CELL_CHARS:
                problem = f"a section of {len(part):,} characters, more than {MAX_CELL_CHARS:,}; split it"
                faults.append(Fault(name, None, heading_path or None, problem))
                continue
            yield Passage(
                id=f"{path.stem}#{anchor}",
                kind="policy",
                title=f"{title} > {heading_path}" if heading_path else title,
                text=part,
                lang=lang,
                source=f"{name}#{anchor}",
                questions=_unique([heading_path.split(" > ")[-1]]),
                meta=MappingProxyType({"policy": stem or path.stem}),
            )


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), count=1, flags=re.DOTALL)


def _plain(markdown: str) -> str:
    """Return Markdown as it is said: links by their words, no emphasis marks, no HTML comments; lists stay lists."""
    text = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"(\*\*|__|`)(.+?)\1", r"\2", text).strip()


def _parts(body: str) -> list[str]:
    """Return a section in pieces of about SECTION_CHARS, cut between paragraphs only."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", body):
        if parts and len(parts[-1]) + len(paragraph) <= SECTION_CHARS:
            parts[-1] += "\n\n" + paragraph
        elif paragraph.strip():
            parts.append(paragraph.strip())
    return parts


def json_lines(lines: Sequence[str], name: str, faults: list[Fault]) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of JSONL; blank lines are left out, lines that are no JSON go to `faults`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as exc:
            faults.append(Fault(name, number, None, f"not JSON ({exc}); one object a line"))
            continue
        yield number, value


def _knowledge(path: Path, name: str, zone: tzinfo, faults: list[Fault]) -> list[Passage]:
    text = _read_text(path, name, faults)
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


def _dates(starts_at: datetime | None, ends_at: datetime | None, zh: bool) -> str:
    """
    Return the validity as a sentence, in the offset the times carry, "" where there is none.

    An end at midnight is said as the day before, inclusive: nobody reads "until 1 December" as "not on 1 December".
    """
    last = ends_at - timedelta(days=1) if ends_at and _is_midnight(ends_at) else ends_at
    inclusive = ends_at is not None and _is_midnight(ends_at)
    year_of_start = starts_at is not None and (last is None or starts_at.year != last.year)
    if zh:
        since = _day_zh(starts_at, True) if starts_at else ""
        until = _day_zh(last, starts_at is None or year_of_start, inclusive) if last else ""
        ending = "（含）" if inclusive else ""
        if since and until:
            return f"活动时间：{since}至{until}{ending}。"
        if until:
            return f"活动截止：{until}{ending}。"
        return f"活动时间：{since}起，长期有效。" if since else "长期有效。"
    since = _day_en(starts_at, year_of_start) if starts_at else ""
    until = _day_en(last, True, inclusive) if last else ""
    ending = " (inclusive)" if inclusive else ""
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
