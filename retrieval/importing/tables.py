"""
A sheet of rows -> entries under the store's own column names. No files; which column is which says `columns.py`.

Knows how merchants lay out questions and answers: where the header stands, several wordings in one cell, in several
columns or in rows of their own, two languages side by side. What `retrieval/load.py` checks of every row it leaves
to it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import lru_cache
from types import MappingProxyType

from retrieval.errors import Fault
from retrieval.importing.columns import ALL, Columns, SheetKind, bare, column_letter, find_columns
from retrieval.words import detect_lang, squash

HEADER_ROWS = 20  # among the first so many rows with text the header is looked for
_DATES = ("valid_from", "valid_until", "starts_at", "ends_at")
_PREFIX: dict[SheetKind, str] = {"faqs": "faq", "products": "product", "promotions": "promotion"}
_NAMED_BY: dict[SheetKind, str] = {"faqs": "question", "products": "title", "promotions": "title"}
_SIGN_OF = (
    ("HK$", "HKD"), ("NT$", "TWD"), ("JP¥", "JPY"), ("US$", "USD"), ("S$", "SGD"), ("A$", "AUD"), ("C$", "CAD"),
    ("¥", "CNY"), ("￥", "CNY"), ("$", "USD"), ("€", "EUR"), ("£", "GBP"), ("₩", "KRW"), ("元", "CNY"),
)  # fmt: skip


# What two wordings of one question share. Each is asked for several times in a row, and folding is what a large import
# spends most of its time on.
key_of = lru_cache(maxsize=4096)(squash)


@dataclass(frozen=True, slots=True)
class Table:
    """One sheet as it was read: cells as text, stripped by nobody yet."""

    name: str  # "faq.csv", "faq.xlsx!Sheet1"
    rows: Sequence[tuple[int, list[str]]]  # (row as a spreadsheet counts, cells), rows without text left out
    hidden: bool = False
    keyed: bool = False  # the first row is made of field names (JSON): it is the header


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a sheet: what becomes a row of faqs.csv, products.csv or promotions.csv."""

    file: str  # the table's name
    row: int
    values: Mapping[str, str]  # by the store's column names; without `id` where the sheet has none
    labels: Mapping[str, str] = field(default_factory=dict)  # the merchant's column name of each field


@dataclass(frozen=True, slots=True)
class Options:
    """What the merchant said on the command line about a sheet."""

    kinds: Sequence[SheetKind] = ALL
    given: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    has_header: bool = True
    empty_answer: str = ""  # "wording", "refuse", "" for: decide by the sheet


Ask = Callable[[str, Sequence[str]], int | None]  # question, choices -> which one; None for no answer


def map_table(
    table: Table, options: Options, faults: list[Fault], ask: Ask | None = None
) -> tuple[Columns, int] | None:
    """
    Return which column is which and the row its header stands in (0: none), or None and a fault that says how to help.

    `ask` is put the question where the table does not decide; without it, doubt is a fault.
    """
    rows = table.rows[: 1 if table.keyed else HEADER_ROWS]
    if not rows:
        faults.append(Fault(table.name, None, None, "has no rows; fill it in or leave it out"))
        return None
    width = max(len(cells) for _, cells in rows)
    if not options.has_header:
        columns = find_columns([""] * width, options.kinds, options.given)
        if columns is not None:
            return columns, 0
        faults.append(Fault(table.name, None, None, "--no-header needs --map question=A --map answer=B, by letters"))
        return None
    best: tuple[Columns, int] | None = None
    for number, cells in rows:
        columns = find_columns([*cells, *[""] * (width - len(cells))], options.kinds, options.given)
        if columns is not None and (best is None or (best[0].weak and not columns.weak)):
            best = columns, number
    number, header = rows[0][0], rows[0][1]
    if best is None and ask is not None:
        best = _ask_columns(table, options, header, number, ask)
    if best is None:
        named = ", ".join(
            f"{column_letter(i)} {cell.strip()[:30]!r}" for i, cell in enumerate(header[:30]) if cell.strip()
        )
        missing = next(
            (c for c in options.given.values() if find_columns(header, options.kinds, {"id": c}) is None), ""
        )
        what = "no columns for question and answer (or title and price, or title and dates)"
        if options.given and missing and not any(bare(missing) == bare(cell) for cell in header):
            what = f"no column {missing!r}, or what goes with it is missing"
        faults.append(
            Fault(table.name, number, None, f"{what}; there are {named}; say --map question=COLUMN --map answer=COLUMN")
        )
        return None
    if best[0].doubts and ask is not None:
        best = _ask_doubt(best, options, ask)
    if best[0].doubts:
        faults.extend(Fault(table.name, best[1], None, doubt) for doubt in best[0].doubts)
        return None
    for name in best[0].unused:
        # A mistyped end date would let an entry hold for ever.
        near = difflib.get_close_matches(bare(name), ["validuntil", "validfrom", "startsat", "endsat"], 1, 0.85)
        if near:
            faults.append(Fault(table.name, best[1], name, "unknown column; is it a date? Rename or remove it"))
            return None
    return best


