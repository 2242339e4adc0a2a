"""
What a conversation is made of. No I/O, no framework; imported by everything above it.

A conversation is an ordered log of `Event`s with sequence numbers from 1; everything else
(the history the model sees, the state, what a client missed) is a view of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

Role = Literal["visitor", "bot", "agent", "system"]
Outcome = Literal["direct", "generated", "no_answer", "handoff", "refused"]
Finish = Literal["stop", "length", "abort"]
EventKind = Literal["message", "state", "rating", "note"]
State = Literal["bot", "waiting", "human", "closed"]
Language = Literal["zh", "en"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message as a chat model sees it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Release:
    """What answered: stamped on every reply, so that any reply can be traced and replayed."""

    model: str  # catalog name or folder name; "none" where no model runs
    adapter: str | None  # name of the published adapter, None for the bare model
    prompt: str  # version of the prompt layout, see bot.prompt.PROMPT_VERSION
    knowledge: str  # content hash of the index that was searched


@dataclass(frozen=True, slots=True)
class Citation:
    id: str  # passage id
    title: str
    source: str  # file and place in the store folder, for instance "faqs.csv:12"
    quote: str  # the words relied upon, cut to 300 characters
    score: float  # confidence in [0, 1]


@dataclass(frozen=True, slots=True)
class Reply:
    """The bot's finished answer to one question, before it is numbered and stored."""

    text: str
    outcome: Outcome
    finish: Finish
    language: Language
    release: Release
    citations: tuple[Citation, ...] = ()
    cards: tuple[dict[str, Any], ...] = ()  # product cards: {kind, id, title, price, currency, url, image, stock}
    quick_replies: tuple[str, ...] = ()
    revised: bool = False  # the final check replaced what was streamed


@dataclass(frozen=True, slots=True)
class Event:
    """One durable entry of a conversation. `data` holds the kind's own fields, as they go over the wire."""

    seq: int  # 1, 2, 3 … without gaps within a conversation
    at: datetime  # aware, UTC
    kind: EventKind
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> str | None:
        return self.data.get("role")

    @property
    def text(self) -> str:
        return str(self.data.get("text", ""))


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and the reply to it, as the history shows them to the model."""

    question: str
    reply: str
    passages: tuple[str, ...] = ()  # ids the reply was grounded in, best first


def reply_data(reply: Reply, turn: str) -> dict[str, Any]:
    """Return the `data` of a bot message event, with exactly the wire's field names."""
    data: dict[str, Any] = {
        "role": "bot",
        "turn": turn,
        "text": reply.text,
        "finish": reply.finish,
        "outcome": reply.outcome,
        "citations": [asdict(c) for c in reply.citations],
        "cards": list(reply.cards),
        "quick_replies": list(reply.quick_replies),
        "release": asdict(reply.release),
    }
    if reply.revised:
        data["revised"] = True
    return data


def turns_of(events: list[Event]) -> list[Turn]:
    """
    Return the question-reply pairs of a log, oldest first.

    Several visitor messages before one reply are joined; a question without a reply is left out
    (it is the one being answered, or its reply was lost).
    """
    turns: list[Turn] = []
    pending: list[str] = []
    for event in events:
        if event.kind != "message":
            continue
        if event.role == "visitor":
            pending.append(event.text)
        elif event.role in ("bot", "agent") and pending:
            cited = tuple(c["id"] for c in event.data.get("citations", ()))
            turns.append(Turn("\n".join(pending), event.text, cited))
            pending = []
    return turns
