"""
Frames of WebSocket protocol version 1: text <-> objects. No I/O; docs/protocol.md is the long form.

`parse_frame` is the only place where what a visitor sent is trusted or not; `dump_frame` the only
place where what we send becomes JSON.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from bot.errors import BadFrame, BotError, ClientError, TooLong
from bot.messages import Event

PROTOCOL = 1
SUBPROTOCOL = "zhanggui.v1"
MAX_FRAME_BYTES = 16 * 1024
MAX_TEXT_CHARS = 2_000
MAX_ID_CHARS = 64

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
    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]


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


class Typing(_Frame):
    type: Literal["typing"]
    on: bool


class Ping(_Frame):
    type: Literal["ping"]


ClientFrame = Hello | Ask | Stop | Regenerate | Rate | Handoff | Close | Typing | Ping
_ADAPTER: TypeAdapter[ClientFrame] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="type")])


def parse_frame(text: str) -> ClientFrame:
    """
    Return the frame that `text` holds.

    Raises:
        TooLong: over 16 KiB in UTF-8, or a field over its limit.
        BadFrame: not a JSON object, an unknown type, a field missing or of the wrong kind.
    """
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
        frame = _ADAPTER.validate_python(value)
    except ValidationError as exc:
        raise _translate(exc, value) from None
    if isinstance(frame, Ask) and not frame.text.strip():
        raise BadFrame("'text' is empty")
    return frame


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
    if kind == "string_too_short":
        return BadFrame(f"{field!r} is empty")
    if kind == "missing":
        return BadFrame(f"{field!r} is missing")
    return BadFrame(f"{field!r}: {error['msg'][0].lower()}{error['msg'][1:]}")


def dump_frame(type_: str, **fields: Any) -> str:
    """Return one frame as JSON; fields that are None are left out."""
    kept = {k: v for k, v in fields.items() if v is not None}
    return json.dumps({"type": type_, **kept}, ensure_ascii=False, separators=(",", ":"))


def dump_event(event: Event) -> str:
    """Return the `event` frame of one durable entry."""
    at = event.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return dump_frame("event", seq=event.seq, at=at, kind=event.kind, **event.data)


def dump_failed(error: BaseException, *, id_: str | None = None, turn: str | None = None) -> str:
    """
    Return the `failed` frame of an error.

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
        code=known.code,
        message=message,
        retryable=known.retryable,
        retry_after_s=known.retry_after_s,
    )


_PLAIN = {
    "busy": "The assistant is busy; please try again shortly. 客服繁忙，请稍后再试。",
    "engine_not_ready": "The assistant is still starting. 助手正在启动，请稍候。",
    "engine_failed": "This reply was lost; please ask again. 本次回复失败，请重新提问。",
    "engine_dead": "The assistant is restarting. 助手正在重启，请稍候。",
    "storage_unavailable": "Messages cannot be stored right now. 暂时无法保存消息，请稍后再试。",
    "internal": "Something went wrong on our side. 服务器出现问题。",
}
