"""Greetings, thanks and goodbyes: answered from the store's own words, in milliseconds."""

from __future__ import annotations

import re
from typing import Literal

from bot.guard.facts import normalise

Courtesy = Literal["greeting", "thanks", "goodbye", "listening"]

_TAIL = r"[\s!！.。,，~？?^_^😀-🙏👋❤️]*"
_COURTESIES: list[tuple[Courtesy, re.Pattern[str]]] = [
    (
        "greeting",
        re.compile(
            r"^\s*(?:(?:hi+|hello+|hey+|hiya|howdy|yo|good (?:morning|afternoon|evening|day)|greetings)(?: there| all| team)?|"
            r"(?:你|您)们?好(?:呀|啊|哈)?|哈[喽啰罗]|嗨+|hi亲|亲|在吗|在么|在不在|有人吗|有人在吗|早(?:上好)?|下午好|晚上好|中午好|客服在吗)"
            r"(?:[\s,，!！]+(?:在吗|在么|有人吗|there|anyone there|are you there|亲))?" + _TAIL + "$",
            re.IGNORECASE,
        ),
    ),
    (
        "thanks",
        re.compile(
            r"^\s*(?:(?:ok(?:ay)?|great|perfect|good|cool|got it|alright|好的?|好滴|行|嗯+|明白了?|知道了|懂了|了解)[\s,，!！.。~]*)?"
            r"(?:(?:many )?thanks?(?: you)?(?: (?:so|very) much| a lot| for (?:your|the) help)?|thx|ty|cheers|much appreciated|"
            r"(?:太|非常|十分|真是)?(?:谢谢|感谢|多谢|谢了|谢啦|3q)(?:你|您|啦|了|哈|哦|亲)?(?:的?(?:帮助|解答|回复))?)"
            + _TAIL
            + "$",
            re.IGNORECASE,
        ),
    ),
    (
        "thanks",
        re.compile(
            r"^\s*(?:ok(?:ay)?|great|perfect|cool|got it|alright|understood|好的?|好滴|行|嗯+|明白了?|知道了|懂了|了解了?|收到)"
            + _TAIL
            + "$",
            re.IGNORECASE,
        ),
    ),
    (
        "goodbye",
        re.compile(
            r"^\s*(?:(?:good)?bye+(?: bye)?|see (?:you|ya)(?: later)?|have a (?:nice|good|great) (?:day|one|evening|weekend)|"
            r"再见|拜拜|88+|回见|下次见|没(?:有)?(?:别的|其他|其它)?(?:事|问题)了|(?:nothing|no,? that'?s) (?:else|all)|that'?s all)"
            + _TAIL
            + "$",
            re.IGNORECASE,
        ),
    ),
]


def courtesy_of(text: str) -> Courtesy | None:
    """Return what a message that is nothing but a courtesy is, or None where it asks something."""
    text = normalise(text)
    if len(text) > 60:
        return None
    return next((name for name, pattern in _COURTESIES if pattern.match(text)), None)


_THANKS = re.compile(r"\bthank|\bthx\b|\bty\b|\bcheers\b|谢|感谢", re.IGNORECASE)
_GOODBYE = re.compile(r"\bbye\b|\bsee (?:you|ya)\b|再见|拜拜|回见", re.IGNORECASE)


def reply_to_talk(text: str, *, first: bool) -> Courtesy:
    """Return how to answer a message that asks nothing ("hi, I'm Emily, I have a question"); `first` of a visit or not."""
    if first:
        return "greeting"
    if _GOODBYE.search(text):
        return "goodbye"
    return "thanks" if _THANKS.search(text) else "listening"
