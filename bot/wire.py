"""
Frames of WebSocket protocol version 1: text <-> objects. No I/O; docs/protocol.md is the long form.

`parse_frame` is the only place where what a visitor sent is trusted or not; `dump_frame` the only
place where what we send becomes JSON. The classes are the source of docs/asyncapi.json and docs/schemas/ (see
bot/asyncapi.py); those of the server's frames are for that and for the tests, which check every frame they hear:
building an object for each frame sent would only cost time.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from bot.errors import BadFrame, BotError, ClientError, TooLong
from bot.messages import Event, Finish, Outcome, State

T = TypeVar("T")

PROTOCOL = 1
SUBPROTOCOL = "zhanggui.v1"
MAX_FRAME_BYTES = 16 * 1024
MAX_TEXT_CHARS = 2_000
MAX_ID_CHARS = 64
MAX_EMAIL_CHARS = 254  # RFC 5321, 4.5.3.1.3 less the angle brackets
MAX_ATTACHMENTS = 5  # of one message

LIMITS = {"frame_bytes": MAX_FRAME_BYTES, "text_chars": MAX_TEXT_CHARS, "id_chars": MAX_ID_CHARS}

ShortText = Annotated[str, StringConstraints(max_length=200)]
Identifier = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)]
LongText = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]


class _Frame(BaseModel):
    # Unknown fields are ignored, so that a newer client can talk to an older server.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Hello(_Frame):
    type: Literal["hello"]
    protocol: int = PROTOCOL
    conversation: Identifier | None = None
    token: ShortText | None = None
    after: Annotated[int, Field(ge=0)] | None = None
    locale: Annotated[str, StringConstraints(max_length=35)] | None = None  # BCP 47 allows 35
    identity: Annotated[str, StringConstraints(max_length=4096)] | None = None


class Ask(_Frame):
    type: Literal["ask"]
    id: Identifier
    text: LongText  # empty only where there are attachments
    attachments: Annotated[list[Identifier], Field(max_length=MAX_ATTACHMENTS)] = []


class Stop(_Frame):
    type: Literal["stop"]
    turn: Identifier


class Regenerate(_Frame):
    type: Literal["regenerate"]
    turn: Identifier


class Rate(_Frame):
    type: Literal["rate"]
    seq: Annotated[int, Field(ge=1)]
    value: Literal["up", "down"]
    comment: LongText | None = None


class Handoff(_Frame):
    type: Literal["handoff"]
    reason: LongText | None = None


class Close(_Frame):
    type: Literal["close"]
    score: Annotated[int, Field(ge=1, le=5)] | None = None
    comment: LongText | None = None


class LeaveMessage(_Frame):
    type: Literal["leave_message"]
    id: Identifier
    email: Annotated[
        str, StringConstraints(max_length=MAX_EMAIL_CHARS, pattern=r"^[^\s@<>\"]+@[^\s@<>\"]+\.[^\s@<>\".]+$")
    ]
    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]


class Typing(_Frame):
    type: Literal["typing"]
    on: bool


class Ping(_Frame):
    type: Literal["ping"]


ClientFrame = Hello | Ask | Stop | Regenerate | Rate | Handoff | Close | LeaveMessage | Typing | Ping
_ADAPTER: TypeAdapter[ClientFrame] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="type")])


def parse_frame(text: str) -> ClientFrame:
    """
    Return the frame that `text` holds.

    Raises:
        TooLong: over 16 KiB in UTF-8, or a field over its limit.
        BadFrame: not a JSON object, an unknown type, a field missing or of the wrong kind.
    """
    frame = parse_object(text, _ADAPTER)
    if isinstance(frame, Ask) and not frame.text.strip() and not frame.attachments:
        raise BadFrame("'text' is empty")
    if isinstance(frame, LeaveMessage) and not frame.text.strip():
        raise BadFrame("'text' is empty")
    return frame


def parse_object(text: str, adapter: TypeAdapter[T]) -> T:
    """Return what `adapter` makes of a frame's text; raises as `parse_frame`."""
    size_bytes = len(text.encode("utf-8", "surrogatepass"))
    if size_bytes > MAX_FRAME_BYTES:
        raise TooLong("frame", size_bytes, MAX_FRAME_BYTES, "bytes")
    try:
        # NaN and Infinity are no JSON; deep nesting raises RecursionError in the C scanner.
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise BadFrame("the frame is not valid JSON") from None
    if not isinstance(value, dict):
        raise BadFrame("the frame is not a JSON object")
    if _has_surrogate(value):
        raise BadFrame("the frame has a lone surrogate, which is no character")
    try:
        return adapter.validate_python(value)
    except ValidationError as exc:
        raise _translate(exc, value) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _has_surrogate(value: dict[str, Any]) -> bool:
    # Only the top level holds strings we use; nested values are ignored fields.
    return any(isinstance(v, str) and any("\ud800" <= c <= "\udfff" for c in v) for v in value.values())


