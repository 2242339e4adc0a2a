"""
Who is talking in a conversation, as a machine: `bot -> waiting -> human -> bot | closed`. Pure; one table.

Every change of a conversation's state goes through `next_state`; what the table does not have is refused with a
code. Knows nothing of who is asked for their reasons: a model's words never change a state, only the field of a
finished reply that code has set (`Reply.handoff`), and that is an action of the actor "bot" like any other.
"""

from __future__ import annotations

from typing import Literal

from bot.errors import NotAllowed
from bot.messages import State

Action = Literal["request", "accept", "transfer", "requeue", "return", "close", "reopen"]
Actor = Literal["visitor", "bot", "agent", "server"]

# (state, action) -> (new state, who may). Silence of the bot is a consequence: it speaks in `bot` and `waiting` only.
TRANSITIONS: dict[tuple[State, Action], tuple[State, frozenset[Actor]]] = {
    # A human is asked for: by the visitor, by a rule of ours or the store's, or by an agent who steps in.
    ("bot", "request"): ("waiting", frozenset({"visitor", "bot", "agent"})),
    ("waiting", "accept"): ("human", frozenset({"agent"})),
    ("human", "transfer"): ("human", frozenset({"agent"})),  # to a colleague
    ("human", "requeue"): ("waiting", frozenset({"agent", "server"})),  # server: the agent vanished
    ("waiting", "return"): ("bot", frozenset({"agent"})),
    ("human", "return"): ("bot", frozenset({"agent"})),
    ("bot", "close"): ("closed", frozenset({"visitor", "agent"})),
    ("waiting", "close"): ("closed", frozenset({"visitor", "agent"})),
    ("human", "close"): ("closed", frozenset({"visitor", "agent"})),
    ("closed", "reopen"): ("bot", frozenset({"visitor"})),  # by asking on
}


def next_state(state: State, action: Action, actor: Actor) -> State:
    """
    Return the state after `actor` does `action` in `state`.

    Raises:
        NotAllowed: the table has no such transition, or not for this actor.
    """
    new, allowed = TRANSITIONS.get((state, action), (state, frozenset[Actor]()))
    if actor not in allowed:
        raise NotAllowed(state, action)
    return new
