"""
What visitors and reviewers thought of replies -> masked, split preferences. No torch, no model.

Read are this server's own conversations (thumbs; a regenerated reply beside the one that it took the place of), the
dialogues of an import that carry ratings, and JSONL in TRL's shapes (prompt with chosen and rejected, or with a
completion and its label) or OpenAI's (input, preferred_output, non_preferred_output). Only the visitor's and the
store's words are taken: the prompt around them is rendered as in serving, whatever a file's own system message says.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bot.errors import MerchantError
from bot.language import reply_language
from bot.messages import Message, Turn
from bot.prompt import PromptStore, render_prompt
from finetune.cleaning import tidy
from finetune.config import RunConfig
from finetune.data import load_data
from finetune.dialogues import Dialogue, Fault, parse_at
from finetune.formats import read_objects, speaker_of
from finetune.grounding import Search
from finetune.importing import MANIFEST, MAX_FAULTS, SPLITS, BadData
from finetune.pii import Masker, residual


@dataclass(frozen=True, slots=True)
class Preference:
    """A question, and a reply that was liked, one that was not, or one of each."""

    turns: tuple[tuple[str, str], ...]  # before the question
    question: str
    chosen: str | None
    rejected: str | None
    source: str
    group: str  # a conversation's: its preferences stay on one side
    at: datetime | None = None
    lang: str = ""


@dataclass(frozen=True)
class Preferences:
    """What is learned from, measured while learning, and held out for `eval`."""

    splits: dict[str, list[Preference]]
    counts: Counter[str]
    sha256: str


def load_preferences(config: RunConfig) -> Preferences:
    """
    Return the preferences in `config.data` that `config.objective` can use, the same for the same files.

    Raises:
        BadData: lines that are no preference, and not `skip_bad`.
        MerchantError: no such file, or nothing to learn from in it.
    """
    counts: Counter[str] = Counter()
    data = config.data
    if (data / MANIFEST).is_file():
        imported = load_data(data)
        splits = {split: [p for d in imported.splits[split] for p in _of_dialogue(d)] for split in SPLITS}
        sha256 = imported.sha256
    else:
        if not data.is_file():
            raise MerchantError(
                f"--data {str(data)!r}: not found; give conversations.sqlite3, JSONL of preferences, or an import"
            )
        faults: list[Fault] = []
        raw: list[Preference] = []
        for item in _read(data):
            faults.append(item) if isinstance(item, Fault) else raw.append(item)
        if faults and not config.skip_bad:
            raise BadData(faults[:MAX_FAULTS], len(faults))
        counts["left out: cannot be read"] += len(faults)
        splits = _split(_masked(raw, counts), config)
        sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    splits = {split: _usable(found, config.objective, counts) for split, found in splits.items()}
    if not splits["train"]:
        what = (
            "no reply was preferred to another: dpo needs pairs (regenerated replies, or chosen and rejected ones); "
            "thumbs alone are for kto"
            if config.objective == "dpo"
            else "no reply was rated"
        )
        raise MerchantError(f"{data}: {what}")
    if config.objective == "kto":
        liked = {p.chosen is not None for p in splits["train"]}
        if len(liked) == 1:
            raise MerchantError(
                f"{data}: all {len(splits['train'])} rated replies are rated "
                f"{'up' if True in liked else 'down'}; kto needs some of each"
            )
    return Preferences(splits, +counts, sha256)


# --- Reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[Preference | Fault]:
    try:
        with path.open("rb") as file:
            is_database = file.read(16) == b"SQLite format 3\x00"
        if is_database:
            yield from _read_server(path)
            return
        for item in read_objects(path):
            if isinstance(item, Fault):
                yield item
            else:
                yield _parse(item[1], f"{path}:{item[0]}")
    except (OSError, sqlite3.Error) as exc:
        yield Fault(str(path), "file", f"cannot be read ({exc})", "check the file and its permissions")


def _read_server(path: Path) -> Iterator[Preference | Fault]:
    """Thumbs and regenerated replies of bot/storage.py's event log, read-only, beside a running server."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'events'").fetchone():
            yield Fault(str(path), "file", "no table `events`", "give the server's conversations.sqlite3")
            return
        query = "SELECT conversation_id, seq, at, kind, data FROM events ORDER BY conversation_id, seq"
        current, events = None, list[tuple[int, Any, str, dict[str, Any]]]()
        for conversation, seq, at, kind, data in db.execute(query):
            if conversation != current and events:
                yield from _of_events(f"{path}:{current}", str(current), events)
                events = []
            current = conversation
            try:
                events.append((int(seq), at, str(kind), dict(json.loads(data))))
            except (ValueError, TypeError):
                yield Fault(f"{path}:{conversation}", f"events[{seq}]", "not readable", "leave the conversation out")
        if events:
            yield from _of_events(f"{path}:{current}", str(current), events)


