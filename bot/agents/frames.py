"""
Frames of the agents' WebSocket (`zhanggui.agent.v1`): text -> objects, cards and the like -> JSON. No I/O.

The rules of form (size, JSON, strict types) are those of `bot.wire`; docs/inbox.md is the long form.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from bot.agents.people import Agent, Card, FaqDraft, LeftMessage, Presence, stamp
from bot.errors import BadFrame
from bot.wire import LIMITS, MAX_TEXT_CHARS, Identifier, parse_object

SUBPROTOCOL = "zhanggui.agent.v1"
MAX_OPEN = 30  # conversations that one connection follows
AGENT_LIMITS = {**LIMITS, "open_conversations": MAX_OPEN}

Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class AgentHello(_Frame):
    type: Literal["hello"]
    protocol: int = 1


class Open(_Frame):
    type: Literal["open"]
    conversation: Identifier
    after: Annotated[int, Field(ge=0)] = 0


class Leave(_Frame):
    type: Literal["leave"]
    conversation: Identifier


class Accept(_Frame):
    type: Literal["accept"]
    conversation: Identifier
    id: Identifier | None = None


class TakeOver(_Frame):
    type: Literal["take_over"]
    conversation: Identifier
    id: Identifier | None = None


class Say(_Frame):
    type: Literal["say"]
    conversation: Identifier
    id: Identifier
    text: Text


class Note(_Frame):
    type: Literal["note"]
    conversation: Identifier
    id: Identifier
    text: Text


class AgentTyping(_Frame):
    type: Literal["typing"]
    conversation: Identifier
    on: bool


class Transfer(_Frame):
    type: Literal["transfer"]
    conversation: Identifier
    to: Identifier  # an agent's id, or "queue"
    note: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)] | None = None
    id: Identifier | None = None


class Return(_Frame):
    type: Literal["return"]
    conversation: Identifier
    id: Identifier | None = None


class AgentClose(_Frame):
    type: Literal["close"]
    conversation: Identifier
    id: Identifier | None = None


class Suggest(_Frame):
    type: Literal["suggest"]
    conversation: Identifier
    id: Identifier
    text: Text | None = None


class Summarize(_Frame):
    type: Literal["summarize"]
    conversation: Identifier
    id: Identifier


class SetPresence(_Frame):
    type: Literal["presence"]
    status: Literal["online", "away"]


class AgentPing(_Frame):
    type: Literal["ping"]


Action = Accept | TakeOver | Transfer | Return | AgentClose
AgentFrame = (
    AgentHello | Open | Leave | Action | Say | Note | AgentTyping | Suggest | Summarize | SetPresence | AgentPing
)
_ADAPTER: TypeAdapter[AgentFrame] = TypeAdapter(Annotated[AgentFrame, Field(discriminator="type")])


def parse_agent_frame(text: str) -> AgentFrame:
    """Return the frame that `text` holds; raises TooLong, BadFrame."""
    frame = parse_object(text, _ADAPTER)
    if isinstance(frame, Say | Note) and not frame.text.strip():
        raise BadFrame("'text' is empty")
    return frame


def with_conversation(frame: str, conversation: str) -> str:
    """Return a visitor's frame as agents get it: with the conversation it is of."""
    return f'{frame[:-1]},"conversation":{json.dumps(conversation)}}}'


def agent_object(agent: Agent, status: Presence) -> dict[str, Any]:
    return {**agent.public(), "status": status}


def card_object(card: Card, owner: dict[str, Any] | None, *, visitor_online: bool) -> dict[str, Any]:
    """Return a card as the wire has it; `owner` is {id, name} or None."""
    last = None
    if card.last_role is not None:
        last = {"role": card.last_role, "text": card.last_text or "", "at": stamp(card.last_at)}
    customer = None
    if card.customer is not None:
        customer = {"id": card.customer.id, "name": card.customer.name, "email": card.customer.email}
    return {
        "id": card.id,
        "state": card.state,
        "state_at": stamp(card.state_at),
        "created_at": stamp(card.created_at),
        "last_at": stamp(card.last_at),
        "seq": card.seq,
        "owner": owner,
        "reason": card.reason,
        "locale": card.locale,
        "language": card.language,
        "customer": customer,
        "last": last,
        "position": card.position,
        "visitor_online": visitor_online,
    }


def left_object(message: LeftMessage, done_by: dict[str, Any] | None, language: str) -> dict[str, Any]:
    return {
        "id": message.id,
        "conversation": message.conversation,
        "seq": message.seq,
        "email": message.email,
        "text": message.text,
        "language": language,
        "at": stamp(message.at),
        "done_at": stamp(message.done_at),
        "done_by": done_by,
    }


def draft_object(
    draft: FaqDraft, created_by: dict[str, Any] | None, decided_by: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": draft.id,
        "conversation": draft.conversation,
        "seq": draft.seq,
        "question": draft.question,
        "answer": draft.answer,
        "lang": draft.lang,
        "status": draft.status,
        "source": draft.source,
        "created_at": stamp(draft.created_at),
        "created_by": created_by,
        "decided_at": stamp(draft.decided_at),
        "decided_by": decided_by,
        "faq_id": draft.faq_id,
    }
