"""
HTML -> Markdown: the only import of lxml. Runs in the child process.

Keeps headings, paragraphs, lists and tables; leaves out scripts, styles, forms, navigation and what is hidden. A table
becomes a line a row, every cell with its column's name, so that a line says something when it is quoted alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree, html

from retrieval.importing.limits import MAX_DOCUMENT_CHARS, MAX_HTML_BYTES, MAX_HTML_DEPTH, MAX_SPAN, MiB
from retrieval.importing.plain import fact
from retrieval.importing.refused import Refused
from retrieval.importing.text import NotText, find_encoding

_SKIPPED = frozenset(
    """
    script style noscript template nav aside form button select input textarea svg canvas iframe object embed
    video audio head dialog menu map math
    """.split()  # noqa: SIM905
)
_SKIPPED_ROLES = frozenset(
    """
    navigation banner contentinfo search complementary menu menubar dialog alert
    """.split()  # noqa: SIM905
)
_BLOCKS = frozenset(
    """
    p div section article main header footer address blockquote ul ol dl dd figure figcaption details fieldset
    center body html h1 h2 h3 h4 h5 h6 li dt summary pre table tr hr
    """.split()  # noqa: SIM905
)
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w-]{2,20})""", re.IGNORECASE)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """
    Yield {"markdown"}.

    Raises:
        Refused: too large, too deep, no text, or of no known encoding.
    """
    if path.stat().st_size > MAX_HTML_BYTES:
        raise Refused(
            f"{path.stat().st_size / MiB:.0f} MiB, more than {MAX_HTML_BYTES // MiB}; save only the page's text"
        )
    raw = path.read_bytes()
    markdown = to_markdown(_decode(raw))
    if not re.search(r"\w", markdown):
        raise Refused("holds no text: it may be made by scripts; save the page from a browser, or as PDF")
    yield {"markdown": markdown}


def _decode(raw: bytes) -> str:
    declared = _CHARSET.search(raw[:4096])
    if declared is not None:
        name = declared[1].decode("ascii").lower()
        try:
            # Pages that say gb2312 use characters beyond it, and browsers read them as GB18030.
            return raw.decode(
                {"gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950", "iso-8859-1": "cp1252"}.get(name, name)
            )
        except (UnicodeDecodeError, LookupError):
            pass
    try:
        return raw.decode(find_encoding(raw))
    except NotText as exc:
        raise Refused(str(exc)) from exc


def to_markdown(text: str) -> str:
    """
    Return the text of a page as Markdown.

    Raises:
        Refused: nested too deeply, or too long.
    """
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text).replace("\0", "")
    if not text.strip():
        return ""
    parser = html.HTMLParser(remove_comments=True, remove_pis=True, no_network=True, huge_tree=False)
    try:
        root = html.document_fromstring(text, parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError) as exc:
        if "depth" in str(exc).lower():
            raise Refused(
                f"is nested too deeply (more than {MAX_HTML_DEPTH} levels); save only the page's text"
            ) from exc
        raise Refused(f"is no HTML ({str(exc)[:60]}); save the page again") from exc
    title = " ".join((root.findtext(".//title") or "").split())
    mains = root.xpath("//main | //*[@role='main']") or root.xpath("//article")
    writer = _Writer()
    for main in mains[:1] if len(mains) == 1 or (mains and mains[0].tag == "main") else mains or [root]:
        _walk(main, writer, 0)
    body = writer.text()
    if title and not re.search(r"^# ", body, re.MULTILINE):
        body = f"# {title}\n\n{body}"
    if len(body) > MAX_DOCUMENT_CHARS:
        raise Refused(f"{len(body):,} characters of text, more than {MAX_DOCUMENT_CHARS:,}; split it")
    return body


