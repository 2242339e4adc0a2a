"""
"What is on today?", "is the tea week still running?": answered from the promotions' own rows and dates.

Which promotions hold now is the retriever's word (`is_valid`), never a model's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, tzinfo

from bot.followup import content_words
from bot.guard.facts import normalise
from bot.messages import Language
from retrieval.passages import Passage, last_valid_end, next_valid

_ABOUT = re.compile(
    r"优惠活动|促销活动|优惠|活动|促销|打折|折扣|特价|特惠|满减|大促|红包|优惠码|折扣码|券码|优惠券|"
    r"便宜|少点|减多少|自动减|满.{1,6}减|半价|[\d一二三四五六七八九.]+折|赠品|送(?:点)?(?:东西|礼)|(?:哪个|什么|啥|输|这个)码|券|薅羊毛|¥ ?\d+ off|"
    r"\b(?:money off|(?:anything|something|coming|comes|taken|takes money|\d+ ?%) off|pay less|cheaper|reduced|freebies?|"
    r"free gift|thrown in|half[- ]price|student (?:price|rate)|"
    r"promo(?:tion)?s?(?: codes?)?|deals?|sales?|discounts?(?: codes?)?|discounted|offers?|specials?|"
    r"coupon codes?|voucher codes?|bargains?|codes?)(?![\w])",
    re.IGNORECASE,
)
_NOW = re.compile(
    r"今天|今日|今儿个?|这会儿|现在|目前|当前|最近|这两天|这几天|正在|本周|这周|这个?月|眼下|近期|"
    r"\b(?:today|now|right now|currently|current|at the moment|at present|this (?:week|month)|these days|tonight|running|going on|"
    r"ongoing|active|valid|on)\b",
    re.IGNORECASE,
)
_WHICH = re.compile(
    r"什么|哪些|哪个|啥|有没有|有吗|有无|都有|吗|么|介绍|说说|看看|\b(?:what(?:'s)?|which|any|list|show|tell me|are there|is there|got|have|do you)\b",
    re.IGNORECASE,
)
# What may stand beside these words without making the question a narrower one.
_FILLER = re.compile(
    r"你们|你家|店里|搞|办|做|还有|店铺|店内|商城|全店|全场|商品|东西|可以用|能用|可用|使用|参加|参与|力度|比较|便宜|划算|省钱|"
    r"\b(?:shop|store|site|website|you|guys|going|running|available|usable|use|anything|something|special|good|best|save|money|"
    r"working|work|works|going|offer|get)\b",
    re.IGNORECASE,
)


# Other shops' prices are nothing this store can speak of.
_ELSEWHERE = re.compile(
    r"\b(?:other|another|different) (?:online )?(?:shops?|stores?|sites?|sellers?)|\belsewhere\b|\bcompetitors?\b|\bamazon\b|别家|其他店|别的店|同行|京东|淘宝|拼多多",
    re.IGNORECASE,
)


def about_other_shops(question: str) -> bool:
    """Return whether `question` is about what some other shop sells or charges."""
    return bool(_ELSEWHERE.search(normalise(question)))


def about_promotions(question: str) -> bool:
    """Return whether `question` speaks of this store's promotions at all."""
    text = normalise(question)
    return bool(_ABOUT.search(text)) and not about_other_shops(question)


def asks_for_all(question: str) -> bool:
    """Return whether `question` asks which promotions are on, and not about one of them or about the rules."""
    text = normalise(question)
    if not _ABOUT.search(text) or not (_NOW.search(text) or _WHICH.search(text)):
        return False
    for pattern in (_ABOUT, _NOW, _WHICH, _FILLER):
        text = pattern.sub(" ", text)
    words = content_words(text)
    n_latin = sum(1 for w in words if w[0].isascii())
    return n_latin + (len(words) - n_latin) / 2 <= 0.5


def for_category(promotions: Sequence[Passage], category: str) -> list[Passage]:
    """Return the promotions that cover products of `category`: those for it, and those for all."""
    kept = []
    for promotion in promotions:
        products = promotion.meta.get("products") or ["all"]
        listed = products if isinstance(products, list | tuple) else re.split(r"[,;，；|]", str(products))
        covered = {str(part).strip().casefold() for part in listed}
        if covered & {category.casefold(), "all", "全场", "全部"}:
            kept.append(promotion)
    return kept


def list_text(promotions: Sequence[Passage], language: Language) -> str:
    """Return the promotions as a reply; each with its own text, which carries code, conditions and dates."""
    if not promotions:
        return {"zh": "目前没有进行中的优惠活动。", "en": "There is no promotion running at the moment."}[language]
    head = {
        "zh": f"目前进行中的优惠活动有 {len(promotions)} 个：",
        "en": f"Promotions running now ({len(promotions)}):",
    }[language]
    return "\n".join([head, *(f"- **{p.title}**{'：' if language == 'zh' else ': '}{body_of(p)}" for p in promotions)])


def body_of(promotion: Passage) -> str:
    """Return a promotion's text without its title, on one line."""
    text = " ".join(promotion.text.split())
    return text.removeprefix(promotion.title).lstrip(" :：。.—-") or text


def not_now_text(promotion: Passage, now: datetime, zone: tzinfo, language: Language) -> str:
    """
    Return that `promotion`, which is not valid at `now`, ended, begins later or is on again later; no code, no terms.

    Raises:
        ValueError: it has no end and no later start: it is valid.
    """
    title = promotion.title
    following = next_valid(promotion, now)
    if following is not None:
        day = moment_text(following.astimezone(zone), language)
        repeats = promotion.repeats.describe(language) if promotion.repeats else ""
        if promotion.valid_from is not None and now < promotion.valid_from:
            times = {"zh": f"（{repeats}）", "en": f" ({repeats})"}[language] if repeats else ""
            return {
                "zh": f"“{title}”还没有开始，将于{day}开始{times}。",
                "en": f"“{title}” has not started yet; it begins on {day}{times}.",
            }[language]
        if repeats:
            return {
                "zh": f"“{title}”现在不在活动时间内：活动时间是{repeats}，下一次从{day}开始。",
                "en": f"“{title}” is not on right now: it runs {repeats}, next from {day}.",
            }[language]
    end = last_valid_end(promotion, now) or promotion.valid_until
    if end is None:
        raise ValueError(f"{promotion.id} has no end and no later start: it is valid")
    # The end is exclusive: an offer until midnight of the 1st was last usable on the day before.
    day = date_text((end - timedelta(seconds=1)).astimezone(zone), language)
    return {"zh": f"“{title}”已于{day}结束。", "en": f"“{title}” ended on {day}."}[language]


def moment_text(moment: datetime, language: Language) -> str:
    """Return a time as people write it; the hour only where it is not midnight."""
    day = date_text(moment, language)
    if (moment.hour, moment.minute) == (0, 0):
        return day
    return f"{day}{moment:%H:%M}" if language == "zh" else f"{day}, {moment:%H:%M}"


def date_text(day: datetime, language: Language) -> str:
    """Return a date as people write it: 11月3日, 3 November 2026."""
    if language == "zh":
        return f"{day.year}年{day.month}月{day.day}日"
    months = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ]
    return f"{day.day} {months[day.month - 1]} {day.year}"
