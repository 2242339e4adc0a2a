"""
Messages that must not reach the model as questions: attempts to take it over, and requests for others' data.

A first line only. What really holds is structure: no secret and no other visitor's data is ever in the prompt,
and what the model says is checked against the store's passages (bot/guard/facts.py).
"""

from __future__ import annotations

import re
from typing import Literal

from bot.guard.facts import normalise

Danger = Literal["injection", "others_data"]

# Chat-template control tokens are never part of a shopper's question.
_CONTROL = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<<SYS>>|</?s>|<start_of_turn>", re.IGNORECASE)

_RULES = (
    r"instructions?|prompts?|rules?|guidelines?|directives?|guardrails?|restrictions?|polic(?:y|ies) (?:above|you)|"
    r"programming|training|system message"
)
_INJECTION = [
    re.compile(p, re.IGNORECASE)
    for p in (
        rf"\b(?:ignore|disregard|forget|override|bypass|skip|drop)\b[^.?!\n]{{0,40}}\b(?:{_RULES})\b",
        r"\b(?:ignore|disregard|forget)\b[^.?!\n]{0,20}\b(?:everything|all)\b[^.?!\n]{0,20}\b(?:above|before|told|said)\b",
        rf"\b(?:reveal|show|print|repeat|output|leak|dump|tell me|give me|what (?:is|are|'s))\b[^.?!\n]{{0,30}}"
        rf"\b(?:(?:system|hidden|initial|developer|secret)\b[^.?!\n]{{0,15}}\b(?:{_RULES})|"
        r"your (?:own |exact |full |original )?(?:instructions|prompts?|system message|guardrails|programming))\b",
        r"\b(?:you are now|from now on,? you(?:'re| are| will)|act as|pretend (?:to be|you are)|roleplay as|"
        r"simulate being)\b[^.?!\n]{0,60}\b(?:dan|unrestricted|no (?:rules|limits|restrictions)|admin|root|"
        r"developer|hacker|another (?:ai|bot)|jailbroken|evil|manager|owner)\b",
        r"\b(?:developer|debug|god|admin|jailbreak|dan|sudo|maintenance)[- ]mode\b",
        r"\bjailbreak\b|\bdo anything now\b|\bprompt injection\b",
        r"^\s*(?:#+\s*)?(?:system|assistant|developer)\s*:",
        r"(?:忽略|无视|忘记|忘掉|不要理会|绕过|跳过|抛开)[^。？！\n]{0,15}(?:指令|提示词|规则|设定|要求|限制|说明|之前的(?:话|内容))",
        r"(?:输出|显示|告诉我|泄露|打印|复述|重复|说出|给我看)[^。？！\n]{0,12}(?:系统提示|提示词|系统指令|隐藏指令|初始指令|内部指令|system prompt)",
        r"(?:你现在是|从现在开始你(?:是|就是)|假装你?是|扮演)[^。？！\n]{0,25}(?:没有(?:任何)?限制|管理员|黑客|不受限|开发者|老板|店长)",
        r"(?:开发者|调试|管理员|越狱|上帝)模式",
    )
]

