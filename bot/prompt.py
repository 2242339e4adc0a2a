"""
`render_prompt`: the one function that turns a conversation into messages, for serving and for training. Pure.

Laid out for the prefix cache: first the system message, byte-identical for every visitor of a store on a day;
then the history, append-only, without the passages of past turns; last this turn's passages, the best one next to
the question, and the question. No clock time, visitor name or request id anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bot.guard.injection import strip_control_tokens
from bot.messages import Language, Message, Turn
from retrieval.passages import Passage

# Changes whenever the layout or a wording here does: replies and training runs are stamped with it.
PROMPT_VERSION = "p3"

_SYSTEM = """You are the customer-service assistant of {name_en} ({name_zh}).{persona}
Answer only from the numbered passages in the last message. Copy prices, dates, codes and conditions exactly as they \
stand there. If the passages do not answer the question, say that you do not know. Be short: one to three sentences. \
Answer in the language of the question.
你是{name_zh}的客服助手。只根据最后一条消息里的资料回答，价格、日期、优惠码和条件照抄原文；资料里没有的就说不知道。回答一到三句话，用提问的语言。{promotions}"""

# The question comes last and bare: behind "Visitor's question: …" the untuned 0.5B repeats that line as its answer
# in every second reply (docs/experiments.md).
_ASK: dict[Language, str] = {
    "zh": "资料：\n{passages}\n\n请根据以上资料，用中文简短回答：{question}",
    "en": "Passages:\n{passages}\n\nFrom the passages above, answer briefly in English: {question}",
}


@dataclass(frozen=True, slots=True)
class PromptStore:
    """What of the store every prompt begins with."""

    names: dict[Language, str]
    persona: dict[Language, str]
    promotions: tuple[str, ...] = ()  # titles of the promotions valid now, sorted


def render_prompt(
    store: PromptStore,
    history: Sequence[Turn],
    question: str,
    passages: Sequence[Passage],
    language: Language,
    *,
    count_tokens: Callable[[Sequence[Message]], int] | None = None,
    max_prompt_tokens: int | None = None,
) -> list[Message]:
    """
    Return the messages that ask the model to answer `question` from `passages`.

    With `count_tokens` and `max_prompt_tokens` the oldest turns are dropped, whole, until the rest fits; then
    passages from the end of `passages` (given best first), but never the first one.

    Raises:
        ValueError: even the question with one passage is too long; the sizes are in the text.
    """
    kept_turns, kept_passages = list(history), list(passages)
    while True:
        messages = _messages(store, kept_turns, question, kept_passages, language)
        if count_tokens is None or max_prompt_tokens is None:
            return messages
        n_tokens = count_tokens(messages)
        if n_tokens <= max_prompt_tokens:
            return messages
        if kept_turns:
            del kept_turns[0]
        elif len(kept_passages) > 1:
            del kept_passages[-1]
        else:
            raise ValueError(f"the prompt has {n_tokens} tokens without any history; {max_prompt_tokens} fit")


def _messages(
    store: PromptStore, history: Sequence[Turn], question: str, passages: Sequence[Passage], language: Language
) -> list[Message]:
    persona = f" {store.persona['en']} {store.persona['zh']}".rstrip()
    promotions = ("\nOn now 当前活动: " + "; ".join(store.promotions)) if store.promotions else ""
    system = _SYSTEM.format(
        name_en=store.names["en"], name_zh=store.names["zh"], persona=persona, promotions=promotions
    )
    messages = [Message("system", system)]
    for turn in history:
        messages += [Message("user", strip_control_tokens(turn.question)), Message("assistant", turn.reply)]
    # Their order is all that the model learns of what the retriever thinks of them: two in three answers stand in the
    # best one. It comes last, because a small model reads best what is nearest to the question.
    listed = "\n".join(f"[{n}] {strip_control_tokens(passage_line(p))}" for n, p in enumerate(reversed(passages), 1))
    ask = _ASK[language].format(passages=listed or "-", question=strip_control_tokens(question))
    messages.append(Message("user", ask))
    return messages


def passage_line(passage: Passage) -> str:
    """Return a passage as the model reads it: its title, then its text, on one line."""
    title, text = " ".join(passage.title.split()), " ".join(passage.text.split())
    return text if not title or text.startswith(title) else f"{title}: {text}"
