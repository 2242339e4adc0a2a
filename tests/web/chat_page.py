"""What the browser tests say of a page with the widget: find, open, ask. Knows no server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

OpenPage = Callable[..., "Page"]
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


def panel(page: Page) -> Locator:
    return page.locator("zhanggui-chat .panel")


def launcher(page: Page) -> Locator:
    return page.locator("zhanggui-chat .launcher")


def bubbles(page: Page, role: str) -> Locator:
    return page.locator(f"zhanggui-chat .row.{role} .bubble")


def replies(page: Page) -> Locator:
    """Finished replies: those that can be rated."""
    return page.locator("zhanggui-chat .row.bot:has(.act)")


def ask(page: Page, text: str) -> None:
    box = page.locator("zhanggui-chat .box textarea")
    box.fill(text)
    box.press("Enter")


def start(page: Page) -> Page:
    """Open the panel and wait until it is connected."""
    from playwright.sync_api import expect

    launcher(page).click()
    expect(page.locator("zhanggui-chat .status")).to_have_attribute("data-is", "online")
    return page
