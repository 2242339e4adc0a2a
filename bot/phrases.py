"""Every sentence the bot says by itself, in both languages, in one table. No logic."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
    refused_injection: str
    refused_others_data: str
    handoff_asked: str
    handoff_anger: str
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
        refused_injection="抱歉，这个请求我不能照办。我可以回答关于本店商品、订单、配送和售后的问题。",
        refused_others_data="抱歉，为了保护隐私，我不能提供其他人的订单或个人信息。如果是您本人的订单，请登录账号查看，或转人工客服核实。",
        handoff_asked="好的，正在为您转接人工客服，请稍候。客服时间：{hours}。{contact}",
        handoff_anger="非常抱歉给您带来了不好的体验，我马上为您转接人工客服来处理。客服时间：{hours}。{contact}",
        courtesies={"thanks": "不客气，还有问题随时问我。", "goodbye": "感谢光临，祝您生活愉快，再见！"},
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
        refused_injection="Sorry, I can't do that. I can help with this store's products, orders, delivery and returns.",
        refused_others_data="Sorry, to protect privacy I can't share other people's orders or personal data. "
        "If it is your own order, please sign in to see it, or ask for a human agent.",
        handoff_asked="Of course, I am connecting you with a human agent. Agents are here: {hours}. {contact}",
        handoff_anger="I am very sorry about this experience. I am handing you over to a human agent now. "
        "Agents are here: {hours}. {contact}",
        courtesies={
            "thanks": "You're welcome! Just ask if there is anything else.",
            "goodbye": "Thank you for visiting, goodbye!",
        },
        quick_after_no_answer=("Talk to a human",),
    ),
}

# A generated reply that says it has no answer; it is then marked as that, and not as an answer.
NO_ANSWER_SAID = re.compile(
    r"(?:don't|do not|cannot|can't|could not|couldn't|unable to) (?:know|find|have (?:any |that |this |the )?(?:information|answer)|"
    r"provide|determine|answer)|no (?:information|mention|details?) (?:about|on|of|regarding|in|is)|not (?:mentioned|specified|provided|stated|"
    r"in the (?:passages|information))|(?:passages?|information) (?:do(?:es)? not|don't|doesn't)|"
    r"不知道|不清楚|无法(?:回答|提供|确定|得知|确认)|没有(?:提到|提及|说明|找到|相关|提供)|未(?:提及|提到|说明|提供|找到)|不确定",
    re.IGNORECASE,
)
