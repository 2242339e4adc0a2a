"""
When a human must take over. Decided by code from what the visitor wrote and what became of it, never from a model's words.

Four reasons: the visitor asks, is beside themselves, writes of something the store's policy keeps for humans
(`[handoff.rules]` in store.toml), or got no answer several times in a row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bot.guard.facts import normalise
from bot.settings import HandoffPolicy

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
# Whom the anger is about has to show where the word alone does not say so: a gift for a lawyer, a lock against
# thieves, a card game named Liar's Dice and a price that is ridiculously low are no complaints.
_STORE = r"\b(?:you|you're|your (?:shop|store|company|site|website|service|staff|support)|this (?:shop|store|company|site|website|service|place)|bunch of|absolute|total|bloody)\b"
_ANGER = [
    re.compile(p, re.IGNORECASE)
    for p in (
        r"\b(?:(?:will|going to|gonna|can|could|'ll) sue\b|su(?:e|ing) (?:you|your|this|the (?:shop|store|company|seller))\b)|\blawsuit\b|\b(?:take|see) you (?:to|in) court\b",
        r"\bmy (?:lawyer|attorney|solicitor)s? (?:will|is|are|says|has)\b|\b(?:call|calling|contact(?:ing)?|get(?:ting)?|hear(?:ing)? from|talk(?:ing)? to) (?:a|my|our) (?:lawyer|attorney|solicitor)s?\b",
        r"\bconsumer (?:court|protection)\b|\breport(?:ing)? (?:you|this (?:shop|store|company|seller))\b|\b(?:file|filing|make|making|lodge) an? (?:formal |official )?complaint\b|\bformal complaint\b",
        rf"{_STORE}[^.?!\n]{{0,25}}\b(?:scam(?:mers?)?|fraud(?:s|sters?)?(?! (?:protection|prevention|alerts?|checks?))|rip-?off|thie(?:f|ves)|liars?|crooks?|idiots?)\b",
        r"\b(?:it'?s|this is|what) an? (?:(?:complete|total|absolute|fucking) )*(?:scam|fraud|rip-?off)\b|^\W*(?:scammers?|fraudsters?|thieves|liars|crooks|rip-?off)\W*$",
        r"\b(?:i'?m|i am|we'?re|we are|makes? me|getting|made me)\b(?! not\b)(?:(?!\bnot\b)[^.?!,\n]){0,20}\b(?:angry|furious|livid|outraged|enraged|pissed(?: off)?|fed up|sick and tired)\b",
        r"\bfurious\b|\bfed up\b|\b(?:this|that|it|which) ?(?:is|'s|was)(?: just| absolutely| completely| totally| so| simply)* (?:outrageous|disgusting|unacceptable|disgraceful|ridiculous)\b|\b(?:absolutely|completely|totally) (?:outrageous|disgusting|unacceptable|ridiculous)\b",
        r"\bridiculous(?:ly)? (?:service|support|treatment|policy|slow)\b|\b(?:unacceptable|disgusting|outrageous|disgraceful) (?:service|support|treatment|behaviou?r)\b|^\W*(?:unacceptable|outrageous|disgusting|ridiculous)\W*$",
        r"\bworst (?:shop|store|service|company|support|customer service|experience)\b",
        r"\bfuck(?:ing|ed|ers?)?\b(?! (?:love|great|awesome|amazing|good|nice|brilliant))|\bbullshit\b|\bpiece of (?:shit|crap)\b|\bscrew you\b|\b(?:bunch of|you|fucking) (?:idiots?|morons?)\b",
        r"投诉|举报|12315|消协|起诉|律师函|(?:上|去|到|见)法院(?:告|起诉|见)|法院(?:告|起诉|传票|见)|法庭|曝光你们|工商局",
        r"骗子|骗人(?!吗|吧)|诈骗(?!电话|短信|信息|邮件)|黑店|垃圾(?:店|客服|公司|商家|服务)|(?:太|真|真是|就是)垃圾(?!袋|桶|箱|车|分类)|什么破(?:店|客服|服务|东西)",
        r"气死|(?<![空蒸油])气炸|太过分|忍无可忍|受够了(?:你们|这|！|!|$)|(?:^|[，。！!？?\s给你都])滚(?:[！!。，\s蛋开远]|$)",
        r"[他你]妈(?:的|个|逼)(?!生日|尺码|鞋|衣|手机|电话|地址|身高|体重)|(?:^|[，。！!？?\s])妈的(?!生日|尺码|鞋|衣|手机|电话|地址)|去你妈|傻[逼叉xX]|废物(?!利用)|坑人(?!吗|吧)|无良",
        r"(?<!不)(?<!别)(?<!不是)(?<!没有)(?<!没)(?:我|很|非常|太|真的|特别|十分|相当|超级|好)(?:生气|愤怒|火大|恼火|气愤)(?!吗|的话)",
    )
]
# Anger at oneself, or the denial of it, is nothing a human of the store has to mend.
_CALM = re.compile(
    r"\b(?:at|with) (?:myself|my (?:own )?(?:husband|wife|son|daughter|kids?|cat|dog|brother|sister|neighbou?rs?|boss))\b|"
    r"\b(?:my own (?:fault|mistake|stupidity)|not (?:at all )?(?:angry|furious|mad|upset)|no need to be|don'?t (?:get|be) (?:angry|mad))\b|"
    r"(?:生|跟|对|和)(?:我)?自己(?:的气|生气|发火)?|气死自己|怪(?:我)?自己|自己(?:太|真)?(?:粗心|笨|傻)|(?:不|没|没有|不是很|别)生气",
    re.IGNORECASE,
)


def handoff_trigger(text: str, policy: HandoffPolicy | None = None) -> str | None:
    """Return why a human should take over after this message: "asked", "rule:NAME", "anger"; or None."""
    text = normalise(text)
    if any(p.search(text) for p in _ASKED) and not (
        _ABOUT.search(text) and not re.search(r"转人工|now|马上|立刻", text)
    ):
        return "asked"
    for rule in policy.rules if policy is not None else ():
        if any(_has_word(text, word) for word in rule.words):
            return f"rule:{rule.name}"
    if any(p.search(text) for p in _ANGER) and not _CALM.search(text):
        return "anger"
    return None


def given_up(outcomes: Sequence[str], policy: HandoffPolicy) -> bool:
    """
    Return whether the last replies had no answer as often in a row as the store's policy bears.

    Args:
        outcomes: of the bot's replies since it has the conversation, one a turn, newest last.
    """
    n = policy.after_no_answers
    return n > 0 and len(outcomes) >= n and all(outcome == "no_answer" for outcome in outcomes[-n:])


def _has_word(text: str, word: str) -> bool:
    """Return whether `word` stands in `text` (normalised): as whole words in Latin script, anywhere in Chinese."""
    pattern = re.escape(normalise(word)).replace(r"\ ", r"\s+")
    begin = r"(?<![A-Za-z0-9])" if word[:1].isascii() else ""
    end = r"(?:s|es)?(?![A-Za-z0-9])" if word[-1:].isascii() else ""
    return re.search(begin + pattern + end, text, re.IGNORECASE) is not None
