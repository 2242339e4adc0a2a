"""`replay`: past questions from a real log, answered by two models over the wire, compared, and read by what goes live."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bot.messages import Customer, Event
from bot.storage import Log, Storage
from finetune.__main__ import main
from finetune.replay import Answered, Bounds, Question, compare, questions_of_log, sample
from tests.fake_retriever import FakeRetriever
from tests.openai_server import openai_server, quoting, waffling
from tests.test_end_to_end import write_store

NOW = datetime.now(UTC)


def write_releases(folder: Path, current: str | None = "old") -> Path:
    """Two releases without weights: what is asked here is at other servers."""
    for n, name in enumerate(("old", "new")):
        (folder / name / "model").mkdir(parents=True)
        lineage = {"name": name, "base": "tiny", "published_at": f"2026-11-0{n + 1}", "best_loss": 1.0}
        (folder / name / "release.json").write_text(json.dumps(lineage), encoding="utf-8")
    (folder / "current.json").write_text(json.dumps({"release": current, "previous": []}), encoding="utf-8")
    return folder


def said(role: str, text: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    data: dict[str, Any] = {"role": role, "text": text, **more}
    if role == "bot":
        data = {"finish": "stop", "outcome": "generated", "citations": [], **data}
    return "message", data


async def write_log(database: Path) -> None:
    """Five conversations: rated up, rated down, an agent's, one with personal data, one of a promotion that has ended."""
    storage = Storage(database)
    await storage.open()
    try:
        for n, entries in enumerate(
            [
                [
                    said("visitor", "how much is delivery?", turn="a"),
                    said("bot", "Delivery costs ¥7, and it is free from ¥88.", turn="a"),
                    ("rating", {"rated": 2, "value": "up"}),
                    said("visitor", "how long can I return a plant?", turn="b"),
                    said("bot", "Thank you for asking, we are happy to help.", turn="b"),
                    ("rating", {"rated": 5, "value": "down"}),
                ],
                [
                    said("visitor", "I am Emily Carter, call 13812345678. How much is delivery?", turn="a"),
                    said("bot", "Hello Emily.", turn="a"),
                    said("visitor", "how often do I water a cactus?", turn="b"),
                    said("agent", "Every 14 days,"),
                    said("agent", "dear Emily Carter."),
                ],
                [said("visitor", "are ferns off today?", turn="a"), said("bot", "30% off.", turn="a")],
                [said("visitor", "and this has no reply", turn="a")],
            ]
        ):
            id_, _ = await storage.create_conversation("en", Customer("anna") if n == 3 else None)
            await storage.append_all(id_, entries)
    finally:
        await storage.close()
    with closing(sqlite3.connect(database)) as db, db:
        ferns = db.execute("SELECT conversation_id FROM events WHERE data LIKE '%ferns%'").fetchone()
        db.execute("UPDATE events SET at = '2020-01-03 00:00:00.000000' WHERE conversation_id = ?", ferns)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    home = tmp_path_factory.mktemp("replay")
    asyncio.run(write_log(home / "conversations.sqlite3"))
    seen: dict[str, list[list[dict[str, str]]]] = {"good": [], "poor": []}
    with openai_server("good", quoting, seen["good"]) as good, openai_server("poor", waffling, seen["poor"]) as poor:
        yield {
            "home": home,
            "database": home / "conversations.sqlite3",
            "store": write_store(home / "store"),
            "releases": write_releases(home / "releases"),
            "good": f"good@{good}",
            "poor": f"poor@{poor}",
            "seen": seen,
        }


def replay(made: dict[str, Any], candidate: str, current: str, *more: str) -> list[str]:
    return [
        "replay", "--release", "new", "--releases", str(made["releases"]), "--store", str(made["store"]),
        "--conversations", str(made["database"]), "--url", f"candidate={made[candidate]}",
        "--url", f"current={made[current]}", "--direct", "off", "--json",
        "--max-latency", "1000", *more,
    ]  # fmt: skip


