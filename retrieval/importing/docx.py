"""
DOCX -> Markdown: the only import of mammoth. Runs in the child process; `archive.py` has looked before.

mammoth turns paragraph styles into HTML headings, lists and tables, accepts tracked changes and leaves images,
comments, headers and footers out; `webpage.py` makes Markdown of the HTML, as it does of a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mammoth

from retrieval.importing.archive import check_archive
from retrieval.importing.refused import Refused
from retrieval.importing.webpage import to_markdown

# Word names its styles in English inside the file, whatever its language; other programs write what they show.
_STYLES = "\n".join(
    [
        "p[style-name='Title'] => h1:fresh",
        "p[style-name='标题'] => h1:fresh",
        "p[style-name='Subtitle'] => p:fresh",
        *(f"p[style-name='{name} {n}'] => h{n}:fresh" for n in range(1, 7) for name in ("标题", "heading", "Heading")),
        *(f"p[style-name='标题{n}'] => h{n}:fresh" for n in range(1, 7)),
        "comment-reference => ",
    ]
)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """
    Yield {"markdown"}.

    Raises:
        Refused: no DOCX, damaged, over a limit, or without text.
    """
    n_bytes = check_archive(path, "docx", "word/document.xml")
    yield {"allow": min(6 * n_bytes, 2**26)}  # the XML becomes a tree of Python objects
    with path.open("rb") as file:
        made = mammoth.convert_to_html(
            file,
            style_map=_STYLES,
            include_embedded_style_map=False,
            convert_image=mammoth.images.img_element(lambda image: {}),
            external_file_access=False,
        )
    markdown = to_markdown(made.value)
    if not re.search(r"\w", markdown):
        raise Refused("holds no text: pictures only? Copy the text into the document")
    yield {"markdown": markdown}
