"""
Does every figure, code, date and address in a reply stand in what the store has written and is valid now?

Pure text work, Chinese and English alike: full width, 三折 = 70% off, "seven days" = 7天, 11月3日 = 3 November.
It knows nothing of truth beyond that: a right figure in a wrong sentence passes (docs/architecture.md says so).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

_EN_NUMBERS = {
    word: n
    for n, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
} | {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "ninety": 90, "hundred": 100}
_EN_UNIT = r"(?:business |working |calendar )?(?:days?|hours?|minutes?|weeks?|months?|years?|yuan|percent|dollars?|euros?|times|points?)"
_ZH_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_ZH_UNIT = r"(?:个?工作日|天|日内|小时|个小时|分钟|周|个?月|年|元|块|折|倍|积分|成)"
_MONTHS = {
    name: n
    for n, names in enumerate(
        [
            "jan january",
            "feb february",
            "mar march",
            "apr april",
            "may",
            "jun june",
            "jul july",
            "aug august",
            "sep sept september",
            "oct october",
            "nov november",
            "dec december",
        ],
        start=1,
    )
    for name in names.split()
}
_MONTH = r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"

_NUMBER = re.compile(r"(?<![\d.])\d+(?:[.,]\d+)*")
_CODE = re.compile(r"(?<![A-Za-z0-9])(?=[A-Z0-9-]*\d)(?=[A-Z0-9-]*[A-Z]{2})[A-Z0-9]{4,}(?![A-Za-z0-9])")
_NAMED_CODE = re.compile(
    r"(?:优惠码|折扣码|券码|口令|promo code|coupon code|discount code|code)[\s:：是为\"'“「『*`]*([A-Za-z][A-Za-z0-9]{3,})",
    re.IGNORECASE,
)
_URL = re.compile(r"(?:https?://|www\.)[^\s)）】>\"'，。；]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)
_CURRENCY = re.compile(r"[$€£]|\b(?:usd|eur|gbp|dollars?|euros?|pounds?)\b|美元|欧元|英镑", re.IGNORECASE)
_CURRENCY_OF = {
    "$": "usd", "usd": "usd", "dollar": "usd", "dollars": "usd", "美元": "usd",
    "€": "eur", "eur": "eur", "euro": "eur", "euros": "eur", "欧元": "eur",
    "£": "gbp", "gbp": "gbp", "pound": "gbp", "pounds": "gbp", "英镑": "gbp",
}  # fmt: skip
_LIST_MARK = re.compile(r"^\s*(?:\(?\d{1,2}[.)、](?!\d)|[①-⑳])", re.MULTILINE)
_CITE_MARK = re.compile(r"\[\d{1,2}\]")


@dataclass(frozen=True, slots=True)
class Facts:
    """What can be checked in a text, in one normal form for both languages."""

    numbers: frozenset[str] = frozenset()  # "399", "7.5"; no thousands separators, no trailing zeros
    percents: frozenset[str] = frozenset()  # per cent off or of: "25"; 75折 counts as "25"
    dates: frozenset[tuple[int, int]] = frozenset()  # (month, day)
    codes: frozenset[str] = frozenset()  # upper case
    addresses: frozenset[str] = frozenset()  # URLs and e-mail addresses, lower case
    currencies: frozenset[str] = frozenset()  # other than the yuan: "usd", "eur", "gbp"


@dataclass(frozen=True, slots=True)
class Grounds:
    """What a reply may say: the facts of the valid passages, the store's own contacts, and the question."""

    stated: Facts  # from the store
    asked: Facts = field(default_factory=Facts)  # from the visitor: may be repeated, but not as a price or code
    text: str = ""  # normalised, of all that the store stated


def normalise(text: str) -> str:
    """Return `text` in NFKC with typographic variants of digits, dashes and the yuan sign made one."""
    text = unicodedata.normalize("NFKC", text)
    return text.replace("¥", "¥").replace("￥", "¥").replace("–", "-").replace("—", "-").replace("~", "-")


