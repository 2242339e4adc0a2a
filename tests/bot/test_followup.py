"""bot/followup.py and bot/language.py: from what was typed to what can be searched, and in which language."""

from __future__ import annotations

import pytest

from bot.followup import complete, split_questions
from bot.language import language_of, reply_language
from bot.messages import Turn


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("运费多少？另外可以开发票吗？", ["运费多少？", "可以开发票吗？"]),
        ("do you ship to France? how long does it take?", ["do you ship to France?", "how long does it take?"]),
        ("I bought a lamp. It flickers. What now?", ["I bought a lamp. It flickers. What now?"]),
        ("你好，请问枕头能退吗", ["枕头能退吗"]),
        ("Hello! Where is my parcel?", ["Where is my parcel?"]),
        ("???", ["???"]),
    ],
)
def test_a_message_is_split_into_its_questions(text: str, parts: list[str]) -> None:
    assert split_questions(text) == parts


@pytest.mark.parametrize(
    ("before", "now", "standalone"),
    [
        ("How much is shipping to Japan?", "And to Germany?", "How much is shipping to Germany"),
        ("运费多少？", "那大件呢？", "运费多少 大件"),
        ("Do you sell the oak lamp?", "how much is it?", "Do you sell the oak lamp how much is it"),
    ],
)
def test_an_elliptical_question_is_completed_from_the_one_before(before: str, now: str, standalone: str) -> None:
    query = complete(now, [Turn(before, "…")])
    assert query.standalone == standalone
    assert query.elliptical


@pytest.mark.parametrize(
    "text", ["Do you accept PayPal?", "可以货到付款吗", "QH1034 有货吗", "How long is the warranty on lamps?"]
)
def test_a_question_that_stands_alone_is_left_alone(text: str) -> None:
    query = complete(text, [Turn("How much is shipping?", "¥8")])
    assert not query.elliptical
    assert query.standalone == text


def test_a_follow_up_of_a_follow_up_keeps_the_subject() -> None:
    history = [Turn("运费多少？", "¥8"), Turn("那大件呢？", "¥60")]
    assert "运费" in complete("那新疆呢", history).standalone


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("I am [NAME_1], call [PHONE_1]. How much is delivery?", "How much is delivery?"),
        ("my mail is ann@mail.example. when do you open?", "when do you open?"),
        ("我是李雷，电话13812345678，运费多少？", "我是李雷，运费多少？"),
        ("is 13812345678 your number?", "is 13812345678 your number?"),
        ("13812345678", "13812345678"),
        ("what does ¥3.50 buy, and is it 2.5 kg?", "what does ¥3.50 buy, and is it 2.5 kg?"),
    ],
)
def test_how_somebody_is_reached_is_not_searched_for(said: str, asked: str) -> None:
    assert complete(said, []).text == asked


def test_nothing_is_completed_without_a_history() -> None:
    assert not complete("and to Germany?", []).elliptical
    assert complete("how heavy is it", []).follows == 0


@pytest.mark.parametrize(
    "text", ["how heavy is it", "多久到", "and for two?", "要押金吗", "那蓝色的呢", "does that need a licence"]
)
def test_what_is_short_or_points_back_likely_goes_on_from_the_question_before(text: str) -> None:
    query = complete(text, [Turn("Do you hire out boats?", "Yes, by the day.")])
    assert query.follows > 0.5
    assert "boats" in query.joined


@pytest.mark.parametrize(
    "text",
    [
        "Which couriers deliver parcels to the islands on public holidays?",
        "我想知道公司团购三十件以上的话有没有折扣和发票",
        "QH1034 有吗",  # names its own subject, short as it is
    ],
)
def test_what_says_enough_by_itself_does_not_go_on(text: str) -> None:
    assert complete(text, [Turn("Do you hire out boats?", "Yes, by the day.")]).follows < 0.1


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("运费多少", "zh"),
        ("How much is shipping?", "en"),
        ("iPhone 充电器有吗", "zh"),
        ("what does 包邮 mean for me", "en"),
        ("QH1034 多少钱", "zh"),
        ("QH1034", None),
        ("USB HDMI?", None),
        ("HOW LONG DOES SHIPPING TAKE", "en"),
        ("IPHONE USB PD 充电器", "zh"),
        ("???", None),
    ],
)
def test_the_language_is_read_from_the_message(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_a_message_without_a_language_takes_the_conversation_then_the_page_then_the_store() -> None:
    assert reply_language("QH1034?", [Turn("Do you ship?", "yes")], "zh-CN") == "en"
    assert reply_language("QH1034?", [], "en-GB") == "en"
    assert reply_language("QH1034?", [], None, "zh") == "zh"
