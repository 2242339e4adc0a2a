"""Every sentence the bot says by itself, in both languages, in one table. No logic."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bot.messages import Language


@dataclass(frozen=True, slots=True)
class Phrases:
    """One language's sentences; `{contact}`, `{hours}` and `{question}` are filled in by bot/answer.py."""

    no_answer: str
    no_answer_to: str
    closest: str
    nearest: str
    other_language: str
    search_failed: str
    only_files: str
    refused_injection: str
    refused_others_data: str
    handoff_asked: str
    handoff_anger: str
    handoff_rule: str
    courtesies: dict[str, str]
    quick_after_no_answer: tuple[str, ...]


PHRASES: dict[Language, Phrases] = {
    "zh": Phrases(
        no_answer="抱歉，这个问题我在店铺资料里没有找到答案，不敢随便回答您。需要我为您转人工客服吗？（{hours} {contact}）",
        no_answer_to="关于“{question}”，我在店铺资料里没有找到答案，可以为您转人工客服。",
        closest="没有找到完全对应的说明，最接近的内容是：",
        nearest="店铺资料里最接近的内容是这些，供您参考：",
        other_language="（以下为原文）",
        search_failed="抱歉，资料检索暂时不可用，我现在无法准确回答。您可以稍后再试，或联系人工客服：{contact}",
        only_files="文件已收到，但我看不了图片和文件的内容。您可以用文字描述一下问题，或者我为您转人工客服查看。",
        refused_injection="抱歉，这个请求我不能照办。我可以回答关于本店商品、订单、配送和售后的问题。",
        refused_others_data="抱歉，为了保护隐私，我不能提供其他人的订单或个人信息。如果是您本人的订单，请登录账号查看，或转人工客服核实。",
        handoff_asked="好的，正在为您转接人工客服，请稍候。客服时间：{hours}。{contact}",
        handoff_anger="非常抱歉给您带来了不好的体验，我马上为您转接人工客服来处理。客服时间：{hours}。{contact}",
        handoff_rule="这个问题需要由人工客服为您处理，我现在为您转接，请稍候。客服时间：{hours}。{contact}",
        courtesies={
            "thanks": "不客气，还有问题随时问我。",
            "goodbye": "感谢光临，祝您生活愉快，再见！",
            "listening": "我在的。请问想了解什么？商品、优惠、配送、售后都可以问我。",
        },
        quick_after_no_answer=("转人工客服",),
    ),
    "en": Phrases(
        no_answer="Sorry, I could not find an answer to that in the store's information, and I don't want to guess. "
        "Shall I connect you with a human? ({hours} {contact})",
        no_answer_to="I could not find anything about “{question}” in the store's information; a human can help with that.",
        closest="I found no exact match; this is the closest information:",
        nearest="The nearest I have, in case it helps:",
        other_language="(in the original language)",
        search_failed="Sorry, I cannot search the store's information right now. Please try again shortly, or contact us: {contact}",
        only_files="I have received your file, but I cannot see what is in pictures and files. Please describe it in words, "
        "or let me connect you with a human who can look at it.",
        refused_injection="Sorry, I can't do that. I can help with this store's products, orders, delivery and returns.",
        refused_others_data="Sorry, to protect privacy I can't share other people's orders or personal data. "
        "If it is your own order, please sign in to see it, or ask for a human agent.",
        handoff_asked="Of course, I am connecting you with a human agent. Agents are here: {hours}. {contact}",
        handoff_anger="I am very sorry about this experience. I am handing you over to a human agent now. "
        "Agents are here: {hours}. {contact}",
        handoff_rule="This is something a colleague has to look after; I am handing you over to a human agent now. "
        "Agents are here: {hours}. {contact}",
        courtesies={
            "thanks": "You're welcome! Just ask if there is anything else.",
            "goodbye": "Thank you for visiting, goodbye!",
            "listening": "I'm here. What would you like to know about our products, offers, delivery or returns?",
        },
        quick_after_no_answer=("Talk to a human",),
    ),
}

