"""
Dialogues + the store's passages -> the conversations a model is trained on, rendered by `bot.prompt.render_prompt`.

With a store every reply is one conversation, as serving would have asked for it: the turns before it, the passages the
retriever finds for its question (mistakes included), the question. Without one a dialogue is one conversation, all its
replies learned. Knows no retriever: `Search` is handed in by the command line, which alone imports it.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from bot.language import reply_language
from bot.messages import Language, Message
from bot.prompt import PromptStore, render_prompt
from finetune.dialogues import Dialogue, turns_of
from finetune.pii import PLACEHOLDER
from retrieval.passages import Passage


class Search(Protocol):
    """Finds what serving would put into the prompt: best first, at most k, valid at the time."""

    def __call__(
        self, question: str, history: Sequence[tuple[str, str]], language: Language, at: datetime | None, k: int
    ) -> Sequence[Passage]: ...


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and which of them are learned."""

    messages: tuple[Message, ...]
    learn: tuple[bool, ...]
    kind: str  # "reply", "refusal", "dialogue": for the counts of a run


NO_STORE = PromptStore({"zh": "本店", "en": "our store"}, {"zh": "", "en": ""})

# What a reply says where the passages do not answer. Several wordings, so that the act is learned and not the sentence.
REFUSALS: dict[Language, tuple[str, ...]] = {
    "zh": (
        "抱歉，这个我不知道，店铺资料里没有写。需要我帮您转人工客服吗？",
        "不好意思，资料里没有提到这一点，我不能乱说。可以帮您转人工客服确认。",
        "这个问题我暂时不清楚，资料里没有。要不要请人工客服帮您看看？",
    ),
    "en": (
        "Sorry, I don't know: our store's information doesn't say. Shall I get a human agent?",
        "I'm afraid the store's information doesn't say, so I'd rather not guess. A human agent can tell you.",
        "I don't know that one, sorry. Would you like me to pass you to a human agent?",
    ),
}

_FIGURE = re.compile(r"\d+(?:[.,]\d+)*")


def figures_of(text: str) -> set[str]:
    """Return the numbers in `text`, one width, without thousands marks; small ones (0 to 2) say little and are left out."""  # noqa: E501
    plain = unicodedata.normalize("NFKC", PLACEHOLDER.sub(" ", text))
    found = {m.group().replace(",", "").rstrip(".") for m in _FIGURE.finditer(plain)}
    return {f for f in found if f not in ("0", "1", "2")}


def conversations(
    dialogues: Iterable[Dialogue],
    store: PromptStore,
    search: Search | None,
    *,
    n_passages: int,
    unanswerable: float,
    ungrounded: str,
    seed: int,
    count_tokens: Callable[[Sequence[Message]], int],
    max_prompt_tokens: int,
    counts: Counter[str],
) -> Iterator[Conversation]:
    """Yield what is trained on; what is left out is counted in `counts`, by reason."""
    for dialogue in dialogues:
        if search is None:
            yield from _whole(dialogue, store, counts)
        else:
            rng = random.Random(f"{seed}:{dialogue.id}")
            yield from _replies(
                dialogue,
                store,
                search,
                n_passages,
                unanswerable,
                ungrounded,
                rng,
                count_tokens,
                max_prompt_tokens,
                counts,
            )


def _whole(dialogue: Dialogue, store: PromptStore, counts: Counter[str]) -> Iterator[Conversation]:
    # What the renderer shows as history is the dialogue as serving shows it; the empty question behind it is cut off.
    messages = render_prompt(store, turns_of(dialogue.lines), "", (), "zh")[:-1]
    learn = [False, *(line.role == "assistant" and _may_learn(dialogue, n) for n, line in enumerate(dialogue.lines))]
    if any(learn):
        counts["dialogue"] += 1
        yield Conversation(tuple(messages), tuple(learn), "dialogue")


def _may_learn(dialogue: Dialogue, n: int) -> bool:
    """Whether line n is marked for learning and names nobody new: a model must not make up placeholders."""
    line = dialogue.lines[n]
    said_before = "\n".join(x.text for x in dialogue.lines[:n])
    return line.learn and all(m.group() in said_before for m in PLACEHOLDER.finditer(line.text))


def _replies(
    dialogue: Dialogue, store: PromptStore, search: Search, n_passages: int, unanswerable: float, ungrounded: str,
    rng: random.Random, count_tokens: Callable[[Sequence[Message]], int], max_prompt_tokens: int, counts: Counter[str],
) -> Iterator[Conversation]:  # fmt: skip
    turns = turns_of(dialogue.lines)
    default: Language = "en" if dialogue.lang == "en" else "zh"
    for n, turn in enumerate(turns):
        if not _may_learn(dialogue, 2 * n + 1):
            counts["left out: not to be learned"] += 1
            continue
        history = turns[:n]
        language = reply_language(turn.question, history, None, default)
        said = [(t.question, t.reply) for t in history]
        # Twice as many as shown: what is taken away from an unanswerable question is made up for by the next best.
        found = list(search(turn.question, said, language, dialogue.at, 2 * n_passages))
        passages, reply, kind = found[:n_passages], turn.reply, "reply"
        figures = figures_of(reply)
        holds = [bool(figures & figures_of(f"{p.title}\n{p.text}")) for p in found]
        known = figures_of("\n".join([turn.question, *(f"{q}\n{a}" for q, a in said)]))
        if figures and any(holds[:n_passages]) and rng.random() < unanswerable and not figures <= known:
            # The passages that hold the answer are gone: what is left does not answer, and the reply has to say so.
            passages = [p for p, held in zip(found, holds, strict=True) if not held][:n_passages]
            reply, kind = rng.choice(REFUSALS[language]), "refusal"
        else:
            stated = set().union(*(figures_of(f"{p.title}\n{p.text}") for p in passages), known)
            if ungrounded == "drop" and not figures <= stated:
                counts["left out: figures that no passage holds"] += 1
                continue
        try:
            prompt = render_prompt(
                store, history, turn.question, passages, language,
                count_tokens=count_tokens, max_prompt_tokens=max_prompt_tokens,
            )  # fmt: skip
        except ValueError:
            counts["left out: too long"] += 1
            continue
        counts[kind] += 1
        messages = (*prompt, Message("assistant", reply))
        yield Conversation(messages, (*[False] * len(prompt), True), kind)
