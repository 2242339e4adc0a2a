"""
What is no conversation is taken out of dialogues: system notices, markup, look-ups nobody can repeat. Pure.

Knows the notices that shop chats leave in exports, in Chinese and English. Does not know which replies are macros:
that shows only across dialogues (finetune/importing.py counts them).
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from dataclasses import replace

from bot.guard.injection import strip_control_tokens
from finetune.dialogues import Dialogue, Line

MAX_MESSAGE_CHARS = 4_000  # a pasted page is no message

# Whole messages that the system wrote, or that hold nothing to read.
_NOTICE = re.compile(
    r"\s*(?:"
    r"(?:顾客|用户|客户|访客)?(?:通过)?点击.{0,20}(?:发送|进入|按钮).*|.{0,12}(?:已接入|为您服务，工号|正在为您(?:转接|接入)|加入(?:了)?会话|结束了?会话|会话已?(?:结束|超时|关闭|转接)).{0,16}|"
    r"(?:对方)?正在输入\W*|您有新的订单.*|系统(?:消息|提示|通知)[:：].*|以上是历史(?:消息|记录).*|该消息(?:已撤回|类型暂不支持).*|.{0,16}撤回了一条消息|"
    r"\[?订单编号[:：].{0,20}订单金额.*|(?:\[(?:图片|表情|语音|视频|文件|链接|商品|卡片|动画表情|位置)\]|【(?:图片|表情|语音|视频|文件|链接|商品)】|\s)+|https?://\S+|"
    r"(?:chat|conversation|session) (?:started|ended|closed|transferred|timed out).*|.{0,40}(?:joined|left|has entered) the (?:chat|conversation).*|"
    r".{0,30} is typing\W*|(?:system|auto(?:matic)?)[ -]?(?:message|notice|reply)?:.*|this (?:chat|conversation) (?:was|has been) .*|"
    r"you are (?:now )?(?:connected|chatting) (?:to|with) .*|(?:\[(?:image|photo|sticker|file|audio|video|attachment|gif)\]|<(?:image|attachment|media omitted)>|\s)+|"
    r"message deleted|missed call.*"
    r")\s*",
    re.IGNORECASE | re.DOTALL,
)
# Bits within a message: JDDC's and Taobao's emoticon codes, markup.
_EMOTICON = re.compile(
    r"#E-[a-z]?\d{1,3}|/:[a-zA-Z0-9^@()>_\-]{1,6}|\[(?:大哭|微笑|笑哭|玫瑰|强|抱拳|爱心|呲牙|捂脸|流泪|偷笑|害羞)\]"
)
_TAG = re.compile(r"</?(?:p|br|div|span|a|b|i|u|strong|em|font|img|li|ul|ol|table|tr|td|h\d)\b[^<>]*>", re.IGNORECASE)

# Claims to have looked something up. A model has nothing to look it up in, so it must not learn to say so.
_LOOKUP = re.compile(
    r"(?:已?(?:帮|给|为)[您你亲]?(?:查|看)(?:了|到|过|询|一下)|(?:我|这边|后台|系统)?(?:查询?到|看到|查看到|显示)(?:了)?[您你](?:的|这)?|(?:后台|系统|物流)(?:显示|查到)|"
    r"\bi(?:'ve| have)? (?:just )?(?:checked|looked up|looked into|pulled up)\b|\bi (?:can )?see (?:that )?your (?:order|parcel|account|payment|refund)|"
    r"\b(?:our|the) (?:records?|system) (?:shows?|says?)|\baccording to (?:our|the) (?:system|records?|tracking)|\blet me (?:check|look)\b)",
    re.IGNORECASE,
)

_LANG_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_LANG_LATIN = re.compile(r"[A-Za-z]{2,}")


def clean(dialogue: Dialogue, dropped: Counter[str], *, lookups: str = "keep") -> Dialogue:
    """
    Return `dialogue` with what nobody said taken out; it may have no lines left. Counted in `dropped`, by reason.

    `lookups` says what becomes of replies that claim to have looked something up: "keep", or "context" (not learned).
    """
    lines: list[Line] = []
    for line in dialogue.lines:
        text = tidy(line.text)
        if not text or _NOTICE.fullmatch(text):
            dropped["message: system notice or nothing to read"] += 1
            continue
        if len(text) > MAX_MESSAGE_CHARS:
            dropped[f"message: over {MAX_MESSAGE_CHARS} characters"] += 1
            continue
        learn = line.learn
        if line.role == "assistant" and lookups == "context" and _LOOKUP.search(text):
            learn = False
            dropped["reply not learned: claims a look-up"] += 1
        lines.append(replace(line, text=text, learn=learn))
    return replace(dialogue, lines=tuple(lines))


def tidy(text: str) -> str:
    """Return `text` without markup, control characters, chat-template tokens and idle white space."""
    if "<" in text or "&" in text:
        text = html.unescape(_TAG.sub(" ", text))
    text = strip_control_tokens(_EMOTICON.sub("", text))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn"))
    lines = (" ".join(part.split()) for part in text.replace("\r", "\n").split("\n"))
    return "\n".join(part for part in lines if part)


def language_of(dialogue: Dialogue) -> str:
    """Return "zh" or "en", by what the customer wrote; by everything where that says nothing; else ""."""
    for text in ("\n".join(x.text for x in dialogue.lines if x.role == "user"), dialogue.text):
        plain = re.sub(r"\[[A-Z]+_\d+\]", " ", text)
        n_cjk, n_words = len(_LANG_CJK.findall(plain)), len(_LANG_LATIN.findall(plain))
        if n_cjk or n_words:
            return "zh" if n_cjk >= n_words else "en"
    return ""