def _translate(exc: ValidationError, value: dict[str, Any]) -> ClientError:
    """Return the one sentence a client's developer needs: which field, which limit."""
    error = exc.errors(include_url=False, include_input=False)[0]
    kind = error["type"]
    field = str(error["loc"][-1]) if error["loc"] else "frame"
    if kind == "union_tag_not_found":
        return BadFrame("'type' is missing")
    if kind == "union_tag_invalid":
        return BadFrame(f"unknown type {str(value.get('type'))[:40]!r}")
    if kind == "string_too_long":
        return TooLong(field, len(value[field]), int(error["ctx"]["max_length"]))
    if kind == "too_long":
        return TooLong(field, len(value[field]), int(error["ctx"]["max_length"]), "items")
    if kind == "string_too_short":
        return BadFrame(f"{field!r} is empty")
    if kind == "missing":
        return BadFrame(f"{field!r} is missing")
    if kind == "string_pattern_mismatch":
        return BadFrame(f"{field!r} is not of the right form")
    return BadFrame(f"{field!r}: {error['msg'][0].lower()}{error['msg'][1:]}")


# What the server sends


class _Sent(BaseModel):
    # In tests a field that is not here is a mistake; the published schemas let newer servers add some.
    model_config = ConfigDict(extra="forbid", strict=True)


class Storefront(_Sent):
    name: str
    languages: list[str]
    currency: str


class Limits(_Sent):
    frame_bytes: int
    text_chars: int
    id_chars: int
    asks_per_minute: int
    attachment_bytes: int | None = None
    attachments: int | None = None
    attachment_types: list[str] | None = None


class HumanHelp(_Sent):
    """Whether agents are there, and where this conversation stands in their queue."""

    open: bool
    opens_at: str | None = None
    agents_online: bool
    position: int | None = None
    expected_wait_s: float | None = None


class Named(_Sent):
    name: str | None = None
    id: str | None = None


class Welcome(_Sent):
    type: Literal["welcome"]
    conversation: str
    token: str
    seq: int
    state: State
    store: Storefront
    greeting: str
    quick_replies: list[str]
    limits: Limits
    human: HumanHelp | None = None
    customer: Named | None = None
    agent: Named | None = None


class Ack(_Sent):
    type: Literal["ack"]
    id: str
    seq: int
    duplicate: bool


class Status(_Sent):
    type: Literal["status"]
    turn: str
    turns: list[str] | None = None
    phase: Literal["searching", "thinking", "typing"]


class DeltaFrame(_Sent):
    type: Literal["delta"]
    turn: str
    index: int
    text: str


class Partial(_Sent):
    type: Literal["partial"]
    turn: str
    turns: list[str] | None = None
    index: int
    text: str


class SomebodyTypes(_Sent):
    type: Literal["typing"]
    role: Literal["agent", "visitor"]
    on: bool
    name: str | None = None


class QueueFrame(_Sent):
    type: Literal["queue"]
    position: int | None = None
    expected_wait_s: float | None = None


class Reconnect(_Sent):
    """The server is about to restart: come back so long after it has closed the connection."""

    type: Literal["reconnect"]
    after_ms: Annotated[int, Field(ge=0)]
    reason: Literal["restart"]


class Failed(_Sent):
    type: Literal["failed"]
    id: str | None = None
    turn: str | None = None
    turns: list[str] | None = None
    code: str
    message: str
    retryable: bool
    retry_after_s: float | None = None


class Pong(_Sent):
    type: Literal["pong"]


class CitationOut(_Sent):
    id: str
    title: str
    source: str
    quote: str
    score: float


class ProductCard(_Sent):
    kind: Literal["product"]
    id: str
    title: str
    price: str | float | int | None = None
    currency: str | None = None
    url: str | None = None
    image: str | None = None
    stock: str | int | None = None


class OrderCard(_Sent):
    """Only ever sent to the customer whose order it is (signed by the store's backend)."""

    kind: Literal["order"]
    id: str
    status: str
    carrier: str | None = None
    tracking: str | None = None
    items: list[str]
    total: str
    currency: str
    placed_at: str | None = None


