"""
A dialogue as training sees it: who said what, and what of it may be learned. No I/O.

`normalise` makes the one form everything behind it relies on: a question first, the roles in turn, a reply last.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, cast

from bot.messages import Turn

Speaker = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Line:
    """One message of a dialogue."""

    role: Speaker
    text: str
    learn: bool = True  # False: context only (a macro, a reply rated down, a look-up nobody can repeat)
    rating: Literal["up", "down"] | None = None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation with a customer. `customer` never leaves the import: it is only what splits are grouped by."""

    id: str
    lines: tuple[Line, ...]
    source: str  # "file:line" or "file:conversation"
    customer: str | None = None
    at: datetime | None = None  # of its first message; aware
    lang: str = ""

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)


@dataclass(frozen=True, slots=True)
class Fault:
    """A place in a file that cannot be read as a dialogue, and what to do about it."""

    source: str  # "file:line"
    field: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.source}, {self.field}: {self.problem}; {self.remedy}"


def normalise(dialogue: Dialogue, dropped: Counter[str]) -> Dialogue | None:
    """
    Return `dialogue` with its roles in turn, or None where no question has a reply (counted in `dropped`).

    Messages of one role in a row become one; what an agent says before the first question, and what a customer says
    after the last reply, is left out.
    """
    lines: list[Line] = []
    for line in dialogue.lines:
        if not lines and line.role == "assistant":
            dropped["message: agent before any question"] += 1
        elif lines and lines[-1].role == line.role:
            last = lines[-1]
            rating = "down" if "down" in (last.rating, line.rating) else last.rating or line.rating
            lines[-1] = replace(
                last, text=f"{last.text}\n{line.text}", learn=last.learn and line.learn, rating=cast(Any, rating)
            )
        else:
            lines.append(line)
    if lines and lines[-1].role == "user":
        lines.pop()
        dropped["message: question without a reply"] += 1
    if not lines:
        dropped["dialogue: half (no question with a reply)"] += 1
        return None
    return replace(dialogue, lines=tuple(lines))


def turns_of(lines: Iterable[Line]) -> list[Turn]:
    """Return normalised lines as question-reply pairs."""
    pairs = list(lines)
    return [Turn(q.text, a.text) for q, a in zip(pairs[::2], pairs[1::2], strict=True)]


def dump_dialogue(dialogue: Dialogue, **extra: Any) -> str:
    """Return one JSON line: OpenAI's `messages`, with `weight` 0 where a reply is not to be learned."""
    messages = []
    for line in dialogue.lines:
        message: dict[str, Any] = {"role": line.role, "content": line.text}
        if line.role == "assistant" and not line.learn:
            message["weight"] = 0
        if line.rating:
            message["rating"] = line.rating
        messages.append(message)
    at = dialogue.at.isoformat() if dialogue.at else None
    fields = {"id": dialogue.id, "lang": dialogue.lang, "at": at, **extra, "messages": messages}
    return json.dumps(fields, ensure_ascii=False)


def parse_dialogue(text: str, source: str) -> Dialogue:
    """
    Return what `dump_dialogue` wrote.

    Raises:
        ValueError: it did not write this; the sentence says what is wrong.
    """
    raw = json.loads(text)
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        raise ValueError("no `messages`")
    lines = []
    for n, message in enumerate(raw["messages"]):
        expected = "user" if n % 2 == 0 else "assistant"
        if not isinstance(message, dict) or message.get("role") != expected:
            raise ValueError(f"messages[{n}].role is not {expected!r}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError(f"messages[{n}].content is empty")
        lines.append(
            Line(cast(Speaker, expected), message["content"], message.get("weight", 1) != 0, message.get("rating"))
        )
    if not lines or len(lines) % 2:
        raise ValueError("the last message is not the assistant's")
    at = parse_at(raw.get("at"))
    return Dialogue(str(raw.get("id", source)), tuple(lines), source, None, at, str(raw.get("lang", "")))


_FORMATS = (
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%d", "%Y/%m/%d",
    "%Y年%m月%d日 %H:%M:%S", "%Y年%m月%d日 %H:%M", "%Y年%m月%d日", "%d/%m/%Y %H:%M", "%m/%d/%y %H:%M", "%Y%m%d%H%M%S",
)  # fmt: skip


def parse_at(value: Any) -> datetime | None:
    """Return a time from ISO 8601, seconds or milliseconds since 1970, or what shop systems export; else None."""
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value) / 1000 if value > 1e11 else float(value)
        return datetime.fromtimestamp(seconds, UTC) if 0 < seconds < 1e11 else None
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    if text.replace(".", "", 1).isdigit() and len(text) in (10, 13):
        return parse_at(float(text))
    try:
        found = datetime.fromisoformat(text)
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    except ValueError:
        pass
    for layout in _FORMATS:
        try:
            return datetime.strptime(text, layout).replace(tzinfo=UTC)
        except ValueError:
            continue
    return None
