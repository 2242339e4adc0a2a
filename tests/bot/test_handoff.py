"""From the bot to a human and back: the machine of states, who may, what starts it, and that words alone never do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import get_args
from zoneinfo import ZoneInfo

import pytest

from bot.answer import Answerer
from bot.errors import NotAllowed
from bot.hours import Hours, expected_wait_s, parse_day_off, parse_days, parse_line, parse_span
from bot.messages import Outcome, Reply, State, Turn
from bot.settings import HandoffPolicy, HandoffRule
from bot.skills.handoff import given_up, handoff_trigger
from bot.states import TRANSITIONS, Action, Actor, next_state
from bot.stream import Delta, Phase
from retrieval.passages import Passage
from tests.fake_retriever import FakeRetriever
from tests.fakes import ScriptedAnswerer, ScriptedEngine, reply_with, store_profile
from tests.inbox import Browser, add_agent
from tests.running import Wire, running_server

SHANGHAI = ZoneInfo("Asia/Shanghai")
TODAY = datetime.now(SHANGHAI).date()
DAYS_OFF = f"{TODAY - timedelta(days=2)}/{TODAY + timedelta(days=2)}"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


# The machine


def test_what_the_table_does_not_have_is_refused_and_what_it_has_is_done() -> None:
    states, actions, actors = get_args(State), get_args(Action), get_args(Actor)
    n_allowed = 0
    for state, action, actor in itertools.product(states, actions, actors):
        new, who = TRANSITIONS.get((state, action), (None, frozenset()))
        if actor in who:
            n_allowed += 1
            assert next_state(state, action, actor) == new
        else:
            with pytest.raises(NotAllowed) as refused:
                next_state(state, action, actor)
            assert refused.value.code == "not_allowed"
    assert n_allowed == sum(len(who) for _, who in TRANSITIONS.values())


def test_a_human_is_reached_through_the_queue_only_and_by_an_agent_only() -> None:
    into_human = {(state, action): who for (state, action), (new, who) in TRANSITIONS.items() if new == "human"}
    assert into_human == {
        ("waiting", "accept"): frozenset({"agent"}),
        ("human", "transfer"): frozenset({"agent"}),
    }
    assert all("bot" not in who or action == "request" for (_, action), (_, who) in TRANSITIONS.items())


# What calls a human


@pytest.mark.parametrize(
    "text",
    [
        *("I am furious about this", "This is absolutely unacceptable.", "you are a bunch of thieves"),
        *("I will sue you", "my lawyer will contact you", "I want to file a complaint", "worst service ever"),
        *("I'm really angry with your shop", "this is such a rip-off... you scammers", "what a scam!"),
        *(
            "你们什么破店",
            "我要投诉你们",
            "气死我了，到现在都没发货",
            "你们就是骗子",
            "我很生气",
            "太过分了吧",
            "垃圾客服",
            "滚！",
            "他妈的到底发不发货",
        ),
    ],
)
def test_anger_calls_a_human(text: str) -> None:
    assert handoff_trigger(text) == "anger"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "I'm angry at myself for ordering the wrong size",
            "I'm not angry, just wondering",
            "the price is ridiculously low",
        ),
        *(
            "do you sell Angry Birds toys?",
            "is Liar's Dice in stock?",
            "a gift for a lawyer",
            "a card for my friend Sue",
        ),
        *("does the lock keep thieves out?", "do you offer fraud protection?", "Idiot's Guide to cooking"),
        *("I got a scam e-mail, is it from you?", "is it unacceptable to wash it at 60 degrees?"),
        *(
            *("空气炸锅多少钱", "能租一台空气炸锅吗", "蒸汽炸锅有吗", "油气炸炉有吗"),
            "滚筒洗衣机有吗",
            "滚轮好推吗",
            "这是我妈的生日礼物",
            "他妈妈穿什么码",
            "给妈妈的礼物",
            "垃圾袋有货吗",
            "可以寄到法院旁边吗",
        ),
        *(
            "我生自己的气，拍错尺码了",
            "都怪我自己粗心，拍错了",
            "我不生气，就是问问",
            "你们没有生气吧",
            "有愤怒的小鸟吗",
            "摇滚吉他多少钱",
        ),
        *("垃圾桶多大", "废物利用的手工材料有吗", "别生气，我就问问", "诈骗短信是你们发的吗"),
    ],
)
def test_polite_words_and_the_names_of_things_are_no_anger(text: str) -> None:
    assert handoff_trigger(text) is None


POLICY = HandoffPolicy(2, (HandoffRule("health", ("过敏反应", "allergic reaction")), HandoffRule("vat", ("发票",))))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I had an allergic  reaction to it", "rule:health"),
        ("ALLERGIC REACTIONS after using it", "rule:health"),
        ("用了以后有过敏反应", "rule:health"),
        ("可以开发票吗", "rule:vat"),
        ("is it hypoallergenic?", None),
        ("转人工，我要发票", "asked"),
    ],
)
def test_the_stores_own_rules_call_a_human(text: str, reason: str | None) -> None:
    assert handoff_trigger(text, POLICY) == reason
    assert handoff_trigger("How long is shipping?", POLICY) is None


@pytest.mark.parametrize(
    ("outcomes", "n", "expected"),
    [
        (["no_answer", "no_answer"], 2, True),
        (["direct", "no_answer", "no_answer"], 2, True),
        (["no_answer", "direct", "no_answer"], 2, False),
        (["no_answer"], 2, False),
        (["no_answer", "no_answer"], 3, False),
        (["no_answer", "no_answer"], 0, False),
        (["no_answer"], 1, True),
    ],
)
def test_the_bot_gives_up_after_so_many_replies_without_an_answer(outcomes: list[str], n: int, expected: bool) -> None:
    assert given_up(outcomes, HandoffPolicy(n)) is expected


class Outcomes(ScriptedAnswerer):
    """Replies with these outcomes, one after the other."""

    def __init__(self, *outcomes: Outcome) -> None:
        super().__init__()
        self.outcomes = list(outcomes)

    async def answer(
        self,
        history: Sequence[Turn],
        question: str,
        *,
        locale: str | None = None,
        stop: asyncio.Event | None = None,
        release: str | None = None,
    ) -> AsyncGenerator[Phase | Delta | Reply, None]:
        yield Delta("so")
        yield reply_with("so", self.outcomes.pop(0))


async def test_no_answer_twice_in_a_row_calls_a_human_and_the_outcome_stays(database: Path) -> None:
    answerer = Outcomes("no_answer", "direct", "no_answer", "no_answer")
    async with running_server(database, answerer) as server, Wire(server.ws_url) as tab:
        await tab.hello(locale="en")
        for n in range(3):
            await tab.ask(f"q{n}", f"question {n}")
            assert tab.of("event", kind="state") == []
        reply = await tab.ask("q3", "question 3")
        assert reply["outcome"] == "no_answer"
        system = await tab.hear("event", role="system")
        state = await tab.hear("event", kind="state")
        assert (state["state"], state["reason"], state["by"]) == ("waiting", "no_answer", {"role": "bot"})
        assert "colleague" in system["text"]


async def test_after_a_human_gave_it_back_the_count_begins_anew(database: Path) -> None:
    answerer = Outcomes("no_answer", "no_answer", "no_answer", "no_answer")
    async with running_server(database, answerer, agents=True) as server:
        await add_agent(server, "li")
        async with Wire(server.ws_url) as tab, Browser(server, "li") as browser, browser.seat() as seat:
            conversation = (await tab.hello())["conversation"]
            await tab.ask("q0", "one")
            await tab.ask("q1", "two")
            await tab.hear("event", kind="state", state="waiting")
            assert (await seat.do("return", conversation))["type"] == "done"
            await tab.hear("event", kind="state", state="bot")
            await tab.ask("q2", "three")
            await tab.say("ping")
            await tab.hear("pong")
            assert len(tab.of("event", kind="state")) == 2
            await tab.ask("q3", "four")
            await tab.hear("event", kind="state", state="waiting")


async def test_what_a_model_writes_never_changes_the_state(database: Path) -> None:
    words = "I am handing you over to a human agent now. state: waiting. 正在为您转接人工客服。handoff"
    engine = ScriptedEngine(words)
    profile = replace(store_profile(), handoff=HandoffPolicy(0))
    passage = Passage("ship-en", "faq", "How long is shipping?", "Parcels arrive within 3 days.", "en", "faqs.csv:2")
    retriever = FakeRetriever([passage], {"moon": [("ship-en", 0.4)]})
    answerer = Answerer(retriever=retriever, engine=engine, profile=profile)
    running = running_server(database, answerer, policy=HandoffPolicy(0))  # type: ignore[arg-type]
    async with running as server, Wire(server.ws_url) as tab:
        await tab.hello()
        reply = await tab.ask("q1", "how long is shipping to the moon?")
        assert engine.prompts
        assert reply["outcome"] != "handoff"
        await tab.say("ping")
        await tab.hear("pong")
        assert tab.of("event", kind="state") == []
    answerer.close()
    scripted = ScriptedAnswerer(reply=lambda _: words)
    async with running_server(database.with_name("b.db"), scripted) as server, Wire(server.ws_url) as tab:
        await tab.hello()
        assert (await tab.ask("q1", "hi"))["text"] == words
        await tab.say("ping")
        await tab.hear("pong")
        assert tab.of("event", kind="state") == []


async def test_a_rule_of_the_store_hands_over_with_its_name(database: Path) -> None:
    answerer = Answerer(retriever=FakeRetriever([], {}), engine=None, profile=replace(store_profile(), handoff=POLICY))
    running = running_server(database, answerer)  # type: ignore[arg-type]
    async with running as server, Wire(server.ws_url) as tab:
        await tab.hello(locale="en")
        reply = await tab.ask("q1", "I had an allergic reaction")
        assert (reply["outcome"], "colleague" in reply["text"]) == ("handoff", True)
        assert (await tab.hear("event", kind="state"))["reason"] == "rule:health"
    answerer.close()


# Hours


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=SHANGHAI).astimezone(UTC)


def hours(line: str = "Mon-Fri 09:00-18:00", days_off: Sequence[str] = ()) -> Hours:
    holidays, yearly = frozenset[date](), frozenset[tuple[int, int]]()
    for entry in days_off:
        days, each_year = parse_day_off(entry)
        holidays, yearly = holidays | days, yearly | each_year
    return Hours(parse_line(line), SHANGHAI, holidays, yearly)


@pytest.mark.parametrize(
    ("line", "now", "is_open", "next_opening"),
    [
        ("Mon-Fri 09:00-18:00", "2026-11-20T08:59", False, "2026-11-20T09:00"),
        ("Mon-Fri 09:00-18:00", "2026-11-20T09:00", True, "2026-11-20T09:00"),
        ("Mon-Fri 09:00-18:00", "2026-11-20T18:00", False, "2026-11-23T09:00"),
        ("周一至周五 9:00-18:00", "2026-11-21T12:00", False, "2026-11-23T09:00"),
        ("每天 09:00-21:00", "2026-11-22T20:59", True, "2026-11-22T20:59"),
        ("09:00-24:00", "2026-11-22T23:59", True, "2026-11-22T23:59"),
        ("22:00-02:00", "2026-11-22T01:30", True, "2026-11-22T01:30"),
        ("22:00-02:00", "2026-11-22T02:00", False, "2026-11-22T22:00"),
        ("Fri-Mon 10:00-12:00", "2026-11-24T10:30", False, "2026-11-27T10:00"),
        ("sat, sun 10:00 - 12:00", "2026-11-23T10:30", False, "2026-11-28T10:00"),
    ],
)
def test_hours_are_those_of_the_stores_clock(line: str, now: str, is_open: bool, next_opening: str) -> None:
    week = hours(line)
    assert week.is_open(at(now)) is is_open
    assert week.next_opening(at(now)) == at(next_opening)


def test_a_holiday_is_closed_the_whole_day() -> None:
    week = hours("Mon-Sun 09:00-18:00", ["2027-02-05/2027-02-09", "12-25"])
    assert not week.is_open(at("2027-02-07T12:00"))
    assert week.next_opening(at("2027-02-05T08:00")) == at("2027-02-10T09:00")
    assert not week.is_open(at("2026-12-25T12:00"))
    assert not week.is_open(at("2030-12-25T12:00"))
    assert week.is_open(at("2026-12-24T12:00"))


@pytest.mark.parametrize("wrong", ["9-18", "25:00-26:00", "09:60-10:00", "", "always"])
def test_hours_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        parse_span(wrong)


def test_weekdays_are_read_in_both_languages() -> None:
    assert parse_days("Mon-Fri") == parse_days("周一至周五") == parse_days("工作日") == (0, 1, 2, 3, 4)
    assert parse_days("") == parse_days("每天") == (0, 1, 2, 3, 4, 5, 6)
    assert parse_days("周六、周日") == parse_days("Sat & Sun") == (5, 6)
    with pytest.raises(ValueError):
        parse_days("someday")


@pytest.mark.parametrize(
    ("position", "n_agents", "n_human", "handling", "expected"),
    [
        (1, 0, 0, [60.0] * 9, None),  # nobody is there
        (1, 1, 0, [60.0] * 2, None),  # too little to go by
        (1, 1, 0, [60.0] * 3, 0.0),  # a place is free
        (1, 1, 3, [60.0] * 3, 20.0),  # three places, one frees up every 20 s
        (4, 2, 6, [60.0, 90.0, 30.0], 40.0),
    ],
)
def test_the_wait_is_estimated_from_the_queue_or_said_to_be_unknown(
    position: int, n_agents: int, n_human: int, handling: list[float], expected: float | None
) -> None:
    assert expected_wait_s(position, n_agents, n_human, handling, per_agent=3) == expected


async def test_outside_hours_a_human_can_be_asked_for_and_a_message_left(database: Path) -> None:
    day_off = replace(store_profile(), hours=hours("Mon-Sun 00:00-24:00", [DAYS_OFF]))
    async with running_server(database, agents=True, store=day_off) as server:
        await add_agent(server, "li")
        async with Wire(server.ws_url) as tab, Browser(server, "li") as browser, browser.seat() as seat:
            assert (await browser.get("/api/stats"))["open"] is False
            welcome = await tab.hello(locale="zh-CN")
            assert welcome["human"]["open"] is False
            assert welcome["human"]["opens_at"].endswith("Z")
            await tab.say("handoff")
            said = await tab.hear("event", role="system")
            assert (said["code"], "邮箱" in said["text"]) == ("handoff_closed", True)
            state = await tab.hear("event", kind="state")
            assert (state["state"], state["open"], state["opens_at"]) == (
                "waiting",
                False,
                welcome["human"]["opens_at"],
            )

            for wrong in ("nobody", "a@b", "a b@c.de", "<x@y.de>"):
                await tab.say("leave_message", id="m0", email=wrong, text="hi")
                failed = await tab.hear("failed")
                assert (failed["code"], failed["id"]) == ("bad_frame", "m0")
            for _ in range(2):  # sent again, as a client does that lost the ack
                await tab.say("leave_message", id="m1", email="ann@example.com", text="请回复我")
            first, second = await tab.hear("ack"), await tab.hear("ack")
            assert [first["duplicate"], second["duplicate"]] == [False, True]
            assert len(tab.of("event", role="visitor")) == 1
            assert tab.of("event", role="visitor")[0]["left"] is True
            confirmed = next(f for f in tab.of("event", role="system") if f["code"] == "message_left")
            assert "ann@example.com" in confirmed["text"]
            assert server.answerer.asked == []  # the bot is not asked

            left = (await seat.hear("left"))["message"]
            assert (left["email"], left["text"], left["done_at"]) == ("ann@example.com", "请回复我", None)
            (listed,) = (await browser.get("/api/messages", open="true"))["messages"]
            assert listed == left
            done = await browser.send("POST", f"/api/messages/{left['id']}/done")
            assert done["done_by"] == {"id": browser.agent["id"], "name": "Li"}
            assert (await browser.get("/api/messages", open="true"))["messages"] == []
            await browser.send("POST", f"/api/messages/{left['id']}/reopen")
            assert len((await browser.get("/api/messages", open="true"))["messages"]) == 1
            await browser.send("POST", "/api/messages/nothing/done", expect=404)
