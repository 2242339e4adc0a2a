"""
Text as search sees it: folded characters, words, and which language it is. No I/O but one table at import.

Knows Chinese and English spelling; knows nothing of passages, scores or vectors. The traditional -> simplified table
(`traditional.txt`: one line of characters, one line of what each becomes) is OpenCC's TSCharacters (Apache-2.0), cut to
one-to-one pairs of the basic plane: `zhconv` is GPL and `OpenCC` a C++ wheel, and search needs no phrase table.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

_TRADITIONAL, _SIMPLIFIED = (Path(__file__).parent / "traditional.txt").read_text("utf-8").splitlines()
_TO_SIMPLIFIED = str.maketrans(_TRADITIONAL, _SIMPLIFIED)

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUN = re.compile(rf"[{_CJK}]+|[^\W{_CJK}_]+(?:[-_'.’/][^\W{_CJK}_]+)*")
_CJK_CHARACTER = re.compile(rf"[{_CJK}]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")
# A coupon code or an article or order number: digits and letters together, or four digits and more.
_CODE = re.compile(r"(?=[a-z]*\d)[a-z0-9][a-z0-9_-]{3,}|\d{4,}")

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


def words(text: str) -> list[str]:
    """
    Return the index terms of `text`, in order, repeated as often as they occur.

    Chinese runs give every character and every pair of neighbours; Latin words are stemmed lightly; anything with a
    digit in it is kept whole (SKU, coupon code, order number), and its parts are added when it is joined by - or /.
    """
    found: list[str] = []
    for match in _RUN.finditer(fold(text)):
        run = match.group()
        if _CJK_CHARACTER.match(run):
            found.extend(run)
            found.extend(run[i : i + 2] for i in range(len(run) - 1))
            continue
        parts = re.split(r"[-_'./]", run)
        if len(parts) > 1 and any(character.isdigit() for character in run):
            found.append(run)
        found.extend(stem(part) for part in parts if part)
    return found


def codes(text: str) -> set[str]:
    """Return the tokens of `text` that look like an article number, an order number or a coupon code, folded."""
    return set(_CODE.findall(fold(text)))


def weight(word: str) -> float:
    """Return how much `word` counts in a query, in (0, 1]: content 1, a single Chinese character 0.6, filler 0.2."""
    if word in _FILLER:
        return 0.2
    # A character is half a word; the pair it stands in counts in full.
    return 0.6 if len(word) == 1 and _CJK_CHARACTER.match(word) else 1.0


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
