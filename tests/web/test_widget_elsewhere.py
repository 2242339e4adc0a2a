"""The widget on other people's pages: strict policies, hostile scripts and styles, other languages; what axe says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.web.fake_server import FakeServer

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
from playwright.sync_api import Page, Route, expect

from tests.web import axe
from tests.web.chat_page import PHONE, OpenPage, ask, bubbles, launcher, panel, replies, start

ARABIC = {
    "lang": "ar",
    "dir": "rtl",
    "title": "خدمة العملاء",
    "online": "متصل · مساعد آلي",
    "placeholder": "اكتب سؤالك…",
    "human": "التحدث إلى موظف",
    "send": "إرسال",
    "more": "خيارات",
    "close": "تصغير",
    "disclosure": "مساعد آلي، وقد يخطئ",
}
PIXEL = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f\x15\xc4\x89\x00\x00\x00"
    b"\rIDATx\x9cc\xf8\xcf\xc0\xf0\x1f\x00\x05\x00\x01\xff\x89\x99=\x1d\x00\x00\x00\x00IEND\xaeB`\x82"
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def open_page(open_url: OpenPage, server: FakeServer) -> OpenPage:
    return partial(open_url, server.url)


def shop_page(server: FakeServer, attributes: str = "", head: str = "", body: str = "") -> str:
    """Put a shop's page on the server; return its path."""
    server.pages["/shop.html"] = (
        f"<!doctype html><html lang=en><head><title>Shop</title><link rel=icon href=/favicon.svg>{head}</head>"
        f"<body><main><h1>Shop</h1>{body}</main><script type=module src=/widget.js {attributes}></script></body></html>"
    )
    return f"{server.url}shop.html"


# ---------------------------------------------------------------------- hostile pages


def test_a_page_with_frozen_and_spoiled_globals_does_not_stop_it(open_url: OpenPage, server: FakeServer) -> None:
    spoil = """<script>
      Array.prototype.toJSON = function () { return "spoiled"; };
      Array.prototype.first = function () { return this[0]; };
      Object.prototype.extend = function () {};
      String.prototype.toJSON = function () { return "spoiled"; };
      Element.prototype.show = Element.prototype.hide = Element.prototype.toggle = function () { throw Error("page"); };
      window.$ = window.h = window.icon = null;
      const kinds = [Object, Array, Function, String, Map, Promise, Element, HTMLElement, Node, EventTarget, WebSocket];
      for (const each of kinds) Object.freeze(each.prototype);
      for (const each of [JSON, Math, Reflect, Object, Array, Promise]) Object.freeze(each);
    </script>"""
    page = open_url(shop_page(server, head=spoil))
    start(page)
    ask(page, "CUT it")
    expect(replies(page)).to_contain_text("survives a cut connection")
    page.reload()
    expect(replies(page)).to_have_count(1)


def test_a_strict_policy_is_enough_and_hostile_styles_and_high_layers_do_not_matter(
    open_url: OpenPage, server: FakeServer
) -> None:
    server.pages["/bad.css"] = (
        "* { all: unset !important; display: none !important } html, body { display: block !important;"
        " transform: translateX(40px) !important } .cover { display: block !important; position: fixed !important;"
        " inset: 0 !important; z-index: 2147483647 !important; background: red !important }"
    )
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel=stylesheet href=/bad.css>'
    page = open_url(shop_page(server, 'data-position="right"', head=head, body="<div class=cover></div>"))
    start(page)  # a click lands on what is on top
    ask(page, "Can I return something?")
    expect(replies(page)).to_have_count(1)
    box = panel(page).bounding_box()
    assert box is not None
    assert (box["width"], round(box["x"] + box["width"])) == (404, 1260)  # the page's transform moves nothing of ours
    assert page.locator("zhanggui-chat h2").evaluate("(e) => getComputedStyle(e).fontSize") == "16px"


# ---------------------------------------------------------------------- settings


