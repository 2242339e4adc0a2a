"""
The turn: guard -> retrieve -> decide -> render -> stream -> check. Read this file first.

It knows the order of things and who decides what; it knows no socket, no database and no model library.
What is decided by code: the language, the refusals, the hand-over, what is on today, whether the store has
an answer at all. What is left to the model: to word an answer from passages where no passage is the answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

from bot.engine import BoundEngine, Chunk, Engine, Sampling, leased
from bot.errors import EngineNotReady
from bot.followup import Query, complete, content_words, split_at_comma, split_questions
from bot.guard.facts import StreamGate, facts_of, grounds_of
from bot.guard.injection import danger_of
from bot.language import language_of, reply_language
from bot.messages import Citation, Finish, Language, Outcome, Release, Reply, Turn
from bot.phrases import NO_ANSWER_SAID, PHRASES
from bot.prompt import PROMPT_VERSION, PromptStore, render_prompt
from bot.second_look import chance_of_no, stands
from bot.settings import StoreProfile
from bot.skills import promotions
from bot.skills.handoff import handoff_trigger
from bot.skills.smalltalk import Courtesy, courtesy_of, reply_to_talk
from bot.stream import Delta, Phase
from retrieval.errors import RetrievalError
from retrieval.passages import Hit, Passage

logger = logging.getLogger(__name__)


class Retriever(Protocol):
    """What the turn needs of `retrieval.retriever`; every call blocks for milliseconds and is thread-safe."""

    @property
    def version(self) -> str: ...

    @property
    def thresholds(self) -> Mapping[str, float]:
        """What the store was tuned to: "direct" and "answer" confidence; empty where it was not."""
        ...

    def gist(self, message: str, *, now: datetime) -> str:
        """The part of a message that is a question and not talk around it; "" where it asks nothing."""
        ...

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        now: datetime,
        lang: str | None = None,
        kinds: Collection[str] | None = None,
    ) -> list[Hit]: ...

    def expired(self, query: str, k: int = 3, *, now: datetime) -> list[Hit]: ...

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]: ...

    def get(self, passage_id: str) -> Passage | None: ...


# What may go on from the question before (bot/followup.py) is searched alone and with it; fitted as the chance is.
_LEAST_FOLLOWS = 0.1  # a smaller chance is none
_FOLLOWING = 0.55  # of what surely goes on so much is found with the question before, the rest without
_N_MIXED = 10  # hits of each search
_QUOTED = 0.35  # of a reply's words in a passage's order, from which on it quotes that passage
DIRECT, ANSWER = 0.5, 0.25  # confidences for a store that chose no risk (docs/experiments.md)


@dataclass(frozen=True, slots=True)
class Rules:
    """When to quote, when to generate, when to give up; see `bot.settings.Settings` for what each is."""

    direct: bool = True
    direct_confidence: float | None = None  # None: the store's own for the risk it chose, else DIRECT
    answer_confidence: float | None = None
    sure_confidence: float = 0.7  # below it the model is asked before a passage goes out as it is; 0: never
    near_confidence: float = 0.12  # under a "no": from here on the nearest passages are shown, said to be just that
    near: float = 0.2  # of the best hit's confidence: what else is shown beside it
    ended_confidence: float = 0.45  # an ended promotion is spoken of only where it is clearly meant
    n_passages: int = 4
    max_reply_tokens: int = 200


@dataclass(frozen=True, slots=True)
class Part:
    """What to do about one question of a message."""

    how: Literal["quote", "generate", "none"]
    query: Query
    text: str = ""  # of a quote
    hits: tuple[Hit, ...] = ()  # what it rests on, best first
    otherwise: Part | None = None  # of a quote: what to do where the model would not answer from its first hit


@dataclass(slots=True)
class _Draft:
    """The reply as it grows."""

    language: Language
    engine: BoundEngine | None  # held by this turn
    pieces: list[str] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    finish: Finish = "stop"
    revised: bool = False
    n_tokens: int = 0

    @property
    def text(self) -> str:
        return "\n\n".join(piece for piece in self.pieces if piece)


class Answerer:
    """Answers questions of one store. One instance serves all conversations of a process."""

    def __init__(
        self,
        *,
        retriever: Retriever,
        engine: Engine | None,
        profile: StoreProfile,
        rules: Rules | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.retriever = retriever
        self.engine = engine
        self.profile = profile
        self.rules = rules or Rules()
        self.clock = clock
        # One thread: the embedder uses all its cores for one query, two at once would only take turns.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    def close(self) -> None:
        """Let go of the search thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _direct_confidence(self) -> float:
        """From this confidence on a passage goes out as it is."""
        chosen = self.rules.direct_confidence
        return self.retriever.thresholds.get("direct", DIRECT) if chosen is None else chosen

    @property
    def _answer_confidence(self) -> float:
        """Below this confidence the store has no answer."""
        chosen = self.rules.answer_confidence
        return self.retriever.thresholds.get("answer", ANSWER) if chosen is None else chosen

    def release(self) -> Release:
        """Return what answers right now, where nothing else is said."""
        with leased(self.engine) as engine:
            return self._release_of(engine)

    def _release_of(self, engine: BoundEngine | None) -> Release:
        name, adapter = (engine.name, engine.adapter) if engine is not None else ("none", None)
        return Release(name, adapter, PROMPT_VERSION, self.retriever.version)

    async def answer(
        self,
        history: Sequence[Turn],
        question: str,
        *,
        locale: str | None = None,
        stop: asyncio.Event | None = None,
        release: str | None = None,
    ) -> AsyncGenerator[Phase | Delta | Reply, None]:
        """
        Yield phases and deltas, and last exactly one `Reply`.

        Joining the deltas gives the reply's text, unless it is `revised`. When `stop` is set a reply with
        finish "abort" and the text so far follows soon. Closing the generator aborts the engine's request.

        Args:
            release: name of the live release that is to answer; the default one where None, or where it is not live.
                One release makes the whole reply, also where another is published meanwhile.

        Raises:
            EngineBusy, EngineFailed, EngineDead: from the engine; the same question may be asked again.
        """
        with leased(self.engine, release) as engine:
            async with aclosing(self._answer(engine, history, question, locale, stop or asyncio.Event())) as steps:
                async for step in steps:
                    yield step

    async def _answer(
        self,
        engine: BoundEngine | None,
        history: Sequence[Turn],
        question: str,
        locale: str | None,
        stop: asyncio.Event,
    ) -> AsyncGenerator[Phase | Delta | Reply, None]:
        language = reply_language(question, history, locale, self.profile.languages[0])
        say = PHRASES[language]

        # 1) Guard: what must not be treated as a question.
        if (canned := self._without_search(question, language, engine)) is not None:
            yield Delta(canned.text)
            yield canned
            return

        # 2) Retrieve and decide, question by question. A bot without its index still answers, less well.
        yield Phase("searching", self._release_of(engine))
        now = self.clock()
        loop = asyncio.get_running_loop()
        try:
            can_generate = engine is not None and engine.state().ready
            parts = await loop.run_in_executor(
                self._thread, self._decide, question, tuple(history), language, now, can_generate
            )
        except RetrievalError as exc:
            # One line: while the index is being built every question comes by here.
            logger.error("answering without passages: %s", exc)
            text = say.search_failed.format(contact=self._contact(language))
            yield Delta(text)
            yield self._reply(_Draft(language, engine, [text], outcomes=["no_answer"]))
            return

        # 3) Say it: quotes at once, the rest from the engine.
        draft = _Draft(language, engine)
        for n, part in enumerate(parts):
            if part.otherwise is not None and not await self._stands(part, history, draft, now):
                part = part.otherwise
            if n and draft.pieces:
                yield Delta("\n\n")
            if part.how == "generate":
                async with aclosing(self._generate(part, history, draft, now, stop)) as steps:
                    async for step in steps:
                        yield step
            else:
                text = part.text or self._no_answer_text(part, parts, language, now)
                draft.pieces.append(text)
                draft.hits += part.hits
                draft.outcomes.append("direct" if part.how == "quote" else "no_answer")
                yield Delta(text)
            if stop.is_set():
                draft.finish = "abort"
                break

        # 4) Stamp it.
        yield self._reply(draft)

    # --- stage 1 ---------------------------------------------------------------------------------------

    def _without_search(self, question: str, language: Language, engine: BoundEngine | None) -> Reply | None:
        """Return the reply to what is no question about the store: attacks, calls for a human, courtesies."""
        say = PHRASES[language]
        if not question.strip():  # the visitor sent nothing but files
            return self._reply(_Draft(language, engine, [say.only_files], outcomes=["no_answer"]))
        if (danger := danger_of(question)) is not None:
            text = say.refused_injection if danger == "injection" else say.refused_others_data
            return self._reply(_Draft(language, engine, [text], outcomes=["refused"]))
        if (trigger := handoff_trigger(question, self.profile.handoff)) is not None:
            said = {"asked": say.handoff_asked, "anger": say.handoff_anger}.get(trigger, say.handoff_rule)
            text = said.format(hours=self._hours(language), contact=self._contact(language))
            return replace(self._reply(_Draft(language, engine, [text], outcomes=["handoff"])), handoff=trigger)
        if (courtesy := courtesy_of(question)) is not None:
            text = self._courtesy(courtesy, language)
            replies = self.profile.quick_replies.get(language, ()) if courtesy == "greeting" else ()
            return replace(self._reply(_Draft(language, engine, [text], outcomes=["direct"])), quick_replies=replies)
        return None

    def _courtesy(self, courtesy: Courtesy, language: Language) -> str:
        return self.profile.greeting[language] if courtesy == "greeting" else PHRASES[language].courtesies[courtesy]

    # --- stage 2: runs in the search thread ------------------------------------------------------------

    def _decide(
        self, message: str, history: tuple[Turn, ...], language: Language, now: datetime, can_generate: bool
    ) -> list[Part]:
        """Return what to do, one part for each question of the message that needs its own."""
        gist = partial(self.retriever.gist, now=now)
        said, message = message, gist(message)
        if not message:
            text = self._courtesy(reply_to_talk(said, first=not history), language)
            return [Part("quote", Query(said, said), text)]
        questions = split_questions(message)
        if len(questions) == 1 and (halves := split_at_comma(message)):
            # A comma joins two questions less often than it does not: only where both halves have a sure answer.
            two = [
                self._decide_one(complete(q, history, halves[:n], gist), language, now, can_generate)
                for n, q in enumerate(halves)
            ]
            if all(part.how == "quote" for part in two) and two[0].text != two[1].text:
                whole = self._decide_one(complete(message, history, gist=gist), language, now, can_generate)
                return two if min(map(_confidence, two)) >= _confidence(whole) - 0.1 else [whole]
        parts: list[Part] = []
        for n, question in enumerate(questions):
            query = complete(question, history, questions[:n], gist)
            if n == 0 and history:
                query = replace(query, topic=self._topic(history[-1], language))
            parts.append(self._decide_one(query, language, now, can_generate))
        if len(parts) > 1:
            # A message whose parts say nothing by themselves may do so as a whole.
            whole = self._decide_one(complete(message, history, gist=gist), language, now, can_generate)
            if all(part.how == "none" for part in parts) or _confidence(whole) > max(map(_confidence, parts)) + 0.25:
                return [whole]
            # The same passage twice is one answer.
            quotes = {p.text: p for p in reversed(parts) if p.how == "quote"}
            parts = [p for p in parts if p.how != "quote" or quotes[p.text] is p]
        return parts

    def _decide_one(self, query: Query, language: Language, now: datetime, can_generate: bool) -> Part:
        rules = self.rules
        hits = self._search(query, language, now)
        top = hits[0].confidence if hits else 0.0
        about = promotions.about_promotions(query.standalone)
        # What other shops sell, charge or repair is nothing this store's passages can answer, however alike they sound.
        elsewhere = promotions.about_other_shops(query.text)
        if not rules.direct:  # measuring the model: nothing is quoted
            shown = self._to_generate_from(query, hits, about, language, now)
            if elsewhere or (top < rules.near_confidence and shown == self._close(hits)):
                return Part("none", query)
            return Part("generate", query, hits=shown)

        # What is on today is a list, not a passage.
        if about and promotions.asks_for_all(query.standalone):
            return self._list_promotions(query, language, now)
        if (ended := self._ended(query, top, language, now)) is not None:
            return ended

        if hits and top >= self._direct_confidence and not elsewhere and self._quotable(hits[0], language):
            best = self._in_language(hits[0].passage, language)
            text = self._quote(hits[0], language, now)
            rests_on: tuple[Hit, ...] = (hits[0],)
            if about and best.kind == "product":
                category = str(best.meta.get("category") or "")
                current = promotions.for_category(self._current_promotions(language, now), category)
                text = f"{text}\n\n{promotions.list_text(current, language)}"
                rests_on += tuple(Hit(p, 1.0, 1.0) for p in current)
            doubtful = can_generate and top < rules.sure_confidence
            otherwise = Part("none", query, hits=self._near(hits)) if doubtful else None
            return Part("quote", query, text, rests_on, otherwise)
        # Asked about offers in words no promotion uses ("im at uni, do I pay less?"): all that is on is the answer.
        if about and self._current_promotions(language, now):
            return self._list_promotions(query, language, now)
        if top < self._answer_confidence or elsewhere:
            near = self._near(hits) if top >= rules.near_confidence and not elsewhere else ()
            return Part("none", query, hits=near)
        if not can_generate:
            near = self._near(hits)
            return Part("quote", query, self._closest(near, language, now), near)
        return Part("generate", query, hits=self._close(hits))

    def _near(self, hits: Sequence[Hit]) -> tuple[Hit, ...]:
        """Return the hits worth showing where none is sure: the best, and up to two that come close to it."""
        return tuple(h for h in hits[:3] if h is hits[0] or h.confidence >= self.rules.near * hits[0].confidence)

    def _closest(self, hits: Sequence[Hit], language: Language, now: datetime, lead: str = "") -> str:
        """Return passages as a reply that says it is not sure; several as a list under their titles."""
        lead = lead or PHRASES[language].closest
        if len(hits) == 1:
            return f"{lead}\n{self._quote(hits[0], language, now)}"
        colon = "：" if language == "zh" else " "
        lines = []
        for hit in hits:
            title, text = self._in_language(hit.passage, language).title, self._quote(hit, language, now)
            lines.append(f"- {text}" if text.startswith(title) else f"- **{title}**{colon}{text}")
        return "\n".join([lead, *lines])

    def _search(self, query: Query, language: Language, now: datetime) -> list[Hit]:
        return search_in_context(self.retriever, query, max(self.rules.n_passages, 3), now=now, lang=language)

    def _topic(self, turn: Turn, language: Language) -> str:
        """Return the title of what answered `turn`; empty where nothing did."""
        passage = self.retriever.get(turn.passages[0]) if turn.passages else None
        return "" if passage is None else self._in_language(passage, language).title

    def _current_promotions(self, language: Language, now: datetime) -> list[Passage]:
        in_language = self.retriever.current("promotion", now=now, lang=language)
        return in_language or self.retriever.current("promotion", now=now)

    def _list_promotions(self, query: Query, language: Language, now: datetime) -> Part:
        current = self._current_promotions(language, now)
        hits = tuple(Hit(p, 1.0, 1.0) for p in current)
        return Part("quote", query, promotions.list_text(current, language), hits)

    def _to_generate_from(
        self, query: Query, hits: Sequence[Hit], about: bool, language: Language, now: datetime
    ) -> tuple[Hit, ...]:
        """Return what the model answers from where it answers everything, best first: of promotions what would be quoted."""  # noqa: E501
        top = hits[0].confidence if hits else 0.0
        if (passage := self._not_on(query, top, language, now)) is not None:
            notice = promotions.not_now_text(passage, now, self.profile.timezone, language)
            on = self._current_promotions(language, now)
            return tuple(Hit(p, 1.0, 1.0) for p in (replace(passage, text=notice), *on))
        if about and (promotions.asks_for_all(query.standalone) or top < self._direct_confidence):
            on = self._current_promotions(language, now)
            found = [h.passage for h in hits]
            on = sorted(on, key=lambda p: found.index(p) if p in found else len(found))
            sure = [h for h in hits if h.passage not in on and h.confidence >= self._answer_confidence]
            return (*(Hit(p, 1.0, 1.0) for p in on), *sure)
        if about and hits[0].passage.kind == "product":
            category = str(hits[0].passage.meta.get("category") or "")
            on = promotions.for_category(self._current_promotions(language, now), category)
            return (hits[0], *(Hit(p, 1.0, 1.0) for p in on))
        return self._close(hits)

    def _close(self, hits: Sequence[Hit]) -> tuple[Hit, ...]:
        """Return the hits that a prompt shows: what is far below the best only misleads a small model."""
        return tuple(close_to_best(hits[: self.rules.n_passages]))

    def _ended(self, query: Query, top: float, language: Language, now: datetime) -> Part | None:
        """Return the answer to a question about a promotion that is not on now, or None."""
        passage = self._not_on(query, top, language, now)
        if passage is None:
            return None
        text = promotions.not_now_text(passage, now, self.profile.timezone, language)
        listed = self._list_promotions(query, language, now)
        return Part("quote", query, f"{text}\n\n{listed.text}", listed.hits)

    def _not_on(self, query: Query, top: float, language: Language, now: datetime) -> Passage | None:
        """Return the promotion that a question is about and that is not on now, or None."""
        stale = [h for h in self.retriever.expired(query.standalone, 4, now=now) if h.passage.kind == "promotion"]
        if not stale:
            return None
        code = str(stale[0].passage.meta.get("code") or "")
        named = bool(code) and re.search(rf"(?<![A-Za-z0-9]){re.escape(code)}(?![A-Za-z0-9])", query.text, re.I)
        meant = stale[0].confidence >= self.rules.ended_confidence and stale[0].confidence > top
        if not (named or (meant and promotions.about_promotions(query.standalone))):
            return None
        in_language = [h for h in stale if h.passage.lang == language and h.confidence >= 0.8 * stale[0].confidence]
        return (in_language or stale)[0].passage

    def _quotable(self, hit: Hit, language: Language) -> bool:
        """Whether a passage can go out word for word: it is in the visitor's language, or has a sibling that is."""
        return self._in_language(hit.passage, language).lang in ("", language) or self.engine is None

    def _in_language(self, passage: Passage, language: Language) -> Passage:
        """Return the same entry in `language` where the store has it (ids alike but for -zh/-en), else `passage`."""
        if passage.lang in ("", language):
            return passage
        stem = passage.id.removesuffix(f"-{passage.lang}")
        for sibling in (f"{stem}-{language}", f"{stem}.{language}"):
            if (other := self.retriever.get(sibling)) is not None:
                return other
        return passage

    def _quote(self, hit: Hit, language: Language, now: datetime) -> str:
        passage = self._in_language(hit.passage, language)
        text = passage.text.strip()
        if passage.kind == "promotion":
            colon = "：" if passage.lang == "zh" else ": "
            text = f"{passage.title}{colon}{promotions.body_of(passage)}"
        if passage.lang not in ("", language):
            text = f"{PHRASES[language].other_language}\n{text}"
        return text

    def _no_answer_text(self, part: Part, parts: Sequence[Part], language: Language, now: datetime) -> str:
        """Return an honest no: with an offer of a human, and with what comes nearest where anything does."""
        say = PHRASES[language]
        if len(parts) > 1:  # the other questions of the message were answered
            return say.no_answer_to.format(question=part.query.text.rstrip("?？"))
        text = say.no_answer.format(hours=self._hours(language), contact=self._contact(language))
        if not part.hits:
            return text
        return f"{text}\n\n{self._closest(part.hits, language, now, say.nearest)}"

    # --- stage 3 ---------------------------------------------------------------------------------------

    async def _stands(self, part: Part, history: Sequence[Turn], draft: _Draft, now: datetime) -> bool:
        """Whether a quote goes out that the search is not sure of: the model is asked, where one can be."""
        engine, hit, query = draft.engine, part.hits[0], part.query
        if engine is None:
            return True
        try:
            prompt = render_prompt(
                self.prompt_store(now),
                history if query.follows >= _LEAST_FOLLOWS else (),
                query.text,
                [self._in_language(hit.passage, draft.language)],
                draft.language,
                count_tokens=engine.count_tokens,
                max_prompt_tokens=engine.max_prompt_tokens,
            )
        except ValueError:  # too long for the model: the search decides alone
            return True
        chance = await chance_of_no(engine, prompt)
        return chance is None or stands(hit.confidence, chance)

    async def _generate(
        self, part: Part, history: Sequence[Turn], draft: _Draft, now: datetime, stop: asyncio.Event
    ) -> AsyncGenerator[Phase | Delta, None]:
        """Stream one generated piece into `draft`, letting only checked text through."""
        engine, language = draft.engine, draft.language
        if engine is None or not engine.state().ready:
            raise EngineNotReady("no engine to generate with")
        yield Phase("thinking")
        passages = [hit.passage for hit in part.hits]
        prompt = render_prompt(
            self.prompt_store(now),
            history,
            part.query.text,
            passages,
            language,
            count_tokens=engine.count_tokens,
            max_prompt_tokens=engine.max_prompt_tokens,
        )
        stated = [f"{p.title}\n{p.text}" for p in passages] + [self._contact(language), *self.profile.contact.values()]
        gate = StreamGate(grounds_of(stated, part.query.text))
        sampling = Sampling(max_tokens=self.rules.max_reply_tokens)
        finish: Finish = "abort"
        async with aclosing(engine.stream(prompt, sampling)) as chunks:
            async for chunk in _until(chunks, stop):
                finish = chunk.finish or finish
                draft.n_tokens += chunk.n_tokens
                text = gate.feed(chunk.text, last=chunk.finish is not None)
                if gate.wrong:
                    break
                if text:
                    if text == gate.sent:
                        yield Phase("typing")
                    yield Delta(text)

        text = gate.sent.strip()
        draft.hits += part.hits
        if stop.is_set() and finish == "abort" and not gate.wrong:
            draft.pieces.append(gate.sent)
            draft.outcomes.append("generated")
            draft.finish = "abort"
            return
        refuses = bool(NO_ANSWER_SAID.search(text))
        if gate.wrong or refuses or not text or not _speaks(text, language) or self._falls_short(text, passages):
            # What the model said is no answer, or not the store's, or leaves out the figures that matter: the passages
            # themselves stand in for it. Measured: the untuned 0.5B model ends here more often than not.
            logger.info("reply replaced: %s", ", ".join(gate.wrong) or ("refused" if refuses else "not what was found"))
            draft.revised = bool(gate.sent) or draft.revised
            del draft.hits[-len(part.hits) :]
            if self.rules.direct:
                near = self._near(part.hits)
                text = self._closest(near, language, now)
                draft.outcomes.append("direct")
                draft.hits += near
            else:
                text = self._no_answer_text(Part("none", part.query), [part], language, now)
                draft.outcomes.append("no_answer")
            draft.pieces.append(text)
            if not draft.revised:
                yield Delta(text)
            return
        draft.pieces.append(gate.sent)
        draft.outcomes.append("generated")
        draft.finish = finish

    def _falls_short(self, text: str, passages: Sequence[Passage]) -> bool:
        """
        Whether a generated reply leaves out what its own source says, or has another source than the best passage.

        Its source is the passage it shares most with. Where the search has another one first, the search is right in
        six of ten and the model in one (docs/experiments.md). Off with the direct path, which measures the model alone.
        """
        if not self.rules.direct:
            return False
        shared = [(_overlap(text, p.text), p) for p in passages]
        share, source = max(shared, key=lambda pair: pair[0])
        if share < _QUOTED or (source is not passages[0] and shared[0][0] < _QUOTED):
            return True
        said, stated = facts_of(text), facts_of(source.text)
        if source.kind in ("faq", "promotion"):
            return not (stated.numbers <= said.numbers | said.percents and stated.codes <= said.codes)
        return not said.numbers and bool(stated.numbers) and share < 0.6

    def prompt_store(self, now: datetime) -> PromptStore:
        """Return what every prompt begins with today."""
        titles = sorted({p.title for p in self.retriever.current("promotion", now=now)})
        return PromptStore(self.profile.names, self.profile.persona, tuple(titles))

    # --- stage 4 ---------------------------------------------------------------------------------------

    def _reply(self, draft: _Draft) -> Reply:
        outcomes = draft.outcomes
        outcome: Outcome
        if "generated" in outcomes:
            outcome = "generated"
        elif "direct" in outcomes:
            outcome = "direct"
        else:
            outcome = outcomes[0] if outcomes else "no_answer"
        say = PHRASES[draft.language]
        return Reply(
            text=draft.text,
            outcome=outcome,
            finish=draft.finish,
            language=draft.language,
            release=self._release_of(draft.engine),
            citations=self._citations(draft),
            cards=_cards(draft.hits, draft.language, self._in_language),
            quick_replies=say.quick_after_no_answer if outcome == "no_answer" else (),
            revised=draft.revised,
            n_tokens=draft.n_tokens,
        )

    def _citations(self, draft: _Draft) -> tuple[Citation, ...]:
        cited: dict[str, Citation] = {}
        for hit in draft.hits:
            p = self._in_language(hit.passage, draft.language)
            quote = p.text if len(p.text) <= 300 else p.text[:299] + "…"
            cited.setdefault(p.id, Citation(p.id, p.title, p.source, quote, round(hit.confidence, 3)))
        return tuple(cited.values())

    def _contact(self, language: Language) -> str:
        return self.profile.contact_line(language)

    def _hours(self, language: Language) -> str:
        return self.profile.business_hours or {"zh": "工作时间", "en": "business hours"}[language]


