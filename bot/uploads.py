"""
Attachments over HTTP: `POST` and `GET /v1/conversations/{conversation}/attachments`.

Who may: the visitor with the token of their `welcome`, and agents who are signed in. Knows requests and headers; what
is taken and where it is kept is `bot.attachments`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from bot.attachments import MAX_FILE_BYTES, AttachmentStore
from bot.errors import BotError, NotFound, TooLong, UnknownConversation
from bot.messages import Event
from bot.wire import dump_failed

STATUS = {
    "unknown_conversation": 401,
    "not_found": 404,
    "too_long": 413,
    "unsupported_file": 415,
    "rate_limited": 429,
    "storage_unavailable": 503,
    "restarting": 503,
}


IDENTITY_HEADER = "X-Zhanggui-Identity"  # what `hello` has as `identity`; needed where the conversation is a customer's


def attachment_routes(
    store: AttachmentStore,
    *,
    authenticate: Callable[[str, str, str | None], Awaitable[None]],
    is_agent: Callable[[Request], Awaitable[bool]],
    allows: Callable[[Request], bool],
    admit: Callable[[Request], None],
) -> list[BaseRoute]:
    """
    Return the routes.

    Args:
        authenticate: raises UnknownConversation unless (conversation, token, signed identity) belong together.
        is_agent: whether a signed-in agent made the request; called where it has no token.
        allows: whether a page of the request's origin may ask.
        admit: raises where its address sends too many files, or the server takes none.
    """

    async def authorise(request: Request) -> str:
        conversation = str(request.path_params["conversation"])
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and token:
            await authenticate(conversation, token.strip(), request.headers.get(IDENTITY_HEADER))
        elif not await is_agent(request):
            raise UnknownConversation
        return conversation

    async def upload(request: Request) -> Response:
        admit(request)
        conversation = await authorise(request)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_FILE_BYTES:
            raise TooLong("file", int(length), MAX_FILE_BYTES, "bytes")
        attachment = await store.save(conversation, request.query_params.get("name", ""), request.stream())
        return JSONResponse(attachment.data(), 201, {"Cache-Control": "no-store"})

    async def download(request: Request) -> Response:
        conversation = await authorise(request)
        found = await store.find(conversation, [str(request.path_params["id"])])
        if not found:
            raise NotFound("there is no such file in this conversation")
        file = found[0]
        # Strangers' bytes on our origin: shown as the type that was found in them or not at all, with no power.
        how = "attachment" if file.kind == "pdf" else "inline"
        headers = {
            "Content-Disposition": f"{how}; filename*=UTF-8''{quote(file.name, safe='')}",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "private, max-age=3600, immutable",
            "Referrer-Policy": "no-referrer",
        }
        return FileResponse(store.path(conversation, file.id), headers=headers, media_type=file.mime)

    def door(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Answer preflights, errors in one shape, and the CORS headers of pages that may ask."""

        async def handle(request: Request) -> Response:
            if not allows(request):
                return JSONResponse({"error": {"code": "origin", "message": "not from this page"}}, 403)
            if request.method == "OPTIONS":
                response = Response(status_code=204)
                response.headers["Access-Control-Allow-Methods"] = "GET, POST"
                response.headers["Access-Control-Allow-Headers"] = f"Authorization, Content-Type, {IDENTITY_HEADER}"
                response.headers["Access-Control-Max-Age"] = "600"
            else:
                try:
                    response = await endpoint(request)
                except ClientDisconnect:
                    response = Response(status_code=400)  # nobody reads it
                except BotError as exc:
                    response = _refusal(exc)
            if origin := request.headers.get("origin"):
                response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin, Authorization, Cookie"
            return response

        return handle

    path = "/v1/conversations/{conversation}/attachments"
    return [
        Route(path, door(upload), methods=["POST", "OPTIONS"]),
        Route(f"{path}/{{id}}", door(download), methods=["GET", "OPTIONS"]),
    ]


async def sweep_unused(
    store: AttachmentStore, events_of: Callable[[str], Awaitable[Sequence[Event]]], max_age_s: float = 24 * 3600.0
) -> int:
    """
    Remove files that were uploaded and never sent (return how many), and those of conversations that are gone.

    Args:
        events_of: the log of a conversation; raises UnknownConversation where there is none (any more).
        max_age_s: younger ones may still be sent.
    """
    n = 0
    for conversation in await store.conversations():
        try:
            events = await events_of(conversation)
        except UnknownConversation:
            await store.delete(conversation)
            continue
        used = {file["id"] for event in events for file in event.data.get("attachments", ())}
        n += await store.sweep(used, conversation, max_age_s)
    return n


def _refusal(error: BotError) -> JSONResponse:
    """Return the `failed` frame of an error as a response."""
    fields: dict[str, Any] = json.loads(dump_failed(error))
    headers = {"Cache-Control": "no-store"}
    if error.retry_after_s is not None:
        headers["Retry-After"] = f"{error.retry_after_s:.0f}"
    shown = {name: fields[name] for name in ("code", "message", "retryable", "retry_after_s") if name in fields}
    return JSONResponse({"error": shown}, STATUS.get(error.code, 500), headers)