_PEOPLE = r"(?:people(?:'s)?|customers?'?s?|users?'?s?|persons?'?s?|buyers?'?s?|shoppers?'?s?|visitors?'?s?|one|else)(?:'s|')?"
# "Another address" is one's own.
_OTHER = (
    rf"(?:(?:someone|somebody|my (?:neighbou?r|friend|ex|colleague|boss|girlfriend|boyfriend|wife|husband|roommate))"
    rf"(?:'s|s')?(?: ?{_PEOPLE})?|(?:every|all)(?: ?{_PEOPLE})?|(?:another|other) ?{_PEOPLE})"
)
_PRIVATE = (
    r"(?:orders?\b(?! of)|address(?:es)?|phone(?: numbers?)?|e-?mails?|personal (?:data|info\w*|details)|"
    r"credit cards?|card numbers?|passwords?|purchase history|accounts?|data)"
)
_OTHERS_DATA = [
    re.compile(p, re.IGNORECASE)
    for p in (
        rf"\b(?:give|show|tell|send|list|find|look up|read|get|need|want|what(?:'s| is| did)|which|see|check|share)\b"
        rf"[^.?!\n]{{0,30}}\b{_OTHER}\b[^.?!\n]{{0,25}}\b{_PRIVATE}",
        r"\b(?:list|dump|export|show)\b[^.?!\n]{0,20}\b(?:all|every)\b[^.?!\n]{0,20}\b(?:customers?|users?|orders|emails)\b",
        r"\b(?:address|phone(?: number)?|email|orders?)\b (?:of|for|belonging to) (?:another|other|someone|a different|"
        r"the (?:other|previous|last)|my (?:neighbou?r|friend|ex|colleague))\b",
        r"(?:别人|他人|其他(?:客户|顾客|用户|买家|人)|别的(?:客户|顾客|用户|买家|人)|上一个(?:客户|顾客|用户|买家|人)|"
        r"我?(?:邻居|朋友|同事|前任|前女友|前男友|老板|室友|闺蜜|老公|老婆))的?[^。？！\n]{0,10}"
        r"(?:订单|地址|电话|手机(?:号|多少|是多少|发|告诉|给我)|邮箱|个人信息|隐私|信息|购买记录|买了(?:什么|啥)|银行卡|密码|账号|住址)",
        r"(?:这个人|那个人|某人|他|她)的?[^。？！\n]{0,8}(?:收货)?(?:地址|电话|手机(?:号|多少|是多少|发|告诉|给我)|住址|订单|买了(?:什么|啥))",
        r"(?:\b(?:give|show|tell|send|find|look up|share|read|check|know|see|what(?:'s| is| are| was))\b[^.?!\n]{0,40}|"
        r"\b(?:need|want|have|get)\b[^.?!\n]{0,6}|^\W*)"
        r"\b(?:his|her|their|this person's|that person's)\b[^.?!\n]{0,20}\b(?:address|phone|e-?mail|orders?|card)\b",
        r"(?:导出|列出|给我|发我|查)[^。？！\n]{0,6}(?:所有|全部)[^。？！\n]{0,4}(?:客户|用户|顾客|买家)",
    )
]
# "Can you send it to my friend's address?", "用我老婆的账号下单", "积分能转给我老公的账号吗": their data goes in, nothing
# comes out. Nor does it where one's own is not to be seen: "别人能看到我家地址吗".
_PRESENT = re.compile(
    r"\b(?:send|ship|deliver|gift|mail|post)\w*\b[^.?!\n]{0,40}\bto\b|\b(?:use|with)\b[^.?!\n]{0,10}\bmy (?:wife|husband)|"
    r"(?:寄|送|配送)(?:到|去|给|往)|代(?:买|付|收)|下单|收(?:件|货)人|"
    r"(?:转|充)(?:给|到|错|让给?)了?(?:我?的?(?:邻居|朋友|同事|老婆|老公|室友|闺蜜|家人|爸|妈)|别人|他人|[她他])|"
    r"(?:别人|他人|[她他])(?:能|会|可以)?(?:看到|看见|知道|发现)我",
    re.IGNORECASE,
)


def danger_of(text: str) -> Danger | None:
    """Return what is dangerous about a visitor's message, or None for an ordinary one."""
    text = normalise(text)
    if _CONTROL.search(text) or any(p.search(text) for p in _INJECTION):
        return "injection"
    if any(p.search(text) for p in _OTHERS_DATA) and not _PRESENT.search(text):
        return "others_data"
    return None


def strip_control_tokens(text: str) -> str:
    """Return `text` without chat-template control tokens, for passages and history that go into a prompt."""
    return _CONTROL.sub(" ", text)
