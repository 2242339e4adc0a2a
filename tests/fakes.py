"""
Stand-ins that record what was asked of them and can fail: `ScriptedEngine`, `ScriptedAnswerer`, `store_profile`.

No test logic here, and nothing random: the same script gives the same deltas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from zoneinfo import ZoneInfo

from bot.engine import Chunk, EngineState, Sampling
from bot.messages import Citation, Message, Outcome, Release, Reply, Turn
from bot.settings import StoreProfile
from bot.stream import Delta, Phase

RELEASE = Release(model="scripted", adapter=None, prompt="test", knowledge="k0")


class ScriptedEngine:
    """
    Streams given words, then finishes; or raises what it was given instead.

    Each item of `script` is the reply to one call, in order (the last one for all further calls): a text, or an
    exception, or a (text, exception) that fails after its text. `likely` is what it tells of a first token when asked.
    """

    name = "scripted"
    adapter: str | None = None
    max_prompt_tokens = 4096

    def __init__(
        self,
        *script: str | BaseException | tuple[str, BaseException],
        delay_s: float = 0.0,
        ready: bool = True,
        likely: tuple[tuple[str, float], ...] = (),
    ) -> None:
        self.likely = likely
        self.looks: list[list[Message]] = []  # prompts of which the first token alone was asked for
        self.script = script or ("It left yesterday.",)
        self.delay_s = delay_s
        self.ready = ready
        self.prompts: list[list[Message]] = []
        self.samplings: list[Sampling] = []
        self.n_open = 0  # streams not yet ended
        self.n_aborted = 0  # streams closed or cancelled before their last chunk
        self.n_started = self.n_closed = 0

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        if sampling.n_likely:
            self.looks.append(list(messages))
            await asyncio.sleep(self.delay_s)
            yield Chunk(self.likely[0][0] if self.likely else "x", "length", 1, likely=self.likely)
            return
        item = self.script[min(len(self.prompts), len(self.script) - 1)]
        self.prompts.append(list(messages))
        self.samplings.append(sampling)
        text: str = item if isinstance(item, str) else item[0] if isinstance(item, tuple) else ""
        error = item if isinstance(item, BaseException) else item[1] if isinstance(item, tuple) else None
        self.n_open += 1
        finished = False
        try:
            for word in words_of(text):
                await asyncio.sleep(self.delay_s)
                yield Chunk(word, n_tokens=1)
            if error is not None:
                finished = True
                raise error
            finished = True  # before the yield: who takes the last chunk need not come back
            yield Chunk("", "stop", n_prompt_tokens=self.count_tokens(messages))
        finally:
            self.n_open -= 1
            self.n_aborted += not finished

    def state(self) -> EngineState:
        return EngineState(self.ready, "ready" if self.ready else "starting")

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(m.content) // 4 + 4 for m in messages)

    async def start(self) -> None:
        self.n_started += 1
        self.ready = True

    async def close(self) -> None:
        self.n_closed += 1
        self.ready = False

    def figures(self) -> dict[str, float]:
        return {"running": self.n_open, "generated_tokens": 0.0}


class ScriptedAnswerer:
    """
    Answers "echo: QUESTION" word by word, unless told otherwise.

    `gate`: replies pause before every word until it is set. `errors`: raised by the next calls, one each; an
    (n_words, error) fails after so many words. `outcome` and `final` change the finished reply.
    """

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        reply: Callable[[str], str] = lambda question: f"echo: {question}",
        outcome: Outcome = "generated",
    ) -> None:
        self.delay_s = delay_s
        self.reply = reply
        self.outcome = outcome
        self.final: str | None = None  # the reply's text, where it differs from what was streamed
        self.errors: list[Exception | tuple[int, Exception]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.histories: list[list[Turn]] = []
        self.locales: list[str | None] = []
        self.releases: list[str | None] = []  # who was to answer, call by call
        self.n_open = 0
        self.n_aborted = 0  # closed or cancelled before their reply

    def release(self) -> Release:
        return RELEASE

    async def answer(
        self,
        history: Sequence[Turn],
        question: str,
        *,
        locale: str | None = None,
        stop: asyncio.Event | None = None,
        release: str | None = None,
    ) -> AsyncGenerator[Phase | Delta | Reply, None]:
        stop = stop or asyncio.Event()
        self.releases.append(release)
        self.asked.append(question)
        self.histories.append(list(history))
        self.locales.append(locale)
        planned = self.errors.pop(0) if self.errors else None
        fail_after, error = planned if isinstance(planned, tuple) else (0, planned)
        self.n_open += 1
        finished, text = False, ""
        try:
            yield Phase("searching")
            yield Phase("typing")
            for n, word in enumerate(words_of(self.reply(question))):
                if error is not None and n == fail_after:
                    finished = True
                    raise error
                await asyncio.sleep(self.delay_s)
                await _either(self.gate, stop)
                if stop.is_set():
                    break
                text += word
                yield Delta(word)
            finished = True
            reply = reply_with(self.final if self.final is not None else text, self.outcome)
            yield replace(reply, finish="abort") if stop.is_set() else reply
        finally:
            self.n_open -= 1
            self.n_aborted += not finished


async def _either(gate: asyncio.Event, stop: asyncio.Event) -> None:
    if gate.is_set() or stop.is_set():
        return
    waits = [asyncio.ensure_future(gate.wait()), asyncio.ensure_future(stop.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def words_of(text: str) -> list[str]:
    """Return `text` cut after each space; joined they are the text again."""
    return [word for word in text.replace(" ", " \0").split("\0") if word]


def reply_with(text: str, outcome: Outcome = "generated") -> Reply:
    return Reply(
        text=text,
        outcome=outcome,
        finish="stop",
        language="en",
        release=RELEASE,
        citations=(Citation("faq-1", "Shipping", "faqs.csv:2", "We ship within 24 hours.", 0.9),),
        quick_replies=("Thanks",),
    )


def store_profile() -> StoreProfile:
    return StoreProfile(
        name="Demo",
        names={"zh": "演示店", "en": "Demo"},
        languages=("zh", "en"),
        timezone=ZoneInfo("Asia/Shanghai"),
        currency="CNY",
        persona={"zh": "", "en": ""},
        contact={"email": "help@shop.example"},
        business_hours="09:00-21:00",
        greeting={"zh": "您好", "en": "Hello"},
        quick_replies={"zh": ("什么时候发货？",), "en": ("When do you ship?",)},
    )
