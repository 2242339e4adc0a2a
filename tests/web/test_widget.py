"""
The widget and the demo page in a real browser (headless Chromium through Playwright), against `fake_server`.

Whatever a page under test says to its console, and every violation of the strict Content-Security-Policy the server
sends, fails the test.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.web.fake_server import HOSTILE, FakeServer

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
from playwright.sync_api import expect

from tests.web.chat_page import PHONE, OpenPage, ask, bubbles, launcher, panel, replies, start


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def open_page(open_url: OpenPage, server: FakeServer) -> OpenPage:
    return partial(open_url, server.url)


# ---------------------------------------------------------------------- asking


def test_a_chinese_question_is_answered_with_a_source_that_opens_its_quote(open_page: OpenPage) -> None:
    page = start(open_page("zh"))
    expect(page.locator("zhanggui-chat .status")).to_have_text("在线 · AI 助手")
    ask(page, "可以退货吗？")
    expect(replies(page)).to_contain_text("7 天内")
    expect(replies(page).locator("strong").first).to_have_text("7 天内")
    expect(replies(page).locator("ol li")).to_have_count(3)
    source = page.locator("zhanggui-chat .source").first
    expect(source).to_have_accessible_name("来源 1 七天无理由退货")
    source.click()
    expect(page.locator("zhanggui-chat .quote")).to_contain_text("自签收之日起 7 天内")
    expect(source).to_have_attribute("aria-expanded", "true")
    page.locator("zhanggui-chat .mark", has_text="2").click()
    expect(page.locator("zhanggui-chat .quote")).to_contain_text("3 个工作日内退款")


def test_an_english_question_is_answered_and_its_link_is_safe(open_page: OpenPage) -> None:
    page = start(open_page("en"))
    ask(page, "Can I return something?")
    expect(replies(page)).to_contain_text("30 days")
    expect(replies(page).locator(".tag")).to_have_text("Store's own words")
    link = replies(page).locator("a")
    expect(link).to_have_attribute("href", "https://qinghe.example/returns")
    expect(link).to_have_attribute("rel", re.compile("noopener"))


def test_text_streams_in_and_the_phase_shows_before(open_page: OpenPage, server: FakeServer) -> None:
    server.stepwise = True
    page = start(open_page())
    ask(page, "tell me how delivery works, please")
    expect(bubbles(page, "bot").last).to_have_text("Searching the store's documents")
    server.step()
    expect(bubbles(page, "bot").last).to_have_text("Thinking")
    server.step()
    expect(page.locator("zhanggui-chat .caret")).to_have_text("You")
    server.step(3)
    expect(page.locator("zhanggui-chat .caret")).to_have_text("You said: te")
    server.step(100)
    expect(replies(page)).to_contain_text("You said: tell me how delivery works, please")
    expect(page.locator("zhanggui-chat .caret")).to_have_count(0)


def test_quick_replies_cards_and_a_revised_reply(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page("zh"))
    page.locator("zhanggui-chat .quick button").first.click()
    expect(replies(page)).to_have_count(1)
    ask(page, "CARDS")
    cards = page.locator("zhanggui-chat .card")
    expect(cards).to_have_count(2)
    expect(cards.first).to_have_attribute("href", "https://qinghe.example/p/QH1001")
    expect(cards.nth(1)).not_to_have_attribute("href", re.compile("."))  # it said javascript:
    expect(cards.first).to_contain_text("¥399")
    expect(cards.nth(1)).to_contain_text("仅剩 3 件")
    ask(page, "REVISED")
    expect(bubbles(page, "bot").last).to_have_text("It costs ¥129.")


def test_enter_sends_shift_enter_does_not_and_neither_does_an_input_method(
    open_page: OpenPage, server: FakeServer
) -> None:
    page = start(open_page("zh"))
    box = page.locator("zhanggui-chat .box textarea")
    box.focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(box).to_have_value("one\ntwo")
    assert box.evaluate("(e) => e.clientHeight") > 40  # it grew
    # The Enter that picks a candidate: the browser says isComposing, or only 229 (Safari).
    press = (
        "(e, init) => e.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key: 'Enter', bubbles: true, cancelable: true, ...init }))"
    )
    box.evaluate(press, {"isComposing": True})
    box.evaluate(press, {"keyCode": 229})
    assert server.sent("ask") == []
    page.keyboard.press("Enter")
    assert server.wait_for("ask")[0]["text"] == "one\ntwo"
    expect(box).to_have_value("")
    page.keyboard.press("Enter")  # empty: nothing
    page.keyboard.type("   ")
    page.keyboard.press("Enter")
    expect(replies(page)).to_have_count(1)
    assert len(server.sent("ask")) == 1


def test_the_limit_is_counted_in_characters_and_nothing_too_long_is_sent(
    open_page: OpenPage, server: FakeServer
) -> None:
    page = start(open_page("en"))
    box, note = page.locator("zhanggui-chat .box textarea"), page.locator("zhanggui-chat .note")
    box.fill("x" * 1700)
    expect(note).not_to_contain_text("left")
    box.fill("👍" * 1990)  # 3,980 UTF-16 units
    expect(note).to_have_text("10 characters left")
    box.fill("字" * 2001)
    expect(note).to_have_text("1 character too many")
    box.press("Enter")
    expect(page.locator("zhanggui-chat .send")).to_be_disabled()
    assert server.sent("ask") == []


def test_a_reply_longer_than_the_panel_stays_at_its_beginning(open_page: OpenPage) -> None:
    page = start(open_page())
    ask(page, "hello")
    expect(replies(page)).to_have_count(1)
    ask(page, "LONG list")
    expect(replies(page)).to_have_count(2)
    expect(replies(page).last).to_be_in_viewport()
    seen, reply = page.locator("zhanggui-chat .scroll").bounding_box(), replies(page).last.bounding_box()
    assert seen is not None
    assert reply is not None
    assert 0 <= reply["y"] - seen["y"] < 40
    page.get_by_role("button", name="More below").click()
    expect(page.get_by_role("button", name="More below")).to_be_hidden()
    ask(page, "and then?")
    expect(replies(page).last.locator(".act").first).to_be_in_viewport()


# ---------------------------------------------------------------------- controls


def test_stop_ends_a_reply_and_the_next_question_works(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    ask(page, "SLOW one please")
    expect(page.locator("zhanggui-chat .caret")).to_contain_text("slow words")
    page.get_by_role("button", name="Stop this reply").click()
    expect(replies(page).locator(".tag")).to_have_text("Stopped")
    assert len(server.sent("stop")) == 1
    ask(page, "and now?")
    expect(replies(page).last).to_contain_text("You said: and now?")


def test_a_failed_reply_and_a_refused_question_can_be_tried_again(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    ask(page, "FAIL me")
    trouble = page.locator("zhanggui-chat .trouble")
    expect(trouble).to_contain_text("did not come through")
    trouble.get_by_role("button", name="Try again").click()
    expect(replies(page)).to_contain_text("You said: again me")
    expect(trouble).to_have_count(0)

    ask(page, "BUSY question")
    expect(trouble.get_by_role("button").first).to_be_disabled()  # until retry_after_s
    trouble.get_by_role("button", name="Try again", exact=True).click()
    expect(replies(page).last).to_contain_text("You said: BUSY question")
    assert len({frame["id"] for frame in server.sent("ask") if "BUSY" in frame["text"]}) == 1


def test_a_reply_can_be_rated_copied_and_answered_again(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "Can I return something?")
    row = replies(page)
    row.get_by_role("button", name="Helpful", exact=True).click()
    assert server.wait_for("rate") == [{"type": "rate", "seq": 2, "value": "up"}]
    expect(row.get_by_role("button", name="Helpful", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(row.get_by_role("button", name="Helpful", exact=True)).to_be_focused()  # not made anew
    row.get_by_role("button", name="Copy").click()
    assert "30 days as a Qinghe Plus member" in page.evaluate("navigator.clipboard.readText()")
    row.get_by_role("button", name="Answer again").click()
    server.wait_for("regenerate")
    expect(replies(page)).to_have_count(1)
    expect(replies(page)).to_contain_text("30 days")


def test_a_human_takes_over_and_the_conversation_ends_with_a_score(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page("zh"))
    ask(page, "你好")
    expect(replies(page)).to_have_count(1)
    page.get_by_role("button", name="转人工").click()
    expect(page.locator("zhanggui-chat .line.state")).to_have_text("已为您呼叫人工客服，请稍候。")
    expect(page.get_by_role("button", name="已请求人工")).to_be_disabled()
    server.say("state", state="human")
    server.say("message", role="agent", text="我是小李 **不是机器人**")
    expect(bubbles(page, "agent")).to_have_text("我是小李 不是机器人")
    expect(page.locator("zhanggui-chat .status")).to_have_text("人工客服为您服务")
    page.get_by_role("button", name="更多选项").click()
    page.get_by_role("button", name="结束会话").click()
    page.get_by_role("radio", name="4 星").click()
    page.locator("zhanggui-chat .sheet").get_by_role("button", name="结束会话").click()
    assert server.wait_for("close") == [{"type": "close", "score": 4}]
    page.get_by_role("button", name="开始新会话").click()
    expect(bubbles(page, "agent")).to_have_count(0)
    ask(page, "新的问题")
    expect(replies(page)).to_contain_text("新的问题")
    assert len(server.conversations) == 2


# ---------------------------------------------------------------------- the network


def test_a_cut_connection_resumes_in_the_middle_of_a_reply(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    ask(page, "CUT it")
    expect(replies(page)).to_contain_text(("This sentence survives a cut connection, whole and in order. " * 3).strip())
    hellos = server.sent("hello")
    assert len(hellos) == 2
    assert hellos[1]["after"] == 1
    assert hellos[1]["token"] == "secret1"
    assert len(server.sent("ask")) == 1
    expect(bubbles(page, "visitor")).to_have_count(1)


def test_a_question_whose_ack_was_lost_is_sent_again_and_answered_once(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    ask(page, "NOACK hello")
    expect(replies(page)).to_contain_text("You said: NOACK hello")
    asks = server.sent("ask")
    assert len(asks) == 2
    assert asks[0]["id"] == asks[1]["id"]
    assert server.conversations["c1"].n_generated == 1
    expect(bubbles(page, "visitor")).to_have_count(1)


def test_a_server_restart_shows_offline_keeps_the_question_and_resumes(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    ask(page, "before")
    expect(replies(page)).to_have_count(1)
    server.down()
    expect(page.locator("zhanggui-chat .status")).to_have_attribute("data-is", "offline")
    ask(page, "during")
    expect(page.locator("zhanggui-chat .row.unsent")).to_contain_text("Will be sent once connected")
    server.up()
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(replies(page)).to_have_count(2)
    expect(replies(page).last).to_contain_text("You said: during")
    assert [b.inner_text() for b in bubbles(page, "visitor").all()] == ["before", "during"]


def test_a_reload_shows_the_conversation_again_and_a_forgotten_one_begins_anew(
    open_page: OpenPage, server: FakeServer
) -> None:
    page = start(open_page())
    ask(page, "remember me")
    expect(replies(page)).to_have_count(1)
    page.reload()
    expect(panel(page)).to_be_visible()  # it was open
    expect(replies(page)).to_contain_text("You said: remember me")
    server.conversations.clear()
    page.reload()
    expect(page.locator("zhanggui-chat .status")).to_have_attribute("data-is", "online")
    expect(replies(page)).to_have_count(0)
    ask(page, "again")
    expect(replies(page)).to_contain_text("You said: again")


def test_replies_that_come_while_closed_are_counted_on_the_launcher(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    ask(page, "hello")
    page.keyboard.press("Escape")
    expect(panel(page)).to_be_hidden()
    expect(page.locator("zhanggui-chat .badge")).to_have_text("1")
    expect(launcher(page)).to_have_accessible_name("Open customer service chat, 1 unread")
    launcher(page).click()
    expect(page.locator("zhanggui-chat .badge")).to_be_hidden()


def test_nothing_is_fetched_before_the_first_click(open_page: OpenPage, server: FakeServer) -> None:
    page = open_page()
    page.wait_for_timeout(600)
    page_of_the_shop = {"page.css", "page.js", "dom.js", "readiness.js", "words.js", "favicon.svg", "store.json"}
    loaded = page.evaluate("performance.getEntriesByType('resource').map((e) => e.name.split('/').pop().split('?')[0])")
    assert {name for name in loaded if not name.startswith("QH")} - page_of_the_shop == {"widget.js", "readyz"}
    assert server.frames == []


# ---------------------------------------------------------------------- safety


def test_hostile_text_is_shown_as_text(open_page: OpenPage, server: FakeServer) -> None:
    page = open_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    start(page)
    text = f"HOSTILE {HOSTILE}"
    ask(page, text)
    expect(bubbles(page, "visitor")).to_have_text(text)
    assert bubbles(page, "visitor").locator("*").count() == 0
    reply = replies(page).locator(".bubble")
    expect(reply).to_contain_text("<script>window.pwned=1</script>")
    expect(reply).to_contain_text("[click](javascript:window.pwned=1)")
    expect(reply).to_contain_text("bank (evil.example)")  # where a link leads is said
    assert reply.locator("script, img, b, iframe").count() == 0
    protocols = reply.locator("a").evaluate_all("(links) => links.map((a) => a.protocol)")
    assert set(protocols) <= {"http:", "https:"}
    assert not [url for url in requests if "evil.example" in url]


def test_hostile_page_styles_do_not_reach_the_widget(open_page: OpenPage) -> None:
    page = start(open_page())
    page.evaluate(
        "() => { const s = new CSSStyleSheet(); s.replaceSync('* { display: none !important; font-size: 60px }"
        " html, body, zhanggui-chat { display: block !important }'); document.adoptedStyleSheets = [s]; }"
    )
    expect(panel(page)).to_be_visible()
    assert page.locator("zhanggui-chat h2").evaluate("(e) => getComputedStyle(e).fontSize") == "16px"


# ---------------------------------------------------------------------- access


def test_focus_goes_in_with_open_and_back_with_escape(open_page: OpenPage) -> None:
    page = open_page()
    launcher(page).focus()
    page.keyboard.press("Enter")
    expect(panel(page)).to_have_attribute("role", "dialog")
    expect(page.locator("zhanggui-chat .box textarea")).to_be_focused()
    expect(launcher(page)).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(panel(page)).to_be_hidden()
    expect(launcher(page)).to_be_focused()


def test_a_finished_reply_is_announced_once_and_not_token_by_token(open_page: OpenPage) -> None:
    page = start(open_page())
    page.evaluate(
        """() => {
          const live = document.querySelector("zhanggui-chat").shadowRoot.querySelector("[aria-live=polite]");
          window.heard = [];
          new MutationObserver(() => live.textContent && heard.push(live.textContent))
            .observe(live, { childList: true, characterData: true, subtree: true });
        }"""
    )
    ask(page, "hello there, how are you today?")
    expect(replies(page)).to_have_count(1)
    page.wait_for_timeout(300)
    assert page.evaluate("heard") == ["AI assistant: You said: hello there, how are you today?"]


def test_every_control_has_a_name_and_no_text_is_too_faint(open_page: OpenPage) -> None:
    for scheme in ("light", "dark"):
        page = start(open_page("zh", color_scheme=scheme))
        ask(page, "可以退货吗？")
        expect(replies(page)).to_have_count(1)
        page.wait_for_timeout(400)
        assert page.evaluate(_UNNAMED) == []
        assert page.evaluate(_FAINT) == []


_UNNAMED = """() => [...document.querySelector("zhanggui-chat").shadowRoot.querySelectorAll("button, textarea, a")]
  .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim())).map((e) => e.outerHTML)"""

# WCAG 2.2 AA: 4.5:1 for text. Composites translucent colours over what is behind.
_FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (css) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((v, i) => (i === 3 ? v / 255 : v)); };
  const light = ([r, g, b]) => { const f = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const behind = (node) => { const stack = [];
    const color = (n) => rgba(getComputedStyle(n).backgroundColor);
    for (let n = node; n; n = n.parentElement ?? n.getRootNode().host) stack.push(color(n));
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255]); };
  const faint = [];
  const roots = [document.body, document.querySelector("zhanggui-chat").shadowRoot];
  for (const root of roots) for (const node of root.querySelectorAll("*")) {
    const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    const skip = node.closest(":disabled, .sr, noscript, .skip");
    if (!own || skip || !node.checkVisibility({ visibilityProperty: true })) continue;
    const back = behind(node);
    const [a, b] = [light(over(rgba(getComputedStyle(node).color), back)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push(`${node.localName}.${node.className} ${node.textContent.slice(0, 30)} ${ratio}`);
  }
  return faint;
}"""


