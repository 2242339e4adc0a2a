"""
A conversation for an agent who has ten seconds: what was asked, what was not answered, what was named.

By code from the events, always; in whole sentences from the engine where there is one and an agent asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from bot.engine import Engine, Sampling
from bot.guard.injection import strip_control_tokens
from bot.messages import Event, Language, Message

MAX_QUESTIONS = 5
MAX_LINE_CHARS = 160
MAX_EVENTS_READ = 40  # of the transcript the engine gets

# Order numbers, tracking numbers, e-mail addresses, phone numbers: what an agent would look for.
_NAMED = re.compile(
    r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|\b[A-Z]{1,4}-?\d{4,16}\b|"
    r"(?<![\d.])\+?\d[\d -]{6,16}\d(?![\d.])"
)
_REASONS: dict[str, dict[Language, str]] = {
    "visitor": {"zh": "访客要求人工", "en": "the visitor asked for a human"},
    "asked": {"zh": "访客要求人工", "en": "the visitor asked for a human"},
    "bot": {"zh": "机器人转接", "en": "the bot handed over"},
    "anger": {"zh": "访客情绪激动", "en": "the visitor is upset"},
    "no_answer": {"zh": "机器人连续没有答案", "en": "the bot had no answer twice"},
    "agent": {"zh": "客服主动接入", "en": "an agent stepped in"},
    "agent_gone": {"zh": "上一位客服掉线", "en": "the agent before lost the connection"},
    "transfer": {"zh": "同事转回队列", "en": "a colleague gave it back to the queue"},
}
_WORDS: dict[Language, dict[str, str]] = {
    "zh": {"reason": "转接原因", "asked": "问过", "open": "未解答", "named": "提到", "from": "机器人引用", "sep": "；"},
    "en": {
        "reason": "Why",
        "asked": "Asked",
        "open": "Unanswered",
        "named": "Named",
        "from": "Bot quoted",
        "sep": "; ",
    },
}
_PROMPT: dict[Language, str] = {
    "zh": "下面是一位顾客和网店客服的对话。用两三句中文写给接手的同事：顾客要什么，已经说了什么，还缺什么。"
    "只写对话里有的。\n\n{transcript}",
    "en": "Below is a conversation of a customer with a store's support. In two or three English sentences, tell the "
    "colleague who takes over: what the customer wants, what was said already, what is still open. Only what is "
    "there.\n\n{transcript}",
}
_NAMES: dict[str, dict[Language, str]] = {
    "visitor": {"zh": "顾客", "en": "Customer"},
    "bot": {"zh": "机器人", "en": "Bot"},
    "agent": {"zh": "客服", "en": "Agent"},
}


def summary_of(events: Sequence[Event], reason: str | None, language: Language) -> dict[str, Any]:
    """
    Return the summary as the wire has it; see docs/inbox.md for its fields.

    Args:
        events: all of the conversation's.
        reason: why a human was asked for, if one was.
    """
    visitor = [e for e in events if e.kind == "message" and e.role == "visitor"]
    replies: dict[str, Event] = {}  # the last one a turn; an agent's answers whatever was asked before it
    sources: dict[str, dict[str, Any]] = {}
    ratings: dict[int, str] = {}
    for event in events:
        if event.kind == "rating":
            ratings[event.data["rated"]] = event.data["value"]
        elif event.role == "bot":
            for turn in event.data.get("turns") or [event.data.get("turn", "")]:
                replies[turn] = event
            for cited in event.data.get("citations", ()):
                sources[cited["id"]] = {name: cited.get(name) for name in ("id", "title", "source")}
        elif event.role == "agent":
            for asked in visitor:
                if asked.seq < event.seq:
                    replies[asked.data.get("turn", "")] = event
    unanswered = [e for e in visitor if not e.data.get("left") and _open(replies.get(e.data.get("turn", "")))]
    named = [_tidy(n) for e in visitor for n in _NAMED.findall(e.text)]
    summary: dict[str, Any] = {
        "reason": reason,
        "questions": _lines(visitor)[-MAX_QUESTIONS:],
        "unanswered": _lines(unanswered)[-MAX_QUESTIONS:],
        "mentioned": list(dict.fromkeys(named))[:10],
        "sources": list(sources.values())[-MAX_QUESTIONS:],
        "n_messages": sum(e.kind == "message" and e.role != "system" for e in events),
        "n_visitor": len(visitor),
        "rating": {value: sum(v == value for v in ratings.values()) for value in ("up", "down")},
    }
    return {**summary, "text": _text(summary, language)}


async def summarize(engine: Engine, events: Sequence[Event], language: Language) -> str:
    """
    Return the engine's two or three sentences on a conversation.

    Raises:
        EngineBusy, EngineNotReady, EngineFailed, EngineDead.
    """
    lines = [
        f"{_NAMES[e.role][language]}: {_line(e.text, 400)}"
        for e in events
        if e.kind == "message" and e.role in _NAMES and e.text
    ]
    messages: list[Message] = []
    for n in range(len(lines[-MAX_EVENTS_READ:]), 0, -1):  # the end matters most: the beginning is cut until it fits
        transcript = strip_control_tokens("\n".join(lines[-n:]))
        messages = [Message("user", _PROMPT[language].format(transcript=transcript))]
        if engine.count_tokens(messages) <= engine.max_prompt_tokens:
            break
    if not messages:
        return ""
    text = ""
    async with aclosing(engine.stream(messages, Sampling(max_tokens=120, priority=10))) as chunks:
        async for chunk in chunks:
            text += chunk.text
    return text.strip()


def _open(reply: Event | None) -> bool:
    return reply is None or (reply.role == "bot" and reply.data.get("outcome") in ("no_answer", "refused"))


def _lines(events: Sequence[Event]) -> list[str]:
    return list(dict.fromkeys(_line(e.text, MAX_LINE_CHARS) for e in events if e.text.strip()))


def _line(text: str, limit: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _tidy(named: str) -> str:
    return named.strip(" -")


def _text(summary: dict[str, Any], language: Language) -> str:
    words = _WORDS[language]
    reason = summary["reason"]
    parts = [
        ("reason", [_REASONS.get(reason, {}).get(language, reason)] if reason else []),
        ("asked", summary["questions"][-3:]),
        ("open", summary["unanswered"][-3:]),
        ("named", summary["mentioned"]),
        ("from", [s["title"] for s in summary["sources"] if s["title"]][-3:]),
    ]
    colon = "：" if language == "zh" else ": "
    return "\n".join(f"{words[name]}{colon}{words['sep'].join(items)}" for name, items in parts if items)
