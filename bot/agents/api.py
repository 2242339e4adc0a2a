"""
The inbox over HTTP: sign-in, lists, canned replies, drafts, messages left. docs/inbox.md is the long form.

Every change needs the session's cookie (which other sites cannot send: SameSite=Strict) and a header that only the
inbox's own page knows (CSRF); a foreign Origin is refused besides.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from bot.agents.accounts import csrf_of
from bot.agents.desk import Desk, require_merchant
from bot.agents.people import CannedReply, Session, stamp
from bot.errors import BadFrame, BotError, ClientError, StoreUnwritable, TooLong, Unauthorized
from bot.messages import Language
from bot.wire import MAX_ID_CHARS, MAX_TEXT_CHARS

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=BaseModel)
MAX_BODY_BYTES = 64 * 1024
COOKIE = "zhanggui_session"
SECURE_COOKIE = f"__Host-{COOKIE}"
STATES = ("bot", "waiting", "human", "closed")

# Codes that HTTP has other names for.
_CODES = {"bad_frame": "bad_request", "unsupported": "bad_request", "unknown_conversation": "not_found"}
_STATUS = {
    "bad_frame": 400,
    "unauthorized": 401,
    "bad_credentials": 401,
    "forbidden": 403,
    "csrf": 403,
    "origin": 403,
    "not_found": 404,
    "unknown_conversation": 404,
    "conflict": 409,
    "not_allowed": 409,
    "taken": 409,
    "not_yours": 409,
    "too_long": 413,
    "unsupported": 415,
    "rate_limited": 429,
}


class _Csrf(ClientError):
    code = "csrf"

    def __str__(self) -> str:
        return "send the header X-CSRF-Token with the value of `csrf` from /api/session"


class _Origin(ClientError):
    code = "origin"

    def __str__(self) -> str:
        return "this is for the inbox's own page only"


class _Unsupported(ClientError):
    code = "unsupported"


class _Route(APIRoute):
    """A route whose errors are `{"error": {code, message}}`, and that nobody keeps a copy of."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                response = await handler(request)
            except BotError as exc:
                response = _error(exc)
            except Exception as exc:  # a bug: the agent gets a code, the log the rest
                logger.exception("%s %s failed", request.method, self.path)
                response = _error(exc)
            response.headers["Cache-Control"] = "no-store"
            return response

        return guarded


def _error(error: Exception) -> Response:
    code = error.code if isinstance(error, BotError) else "internal"
    headers = {}
    if isinstance(error, BotError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    shown = isinstance(error, ClientError | StoreUnwritable)  # of the rest the log has the words
    body = {"code": _CODES.get(code, code), "message": str(error) if shown else "something went wrong on our side"}
    default = 500 if code == "internal" else 503
    return JSONResponse({"error": body}, _STATUS.get(code, default), headers)


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
Filled = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS, strip_whitespace=True)]


class SignIn(_Body):
    login: Annotated[str, StringConstraints(max_length=200)]
    password: Annotated[str, StringConstraints(max_length=1000)]


class NewPassword(_Body):
    old: Annotated[str, StringConstraints(max_length=1000)]
    new: Annotated[str, StringConstraints(max_length=1000)]


class Canned(_Body):
    shortcut: Annotated[str, StringConstraints(pattern=r"^\S{1,40}$")]
    zh: Text = ""
    en: Text = ""


class NewDraft(_Body):
    conversation: Id
    seq: Annotated[int, Field(ge=1)]
    question: Text | None = None
    answer: Text | None = None


class DraftText(_Body):
    question: Filled
    answer: Filled
    lang: Language


class Approval(_Body):
    question: Filled | None = None
    answer: Filled | None = None
    lang: Language | None = None


