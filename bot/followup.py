"""
From what a visitor wrote to what can be searched: split several questions, complete elliptical ones. Pure.

"And to Germany?" means nothing to a retriever. Completing it by code costs nothing; a model that rewrites
queries costs a second, and a small one invents (docs/experiments.md). "Does it need a licence" looks whole and is not:
of every message the chance that it goes on from the one before is said as well, and the search weighs both readings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bot.guard.facts import normalise
from bot.messages import Turn

MAX_QUESTIONS = 3  # more are answered as one message

_END = re.compile(r"(?<=[?？])(?![?？])\s*|(?<=[。！!；;])\s*|(?<=[.])\s+(?=[A-Z0-9])|\n+")
_ASKS = re.compile(
    r"[?？]|(?:吗|呢|么|嘛)[\s。！!~]*$|多少|怎么|如何|什么|哪|几|能不能|可不可以|可以|是否|有没有|能否|是不是|要不要|想(?:问|知道)|请问|啥|咋|"
    r"\b(?:how|what|when|where|which|who|why|can|could|do|does|did|is|are|will|would|should|may|any)\b",
    re.IGNORECASE,
)
_COURTEOUS_START = re.compile(
    r"^\s*(?:(?:hi|hello|hey|good (?:morning|afternoon|evening)|thanks?(?: you)?|thx|ok(?:ay)?|great|please|sorry|excuse me|"
    r"你好|您好|亲|在吗|请问|麻烦问一下|问一下|想问一?下|想咨询一?下|咨询一?下|谢谢|好的|嗯|哦|那个)[\s,，.。!！~、:：]*)+",
    re.IGNORECASE,
)
# Whose contact details a clause gives says nothing of what is asked, and much that no passage says.
_CONTACT = re.compile(
    r"\[(?:NAME|PHONE|EMAIL|ADDRESS)_\d+\]|(?<!\d)(?:\+?86[-\s]?)?1[3-9]\d{9}(?!\d)|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
)
_CLAUSE_END = re.compile(r"(?<=[，。！；])|(?<=[,.!;])\s+")
_JOINED_EN = re.compile(
    r",?\s+(?:and|also|plus)\s+(?=(?:how|what|when|where|which|who|why|can|could|do|does|is|are|will)\b)", re.IGNORECASE
)
_JOINED_ZH = re.compile(r"[，,；;]?\s*(?:还有|另外|顺便(?:问一?下)?|以及|再问一?下)[，,]?\s*")

_ELLIPTIC_START = re.compile(
    r"^\s*(?:and|but|or|also|what about|how about|what if|then|so|ok(?:ay)?,? (?:and|but|what about)|same for|even|only|"
    r"那么?|还有|如果(?:是)?|要是|假如|换成|同样|包括|比如|但是?|可是|不过|或者)(?=[\s,，\u4e00-\u9fff])",
    re.IGNORECASE,
)
_ELLIPTIC_END = re.compile(r"呢[\s?？。!！~]*$|\b(?:too|as well|then|instead)[\s?.!]*$", re.IGNORECASE)
_PRONOUN = re.compile(
    r"\b(?:it|its|this|that|these|those|they|them|one|ones|there|he|she|the same)\b|它们?|这个|那个|这款|那款|这种|那种|这些|那些|这样|那样|这|那|该",
    re.IGNORECASE,
)
_PHRASE = re.compile(r"(to|for|in|from|with|at|on)\s+\w", re.IGNORECASE)
_STOP = frozenset(
    [
        "a",
        "an",
        "the",
        "and",
        "or",
        "but",
        "to",
        "of",
        "for",
        "in",
        "on",
        "at",
        "by",
        "with",
        "from",
        "is",
        "are",
        "was",
        "be",
        "do",
        "does",
        "did",
        "can",
        "could",
        "will",
        "would",
        "should",
        "may",
        "i",
        "you",
        "we",
        "my",
        "your",
        "our",
        "me",
        "us",
        "it",
        "its",
        "this",
        "that",
        "these",
        "those",
        "what",
        "how",
        "when",
        "where",
        "which",
        "who",
        "why",
        "about",
        "if",
        "so",
        "then",
        "also",
        "please",
        "there",
        "any",
        "some",
        "have",
        "has",
        "get",
        "much",
        "many",
        "long",
        "one",
        "ones",
        "too",
        "as",
        "well",
        "ok",
        "okay",
        "yes",
        "no",
        "not",
        "same",
        "的",
        "了",
        "吗",
        "呢",
        "么",
        "嘛",
        "那",
        "这",
        "我",
        "你",
        "您",
        "们",
        "是",
        "有",
        "在",
        "会",
        "能",
        "可",
        "以",
        "要",
        "吧",
        "啊",
        "呀",
        "也",
        "都",
        "还",
        "就",
        "和",
        "跟",
        "与",
        "或",
        "请",
        "问",
        "个",
        "款",
        "些",
        "种",
        "样",
        "如",
        "果",
        "怎",
        "多",
        "少",
        "什",
        "几",
        "哪",
        "啥",
        "咋",
        "不",
        "没",
        "用",
        "得",
        "到",
        "去",
        "给",
        "对",
        "把",
    ]
)
_NAMED = re.compile(r"[A-Za-z]{2}\d{3,}")  # a product or order number: such a question names its own subject
_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9'’-]*|[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Query:
    """One thing asked, ready to be searched."""

    text: str  # as the visitor wrote it, courtesies taken off
    standalone: str  # with what it refers to; equals `text` for a question that stands alone
    new_words: tuple[str, ...] = ()  # content words of an elliptical question: a right passage speaks of them
    follows: float = 0.0  # the chance that it goes on from the question before; 0 without one
    joined: str = ""  # the question before and this one; searched beside `text` where it may go on
    topic: str = ""  # title of the passage that answered the turn before

    @property
    def elliptical(self) -> bool:
        return self.standalone != self.text


def content_words(text: str) -> tuple[str, ...]:
    """Return the words (Latin) and characters (Chinese) that carry meaning, lower case, in order."""
    return tuple(t for t in _TOKEN.findall(normalise(text).lower()) if t not in _STOP)


def words_and_particles(text: str) -> list[str]:
    """Return all Latin words and Chinese characters, those without a meaning of their own included."""
    return _TOKEN.findall(normalise(text))


def split_questions(text: str) -> list[str]:
    """
    Return the separate questions of a message, at most `MAX_QUESTIONS`, in order.

    Statements stay with the question they lead to ("I bought a lamp. It flickers. What now?" is one).
    """
    parts: list[str] = []
    lead = ""
    for sentence in _END.split(text.strip()):
        pieces = [p for joined in _JOINED_EN.split(sentence) for p in _JOINED_ZH.split(joined) if p.strip()]
        if len(pieces) > 1 and not all(_ASKS.search(p) and len(content_words(p)) >= 2 for p in pieces):
            pieces = [sentence]
        for piece in pieces:
            bare = _COURTEOUS_START.sub("", piece).strip()
            if not bare:
                continue
            if _ASKS.search(bare):
                parts.append(f"{lead} {bare}".strip())
                lead = ""
            else:
                lead = f"{lead} {bare}".strip()
    if lead:
        if parts:
            parts[-1] = f"{parts[-1]} {lead}"
        else:
            parts = [lead]
    if not parts:
        return [text.strip()]
    return parts if len(parts) <= MAX_QUESTIONS else [text.strip()]


def split_at_comma(text: str) -> list[str]:
    """Return the two halves of a message with one comma where each asks something by itself, else nothing."""
    halves = [h.strip() for h in re.split(r"[，,]", _COURTEOUS_START.sub("", text).strip()) if h.strip()]
    if len(halves) == 2 and all(_ASKS.search(h) and len(content_words(h)) >= 2 for h in halves):
        return [re.sub(r"^(?:and|also)\s+", "", h, flags=re.IGNORECASE) for h in halves]
    return []


def complete(
    question: str, history: Sequence[Turn], earlier: Sequence[str] = (), gist: Callable[[str], str] = str
) -> Query:
    """
    Return `question` with what it refers to.

    Args:
        question: one question, see `split_questions`.
        history: the turns before this message, oldest first.
        earlier: the questions before this one in the same message.
        gist: a message -> the question in it, without the talk around it; asked of messages of `history` alone.
    """
    bare = _without_contact(_COURTEOUS_START.sub("", question).strip() or question.strip())
    previous = earlier[-1] if earlier else _last_question(history, gist)
    if previous is None:
        return Query(bare, bare)
    follows = chance_of_following(bare)
    if not is_elliptical(bare):
        if earlier:  # who asks two things at once means two things
            return Query(bare, bare)
        return Query(bare, bare, follows=follows, joined=f"{previous.rstrip('?？ ')} {bare}")
    rest = _ELLIPTIC_END.sub("", _ELLIPTIC_START.sub("", bare)).strip(" ,，?？")
    words = tuple(w for w in content_words(rest) if w not in content_words(previous))
    previous = previous.rstrip("?？ ")
    if phrase := _PHRASE.match(rest):
        # "postage to South Korea", "and to Germany?": the new place takes the old one's.
        swapped, n = re.subn(rf"\b{phrase[1]}\s+(?:[A-Z][\w'-]*(?:\s+[A-Z][\w'-]*)*|\w+)", rest, previous, count=1)
        if n:
            return Query(bare, swapped, words, follows, swapped)
    whole = f"{previous} {rest or bare}"
    return Query(bare, whole, words, follows, whole)


def _without_contact(question: str) -> str:
    """Return `question` without the clauses that only say how somebody is reached; as it is where nothing is left."""
    clauses = _CLAUSE_END.split(question)
    kept = [clause for clause in clauses if not _CONTACT.search(clause) or re.search("[?？]", clause)]
    left = re.sub(r"(?<=[，。！；])\s+", "", " ".join(kept)).strip() if len(kept) < len(clauses) else ""
    return left if _ASKS.search(left) else question


def is_elliptical(question: str) -> bool:
    """Return whether `question` needs the one before it to be understood."""
    words = content_words(question)
    weight = _weight(words)
    if _NAMED.search(question):
        return False
    if _ELLIPTIC_START.search(question):
        return weight <= 6
    if _ELLIPTIC_END.search(question) and weight <= 4:
        return True
    if _PRONOUN.search(question) and weight <= 4:
        return True
    everything = words_and_particles(question)
    return weight <= 1 and sum(1 if w[0].isascii() else 0.5 for w in everything) <= 2.5


def chance_of_following(question: str) -> float:
    """
    Return the chance, in [0, 1], that `question` goes on from the one before it: it is short, points back, or begins so.

    Fitted on follow-ups and new questions to fictional stores, half of each (examples/training, docs/experiments.md).
    """
    if _NAMED.search(question):
        return 0.0
    logit = (
        3.4
        - 1.1 * min(_weight(content_words(question)), 8.0)
        + 1.7 * bool(_PRONOUN.search(question))
        + 1.1 * bool(_ELLIPTIC_START.search(question))
        + 1.9 * bool(_ELLIPTIC_END.search(question))
    )
    return 1 / (1 + math.exp(-logit))


def _weight(words: Sequence[str]) -> float:
    """Return how many words these are: a Chinese one is about two characters."""
    n_latin = sum(1 for w in words if w[0].isascii())
    return n_latin + (len(words) - n_latin) / 2


def _last_question(history: Sequence[Turn], gist: Callable[[str], str]) -> str | None:
    """Return the last question that stands alone, with the follow-ups after it left out but the nearest one."""
    trail: list[str] = []
    for turn in reversed(history[-4:]):
        question = _COURTEOUS_START.sub("", gist(turn.question)).strip()
        if not question:
            continue
        trail.append(question)
        if not is_elliptical(question):
            break
    if not trail:
        return None
    # Oldest first: the subject, then at most the latest turn of it.
    return trail[-1] if len(trail) == 1 else f"{trail[-1].rstrip('?？ ')} {trail[0]}"
