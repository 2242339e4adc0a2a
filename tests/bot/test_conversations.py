"""The hub without sockets: who is told what, in which order, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bot.conversations import ConversationHub, ReplyUnderWay, Subscriber, history_of
from bot.errors import (
    BadFrame,
    Conflict,
    EngineBusy,
    EngineDead,
    EngineFailed,
    EngineNotReady,
    ReplyInProgress,
    Restarting,
    UnknownConversation,
)
from bot.messages import Event, Reply, Turn
from bot.storage import Conversation, Storage
from bot.stream import Delta, Phase
from bot.wire import dump_frame
from tests.fakes import ScriptedAnswerer
from tests.running import until

Frame = dict[str, Any]


def welcome_of(head: Conversation, token: str = "") -> str:
    return dump_frame("welcome", seq=head.seq)


NOW = datetime(2026, 11, 22, tzinfo=UTC)


class Listener:
    """A subscriber with its writer: keeps every frame it was sent."""

    def __init__(self, subscriber: Subscriber | None = None) -> None:
        self.subscriber = subscriber or Subscriber(coalesce_s=0.0)
        self.frames: list[Frame] = []
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while (frame := await self.subscriber.next_frame()) is not None:
            self.frames.append(json.loads(frame))

    def of(self, type_: str, **fields: Any) -> list[Frame]:
        return [f for f in self.frames if f["type"] == type_ and fields.items() <= f.items()]

    @property
    def seqs(self) -> list[int]:
        return [f["seq"] for f in self.of("event")]

    async def hears(self, type_: str, n: int = 1, **fields: Any) -> Frame:
        await until(lambda: len(self.of(type_, **fields)) >= n)
        return self.of(type_, **fields)[n - 1]


class Setting:
    def __init__(self, storage: Storage, answerer: ScriptedAnswerer, **options: Any) -> None:
        self.storage = storage
        self.answerer = answerer
        self.hub = ConversationHub(storage, answerer, **options)
        self.listeners: list[Listener] = []

    async def start(self, locale: str | None = None) -> tuple[str, Listener]:
        listener = self._listener()
        id_ = await self.hub.start(listener.subscriber, locale, welcome_of)
        return id_, listener

    async def join(self, conversation: str, after: int | None = 0) -> Listener:
        listener = self._listener()
        await self.hub.subscribe(listener.subscriber, conversation, after=after, welcome=welcome_of)
        return listener

    def _listener(self) -> Listener:
        self.listeners.append(Listener())
        return self.listeners[-1]

    async def leave(self, listener: Listener) -> None:
        self.hub.unsubscribe(listener.subscriber)
        await listener.task

    async def idle(self) -> None:
        """All tabs closed, and nothing is left behind."""
        for listener in self.listeners:
            await self.leave(listener)
        await until(lambda: not (self.hub.n_live or self.hub.n_tasks or self.answerer.n_open))
        assert (self.hub.n_subscribers, self.hub.n_generating, self.hub.n_waiting) == (0, 0, 0)


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    storage = Storage(tmp_path / "log.db")
    await storage.open()
    setting = Setting(storage, ScriptedAnswerer())
    yield setting
    await setting.idle()
    await setting.hub.close(1.0)
    await storage.close()


async def test_a_question_is_acknowledged_streamed_and_stored(setting: Setting) -> None:
    conversation, tab = await setting.start("zh-CN")
    await setting.hub.ask(conversation, "a1", "有货吗 谢谢", by=tab.subscriber)
    event = await tab.hears("event", role="bot")
    assert [f["type"] for f in tab.frames][:3] == ["welcome", "ack", "event"]
    assert "".join(f["text"] for f in tab.of("delta", turn="a1")) == event["text"] == "echo: 有货吗 谢谢"
    assert [f["index"] for f in tab.of("delta")] == list(range(len(tab.of("delta"))))
    assert [f["phase"] for f in tab.of("status")] == ["searching", "typing"]
    assert setting.answerer.locales == ["zh-CN"]
    assert [e.text for e in await setting.storage.events(conversation)] == ["有货吗 谢谢", "echo: 有货吗 谢谢"]


async def test_history_is_what_was_said_before(setting: Setting) -> None:
    conversation, tab = await setting.start()
    for n in (1, 2, 3):
        await setting.hub.ask(conversation, f"a{n}", f"q{n}")
        await tab.hears("event", role="bot", turn=f"a{n}")
    assert setting.answerer.histories[2] == [
        Turn("q1", "echo: q1", ("faq-1",)),
        Turn("q2", "echo: q2", ("faq-1",)),
    ]


async def test_questions_that_come_meanwhile_wait_up_to_a_bound_and_get_one_reply(setting: Setting) -> None:
    setting.answerer.delay_s = 0.02
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a0", "q0 with a reply of some words", by=tab.subscriber)
    await tab.hears("delta")  # it has begun: nothing joins it any more
    setting.answerer.gate.clear()
    for n in range(1, 6):
        await setting.hub.ask(conversation, f"a{n}", f"q{n}", by=tab.subscriber)
    with pytest.raises(ReplyInProgress):
        await setting.hub.ask(conversation, "a6", "q6", by=tab.subscriber)
    assert (await setting.hub.ask(conversation, "a5", "q5")).duplicate  # known ones are still acknowledged
    assert setting.hub.n_waiting == 5
    setting.answerer.gate.set()
    await tab.hears("event", 2, role="bot")
    first, second = tab.of("event", role="bot")
    assert (first["turn"], "turns" in first) == ("a0", False)
    assert (second["turn"], second["turns"]) == ("a5", ["a1", "a2", "a3", "a4", "a5"])
    assert setting.answerer.asked == ["q0 with a reply of some words", "q1\nq2\nq3\nq4\nq5"]
    assert setting.answerer.histories[1] == [Turn(setting.answerer.asked[0], first["text"], ("faq-1",))]
    assert len(await setting.storage.events(conversation)) == 8


# Several quick messages


async def test_messages_sent_quickly_get_one_reply_each_stored_by_its_own_id(setting: Setting) -> None:
    setting.answerer.gate.clear()
    conversation, tab = await setting.start()
    for n, text in enumerate(("hi", "I bought a lamp", "when does it come?")):
        asked = await setting.hub.ask(conversation, f"a{n}", text, by=tab.subscriber)
        assert (asked.event.seq, asked.duplicate) == (n + 1, False)
        await until(lambda: setting.answerer.n_open == 1)
    setting.answerer.gate.set()
    event = await tab.hears("event", role="bot")
    assert (event["turn"], event["turns"], event["seq"]) == ("a2", ["a0", "a1", "a2"], 4)
    assert [f["id"] for f in tab.of("ack")] == ["a0", "a1", "a2"]
    assert setting.answerer.asked[-1] == "hi\nI bought a lamp\nwhen does it come?"
    assert "".join(f["text"] for f in tab.of("delta")) == event["text"]
    assert {f["turn"] for f in tab.of("delta")} == {"a2"}
    assert tab.of("status", turn="a2")[0]["turns"] == ["a0", "a1", "a2"]
    for n in range(3):  # all are answered: sent again, they are acknowledged, and nothing is made anew
        asked = await setting.hub.ask(conversation, f"a{n}", ("hi", "I bought a lamp", "when does it come?")[n])
        assert asked.duplicate
        assert asked.answered
    await setting.hub.ask(conversation, "b", "next")
    await tab.hears("event", role="bot", turn="b")
    assert setting.answerer.histories[-1] == [Turn(event["text"].removeprefix("echo: "), event["text"], ("faq-1",))]


async def test_any_message_of_a_group_stops_and_regenerates_the_whole(setting: Setting) -> None:
    setting.answerer.gate.clear()
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "first")
    await setting.hub.ask(conversation, "a2", "second")
    setting.hub.stop(conversation, "a1")
    stopped = await tab.hears("event", role="bot")
    assert (stopped["finish"], stopped["turns"]) == ("abort", ["a1", "a2"])
    setting.answerer.gate.set()
    await setting.hub.regenerate(conversation, "a1")
    again = await tab.hears("event", 2, role="bot")
    assert (again["turn"], again["turns"], again["text"]) == ("a2", ["a1", "a2"], "echo: first\nsecond")


async def test_a_group_that_failed_is_tried_again_as_a_group_by_any_of_its_messages(setting: Setting) -> None:
    setting.answerer.gate.clear()
    setting.answerer.errors = [EngineBusy(0.01), EngineBusy(0.01)]  # the first call is given up for the second
    conversation, tab = await setting.start()
    await asyncio.gather(setting.hub.ask(conversation, "a1", "first"), setting.hub.ask(conversation, "a2", "second"))
    failed = await tab.hears("failed", code="busy")
    late = await setting.join(conversation)  # who joins later is told as well
    assert (await late.hears("failed"))["code"] == "busy"
    setting.answerer.gate.set()
    setting.answerer.errors = []
    await setting.hub.ask(conversation, failed["turn"], {"a1": "first", "a2": "second"}[failed["turn"]])
    await tab.hears("event", role="bot", turn=failed["turn"])


async def test_messages_too_long_for_one_question_get_replies_of_their_own(setting: Setting) -> None:
    setting.answerer.gate.clear()
    conversation, tab = await setting.start()
    for n in range(2):
        await setting.hub.ask(conversation, f"a{n}", "x" * 1500)
    setting.answerer.gate.set()
    await tab.hears("event", 2, role="bot")
    assert [f["turn"] for f in tab.of("event", role="bot")] == ["a0", "a1"]


async def test_the_first_text_waits_a_little_for_a_visitor_who_writes_on(setting: Setting) -> None:
    setting.hub.typing_wait_s = 30.0
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "hello")
    await setting.hub.typing(conversation, "visitor", True, by=tab.subscriber)
    await tab.hears("status", phase="typing")
    assert not tab.of("delta")
    await setting.hub.ask(conversation, "a2", "how much is shipping?")
    assert (await tab.hears("event", role="bot"))["turns"] == ["a1", "a2"]
    await setting.hub.ask(conversation, "a3", "and then?")  # a message ends the typing by itself
    await tab.hears("event", role="bot", turn="a3")
    setting.hub.typing_wait_s = 0.05
    await setting.hub.ask(conversation, "a4", "who types for ever")
    await setting.hub.typing(conversation, "visitor", True, by=tab.subscriber)
    await tab.hears("event", role="bot", turn="a4")


async def test_the_same_id_five_times_at_once_gives_one_reply(setting: Setting) -> None:
    conversation, tab = await setting.start()
    asked = await asyncio.gather(*(setting.hub.ask(conversation, "a1", "hi", by=tab.subscriber) for _ in range(5)))
    await tab.hears("event", role="bot")
    assert sorted(a.duplicate for a in asked) == [False, True, True, True, True]
    assert [f["seq"] for f in await _acks(tab, 5)] == [1] * 5
    with pytest.raises(Conflict):
        await setting.hub.ask(conversation, "a1", "other")
    await asyncio.sleep(0.02)
    assert setting.answerer.asked == ["hi"]


async def _acks(tab: Listener, n: int) -> list[Frame]:
    await tab.hears("ack", n)
    return tab.of("ack")


async def test_two_tabs_see_the_same(setting: Setting) -> None:
    conversation, one = await setting.start()
    two = await setting.join(conversation)
    await setting.hub.ask(conversation, "a1", "hello there", by=one.subscriber)
    for tab in (one, two):
        assert (await tab.hears("event", role="bot"))["text"] == "echo: hello there"
        assert "".join(f["text"] for f in tab.of("delta")) == "echo: hello there"
    assert one.seqs == two.seqs == [1, 2]
    assert len(one.of("ack")) == 1
    assert two.of("ack") == []


async def test_who_joins_midway_gets_the_reply_so_far_then_the_rest(setting: Setting) -> None:
    setting.answerer.delay_s = 0.01
    conversation, one = await setting.start()
    await setting.hub.ask(conversation, "a1", "one two three four five six", by=one.subscriber)
    await one.hears("delta", 3)
    two = await setting.join(conversation)
    final = await two.hears("event", role="bot")
    (partial,) = two.of("partial")
    deltas = two.of("delta")
    assert partial["text"]
    assert partial["index"] >= 2  # not below what a tab before it had, so that numbers only grow
    assert partial["text"] + "".join(f["text"] for f in deltas) == final["text"]
    assert [f["index"] for f in deltas] == list(range(partial["index"] + 1, partial["index"] + 1 + len(deltas)))
    assert two.seqs == [1, 2]


async def test_joining_at_any_moment_loses_and_doubles_nothing(setting: Setting) -> None:
    conversation, one = await setting.start()
    joined = [one]

    async def join_often() -> None:
        for _ in range(25):
            joined.append(await setting.join(conversation))

    async def ask_often() -> None:
        for n in range(8):
            await setting.hub.ask(conversation, f"a{n}", f"question {n}")
            await one.hears("event", role="bot", turn=f"a{n}")

    await asyncio.gather(join_often(), ask_often())
    for tab in joined:
        await until(lambda tab=tab: len(tab.seqs) == 16)  # type: ignore[misc]
        assert tab.seqs == list(range(1, 17))


async def test_a_reply_that_ends_while_somebody_joins_reaches_them_once(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.answerer.gate.clear()
    conversation, one = await setting.start()
    await setting.hub.ask(conversation, "a1", "hi")
    await until(lambda: setting.answerer.n_open == 1)
    unanswered = setting.storage.unanswered

    async def slow(**options: Any) -> Any:  # the last thing joining reads: the events were read before
        setting.answerer.gate.set()
        await until(lambda: setting.answerer.n_open == 0)
        await asyncio.sleep(0.05)
        return await unanswered(**options)

    monkeypatch.setattr(setting.storage, "unanswered", slow)
    two = await setting.join(conversation)
    await until(lambda: one.seqs == [1, 2] and two.seqs == [1, 2])


async def test_deltas_are_complete_however_far_apart_they_are_sent(setting: Setting) -> None:
    conversation, _ = await setting.start()
    slow = Listener(Subscriber(coalesce_s=30.0))
    setting.listeners.append(slow)
    await setting.hub.subscribe(slow.subscriber, conversation, after=0, welcome=welcome_of)
    setting.answerer.delay_s = 0.002
    await setting.hub.ask(conversation, "a1", "one two three four")
    event = await slow.hears("event", role="bot")
    assert "".join(f["text"] for f in slow.of("delta")) == event["text"]
    assert len(slow.of("delta")) == 2  # the first at once, the rest before the event


async def test_nothing_is_kept_of_conversations_that_nobody_follows(setting: Setting) -> None:
    with pytest.raises(UnknownConversation):
        await setting.join("c_nobody")
    conversation, _ = await setting.storage.create_conversation(None)
    await setting.hub.handoff(conversation, None)
    with pytest.raises(BadFrame):
        await setting.hub.regenerate(conversation, "a1")
    await until(lambda: setting.hub.n_tasks == 0)
    assert setting.hub.n_live == 0


async def test_a_reply_goes_on_when_every_tab_is_closed(setting: Setting) -> None:
    setting.answerer.gate.clear()
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "hi")
    await until(lambda: setting.answerer.n_open == 1)
    await setting.leave(tab)
    assert setting.hub.n_generating == 1
    setting.answerer.gate.set()
    await until(lambda: setting.hub.n_live == 0)
    again = await setting.join(conversation, after=1)
    assert (await again.hears("event"))["text"] == "echo: hi"


async def test_a_caller_that_is_cancelled_leaves_no_gap(setting: Setting) -> None:
    conversation, tab = await setting.start()
    for n in range(5):
        call = asyncio.create_task(setting.hub.ask(conversation, f"a{n}", "hi"))
        for _ in range(n):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await until(lambda: setting.hub.n_tasks == 0)
    stored = [e.seq for e in await setting.storage.events(conversation)]
    await until(lambda: tab.seqs == stored)


async def test_stop_keeps_what_there_is(setting: Setting) -> None:
    setting.answerer.delay_s = 0.01
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", " ".join(map(str, range(200))))
    await tab.hears("delta", 2)
    setting.hub.stop(conversation, "a1")
    event = await tab.hears("event", role="bot")
    assert event["finish"] == "abort"
    assert event["text"] == "".join(f["text"] for f in tab.of("delta"))
    setting.hub.stop(conversation, "a1")  # over already: no error
    setting.hub.stop("c_nobody", "a1")


async def test_stop_reaches_a_question_that_still_waits(setting: Setting) -> None:
    setting.answerer.delay_s = 0.01
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "first of many words to be said")
    await tab.hears("delta")
    setting.answerer.gate.clear()
    await setting.hub.ask(conversation, "a2", "second")
    setting.hub.stop(conversation, "a2")
    setting.answerer.gate.set()
    event = await tab.hears("event", role="bot", turn="a2")
    assert (event["finish"], event["text"]) == ("abort", "")
    assert (await tab.hears("event", role="bot", turn="a1"))["finish"] == "stop"


async def test_a_reply_that_does_not_stop_is_given_up(tmp_path: Path) -> None:
    class Deaf(ScriptedAnswerer):
        async def answer(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Phase | Delta | Reply, None]:
            self.n_open += 1
            try:
                await asyncio.sleep(60)
                yield Phase("typing")
            finally:
                self.n_open -= 1

    storage = Storage(tmp_path / "log.db")
    await storage.open()
    setting = Setting(storage, Deaf(), stop_timeout_s=0.05)
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "hi")
    await until(lambda: setting.answerer.n_open == 1)
    setting.hub.stop(conversation, "a1")
    assert (await tab.hears("failed"))["code"] == "engine_failed"
    await setting.idle()
    await storage.close()


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (EngineBusy(3.0), "busy", True),
        (EngineNotReady("loading weights from /secret/path"), "engine_not_ready", True),
        (EngineFailed("CUDA: /secret/path"), "engine_failed", True),
        (EngineDead("/secret/path"), "engine_dead", True),
        (ZeroDivisionError("/secret/path"), "internal", False),
    ],
)
async def test_a_failed_reply_shows_no_detail_and_the_same_id_tries_again(
    setting: Setting, error: Exception, code: str, retryable: bool
) -> None:
    setting.answerer.errors = [(2, error)]
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "one two three", by=tab.subscriber)
    failed = await tab.hears("failed", turn="a1")
    assert (failed["code"], failed["retryable"]) == (code, retryable)
    assert "/secret" not in json.dumps(failed)
    assert len(await setting.storage.events(conversation)) == 1  # nothing half said is stored

    other = await setting.join(conversation)  # looking again does not try again by itself
    await asyncio.sleep(0.02)
    assert len(setting.answerer.asked) == 1

    asked = await setting.hub.ask(conversation, "a1", "one two three", by=tab.subscriber)
    assert asked.duplicate
    assert (await tab.hears("event", role="bot"))["text"] == "echo: one two three"
    assert (await other.hears("event", role="bot"))["seq"] == 2
    assert tab.seqs == other.seqs == [1, 2]


async def test_a_failure_does_not_hold_up_the_next_question(setting: Setting) -> None:
    setting.answerer.errors = [(2, EngineFailed("x"))]
    setting.answerer.delay_s = 0.01
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "one two three")
    await tab.hears("delta")
    await setting.hub.ask(conversation, "a2", "two")
    await tab.hears("failed", turn="a1")
    await tab.hears("event", role="bot", turn="a2")


async def test_an_answerer_without_a_reply_is_a_failure_not_a_silence(setting: Setting) -> None:
    class Silent(ScriptedAnswerer):
        async def answer(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Phase | Delta | Reply, None]:
            nothing: tuple[Phase, ...] = ()
            for phase in nothing:
                yield phase

    setting.hub.answerer = Silent()
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "hi")
    assert (await tab.hears("failed"))["code"] == "engine_failed"


async def test_a_reply_that_differs_from_its_deltas_says_so(setting: Setting) -> None:
    conversation, tab = await setting.start()
    setting.answerer.final = "Something else."
    await setting.hub.ask(conversation, "a1", "hi")
    assert (await tab.hears("event", role="bot"))["revised"] is True
    setting.answerer.final = "echo: hi there"  # longer than what was streamed: the rest is sent as a delta
    await setting.hub.ask(conversation, "a2", "hi")
    event = await tab.hears("event", role="bot", turn="a2")
    assert "revised" not in event
    assert "".join(f["text"] for f in tab.of("delta", turn="a2")) == event["text"]


async def test_a_regenerated_reply_takes_the_place_of_the_first_in_the_history(setting: Setting) -> None:
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "hi")
    await tab.hears("event", role="bot")
    setting.answerer.reply = lambda question: f"again: {question}"
    await setting.hub.regenerate(conversation, "a1")
    assert (await tab.hears("event", 2, role="bot", turn="a1"))["text"] == "again: hi"
    assert setting.answerer.histories[1] == []
    await setting.hub.ask(conversation, "a2", "and?")
    await tab.hears("event", role="bot", turn="a2")
    assert setting.answerer.histories[2] == [Turn("hi", "again: hi", ("faq-1",))]
    with pytest.raises(BadFrame, match="no turn"):
        await setting.hub.regenerate(conversation, "a9")


async def test_regenerating_what_is_being_made_is_refused(setting: Setting) -> None:
    setting.answerer.gate.clear()
    conversation, _ = await setting.start()
    await setting.hub.ask(conversation, "a1", "hi")
    with pytest.raises(ReplyInProgress):
        await setting.hub.regenerate(conversation, "a1")
    setting.answerer.gate.set()


async def test_a_handoff_by_the_bot_sets_the_state_once(setting: Setting) -> None:
    setting.answerer.outcome = "handoff"
    conversation, tab = await setting.start()
    for n in (1, 2):
        await setting.hub.ask(conversation, f"a{n}", "human please")
        await tab.hears("event", role="bot", turn=f"a{n}")
    assert [(f["state"], f["reason"]) for f in tab.of("event", kind="state")] == [("waiting", "bot")]
    assert (await setting.storage.get(conversation)).state == "waiting"


@pytest.mark.parametrize(
    ("locale", "said", "words"),
    [("en", "转人工", "人工客服"), ("zh-CN", None, "人工客服"), (None, "human!", "human")],
)
async def test_a_handoff_asked_for_by_the_visitor_is_confirmed_in_their_language(
    setting: Setting, locale: str | None, said: str | None, words: str
) -> None:
    conversation, tab = await setting.start(locale)
    if said:
        await setting.hub.ask(conversation, "a1", said)
        await tab.hears("event", role="bot")
    await setting.hub.handoff(conversation, "wrong size")
    await setting.hub.handoff(conversation, None)
    state = await tab.hears("event", kind="state")
    assert (state["state"], state["reason"]) == ("waiting", "wrong size")
    (message,) = tab.of("event", role="system")
    assert words in message["text"]
    assert len(tab.of("event", kind="state")) == 1


async def test_a_human_silences_the_bot(setting: Setting) -> None:
    setting.answerer.delay_s = 0.01
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", " ".join(map(str, range(200))))
    await tab.hears("delta", 2)
    await setting.hub.move(
        conversation, ["request", "accept"], "agent", by={"role": "agent"}, agent={"id": "a_1", "name": "Li"}
    )
    assert (await tab.hears("event", role="bot"))["finish"] == "abort"
    await tab.hears("event", kind="state", state="human")
    await setting.hub.ask(conversation, "a2", "are you there?")
    await tab.hears("event", role="visitor", turn="a2")
    await until(lambda: setting.hub.n_tasks == 0)
    assert len(setting.answerer.asked) == 1
    again = await setting.join(conversation)
    await again.hears("event", 5)
    assert len(setting.answerer.asked) == 1


async def test_a_closed_conversation_opens_again_with_the_next_question(setting: Setting) -> None:
    conversation, tab = await setting.start()
    await setting.hub.close_by_visitor(conversation, 5, None)
    await setting.hub.close_by_visitor(conversation, None, None)
    await setting.hub.ask(conversation, "a1", "one more thing")
    await tab.hears("event", role="bot")
    states = tab.of("event", kind="state")
    assert [(f["state"], f.get("score")) for f in states] == [("closed", 5), ("bot", None)]


async def test_only_replies_can_be_rated(setting: Setting) -> None:
    conversation, tab = await setting.start()
    await setting.hub.ask(conversation, "a1", "hi")
    await tab.hears("event", role="bot")
    for seq in (1, 3, 99):
        with pytest.raises(BadFrame, match="no reply"):
            await setting.hub.rate(conversation, seq, "up", None)
    await setting.hub.rate(conversation, 2, "down", "wrong")
    rating = await tab.hears("event", kind="rating")
    assert (rating["rated"], rating["value"], rating["comment"], rating["seq"]) == (2, "down", "wrong", 3)


# Restarts


async def test_what_a_restart_left_unanswered_is_answered_at_start_and_on_return(setting: Setting) -> None:
    conversation, _ = await setting.storage.create_conversation(None)
    await setting.storage.append_ask(conversation, "a1", "at start")
    assert await setting.hub.recover() == 1
    assert await setting.hub.recover() == 0  # it is under way
    await until(lambda: setting.hub.n_live == 0)
    assert await setting.hub.recover() == 0
    other, _ = await setting.storage.create_conversation(None)
    await setting.storage.append_ask(other, "a1", "on return")
    tab = await setting.join(other)
    assert (await tab.hears("event", role="bot"))["recovered"] is True
    assert setting.answerer.asked == ["at start", "on return"]


async def test_a_question_cut_long_ago_is_marked_and_offered_again(setting: Setting) -> None:
    setting.hub.resume_age_s = -1.0
    conversation, _ = await setting.storage.create_conversation(None)
    await setting.storage.append_ask(conversation, "a1", "long ago")
    for tab in (await setting.join(conversation), await setting.join(conversation)):
        failed = await tab.hears("failed")
        assert (failed["turn"], failed["code"], failed["retryable"]) == ("a1", "interrupted", True)
    assert setting.answerer.asked == []
    await setting.hub.ask(conversation, "a1", "long ago")
    await tab.hears("event", role="bot", turn="a1")
    late = await setting.join(conversation)
    await late.hears("event", role="bot")
    assert not late.of("failed")


async def test_nothing_is_taken_up_before_it_can_be_answered(setting: Setting) -> None:
    conversation, _ = await setting.storage.create_conversation(None)
    await setting.storage.append_ask(conversation, "a1", "one")
    await setting.storage.append_ask(conversation, "a2", "two")
    setting.hub.hold_recovery()
    tab = await setting.join(conversation)
    await asyncio.sleep(0.02)
    assert not tab.of("failed")
    assert setting.answerer.asked == []
    assert await setting.hub.recover(max_age_s=-1.0) == 2  # too old to be taken up unasked, but its visitor is here
    for turn in ("a1", "a2"):
        assert (await tab.hears("event", role="bot", turn=turn))["recovered"] is True


async def test_draining_ends_each_connection_when_its_reply_is_done(setting: Setting) -> None:
    setting.answerer.gate.clear()
    idle, quiet = await setting.start()
    busy, tab = await setting.start()
    await setting.hub.ask(busy, "a1", "one two three")
    await tab.hears("status", phase="typing")
    draining = asyncio.create_task(setting.hub.drain(30.0))
    await until(lambda: quiet.subscriber.close_code == 1012)
    for refused in (setting.hub.ask(busy, "a2", "x"), setting.hub.regenerate(busy, "a1"), setting.join(idle)):
        with pytest.raises(Restarting):
            await refused
    assert tab.subscriber.close_code is None
    setting.answerer.gate.set()
    await draining
    assert tab.of("event", role="bot")
    assert tab.subscriber.close_code == 1012


async def test_closing_lets_short_replies_end_and_gives_long_ones_up(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "log.db")
    await storage.open()
    setting = Setting(storage, ScriptedAnswerer(delay_s=0.01))
    short, tab = await setting.start()
    long, other = await setting.start()
    await setting.hub.ask(short, "a1", "hi")
    await setting.hub.ask(long, "a1", " ".join(map(str, range(1000))))
    await setting.hub.ask(long, "a2", "waits")
    await other.hears("delta", 2)
    await setting.hub.close(0.5)
    assert setting.hub.n_tasks == 0
    assert setting.answerer.n_open == 0
    assert [e.role for e in await storage.events(short)] == ["visitor", "bot"]
    assert [e.role for e in await storage.events(long)] == ["visitor", "visitor"]
    assert (tab.subscriber.close_code, other.subscriber.close_code) == (1012, 1012)
    with pytest.raises(Restarting):
        await setting.hub.ask(short, "a2", "too late")
    await setting.idle()
    await storage.close()


# Subscriber


async def test_deltas_are_joined_for_whoever_is_slow() -> None:
    subscriber, reply = Subscriber(coalesce_s=0.0), ReplyUnderWay("a1")
    subscriber.begin(reply)
    for word in ("one ", "two ", "three "):
        reply.text += word
        subscriber.grown()
    assert json.loads(await subscriber.next_frame() or "")["text"] == "one two three "
    reply.text += "four"
    subscriber.finish(reply, flush=True)
    frame = json.loads(await subscriber.next_frame() or "")
    assert (frame["index"], frame["text"]) == (1, "four")


async def test_deltas_keep_their_distance_but_the_first_and_the_last_do_not_wait() -> None:
    subscriber, reply = Subscriber(coalesce_s=30.0), ReplyUnderWay("a1")
    subscriber.begin(reply)
    reply.text += "first "
    assert "first" in (await subscriber.next_frame() or "")
    waiting = asyncio.create_task(subscriber.next_frame())
    reply.text += "second "
    subscriber.grown()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    subscriber.finish(reply, flush=True)
    assert "second" in (await waiting or "")


async def test_a_full_subscriber_is_ended_and_a_replay_does_not_fill_it() -> None:
    subscriber = Subscriber(max_frames=3)
    for n in range(10):
        subscriber.push(str(n), replay=True)
    assert not subscriber.ended
    subscriber.push("one too many")
    assert subscriber.close_code == 1013
    assert await subscriber.next_frame() is None


async def test_frames_queued_before_the_end_are_still_sent() -> None:
    subscriber = Subscriber()
    subscriber.push("a")
    subscriber.end(1008)
    subscriber.push("b")
    assert await subscriber.next_frame() == "a"
    assert await subscriber.next_frame() is None


# History


def test_history_follows_questions_not_the_order_of_the_log() -> None:
    def message(seq: int, role: str, text: str, turn: str | None = None) -> Event:
        return Event(seq, NOW, "message", {"role": role, "text": text, **({"turn": turn} if turn else {})})

    events = [
        message(1, "visitor", "q1", "a1"),
        message(2, "visitor", "q2", "a2"),
        message(3, "bot", "r1", "a1"),
        Event(4, NOW, "state", {"state": "waiting"}),
        message(5, "bot", "r2", "a2"),
        message(6, "visitor", "q3", "a3"),  # failed: no reply
        message(7, "visitor", "q4", "a4"),
        message(8, "bot", "r1 again", "a1"),
        message(9, "agent", "r4"),
    ]
    assert history_of(events, before=2) == [Turn("q1", "r1 again")]
    assert history_of(events, before=10) == [Turn("q1", "r1 again"), Turn("q2", "r2"), Turn("q3\nq4", "r4")]
