"""
Names that so many of a store's questions hold that they tell none from another: its own, its app's, its brand's.

A question's vector says "this is about Tonghuashun" as loudly as what is asked about it; the mean of the vector with
and without the name says it half as loudly (0.625 -> 0.642 recall@1 on zh_tonghuashun's 300 questions, dense alone).
Found in the knowledge itself, as nobody is asked to configure them. Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from retrieval.words import is_filler

SHARE = 0.06  # of the texts; below that a name still tells
N_LEAST = 12  # texts that have it: in a small store a word may be common by chance
N_CHARACTERS = (3, 6)  # of a Chinese name; pairs are words of the trade (订单, 退货) that questions are about
_CJK_RUN = re.compile("[\u4e00-\u9fff]+")
# An English name is capitalised where no sentence begins.
_LATIN_NAME = re.compile(r"(?<=[a-z,] )[A-Z][A-Za-z0-9]{2,}\b")


def common_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the names common to `texts` (each a question or a title), longest first."""
    chinese: Counter[str] = Counter()
    latin: Counter[str] = Counter()
    for text in texts:
        found: set[str] = set()
        for run in _CJK_RUN.findall(text):
            for length in range(N_CHARACTERS[0], N_CHARACTERS[1] + 1):
                found.update(run[start : start + length] for start in range(len(run) - length + 1))
        chinese.update(found)
        latin.update(set(_LATIN_NAME.findall(text)))
    least = max(N_LEAST, SHARE * len(texts))
    kept = [name for name, n in chinese.items() if n >= least and not _says_something(name)]
    # Of 同花顺 and 同花顺的 the longer one only where it is nearly as common.
    whole = [
        name
        for name in kept
        if not any(name != other and name in other and chinese[other] >= 0.8 * chinese[name] for other in kept)
        and not any(name != other and other in name and chinese[name] < 0.8 * chinese[other] for other in kept)
    ]
    return tuple(
        sorted([*whole, *(name for name, n in latin.items() if n >= least)], key=lambda name: (-len(name), name))
    )


def without_names(text: str, names: Sequence[str]) -> str | None:
    """Return `text` without `names`; None where it has none of them or nothing else."""
    if not any(name in text for name in names):
        return None
    for name in names:
        text = text.replace(name, " " if name.isascii() else "")
    left = " ".join(text.split()).strip(" ,，。.?？!！、")
    return left if any(character.isalnum() for character in left) else None


def _says_something(name: str) -> bool:
    """Return whether `name` holds words of a question's form (怎么, 什么, 是, 的), which no name does."""
    return any(is_filler(name[start : start + 2]) for start in range(len(name) - 1)) or any(
        is_filler(character) for character in (name[0], name[-1])
    )
