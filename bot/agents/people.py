"""What the inbox is about, as plain objects: agents, cards, messages left, canned replies, drafts. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from bot.language import language_of
from bot.messages import Customer, Language, State

Role = Literal["agent", "merchant"]
Presence = Literal["online", "away", "offline"]
DraftStatus = Literal["pending", "approved", "rejected"]


@dataclass(frozen=True, slots=True)
class Agent:
    """An account."""

    id: str
    login: str
    name: str
    role: Role
    disabled: bool = False

    def public(self) -> dict[str, Any]:
        return {"id": self.id, "login": self.login, "name": self.name, "role": self.role}

    def who(self) -> dict[str, Any]:
        """Return what events and visitors get of an agent: no login."""
        return {"id": self.id, "name": self.name}


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in browser of an agent."""

    token_hash: str
    agent: Agent
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Card:
    """A conversation as a list shows it."""

    id: str
    state: State
    state_at: datetime
    created_at: datetime
    last_at: datetime
    seq: int
    locale: str | None
    owner: str | None
    reason: str | None
    customer: Customer | None
    last_role: str | None
    last_text: str | None
    position: int | None = None  # in the queue; 1 is next

    @property
    def language(self) -> Language:
        """The language the last text is in, else the page's."""
        if (written := language_of(self.last_text or "")) is not None:
            return written
        return "en" if self.locale and not self.locale.lower().startswith("zh") else "zh"


@dataclass(frozen=True, slots=True)
class LeftMessage:
    id: str
    conversation: str
    seq: int
    email: str
    text: str
    at: datetime
    done_at: datetime | None
    done_by: str | None


@dataclass(frozen=True, slots=True)
class CannedReply:
    id: str
    shortcut: str
    zh: str
    en: str
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class FaqDraft:
    """A question and an agent's answer that may become a row of faqs.csv."""

    id: str
    conversation: str
    seq: int
    question: str
    answer: str
    lang: Language
    status: DraftStatus
    source: Literal["agent", "rating"]
    created_at: datetime
    created_by: str | None
    decided_at: datetime | None
    decided_by: str | None
    faq_id: str | None


@dataclass(frozen=True, slots=True)
class HandoffTimes:
    """What the account of hand-offs says of a stretch of time. All in seconds."""

    n_opened: int = 0
    n_accepted: int = 0
    n_ended: int = 0
    waits_s: tuple[float, ...] = field(default=())
    handling_s: tuple[float, ...] = field(default=())


def stamp(at: datetime | None) -> str | None:
    """Return a time as the wire has it: UTC, milliseconds, Z."""
    return None if at is None else at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
