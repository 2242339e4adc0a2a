"""
Visitors' thumbs -> labelled questions for `tune`: the bot's conversations, read where they lie.

Knows the event log of the bot's SQLite file (tables and JSON, no code of the bot's) and what a thumb says; whether a
store is better off with it is tune.py's to decide. A reply that cites one passage and got a thumb up says "this passage
answers that question"; one that got a thumb down takes the same pair back, whoever gave it. Nothing of a visitor is
kept but a question that stands by itself and names nobody (`learn.wording_of`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.errors import BadStore, Fault
from retrieval.evaluate import Question
from retrieval.learn import Turn, wording_of

_EVENTS = "SELECT conversation_id, seq, data FROM events WHERE kind IN ('message', 'rating') ORDER BY 1, 2"


@dataclass(frozen=True, slots=True)
class Thumb:
    """What one visitor said of one reply."""

    question: str
    passage: str  # the id of the one passage that the reply cites
    up: bool


def load_thumbs(paths: Sequence[Path]) -> list[Thumb]:
    """
    Return the thumbs in these databases that say something of one question and one passage. Reads beside a server.

    Raises:
        BadStore: a file is no such database; with every fault.
    """
    faults: list[Fault] = []
    found: list[Thumb] = []
    for path in paths:
        try:
            # Read-only: a mistyped name would otherwise be created.
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
                rows = db.execute(_EVENTS).fetchall()
        except sqlite3.Error as exc:
            problem = f"cannot be read ({exc}); name the server's conversations.sqlite3"
            faults.append(Fault(path.name, None, None, problem))
            continue
        conversations: dict[str, list[tuple[int, Any]]] = {}
        for conversation, seq, data in rows:
            try:
                conversations.setdefault(str(conversation), []).append((int(seq), json.loads(data)))
            except (ValueError, TypeError, RecursionError) as exc:
                faults.append(Fault(path.name, None, f"{conversation}:{seq}", f"is no event ({exc})"))
        for conversation, events in conversations.items():
            found += _of_conversation(conversation, [(seq, data) for seq, data in events if isinstance(data, dict)])
    if faults:
        raise BadStore(faults)
    return found


def _of_conversation(conversation: str, events: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[Thumb]:
    # Of several thumbs to one reply the last counts.
    ratings = {data["rated"]: data.get("value") for _, data in events if type(data.get("rated")) is int}
    asked: list[str] = []
    first = True
    for seq, data in events:
        text, role = data.get("text"), data.get("role")
        if role == "visitor" and isinstance(text, str):
            asked.append(text)
        elif role in ("bot", "agent"):
            cited = data.get("citations")
            rating = ratings.get(seq)
            # Of several messages or several passages nobody knows which is meant.
            if role == "bot" and rating in ("up", "down") and len(asked) == 1 and isinstance(cited, list):
                ids = {str(one.get("id")) for one in cited if isinstance(one, dict)}
                question = wording_of(Turn(asked[0], str(text), conversation, first))
                if question is not None and len(ids) == 1:
                    yield Thumb(question, ids.pop(), rating == "up")
            asked, first = [], False


def questions_of(thumbs: Sequence[Thumb]) -> list[Question]:
    """
    Return the questions that were answered to someone's liking, each once, with the passages that did.

    A pair that got more thumbs down than up, or as many, is none; a question of which no pair is left is left out: that
    this passage is wrong does not say that nothing answers it.
    """
    votes: dict[tuple[str, str], int] = {}
    for thumb in thumbs:
        pair = (thumb.question, thumb.passage)
        votes[pair] = votes.get(pair, 0) + (1 if thumb.up else -1)
    liked: dict[str, set[str]] = {}
    for (question, passage), balance in votes.items():
        if balance > 0:
            liked.setdefault(question, set()).add(passage)
    return [Question(question, frozenset(passages)) for question, passages in liked.items()]
