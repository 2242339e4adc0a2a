"""
The inbox while it is open: who is there, who waits, who has what. Read this file first.

Knows the agents' seats (one a connection), the queue and the clock; everything durable goes through `ConversationHub`
(events, states) and `Records` (accounts, lists). Does not know WebSockets or HTTP.

What happens to a conversation marks it; twenty times a second at most, the cards of all marked ones are read in one
query and given to the seats. Nothing is read while nobody is there, but for the places of those who wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from bot.agents.accounts import Accounts
from bot.agents.faq_file import FaqFile
from bot.agents.frames import AGENT_LIMITS, agent_object, card_object, draft_object, left_object
from bot.agents.people import Agent, Card, FaqDraft, LeftMessage, Presence, stamp
from bot.agents.records import Records
from bot.agents.summary import summarize, summary_of
from bot.conversations import Answerer, ConversationHub, history_of
from bot.engine import Engine
from bot.errors import (
    BadFrame,
    BotError,
    EngineBusy,
    EngineFailed,
    Forbidden,
    NotAllowed,
    NotFound,
    StoreUnwritable,
    UnknownConversation,
)
from bot.hours import expected_wait_s
from bot.language import language_of, reply_language
from bot.messages import Event, Language, Reply, State
from bot.settings import StoreProfile
from bot.skills.handoff import handoff_trigger
from bot.states import Action
from bot.storage import Conversation
from bot.wire import dump_event, dump_frame

logger = logging.getLogger(__name__)

CLOSE_SIGNED_OUT = 4401
FLUSH_S = 0.05
SESSIONS_S = 15.0  # how soon an account that was disabled from the command line is out
RECENT = timedelta(days=14)
N_RECENT = 20
N_BOT_CARDS = 50
SUGGEST_TIMEOUT_S = 90.0
MAX_THINKING = 2  # suggestions and summaries of an agent at once
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_WEEKDAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]


class Seat(Protocol):
    """One connection of an agent."""

    @property
    def agent(self) -> Agent: ...

    @property
    def token_hash(self) -> str: ...

    def push(self, frame: str) -> None: ...

    def end(self, code: int, reason: str) -> None: ...


class Recorder(Protocol):
    """Whoever counts; `bot.metrics` has the real one."""

    def handed_over(self, reason: str) -> None: ...

    def accepted(self, wait_s: float) -> None: ...

    def accept_lost(self) -> None: ...

    def handled(self, handling_s: float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskRules:
    """See `bot.settings.Settings` for those a merchant sets."""

    agent_gone_s: float = 120.0
    conversations_per_agent: int = 3


class Desk:
    """One store's inbox; the `Queue` of its hub."""

    def __init__(
        self,
        *,
        hub: ConversationHub,
        records: Records,
        accounts: Accounts,
        answerer: Answerer,
        engine: Engine | None,
        store: StoreProfile,
        recorder: Recorder,
        faq_file: FaqFile | None = None,
        rules: DeskRules | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.hub, self.records, self.accounts = hub, records, accounts
        self.store, self.engine = store, engine
        self._answerer, self._recorder, self._faq_file = answerer, recorder, faq_file
        self.rules = rules or DeskRules()
        self._clock = clock
        self._seats: dict[str, set[Seat]] = {}  # by agent
        self._away: set[str] = set()
        self._gone: dict[str, float] = {}  # agents without a seat: since when (loop time)
        self._names: dict[str, Agent] = {}
        self._since: dict[str, tuple[str, datetime]] = {}  # hand-offs we count: conversation -> (state, since)
        self._marked: set[str] = set()
        self._shown: set[str] = set()  # conversations that agents have in their queues
        self._told: dict[str, tuple[int, float | None]] = {}  # what visitors in the queue were told last
        self._left: set[tuple[str, int]] = set()
        self._liked: set[tuple[str, int]] = set()
        self._queue_moved = False
        self._wake = asyncio.Event()
        self._thinking: dict[str, int] = {}
        self._queued: tuple[Card, ...] = ()  # as read last, for the figures
        hub.watch(self)

    # Lifetime

    async def run(self) -> None:
        """Keep seats, places and owners up to date until cancelled."""
        self._started = asyncio.get_running_loop().time()
        await self._load_names()
        if not self._names:
            logger.info("no account for /inbox yet; make one: python -m bot agents add LOGIN --role merchant")
        self._queue_moved = True
        self._wake.set()
        async with asyncio.TaskGroup() as group:
            for work, every_s in (
                (self._flush, FLUSH_S),
                (self._take_back, self._take_back_s),
                (self._check, SESSIONS_S),
            ):
                group.create_task(self._forever(work, every_s, on_wake=work == self._flush))

    @property
    def _take_back_s(self) -> float:
        return min(5.0, self.rules.agent_gone_s / 4)

    async def _forever(self, work: Callable[[], Any], every_s: float, *, on_wake: bool) -> None:
        while True:
            if on_wake:
                await self._wake.wait()
                self._wake.clear()
            await asyncio.sleep(every_s)
            began = time.monotonic()
            try:
                await work()
                # With a long queue a change touches every card in it: then less often, not all the time.
                await asyncio.sleep(4 * (time.monotonic() - began) if on_wake else 0)
            except BotError as exc:
                logger.warning("the inbox: %s", exc.code)
                await asyncio.sleep(1.0)
                self._wake.set()
            except Exception:  # the inbox must not stop for one bug; the log has it
                logger.exception("the inbox")
                await asyncio.sleep(1.0)

    def figures(self) -> dict[str, float]:
        """Return what /metrics shows."""
        waiting = [card.state_at for card in self._queued if card.state == "waiting"]
        return {
            "waiting": float(len(waiting)),
            "human": float(len(self._queued) - len(waiting)),
            "oldest_wait_seconds": (self._clock() - min(waiting)).total_seconds() if waiting else 0.0,
            "agents_online": float(len(self._online())),
            "agents_away": float(len(self._away & self._seats.keys())),
            "connections": float(sum(map(len, self._seats.values()))),
        }

    # What the hub asks and tells

    async def joining(self) -> dict[str, Any]:
        n_waiting = len(await self.records.waiting())
        position = n_waiting + 1
        return {
            "position": position,
            "expected_wait_s": await self._expected_wait_s(position),
            **self._opening(),
        }

    def happened(self, conversation: str, event: Event) -> None:
        if event.kind == "state":
            self._queue_moved = True
            self._count(conversation, event)
        elif event.kind == "message" and event.data.get("left"):
            self._left.add((conversation, event.seq))
        elif event.kind == "rating" and event.data.get("value") == "up":
            self._liked.add((conversation, int(event.data["rated"])))
        self._mark(conversation)

    def came_or_went(self, conversation: str) -> None:
        self._mark(conversation)

    def _mark(self, conversation: str) -> None:
        if self._seats:
            self._marked.add(conversation)
        if self._seats or self._queue_moved or self._left or self._liked:
            self._wake.set()

    def _count(self, conversation: str, event: Event) -> None:
        """Count waits and handling times from state events; those begun before a restart are in the database only."""
        state, reason = event.data["state"], event.data.get("reason", "visitor")
        was = self._since.pop(conversation, None)
        if was is not None:
            seconds = (event.at - was[1]).total_seconds()
            if was[0] == "waiting" and state == "human":
                self._recorder.accepted(seconds)
            elif was[0] == "human":
                self._recorder.handled(seconds)
        if state == "waiting":
            known = ("visitor", "asked", "anger", "no_answer", "bot", "agent", "agent_gone", "transfer")
            self._recorder.handed_over(
                reason if reason in known else "rule" if str(reason).startswith("rule:") else "visitor"
            )
        if state in ("waiting", "human"):
            self._since[conversation] = (state, event.at)

    # Presence

    def arrive(self, seat: Seat) -> None:
        """An agent has a connection more."""
        agent = seat.agent
        self._names[agent.id] = agent
        self._seats.setdefault(agent.id, set()).add(seat)
        self._gone.pop(agent.id, None)
        self._tell_presence()
        self._queue_moved = True
        self._wake.set()

    def leave(self, seat: Seat) -> None:
        """An agent has a connection less; without any they lose their conversations after a while."""
        seats = self._seats.get(seat.agent.id, set())
        if seat not in seats:
            return
        seats.discard(seat)
        if not seats:
            del self._seats[seat.agent.id]
            self._away.discard(seat.agent.id)
            self._gone[seat.agent.id] = asyncio.get_running_loop().time()
        self._tell_presence()
        self._queue_moved = True
        self._wake.set()

    def set_presence(self, agent: Agent, status: Presence) -> None:
        """An agent is away, or back. Away they keep what they have; nobody is told to expect them."""
        if status == "away":
            self._away.add(agent.id)
        else:
            self._away.discard(agent.id)
        self._tell_presence()
        self._queue_moved = True
        self._wake.set()

    def status_of(self, agent: str) -> Presence:
        if agent not in self._seats:
            return "offline"
        return "away" if agent in self._away else "online"

    async def agents(self) -> list[dict[str, Any]]:
        """Return all accounts that are not disabled, with their presence."""
        await self._load_names()
        return self._agents()

    def _agents(self) -> list[dict[str, Any]]:
        return [agent_object(a, self.status_of(a.id)) for a in self._names.values() if not a.disabled]

    def _online(self) -> set[str]:
        return self._seats.keys() - self._away

    def _tell_presence(self) -> None:
        self._tell_all(dump_frame("agents", agents=self._agents()))

    def _tell_all(self, frame: str, *, merchants_only: bool = False) -> None:
        for seats in self._seats.values():
            for seat in seats:
                if not merchants_only or seat.agent.role == "merchant":
                    seat.push(frame)

    async def _load_names(self) -> None:
        self._names = {agent.id: agent for agent in await self.records.agents()}

    def _who(self, agent: str | None) -> dict[str, Any] | None:
        if agent is None:
            return None
        known = self._names.get(agent)
        return known.who() if known is not None else {"id": agent, "name": ""}

    def end_sessions(self, token_hashes: Sequence[str] | None, *, agent: str, reason: str = "signed out") -> None:
        """Close an agent's connections of these sessions, or all of them with None."""
        for seat in list(self._seats.get(agent, ())):
            if token_hashes is None or seat.token_hash in token_hashes:
                seat.end(CLOSE_SIGNED_OUT, reason)

    async def check_sessions(self) -> None:
        """Close the connections whose session has ended."""
        seats = [seat for seats in self._seats.values() for seat in seats]
        good = await self.accounts.good({seat.token_hash for seat in seats})
        for seat in seats:
            if seat.token_hash not in good:
                seat.end(CLOSE_SIGNED_OUT, "the session has ended")

    async def _check(self) -> None:
        await self.check_sessions()

    # Lists

    async def welcome(self, agent: Agent) -> dict[str, Any]:
        """Return the fields of an agent's `welcome`."""
        await self._load_names()
        queued = await self.records.queues()
        cards = self._placed(queued)
        if agent.role == "merchant":
            cards += await self.records.list_cards(states=("bot",), limit=N_BOT_CARDS)
        self._shown |= {card.id for card in queued}
        left = [self._left_object(m) for m in await self.records.left_messages(only_open=True)]
        return {
            "agent": agent.public(),
            "agents": self._agents(),
            "conversations": [self.card_object(card) for card in cards],
            "left": left,
            "store": {"name": self.store.name, "languages": list(self.store.languages)},
            "hours": {name: value for name, value in self._opening().items() if name != "opens_text"},
            "limits": AGENT_LIMITS,
            "has_engine": self.engine is not None,
        }

    def _placed(self, queued: Sequence[Card]) -> list[Card]:
        """Return the queues' cards with places given to those who wait."""
        place, cards = 0, []
        for card in queued:
            if card.state == "waiting":
                place += 1
                card = replace(card, position=place)
            cards.append(card)
        return cards

    def card_object(self, card: Card) -> dict[str, Any]:
        return card_object(card, self._who(card.owner), visitor_online=self.hub.has_visitor(card.id))

    async def list_cards(
        self,
        agent: Agent,
        *,
        states: Sequence[str],
        mine: bool,
        text: str,
        before: datetime | None,
        limit: int,
    ) -> list[dict[str, Any]]:
        """Return cards, newest first; agents see what a human was asked for in."""
        cards = await self.records.list_cards(
            states=states,
            owner=agent.id if mine else None,
            text=text,
            before=before,
            limit=limit,
            only_handed_over=agent.role != "merchant",
        )
        return [self.card_object(card) for card in cards]

    async def card(self, agent: Agent, conversation: str) -> Card:
        """
        Return the card of a conversation this agent may see.

        Raises:
            UnknownConversation: there is none, or no human was ever asked for and the agent is no merchant.
        """
        cards = await self.records.cards([conversation])
        if not cards:
            raise UnknownConversation
        (card,) = cards
        if card.state == "waiting":
            waiting = await self.records.waiting()
            card = replace(card, position=waiting.index(conversation) + 1 if conversation in waiting else None)
        await self._must_see(agent, card.state, conversation)
        return card

    async def _must_see(self, agent: Agent, state: State, conversation: str) -> None:
        hidden = agent.role != "merchant" and state in ("bot", "closed")
        if hidden and not await self.records.was_handed_over(conversation):
            raise UnknownConversation

    async def whole(self, agent: Agent, conversation: str) -> dict[str, Any]:
        """Return {conversation, events, summary} of a conversation this agent may see."""
        card = await self.card(agent, conversation)
        events = await self.hub.storage.events(conversation)
        return {
            "conversation": self.card_object(card),
            "events": [_event_object(event) for event in events],
            "summary": summary_of(events, card.reason, card.language),
        }

    async def summary(self, conversation: str, *, by_engine: bool) -> dict[str, Any]:
        """Return a summary; its text is the engine's where there is one that can be asked."""
        cards = await self.records.cards([conversation])
        if not cards:
            raise UnknownConversation
        events = await self.hub.storage.events(conversation)
        summary = {**summary_of(events, cards[0].reason, cards[0].language), "by": "code"}
        if by_engine and self.engine is not None and self.engine.state().ready:
            try:
                async with asyncio.timeout(SUGGEST_TIMEOUT_S):
                    text = await summarize(self.engine, events, cards[0].language)
            except (BotError, TimeoutError) as exc:
                logger.warning("a summary was made by code: %s", getattr(exc, "code", "timeout"))
            else:
                if text:
                    summary |= {"text": text, "by": "engine"}
        return summary

    async def stats(self) -> dict[str, Any]:
        """Return figures of the queue and of today, in the store's day."""
        queued = await self.records.queues()
        waiting = [card for card in queued if card.state == "waiting"]
        now = self._clock()
        midnight = now.astimezone(self.store.timezone).replace(hour=0, minute=0, second=0, microsecond=0)
        today = await self.records.handoff_times(midnight)
        opening = {name: value for name, value in self._opening().items() if name != "opens_text"}
        return {
            "waiting": len(waiting),
            "human": len(queued) - len(waiting),
            "agents_online": len(self._online()),
            "oldest_wait_s": max(((now - card.state_at).total_seconds() for card in waiting), default=None),
            "expected_wait_s": await self._expected_wait_s(len(waiting) + 1),
            **opening,
            "today": {
                "handoffs": today.n_opened,
                "accepted": today.n_accepted,
                "closed": today.n_ended,
                "median_wait_s": _median(today.waits_s),
                "median_handling_s": _median(today.handling_s),
            },
        }

    # What agents do

    async def accept(self, agent: Agent, conversation: str) -> None:
        """
        Give a waiting conversation to this agent; the bot is silent from here on.

        Raises:
            Taken: another agent has it. NotAllowed: nobody waits in it.
        """
        try:
            await self._move(agent, conversation, ["accept"], agent=agent, said="joined")
        except BotError as exc:
            if exc.code == "taken":
                self._recorder.accept_lost()
            raise

    async def take_over(self, agent: Agent, conversation: str) -> None:
        """Step into a conversation that the bot has (or that waits); raises as `accept`."""
        card = await self.card(agent, conversation)
        actions: list[Action] = ["request", "accept"] if card.state == "bot" else ["accept"]
        await self._move(agent, conversation, actions, agent=agent, said="joined", reason="agent")

    async def transfer(self, agent: Agent, conversation: str, to: str, note: str | None) -> None:
        """
        Give a conversation to a colleague who is there, or back to the queue.

        Raises:
            NotFound: there is no such agent. NotYours. NotAllowed: the colleague is offline, or no human has it.
        """
        if to == "queue":
            await self._move(
                agent, conversation, ["requeue"], said="requeued", reason="transfer", note=note, owner_only=True
            )
            return
        colleague = self._names.get(to)
        if colleague is None or colleague.disabled:
            raise NotFound("there is no such agent")
        if self.status_of(to) == "offline":
            raise NotAllowed("offline", "transfer")
        await self._move(
            agent,
            conversation,
            ["transfer"],
            agent=colleague,
            said="transferred",
            reason="transfer",
            note=note,
            owner_only=True,
        )

    async def give_back(self, agent: Agent, conversation: str) -> None:
        """Let the bot have a conversation again; raises NotYours, NotAllowed."""
        await self._move(agent, conversation, ["return"], said="returned", owner_only=True)

    async def close(self, agent: Agent, conversation: str) -> None:
        """End a conversation; raises NotYours, NotAllowed."""
        await self._move(agent, conversation, ["close"], said="closed", reason="agent", owner_only=True)

    async def _move(
        self,
        by: Agent,
        conversation: str,
        actions: Sequence[Action],
        *,
        said: str,
        agent: Agent | None = None,
        reason: str | None = None,
        note: str | None = None,
        owner_only: bool = False,
    ) -> None:
        if by.role != "merchant":
            head = await self.hub.storage.get(conversation)
            await self._must_see(by, head.state, conversation)
        await self.hub.move(
            conversation,
            actions,
            "agent",
            by={"role": "agent", **by.who()},
            agent=agent.who() if agent is not None else None,
            reason=reason,
            only_owner=by.id if owner_only and by.role != "merchant" else None,
            said=said,
            note=note,
            name=(agent or by).name,
        )

    async def typing(self, agent: Agent, conversation: str, on: bool) -> None:
        """Show the visitor that their agent types; of others nothing is shown."""
        head = await self.hub.storage.get(conversation)
        if head.owner == agent.id:
            await self.hub.typing(conversation, "agent", on, name=agent.name)

    # Suggestions

    async def suggest(self, agent: Agent, conversation: str, text: str | None) -> dict[str, Any]:
        """
        Return {question, suggestions}: what the bot would answer now. Nothing is sent or stored.

        Args:
            text: answer this instead of the visitor's last question.

        Raises:
            EngineBusy: too many at once for this agent. And what an answer may raise.
        """
        with _Place(self._thinking, agent.id):
            events = await self.hub.storage.events(conversation, last=60)
            question, before = text, events[-1].seq + 1 if events else 1
            if question is None:
                asked = [e for e in events if e.role == "visitor" and e.text.strip()]
                # "A human, please!" is no question that a reply could be suggested to.
                real = [e for e in asked if handoff_trigger(e.text) is None] or asked
                if not real:
                    return {"question": "", "suggestions": []}
                question, before = real[-1].text, real[-1].seq
            reply = await self._answer(events, question, before, await self.hub.storage.get(conversation))
        useful = reply.outcome in ("direct", "generated") and reply.text.strip()
        suggestion = {
            "text": reply.text,
            "outcome": reply.outcome,
            "citations": [asdict(citation) for citation in reply.citations],
        }
        return {"question": question, "suggestions": [suggestion] if useful else []}

    async def _answer(self, events: Sequence[Event], question: str, before: int, head: Conversation) -> Reply:
        final: Reply | None = None
        history = history_of(events, before=before)
        try:
            async with asyncio.timeout(SUGGEST_TIMEOUT_S):
                steps = self._answerer.answer(history, question, locale=head.locale, stop=asyncio.Event())
                async with aclosing(steps):
                    async for step in steps:
                        if isinstance(step, Reply):
                            final = step
        except TimeoutError:
            raise EngineFailed("the suggestion took too long") from None
        if final is None:
            raise EngineFailed("the answerer ended without a reply")
        return final

    async def think_summary(self, agent: Agent, conversation: str) -> dict[str, Any]:
        """Return a summary by the engine where there is one; raises EngineBusy where this agent has too many."""
        with _Place(self._thinking, agent.id):
            return await self.summary(conversation, by_engine=True)

    # Messages left, drafts

    async def left_messages(self, *, only_open: bool) -> list[dict[str, Any]]:
        return [self._left_object(m) for m in await self.records.left_messages(only_open=only_open)]

    async def set_done(self, agent: Agent, message: str, done: bool) -> dict[str, Any]:
        """Mark a message left as seen to, or open again; raises NotFound."""
        changed = self._left_object(await self.records.set_done(message, agent.id if done else None))
        self._tell_all(dump_frame("left", message=changed))
        return changed

    def _left_object(self, message: LeftMessage) -> dict[str, Any]:
        return left_object(message, self._who(message.done_by), language_of(message.text) or "zh")

    async def drafts(self, status: Any) -> list[dict[str, Any]]:
        return [self._draft_object(d) for d in await self.records.drafts(status)]

    def _draft_object(self, draft: FaqDraft) -> dict[str, Any]:
        return draft_object(draft, self._who(draft.created_by), self._who(draft.decided_by))

    async def make_draft(
        self, agent: Agent | None, conversation: str, seq: int, question: str | None, answer: str | None
    ) -> tuple[dict[str, Any], bool]:
        """
        Return a draft of an agent's message and whether it is new.

        Args:
            agent: who proposes it; None: the visitor liked it.

        Raises:
            BadFrame: there is no agent's message at `seq`, or no question before it and none given.
        """
        if agent is not None:
            await self.card(agent, conversation)
        events = await self.hub.storage.events(conversation)
        at = next((n for n, e in enumerate(events) if e.seq == seq and e.role == "agent" and e.kind == "message"), None)
        if at is None:
            raise BadFrame(f"'seq' {seq} is no message of an agent")
        before = [e for e in events[:at] if e.role == "visitor" and e.text.strip() and handoff_trigger(e.text) is None]
        question = (question or (before[-1].text if before else "")).strip()
        answer = (answer or events[at].text).strip()
        if not question or not answer:
            raise BadFrame("'question': there is none before this message; give one")
        language: Language = reply_language(question, (), None, self.store.languages[0])
        source = "agent" if agent is not None else "rating"
        made, new = await self.records.add_draft(
            conversation, seq, question, answer, language, source, agent.id if agent else None
        )
        return self._shown_draft(made) if new else self._draft_object(made), new

    async def edit_draft(self, id_: str, question: str, answer: str, lang: Language) -> dict[str, Any]:
        """Change a pending draft; raises NotFound, NotAllowed."""
        return self._shown_draft(await self.records.edit_draft(id_, question, answer, lang))

    async def approve_draft(
        self, merchant: Agent, id_: str, question: str | None, answer: str | None, lang: Language | None
    ) -> dict[str, Any]:
        """
        Add a pending draft to faqs.csv, which the bot's index follows.

        Raises:
            NotFound, NotAllowed (decided already), StoreUnwritable.
        """
        draft = await self.records.draft(id_)
        if draft.status != "pending":
            raise NotAllowed(draft.status, "approve")
        if self._faq_file is None:
            raise StoreUnwritable("this server has no store folder")
        if question or answer or lang:
            draft = await self.records.edit_draft(
                id_, question or draft.question, answer or draft.answer, lang or draft.lang
            )
        # The file first, under an id made from the draft's: cut between the two, approving again adds nothing twice.
        faq_id = f"agent-{draft.id.removeprefix('d_').replace('_', '-').lower()}-{draft.lang}"
        await self._faq_file.append(faq_id, draft.question, draft.answer, draft.lang)
        return self._shown_draft(await self.records.decide_draft(id_, "approved", merchant.id, faq_id))

    async def reject_draft(self, merchant: Agent, id_: str) -> dict[str, Any]:
        """Refuse a pending draft; raises NotFound, NotAllowed."""
        return self._shown_draft(await self.records.decide_draft(id_, "rejected", merchant.id))

    def _shown_draft(self, draft: FaqDraft) -> dict[str, Any]:
        shown = self._draft_object(draft)
        self._tell_all(dump_frame("draft", draft=shown))
        return shown

    # Behind the scenes

    async def _flush(self) -> None:
        """Give the seats what has changed, and those who wait their place."""
        marked, self._marked = self._marked, set()
        left, self._left = self._left, set()
        liked, self._liked = self._liked, set()
        moved, self._queue_moved = self._queue_moved, False
        places: dict[str, int] = {}
        try:
            if moved or marked & self._shown:
                queued = self._placed(await self.records.queues())
                places = {card.id: card.position for card in queued if card.position is not None}
                self._queued = tuple(queued)
            if moved:
                await self._tell_places(places)
                # Everybody behind who left has another place.
                marked |= {id_ for id_ in places if self._seats}
            await self._tell_cards(marked, places)
            for conversation, seq in left:
                if (message := await self.records.left_at(conversation, seq)) is not None:
                    self._tell_all(dump_frame("left", message=self._left_object(message)))
        except BotError:
            self._marked |= marked
            self._left |= left
            self._liked |= liked
            self._queue_moved = self._queue_moved or moved
            raise
        for conversation, seq in liked:
            try:
                await self.make_draft(None, conversation, seq, None, None)
            except BotError as exc:  # the reply that was liked is the bot's, or has no question
                logger.debug("no draft: %s", exc)

    async def _tell_cards(self, marked: set[str], places: dict[str, int]) -> None:
        if not marked or not self._seats:
            return
        cards = await self.records.cards(sorted(marked))
        if any(card.state == "waiting" and card.id not in places for card in cards):
            # Stored a moment ago; that it moved is about to be heard of.
            places = {card.id: card.position or 0 for card in self._placed(await self.records.queues())}
        for card in cards:
            queued = card.state in ("waiting", "human")
            frame = dump_frame(
                "card", conversation=self.card_object(replace(card, position=places.get(card.id) or None))
            )
            # Agents without a say over the bot hear of its conversations only as they leave their queues.
            self._tell_all(frame, merchants_only=not queued and card.id not in self._shown)
            if queued:
                self._shown.add(card.id)
            else:
                self._shown.discard(card.id)

    async def _tell_places(self, places: dict[str, int]) -> None:
        """Tell visitors in the queue where they stand, if it is not what they were told."""
        waits = await self._waits(sorted(places.values())) if places else {}
        told: dict[str, tuple[int, float | None]] = {}
        for conversation, position in places.items():
            told[conversation] = (position, waits[position])
            before = self._told.get(conversation)
            if before is not None and before != told[conversation]:
                self.hub.tell(conversation, dump_frame("queue", position=position, expected_wait_s=waits[position]))
        self._told = told

    async def _take_back(self) -> None:
        """Give the conversations of agents who are gone for too long back to the queue."""
        now = asyncio.get_running_loop().time()
        late = now - self.rules.agent_gone_s
        for conversation, owner in await self.records.owned():
            if owner in self._seats or self._gone.get(owner, self._started) > late:
                continue
            if owner not in self._names:
                await self._load_names()
            name = self._names[owner].name if owner in self._names else ""
            try:
                await self.hub.move(
                    conversation,
                    ["requeue"],
                    "server",
                    by={"role": "server"},
                    reason="agent_gone",
                    only_owner=owner,
                    said="agent_gone",
                    name=name,
                )
                logger.info("conversation %s: its agent is gone; back to the queue", conversation)
            except (NotAllowed, UnknownConversation) as exc:
                logger.info("conversation %s was not taken back: %s", conversation, exc)

    def availability(self, conversation: str | None = None) -> dict[str, Any]:
        """Return what a visitor's `welcome` says of human help; never blocks."""
        opening = {name: value for name, value in self._opening().items() if name != "opens_text"}
        position, wait_s = self._told.get(conversation or "", (None, None))
        return {**opening, "agents_online": bool(self._online()), "position": position, "expected_wait_s": wait_s}

    def name_of(self, agent: str | None) -> str | None:
        """Return the name that visitors see of an agent."""
        known = self._names.get(agent or "")
        return known.name if known is not None else None

    def _opening(self) -> dict[str, Any]:
        """Return {open, opens_at, opens_text}; without hours of the store it is open when agents are there."""
        hours, now = self.store.hours, self._clock()
        if hours is None or hours.is_open(now):
            return {"open": True, "opens_at": None, "opens_text": None}
        opening = hours.next_opening(now)
        if opening is None:
            return {"open": False, "opens_at": None, "opens_text": None}
        local = opening.astimezone(self.store.timezone)
        clock = local.strftime("%H:%M")
        text = {
            "zh": f"{local.month}月{local.day}日 {clock}",
            "en": f"on {_WEEKDAYS[local.weekday()]} {local.day} {_MONTHS[local.month - 1]} at {clock} "
            f"({self.store.timezone})",
        }
        return {"open": False, "opens_at": stamp(opening.astimezone(UTC)), "opens_text": text}

    async def _expected_wait_s(self, position: int) -> float | None:
        return (await self._waits([position]))[position]

    async def _waits(self, positions: Sequence[int]) -> dict[int, float | None]:
        """Return the expected wait at each place of the queue, in whole tens of seconds: it is no better known."""
        n_agents = len(self._online())
        if not n_agents:
            return dict.fromkeys(positions)
        handling = await self.records.recent_handling_s(N_RECENT, self._clock() - RECENT)
        n_human = await self.records.n_human()
        waits: dict[int, float | None] = {}
        for position in positions:
            wait = expected_wait_s(position, n_agents, n_human, handling, per_agent=self.rules.conversations_per_agent)
            waits[position] = None if wait is None else round(wait, -1)
        return waits


class _Place:
    """One of the few places an agent has for what takes the engine's time."""

    def __init__(self, taken: dict[str, int], agent: str) -> None:
        self._taken, self._agent = taken, agent

    def __enter__(self) -> None:
        if self._taken.get(self._agent, 0) >= MAX_THINKING:
            raise EngineBusy(2.0)
        self._taken[self._agent] = self._taken.get(self._agent, 0) + 1

    def __exit__(self, *_: object) -> None:
        self._taken[self._agent] -= 1


def require_merchant(agent: Agent) -> None:
    """Raise Forbidden where `agent` is no merchant."""
    if agent.role != "merchant":
        raise Forbidden


def _event_object(event: Event) -> dict[str, Any]:

    value: dict[str, Any] = json.loads(dump_event(event))
    return value


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    n = len(ordered)
    return None if not n else (ordered[n // 2] + ordered[(n - 1) // 2]) / 2
