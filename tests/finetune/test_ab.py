"""`ab start|status|stop`: a live experiment through the socket, and its result against a count by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bot.answer import Answerer, Rules
from bot.engines.releases import ReleasedEngines
from bot.experiments import Experiment, newcombe, parse_experiment, wilson
from bot.live_experiment import LiveExperiment
from bot.messages import Customer, Event, Message
from bot.releases import follow_pointer
from bot.storage import Conversation, Log
from finetune import ab
from finetune.__main__ import main
from retrieval.passages import Passage
from tests.engines.test_releases import FakeMaker
from tests.fake_retriever import FakeRetriever
from tests.fakes import store_profile
from tests.running import Running, Wire, running_server, until

FEE = Passage("fee", "faq", "Delivery fee", "Delivery costs ¥7.", "en", "faqs.csv:2")
PASSED = {"passed": True, "reasons": []}


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    """`old` is current, `new` was staged and replayed."""
    folder = tmp_path / "releases"
    for n, name in enumerate(("old", "new")):
        model = folder / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (model / "tokenizer.json").write_text("{}")
        save_file({"x": np.zeros(2, np.float32)}, model / "model.safetensors")
        lineage = {"name": name, "base": "tiny", "published_at": f"2026-11-0{n + 1}", "best_loss": 1.0}
        (folder / name / "release.json").write_text(json.dumps(lineage))
    (folder / "current.json").write_text(json.dumps({"release": "old", "previous": []}))
    (folder / "replays").mkdir()
    (folder / "replays" / "new.json").write_text(json.dumps({"current": "old", "verdict": PASSED}))
    return folder


def start(releases: Path, *more: str) -> list[str]:
    return ["ab", "start", "--release", "new", "--releases", str(releases), "--baseline", "0.5", "--elsewhere", *more]


def database_of(releases: Path) -> Path:
    return releases.parent / "conversations.sqlite3"


@asynccontextmanager
async def serving(releases: Path) -> AsyncIterator[tuple[Running, ReleasedEngines]]:
    """A real server that follows the releases; each made-up engine says its own name."""
    experiment = LiveExperiment(releases, follow_pointer(releases))
    hello = [Message("user", "hello")]
    engines = ReleasedEngines(FakeMaker(), experiment.wanted, lambda: [hello], check_interval_s=0.02)
    retriever = FakeRetriever([FEE], {"delivery": [("fee", 0.9)]})
    rules = Rules(direct=False, max_reply_tokens=2)
    answerer: Any = Answerer(retriever=retriever, engine=engines, profile=store_profile(), rules=rules)
    try:
        async with running_server(database_of(releases), answerer, engine=engines, assign=experiment.assign) as running:
            await until(lambda: engines.status().name == "old")
            yield running, engines
    finally:
        answerer.close()


def adapter_of(reply: dict[str, Any]) -> str:
    name = str(reply["release"]["adapter"])
    assert reply["text"].split() == [name, name]  # what is stamped is what spoke, to the last word
    return name


async def command(*arguments: str) -> int:
    """Run a command beside the server, as a merchant would."""
    return await asyncio.to_thread(main, list(arguments))


@pytest.mark.timeout(120)
async def test_conversations_are_dealt_out_stay_where_they_are_and_are_counted_as_by_hand(
    releases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--releases", str(releases), "--database", str(database_of(releases))]
    dealt: dict[str, str] = {}
    tokens: dict[str, str] = {}
    early = ""

    async def visit(server: Running, n: int) -> None:
        """One visitor: asks, and of each eight one asks for a human, two rate, and most close."""
        async with Wire(server.ws_url) as tab:
            welcome = await tab.hello(locale="en")
            id_ = welcome["conversation"]
            tokens[id_] = welcome["token"]
            reply = await tab.ask("q", "how much is delivery?")
            dealt[id_] = adapter_of(reply)
            if n % 8 == 0:
                await tab.say("handoff")
                await tab.hear("event", kind="state")
            if n % 8 in (1, 2):
                await tab.say("rate", seq=reply["seq"], value="up" if n % 8 == 1 else "down")
                await tab.hear("event", kind="rating")
            if n % 8 != 7:
                await tab.say("close")
                await tab.hear("event", kind="state", state="closed")
            outcomes[id_] = (n % 8 != 0, n % 8 not in (0, 2), {1: True, 2: False}.get(n % 8), n % 8 != 7)

    outcomes: dict[str, tuple[bool, bool, bool | None, bool]] = {}  # no hand-off, resolved, rated, closed
    async with serving(releases) as (server, engines):
        async with Wire(server.ws_url) as tab:
            early = (await tab.hello(locale="en"))["conversation"]
            adapter_of(await tab.ask("q", "how much is delivery?"))
            assert await command(*start(releases, "--share", "0.3", "--effect", "0.4")) == 0
            await until(lambda: engines.names() == ("old", "new"))
            # One that began before stays with the current release, whatever its hash.
            assert adapter_of(await tab.ask("q2", "how much is delivery?")) == "old"
        experiment = parse_experiment((releases / "experiment.json").read_text())
        # Counting begins with the first conversation that the candidate answers; this one stays open and is not counted.
        for _ in range(100):
            async with Wire(server.ws_url) as tab:
                id_ = (await tab.hello(locale="en"))["conversation"]
                if experiment.arm(f"conversation:{id_}") == "candidate":
                    assert adapter_of(await tab.ask("q", "how much is delivery?")) == "new"
                    break
        for n in range(0, 64, 8):
            await asyncio.gather(*(visit(server, n + i) for i in range(8)))

    assert dealt == {c: experiment.release(experiment.arm(f"conversation:{c}")) for c in dealt}
    n_new = sum(arm == "new" for arm in dealt.values())
    assert 5 <= n_new <= 33  # 64 at 0.3: four standard deviations

    # A new connection to a new process: the same release.
    async with serving(releases) as (server, engines):
        await until(lambda: engines.names() == ("old", "new"))
        for id_ in list(dealt)[:8]:
            async with Wire(server.ws_url) as tab:
                await tab.hello(conversation=id_, token=tokens[id_], after=0)
                outcome = outcomes[id_]
                if outcome[0]:  # one that waits for a human is answered by the bot too, but let it be
                    assert adapter_of(await tab.ask("again", "how much is delivery?")) == dealt[id_]
                    await tab.say("close")
                    await tab.hear("event", kind="state", state="closed")
                    outcomes[id_] = (*outcome[:3], True)

        # The result, beside the running server, against a count by hand.
        capsys.readouterr()
        assert await command("ab", "status", *where, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        counted = {id_: o for id_, o in outcomes.items() if o[3]}
        for arm, name in (("control", "old"), ("candidate", "new")):
            own = [o for id_, o in counted.items() if dealt[id_] == name]
            k = sum(o[1] for o in own)
            a = found["arms"][arm]
            assert (a["release"], a["n"], a["n_units"], a["n_good"]) == (name, len(own), len(own), k)
            assert (a["low"], a["high"]) == pytest.approx(wilson(k, len(own)))
            rated = [o[2] for o in own if o[2] is not None]
            other = found["others"]["rating"]["arms"][arm]
            assert (other["n"], other["n_good"]) == (len(rated), sum(rated))
            assert found["others"]["no_handoff"]["arms"][arm]["n_good"] == sum(o[0] for o in own)
        new, old = found["arms"]["candidate"], found["arms"]["control"]
        by_hand = newcombe(new["n_good"], new["n"], old["n_good"], old["n"])
        assert found["difference"]["low"] == pytest.approx(by_hand.low)
        assert found["excluded"] == {
            "still open": len(outcomes) - len(counted) + 1,
            "began before the experiment": 1,
        }
        assert found["sample_ratio"]["ok"] is True
        assert found["needed"] == {"control": experiment.n_control, "candidate": experiment.n_candidate}
        enough = old["n"] >= experiment.n_control and new["n"] >= experiment.n_candidate
        assert found["enough"] is enough
        # Who gets which release is drawn anew in every run: one in some dozen shows a difference by chance alone.
        side = "better" if by_hand.low > 0 else "worse" if by_hand.high < 0 else ""
        told = f"the candidate is {side}" if side else "no difference found"
        assert found["verdict"].startswith(told if enough else "too early")
        assert early not in dealt

        # A candidate that did not win is not kept without a word; the end leads everybody back.
        if side != "better":
            assert await command("ab", "stop", *where, "--keep", "new") == 2
            assert "--anyway keeps 'new' all the same" in capsys.readouterr().err
        assert await command("ab", "stop", *where) == 0
        await until(lambda: engines.names() == ("old",))
        async with Wire(server.ws_url) as tab:
            await tab.hello(locale="en")
            assert adapter_of(await tab.ask("q", "how much is delivery?")) == "old"
    record = json.loads((releases / "experiments" / f"{experiment.name}.json").read_text())
    assert record["kept"] == "old"
    assert record["result"]["arms"]["candidate"]["n"] == new["n"]
    assert not (releases / "experiment.json").exists()


def test_what_may_not_begin_is_said_in_one_line(
    releases: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    where = ["--releases", str(releases)]
    assert "no experiment is running" in refused("ab", "status", *where)
    assert "there are new, old" in refused("ab", "start", "--release", "none", *where)
    assert "is the current release" in refused("ab", "start", "--release", "old", *where)
    assert "effect" in refused(*start(releases, "--effect", "0"))
    assert "share" in refused(*start(releases, "--share", "1"))
    no_baseline = ["ab", "start", "--release", "new", "--elsewhere", *where]
    assert "no such file" in refused(*no_baseline, "--database", str(releases / "missing.sqlite3"))
    monkeypatch.setattr("bot.engines.vllm.available_memory", lambda: 1 << 20)
    start_here = [a for a in start(releases) if a != "--elsewhere"]
    assert "a second engine needs" in refused(*start_here)  # too little memory for two, said before anything begins
    (releases / "replays" / "new.json").write_text(json.dumps({"current": "older", "verdict": PASSED}))
    assert "compared with older" in refused(*start(releases))
    (releases / "replays" / "new.json").unlink()
    assert "was not replayed" in refused(*start(releases))
    assert not (releases / "experiment.json").exists()


def test_one_experiment_at_a_time_and_never_the_same_name_twice(
    releases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(start(releases, "--name", "first", "--json")) == 0
    begun = json.loads(capsys.readouterr().out)
    assert (begun["n_control"], begun["n_candidate"]) == (1565, 1565)  # 50% against 55%, 5%, 80%
    assert main(start(releases)) == 2
    assert "experiment 'first' is running" in capsys.readouterr().err
    stop = ["ab", "stop", "--releases", str(releases), "--database", str(releases / "none.sqlite3")]
    assert main([*stop, "--keep", "other"]) == 2
    assert main([*stop, "--keep", "candidate"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([*stop, "--keep", "candidate", "--anyway"]) == 0
    assert json.loads((releases / "current.json").read_text())["release"] == "new"
    assert main(["rollback", "--releases", str(releases)]) == 0
    assert main(start(releases, "--name", "first")) == 2
    assert "so take a new one" in capsys.readouterr().err


# --- What counts ------------------------------------------------------------------------------------------------------

BEGAN = datetime(2026, 11, 1, tzinfo=UTC)
LATER = BEGAN + timedelta(days=2)
E = Experiment("e", "new", "old", 0.5, "resolved", 0.5, 0.2, 0.05, 0.8, 3, 3, BEGAN)


def log(id_: str, *said: Any, customer: str | None = None, state: Any = "bot", at: datetime | None = None) -> Log:
    began = at or BEGAN + timedelta(hours=1)
    events = [Event(n, began + timedelta(minutes=n), kind, data) for n, (kind, data) in enumerate(said, 1)]
    return Log(id_, began, "en", state, customer, events)


def asked() -> tuple[Any, dict[str, Any]]:
    return "message", {"role": "visitor", "text": "?"}


def bot(release: str | None, outcome: str = "generated") -> tuple[Any, dict[str, Any]]:
    return "message", {"role": "bot", "text": "!", "outcome": outcome, "release": {"adapter": release}}


AGENT = ("message", {"role": "agent", "text": "hi"})
WAITS = ("state", {"state": "waiting"})


def unit_in(arm: str, n: int = 0) -> str:
    found = [str(i) for i in range(200) if E.arm(f"conversation:{i}") == arm]
    return found[n]


def test_what_does_not_count_is_told_by_its_reason() -> None:
    new, old = unit_in("candidate"), unit_in("control")

    def why(*said: Any, id_: str = new, **more: Any) -> Any:
        found = ab.count(log(id_, *said, **more), E, LATER, BEGAN)
        return found if isinstance(found, str) else found.values["resolved"]

    assert why(asked(), bot("new")) is True
    assert why(asked(), bot("new"), at=BEGAN - timedelta(hours=1)) == "began before the experiment"
    assert why(asked()) == "no reply of the bot"
    assert why(asked(), WAITS, AGENT, bot("new")) == "an agent before the bot"
    assert why(asked(), bot("new"), WAITS, AGENT) is False  # an agent later: handed off, and counted
    assert why(asked(), bot("new"), asked(), bot("old")) == "both arms"
    assert why(asked(), bot("old")) == "not the arm it was dealt"
    assert why(asked(), bot("other")) == "another release"
    assert why(asked(), bot("new"), at=LATER - timedelta(minutes=10)) == "still open"
    assert why(asked(), bot("new"), at=LATER - timedelta(minutes=10), state="closed") is True
    assert why(asked(), bot("new", "no_answer")) is False
    assert why(asked(), bot("old"), id_=old) is True


def test_what_came_before_the_candidate_was_live_counts_for_neither_arm() -> None:
    olds = [unit_in("control", n) for n in range(6)]
    made = [log(id_, asked(), bot("old"), at=BEGAN + timedelta(hours=n)) for n, id_ in enumerate(olds)]
    assert ab.result(E, made, LATER, current="old")["excluded"] == {"began before the candidate was live": 6}
    made.append(log(unit_in("candidate"), asked(), bot("new"), at=BEGAN + timedelta(hours=3)))
    found = ab.result(E, made, LATER, current="old")
    assert found["excluded"] == {"began before the candidate was live": 3}
    assert found["n_units"] == {"control": 3, "candidate": 1}


def test_ratings_of_the_bot_count_and_those_of_an_agent_do_not() -> None:
    def rated(*said: Any) -> bool | None:
        found = ab.values_of(log("c", asked(), bot("new"), *said), LATER)
        assert not isinstance(found, str)
        return found["rating"]

    up, down = ("rating", {"rated": 2, "value": "up"}), ("rating", {"rated": 2, "value": "down"})
    closed = ("state", {"state": "closed", "score": 5})
    assert rated() is None
    assert rated(up) is True
    assert rated(down, up) is True  # the last word on a reply counts
    assert rated(up, asked(), bot("new"), ("rating", {"rated": 5, "value": "down"})) is False
    assert rated(AGENT, ("rating", {"rated": 3, "value": "down"})) is None
    assert rated(closed) is True
    assert rated(WAITS, AGENT, closed) is None
    assert rated(("state", {"state": "closed", "score": 3})) is False


def test_a_result_is_too_early_then_read_and_never_after_the_current_release_changed() -> None:
    def conversations(n: int, good: float) -> list[Log]:
        made = []
        for arm, name, share in (("candidate", "new", good), ("control", "old", 0.2)):
            for i in range(n):
                outcome = "generated" if i < share * n else "no_answer"
                made.append(log(unit_in(arm, i), asked(), bot(name, outcome)))
        return made

    assert (
        ab.result(E, conversations(2, 1.0), LATER, current="old")["verdict"]
        == "too early: control 2 of 3, candidate 2 of 3"
    )
    assert ab.result(E, conversations(40, 0.9), LATER, current="old")["verdict"] == "the candidate is better"
    assert ab.result(E, conversations(40, 0.2), LATER, current="old")["verdict"] == "no difference found"
    assert "stop it" in ab.result(E, conversations(40, 0.9), LATER, current="new")["verdict"]
    lost = [c for c in conversations(60, 0.9) if E.arm(f"conversation:{c.id}") == "control" or int(c.id) < 40]
    assert "not to be read: the arms' sizes" in ab.result(E, lost, LATER, current="old")["verdict"]
    text = ab.text_of(ab.result(E, conversations(40, 0.9), LATER, current="old"))
    assert "candidate (new): 36 of 40, 90.0%" in text


def test_conversations_of_one_customer_are_one_unit() -> None:
    made = [log(f"c{i}", asked(), bot(None), customer=f"k{i % 6}") for i in range(60)]
    made = [replace(c, events=[*c.events[:1], _stamped(c)]) for c in made]
    found = ab.result(E, made, LATER, current="old")
    assert sum(a["n_units"] for a in found["arms"].values()) == 6
    assert sum(a["n"] for a in found["arms"].values()) == 60
    assert found["difference"]["method"] == "bootstrap"


def _stamped(c: Log) -> Event:
    return Event(2, c.events[0].at, *bot(E.release(E.arm(f"customer:{c.customer}"))))


def test_the_server_follows_what_it_can_read_and_falls_back_to_the_current_release(releases: Path) -> None:
    live = LiveExperiment(releases, follow_pointer(releases))
    began = Conversation("c", None, "bot", 0, created_at=LATER)
    assert live.wanted().beside == ()
    assert live.assign(began) is None
    assert main(start(releases, "--share", "0.99999")) == 0
    soon = replace(began, created_at=datetime.now(UTC) + timedelta(seconds=1))
    assert [r.name for r in live.wanted().beside] == ["new"]
    assert live.assign(soon) == "new"
    assert live.assign(replace(soon, created_at=BEGAN)) is None  # it began before
    anna = replace(soon, customer=Customer("anna"))
    assert live.assign(anna) == live.assign(replace(anna, id="d"))

    (releases / "current.json").write_text(json.dumps({"release": "new", "previous": ["old"]}))  # somebody rolled on
    assert live.wanted().beside == ()
    assert live.assign(soon) is None
    assert "compares with old" in live.fault
    (releases / "current.json").write_text(json.dumps({"release": "old", "previous": []}))
    assert [r.name for r in live.wanted().beside] == ["new"]
    (releases / "experiment.json").write_text("{broken")
    assert live.wanted().beside == ()
    assert live.assign(soon) is None
    (releases / "experiment.json").unlink()
    assert live.wanted().beside == ()
    assert live.fault == ""