@pytest.mark.timeout(120)
def test_past_questions_are_asked_again_in_their_place_and_masked(
    made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(replay(made, "good", "poor", "--min-n", "4")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 5
    assert found["n_model"] == 5
    assert found["equal"] == 0.0
    assert found["figures"]["candidate"]["n_failed"] == 0
    assert found["figures"]["candidate"]["ungrounded"] == 0.0
    by_id = {s["question"]: s for s in found["samples"]}
    assert "¥88" in by_id["how much is delivery?"]["candidate"]["text"]
    assert by_id["how often do I water a cactus?"]["by"] == "agent"
    # The passages of its own time: this promotion ended years ago, on the eighth of that January.
    assert by_id["are ferns off today?"]["candidate"]["text"].startswith("Ferns 30% off.")

    assert found["rated"] == {
        "up": {"n": 1, "candidate_changed": 0, "current_changed": 1},
        "down": {"n": 1, "candidate_changed": 1, "current_changed": 0},
    }
    assert found["agreement"]["n"] == 2  # what was rated up, and the agent's reply
    assert found["agreement"]["candidate"] > found["agreement"]["current"]
    assert found["verdict"]["passed"] is True, found["verdict"]["reasons"]

    # Masked, with the history: what was said before is in the prompt, who said it is not.
    prompts = made["seen"]["good"]
    cactus = next(p for p in prompts if "cactus" in p[-1]["content"].splitlines()[-1])
    assert [m["role"] for m in cactus] == ["system", "user", "assistant", "user"]
    everything = json.dumps([prompts, found], ensure_ascii=False)
    assert "Emily" not in everything
    assert "13812345678" not in everything
    assert "[NAME_1]" in cactus[1]["content"]
    # Both were given the same passages.
    assert [p[-1] for p in sorted(prompts, key=str)] == [p[-1] for p in sorted(made["seen"]["poor"], key=str)]

    kept = made["releases"] / "replays" / "new.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == found
    page = kept.with_suffix(".html").read_text(encoding="utf-8")
    assert "Side by side" in page
    assert "<script" not in page


def test_a_worse_candidate_does_not_pass_and_each_reason_is_named(
    made: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def no_index(*_: object) -> Iterator[FakeRetriever]:
        yield FakeRetriever([], {})

    monkeypatch.setattr("finetune.replay_cli._retriever", no_index)  # the real one is the test's before
    (made["releases"] / "replays" / "new.json").unlink(missing_ok=True)
    start = ["ab", "start", "--release", "new", "--releases", str(made["releases"]), "--baseline", "0.5"]
    assert main(start) == 2
    assert "was not replayed" in capsys.readouterr().err
    assert main(replay(made, "poor", "good", "--n", "4")) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["passed"] is False
    assert "4 questions; the bound is 20" in verdict["reasons"]
    assert main(start) == 2
    assert "was not passed: 4 questions" in capsys.readouterr().err
    assert not (made["releases"] / "experiment.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a candidate"),
        (["--run", "r", "--release", "new"], "and not both"),
        (["--release", "none"], "no release 'none'"),
        (["--release", "old"], "is the current release"),
        (["--release", "new", "--url", "candidate=http://x"], "candidate=MODEL@http"),
        (["--release", "new", "--conversations", "missing.sqlite3"], "no such file"),
    ],
)
def test_what_cannot_be_replayed_is_said_in_one_line(
    made: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    store = ["--store", str(made["store"]), "--releases", str(made["releases"])]
    assert main(["replay", *store, *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def events(*entries: tuple[str, dict[str, Any]]) -> list[Event]:
    return [Event(n, NOW + timedelta(seconds=n), kind, data) for n, (kind, data) in enumerate(entries, 1)]  # type: ignore[arg-type]


def test_messages_with_one_reply_are_one_question_and_a_reply_made_again_counts_last() -> None:
    log = Log(
        "c", NOW, "en", "bot", None,
        events(
            said("visitor", "hello", turn="a"),
            said("visitor", "how much?", turn="b"),
            said("bot", "first", turn="b", turns=["a", "b"]),
            said("bot", "second", turn="b", turns=["a", "b"]),
            said("visitor", "cut off", turn="c"),
            said("bot", "half a", turn="c", finish="abort"),
            said("visitor", "left", turn="d", left=True),
            said("visitor", "and now?", turn="e"),
            said("bot", "now", turn="e", citations=[{"id": "p1"}]),
            said("visitor", "last", turn="f"),
            said("bot", "end", turn="f"),
        ),
    )  # fmt: skip
    found = questions_of_log(log, None)
    assert [(q.text, q.said) for q in found] == [("hello\nhow much?", "second"), ("and now?", "now"), ("last", "end")]
    assert [t.reply for t in found[2].history] == ["second", "now"]
    assert found[2].history[1].passages == ("p1",)
    assert [q.text for q in questions_of_log(log, NOW + timedelta(seconds=10))] == ["last"]


def test_rated_questions_are_replayed_first() -> None:
    asked = [Question(str(n), (), "q", None, rating="up" if n % 10 == 0 else None) for n in range(50)]
    chosen = sample(asked, 8, seed=1)
    assert sum(q.rating == "up" for q in chosen) == 5
    assert [int(q.id) for q in chosen] == sorted(int(q.id) for q in chosen)
    assert chosen == sample(asked, 8, seed=1)


def test_every_figure_of_a_comparison_is_as_by_hand() -> None:
    asked = [
        Question("1", (), "多少钱", None, said="39元", by="agent"),
        Question("2", (), "how much", None, said="39", by="bot", rating="down"),
        Question("3", (), "when", None),
        Question("4", (), "where", None),
    ]
    new = [
        Answered("39 yuan please", "generated", 10, raw="39 yuan please", prompt="price 39"),
        Answered("it is 40", "direct", 20, raw="it is 41", prompt="price 40"),
        Answered("no", "no_answer", 30),
        Answered("broke", "failed", 5),
    ]
    old = [
        Answered("39元", "generated", 10, raw="39元", prompt="price 39"),
        Answered("39", "generated", 10, raw="39", prompt="price 39"),
        Answered("No.", "no_answer", 10),
        Answered("there", "generated", 10, raw="there", prompt=""),
    ]
    found = compare(asked, new, old, Bounds(min_n=1))
    assert found["equal"] == 0.25  # "no" and "No."
    assert found["n_model"] == 3
    figures = found["figures"]["candidate"]
    assert figures["n_failed"] == 1
    assert figures["no_answer"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["ungrounded"] == 0.5  # 41 stands nowhere
    assert figures["other_language"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["ms_p50"] == 20
    assert found["outcomes_changed"] == {"generated -> direct": 1, "generated -> failed": 1}
    assert found["rated"]["down"] == {"n": 1, "candidate_changed": 1, "current_changed": 0}
    assert found["agreement"]["current"] == 1.0
    reasons = " | ".join(found["verdict"]["reasons"])
    for words in (
        "1 questions without a reply",
        "ungrounded 50.0% instead of 0.0%",
        "other language 33.3%",
        "less like",
    ):
        assert words in reasons
    assert compare(asked, old, old, Bounds(min_n=1))["verdict"] == {
        "passed": True,
        "reasons": [],
        "bounds": found["verdict"]["bounds"],
    }