def inbox_routes(
    desk: Desk, *, own_origin: Callable[[HTTPConnection], bool], address_of: Callable[[HTTPConnection], str]
) -> APIRouter:
    """
    Return the routes under /api.

    Args:
        own_origin: whether a request's Origin, where it has one, is this server's own.
        address_of: whom to count failed sign-ins of.
    """
    router = APIRouter(prefix="/api", tags=["inbox"], route_class=_Route)
    accounts, records = desk.accounts, desk.records

    async def signed_in(request: Request) -> Session:
        """Return who asks; a change has to prove that the inbox's page made it."""
        if request.method not in ("GET", "HEAD") and not own_origin(request):
            raise _Origin
        session = await session_of(desk, request)
        if request.method not in ("GET", "HEAD") and not _same(
            request.headers.get("x-csrf-token", ""), csrf_of(session)
        ):
            raise _Csrf
        return session

    # Sign-in

    @router.post("/session")
    async def sign_in(request: Request) -> Response:
        """Sign in: sets the cookie."""
        if not own_origin(request):
            raise _Origin
        body = await _body(request, SignIn)
        token, session = await accounts.sign_in(body.login, body.password, address_of(request))
        response = JSONResponse(_session_object(session))
        response.set_cookie(
            cookie_name(request),
            token,
            max_age=int(accounts.session_h * 3600),
            path="/",
            secure=_is_secure(request),
            httponly=True,
            samesite="strict",
        )
        return response

    @router.get("/session")
    async def who(request: Request) -> Response:
        """Say who is signed in, and what changes need (`csrf`)."""
        return JSONResponse(_session_object(await signed_in(request)))

    @router.delete("/session")
    async def sign_out(request: Request) -> Response:
        """Sign out: the session and its sockets end."""
        session = await signed_in(request)
        await accounts.sign_out(session)
        desk.end_sessions([session.token_hash], agent=session.agent.id)
        response = Response(status_code=204)
        response.delete_cookie(
            cookie_name(request), path="/", secure=_is_secure(request), httponly=True, samesite="strict"
        )
        return response

    @router.put("/session/password")
    async def change_password(request: Request) -> Response:
        """Change one's own password; all other sessions end."""
        session = await signed_in(request)
        body = await _body(request, NewPassword)
        await accounts.change_password(session, body.old, body.new)
        await desk.check_sessions()
        return Response(status_code=204)

    # Conversations

    @router.get("/conversations")
    async def conversations(request: Request) -> Response:
        """List conversations, newest first."""
        session = await signed_in(request)
        query = request.query_params
        states = [state for state in query.get("state", "").split(",") if state]
        if unknown := [state for state in states if state not in STATES]:
            raise BadFrame(f"'state' {unknown[0][:20]!r} is none of {', '.join(STATES)}")
        text = query.get("q", "").strip()
        if text and not 2 <= len(text) <= 100:
            raise BadFrame("'q' has 2 to 100 characters")
        limit = _whole(query.get("limit", "50"), "limit", 1, 100)
        cards = await desk.list_cards(
            session.agent,
            states=states,
            mine=query.get("owner") == "me",
            text=text,
            before=_time(query.get("before")),
            limit=limit,
        )
        return JSONResponse({"conversations": cards, "next": cards[-1]["last_at"] if len(cards) == limit else None})

    @router.get("/conversations/{id_}")
    async def conversation(request: Request, id_: str) -> Response:
        """Give the whole of a conversation, notes and summary too."""
        session = await signed_in(request)
        return JSONResponse(await desk.whole(session.agent, id_))

    @router.get("/agents")
    async def agents(request: Request) -> Response:
        """List the agents and whether they are there."""
        await signed_in(request)
        return JSONResponse({"agents": await desk.agents()})

    @router.get("/stats")
    async def stats(request: Request) -> Response:
        """Give figures of the queue and of today."""
        await signed_in(request)
        return JSONResponse(await desk.stats())

    # Canned replies

    @router.get("/canned")
    async def canned(request: Request) -> Response:
        """List canned replies."""
        await signed_in(request)
        return JSONResponse({"canned": [_canned_object(reply) for reply in await records.canned()]})

    @router.post("/canned")
    async def add_canned(request: Request) -> Response:
        """Make a canned reply."""
        return JSONResponse(await put_canned(request, None), 201)

    @router.put("/canned/{id_}")
    async def change_canned(request: Request, id_: str) -> Response:
        """Change a canned reply."""
        return JSONResponse(await put_canned(request, id_))

    async def put_canned(request: Request, id_: str | None) -> dict[str, Any]:
        require_merchant((await signed_in(request)).agent)
        body = await _body(request, Canned)
        if not body.zh.strip() and not body.en.strip():
            raise BadFrame("'zh' and 'en' are both empty")
        return _canned_object(await records.put_canned(id_, body.shortcut, body.zh, body.en))

    @router.delete("/canned/{id_}")
    async def delete_canned(request: Request, id_: str) -> Response:
        """Delete a canned reply."""
        require_merchant((await signed_in(request)).agent)
        await records.delete_canned(id_)
        return Response(status_code=204)

    # Drafts of FAQs

    @router.get("/drafts")
    async def drafts(request: Request) -> Response:
        """List drafts, newest first."""
        await signed_in(request)
        status = request.query_params.get("status") or None
        if status not in (None, "pending", "approved", "rejected"):
            raise BadFrame("'status' is none of pending, approved, rejected")
        return JSONResponse({"drafts": await desk.drafts(status)})

    @router.post("/drafts")
    async def add_draft(request: Request) -> Response:
        """Propose an agent's message as an FAQ."""
        session = await signed_in(request)
        body = await _body(request, NewDraft)
        draft, new = await desk.make_draft(session.agent, body.conversation, body.seq, body.question, body.answer)
        return JSONResponse(draft, 201 if new else 200)

    @router.put("/drafts/{id_}")
    async def edit_draft(request: Request, id_: str) -> Response:
        """Change a pending draft."""
        require_merchant((await signed_in(request)).agent)
        body = await _body(request, DraftText)
        return JSONResponse(await desk.edit_draft(id_, body.question, body.answer, body.lang))

    @router.post("/drafts/{id_}/approve")
    async def approve_draft(request: Request, id_: str) -> Response:
        """Add a pending draft to the store's faqs.csv."""
        session = await signed_in(request)
        require_merchant(session.agent)
        body = await _body(request, Approval)
        return JSONResponse(await desk.approve_draft(session.agent, id_, body.question, body.answer, body.lang))

    @router.post("/drafts/{id_}/reject")
    async def reject_draft(request: Request, id_: str) -> Response:
        """Refuse a pending draft."""
        session = await signed_in(request)
        require_merchant(session.agent)
        return JSONResponse(await desk.reject_draft(session.agent, id_))

    # Messages left

    @router.get("/messages")
    async def messages(request: Request) -> Response:
        """List messages left outside hours, newest first."""
        await signed_in(request)
        only_open = request.query_params.get("open") in ("true", "1")
        return JSONResponse({"messages": await desk.left_messages(only_open=only_open)})

    @router.post("/messages/{id_}/done")
    async def message_done(request: Request, id_: str) -> Response:
        """Mark a message left as seen to."""
        session = await signed_in(request)
        return JSONResponse(await desk.set_done(session.agent, id_, True))

    @router.post("/messages/{id_}/reopen")
    async def message_reopened(request: Request, id_: str) -> Response:
        """Mark a message left as open again."""
        session = await signed_in(request)
        return JSONResponse(await desk.set_done(session.agent, id_, False))

    return router


