"""
Who may use the endpoints that are for the merchant's own programs: metrics and OpenAI's API.

With a key (`ZHANGGUI_API_KEY`) whoever sends it; without one only this machine. Visitors' and agents' endpoints have
gates of their own. A pure ASGI layer, since FastAPI's dependencies do not cover what is mounted or added later.
"""

from __future__ import annotations

import hmac
import json

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bot.limits import is_loopback

PROTECTED = ("/metrics", "/v1/chat", "/v1/models", "/v1/completions", "/v1/embeddings", "/v1/files", "/v1/fine_tuning")


class KeyGate:
    """Lets a request for a protected path through, or answers 401 or 403 in OpenAI's error shape."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_protected(scope["path"]) and (refusal := self._refusal(scope)) is not None:
            await _refuse(send, *refusal)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str, str] | None:
        """Return (status, code, message), or None where the request may pass."""
        if self._key is None:
            client = scope.get("client")
            if client and is_loopback(client[0]):
                return None
            return 403, "forbidden", "this server answers here to its own machine only; it has no ZHANGGUI_API_KEY"
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key.encode()):
            return None
        return 401, "invalid_api_key", "send the header Authorization: Bearer with this server's key"


def is_protected(path: str) -> bool:
    """Return whether `path` needs the key."""
    return any(path == each or path.startswith(f"{each}/") for each in PROTECTED)


async def _refuse(send: Send, status: int, code: str, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