def _ask_columns(
    table: Table, options: Options, header: list[str], number: int, ask: Ask
) -> tuple[Columns, int] | None:
    choices = [f"{column_letter(i)}  {cell.strip()[:60]}" for i, cell in enumerate(header)]
    given = dict(options.given)
    for name in ("question", "answer"):
        if name not in given:
            chosen = ask(f"{table.name}: which column is the {name}?", choices)
            if chosen is None:
                return None
            given[name] = column_letter(chosen)
    columns = find_columns(header, ("faqs",), given)
    return (columns, number) if columns is not None else None


def _ask_doubt(best: tuple[Columns, int], options: Options, ask: Ask) -> tuple[Columns, int]:
    header = best[0].header
    chosen = ask(
        "which column is the answer?", [f"{column_letter(i)}  {cell.strip()[:60]}" for i, cell in enumerate(header)]
    )
    if chosen is None:
        return best
    columns = find_columns(header, options.kinds, {**options.given, "answer": column_letter(chosen)})
    return (columns, best[1]) if columns is not None else best


def read_entries(
    table: Table, columns: Columns, header_row: int, options: Options, faults: list[Fault], currency: str = ""
) -> list[Entry]:
    """Return the entries of a mapped table: wordings gathered, dates and numbers as the store writes them."""
    entries: list[Entry] = []
    for number, cells in table.rows:
        if number <= header_row:
            continue
        base = ""  # of the id that translations in one row share
        for lang in columns.twins or ("",):
            labels = {name: columns.label(name, lang) for name in _fields(columns, lang)}
            if _unreadable(table.name, number, cells, columns, lang, faults):
                continue
            values = _values(cells, columns, lang)
            said = [
                value for name, value in values.items() if name not in ("lang", "number", "id", "tags" if lang else "")
            ]
            if not any(said):
                continue
            if lang:
                values["lang"] = lang
                base = base or entry_id(columns.kind, values)
                values["id"] = f"{base}-{lang}"
            if columns.kind == "products" and not values.get("currency"):
                price = values.get("price", "").upper()
                values["currency"] = next((code for sign, code in _SIGN_OF if sign in price), currency)
            entries.append(Entry(table.name, number, values, labels))
    if columns.kind == "faqs":
        entries = _gather(entries, options, bool(columns.twins), faults)
    return [_without_number(entry) for entry in entries]


def source_entries(
    tables: Sequence[Table],
    options: Options,
    faults: list[Fault],
    notes: list[str],
    *,
    sheet: str = "",
    currency: str = "",
    ask: Ask | None = None,
) -> list[tuple[Columns, list[Entry]]]:
    """
    Return the entries of a file's sheets, sheet by sheet; what was left out goes to `notes`.

    Hidden sheets are left out, and so are sheets whose columns say nothing where another sheet's do: a cover, a key to
    abbreviations. `sheet` names one, which then has to fit.
    """
    named = [table for table in tables if sheet and table.name.partition("!")[2] == sheet]
    if sheet and not named:
        there = ", ".join(repr(table.name.partition("!")[2]) for table in tables if "!" in table.name)
        faults.append(Fault(tables[0].name.partition("!")[0], None, None, f"no sheet {sheet!r}; there are {there}"))
        return []
    wanted = named or [table for table in tables if not table.hidden and table.rows]
    notes.extend(
        f"{table.name} is hidden and was left out; --sheet names one" for table in tables if table.hidden and not named
    )
    if not wanted and tables:
        faults.append(Fault(tables[0].name, None, None, "has no rows; fill it in or leave it out"))
        return []
    mapped: list[tuple[Table, tuple[Columns, int]]] = []
    unclear: list[Fault] = []
    for table in wanted:
        problems: list[Fault] = []
        found = map_table(table, options, problems, ask if len(wanted) == 1 else None)
        if found is not None:
            mapped.append((table, found))
        unclear.extend(problems)
    certain = [fault for fault in unclear if fault.field is not None or "could both" in fault.problem]
    if not mapped or certain:
        faults.extend(unclear if not mapped else certain)
        return []
    notes.extend(f"{fault.file} was left out: {fault.problem.partition(';')[0]}" for fault in unclear)
    result: list[tuple[Columns, list[Entry]]] = []
    for table, (columns, header_row) in mapped:
        n_faults = len(faults)
        entries = read_entries(table, columns, header_row, options, faults, currency)
        if not entries and len(faults) == n_faults:
            faults.append(
                Fault(table.name, None, None, "has a header and no rows under it; fill it in or leave it out")
            )
        if columns.unused:
            notes.append(f"{table.name}: nothing is taken from {', '.join(repr(name) for name in columns.unused[:10])}")
        result.append((columns, entries))
    return result


