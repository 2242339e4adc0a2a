"""
JSON -> objects: a list of them, or a list under one name of an object. Runs in the child process; no foreign library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrieval.importing.limits import MAX_JSON_BYTES, MAX_JSON_DEPTH, MAX_JSON_NODES, MAX_ROWS, MiB
from retrieval.importing.refused import Refused
from retrieval.importing.text import NotText, find_encoding

_SHAPE = 'write [{"question": …, "answer": …}, …], or one object a line and name the file .jsonl'


def read(path: Path) -> Iterator[dict[str, Any]]:
    """
    Yield {"object", "row"}: `row` is its number in the list, from 1.

    Raises:
        Refused: no JSON, too large, too deep, or no list of objects.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        size = path.stat().st_size / MiB
        raise Refused(f"{size:.0f} MiB, more than {MAX_JSON_BYTES // MiB} for one JSON document; {_SHAPE}")
    raw = path.read_bytes()
    try:
        text = raw.decode(find_encoding(raw))
    except NotText as exc:
        raise Refused(str(exc)) from exc
    _check_depth(text)
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise Refused(f"not JSON ({exc}); {_SHAPE}") from exc
    number = 0
    for items in _lists(value):
        for item in items:
            number += 1
            if number > MAX_ROWS:
                raise Refused(f"more than {MAX_ROWS:,} entries; split the file")
            if not isinstance(item, dict):
                raise Refused(f"entry {number} is no object; {_SHAPE}")
            yield {"object": item, "row": number}
    if not number:
        raise Refused(f"holds no entries; {_SHAPE}")


def _lists(value: Any) -> Iterator[list[Any]]:
    """Yield the lists of entries: the value itself, those one level down, or an object of question -> answer."""
    if isinstance(value, list):
        yield value
        return
    if not isinstance(value, dict):
        raise Refused(f"is no list of entries; {_SHAPE}")
    found = [item for item in value.values() if isinstance(item, list) and any(isinstance(one, dict) for one in item)]
    if found:
        yield from found
    elif value and all(isinstance(answer, str) for answer in value.values()):
        known = {"question", "answer", "text", "title", "id"}
        # {"How do I …": "You …"} is a list in another shape; {"question": …, "answer": …} is one entry.
        yield (
            [value] if known & set(value) else [{"question": name, "answer": answer} for name, answer in value.items()]
        )
    else:
        yield [value]


def _check_depth(text: str) -> None:
    """Refuse deep nesting before it is parsed: strings out, then count brackets."""
    n_nodes = text.count("[") + text.count("{")
    if n_nodes > MAX_JSON_NODES:
        raise Refused(f"more than {MAX_JSON_NODES:,} lists and objects; {_SHAPE}")
    depth = 0
    for mark in re.finditer(r'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', text):
        first = mark[0][0]
        if first in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                line = text.count("\n", 0, mark.start()) + 1
                raise Refused(f"line {line}: nested more than {MAX_JSON_DEPTH} deep; {_SHAPE}")
        elif first in "]}":
            depth -= 1