def facts_of(text: str) -> Facts:
    """Return all checkable facts of `text`."""
    text = _CITE_MARK.sub(" ", _LIST_MARK.sub(" ", normalise(text)))
    addresses = {m.group().rstrip(".,").lower() for m in _URL.finditer(text)}
    text = _URL.sub(" ", text)

    codes = {m.group() for m in _CODE.finditer(text)}
    codes |= {m.group(1).upper() for m in _NAMED_CODE.finditer(text) if _looks_like_code(m.group(1))}
    for code in codes:
        text = re.sub(re.escape(code), " ", text, flags=re.IGNORECASE)

    percents: set[str] = set()
    for m in re.finditer(r"(\d+(?:\.\d+)?)\s*(?:%|percent\b|per cent\b|％)", text, re.IGNORECASE):
        percents.add(_plain(m.group(1)))
    for m in re.finditer(r"(?:打|享|低至|为)?\s*(\d{1,2}(?:\.\d)?|[一二三四五六七八九]{1,2})\s*折", text):
        percents.add(_fold(m.group(1)))
    if "半价" in text or re.search(r"half[- ]price|half off", text, re.IGNORECASE):
        percents.add("50")
    text = re.sub(
        r"(\d{1,2}(?:\.\d)?|[一二三四五六七八九]{1,2})\s*折|\d+(?:\.\d+)?\s*(?:%|percent\b|per cent\b)", " ", text
    )

    dates: set[tuple[int, int]] = set()

    def date(month: str | int, day: str) -> str:
        number = month if isinstance(month, int) else _MONTHS.get(month.lower()) or int(month)
        dates.add((number, int(day)))
        return " "

    # "16-30 November", "11月16日至30日": both days belong to the month.
    text = re.sub(
        rf"\b(\d{{1,2}})(?:st|nd|rd|th)?\s*(?:-|to|until|through)\s*(?=\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}\b)",
        lambda m: date(m[2], m[1]),
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(
        r"(\d{1,2})\s*月\s*(\d{1,2})\s*[日号]?\s*(?:-|至|到)\s*(\d{1,2})\s*[日号]",
        lambda m: date(int(m[1]), m[2]) + date(int(m[1]), m[3]),
        text,
    )
    text = re.sub(
        r"(?:(?:19|20)\d\d\s*年\s*)?(\d{1,2})\s*月\s*(\d{1,2})\s*[日号]?", lambda m: date(int(m[1]), m[2]), text
    )
    text = re.sub(r"\b(?:19|20)\d\d[-/.](\d{1,2})[-/.](\d{1,2})\b", lambda m: date(int(m[1]), m[2]), text)
    text = re.sub(
        rf"\b(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? {_MONTH}\b\.?(?:,? (?:19|20)\d\d)?",
        lambda m: date(m[2], m[1]),
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(
        rf"\b{_MONTH}\b\.? (\d{{1,2}})(?:st|nd|rd|th)?\b(?:,? (?:19|20)\d\d)?",
        lambda m: date(m[1], m[2]),
        text,
        flags=re.IGNORECASE,
    )

    numbers = {_plain(m.group()) for m in _NUMBER.finditer(text)}
    for m in re.finditer(rf"\b({'|'.join(_EN_NUMBERS)})\b[- ]{_EN_UNIT}", text, re.IGNORECASE):
        numbers.add(str(_EN_NUMBERS[m.group(1).lower()]))
    for m in re.finditer(rf"([零〇一二两三四五六七八九十百千]+)\s*{_ZH_UNIT}", text):
        if (value := _zh_number(m.group(1))) is not None:
            numbers.add(str(value))
    currencies = {_CURRENCY_OF[m.group().lower()] for m in _CURRENCY.finditer(text)}
    return Facts(
        frozenset(numbers),
        frozenset(percents),
        frozenset(dates),
        frozenset(c.upper() for c in codes),
        frozenset(addresses),
        frozenset(currencies),
    )


def grounds_of(stated: Iterable[str], question: str = "") -> Grounds:
    """Return what a reply may say, from texts of passages valid now (and contacts), and the visitor's question."""
    text = normalise("\n".join(stated))
    return Grounds(facts_of(text), facts_of(question), text.lower())


def ungrounded(reply: str, grounds: Grounds) -> list[str]:
    """
    Return what `reply` states and nothing valid supports, for people to read; empty where all stands.

    "1 次", "one of" and list marks are no facts; a number the visitor wrote may be repeated, a code or a
    percentage they wrote may not ("is it 90% off?" must not become "yes, 90% off").
    """
    said, stated, asked = facts_of(reply), grounds.stated, grounds.asked
    wrong = [f"number {n}" for n in sorted(said.numbers - _TRIVIAL) if not _number_stands(n, stated, asked)]
    wrong += [f"{p}%" for p in sorted(said.percents) if p not in stated.percents and p not in stated.numbers]
    wrong += [f"date {m}-{d}" for m, d in sorted(said.dates) if (m, d) not in stated.dates]
    wrong += [f"code {c}" for c in sorted(said.codes) if c not in stated.codes and c.lower() not in grounds.text]
    wrong += [f"address {a}" for a in sorted(said.addresses) if a not in grounds.text]
    wrong += [f"currency {c}" for c in sorted(said.currencies - stated.currencies)]
    return wrong


_TRIVIAL = frozenset({"0", "1"})


def _number_stands(number: str, stated: Facts, asked: Facts) -> bool:
    return number in stated.numbers or number in stated.percents or number in asked.numbers


def _looks_like_code(word: str) -> bool:
    return word.isupper() or any(c.isdigit() for c in word)


def _plain(number: str) -> str:
    """Return "1,299.00" as "1299" and "7.50" as "7.5"."""
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", number):
        number = number.replace(",", "")
    number = number.replace(",", ".") if number.count(",") == 1 and "." not in number else number
    if "." in number and number.count(".") == 1:
        number = number.rstrip("0").rstrip(".")
    return number.lstrip("0") or "0"


def _fold(text: str) -> str:
    """Return 折 as per cent off: 8 -> 20, 75 -> 25, 八八 -> 12."""
    if text[0] in _ZH_DIGITS:
        text = "".join(str(_ZH_DIGITS[c]) for c in text)
    value = float(text)
    return _plain(f"{100 - (value * 10 if value < 10 else value):.1f}")


def _zh_number(text: str) -> int | None:
    """Return 十五 as 15, 三百 as 300; None for what is no number."""
    if text == "一":
        return 1
    total = digit = 0
    for c in text:
        if c in _ZH_DIGITS:
            digit = _ZH_DIGITS[c]
        else:
            total += (digit or 1) * {"十": 10, "百": 100, "千": 1000}[c]
            digit = 0
    return total + digit


# The end of a text that more text could still turn into another fact: digits, Latin letters, signs of
# prices, Chinese numerals, and a unit that a number has just got.
_OPEN_END = re.compile(
    r"(?:[A-Za-z0-9¥￥$€£.,:/%@+_\-零〇一二两三四五六七八九十百千满减第]|(?<=[\d十百千])\s?[个工作折元天日月年号块]*)+$"
)


class StreamGate:
    """
    Lets through only what is checked: a wrong price is never on the visitor's screen, not for a moment.

    `feed` new text and send on what it returns. The end that could still grow into a fact is held back.
    Once something ungrounded shows up, `wrong` is not empty and `feed` returns nothing any more.
    """

    def __init__(self, grounds: Grounds) -> None:
        self._grounds = grounds
        self._text = ""
        self._sent = 0
        self.wrong: list[str] = []

    def feed(self, text: str, *, last: bool = False) -> str:
        """Return the text that may be sent now; with `last` all the rest of it."""
        self._text += text
        if self.wrong:
            return ""
        held = None if last else _OPEN_END.search(self._text, self._sent)
        end = held.start() if held else len(self._text)
        if end <= self._sent:
            return ""
        self.wrong = ungrounded(self._text[:end], self._grounds)
        if self.wrong:
            return ""
        safe = self._text[self._sent : end]
        self._sent = end
        return safe

    @property
    def sent(self) -> str:
        """All text let through so far."""
        return self._text[: self._sent]