CLOSE = 0.15  # of the best hit's confidence


def search_in_context(retriever: Retriever, query: Query, k: int, *, now: datetime, lang: str | None) -> list[Hit]:
    """
    Return at most `k` hits, best first; of what may go on from the question before, by what both readings find.

    Training searches with the same.
    """
    if query.follows < _LEAST_FOLLOWS:
        return retriever.search(query.text, k, now=now, lang=lang)
    texts = [query.text, query.joined]
    if query.topic:
        texts.append(f"{query.topic} {query.text}")
    found = [retriever.search(text, _N_MIXED, now=now, lang=lang) for text in texts]
    alone, *joined = ({hit.passage.id: hit.confidence for hit in hits} for hits in found)
    share = _FOLLOWING * query.follows
    # Confidences of two questions in one string come out low, hence the factor.
    factor = 1 + 0.8 * query.follows
    passages = {hit.passage.id: hit for hits in found for hit in hits}
    mixed: dict[str, float] = {}
    for id_, hit in passages.items():
        in_context = sum(each.get(id_, 0.0) for each in joined) / len(joined)
        # "And to Germany?" after a question about Japan must not get Japan's answer again.
        new = 0.7 + 0.3 * _coverage(query.new_words, hit.passage)
        mixed[id_] = factor * new * ((1 - share) * alone.get(id_, 0.0) + share * in_context)
    # In this order, and only then cut: cut first, two that both fit would be equal.
    best = sorted(passages.values(), key=lambda hit: -mixed[hit.passage.id])[:k]
    return [replace(hit, confidence=round(min(0.95, mixed[hit.passage.id]), 4)) for hit in best]


