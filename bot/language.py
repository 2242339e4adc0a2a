"""
Which language a message is in, decided by code from the message itself. Pure.

Only the store's two first-class languages are told apart; a third one is answered in the language the
conversation was in, or the one the page asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bot.messages import Language, Turn

_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN_WORD = re.compile(r"[A-Za-z][A-Za-z'’]+")
# Words that Chinese shoppers type inside Chinese sentences, and codes, say nothing about the language.
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b")
_NEUTRAL = re.compile(r"[A-Z]{2,}\d*|[A-Za-z]+\d+\w*|https?://\S+|\S+@\S+")


def language_of(text: str) -> Language | None:
    """Return the language `text` is written in, or None where it does not show ("???", "QH1034", "👍")."""
    n_cjk = len(_CJK.findall(text))
    n_words = len(_LATIN_WORD.findall(_NEUTRAL.sub(" ", text)))
    if n_cjk == 0 and n_words == 0:
        # So many codes in a row are no codes: somebody shouts.
        return "en" if len(_CAPITALS.findall(text)) > 2 else None
    # One Chinese word is about two characters: "iPhone 充电器" is Chinese, "what does 包邮 mean" English.
    return "zh" if n_cjk >= n_words * 2 or n_words == 0 else ("en" if n_cjk < n_words else "zh")


def reply_language(
    text: str, history: Sequence[Turn] = (), locale: str | None = None, default: Language = "zh"
) -> Language:
    """Return the language to answer `text` in: its own, else the last question's, else the page's, else `default`."""
    if (own := language_of(text)) is not None:
        return own
    for turn in reversed(history):
        if (past := language_of(turn.question)) is not None:
            return past
    if locale:
        return "zh" if locale.lower().startswith("zh") else "en"
    return default
