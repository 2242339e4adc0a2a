"""
One browser for each module of browser tests, and pages that must not complain.

Whatever a page under test says to its console, and every violation of its Content-Security-Policy, fails the test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.web.chat_page import DESKTOP, OpenPage

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

CHROMIUMS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What a cut or refused connection prints, and a refused request; nothing of ours can silence it.
EXPECTED = re.compile(
    r"WebSocket connection to|ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|of (401|503) "
)
WATCH_CSP = (
    "window.violations = []; addEventListener('securitypolicyviolation', "
    "(e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`), true);"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Module by module: while Playwright's loop runs, no asyncio test can."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
    path = next((path for path in CHROMIUMS if Path(path).exists()), None)
    if path is None:
        pytest.skip(f"no Chromium at any of {', '.join(CHROMIUMS)}; browser tests need one (apt install chromium)")
    sync_api.expect.set_options(timeout=15_000)  # the machine may be busy; what holds is seen at once
    with sync_api.sync_playwright() as runner:
        opened = runner.chromium.launch(executable_path=path, args=ARGS)
        yield opened
        opened.close()


@pytest.fixture
def open_url(browser: Browser) -> Iterator[OpenPage]:
    """`open_url(url, "zh" | "en", size=PHONE, …)`: a page of a fresh browser profile."""
    contexts = []
    pages: list[Page] = []
    said: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not EXPECTED.search(message.text):
            said.append(message.text)

    def open_(url: str, language: str = "en", *, size: dict[str, int] | None = None, **more: Any) -> Page:
        locale = "zh-CN" if language == "zh" else "en-GB"
        context = browser.new_context(locale=locale, viewport=size or DESKTOP, **more)  # type: ignore[arg-type]
        contexts.append(context)
        context.add_init_script(WATCH_CSP)
        page = context.new_page()
        pages.append(page)
        page.on("console", listen)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.set_default_timeout(15_000)
        page.goto(url)
        return page

    yield open_
    for page in pages:
        assert page.evaluate("window.violations") == []
        assert page.evaluate("window.pwned ?? null") is None
    for context in contexts:
        context.close()
    assert said == []