def test_on_a_phone_the_panel_fills_the_screen_and_keeps_focus_inside(open_page: OpenPage) -> None:
    page = open_page("zh", size=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    launcher(page).tap()
    expect(page.locator("zhanggui-chat .status")).to_have_attribute("data-is", "online")
    page.wait_for_timeout(400)
    box = panel(page).bounding_box()
    assert box is not None
    assert (box["x"], box["y"], box["width"], box["height"]) == (0, 0, 390, 844)
    expect(panel(page)).to_have_attribute("aria-modal", "true")
    expect(launcher(page)).to_be_hidden()
    assert (
        page.locator("zhanggui-chat .box textarea").evaluate("(e) => getComputedStyle(e).fontSize") == "16px"
    )  # iOS zooms below
    small = page.locator("zhanggui-chat button:visible").evaluate_all(
        "(all) => all.filter((b) => b.getBoundingClientRect().height < 30).map((b) => b.className)"
    )
    assert small == []
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.localName") == "zhanggui-chat"
    ask(page, "可以退货吗？")
    expect(replies(page)).to_have_count(1)
    assert page.locator("zhanggui-chat .scroll").evaluate("(e) => e.scrollWidth <= e.clientWidth")
    page.get_by_role("button", name="收起聊天窗口").tap()
    expect(launcher(page)).to_be_visible()


def test_reduced_motion_is_respected(open_page: OpenPage) -> None:
    page = start(open_page(reduced_motion="reduce"))
    seconds = panel(page).evaluate("(e) => parseFloat(getComputedStyle(e).animationDuration)")
    assert seconds < 0.001


# ---------------------------------------------------------------------- languages and the page


def test_the_widget_follows_the_page_and_can_be_switched(open_page: OpenPage) -> None:
    page = start(open_page("zh"))
    expect(page.locator("zhanggui-chat h2")).to_have_text("青禾家居")
    page.locator("header .languages").get_by_role("button", name="English").click()
    expect(page.locator("zhanggui-chat .status")).to_have_text("Online · AI assistant")
    expect(page.locator("zhanggui-chat .row.bot .bubble").first).to_contain_text("Hello, I am")
    page.get_by_role("button", name="More options").click()
    page.get_by_role("button", name="简体中文").click()
    expect(page.locator("zhanggui-chat .status")).to_have_text("在线 · AI 助手")
    expect(page.locator("zhanggui-chat .row.bot .bubble").first).to_contain_text("您好")


def test_the_shop_page_speaks_both_languages_and_filters(open_page: OpenPage) -> None:
    page = open_page("zh")
    expect(page.locator("h1")).to_have_text("把日子，过得从容一点")
    expect(page.locator("#promotion-list li")).to_have_count(3)
    expect(page.locator("#grid li").first).to_contain_text("青禾")
    page.get_by_role("button", name="English").click()
    expect(page.locator("h1")).to_have_text("Home, at an easier pace")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.get_by_role("button", name="Lighting").click()
    expect(page.locator("#count")).to_have_text("10 products")
    page.locator("#grid li").first.get_by_role("button").click()
    expect(bubbles(page, "visitor")).to_contain_text("Tell me about the")
    expect(replies(page)).to_have_count(1)
    page.reload()
    expect(page.locator("h1")).to_have_text("Home, at an easier pace")  # the choice was kept


def test_a_suggested_question_opens_the_widget_and_asks(open_page: OpenPage, server: FakeServer) -> None:
    page = open_page("en")
    page.locator("#questions button").first.click()
    expect(replies(page)).to_have_count(1)
    assert server.sent("ask")[0]["text"] == "Can I return something?"


def test_readiness_updates_by_itself_on_the_page_and_in_the_widget(open_page: OpenPage, server: FakeServer) -> None:
    server.engine_phase = "starting"
    page = open_page("en")
    expect(page.locator("#ready-index")).to_have_text("Knowledge ready · 412 passages")
    expect(page.locator("#ready-engine")).to_have_text(
        "AI model starting; approved answers already work (loading weights)"
    )
    launcher(page).click()
    expect(page.locator("zhanggui-chat .status")).to_have_text(
        "Assistant is still starting; approved answers already work"
    )
    server.engine_phase = "ready"
    expect(page.locator("#ready-engine")).to_have_text("AI model ready")
    expect(page.locator("zhanggui-chat .status")).to_have_text("Online · AI assistant")


def test_another_merchants_store_without_a_list_still_has_its_chat(open_page: OpenPage, server: FakeServer) -> None:
    server.store = {
        "name": "Tea House",
        "names": {"zh": "茶舍", "en": "Tea House"},
        "greeting": {"en": "Welcome!", "zh": "欢迎！"},
    }
    page = open_page("en")
    expect(page.locator("h1")).to_have_text("Welcome to Tea House")
    expect(page.locator("#empty")).to_be_visible()
    start(page)
    ask(page, "hello")
    expect(replies(page)).to_have_count(1)


def test_the_widget_works_on_a_page_of_another_origin(open_url: OpenPage, server: FakeServer) -> None:
    with FakeServer() as shop:
        shop.pages["/shop.html"] = (
            "<!doctype html><html lang=zh><title>Shop</title><link rel=icon href=/favicon.svg><body><h1>Shop</h1>"
            f"<script type=module src='{server.url}widget.js' data-lang=en data-position=left data-color='#ffd400'>"
            "</script>"
        )
        page = open_url(shop.url + "shop.html", "en")
        start(page)
        ask(page, "across origins")
        expect(replies(page)).to_contain_text("You said: across origins")
        assert shop.frames == []
        box = launcher(page).bounding_box()
        assert box is not None
        assert box["x"] < 100  # on the left
        ink = page.locator("zhanggui-chat .send").evaluate(
            "(e) => getComputedStyle(e.closest('.panel').querySelector('.head')).color"
        )
        assert ink == "rgb(16, 21, 15)"  # dark on yellow
        ask(page, "Can I return something?")
        expect(replies(page)).to_have_count(2)
        assert page.evaluate(_FAINT) == []  # yellow is no colour for text on white


def test_a_tab_asleep_finds_out_that_its_connection_is_dead(open_page: OpenPage, server: FakeServer) -> None:
    page = start(open_page())
    server.wait_for("hello")
    page.evaluate("dispatchEvent(new Event('online'))")
    assert server.wait_for("ping")
    time.sleep(0.05)
    assert len(server.sent("hello")) == 1  # it lives: no second connection