def close_to_best(hits: Sequence[Hit]) -> list[Hit]:
    """Return the best of `hits`, best first, and those not far below it in confidence; training does the same."""
    return [h for h in hits if h is hits[0] or h.confidence >= CLOSE * hits[0].confidence]


def _confidence(part: Part) -> float:
    return part.hits[0].confidence if part.hits else 0.0


def _coverage(words: Sequence[str], passage: Passage) -> float:
    """Return the share of `words` that `passage` contains; 1 where there are none."""
    if not words:
        return 1.0
    text = " ".join([passage.title, passage.text, *passage.questions]).lower()
    spoken = set(content_words(text))
    return sum(1 for word in words if word in spoken or (word[-1:] == "s" and word[:-1] in spoken)) / len(words)


def _overlap(text: str, source: str) -> float:
    """Return the share of `text`'s content words, taken in pairs, that stand in `source` in that order; 0 to 1."""
    said, there = content_words(text), content_words(source)
    pairs = set(pairwise(said)) or {(w, w) for w in said}
    known = set(pairwise(there)) | {(w, w) for w in there}
    return len(pairs & known) / len(pairs) if pairs else 0.0


def _speaks(text: str, language: Language) -> bool:
    """Whether a generated reply is in the visitor's language; figures alone are in both."""
    return language_of(text) in (None, language)


def _cards(
    hits: Sequence[Hit], language: Language, in_language: Callable[[Passage, Language], Passage]
) -> tuple[dict[str, Any], ...]:
    """Return product cards for the products a reply rests on: the best hit, if it is one."""
    if not hits or hits[0].passage.kind != "product":
        return ()
    p = in_language(hits[0].passage, language)
    fields = {name: p.meta.get(name) for name in ("price", "currency", "url", "image", "stock")}
    return ({"kind": "product", "id": p.meta.get("sku", p.id), "title": p.title, **fields},)


async def _until(items: AsyncIterator[Chunk], stop: asyncio.Event) -> AsyncIterator[Chunk]:
    """Yield from `items` until they end or `stop` is set, whichever comes first."""
    stopped = asyncio.ensure_future(stop.wait())
    try:
        while True:
            following = asyncio.ensure_future(anext(items))
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                return
            try:
                yield following.result()
            except StopAsyncIteration:
                return
    finally:
        stopped.cancel()