class ReleaseOut(_Sent):
    model: str
    adapter: str | None
    prompt: str
    knowledge: str


class Usage(_Sent):
    output_tokens: int


class AttachmentOut(_Sent):
    id: str
    kind: Literal["image", "pdf"]
    mime: str
    name: str
    size_bytes: int
    width: int | None = None
    height: int | None = None


class Party(_Sent):
    role: Literal["visitor", "bot", "agent", "server"]
    id: str | None = None
    name: str | None = None


class _Event(_Sent):
    type: Literal["event"]
    seq: Annotated[int, Field(ge=1)]
    at: str


class VisitorMessage(_Event):
    kind: Literal["message"]
    role: Literal["visitor"]
    turn: str
    text: str
    attachments: list[AttachmentOut] | None = None
    left: bool | None = None
    email: str | None = None


class BotMessage(_Event):
    kind: Literal["message"]
    role: Literal["bot"]
    turn: str
    turns: list[str] | None = None
    text: str
    finish: Finish
    outcome: Outcome
    citations: list[CitationOut]
    cards: list[ProductCard | OrderCard]
    quick_replies: list[str]
    release: ReleaseOut
    usage: Usage
    revised: bool | None = None
    recovered: bool | None = None


class AgentMessage(_Event):
    kind: Literal["message"]
    role: Literal["agent"]
    turn: str | None = None
    text: str
    agent: Named | None = None
    attachments: list[AttachmentOut] | None = None


class SystemMessage(_Event):
    kind: Literal["message"]
    role: Literal["system"]
    text: str
    code: str | None = None


class StateEvent(_Event):
    kind: Literal["state"]
    state: State
    reason: str | None = None
    score: int | None = None
    comment: str | None = None
    by: Party | None = None
    agent: Named | None = None
    position: int | None = None
    expected_wait_s: float | None = None
    open: bool | None = None
    opens_at: str | None = None


class RatingEvent(_Event):
    kind: Literal["rating"]
    rated: int
    value: Literal["up", "down"]
    comment: str | None = None


EventFrame = VisitorMessage | BotMessage | AgentMessage | SystemMessage | StateEvent | RatingEvent
ServerFrame = (
    Welcome | Ack | Status | DeltaFrame | Partial | EventFrame | SomebodyTypes | QueueFrame | Reconnect | Failed | Pong
)


def dump_frame(type_: str, **fields: Any) -> str:
    """Return one frame as JSON; fields that are None are left out."""
    kept = {k: v for k, v in fields.items() if v is not None}
    return json.dumps({"type": type_, **kept}, ensure_ascii=False, separators=(",", ":"))


def dump_event(event: Event) -> str:
    """Return the `event` frame of one durable entry."""
    at = event.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return dump_frame("event", seq=event.seq, at=at, kind=event.kind, **event.data)


def dump_failed(
    error: BaseException,
    *,
    id_: str | None = None,
    turn: str | None = None,
    turns: list[str] | None = None,
    **fields: Any,
) -> str:
    """
    Return the `failed` frame of an error; of `turns` that were to get one reply, `turn` is the last.

    Only a `ClientError` shows its own words; of anything else the visitor gets the code and a plain sentence.
    """
    if isinstance(error, ClientError):
        message = str(error)
    else:
        message = _PLAIN.get(getattr(error, "code", "internal"), _PLAIN["internal"])
    known = error if isinstance(error, BotError) else BotError()
    return dump_frame(
        "failed",
        id=id_,
        turn=turn,
        turns=turns,
        code=known.code,
        message=message,
        retryable=known.retryable,
        retry_after_s=known.retry_after_s,
        **fields,
    )


_PLAIN = {
    "busy": "The assistant is busy; please try again shortly. 客服繁忙，请稍后再试。",
    "engine_not_ready": "The assistant is still starting. 助手正在启动，请稍候。",
    "engine_failed": "This reply was lost; please ask again. 本次回复失败，请重新提问。",
    "engine_dead": "The assistant is restarting. 助手正在重启，请稍候。",
    "storage_unavailable": "Messages cannot be stored right now. 暂时无法保存消息，请稍后再试。",
    "store_unwritable": "A file of the store cannot be written. 店铺文件无法写入。",
    "restarting": "The server restarts; please wait a moment. 服务器正在重启，请稍候。",
    "interrupted": "The reply was interrupted; please try again. 回复被中断，请重试。",
    "internal": "Something went wrong on our side. 服务器出现问题。",
}
