"""The inbox in a real browser against the real server: agents and visitors at once, both languages, a phone."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
from playwright.sync_api import Locator, Page, expect

from tests.web import axe
from tests.web.chat_page import OpenPage, ask, bubbles, replies, start
from tests.web.real_server import PASSWORD, RealServer

pytestmark = pytest.mark.timeout(480)
SMALL_PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    running = RealServer(tmp_path_factory.mktemp("inbox"))
    try:
        running.up()
        running.add_agent("li", "李娜", "merchant")
        running.add_agent("emma", "Emma")
        yield running
    finally:
        running.down()


def png(width: int, height: int) -> bytes:
    """A picture of one colour."""

    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    rows = (b"\0" + b"\x2f\x6f\x4f" * width) * height
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def sign_in(page: Page, login: str) -> Page:
    page.locator("input[name=login]").fill(login)
    page.locator("input[name=password]").fill(PASSWORD)
    page.locator("button[type=submit]").click()
    expect(page.locator(".desk")).to_be_visible()
    expect(page.locator(".connection[data-is=off]")).to_have_count(0)
    return page


def tab(page: Page, name: str) -> None:
    page.locator(f"button[data-tab={name}]").click()


def card(page: Page, visitor: Page) -> Locator:
    """The entry of a visitor's conversation in an agent's list."""
    script = (
        'Object.keys(localStorage).map((key) => localStorage[key].match(/"conversation":"([^"]+)/)?.[1]).find(Boolean)'
    )
    return page.locator(f"button.card[data-id='{visitor.evaluate(script)}']")


def write(page: Page, text: str) -> None:
    page.locator(".composer textarea").fill(text)
    send(page)


def send(page: Page) -> None:
    """Enter, once the page knows that the conversation is this agent's; before, it is rightly ignored."""
    button = page.locator(".composer").get_by_role("button", name=re.compile("^(Send|发送|Add note|添加备注)$"))
    expect(button).to_be_enabled()
    page.locator(".composer textarea").press("Enter")


def wants_a_human(page: Page, text: str) -> Page:
    """A visitor who asks something, then for a human."""
    start(page)
    ask(page, text)
    expect(replies(page)).to_have_count(1)
    page.locator("zhanggui-chat .under .pill").click()
    expect(page.locator("zhanggui-chat .status")).to_have_text(re.compile("转接|Calling"))
    return page


def test_two_agents_and_three_visitors_at_once(open_url: OpenPage, server: RealServer) -> None:
    li = sign_in(open_url(f"{server.url}inbox", "zh"), "li")
    emma = sign_in(open_url(f"{server.url}inbox", "en", size=SMALL_PHONE, has_touch=True, is_mobile=True), "emma")
    chen = wants_a_human(open_url(server.url, "zh"), "枕头可以退货吗？")
    tom = wants_a_human(open_url(server.url, "en"), "How long does delivery take?")
    wu = wants_a_human(open_url(server.url, "zh"), "发票怎么开？")

    # Both see the queue live; one accepts, and it leaves the other's queue.
    for page in (li, emma):
        expect(page.locator("button.card")).to_have_count(3)
    card(li, chen).click()
    expect(li.locator(".row.bot .bubble")).not_to_have_count(0)
    expect(li.locator(".side")).to_contain_text("枕头可以退货吗")
    expect(li.locator(".side ul.sources li")).not_to_have_count(0)
    li.get_by_role("button", name="接待", exact=True).click()
    expect(emma.locator("button.card")).to_have_count(2)
    expect(chen.locator("zhanggui-chat .status")).to_have_text("李娜 为您服务")
    card(emma, tom).tap()
    emma.get_by_role("button", name="Accept", exact=True).tap()
    expect(tom.locator("zhanggui-chat .status")).to_have_text("You are talking to Emma")
    assert emma.evaluate("document.documentElement.scrollWidth") <= 360

    # They talk, the bot is silent, typing shows, and a note stays inside.
    li.locator(".composer textarea").press_sequentially("您好")
    expect(chen.locator("zhanggui-chat .bubble.wait")).to_contain_text("李娜 正在输入")
    write(li, "您好，我来帮您看看。")
    expect(bubbles(chen, "agent")).to_have_text("您好，我来帮您看看。")
    expect(chen.locator("zhanggui-chat .row.agent .name")).to_contain_text("李娜")
    li.locator(".modes button").nth(1).click()
    write(li, "老客户，请优先处理")
    expect(li.locator(".row.note .bubble")).to_have_text("老客户，请优先处理")
    chen.locator("zhanggui-chat .box textarea").press_sequentially("谢谢")
    expect(li.locator(".typing")).to_have_text("访客正在输入…")
    ask(chen, "谢谢，那请帮我登记")
    expect(li.locator(".row.visitor .bubble").last).to_have_text("谢谢，那请帮我登记")
    assert "老客户" not in chen.locator("zhanggui-chat .rows").inner_text()
    expect(replies(chen)).to_have_count(1)
    write(emma, "Hello, this is Emma. One moment please.")
    expect(bubbles(tom, "agent")).to_have_text("Hello, this is Emma. One moment please.")

    # The third goes to one agent, who hands it to the other; what was said comes along.
    tab(li, "waiting")
    card(li, wu).click()
    li.get_by_role("button", name="接待", exact=True).click()
    li.get_by_role("button", name="转交").click()
    li.locator("dialog label.choice", has_text="Emma").click()
    li.locator("dialog").get_by_role("button", name="转交").click()
    expect(wu.locator("zhanggui-chat .status")).to_have_text("Emma 为您服务")
    emma.get_by_role("button", name="Back", exact=True).first.tap()
    tab(emma, "mine")
    card(emma, wu).tap()
    expect(emma.locator(".row.visitor .bubble").first).to_have_text("发票怎么开？")
    emma.get_by_role("button", name="Back to bot").tap()
    expect(wu.locator("zhanggui-chat .status")).to_have_text("在线 · AI 助手")
    ask(wu, "满多少包邮？")
    expect(replies(wu).last).to_contain_text("99")

    # A reload loses nothing, on either side.
    li.reload()
    tab(li, "mine")
    card(li, chen).click()
    expect(li.locator(".row.note .bubble")).to_have_text("老客户，请优先处理")
    li.get_by_role("button", name="结束", exact=True).click()
    expect(chen.get_by_role("button", name="开始新会话")).to_be_visible()
    tom.reload()
    expect(bubbles(tom, "agent")).to_have_text("Hello, this is Emma. One moment please.")


