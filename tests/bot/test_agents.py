"""Agents at work: who gets a conversation, what they see, what visitors see of it, and what if they vanish."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from bot.agents.desk import DeskRules
from bot.agents.summary import summary_of
from bot.errors import Taken
from tests.fakes import ScriptedAnswerer, ScriptedEngine
from tests.inbox import Browser, Seat, add_agent
from tests.running import Running, Wire, running_server, until


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


async def waiting_conversation(server: Running, text: str = "I need a human", locale: str = "en") -> str:
    """Return a conversation in the queue, whose visitor has no connection."""
    conversation, _ = await server.storage.create_conversation(locale)
    await server.storage.append_ask(conversation, "q1", text)
    await server.hub.handoff(conversation, None)
    return conversation


# Who gets it


async def test_of_two_agents_who_accept_200_conversations_at_once_each_has_exactly_one_owner(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        one, two = await add_agent(server, "one"), await add_agent(server, "two")
        conversations = await asyncio.gather(*(waiting_conversation(server) for _ in range(200)))
        async with Browser(server, "one") as a, Browser(server, "two") as b, a.seat() as first, b.seat() as second:

            async def accept_all(seat: Seat, order: list[str]) -> dict[str, str]:
                for conversation in order:
                    await seat.say("accept", conversation=conversation, id=conversation)
                outcome: dict[str, str] = {}
                while len(outcome) < len(order):
                    frame = await seat.hear()
                    if frame["type"] in ("done", "failed"):
                        outcome[frame["id"]] = frame.get("code", "done")
                        if frame["type"] == "failed":
                            assert frame["owner"]["id"] in (one.id, two.id)
                return outcome

            won = await asyncio.gather(accept_all(first, conversations), accept_all(second, conversations[::-1]))
        for conversation in conversations:
            assert sorted([won[0][conversation], won[1][conversation]]) == ["done", "taken"]
            winner = one.id if won[0][conversation] == "done" else two.id
            head = await server.storage.get(conversation)
            assert (head.state, head.owner) == ("human", winner)
            events = await server.storage.events(conversation)
            owners = [e.data["agent"]["id"] for e in events if e.kind == "state" and e.data["state"] == "human"]
            assert owners == [winner]
            assert [e.seq for e in events] == list(range(1, len(events) + 1))
        assert min(list(w.values()).count("done") for w in won) > 0  # a race, not a rout


async def test_two_servers_on_one_database_still_give_one_owner(database: Path) -> None:
    """What the SQL statement decides alone, without the lock of one process."""
    async with running_server(database, agents=True) as server:
        conversation = await waiting_conversation(server)

        async def swap(agent: str) -> bool:
            state = {"state": "human", "agent": {"id": agent, "name": agent}}
            try:
                await server.storage.change(
                    conversation, [("state", state)], state="waiting", owner=None, new_owner=agent
                )
            except Taken:
                return False
            return True

        won = await asyncio.gather(*(swap(f"a_{n}") for n in range(20)))
        assert sum(won) == 1
        assert (await server.storage.get(conversation)).owner == f"a_{won.index(True)}"


async def test_the_bot_is_silent_from_the_moment_an_agent_accepts(database: Path) -> None:
    answerer = ScriptedAnswerer(delay_s=0.005)
    async with running_server(database, answerer, agents=True) as server, Wire(server.ws_url) as tab:
        await add_agent(server, "li")
        conversation = (await tab.hello())["conversation"]
        await tab.say("handoff")
        await tab.hear("event", kind="state", state="waiting")
        await tab.say("ask", id="q1", text=" ".join(map(str, range(400))))
        await tab.hear("delta")
        await tab.say("ask", id="q2", text="and this?")
        await tab.hear("ack", id="q2")
        async with Browser(server, "li") as browser, browser.seat() as seat:
            assert (await seat.do("accept", conversation))["type"] == "done"
            state = await tab.hear("event", kind="state", state="human")
            cut = tab.of("event", role="bot")
            # What it had said is kept, in front of the agent, and is exactly what was shown.
            assert [f["finish"] for f in cut] == ["abort"]
            assert cut[0]["seq"] < state["seq"]
            assert cut[0]["text"] == "".join(f["text"] for f in tab.of("delta"))
            assert state["agent"]["name"] == "Li"
            await tab.say("ask", id="q3", text="are you there?")
            await tab.hear("ack", id="q3")
            await tab.say("regenerate", turn="q1")
            assert (await tab.hear("failed"))["code"] == "not_allowed"
            await until(lambda: not server.answerer.n_open and not server.hub.n_tasks)
            assert [f for f in tab.of("delta") if f.get("turn") == "q3"] == []
            assert all(e.seq < state["seq"] for e in await server.storage.events(conversation) if e.role == "bot")
            assert "are you there?" not in server.answerer.asked


@pytest.mark.parametrize("n", range(12))
async def test_no_word_of_the_bot_comes_after_accept_however_close_the_race(database: Path, n: int) -> None:
    answerer = ScriptedAnswerer(delay_s=0.001)
    async with running_server(database, answerer, agents=True) as server, Wire(server.ws_url) as tab:
        agent = await add_agent(server, "li")
        conversation = (await tab.hello())["conversation"]
        await tab.say("handoff")
        await tab.hear("event", kind="state")
        await tab.say("ask", id="q1", text="one two three four five six")
        await tab.hear("ack", id="q1")
        await asyncio.sleep(0.001 * n)
        assert server.parts.desk is not None
        await server.parts.desk.accept(agent, conversation)
        await until(lambda: not server.hub.n_tasks)
        events = await server.storage.events(conversation)
        accepted = next(e.seq for e in events if e.kind == "state" and e.data["state"] == "human")
        assert all(e.seq < accepted for e in events if e.role == "bot")
        await tab.hear("event", kind="state", state="human")
        await tab.nothing_more()


# At work


async def test_a_conversation_with_a_human_from_the_queue_to_the_bot_again(database: Path) -> None:
    async with running_server(database, agents=True) as server, Wire(server.ws_url) as tab:
        await add_agent(server, "li", name="Li Wei")
        async with Browser(server, "li") as browser, browser.seat() as seat:
            assert seat.welcome["type"] == "welcome"
            assert seat.socket.subprotocol == "zhanggui.agent.v1"
            assert [(a["login"], a["status"]) for a in seat.welcome["agents"]] == [("li", "online")]
            welcome = await tab.hello(locale="en")
            assert welcome["human"] == {
                "open": True, "opens_at": None, "agents_online": True, "position": None, "expected_wait_s": None
            }  # fmt: skip
            conversation = welcome["conversation"]
            await tab.ask("q1", "Where is my order QH20260001?")
            await tab.say("handoff", reason="parcel lost")
            state = await tab.hear("event", kind="state")
            assert (state["position"], state["open"]) == (1, True)
            assert "expected_wait_s" not in state  # nobody can know yet
            card = await seat.card(conversation, state="waiting")
            assert (card["position"], card["reason"], card["visitor_online"]) == (1, "parcel lost", True)
            assert card["last"]["text"].startswith("echo: Where is my order")

            await seat.say("open", conversation=conversation)
            opened = await seat.hear("opened")
            assert opened["summary"]["questions"] == ["Where is my order QH20260001?"]
            assert opened["summary"]["mentioned"] == ["QH20260001"]
            replayed = [await seat.hear("event") for _ in range(4)]
            assert [(e["kind"], e.get("role"), e["conversation"]) for e in replayed] == [
                ("message", "visitor", conversation),
                ("message", "bot", conversation),
                ("message", "system", conversation),
                ("state", None, conversation),
            ]
            assert replayed[1]["citations"][0]["source"] == "faqs.csv:2"

            assert (await seat.tell(conversation, "m0", "too early"))["code"] == "not_yours"
            assert (await seat.do("accept", conversation))["type"] == "done"
            assert (await seat.do("accept", conversation))["type"] == "done"  # twice is once
            assert "Li Wei" in (await tab.hear("event", role="system", code="joined"))["text"]
            assert (await tab.hear("event", kind="state", state="human"))["agent"]["name"] == "Li Wei"

            await seat.say("typing", conversation=conversation, on=True)
            assert await tab.hear("typing") == {"type": "typing", "role": "agent", "on": True, "name": "Li Wei"}
            ack = await seat.tell(conversation, "m1", "Let me look.")
            assert (ack["duplicate"], await seat.tell(conversation, "m1", "Let me look.")) == (
                False,
                {**ack, "duplicate": True},
            )
            assert (await seat.tell(conversation, "m1", "other words"))["code"] == "conflict"
            message = await tab.hear("event", role="agent")
            assert (message["text"], message["agent"]["name"]) == ("Let me look.", "Li Wei")
            assert "client_id" not in message
            await tab.say("typing", on=True)
            assert (await seat.hear("typing"))["role"] == "visitor"
            await tab.say("ask", id="q2", text="thanks")
            assert (await seat.hear("event", role="visitor", turn="q2"))["conversation"] == conversation
            await seat.tell(conversation, "m2", "It arrives on Friday.")
            await tab.hear("event", role="agent", text="It arrives on Friday.")

            assert (await seat.do("return", conversation))["type"] == "done"
            await tab.hear("event", kind="state", state="bot")
            await tab.ask("q3", "when does it arrive?")
            # What the agent said is what the bot knows of the conversation.
            past = server.answerer.histories[-1]
            assert [(t.question, t.reply) for t in past][1:] == [("thanks", "It arrives on Friday.")]
            assert "Let me look." in past[0].reply
            assert server.answerer.asked[-1] == "when does it arrive?"
            assert "thanks" not in server.answerer.asked  # the agent had that one


async def test_notes_are_for_agents_only(database: Path) -> None:
    async with running_server(database, agents=True) as server, Wire(server.ws_url) as tab:
        await add_agent(server, "li")
        await add_agent(server, "wang")
        welcome = await tab.hello()
        conversation = welcome["conversation"]
        await tab.say("handoff")
        await tab.hear("event", kind="state")
        async with Browser(server, "li") as a, Browser(server, "wang") as b, a.seat() as li, b.seat() as wang:
            await li.do("accept", conversation)
            await wang.say("open", conversation=conversation)
            await wang.hear("opened")
            await li.say("note", conversation=conversation, id="n1", text="SECRET: gets a refund")
            await li.hear("ack", id="n1")
            note = await wang.hear("event", kind="note")
            assert (note["text"], note["by"]["name"]) == ("SECRET: gets a refund", "Li")
            done = await li.do("transfer", conversation, to=b.agent["id"], note="SECRET too")
            assert done["type"] == "done"
            await wang.hear("event", kind="note", text="SECRET too")
            await li.tell(conversation, "m1", "mine no more")
            await tab.hear("event", kind="state", reason="transfer")
            async with Wire(server.ws_url) as again:
                await again.hello(conversation=conversation, token=welcome["token"], after=0)
                await again.say("ping")
                await again.hear("pong")
                for visitor in (tab, again):
                    assert "SECRET" not in str(visitor.heard)
                    seqs = [f["seq"] for f in visitor.of("event")]
                    assert seqs == sorted(set(seqs))
            whole = await b.get(f"/api/conversations/{conversation}")
            assert [e["text"] for e in whole["events"] if e["kind"] == "note"] == [
                "SECRET: gets a refund",
                "SECRET too",
            ]
            assert whole["conversation"]["owner"] == {"id": b.agent["id"], "name": "Wang"}


async def test_only_the_owner_or_a_merchant_moves_a_conversation_on(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        for login, role in (("li", "agent"), ("wang", "agent"), ("boss", "merchant")):
            await add_agent(server, login, role)  # type: ignore[arg-type]
        conversation = await waiting_conversation(server)
        async with AsyncExitStack() as stack:
            browsers = [await stack.enter_async_context(Browser(server, n)) for n in ("li", "wang", "boss")]
            li, wang, boss = [await stack.enter_async_context(b.seat()) for b in browsers]
            await li.do("accept", conversation)
            for type_, fields in (("return", {}), ("close", {}), ("transfer", {"to": "queue"})):
                failed = await wang.do(type_, conversation, **fields)
                assert (failed["code"], failed["type_of"], failed["conversation"]) == ("not_yours", type_, conversation)
            assert (await wang.tell(conversation, "m1", "hello"))["code"] == "not_yours"
            taken = await wang.do("accept", conversation)
            assert (taken["code"], taken["owner"]) == ("taken", {"id": browsers[0].agent["id"], "name": "Li"})
            assert (await li.do("transfer", conversation, to="a_nobody"))["code"] == "not_found"
            assert (await boss.do("transfer", conversation, to="queue"))["type"] == "done"
            assert (await wang.do("accept", conversation))["type"] == "done"
            assert (await boss.do("close", conversation))["type"] == "done"
            assert (await wang.do("accept", conversation))["code"] == "not_allowed"
            assert (await wang.do("return", "c_nothing"))["code"] == "unknown_conversation"


async def test_agents_see_what_a_human_was_asked_for_and_merchants_see_all(database: Path) -> None:
    async with running_server(database, agents=True) as server, Wire(server.ws_url) as tab:
        await add_agent(server, "li")
        await add_agent(server, "boss", "merchant")
        bots = (await tab.hello())["conversation"]
        await tab.ask("q1", "只问机器人 shoes")
        queued = await waiting_conversation(server, "求助人工 shoes")
        async with Browser(server, "li") as a, Browser(server, "boss") as b, a.seat() as li, b.seat() as boss:
            assert {c["id"] for c in li.welcome["conversations"]} == {queued}
            assert {c["id"] for c in boss.welcome["conversations"]} == {queued, bots}
            assert (await li.do("take_over", bots))["code"] == "unknown_conversation"
            await li.say("open", conversation=bots)
            assert (await li.hear("failed"))["code"] == "unknown_conversation"
            answer = await a.http.get(f"/api/conversations/{bots}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            found = await b.get("/api/conversations", q="SHOES")
            assert {c["id"] for c in found["conversations"]} == {queued, bots}
            assert [c["id"] for c in (await a.get("/api/conversations", q="shoes"))["conversations"]] == [queued]
            assert (await a.get("/api/conversations", q="100%"))["conversations"] == []
            first = await b.get("/api/conversations", limit=1)
            second = await b.get("/api/conversations", limit=1, before=first["next"])
            assert {first["conversations"][0]["id"], second["conversations"][0]["id"]} == {queued, bots}

            await tab.say("ask", id="q2", text="still with the bot")
            assert (await boss.card(bots, state="bot"))["last"] is not None
            assert (await boss.do("take_over", bots))["type"] == "done"
            assert [f["state"] for f in [await tab.hear("event", kind="state") for _ in range(2)]] == [
                "waiting",
                "human",
            ]
            assert (await li.card(bots, state="human"))["owner"]["name"] == "Boss"
            assert (await boss.do("close", bots))["type"] == "done"
            assert (await li.card(bots, state="closed"))["owner"] is None  # it leaves the queues of all
            mine = await b.get("/api/conversations", owner="me", state="human,waiting")
            assert mine["conversations"] == []


async def test_an_agent_who_vanishes_loses_the_conversation_and_the_visitor_is_told(database: Path) -> None:
    async with running_server(database, agents=True, desk_rules=DeskRules(agent_gone_s=0.3)) as server:
        await add_agent(server, "li", name="Li")
        await add_agent(server, "wang")
        async with Wire(server.ws_url) as tab, Browser(server, "wang") as other, other.seat() as wang:
            conversation = (await tab.hello(locale="en"))["conversation"]
            await tab.say("handoff")
            async with Browser(server, "li") as browser, browser.seat() as one:
                await one.card(conversation, state="waiting")
                await one.do("accept", conversation)
                await tab.say("ask", id="q1", text="anybody?")
                async with browser.seat() as two:  # a second tab keeps the agent here
                    await one.socket.close()
                    await asyncio.sleep(0.6)
                    assert (await two.do("accept", conversation))["type"] == "done"
                    assert (await server.storage.get(conversation)).state == "human"
            assert "lost the connection" in (await tab.hear("event", code="agent_gone"))["text"]
            state = await tab.hear("event", kind="state", reason="agent_gone")
            assert (state["state"], state["by"]) == ("waiting", {"role": "server"})
            # What nobody has answered is the bot's again.
            assert (await tab.hear("event", role="bot", turn="q1"))["text"] == "echo: anybody?"
            assert (await wang.do("accept", conversation))["type"] == "done"


async def test_owners_who_do_not_come_back_after_a_restart_lose_their_conversations(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        conversation = await waiting_conversation(server)
        async with Browser(server, "li") as browser, browser.seat() as seat:
            await seat.do("accept", conversation)
    async with running_server(database, agents=True, desk_rules=DeskRules(agent_gone_s=0.2)) as server:
        async with asyncio.timeout(10):
            while (await server.storage.get(conversation)).state != "waiting":
                await asyncio.sleep(0.05)


async def test_visitors_in_the_queue_are_told_their_place_as_it_changes(database: Path) -> None:
    async with running_server(database, agents=True) as server, AsyncExitStack() as stack:
        await add_agent(server, "li")
        tabs = [await stack.enter_async_context(Wire(server.ws_url)) for _ in range(3)]
        conversations = []
        for n, tab in enumerate(tabs, 1):
            conversations.append((await tab.hello(locale="en"))["conversation"])
            await tab.say("handoff")
            assert (await tab.hear("event", kind="state"))["position"] == n
        browser = await stack.enter_async_context(Browser(server, "li"))
        seat = await stack.enter_async_context(browser.seat())
        assert [c["position"] for c in seat.welcome["conversations"]] == [1, 2, 3]
        await asyncio.sleep(0.2)
        await seat.do("accept", conversations[0])
        assert (await tabs[1].hear("queue"))["position"] == 1
        assert (await tabs[2].hear("queue"))["position"] == 2
        stats = await browser.get("/api/stats")
        assert (stats["waiting"], stats["human"], stats["agents_online"]) == (2, 1, 1)
        assert stats["expected_wait_s"] is None
        assert stats["today"]["accepted"] == 1
        metrics = (await browser.http.get("/metrics")).text
        assert 'zhanggui_handoffs_total{reason="visitor"} 3.0' in metrics
        assert "zhanggui_desk_agents_online 1.0" in metrics
        assert "zhanggui_handoff_wait_seconds_count 1.0" in metrics


async def test_the_wait_is_told_once_there_is_something_to_go_by(database: Path) -> None:
    async with running_server(database, agents=True, desk_rules=DeskRules(conversations_per_agent=1)) as server:
        await add_agent(server, "li")
        async with Browser(server, "li") as browser, browser.seat() as seat:
            for _ in range(4):
                conversation = await waiting_conversation(server)
                assert (await seat.do("accept", conversation))["type"] == "done"
                if _ < 3:
                    await seat.do("close", conversation)
            assert (await browser.get("/api/stats"))["expected_wait_s"] == 0.0  # they took milliseconds
            await seat.say("presence", status="away")
            frame = await seat.hear("agents")
            assert frame["agents"][0]["status"] == "away"
            assert (await browser.get("/api/stats"))["expected_wait_s"] is None


async def test_suggestions_come_from_the_answer_pipeline_and_are_never_sent(database: Path) -> None:
    async with running_server(database, agents=True) as server, Wire(server.ws_url) as tab:
        await add_agent(server, "li")
        conversation = (await tab.hello(locale="en"))["conversation"]
        await tab.ask("q1", "How long is the warranty?")
        await tab.ask("q2", "转人工")
        await tab.say("handoff")
        await tab.hear("event", kind="state")
        async with Browser(server, "li") as browser, browser.seat() as seat:
            await seat.do("accept", conversation)
            await tab.hear("event", kind="state", state="human")
            n_heard = len(tab.of("event"))
            await seat.say("suggest", conversation=conversation, id="s1")
            found = await seat.hear("suggestion")
            assert (found["id"], found["question"]) == ("s1", "How long is the warranty?")  # not the call for a human
            (suggestion,) = found["suggestions"]
            assert suggestion["text"] == "echo: How long is the warranty?"
            assert suggestion["citations"][0]["id"] == "faq-1"
            await seat.say("suggest", conversation=conversation, id="s2", text="and for lamps?")
            assert (await seat.hear("suggestion", id="s2"))["suggestions"][0]["text"] == "echo: and for lamps?"
            server.answerer.outcome = "no_answer"
            await seat.say("suggest", conversation=conversation, id="s3")
            assert (await seat.hear("suggestion", id="s3"))["suggestions"] == []
            await tab.say("ping")
            await tab.hear("pong")
            assert len(tab.of("event")) == n_heard
            assert len(await server.storage.events(conversation)) == n_heard


async def test_a_summary_is_by_code_and_by_the_engine_where_there_is_one(database: Path) -> None:
    engine = ScriptedEngine("The customer wants a refund.")
    async with running_server(database, engine=engine, agents=True) as server, Wire(server.ws_url) as tab:
        await add_agent(server, "li")
        conversation = (await tab.hello(locale="en"))["conversation"]
        await tab.ask("q1", "Refund for order QH12345678 please, mail me at ann@example.com")
        await tab.say("handoff")
        await tab.hear("event", kind="state")
        async with Browser(server, "li") as browser, browser.seat() as seat:
            await seat.say("summarize", conversation=conversation, id="s1")
            summary = (await seat.hear("summary", id="s1"))["summary"]
            assert (summary["text"], summary["by"]) == ("The customer wants a refund.", "engine")
            assert summary["mentioned"] == ["QH12345678", "ann@example.com"]
            assert "Refund for order QH12345678" in engine.prompts[-1][0].content
            engine.ready = False
            await seat.say("summarize", conversation=conversation, id="s2")
            summary = (await seat.hear("summary", id="s2"))["summary"]
            assert summary["by"] == "code"
            assert "Named: QH12345678; ann@example.com" in summary["text"]


async def test_an_empty_conversation_has_a_summary_too(database: Path) -> None:
    assert summary_of([], None, "zh") == {
        "reason": None, "questions": [], "unanswered": [], "mentioned": [], "sources": [],
        "n_messages": 0, "n_visitor": 0, "rating": {"up": 0, "down": 0}, "text": "",
    }  # fmt: skip


async def test_what_an_agent_left_unanswered_is_the_bots_after_return_and_nobodys_after_close(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        async with Browser(server, "li") as browser, browser.seat() as seat, Wire(server.ws_url) as tab:
            conversation = (await tab.hello())["conversation"]
            for turn, type_ in (("q1", "return"), ("q2", "close")):
                await tab.say("handoff")
                await tab.hear("event", kind="state", state="waiting")
                await seat.do("accept", conversation)
                await tab.hear("event", kind="state", state="human")
                await tab.say("ask", id=turn, text=f"{turn}?")
                await tab.hear("ack", id=turn)
                assert server.answerer.asked == ([] if turn == "q1" else ["q1?"])
                assert (await seat.do(type_, conversation))["type"] == "done"
                if type_ == "return":
                    await tab.hear("event", role="bot", turn="q1")
            await tab.hear("event", kind="state", state="closed")
            await tab.ask("q3", "once more?")  # reopens it
            assert server.answerer.asked == ["q1?", "once more?"]
            assert await server.storage.unanswered(since=datetime(2020, 1, 1, tzinfo=UTC)) == []


# The socket


async def test_a_socket_without_a_session_or_from_another_page_is_refused(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        async with Browser(server, "li") as browser:
            cookie = browser.seat().cookie
            for origin in ("https://shop.example", f"{server.http_url}.evil.example", "null"):
                with pytest.raises(Exception, match="403"):
                    await Seat(server, cookie, origin=origin).__aenter__()
            with pytest.raises(Exception, match="403"):
                await Seat(server, cookie, origin="").__aenter__()  # a browser always says where it is
            for bad in ("", "zhanggui_session=guess", "zhanggui_session="):
                async with Seat(server, bad) as seat:
                    assert seat.welcome["code"] == "unauthorized"
                    with pytest.raises(ConnectionClosed) as closed:
                        await seat.hear()
                    assert closed.value.rcvd is not None
                    assert closed.value.rcvd.code == 4401


@pytest.mark.parametrize("how", ["sign out", "disable", "password"])
async def test_a_session_that_ends_takes_its_sockets_along(database: Path, how: str) -> None:
    async with running_server(database, agents=True) as server:
        agent = await add_agent(server, "li")
        desk = server.parts.desk
        assert desk is not None
        async with Browser(server, "li") as browser, browser.seat() as seat:
            if how == "sign out":
                await browser.send("DELETE", "/api/session", expect=204)
            elif how == "disable":
                await desk.records.set_disabled(agent.id, True)
                await desk.check_sessions()
            else:
                await desk.accounts.set_password(agent, "another long password")
                await desk.check_sessions()
            with suppress(ConnectionClosed):
                while True:
                    await seat.hear()
            assert seat.socket.close_code == 4401
            assert (await browser.http.get("/api/session")).status_code == 401


async def test_bad_frames_of_agents_are_refused_and_the_connection_stays(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        conversation = await waiting_conversation(server)
        async with Browser(server, "li") as browser, browser.seat() as seat:
            for text in ("{", "[]", '{"type":"fly"}', '{"type":"say","conversation":"c"}', '{"type":"hello"}'):
                await seat.socket.send(text)
                assert (await seat.hear("failed"))["code"] == "bad_frame"
            await seat.say("say", conversation=conversation, id="m1", text="   ")
            assert (await seat.hear("failed"))["code"] == "bad_frame"
            await seat.say("say", conversation=conversation, id="m1", text="x" * 2001)
            assert (await seat.hear("failed"))["code"] == "too_long"
            assert (await seat.do("accept", conversation))["type"] == "done"


async def test_an_agents_tab_resumes_where_it_was(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        conversation = await waiting_conversation(server)
        async with Browser(server, "li") as browser:
            async with browser.seat() as seat:
                await seat.do("accept", conversation)
                last = (await seat.tell(conversation, "m1", "one"))["seq"]
            async with browser.seat() as one, browser.seat() as two:
                for seat in (one, two):
                    await seat.say("open", conversation=conversation, after=last)
                    assert (await seat.hear("opened"))["seq"] == last
                await one.tell(conversation, "m1", "one")  # its ack was lost: sent again
                await one.tell(conversation, "m2", "two")
                for seat in (one, two):
                    assert (await seat.hear("event"))["text"] == "two"
                await two.say("leave", conversation=conversation)
                await one.tell(conversation, "m3", "three")
                await one.hear("event", text="three")
                await two.say("ping")
                await two.hear("pong")
                assert two.of("event", text="three") == []
        texts = [e.text for e in await server.storage.events(conversation) if e.role == "agent"]
        assert texts == ["one", "two", "three"]
