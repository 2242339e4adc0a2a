"""
PDF -> Markdown: the only import of pypdfium2. Runs in the child process.

Lines come from PDFium with their place and height on the page; from these come headings (larger or numbered lines),
paragraphs (lines put together again, hyphens undone) and what is left out (running heads, feet, page numbers).
`<!-- page 3 -->` marks where a page begins, so that a passage can name its page.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pypdfium2
from pypdfium2 import raw as pdfium

from retrieval.importing.limits import MAX_DOCUMENT_CHARS, MAX_PAGES, MiB
from retrieval.importing.plain import heading_level, is_cjk, is_item
from retrieval.importing.refused import Refused

_PAGE_NUMBER = re.compile(
    r"[-–—\s]*(?:第\s*)?\d{1,4}(?:\s*页)?(?:\s*[/|,，]?\s*(?:共|of)?\s*\d{1,4}\s*页?)?[-–—\s]*|page\s+\d{1,4}(?:\s+of\s+\d{1,4})?",
    re.IGNORECASE,
)
_ENDS = tuple('。！？；：.!?;:”"')


@dataclass(frozen=True, slots=True)
class _Line:
    page: int  # from 1
    text: str
    height: float  # of its characters, in points: the font's size as it is shown
    top: float  # points from the bottom of the page
    right: float
    bold: bool


def read(path: Path) -> Iterator[dict[str, Any]]:
    """
    Yield {"markdown"}.

    Raises:
        Refused: no PDF, damaged, protected, too long, or without text (a scan).
    """
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as exc:
        if "assword" in str(exc):
            raise Refused("is protected by a password; save a copy without one") from exc
        raise Refused("is damaged, cut off or no PDF file; save or print it as PDF again") from exc
    n_pages = len(document)
    if n_pages > MAX_PAGES:
        raise Refused(f"{n_pages:,} pages, more than {MAX_PAGES:,}; split it into several files")
    yield {"allow": min(path.stat().st_size, 24 * MiB)}
    lines: list[_Line] = []
    n_chars = n_bare = 0
    for number in range(n_pages):
        try:
            page = document[number]
            text_page = page.get_textpage()
        except pypdfium2.PdfiumError as exc:
            raise Refused(f"page {number + 1} is damaged; save or print it as PDF again") from exc
        found = list(_lines(text_page, number + 1))
        text_page.close()
        page.close()
        n_bare += not found
        n_chars += sum(len(line.text) for line in found)
        if n_chars > MAX_DOCUMENT_CHARS:
            raise Refused(f"more than {MAX_DOCUMENT_CHARS:,} characters of text; split it into several files")
        lines.extend(found)
    letters = "".join(line.text for line in lines)
    if not re.search(r"\w\w", letters) or (n_chars < 10 * (n_pages - n_bare) and n_chars < 40 and n_pages > 1):
        raise Refused(
            "has no text: scanned pages? Recognise them first (ocrmypdf -l chi_sim+eng IN.pdf OUT.pdf) "
            "or save the original as DOCX"
        )
    n_odd = sum("\ue000" <= letter <= "\uf8ff" or letter == "\ufffd" for letter in letters)
    if n_odd * 5 > len(letters):
        raise Refused("its fonts do not say which letters they show; save the original as DOCX, or recognise it by OCR")
    if n_bare:
        yield {"note": f"{n_bare} of {n_pages} pages have no text (pictures?) and were left out"}
    yield {"markdown": render(lines, n_pages)}


def _lines(text_page: Any, page: int) -> Iterator[_Line]:
    text = text_page.get_text_range()
    left, right, bottom, top = ctypes.c_double(), ctypes.c_double(), ctypes.c_double(), ctypes.c_double()
    box = pdfium.FS_RECTF()
    offset = 0
    for raw in re.split(r"(\r\n|\r|\n)", text):
        start, offset = offset, offset + len(raw)
        stripped = raw.strip()
        if not stripped:
            continue
        first = start + raw.index(stripped[0])
        index = pdfium.FPDFText_GetCharIndexFromTextIndex(text_page, first)
        last = pdfium.FPDFText_GetCharIndexFromTextIndex(text_page, first + len(stripped) - 1)
        height = y = x = 0.0
        if index >= 0 and pdfium.FPDFText_GetLooseCharBox(text_page, index, box):
            height, y = abs(box.top - box.bottom), box.top
        if last >= 0 and pdfium.FPDFText_GetCharBox(text_page, last, left, right, bottom, top):
            x = right.value
        bold = index >= 0 and pdfium.FPDFText_GetFontWeight(text_page, index) >= 600
        # PDFium marks a hyphen at the end of a line, and a soft one, by characters of their own.
        shown = re.sub(r"[\x02\ufffe\u00ad]$", "-", stripped)
        yield _Line(page, re.sub(r"[\x00-\x08\x0b-\x1f\ufffe\u00ad]", "", " ".join(shown.split())), height, y, x, bold)


def render(lines: Sequence[_Line], n_pages: int) -> str:
    """Return the lines of all pages as Markdown."""
    kept = _without_running_lines(lines, n_pages)
    sizes: Counter[float] = Counter()
    for line in kept:
        sizes[round(line.height * 2) / 2] += len(line.text)
    body = sizes.most_common(1)[0][0] if sizes else 0.0
    larger = sorted({round(line.height) for line in kept if _is_large(line, body)}, reverse=True)
    pitches = [a.top - b.top for a, b in pairwise(kept) if a.page == b.page and a.top - b.top > 0]
    pitch = median(pitches) if pitches else 0.0
    widest = max((line.right for line in kept), default=0.0)
    blocks: list[str] = []
    page, before, was_heading = 0, None, False
    for line in kept:
        level = 0
        if _is_large(line, body):
            level = min(4, larger.index(round(line.height)) + 1)
        elif line.bold and len(line.text) <= 60 and not line.text.endswith(_ENDS) and any(not one.bold for one in kept):
            level = min(4, len(larger) + 2)
        else:
            level = heading_level(line.text)
        wraps = before is not None and not _begins(before, line, pitch, widest)
        if blocks and wraps and not level and not was_heading:
            blocks[-1] = _join(blocks[-1], line.text)
        elif blocks and level and was_heading and before is not None and before.height == line.height and wraps:
            blocks[-1] = _join(blocks[-1], line.text)  # a heading of two lines
        else:
            if line.page != page:
                page = line.page
                blocks.append(f"<!-- page {page} -->")
            text = f"{'#' * level} {line.text}" if level else re.sub(r"^(#{1,6}\s)", r"\\\1", line.text)
            if is_item(line.text) and not level:
                text = f"- {is_item(line.text)}"
            blocks.append(text)
        before, was_heading = line, bool(level)
    return "\n\n".join(blocks) + "\n"


def _is_large(line: _Line, body: float) -> bool:
    return body > 0 and line.height >= 1.15 * body and len(line.text) <= 100


def _begins(before: _Line, line: _Line, pitch: float, widest: float) -> bool:
    """Return whether `line` begins a paragraph of its own after `before`."""
    if is_item(line.text) or abs(before.height - line.height) > 0.12 * max(before.height, line.height):
        return True
    ended = before.text.endswith(_ENDS)
    if before.page != line.page:
        return ended
    if pitch and before.top - line.top > 1.35 * pitch:
        return True
    if before.text.endswith(("，", "、", ",", "（", "(")):
        return False
    short = bool(widest) and before.right < 0.8 * widest
    # Two short lines without an end between them are two facts, unless the second goes on in lower case.
    return short and (ended or not line.text[:1].islower())


def _join(before: str, text: str) -> str:
    if before.endswith("-") and re.search(r"[a-z]-$", before) and text[:1].islower():
        return before[:-1] + text
    return before + ("" if is_cjk(before[-1:]) or is_cjk(text[:1]) else " ") + text


def _without_running_lines(lines: Sequence[_Line], n_pages: int) -> list[_Line]:
    """Return the lines without page numbers, and without heads and feet that most pages share."""
    edges: set[int] = set()
    seen: dict[str, set[int]] = {}
    by_page: dict[int, list[int]] = {}
    for position, line in enumerate(lines):
        by_page.setdefault(line.page, []).append(position)
    for positions in by_page.values():
        ordered = sorted(positions, key=lambda position: -lines[position].top)
        edges.update([*ordered[:2], *ordered[-2:]])
    for position in edges:
        seen.setdefault(_shape(lines[position].text), set()).add(lines[position].page)
    kept: list[_Line] = []
    for position, line in enumerate(lines):
        if position in edges:
            if _PAGE_NUMBER.fullmatch(line.text):
                continue
            if n_pages > 1 and len(seen[_shape(line.text)]) >= max(2, n_pages / 2):
                continue
        kept.append(line)
    return kept


def _shape(text: str) -> str:
    return re.sub(r"\d+", "#", text).casefold()