def test_another_language_is_a_json_file_and_reads_from_right_to_left(open_url: OpenPage, server: FakeServer) -> None:
    server.pages["/ar.json"] = json.dumps(ARABIC)
    page = start(open_url(shop_page(server, "data-strings=/ar.json data-lang=ar data-label='محادثة'")))
    expect(launcher(page)).to_have_accessible_name("Minimise chat")
    expect(page.locator("zhanggui-chat .status")).to_have_text("متصل · مساعد آلي")
    assert server.sent("hello")[0]["locale"] == "ar"
    expect(panel(page)).to_have_attribute("dir", "rtl")
    ask(page, "مرحبا")
    expect(replies(page)).to_have_count(1)
    mine, send = bubbles(page, "visitor").bounding_box(), page.locator("zhanggui-chat .send").bounding_box()
    box = panel(page).bounding_box()
    assert mine is not None
    assert send is not None
    assert box is not None
    middle = box["x"] + box["width"] / 2
    assert mine["x"] < middle  # what one said stands at the end of the line, and so does the button
    assert send["x"] < middle
    expect(page.get_by_role("button", name="Stop this reply")).to_have_count(0)  # what the file lacks is English
    assert page.locator("zhanggui-chat .scroll").evaluate("(e) => e.scrollWidth <= e.clientWidth")
    page.get_by_role("button", name="خيارات").click()
    page.get_by_role("button", name="繁體中文").click()
    expect(page.locator("zhanggui-chat .status")).to_have_text("線上 · AI 助理")
    expect(panel(page)).to_have_attribute("dir", "ltr")


def test_traditional_chinese_is_chosen_by_the_page(open_url: OpenPage, server: FakeServer) -> None:
    page = open_url(shop_page(server, "data-lang=zh-TW"))
    expect(launcher(page)).to_have_accessible_name("開啟客服聊天")
    start(page)
    expect(page.locator("zhanggui-chat .under .pill")).to_have_text("轉真人客服")


def test_colour_position_avatar_greeting_hours_and_scheme_are_settings(open_url: OpenPage, server: FakeServer) -> None:
    style = "<style>zhanggui-chat { --zhanggui-radius: 4px; --zhanggui-bottom: 70px }</style>"
    attributes = (
        "data-color=rebeccapurple data-position=left data-theme=dark data-avatar=/store/images/QH1001.svg"
        " data-greeting='Welcome to the shop' data-hours='Mon to Fri, 9 to 18'"
    )
    page = start(open_url(shop_page(server, attributes, head=style), color_scheme="light"))
    expect(bubbles(page, "bot").first).to_have_text("Welcome to the shop")
    expect(page.locator("zhanggui-chat .hours")).to_have_text("Mon to Fri, 9 to 18")
    look = panel(page).evaluate("(e) => [getComputedStyle(e).borderRadius, getComputedStyle(e).colorScheme]")
    assert look == ["4px", "dark"]
    header = page.locator("zhanggui-chat .head").evaluate("(e) => getComputedStyle(e).backgroundColor")
    assert header == "rgb(102, 51, 153)"
    place = launcher(page).evaluate("(e) => [getComputedStyle(e).left, getComputedStyle(e).bottom]")
    assert place == ["20px", "70px"]
    avatar = page.locator("zhanggui-chat .face img")
    assert avatar.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 0


# ---------------------------------------------------------------------- what is typed, sent and kept


def test_what_was_typed_survives_a_reload_and_is_sent_once(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page("en"))
    box = page.locator("zhanggui-chat .box textarea")
    box.fill("half a thou")
    page.reload()
    expect(box).to_have_value("half a thou")
    box.press("Enter")
    expect(replies(page)).to_have_count(1)
    page.reload()
    expect(replies(page)).to_have_count(1)
    expect(box).to_have_value("")
    assert len(server.sent("ask")) == 1


def test_focus_stays_in_the_dialog_and_sheets_give_it_back(open_page: OpenPage) -> None:
    page = start(open_page("en"))
    ask(page, "hello")
    expect(replies(page)).to_have_count(1)
    inside = "document.activeElement.shadowRoot?.activeElement?.closest('.panel') != null"
    for key in ["Tab"] * 14 + ["Shift+Tab"] * 14:
        page.keyboard.press(key)
        assert page.evaluate(inside)
    more = page.get_by_role("button", name="More options")
    more.focus()
    page.keyboard.press("Enter")
    sheet = "document.activeElement.shadowRoot.activeElement.closest('.sheet') != null"
    for _ in range(10):
        assert page.evaluate(sheet)
        page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    expect(more).to_be_focused()
    page.keyboard.press("Escape")
    expect(launcher(page)).to_be_focused()


