"""
Before a passage goes out word for word: would the model answer from it, or say that it does not know?

The search takes a near miss ("can I rent one?") for an answer oftener than a model that was taught to refuse does. So
where the search is not sure the model is shown the one passage and asked for a single token: the chance that its reply
would begin as a refusal does is weighed against the search's confidence. Measured on stores that neither has seen
(docs/experiments.md). Knows the engine and the figures; what is said instead is the turn's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import aclosing

from bot.engine import BoundEngine, Sampling
from bot.errors import BotError
from bot.messages import Message

LIMIT_S = 2.0  # a visitor who waits that long for a token is better served with the passage
N_LIKELY = 20  # more than vLLM and OpenAI's API tell of a token, unless they are set up so
# Of the model's log-odds that it answers, so much is added to the search's, and the sum has to reach LEAST: fitted on
# 302 questions to five stores that neither was trained on.
SHARE = 0.5
LEAST = 0.3
SMALLEST = 1e-3  # a chance below it, or as near to 1, is none that was measured
# How replies begin that say no: as a model was taught here (examples/recipe, and `finetune.grounding` but for a wording
# that begins as answers do), and as others say it. An answer quotes a passage, and those begin otherwise.
_NO = (
    *("抱歉", "很抱歉", "非常抱歉", "对不起", "不好意思"),
    *("I don't know", "I'm sorry", "I am sorry", "I'm afraid", "Sorry", "Unfortunately"),
)


async def chance_of_no(engine: BoundEngine, messages: Sequence[Message]) -> float | None:
    """Return the chance, 0 to 1, that the reply begins as a refusal does; None where it cannot be told, or not soon."""
    sampling = Sampling(max_tokens=1, n_likely=N_LIKELY)
    try:
        async with asyncio.timeout(LIMIT_S), aclosing(engine.stream(messages, sampling)) as chunks:
            async for chunk in chunks:
                if chunk.likely:
                    return min(1.0, sum(math.exp(logprob) for text, logprob in chunk.likely if _begins_no(text)))
    except (BotError, TimeoutError):  # busy, restarting, gone: the search decides alone, as it does without a model
        return None
    return None


def stands(confidence: float, chance: float) -> bool:
    """Whether a passage found with `confidence` goes out, where the model says no with `chance`."""
    return _log_odds(confidence) - SHARE * _log_odds(chance) >= LEAST


def _begins_no(token: str) -> bool:
    said = token.strip()
    # "So", "Un" and "非" begin too much else.
    is_told = said == "I" or len(said) > (2 if said.isascii() else 1)
    return is_told and any(no.startswith(said) or said.startswith(no) for no in _NO)


def _log_odds(chance: float) -> float:
    bounded = min(max(chance, SMALLEST), 1 - SMALLEST)
    return math.log(bounded / (1 - bounded))