def test_help_for_the_agent_suggestions_canned_replies_and_faq_drafts(open_url: OpenPage, server: RealServer) -> None:
    li = sign_in(open_url(f"{server.url}inbox", "en"), "li")
    li.locator("button.me").click()
    li.locator("dialog").get_by_role("button", name="Canned replies").click()
    new = li.locator("dialog form").first
    new.get_by_label("Shortcut").fill("thanks")
    new.get_by_label("Chinese").fill("感谢您的耐心等待。")
    new.get_by_label("English").fill("Thank you for waiting.")
    new.get_by_role("button", name="Add").click()
    expect(li.locator("dialog form")).to_have_count(2)
    li.keyboard.press("Escape")

    visitor = wants_a_human(open_url(server.url, "en"), "Is shipping free?")
    card(li, visitor).click()
    expect(li.get_by_role("button", name="Accept", exact=True)).to_be_visible()
    li.keyboard.press("a")  # the keyboard accepts
    expect(visitor.locator("zhanggui-chat .status")).to_have_text("You are talking to 李娜")
    box = li.locator(".composer textarea")
    box.press_sequentially("/tha")
    expect(li.get_by_role("option")).to_have_count(1)
    box.press("Enter")
    expect(box).to_have_value("Thank you for waiting.")
    send(li)
    expect(bubbles(visitor, "agent")).to_have_text("Thank you for waiting.")

    visitor.locator("zhanggui-chat input[type=file]").set_input_files(
        {"name": "shelf.png", "mimeType": "image/png", "buffer": png(40, 30)}
    )
    expect(visitor.locator("zhanggui-chat .tray progress")).to_have_count(0)
    ask(visitor, "This one")
    expect(visitor.locator("zhanggui-chat .row.visitor canvas")).to_have_accessible_name("shelf.png")
    picture = li.get_by_role("img", name="shelf.png")
    expect(picture).to_be_visible()
    assert picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 40

    li.get_by_role("button", name="Suggest").click()
    suggestion = li.locator(".suggestions article").first
    expect(suggestion).to_contain_text("99")
    suggestion.get_by_role("button", name="Use and edit").click()
    expect(box).to_have_value(re.compile("99"))
    assert visitor.locator("zhanggui-chat .row.agent .bubble:not(.wait)").count() == 1  # nothing was sent
    box.fill("Yes, delivery is free from ¥99, and today it leaves before four.")
    send(li)
    expect(bubbles(visitor, "agent").last).to_contain_text("before four")
    expect(li.locator(".row.agent:not(.unsent)")).to_have_count(2)

    li.locator(".row.agent").last.get_by_role("button", name="Make an FAQ draft").click()
    expect(li.locator(".notice")).to_have_text("The draft waits for review")
    tab(li, "drafts")
    expect(li.get_by_label("Answer")).to_have_value(re.compile("before four"))
    li.get_by_role("button", name="Reject").click()
    expect(li.locator(".lists .empty")).to_have_text("No drafts to review")


