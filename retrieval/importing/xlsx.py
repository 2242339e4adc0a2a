"""
XLSX -> rows of text: the only import of openpyxl. Runs in the child process; `archive.py` has looked before.

Knows what Excel does to cells: numbers as floats, dates as formatted numbers, percentages, merged cells, formulas with
the values saved beside them, hidden sheets. Knows nothing of questions and answers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import openpyxl
from openpyxl.utils.exceptions import InvalidFileException

from retrieval.importing.archive import check_archive
from retrieval.importing.limits import MAX_CELL_CHARS, MAX_CELLS, MAX_COLUMNS, MAX_ROWS
from retrieval.importing.refused import Refused

_MERGE = re.compile(rb'<(?:\w+:)?mergeCell\b[^>]*?\bref="([A-Z]{1,3})(\d{1,7}):([A-Z]{1,3})(\d{1,7})"')
_FORMULA = re.compile(rb"<(?:\w+:)?f[ >/]")
_MAX_MERGES = 100_000


class _Look:
    """What openpyxl's streaming reader does not tell: merged cells, and whether a sheet computes."""

    def __init__(self) -> None:
        self.merges: dict[str, list[tuple[int, int, int]]] = {}  # part -> [(column from 1, first row, last row)]
        self.computes: set[str] = set()
        self._tail: dict[str, bytes] = {}

    def __call__(self, part: str, chunk: bytes) -> None:
        if not part.startswith("xl/worksheets/"):
            return
        text = self._tail.get(part, b"") + chunk
        found = self.merges.setdefault(part, [])
        end = 0
        for match in _MERGE.finditer(text):
            end = match.end()
            first, last = int(match[2]), int(match[4])
            if last > first and len(found) < _MAX_MERGES:
                found.append((_number(match[1]), first, last))
        if _FORMULA.search(text):
            self.computes.add(part)
        self._tail[part] = text[max(end, len(text) - 200) :]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """
    Yield {"sheet", "hidden"} and its {"row", "cells"}, sheet after sheet; rows without text are left out.

    Raises:
        Refused: no XLSX, damaged, over a limit.
    """
    look = _Look()
    n_bytes = check_archive(path, "xlsx", "xl/workbook.xml", look)
    yield {"allow": n_bytes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of styles and validations it does not read: none of ours
        try:
            book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        except InvalidFileException as exc:
            raise Refused("is no XLSX file; save it again as .xlsx") from exc
        formulas: Any = None
        n_cells = 0
        for sheet in book.worksheets:
            if not hasattr(sheet, "iter_rows"):
                continue  # a chart
            sheet.reset_dimensions()  # what other programs write there is often wrong
            part = str(getattr(sheet, "_worksheet_path", "")).lstrip("/")
            yield {"sheet": sheet.title, "hidden": sheet.sheet_state != "visible"}
            written: Iterator[Any] | None = None
            if part in look.computes:
                if formulas is None:
                    formulas = openpyxl.load_workbook(path, read_only=True, keep_links=False)
                twin = formulas[sheet.title]
                twin.reset_dimensions()
                written = twin.iter_rows()
            for number, texts in _rows(sheet, _fills(look.merges.get(part, [])), written):
                n_cells += len(texts)
                if n_cells > MAX_CELLS:
                    raise Refused(f"more than {MAX_CELLS:,} cells; split it into several files")
                yield {"row": number, "cells": texts}


def _fills(merges: list[tuple[int, int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Return first row -> [(column from 0, last row)]: a merged cell counts for every row it spans."""
    by_row: dict[int, list[tuple[int, int]]] = {}
    for column, first, last in merges:
        by_row.setdefault(first, []).append((column - 1, last))
    return by_row


def _rows(
    sheet: Any, fills: dict[int, list[tuple[int, int]]], written: Iterator[Any] | None
) -> Iterator[tuple[int, list[str]]]:
    spans: dict[int, tuple[int, str]] = {}  # column -> (last row, text)
    n_rows = 0
    for number, cells in enumerate(sheet.iter_rows(), start=1):
        if number > 1_048_576:
            raise Refused("more rows than Excel has; save it again as .xlsx")
        texts = [_text(cell) for cell in cells]
        if written is not None:
            for position, cell in enumerate(next(written, ())):
                formula = cell.value
                if position < len(texts) and not texts[position] and cell.data_type == "f" and formula is not None:
                    texts[position] = "\0formula"
        if spans:
            for column, (last, text) in list(spans.items()):
                if number > last:
                    del spans[column]
                    continue
                texts.extend([""] * (column + 1 - len(texts)))
                texts[column] = texts[column] or text
        while texts and not texts[-1].strip():
            texts.pop()
        for column, last in fills.get(number, ()):
            if column < len(texts) and texts[column].strip():
                spans[column] = (last, texts[column])
        if not texts:
            continue
        if len(texts) > MAX_COLUMNS:
            raise Refused(f"sheet {sheet.title!r}, row {number}: {len(texts):,} columns, more than {MAX_COLUMNS:,}")
        long = next((text for text in texts if len(text) > MAX_CELL_CHARS), None)
        if long is not None:
            raise Refused(f"sheet {sheet.title!r}, row {number}: a cell of {len(long):,} characters; split it")
        n_rows += 1
        if n_rows > MAX_ROWS:
            raise Refused(f"more than {MAX_ROWS:,} rows; split it into several files")
        yield number, texts


def _text(cell: Any) -> str:
    """Return what a person sees in the cell, as far as it matters: 12 not 12.0, 70% not 0.7, a date as a date."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, str):
        return f"\0{value}" if cell.data_type == "e" else value  # #N/A and its kin: told from text by the zero
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, datetime):
        # Excel's clock ticks in fractions of a day: 18:00 comes back as 17:59:59.999997.
        moment = (value + timedelta(microseconds=500_000)).replace(microsecond=0)
        return moment.date().isoformat() if moment.time() == time() else moment.isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, time):
        return value.isoformat("minutes")
    if isinstance(value, int | float):
        shape = cell.number_format or ""
        if "%" in shape:
            return f"{value * 100:.10g}%"
        if re.fullmatch(r"0{2,}", shape) and value == int(value):
            return str(int(value)).zfill(len(shape))  # article numbers shown with their zeros
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.12g}"
    return str(value)


def _number(letters: bytes) -> int:
    column = 0
    for letter in letters:
        column = column * 26 + letter - 64
    return column
