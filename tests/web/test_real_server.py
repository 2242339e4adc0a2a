"""The widget and the demo page against the real server, `serve.py --engine none`: the demo store's approved answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
from playwright.sync_api import expect

from tests.web.chat_page import PHONE, OpenPage, ask, bubbles, launcher, panel, replies, start
from tests.web.real_server import RealServer

pytestmark = pytest.mark.timeout(480)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    running = RealServer(tmp_path_factory.mktemp("server"))
    try:
        running.up()
        yield running
    finally:
        running.down()


def test_a_chinese_question_gets_an_approved_answer_with_its_source(open_url: OpenPage, server: RealServer) -> None:
    page = start(open_url(server.url, "zh"))
    ask(page, "满多少包邮？")
    expect(replies(page)).to_contain_text("99")
    page.locator("zhanggui-chat .source").first.click()
    expect(page.locator("zhanggui-chat .quote")).to_contain_text("99")


def test_an_english_question_gets_an_english_answer_with_its_source(open_url: OpenPage, server: RealServer) -> None:
    page = start(open_url(server.url, "en"))
    expect(bubbles(page, "bot").first).to_contain_text("Qinghe Home")
    ask(page, "How do I return an item?")
    expect(replies(page)).to_contain_text(re.compile("return", re.I))
    expect(page.locator("zhanggui-chat .source").first).to_be_visible()


def test_the_page_shows_the_store_in_both_languages(open_url: OpenPage, server: RealServer) -> None:
    page = open_url(server.url, "zh")
    expect(page.locator("#name")).to_have_text("青禾家居")
    expect(page.locator("#grid li")).to_have_count(12)
    expect(page.locator("#promotions")).to_be_visible()
    expect(page.locator("#ready-index")).to_have_attribute("data-is", "ready")
    expect(page.locator("#ready-engine")).to_have_text("未启用 AI 模型，用审核过的答案回答")
    page.get_by_role("button", name="English").click()
    expect(page.locator("#name")).to_have_text("Qinghe Home")
    expect(page.locator("#grid li").first).to_contain_text(re.compile("[a-z]{4}"))
    picture = page.locator("#grid img").first
    assert picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 0


def test_the_widget_on_a_phone(open_url: OpenPage, server: RealServer) -> None:
    page = open_url(server.url, "zh", size=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    launcher(page).tap()
    page.locator("zhanggui-chat .quick button").first.tap()
    expect(replies(page)).to_have_count(1)
    expect(panel(page)).to_have_attribute("aria-modal", "true")


def test_what_a_visitor_writes_is_shown_as_text(open_url: OpenPage, server: RealServer) -> None:
    page = start(open_url(server.url, "en"))
    hostile = (
        '<img src=x onerror="window.pwned=1"> **bold** [x](javascript:window.pwned=1) <script>window.pwned=1</script>'
    )
    ask(page, hostile)
    expect(bubbles(page, "visitor")).to_have_text(hostile)
    assert bubbles(page, "visitor").locator("*").count() == 0
    expect(replies(page)).to_have_count(1)


def test_a_rating_a_human_and_the_end(open_url: OpenPage, server: RealServer) -> None:
    page = start(open_url(server.url, "zh"))
    ask(page, "怎么退货？")
    expect(replies(page)).to_have_count(1)
    up = replies(page).get_by_role("button", name="有帮助", exact=True)
    up.click()
    expect(up).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="转人工", exact=True).click()
    expect(page.get_by_role("button", name="已请求人工")).to_be_disabled()
    page.reload()
    expect(replies(page).get_by_role("button", name="有帮助", exact=True)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="更多选项").click()
    page.get_by_role("button", name="结束会话").click()
    page.get_by_role("radio", name="5 星").click()
    page.locator("zhanggui-chat .sheet").get_by_role("button", name="结束会话").click()
    expect(page.get_by_role("button", name="开始新会话")).to_be_visible()


def test_a_restart_of_the_server_loses_nothing(open_url: OpenPage, server: RealServer) -> None:
    page = start(open_url(server.url, "en"))
    ask(page, "Is shipping free?")
    expect(replies(page)).to_have_count(1)
    server.down()
    expect(page.locator("zhanggui-chat .status")).not_to_have_attribute("data-is", "online")
    ask(page, "How do I return an item?")
    expect(page.locator("zhanggui-chat .row.unsent")).to_have_count(1)
    server.up()
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(replies(page)).to_have_count(2)
    expect(bubbles(page, "visitor")).to_have_count(2)
    page.reload()
    expect(replies(page)).to_have_count(2)
