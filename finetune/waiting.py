"""
Waiting for a running server to serve what was published: polls /readyz until it does, or says why not.

Knows HTTP and what /readyz says of releases (docs/protocol.md); nothing of releases on disk.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from bot.errors import BotError, MerchantError

NOTICE_S = 20.0  # a server looks at the pointer once a second, also while it starts a release
TIMEOUT_S = 900.0  # a base model may have to be fetched first


class NotServed(BotError):
    """The release is published, and the server does not serve it."""

    code = "not_served"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def wait_until_served(
    url: str,
    release: str | None,
    *,
    notice_s: float = NOTICE_S,
    timeout_s: float = TIMEOUT_S,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """
    Return what the server says of releases once new turns are answered by `release`; blocks until then.

    Args:
        url: of the server, or of its /ws or /readyz.
        release: None: nothing is published, so that the shipped release is served.
        notice_s: how long the server may take to see that something was published.
        tell: is given one line when how far the server is changes.

    Raises:
        MerchantError: the URL is none.
        NotServed: the server cannot be reached, follows no releases, could not start this one, or took too long.
    """
    address = readyz_of(url)
    began = time.monotonic()
    said = ""
    while True:
        status = _status(address)
        if status is None or not status.get("follows"):
            raise NotServed(f"{url}: the server follows no releases: start it with --engine vllm and without --model")
        passed = time.monotonic() - began
        if status["wanted"] == release:
            if status["state"] == "serving":
                return status
            if status["state"] == "failed":
                raise NotServed(f"{url}: {status['name'] or 'nothing'} is still served: {status['detail']}")
        elif passed > notice_s:
            raise NotServed(
                f"{url}: the server follows {status['wanted'] or 'no published release'}, not "
                f"{release or 'none'}: it has another folder of releases (serve.py --releases)"
            )
        if passed > timeout_s:
            raise NotServed(f"{url}: not served after {passed:.0f} s: {status['state']}, {status['detail']}")
        now = f"{status['state']}: {status['detail']}" if status["detail"] else status["state"]
        if now != said:
            said = now
            tell(now)
        time.sleep(0.5)


def readyz_of(url: str) -> str:
    """Return the address of a server's /readyz; raises MerchantError where `url` is none."""
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    if scheme not in ("http", "https") or not parts.netloc:
        raise MerchantError(f"--wait: {url!r} is no address of a server; write http://HOST:PORT")
    path = parts.path.rstrip("/").removesuffix("/readyz").removesuffix("/ws")
    return urllib.parse.urlunsplit((scheme, parts.netloc, f"{path}/readyz", "soft=1", ""))


def _status(address: str) -> dict[str, Any] | None:
    """Return the `release` of /readyz; None where the server's engine is none of releases."""
    try:
        with urllib.request.urlopen(address, timeout=10) as response:  # noqa: S310 - the scheme was checked
            body = json.load(response)
        status: dict[str, Any] | None = body["release"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise NotServed(f"{address}: the server cannot be asked ({exc!r})") from None
    return status