def entry_id(kind: SheetKind, values: Mapping[str, str]) -> str:
    """Return the id an entry gets in the store: its own, a running number with the kind before it, or one derived."""
    own = values.get("id", "")
    if re.fullmatch(r"\d{1,6}", own) and kind != "products":
        return f"{_PREFIX[kind]}-{own}"
    return own or derive_id(kind, values)


def derive_id(kind: SheetKind, values: Mapping[str, str]) -> str:
    """Return an id made of what the entry is about, the same on every import: faq-3f2a91bc04d7."""
    name = values.get(_NAMED_BY[kind], "")
    lang = values.get("lang", "") or detect_lang(name)
    digest = hashlib.sha256(f"{key_of(name) or name}|{lang}".encode()).hexdigest()[:12]
    return f"{_PREFIX[kind]}-{digest}"


def split_wordings(cell: str) -> list[str]:
    """
    Return the wordings of one cell.

    The strongest separator in it counts: | or a line break, then ; , then 、. The last also stands inside sentences, so
    it separates only what is long enough to be a question on both sides.
    """
    if re.search(r"[|｜\n]", cell):
        parts = re.split(r"[|｜\n]", cell)
    elif re.search(r"[;；]", cell):
        parts = re.split(r"[;；]", cell)
    else:
        parts = cell.split("、")
        if any(len(key_of(part)) < 3 for part in parts):
            parts = [cell]
    # 1. … 2. … is how a list is typed into a cell.
    numbered = [re.sub(r"^\s*(?:\d{1,2}[.、)）．]|[①-⑳]|[-•·*])\s*", "", part).strip() for part in parts]
    return [part for part in numbered if part]


# --- rows -> entries --------------------------------------------------------------------------------------------------


def _fields(columns: Columns, lang: str) -> Mapping[str, tuple[int, ...]]:
    return {**columns.fields.get("", {}), **(columns.fields.get(lang, {}) if lang else {})}


def _unreadable(file: str, number: int, cells: Sequence[str], columns: Columns, lang: str, faults: list[Fault]) -> bool:
    """Return whether a wanted cell holds what is no text, with a fault for each."""
    n_faults = len(faults)
    for name, positions in _fields(columns, lang).items():
        for position in positions:
            mark, _, rest = cells[position].partition("\0") if position < len(cells) else ("", "", "")
            if mark or not rest:
                continue
            problem = f"holds the error {rest}; correct the formula or write the text"
            if rest == "formula":
                problem = "holds a formula without its result; open the file in Excel and save it, then import again"
            elif rest == "nested":
                problem = "is an object or a list of objects; write a text, or a list of texts"
            faults.append(Fault(file, number, columns.label(name, lang), problem))
    return len(faults) > n_faults