# What the server says by itself about agents, as messages of role "system". Clients may show their own words by code.
_SERVER: dict[str, dict[Language, str]] = {
    "handoff": {
        "zh": "已为您呼叫人工客服，请稍候。{wait}等待期间您可以继续提问。",
        "en": "We have asked a human colleague to join; please stay here. {wait}You can go on asking meanwhile.",
    },
    "handoff_closed": {
        "zh": "现在是非服务时间，人工客服{opens}上线。您可以留下邮箱和问题，我们上班后尽快回复；也可以继续向我提问。",
        "en": "Our agents are not on duty now; they are back {opens}. You can leave your e-mail and question and we will answer as "
        "soon as we are in, or go on asking me.",
    },
    "joined": {"zh": "客服 {name} 已接入，为您服务。", "en": "{name} has joined the conversation."},
    "transferred": {"zh": "已为您转接给客服 {name}。", "en": "You are now talking to {name}."},
    "requeued": {
        "zh": "正在为您转接其他客服，请稍候。",
        "en": "We are passing you on to another colleague; please stay here.",
    },
    "agent_gone": {
        "zh": "客服 {name} 的连接断开了，正在为您安排其他客服，请稍候。",
        "en": "{name} lost the connection. We are looking for another colleague; please stay here.",
    },
    "returned": {
        "zh": "人工服务已结束，接下来由智能助手为您服务。",
        "en": "The assistant is back with you; just ask if there is anything else.",
    },
    "closed": {
        "zh": "客服 {name} 已结束本次对话。如有其他问题，直接提问即可。",
        "en": "{name} has closed this conversation. If there is anything else, just ask.",
    },
    "message_left": {
        "zh": "已收到您的留言，我们会回复到 {email}。",
        "en": "Thank you, we have your message and will answer to {email}.",
    },
}


def said_by_server(code: str, language: Language, **facts: Any) -> dict[str, Any]:
    """
    Return the `data` of a system message event.

    Args:
        facts: `name`, `email`; of the queue `position`, `expected_wait_s` (None is unknown), `opens_text` by language.
    """
    position, wait_s = facts.get("position"), facts.get("expected_wait_s")
    wait = ""
    if wait_s is not None and position is not None:
        minutes = max(1, round(wait_s / 60))
        if language == "zh":
            wait = (
                f"您前面还有 {position - 1} 位，预计等待约 {minutes} 分钟。"
                if position > 1
                else f"预计等待约 {minutes} 分钟。"
            )
        else:
            unit = "minute" if minutes == 1 else "minutes"
            ahead = f"There are {position - 1} before you; " if position > 1 else ""
            wait = f"{ahead}{'t' if ahead else 'T'}he wait is about {minutes} {unit}. "
    opens = (facts.get("opens_text") or {}).get(language) or {"zh": "稍后", "en": "later"}[language]
    named = {"name": facts.get("name", ""), "email": facts.get("email", "")}
    text = _SERVER[code][language].format(wait=wait, opens=opens, **named)
    return {"role": "system", "code": code, "text": text}


# A generated reply that says it has no answer; it is then marked as that, and not as an answer.
NO_ANSWER_SAID = re.compile(
    r"(?:don't|do not|cannot|can't|could not|couldn't|unable to) (?:know|find|have (?:any |that |this |the )?(?:information|answer)|"
    r"provide|determine|answer)|no (?:information|mention|details?) (?:about|on|of|regarding|in|is)|not (?:mentioned|specified|provided|stated|"
    r"in the (?:passages|information))|(?:passages?|information) (?:do(?:es)? not|don't|doesn't)|"
    r"不知道|不清楚|无法(?:回答|提供|确定|得知|确认)|没有(?:提到|提及|说明|找到|相关|提供)|未(?:提及|提到|说明|提供|找到)|不确定",
    re.IGNORECASE,
)