def test_the_sound_is_off_until_it_is_chosen_and_the_transcript_is_a_text_file(open_page: OpenPage) -> None:
    page = start(open_page("en"))
    page.evaluate(
        """() => {
          window.tones = 0;
          const real = AudioContext.prototype.createOscillator;
          AudioContext.prototype.createOscillator = function () { tones += 1; return real.call(this); };
        }"""
    )
    ask(page, "Can I return something?")
    expect(replies(page)).to_have_count(1)
    page.get_by_role("button", name="More options").click()
    sound = page.get_by_role("switch", name="Sound for new messages")
    expect(sound).to_have_attribute("aria-checked", "false")
    assert page.evaluate("tones") == 0
    sound.click()
    expect(sound).to_have_attribute("aria-checked", "true")
    assert page.evaluate("tones") == 2
    with page.expect_download() as download:
        page.get_by_role("button", name="Download transcript").click()
    assert re.fullmatch(r"chat-\d{4}-\d\d-\d\d\.txt", download.value.suggested_filename)
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.index("You\nCan I return something?") < text.index("AI assistant\n")
    assert "[1] Returns without a reason · policies/returns.en.md:3" in text


def test_the_place_in_the_queue_moves_and_outside_hours_a_message_can_be_left(
    open_page: OpenPage, server: FakeServer
) -> None:
    page = start(open_page("en"))
    page.get_by_role("button", name="Talk to a human").click()
    server.wait_for("handoff")
    server.say("state", state="waiting", position=3, expected_wait_s=150)
    line = page.locator("zhanggui-chat .line", has_text="in line")
    expect(line).to_have_text("You are number 3 in line, about 3 min to wait")
    server.tell({"type": "queue", "position": 1, "expected_wait_s": None})
    expect(line).to_have_text("You are number 1 in line")
    server.say("state", state="waiting", open=False, opens_at="2026-11-23T01:00:00.000Z")
    expect(page.locator("zhanggui-chat .away")).to_contain_text("Our team is away until")
    page.get_by_role("button", name="Leave a message").click()
    page.get_by_label("E-mail address").fill("guest@mail.example")
    page.get_by_label("Your message").fill("Please call me back")
    page.get_by_role("button", name="Send message").click()
    left = server.wait_for("leave_message")
    assert [(frame["email"], frame["text"]) for frame in left] == [("guest@mail.example", "Please call me back")]
    expect(page.locator("zhanggui-chat .row.visitor")).to_contain_text("reply to guest@mail.example")


def test_files_are_uploaded_with_progress_refused_with_a_reason_and_sent_with_the_text(
    open_page: OpenPage, server: FakeServer
) -> None:
    page = start(open_page("en"))
    uploads: list[str] = []

    def store(route: Route) -> None:
        if route.request.method == "GET":
            route.fulfill(body=PIXEL, content_type="image/png")
            return
        uploads.append(route.request.headers["authorization"])
        if len(uploads) == 1:
            route.fulfill(status=503, json={"error": {"code": "storage_unavailable", "message": "", "retryable": True}})
        else:
            meta = {"id": "a_1", "kind": "image", "mime": "image/png", "name": "shelf.png", "size_bytes": 70}
            route.fulfill(status=201, json=meta)

    page.route("**/v1/conversations/*/attachments**", store)
    chooser = page.locator("zhanggui-chat input[type=file]")
    tray = page.locator("zhanggui-chat .tray li")
    chooser.set_input_files({"name": "page.html", "mimeType": "text/html", "buffer": b"<p>"})
    expect(tray).to_contain_text("page.html: only images")
    tray.get_by_role("button", name="Remove page.html").click()
    chooser.set_input_files({"name": "big.png", "mimeType": "image/png", "buffer": b"x" * (2**20 + 1)})
    expect(tray).to_contain_text("big.png: files may have at most 1 MB")
    tray.get_by_role("button", name="Remove big.png").click()
    chooser.set_input_files({"name": "shelf.png", "mimeType": "image/png", "buffer": PIXEL})
    expect(tray).to_contain_text("shelf.png was not uploaded")
    tray.get_by_role("button", name="Try again").click()
    expect(page.locator("zhanggui-chat .tray progress")).to_have_count(0)
    ask(page, "Does this fit?")
    sent = server.wait_for("ask")[0]
    assert (sent["text"], sent["attachments"]) == ("Does this fit?", ["a_1"])
    assert uploads == ["Bearer secret1"] * 2
    expect(tray).to_have_count(0)
    expect(page.locator("zhanggui-chat .row.visitor canvas")).to_have_accessible_name("shelf.png")


