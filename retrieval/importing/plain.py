"""
Plain text -> Markdown: headings and lists by how lines look. No files, no libraries.

Knows how headings are numbered in Chinese and English; the PDF reader asks it too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from retrieval.words import detect_lang

_ENDS = "。．.!！?？;；,，:：、…"
_HEADINGS = (
    (re.compile(r"第\s*[\d一二三四五六七八九十百]+\s*[章部篇]\s*.{0,40}"), 2),
    (re.compile(r"第\s*[\d一二三四五六七八九十百]+\s*节\s*.{0,40}"), 3),
    (re.compile(r"第\s*[\d一二三四五六七八九十百]+\s*条\s*\S.{0,24}"), 3),
    (re.compile(r"[一二三四五六七八九十]{1,3}、\s*\S.{0,30}"), 2),
    (re.compile(r"[（(][一二三四五六七八九十]{1,3}[)）]\s*\S.{0,30}"), 3),
    (re.compile(r"\d{1,2}\.\d{1,2}\.?\s+\D.{0,58}"), 3),
    (re.compile(r"(?:chapter|section|part|article)\s+(?:\d{1,2}|[IVX]{1,5})\b.{0,60}", re.IGNORECASE), 2),
)
_ITEM = re.compile(r"(?:[-–•·●○▪■◆*]\s*|[①-⑳]\s*|(?=\d{1,2}[.)）、]\s*\S)|(?=[（(]\d{1,2}[)）]))(.+)")


def is_cjk(character: str) -> bool:
    """Return whether a character stands without spaces around it."""
    return "\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef"


def heading_level(line: str) -> int:
    """Return the level of a numbered heading (2 or 3), 0 for what is none."""
    text = line.strip()
    if not text or text[-1] in _ENDS:
        return 0
    return next((level for pattern, level in _HEADINGS if pattern.fullmatch(text)), 0)


def is_item(line: str) -> str:
    """Return a list item without its bullet (a number stays), "" for what is none."""
    match = _ITEM.fullmatch(line.strip())
    return match[1].strip() if match else ""


def fact(caption: str, head: Sequence[str], cells: Sequence[str]) -> str:
    """Return one row of a table as a line that can be quoted alone: 省份：广东；首重：8元."""
    zh = detect_lang("".join(cells) + "".join(head)) == "zh"
    colon, between = ("：", "；") if zh else (": ", "; ")
    said: list[str] = []
    for position, cell in enumerate(cells):
        if not cell or (position and cell == cells[position - 1]):
            continue
        name = head[position] if position < len(head) else ""
        said.append(f"{name}{colon}{cell}" if name and name != cell else cell)
    if not head and len(said) == 2 and len(cells) == 2:
        return caption + (colon if caption else "") + colon.join(said)  # a table of names and values
    return (caption + colon if caption and said else "") + between.join(said)


def tables_as_facts(markdown: str) -> str:
    """Return Markdown with every pipe table as a list of lines, one a row."""
    if "|" not in markdown:
        return markdown
    lines = markdown.split("\n")
    written: list[str] = []
    head: list[str] = []
    for position, line in enumerate(lines):
        after = lines[position + 1] if position + 1 < len(lines) else ""
        if head and re.fullmatch(r"[\s|:-]+", line) and "-" in line:
            continue
        if head and "|" in line:
            written.append(f"- {fact('', head, _pipes(line))}")
            continue
        head = []
        if (
            "|" in line
            and "|" in after + line
            and re.fullmatch(r"\s*\|?(?:\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*", after)
            and "-" in after
        ):
            head = _pipes(line)
            continue
        written.append(line)
    return "\n".join(written)


def _pipes(line: str) -> list[str]:
    bare = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", bare)]


def to_markdown(text: str) -> str:
    """Return plain text as Markdown: numbered and underlined headings marked, list items as such, the rest as it is."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    written: list[str] = []
    for position, line in enumerate(lines):
        after = lines[position + 1] if position + 1 < len(lines) else ""
        before = lines[position - 1].strip() if position else ""
        if re.fullmatch(r"\s*[=\-_*]{3,}\s*", line) and before:
            continue  # the line under a heading
        if line.strip() and (re.fullmatch(r"\s*={3,}\s*", after) or re.fullmatch(r"\s*-{3,}\s*", after)):
            written += ["", f"{'#' if '=' in after else '##'} {line.strip()}", ""]
            continue
        level = heading_level(line)
        if (
            not level
            and not before
            and not after.strip()
            and position
            and re.fullmatch(r"\d{1,2}[.、]\s*\S.{0,40}", line.strip())
        ):
            level = 2 if line.strip()[-1] not in _ENDS else 0
        if level:
            written += ["", f"{'#' * level} {line.strip()}", ""]
        elif is_item(line):
            written.append(f"- {is_item(line)}")
        else:
            written.append(re.sub(r"^(\s*)(#{1,6}\s|```)", r"\1\\\2", line.rstrip()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(written)).strip("\n") + "\n"