def _of_events(
    source: str, conversation: str, events: Sequence[tuple[int, Any, str, dict[str, Any]]]
) -> Iterator[Preference]:
    ratings = {
        int(data["rated"]): data["value"]
        for _, _, kind, data in events
        if kind == "rating" and data.get("value") in ("up", "down") and str(data.get("rated", "")).isdigit()
    }
    questions: list[tuple[int, str, str, Any]] = []
    replies: dict[str, list[tuple[int, str]]] = {}
    for seq, at, kind, data in events:
        text, turn = data.get("text"), str(data.get("turn", ""))
        if kind != "message" or not isinstance(text, str) or not text.strip() or not turn:
            continue
        if data.get("role") == "visitor":
            questions.append((seq, turn, text, at))
        elif data.get("role") == "bot" and data.get("finish") in (None, "stop"):
            replies.setdefault(turn, []).append((seq, text))
    before: list[tuple[str, str]] = []
    for _, turn, question, at in questions:
        said = replies.get(turn, [])
        plain = Preference(tuple(before), question, None, None, f"{source}:{turn}", conversation, parse_at(at))
        opinions: dict[str, str] = {}  # of each wording, the last rating
        for seq, text in said:
            if seq in ratings:
                opinions[text] = ratings[seq]
        *earlier, last = [text for _, text in said] or [""]
        for text in dict.fromkeys(earlier):
            if text == last:
                continue
            # Who asked for another reply preferred it, unless the thumbs say the opposite.
            if opinions.get(text) == "up" and opinions.get(last) == "down":
                yield replace(plain, chosen=text, rejected=last)
            elif opinions.get(text) != "up" and opinions.get(last) != "down":
                yield replace(plain, chosen=last, rejected=text)
        paired = {t for t in earlier if t != last and opinions.get(t) != "up" and opinions.get(last) != "down"}
        for text, opinion in opinions.items():
            if paired and (text == last or text in paired):
                continue  # said already, as one of a pair
            liked = opinion == "up"
            yield replace(plain, chosen=text if liked else None, rejected=None if liked else text)
        if last:
            before.append((question, last))


def _of_dialogue(dialogue: Dialogue) -> Iterator[Preference]:
    """The rated replies of an imported dialogue."""
    lines = dialogue.lines
    for n in range(1, len(lines), 2):
        if lines[n].rating is None:
            continue
        turns = tuple((lines[i].text, lines[i + 1].text) for i in range(0, n - 1, 2))
        liked = lines[n].rating == "up"
        yield Preference(
            turns, lines[n - 1].text, lines[n].text if liked else None, None if liked else lines[n].text,
            f"{dialogue.source}:{n}", dialogue.id, dialogue.at, dialogue.lang,
        )  # fmt: skip


def _parse(item: dict[str, Any], source: str) -> Preference | Fault:
    """One line in TRL's shapes or OpenAI's."""
    try:
        if "input" in item:
            inner = item["input"]
            prompt = _messages(inner.get("messages") if isinstance(inner, dict) else inner, "input.messages")
            sides = {side: _reply(item.get(name), name) for side, name in _OPENAI}
        elif "completion" in item:
            prompt = _messages(item.get("prompt"), "prompt")
            if not isinstance(item.get("label"), bool):
                raise _Wrong("label", "neither true nor false")
            sides = {"chosen" if item["label"] else "rejected": _reply(item["completion"], "completion")}
        elif "chosen" in item and "rejected" in item:
            chosen, rejected = item["chosen"], item["rejected"]
            if "prompt" in item:
                prompt = _messages(item["prompt"], "prompt")
            elif isinstance(chosen, list) and isinstance(rejected, list) and chosen[:-1] == rejected[:-1]:
                # TRL's implicit prompt: two conversations that differ in their last reply.
                prompt, chosen, rejected = _messages(chosen[:-1], "chosen"), chosen[-1:], rejected[-1:]
            else:
                raise _Wrong("prompt", "missing")
            sides = {"chosen": _reply(chosen, "chosen"), "rejected": _reply(rejected, "rejected")}
        else:
            raise _Wrong("line", "no preference")
    except _Wrong as wrong:
        return Fault(source, wrong.field, wrong.problem, _REMEDY)
    if sides.get("chosen") == sides.get("rejected"):
        return Fault(source, "rejected", "equal to the preferred reply", "remove the line")
    *before, (_, question) = prompt
    turns = tuple((q, a) for (_, q), (_, a) in zip(before[::2], before[1::2], strict=True))
    lang = item.get("lang")
    return Preference(
        turns, question, sides.get("chosen"), sides.get("rejected"), source, str(item.get("id", source)),
        parse_at(item.get("at")), lang if lang in ("zh", "en") else "",
    )  # fmt: skip


_OPENAI = (("chosen", "preferred_output"), ("rejected", "non_preferred_output"))
_REMEDY = (
    "write {prompt, chosen, rejected}, {prompt, completion, label}, or "
    "{input: {messages}, preferred_output, non_preferred_output}"
)


