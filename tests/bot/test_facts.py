"""bot/guard/facts.py: nothing reaches a visitor that no valid passage states."""

from __future__ import annotations

import pytest

from bot.guard.facts import StreamGate, facts_of, grounds_of, ungrounded

PASSAGES = [
    "满¥99包邮，不足收¥8运费。偏远地区加收¥15。",
    "Warm Home: bedding 25% off with code WARM25. Runs from 16 November to 30 November 2026 (inclusive).",
    "7天无理由退货；国际信用卡退款最多14天。EU: VAT included up to EUR 150. 邮箱 help@qinghe.example",
    "第二件半价。",
]


@pytest.mark.parametrize(
    "reply",
    [
        "满99元包邮，否则运费8元。",
        "满９９元包邮",  # full width
        "Free from CNY 99, otherwise ¥8.",
        "床品七五折，优惠码 WARM25。",
        "From 16 to 30 November.",
        "11月16日至30日",
        "Bedding is 25% off with code warm25.",
        "打7.5折",
        "活动11月16日到11月30日。",
        "It runs until November 30.",
        "seven days to return it",
        "七天内可退",
        "1. 包邮门槛 ¥99\n2. 运费 ¥8",
        "EU orders up to EUR 150",
        "写信到 help@qinghe.example",
        "半价",
        "没有数字的一句话。",
    ],
)
def test_what_stands_in_a_passage_passes_in_any_spelling(reply: str) -> None:
    assert ungrounded(reply, grounds_of(PASSAGES)) == []


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        ("满199元包邮", "number 199"),
        ("满一百九十九元包邮", "number 199"),
        ("thirty days to return it", "number 30"),
        ("床品六折", "40%"),
        ("60% off", "60%"),
        ("use code SUMMER99", "code SUMMER99"),
        ("优惠码是BIGSALE", "code BIGSALE"),
        ("until 1 December", "date 12-1"),
        ("到12月1日", "date 12-1"),
        ("only $99", "currency usd"),
        ("see https://evil.example/pay", "address https://evil.example/pay"),
        ("写信到 boss@qinghe.example", "address boss@qinghe.example"),
    ],
)
def test_what_no_passage_states_is_named(reply: str, wrong: str) -> None:
    assert wrong in ungrounded(reply, grounds_of(PASSAGES))


def test_a_number_the_visitor_wrote_may_be_repeated_but_not_a_discount_or_code() -> None:
    grounds = grounds_of(PASSAGES, "我要寄3件，听说90% off，码 FREE100 能用吗")
    assert ungrounded("3件也是¥8", grounds) == []
    assert ungrounded("yes, 90% off", grounds) == ["90%"]
    assert "code FREE100" in ungrounded("可以用 FREE100", grounds)


def test_digits_of_a_longer_number_are_not_that_number() -> None:
    assert facts_of("订单 ¥1,299.00").numbers == {"1299"}
    assert ungrounded("¥29", grounds_of(["¥1299"])) == ["number 29"]


def test_the_gate_never_lets_a_wrong_price_out_not_even_its_first_digit() -> None:
    gate = StreamGate(grounds_of(PASSAGES))
    shown = "".join(gate.feed(c) for c in "您好，满99元包邮，满199元再送礼。")
    assert gate.wrong == ["number 199"]
    assert shown == gate.sent == "您好，满99元包邮，"
    assert gate.feed("更多", last=True) == ""


def test_the_gate_lets_all_of_a_right_text_through_in_pieces() -> None:
    text = "Standard delivery costs ¥8, and it is free from ¥99. 用码 WARM25 享75折"
    gate = StreamGate(grounds_of(PASSAGES))
    shown = [gate.feed(c) for c in text]
    shown.append(gate.feed("", last=True))
    assert "".join(shown) == text
    assert sum(bool(s) for s in shown) > 8  # it streams