def test_a_restart_of_the_server_loses_no_reply_of_an_agent(open_url: OpenPage, server: RealServer) -> None:
    emma = sign_in(open_url(f"{server.url}inbox", "en"), "emma")
    visitor = wants_a_human(open_url(server.url, "en"), "Which carriers do you use?")
    card(emma, visitor).click()
    emma.get_by_role("button", name="Accept", exact=True).click()
    expect(visitor.locator("zhanggui-chat .status")).to_have_text("You are talking to Emma")
    # The visitor may hear of it before Emma's own page does; what she has not seen she cannot write to.
    expect(emma.get_by_role("button", name="Accept", exact=True)).to_have_count(0)
    server.down()
    try:
        expect(emma.locator(".connection")).to_be_visible()
        write(emma, "Written while nobody was there")
        expect(emma.locator(".row.unsent")).to_contain_text("Will be sent once connected")
    finally:
        server.up()  # or every test after a failure here would fail too
    for page in (emma, visitor):
        page.evaluate("dispatchEvent(new Event('online'))")
    expect(bubbles(visitor, "agent")).to_have_text("Written while nobody was there")
    expect(emma.locator(".row.unsent")).to_have_count(0)
    expect(emma.locator(".row.agent .bubble")).to_have_count(1)


def test_a_message_left_by_e_mail_is_seen_and_done(open_url: OpenPage, server: RealServer) -> None:
    visitor = start(open_url(server.url, "zh"))
    visitor.get_by_role("button", name="更多选项").click()
    visitor.get_by_role("button", name="留言").click()
    visitor.get_by_role("button", name="提交留言").click()
    expect(visitor.get_by_role("alert").first).to_have_text("请填写有效的邮箱地址，例如 name@example.com")
    visitor.get_by_label("电子邮箱").fill("guest@mail.example")
    visitor.get_by_label("留言内容").fill("想换一个枕头，请联系我")
    visitor.get_by_role("button", name="提交留言").click()
    expect(visitor.locator("zhanggui-chat .row.visitor")).to_contain_text("guest@mail.example")
    li = sign_in(open_url(f"{server.url}inbox", "zh"), "li")
    tab(li, "left")
    expect(li.locator(".paper")).to_contain_text("想换一个枕头，请联系我")
    li.get_by_role("button", name="已处理").click()
    expect(li.locator(".lists .empty")).to_have_text("没有待处理的留言")


def test_a_wrong_password_says_no_more_than_that_and_signing_out_ends_the_session(
    open_url: OpenPage, server: RealServer
) -> None:
    page = open_url(f"{server.url}inbox", "zh")
    page.locator("input[name=login]").fill("li")
    page.locator("input[name=password]").fill("not the password")
    page.locator("button[type=submit]").click()
    expect(page.get_by_role("alert")).to_have_text("账号或密码不对")
    sign_in(page, "li")
    page.locator("button.me").click()
    page.locator("dialog").get_by_role("button", name="退出登录").click()
    expect(page.locator("form")).to_be_visible()
    page.reload()
    expect(page.locator("input[name=login]")).to_be_visible()


def test_axe_finds_nothing_wrong_with_the_inbox(open_url: OpenPage, server: RealServer) -> None:
    source = axe.script()
    visitor = wants_a_human(open_url(server.url, "en"), "Can I return something?")
    for language, scheme, size in (("en", "light", None), ("zh", "dark", None), ("en", "dark", SMALL_PHONE)):
        page = open_url(f"{server.url}inbox", language, color_scheme=scheme, size=size)
        expect(page.locator("input[name=login]")).to_be_visible()
        assert axe.violations(page, source) == []  # sign-in
        sign_in(page, "li")
        expect(card(page, visitor)).to_be_visible()
        assert axe.violations(page, source) == []
        card(page, visitor).click()
        expect(page.locator(".row.bot")).not_to_have_count(0)
        page.locator(".modes button").nth(1).click()
        assert axe.violations(page, source) == []
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        expect(page.locator("dialog")).to_be_visible()
        assert axe.violations(page, source) == []
    assert axe.violations(visitor, source) == []  # the widget while it waits