class _Writer:
    """Markdown under way: blocks, and the words of the one being written."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.prefix = ""  # of the block under way: "## ", "- "
        self.level = 1  # of the last heading
        self.is_item = False

    def add(self, text: str | None) -> None:
        if text:
            self.words.append(text)

    def end(self) -> None:
        """End the block under way."""
        lines = [" ".join(line.split()) for line in "".join(self.words).split("\v")]
        body = "\n".join(line for line in lines if line)
        self.words.clear()
        if not body:
            return  # <li><p>: the block inside is the item
        prefix, self.prefix = self.prefix, ""
        if prefix.startswith("#"):
            body = body.replace("\n", " ")
        else:
            body = re.sub(r"^(#{1,6}\s|```|---$)", r"\\\1", body, flags=re.MULTILINE)
        item = prefix.endswith("- ")
        if item and self.is_item:
            self.blocks[-1] += f"\n{prefix}{body}"
        else:
            self.blocks.append(prefix + body)
        self.is_item = item

    def facts(self, lines: list[str]) -> None:
        self.end()
        if lines:
            self.blocks.append("\n".join(f"- {line}" for line in lines))
            self.is_item = False

    def text(self) -> str:
        self.end()
        return "\n\n".join(self.blocks) + "\n" if self.blocks else ""


def _walk(element: Any, writer: _Writer, depth: int) -> None:
    if depth > MAX_HTML_DEPTH:
        raise Refused(f"is nested too deeply (more than {MAX_HTML_DEPTH} levels); save only the page's text")
    tag = element.tag if isinstance(element.tag, str) else ""
    if not tag or _is_skipped(element, tag):
        return
    if tag == "table" and not element.xpath(".//table"):
        writer.facts(_facts(element))
        return
    if tag == "br":
        writer.add("\v")
        return
    if tag == "img":
        return
    if tag in _BLOCKS:
        writer.end()
    if re.fullmatch(r"h[1-6]", tag):
        writer.level = int(tag[1])
        writer.prefix = "#" * writer.level + " "
    elif tag in ("summary", "dt"):
        # A list of questions that unfold: each is a section of its own.
        writer.prefix = "#" * min(6, max(2, writer.level + 1)) + " "
    elif tag == "li":
        writer.prefix = "- "
    elif tag in ("td", "th"):
        writer.add(" ")
    writer.add(element.text if tag != "pre" else (element.text or "").replace("\n", "\v"))
    for child in element:
        _walk(child, writer, depth + 1)
        # A paragraph inside a list item is the item.
        writer.add(child.tail)
    if tag in _BLOCKS:
        writer.end()
        writer.prefix = ""


def _is_skipped(element: Any, tag: str) -> bool:
    if tag in _SKIPPED or element.get("role") in _SKIPPED_ROLES or element.get("hidden") is not None:
        return True
    if element.get("aria-hidden") == "true" or _HIDDEN.search(element.get("style") or ""):
        return True
    # The page's own head and foot; an article has them too, with its title in them.
    return (
        tag in ("header", "footer")
        and element.getparent() is not None
        and element.getparent().tag in ("body", "div")
        and (tag == "footer" or element.find(".//h1") is None)
    )


def _facts(table: Any) -> list[str]:
    """Return one line a row: `运费：省份：广东；首重：8元`; spans are written out."""
    rows: list[list[str]] = []
    spans: dict[int, tuple[int, str]] = {}
    n_heads = 0
    for row in table.iter("tr"):
        cells: list[str] = []
        headed = True
        for cell in row.iterchildren("td", "th"):
            _fill(cells, spans)
            text = " ".join(" ".join(cell.itertext()).split())
            headed &= cell.tag == "th"
            across, down = _span(cell.get("colspan")), _span(cell.get("rowspan"))
            for _ in range(across):
                if down > 1:
                    spans[len(cells)] = (down - 1, text)
                cells.append(text)
        _fill(cells, spans)
        if any(cells):
            n_heads += headed and len(rows) == n_heads
            rows.append(cells)
    if not n_heads and len(rows) > 2 and len(rows[0]) > 1 and len(set(rows[0])) == len(rows[0]) and all(rows[0]):
        n_heads = 1  # most tables of Word mark no header
    head = rows[n_heads - 1] if n_heads and n_heads < len(rows) else []
    caption = " ".join(" ".join(table.xpath("./caption//text()")).split())
    return [line for cells in rows[n_heads if head else 0 :] if (line := fact(caption, head, cells))]


def _fill(cells: list[str], spans: dict[int, tuple[int, str]]) -> None:
    """Append what rows above reach down into the next cells."""
    while len(cells) in spans:
        left, text = spans.pop(len(cells))
        if left > 1:
            spans[len(cells)] = (left - 1, text)
        cells.append(text)
        if left > 1 and len(cells) > 10 * MAX_SPAN:
            break


def _span(text: str | None) -> int:
    return min(MAX_SPAN, max(1, int(text))) if text and text.strip().isdecimal() and len(text) < 6 else 1