class _Wrong(Exception):
    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field, self.problem = field, problem


def _messages(value: Any, field: str) -> list[tuple[str, str]]:
    """Return (speaker, text), roles in turn, the visitor first and last; messages of one role in a row are one."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise _Wrong(field, "neither a text nor a list of messages")
    found: list[tuple[str, str]] = []
    for n, message in enumerate(value):
        if not isinstance(message, dict):
            raise _Wrong(f"{field}[{n}]", "no message")
        who = speaker_of(str(message.get("role", "")))
        if who is False:
            raise _Wrong(f"{field}[{n}].role", f"unknown role {str(message.get('role'))[:40]!r}")
        if who is None:
            continue
        text = _text(message.get("content"))
        if not text:
            raise _Wrong(f"{field}[{n}].content", "empty or not a text")
        if found and found[-1][0] == who:
            found[-1] = (str(who), f"{found[-1][1]}\n{text}")
        elif found or who == "user":
            found.append((str(who), text))
    if not found or found[-1][0] != "user":
        raise _Wrong(field, "does not end with the visitor's question")
    return found


def _reply(value: Any, field: str) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    text = _text(value)
    if not text:
        raise _Wrong(field, "empty or not one reply")
    return text


def _text(content: Any) -> str:
    if isinstance(content, list):
        content = "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return content.strip() if isinstance(content, str) else ""


# --- Masked, split, rendered -----------------------------------------------------------------------------------------


def _masked(raw: Sequence[Preference], counts: Counter[str]) -> list[Preference]:
    """Return the preferences without personal data; what cannot be masked whole, or was there before, is left out."""
    masker = Masker()
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for p in raw:
        flat = [text for turn in p.turns for text in turn]
        sides = [side for side in (p.chosen, p.rejected) if side is not None]
        texts = [tidy(text) for text in masker.mask([*flat, p.question, *sides])]
        if any(residual(text) for text in texts):
            counts["left out: could not be masked whole"] += 1
            continue
        said, question, replies = texts[: len(flat)], texts[len(flat)], iter(texts[len(flat) + 1 :])
        masked = replace(
            p, turns=tuple(zip(said[::2], said[1::2], strict=True)), question=question,
            chosen=next(replies) if p.chosen is not None else None,
            rejected=next(replies) if p.rejected is not None else None,
        )  # fmt: skip
        key = (masked.turns, masked.question, masked.chosen, masked.rejected)
        if not question.strip() or "" in (masked.chosen, masked.rejected):
            counts["left out: nothing to read"] += 1
        elif key in seen:
            counts["left out: the same again"] += 1
        else:
            seen.add(key)
            kept.append(masked)
    counts.update({f"masked: {kind}": n for kind, n in masker.counts.items()})
    return kept


def _split(found: Sequence[Preference], config: RunConfig) -> dict[str, list[Preference]]:
    """
    Draw the sides. A conversation, and a question however often it was asked, is on one side with its like.

    Drawn by the least of the questions that belong together, not by a conversation's name: of a file's lines that is
    where the file lies, and the same file elsewhere has the same sides.
    """
    parents: dict[tuple[int, str], tuple[int, str]] = {}

    def root(name: tuple[int, str]) -> tuple[int, str]:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    for p in found:
        least, other = sorted((root((0, p.question)), root((1, p.group))))
        parents[other] = least
    splits: dict[str, list[Preference]] = {split: [] for split in SPLITS}
    for p in found:
        name = f"{config.seed}:{root((0, p.question))[1]}"
        drawn = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        side = "test" if drawn < config.test else "valid" if drawn < config.test + config.valid else "train"
        splits[side].append(p)
    return splits


def _usable(found: Sequence[Preference], objective: str, counts: Counter[str]) -> list[Preference]:
    """Pairs for dpo; for kto single replies, a pair being two of them."""
    kept: list[Preference] = []
    for p in found:
        paired = p.chosen is not None and p.rejected is not None
        if objective == "dpo":
            kept += [p] if paired else []
            counts["left out: rated alone, no pair"] += not paired
        elif paired:
            kept += [replace(p, rejected=None), replace(p, chosen=None)]
        else:
            kept.append(p)
    return kept


def render(
    p: Preference, store: PromptStore, search: Search | None, config: RunConfig, count_tokens: Any
) -> list[Message]:
    """
    Return the prompt that `p` answers, as serving would render it, with the passages of that time.

    Raises:
        ValueError: it is too long.
    """
    turns = [Turn(q, a) for q, a in p.turns]
    language = reply_language(p.question, turns, None, "en" if p.lang == "en" else "zh")
    passages = search(p.question, p.turns, language, p.at, config.n_passages) if search is not None else ()
    return render_prompt(
        store, turns, p.question, passages, language,
        count_tokens=count_tokens, max_prompt_tokens=config.max_tokens * 3 // 4,
    )  # fmt: skip