async def session_of(desk: Desk, connection: HTTPConnection) -> Session:
    """Return whose cookie a request or a socket has; raises Unauthorized."""
    return await desk.accounts.session(connection.cookies.get(cookie_name(connection)))


async def is_agent(desk: Desk, request: Request) -> bool:
    """Return whether a signed-in agent asks."""
    try:
        await session_of(desk, request)
    except Unauthorized:
        return False
    return True


def cookie_name(connection: HTTPConnection) -> str:
    """Return the cookie's name: under TLS one that browsers take from this host over TLS only."""
    return SECURE_COOKIE if _is_secure(connection) else COOKIE


def _is_secure(connection: HTTPConnection) -> bool:
    return connection.url.scheme in ("https", "wss")


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode("utf-8", "replace"), b.encode())


async def _body(request: Request, model: type[B]) -> B:
    """Return the request's JSON body; raises BadFrame, TooLong."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise _Unsupported("send JSON, with Content-Type: application/json")
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > MAX_BODY_BYTES:
            raise TooLong("body", len(raw), MAX_BODY_BYTES, "bytes")
    try:
        return model.model_validate_json(raw or b"{}")
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in error["loc"]) or "body"
        raise BadFrame(f"{field!r}: {error['msg'][0].lower()}{error['msg'][1:]}") from None


def _whole(text: str, name: str, least: int, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text[:9]) <= most:
        raise BadFrame(f"{name!r} is a number from {least} to {most}")
    return int(text)


def _time(text: str | None) -> datetime | None:
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise BadFrame("'before' is no time; pass `next` of the answer before") from None
    if at.tzinfo is None:
        raise BadFrame("'before' has no time zone; pass `next` of the answer before")
    return at


def _session_object(session: Session) -> dict[str, Any]:
    return {"agent": session.agent.public(), "csrf": csrf_of(session), "expires_at": stamp(session.expires_at)}


def _canned_object(reply: CannedReply) -> dict[str, Any]:
    return {
        "id": reply.id,
        "shortcut": reply.shortcut,
        "zh": reply.zh,
        "en": reply.en,
        "updated_at": stamp(reply.updated_at),
    }
