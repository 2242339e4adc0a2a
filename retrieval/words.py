"""
Text as search sees it: folded characters, words, and which language it is. No I/O but one table at import.

Knows Chinese and English spelling and how both write numbers; knows nothing of passages, scores or vectors. The
traditional -> simplified table (`traditional.txt`: one line of characters, one line of what each becomes) is OpenCC's
TSCharacters (Apache-2.0), cut to one-to-one pairs of the basic plane: `zhconv` is GPL and `OpenCC` a C++ wheel, and the
few phrases that differ are in `synonyms.txt` (terms.py).
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

_TRADITIONAL, _SIMPLIFIED = (Path(__file__).parent / "traditional.txt").read_text("utf-8").splitlines()
_TO_SIMPLIFIED = str.maketrans(_TRADITIONAL, _SIMPLIFIED)
_TO_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUN = re.compile(rf"[{_CJK}]+|[^\W{_CJK}_]+(?:[-_'.’/][^\W{_CJK}_]+)*")
_CJK_CHARACTER = re.compile(rf"[{_CJK}]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")
# A coupon code or an article or order number: digits and letters together, or four digits and more.
_CODE = re.compile(r"(?=[a-z]*\d)[a-z0-9][a-z0-9_-]{3,}|\d{4,}")
_CODE_PIECES = re.compile(r"[a-z0-9]+(?:[ _./-]{1,2}[a-z0-9]+)*", re.IGNORECASE)
_CODE_WORD = re.compile(r"码|券|编号|货号|单号|口令|\b(?:codes?|coupons?|vouchers?|sku|item no)\b")
_AMOUNT = re.compile(
    r"\s*(?:%|percent|per cent|off\b|折|元|块|yuan|(?:days?|cm|kg|g|ml|pieces?|items?)\b)", re.IGNORECASE
)
MAX_PIECES = 4  # "S A V E 20" is not looked for: every piece more is another set of joins

# Words that say how a question is asked, not what about. They count a fifth (see `weight`), not zero: "how" still tells
# "how do I return" from "why was my return refused" when nothing else does.
_FILLER_EN = """
a about all also am an and any are as at be been being but by can could d did do does doing for from get give go had has
have having hello here hey hi how i if in is it its just know let like ll m may me might mine my need no of on or our
please re s shall she he should so some tell than thank that the their them then there these they this those to too us
ve very want was we were what when where which while who why will with would you your yours
"""
_FILLER_ZH = """
的 了 吗 嘛 呢 啊 吧 呀 么 哦 噢 哈 哪 我 你 您 他 她 它 们 请 问 怎 样 什 这 那 是 就 都 也 还 在 有 和 与 或 及 给 把
被 让 要 想 能 可 以 会 个 一 下 请问 怎么 怎样 什么 如何 为什 为何 我想 想问 问下 问一 一下 可以 以吗 能不 不能 是不
不是 有没 没有 你们 我们 您好 你好 这个 那个 这是 么样 么办 怎办 我的 你的 了吗 的吗 是吗 能吗 会吗 吗我
"""
_FILLER = frozenset(_FILLER_EN.split()) | frozenset(_FILLER_ZH.split())


def fold(text: str) -> str:
    """Return `text` as search compares it: half width, lower case, simplified characters, single spaces."""
    folded = unicodedata.normalize("NFKC", text).lower().translate(_TO_SIMPLIFIED).replace("’", "'")
    return " ".join(folded.split())


def squash(text: str) -> str:
    """Return `text` folded, without spaces and punctuation: wordings of one squash are the same question."""
    return "".join(character for character in fold(text) if character.isalnum())


def quietly(text: str) -> str:
    """Return `text`, of the same length, in lower case where all its words are in capitals and there are several."""
    runs = re.findall("[A-Za-z]{2,}", text)
    return text.translate(_TO_LOWER) if len(runs) > 2 and all(map(str.isupper, runs)) else text


def words(text: str) -> list[str]:
    """
    Return the index terms of `text`, in order, repeated as often as they occur.

    Chinese runs give every character and every pair of neighbours; Latin words are stemmed lightly; anything with a
    digit in it is kept whole (SKU, coupon code, order number), and its parts are added when it is joined by - or /.
    Chinese numerals of two characters and more are read in digits (三百 = 300). Last come numbers in one form for both
    languages, see `quantities`.
    """
    found: list[str] = []
    folded = _NUMERAL.sub(_in_digits, fold(text))
    for match in _RUN.finditer(folded):
        run = match.group()
        if _CJK_CHARACTER.match(run):
            found.extend(run)
            found.extend(run[i : i + 2] for i in range(len(run) - 1))
            continue
        parts = re.split(r"[-_'./]", run)
        if len(parts) > 1 and any(character.isdigit() for character in run):
            found.append(run)
            found.append("".join(parts))
        found.extend(stem(part) for part in parts if part)
    return found + quantities(folded)


def codes(text: str) -> set[str]:
    """Return the tokens of `text` that look like an article number, an order number or a coupon code, folded."""
    return set(_CODE.findall(fold(text)))


def bare_code(code: str) -> str:
    """Return a code as it is compared: folded, without spaces and dashes."""
    return re.sub(r"[^a-z0-9]", "", fold(code))


def named_codes(text: str) -> set[str]:
    """
    Return all that `text` may name by code, bare: "zg 1002", "ZG-1002" and "ｚｇ１００２" all give "zg1002".

    More than there is: neighbouring pieces are joined to be looked up among the codes that exist. Letters alone count
    only in capitals or beside a word such as "code": "save" is a verb before it is a coupon.
    """
    shown = unicodedata.normalize("NFKC", text)
    about_codes = bool(_CODE_WORD.search(fold(text)))
    found: set[str] = set()
    for match in _CODE_PIECES.finditer(shown):
        at = list(re.finditer(r"[A-Za-z0-9]+", match.group()))[:200]
        pieces, ends = [piece.group() for piece in at], [piece.end() for piece in at]
        for first in range(len(pieces)):
            for last in range(first, min(first + MAX_PIECES, len(pieces))):
                joined = "".join(pieces[first : last + 1])
                if len(joined) < 4 or (last > first and _AMOUNT.match(shown, match.start() + ends[last])):
                    continue
                if any(character.isdigit() for character in joined) or joined.isupper() or about_codes:
                    found.add(joined.lower())
    return found


# --- numbers and units ------------------------------------------------------------------------------------------------

_N = r"(\d+(?:,\d{3})*(?:\.\d+)?|[零〇一二两三四五六七八九十百千万]+)"
_MONEY = r"(?:[¥￥$€£]|rmb|cny|usd|eur|hk\$|nt\$)?\s*"
_UNIT_MONEY = r"\s*(?:元|块钱?|圆|rmb|cny|yuan|kuai|dollars?|euros?|pounds?)?"
_EN_WORDS = {
    word: str(n)
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
        ]
    )
} | {"twenty": "20", "thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "ninety": "90"}
_EN_NUMBER = re.compile(
    rf"\b({'|'.join(_EN_WORDS)})(?=[ -](?:(?:business|working|calendar|full) )?"
    r"(?:days?|hours?|weeks?|months?|years?|minutes?|percent|per cent|yuan|kg|kilos?|kilograms?|grams?|litres?|liters?|"
    r"pieces?|items?|cups?|metres?|meters?)\b)"
)
_DIGITS_ZH = {character: n for n, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_POWERS_ZH = {"十": 10, "百": 100, "千": 1000}
# unit -> (token's unit, factor): what is written 2公斤, 2 kg or 4斤 is one token, u2000g.
_UNITS = {
    "kg": ("g", 1000), "公斤": ("g", 1000), "千克": ("g", 1000), "kilo": ("g", 1000), "kilos": ("g", 1000),
    "kilogram": ("g", 1000), "kilograms": ("g", 1000), "kgs": ("g", 1000), "斤": ("g", 500), "两重": ("g", 50),
    "g": ("g", 1), "克": ("g", 1), "gram": ("g", 1), "grams": ("g", 1),
    "mm": ("mm", 1), "毫米": ("mm", 1), "cm": ("mm", 10), "厘米": ("mm", 10), "公分": ("mm", 10),
    "centimetre": ("mm", 10), "centimetres": ("mm", 10), "centimeter": ("mm", 10), "centimeters": ("mm", 10),
    "m": ("mm", 1000), "米": ("mm", 1000), "metre": ("mm", 1000), "metres": ("mm", 1000), "meter": ("mm", 1000),
    "meters": ("mm", 1000),
    "ml": ("ml", 1), "毫升": ("ml", 1), "l": ("ml", 1000), "升": ("ml", 1000), "litre": ("ml", 1000),
    "litres": ("ml", 1000), "liter": ("ml", 1000), "liters": ("ml", 1000),
    "天": ("d", 1), "日内": ("d", 1), "day": ("d", 1), "days": ("d", 1), "工作日": ("d", 1), "个工作日": ("d", 1),
    "working days": ("d", 1), "business days": ("d", 1), "calendar days": ("d", 1), "working day": ("d", 1),
    "business day": ("d", 1), "周": ("d", 7), "个星期": ("d", 7), "星期": ("d", 7), "week": ("d", 7), "weeks": ("d", 7),
    "小时": ("h", 1), "个小时": ("h", 1), "hour": ("h", 1), "hours": ("h", 1), "hrs": ("h", 1),
    "个月": ("mo", 1), "month": ("mo", 1), "months": ("mo", 1), "年": ("mo", 12), "year": ("mo", 12), "years": ("mo", 12),
    "元": ("¥", 1), "块": ("¥", 1), "块钱": ("¥", 1), "圆": ("¥", 1), "yuan": ("¥", 1), "rmb": ("¥", 1), "cny": ("¥", 1),
    "件": ("x", 1), "个": ("x", 1), "只": ("x", 1), "pieces": ("x", 1), "items": ("x", 1),
}  # fmt: skip
_QUANTITY = re.compile(rf"{_N}\s*-?\s*({'|'.join(sorted(map(re.escape, _UNITS), key=len, reverse=True))})(?![a-z])")
_PREFIXED = re.compile(r"(?:[¥￥]|\brmb|\bcny)\s*(\d+(?:,\d{3})*(?:\.\d+)?)")
_FOLD_OFF = re.compile(r"(\d{1,2}(?:\.\d)?|[一二三四五六七八九]{1,2})\s*折")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:%|percent\b|per cent\b)(?!\s*of\s+the\s+price)")
_HALF = re.compile(r"半价|对折|\bhalf[ -]?price|\bhalf off\b")
_CUT = (
    re.compile(rf"满\s*{_MONEY}{_N}{_UNIT_MONEY}\s*[,，]?\s*(?:就|可|立|直|再|即)?(?:立)?[减省]\s*{_MONEY}{_N}"),
    re.compile(rf"\bspend(?:ing)?\s+{_MONEY}{_N}{_UNIT_MONEY},?\s+(?:and\s+|to\s+)?(?:save|get)\s+{_MONEY}{_N}"),
)
_CUT_TURNED = (
    re.compile(
        rf"(?<![\d.,]){_MONEY}{_N}{_UNIT_MONEY}\s+off\s+(?:(?:from|on|of|for|with|orders?|purchases?|over|above|every|any|"
        rf"spend(?:s|ing)?|when you|you|spend|an?|order)\s+)*{_MONEY}{_N}(?!\s*%)"
    ),
    re.compile(
        rf"\b(?:save|get)\s+{_MONEY}{_N}{_UNIT_MONEY}\s+(?:off\s+)?(?:when|if|for|on|over|from)\s+(?:(?:you|spend|spending|"
        rf"orders?|over|of|every)\s+)*{_MONEY}{_N}"
    ),
)
_FREE_SHIPPING = re.compile(
    r"包邮|免邮|免运费?|免快递费|免配送费|\bfree (?:standard )?(?:shipping|delivery|postage|p&p)|"
    r"\b(?:shipping|delivery|postage) (?:is |for )?free\b|\bships? (?:for )?free\b"
)


# 十五, 三百, 一百二十; not 三 alone, nor 千万 ("by all means") and 万一 ("in case").
_NUMERAL = re.compile(
    r"(?:[一二两三四五六七八九][十百千万]|(?<![几数好])十[一二三四五六七八九])[零一二两三四五六七八九十百千万]*"
)


def _in_digits(match: re.Match[str]) -> str:
    value = number_of(match.group())
    return match.group() if value is None else _short(value)


def quantities(folded: str) -> list[str]:
    """
    Return the numbers of a folded text in one form for both languages and all spellings of them.

    三折, 3折 and 70% off give "%70"; 满300减50, 满三百减五十 and "50 off 300" give "cut300-50"; 包邮 and "free shipping"
    "freeship"; 一百二十块, 120元 and ¥120 "¥120"; 2公斤 and 2kg "g2000"; 七天 and "seven days" "d7". Numerals in words give
    their digits besides. None of these stands in a text as it is, so none is taken for a word.
    """
    found: list[str] = []
    if not _HAS_QUANTITY.search(folded):
        return found
    text = _EN_NUMBER.sub(lambda match: _EN_WORDS[match[1]], folded)
    found += [f"%{_off(match[1])}" for match in _FOLD_OFF.finditer(text)]
    found += [f"%{_short(float(match[1]))}" for match in _PERCENT.finditer(text)]
    if _HALF.search(text):
        found.append("%50")
    for patterns, turned in ((_CUT, False), (_CUT_TURNED, True)):
        for pattern in patterns:
            for match in pattern.finditer(text):
                pair = [number_of(match[1]), number_of(match[2])]
                if None not in pair:
                    threshold, saved = reversed(pair) if turned else pair
                    found.append(f"cut{_short(threshold or 0)}-{_short(saved or 0)}")
    if _FREE_SHIPPING.search(text):
        found.append("freeship")
    for match in _QUANTITY.finditer(text):
        value = number_of(match[1])
        if value is None:
            continue
        unit, factor = _UNITS[match[2]]
        # A bare "个" or "天" after 一 is "a", not a quantity.
        if match[1] == "一" and unit in ("x", "d", "h"):
            continue
        found.append(f"{unit}{_short(value * factor)}")
        if not match[1][0].isdigit():
            found.append(_short(value))
    found += [f"¥{_short(float(match[1].replace(',', '')))}" for match in _PREFIXED.finditer(text)]
    return list(dict.fromkeys(found))


# Most texts have none: one cheap look before a dozen patterns.
_HAS_QUANTITY = re.compile(
    rf"\d|半价|对折|折|邮|免运|免快递|免配送|free|half|percent|{_EN_NUMBER.pattern}|[零〇一二两三四五六七八九十百千万]\s*[{''.join(sorted({unit[0] for unit in _UNITS if unit[0] > '~'}))}满减]"
)


def number_of(text: str) -> float | None:
    """Return "1,299.5", "三百", "一百二" (120) or "两万" as a number; None for what is none."""
    if text[0].isdigit():
        return float(text.replace(",", ""))
    if all(character in _DIGITS_ZH for character in text):
        return float("".join(str(_DIGITS_ZH[character]) for character in text))
    total = part = digit = 0
    power = 1
    for character in text:
        if character in _DIGITS_ZH:
            digit = _DIGITS_ZH[character]
            power = 1 if character in "零〇" else power
        elif character == "万":
            total, part, digit, power = (total + part + digit or 1) * 10_000, 0, 0, 1000
        else:
            power = _POWERS_ZH[character]
            part += (digit or 1) * power
            digit = 0
            power //= 10
    # 一百二 is 120, 一百零二 is 102.
    return float(total + part + digit * (power if text[-2:-1] not in ("零", "〇", "十", "") else 1))


def _off(text: str) -> str:
    """Return 折 as per cent off: 8 -> 20, 75 -> 25, 八八 -> 12."""
    if text[0] in _DIGITS_ZH:
        text = "".join(str(_DIGITS_ZH[character]) for character in text)
    value = float(text)
    return _short(100 - (value * 10 if value < 10 else value))


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


QUANTITY = 0.5  # its digits count besides


def is_quantity(word: str) -> bool:
    """Return whether `word` is one of `quantities` that no text holds as it is."""
    return word[0] in "%¥" or word == "freeship" or bool(_TOKEN.match(word))


_TOKEN = re.compile(r"(?:cut[\d.]+-[\d.]+|(?:g|mm|ml|d|h|mo|x)\d[\d.]*)$")


def weight(word: str) -> float:
    """Return how much `word` counts in a query, in (0, 1]: content 1, a single Chinese character 0.6, filler 0.2."""
    if word in _FILLER:
        return 0.2
    if is_quantity(word):
        return QUANTITY
    # A character is half a word; the pair it stands in counts in full.
    return 0.6 if len(word) == 1 and _CJK_CHARACTER.match(word) else 1.0


def is_filler(word: str) -> bool:
    """Return whether `word` says how a question is asked, not what about."""
    return word in _FILLER


def stem(word: str) -> str:
    """Return `word` without a plural, -ing or -ed ending and without a last e; three letters stay as they are."""
    if len(word) <= 3 or not word.isascii() or not word.isalpha():
        return word
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith(("sses", "xes", "ches", "shes", "zes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        base = word[: -len(ending)]
        if word.endswith(ending) and len(base) >= 3 and any(vowel in base for vowel in "aeiouy"):
            word = base[:-1] if base[-1] == base[-2] and base[-1] not in "lsz" else base
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def detect_lang(text: str) -> str:
    """Return "zh", "en", or "" where nothing tells; a Chinese character weighs as much as half a Latin word."""
    n_cjk = len(_CJK_CHARACTER.findall(text))
    n_latin = len(_LATIN_WORD.findall(text))
    if n_cjk == 0 and n_latin == 0:
        return ""
    return "zh" if n_cjk >= n_latin else "en"