def test_a_picture_that_is_pasted_or_dropped_is_taken_too(open_page: OpenPage) -> None:
    page = start(open_page("en"))
    meta = {"id": "a_1", "kind": "image", "mime": "image/png", "name": "x.png", "size_bytes": 70}
    page.route("**/v1/conversations/*/attachments**", lambda route: route.fulfill(status=201, json=meta))
    for target, event, field in (("textarea", "paste", "clipboardData"), (".panel", "drop", "dataTransfer")):
        page.evaluate(
            """([target, event, field]) => {
              const data = new DataTransfer();
              data.items.add(new File(["x"], `${event}.png`, { type: "image/png" }));
              const node = document.querySelector("zhanggui-chat").shadowRoot.querySelector(target);
              const Kind = event === "paste" ? ClipboardEvent : DragEvent;
              node.dispatchEvent(new Kind(event, { [field]: data, bubbles: true, cancelable: true }));
            }""",
            [target, event, field],
        )
    expect(page.locator("zhanggui-chat .tray li")).to_have_count(2)


def test_a_restart_that_was_announced_is_not_shown_as_a_fault(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page("en"))
    server.tell({"type": "reconnect", "after_ms": 300, "reason": "restart"})
    expect(page.locator("zhanggui-chat .status")).to_have_text("The server restarts; back in a moment…")
    server.down()
    server.up()
    expect(page.locator("zhanggui-chat .status")).to_have_text("Online · AI assistant")
    assert len(server.sent("hello")) == 2


def test_only_the_stores_own_pictures_are_loaded(open_url: OpenPage, server: FakeServer) -> None:
    page = open_url(shop_page(server))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    start(page)
    ask(page, "hello")
    expect(replies(page)).to_have_count(1)
    remote = {"kind": "product", "id": "x", "title": "Remote", "price": 1, "image": "https://evil.example/x.png"}
    order = {"kind": "order", "id": "1001", "status": "shipped", "carrier": "SF", "tracking": "SF123", "total": "59.00",
             "currency": "CNY", "items": ["Lamp x 1"]}  # fmt: skip
    server.say("message", role="bot", turn="t9", text="See", outcome="direct", finish="stop", cards=[remote, order])
    expect(page.locator("zhanggui-chat .card .pic img")).to_have_count(0)
    expect(page.locator("zhanggui-chat .order")).to_contain_text(re.compile(r"Order 1001\s*Shipped"))
    expect(page.locator("zhanggui-chat .order")).to_contain_text("SF SF123")
    assert not [url for url in asked if "evil.example" in url]


# ---------------------------------------------------------------------- axe


@pytest.mark.parametrize(("language", "scheme", "size"), [("en", "light", None), ("zh", "dark", PHONE)])
def test_axe_finds_nothing_wrong_in_any_state(
    open_page: OpenPage, server: FakeServer, language: str, scheme: str, size: dict[str, int] | None
) -> None:
    source = axe.script()
    page = open_page(language, color_scheme=scheme, size=size, reduced_motion="reduce")

    def check(state: str) -> None:
        assert axe.violations(page, source) == [], state

    check("closed")
    start(page)
    check("open")
    question = "可以退货吗？" if language == "zh" else "Can I return something?"
    ask(page, question)
    expect(replies(page)).to_have_count(1)
    page.locator("zhanggui-chat .source").first.click()
    check("reply with its source")
    ask(page, "SLOW")
    expect(page.locator("zhanggui-chat .caret")).to_be_visible()
    check("mid-reply")
    page.locator("zhanggui-chat .send").click()
    expect(replies(page)).to_have_count(2)
    ask(page, "FAIL")
    expect(page.locator("zhanggui-chat .trouble")).to_be_visible()
    check("error")
    server.say("state", state="waiting", position=2, open=False)
    check("waiting")
    open_sheets(page, check)
    server.say("message", role="agent", text="Hello!", agent={"id": "a", "name": "Li"})
    server.say("state", state="closed")
    expect(page.locator("zhanggui-chat .again")).to_be_visible()
    check("ended")


def open_sheets(page: Page, check: Any) -> None:
    more = page.locator("zhanggui-chat .head .buttons button").first
    more.click()
    check("menu")
    page.locator("zhanggui-chat .list button").last.click()
    page.get_by_role("radio").nth(3).click()
    check("rating")
    page.keyboard.press("Escape")
    more.click()
    page.locator("zhanggui-chat .list button").nth(2).click()
    page.locator("zhanggui-chat .choices .primary").click()
    check("message with faults")
    page.keyboard.press("Escape")