def _values(cells: Sequence[str], columns: Columns, lang: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, positions in _fields(columns, lang).items():
        found = [_cell(cells[position]) for position in positions if position < len(cells)]
        found = [cell for cell in found if cell]
        if name == "questions":
            values[name] = "|".join(wording for cell in found for wording in split_wordings(cell))
        elif name == "tags":
            values[name] = ",".join(found)
        else:
            values[name] = "\n".join(found)
    if columns.kind == "faqs" and re.search(r"[|｜\n]", values.get("question", "")):
        first, *rest = split_wordings(values["question"]) or [""]
        values["question"] = first
        values["questions"] = "|".join(part for part in [*rest, values.get("questions", "")] if part)
    for name in _DATES:
        if name in values:
            values[name] = _date(values[name])
    for name in ("id", "sku", "stock", "number"):
        if name in values:
            values[name] = re.sub(r"^(\d+)\.0+$", r"\1", values[name])  # what a spreadsheet makes of 12
    if "lang" in values:
        values["lang"] = _lang(values["lang"])
    if columns.kind == "products" and not values.get("id") and values.get("sku"):
        values["id"] = values["sku"]
    return values


def _cell(cell: str) -> str:
    text = cell.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").strip()
    # A leading apostrophe keeps Excel from computing; it is no part of the text. 'Tis is.
    return text[1:] if re.match(r"'[=+\-@\d]", text) else text


def _date(text: str) -> str:
    """Return a date as the store writes it where it is a spreadsheet's serial number (46356 is 2026-11-30)."""
    serial = re.fullmatch(r"(\d{5})(\.\d+)?", text)
    if serial is None or not 30_000 <= int(serial[1]) <= 80_000:
        return text
    moment = datetime(1899, 12, 30) + timedelta(seconds=round(float(text) * 86_400))
    return moment.date().isoformat() if moment.time() == datetime.min.time() else moment.isoformat(timespec="seconds")


def _lang(text: str) -> str:
    name = key_of(text)
    if name.startswith(("zh", "cn", "中", "简", "繁", "汉", "chinese", "mandarin")):
        return "zh"
    return "en" if name.startswith(("en", "英")) else text


def _without_number(entry: Entry) -> Entry:
    return replace(entry, values={name: value for name, value in entry.values.items() if name != "number"})


def _gather(entries: list[Entry], options: Options, twins: bool, faults: list[Fault]) -> list[Entry]:
    """Return the entries with rows that are only another wording of one folded into it."""
    if twins:
        return entries
    answerless = _answerless(entries, options)
    found: list[Entry] = []
    by_id: dict[str, int] = {}
    by_question: dict[tuple[str, str], int] = {}
    for entry in entries:
        values = entry.values
        question, answer = values.get("question", ""), values.get("answer", "")
        place: int | None = None
        key = values.get("id") or (f"#{values['number']}" if values.get("number") else "")
        last = len(found) - 1
        if key and key in by_id:
            place = by_id[key]
            if answer and answer != found[place].values.get("answer"):
                if key.startswith("#"):  # a running number that begins again is none
                    place = None
                else:
                    problem = f"{key!r} has another answer in row {found[place].row}; give each its own id, or keep one"
                    faults.append(Fault(entry.file, entry.row, entry.labels.get("id", "id"), problem))
                    continue
        elif last >= 0 and not values.get("id") and question:
            before = found[last].values
            same = answer == before.get("answer") and not before.get("id")
            if (answer and same) or (not answer and answerless(entry)):
                place = last
        lang = values.get("lang", "") or detect_lang(question + answer)
        same_question = by_question.get((key_of(question), lang)) if place is None and question and answer else None
        if same_question is not None and not values.get("id"):
            if found[same_question].values.get("answer") != answer:
                problem = f"the same question has another answer in row {found[same_question].row}; keep one of them"
                faults.append(Fault(entry.file, entry.row, entry.labels.get("question", "question"), problem))
                continue
            place = same_question
        if place is not None and not answer and options.empty_answer == "refuse":
            place = None
        if place is None:
            if not answer and question and found and not values.get("id"):
                problem = (
                    "is empty; fill it in or remove the row; if the row is only another wording of the one above, "
                    "say --empty-answer wording"
                )
                faults.append(Fault(entry.file, entry.row, entry.labels.get("answer", "answer"), problem))
                continue
            found.append(entry)
            if key:
                by_id[key] = len(found) - 1
            if question:
                by_question.setdefault((key_of(question), lang), len(found) - 1)
            continue
        kept = found[place]
        wordings = [kept.values.get("questions", ""), values.get("questions", "")]
        if key_of(question) != key_of(kept.values.get("question", "")):
            wordings.insert(1, question)
        found[place] = replace(kept, values={**kept.values, "questions": "|".join(part for part in wordings if part)})
    return found


def _answerless(entries: Sequence[Entry], options: Options) -> Callable[[Entry], bool]:
    """
    Return whether a row without an answer is another wording of the row above, rather than a mistake.

    It is where the merchant said so, where the sheet does it throughout (every third row and at least two), or where
    the columns that tell entries apart (number, id, tags) are filled for others and empty for this row.
    """
    if options.empty_answer:
        return lambda entry: options.empty_answer == "wording"
    n_empty = sum(not entry.values.get("answer") and bool(entry.values.get("question")) for entry in entries)
    if n_empty >= max(2, len(entries) / 3):
        return lambda entry: True
    grouping = [
        name
        for name in ("id", "number", "tags")
        if any(entry.values.get(name) for entry in entries)
        and all(entry.values.get(name) for entry in entries if entry.values.get("answer"))
    ]
    return lambda entry: bool(grouping) and not any(entry.values.get(name) for name in grouping)
