"""When a human must take over: the visitor asks for one, or is beside themselves. Decided by code, never by a model."""

from __future__ import annotations

import re
from typing import Literal

from bot.guard.facts import normalise

Trigger = Literal["asked", "anger"]

_HUMAN = r"(?:human|real person|live (?:agent|person|chat|support)|agent|representative|rep|operator|supervisor|manager|(?:some|any)one real|staff member|customer service person|colleague)"
_ASKED = [
    re.compile(p, re.IGNORECASE)
    for p in (
        rf"\b(?:talk|speak|chat|connect|transfer|switch|hand|pass|put|get|give|forward|need|want|prefer|like|let)\b"
        rf"[^.?!\n]{{0,35}}\b(?:to|with|through|me|over|for|a|an|your|the)\b[^.?!\n]{{0,15}}\b{_HUMAN}\b",
        rf"^\s*(?:a )?(?:real )?{_HUMAN}(?:,? please)?[.!]*\s*$",
        r"\b(?:not|stop) (?:talking to )?(?:a |this )?(?:bot|robot|machine)\b|\bno (?:more )?(?:bots?|robots?)\b",
        r"转人工|转接人工|人工客服|人工服务|找人工|要人工|换人工|^\s*人工\s*[!！。]*$|真人|活人",
        r"(?:找|叫|让|要|换|转|接)(?:你们|一下|个|一个|位|一位)?[^。？！\n]{0,6}(?:经理|主管|负责人|领导|店长|客服人员|客服专员)",
        r"(?:不想|别|不要|不愿)(?:再)?(?:跟|和|与)?(?:机器人|机器|ai)",
    )
]
# A question about the service ("when are agents online?") is answered like any other.
_ABOUT = re.compile(
    r"\b(?:hours?|when|what time|until|which days|working days|open(?:ing)?|weekends?)\b|几点|上班|下班|时间|在线吗|什么时候|多久|周末|怎么联系|如何联系",
    re.IGNORECASE,
)
_ANGER = [
    re.compile(p, re.IGNORECASE)
    for p in (
        r"\b(?:sue|lawsuit|lawyer|consumer (?:court|protection)|report you|file a complaint|formal complaint)\b",
        r"\b(?:scam(?:mers?)?|fraud(?:sters?)?|rip-?off|thieves|liars?|crooks)\b",
        r"\b(?:furious|outrageous|disgusting|unacceptable|ridiculous|fed up|worst (?:shop|store|service)|"
        r"fucking?|bullshit|piece of shit|idiots?)\b",
        r"投诉|举报|12315|消协|起诉|律师函|法院|曝光你们|工商局",
        r"骗子|骗人|诈骗|黑店|垃圾(?:店|客服|公司|商家|服务)|太垃圾|什么破(?:店|客服|服务|东西)",
        r"气死|太过分|忍无可忍|受够了|滚|妈的|他妈|傻[逼叉x]|废物|坑人|无良",
    )
]


def handoff_trigger(text: str) -> Trigger | None:
    """Return why a human should take over after this message, or None."""
    text = normalise(text)
    if any(p.search(text) for p in _ASKED) and not (
        _ABOUT.search(text) and not re.search(r"转人工|now|马上|立刻", text)
    ):
        return "asked"
    if any(p.search(text) for p in _ANGER):
        return "anger"
    return None
