"""
Where a store says the same twice: the sections of its documents that restate the answer of a FAQ.

A question has one label, and a visitor who gets the section is answered as well. Knows words and figures; knows neither
questions nor how anything is found. Of the pairs it finds in the demo store 92 % are labelled so by hand, and it finds
81 % of those labelled (examples/questions.jsonl). In the five stores of `calibrate.KEPT_OUT` all it finds are, and that
is a third: their sections say it in other words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.load import twin_key
from retrieval.passages import Passage
from retrieval.words import fold, quantities, weight, words

SHARE = 0.6  # of the answer's content words that stand in the section
N_LEAST = 4  # content words of an answer: "no, we do not" stands in every section


def restated(passages: Sequence[Passage]) -> dict[str, set[str]]:
    """
    Return, by twin key, the sections that say what a FAQ's answer says: in its language, with all its figures.

    Not products, promotions and other FAQs: they say the same words of another thing ("lamps have a 3-year warranty").
    """
    found: dict[str, set[str]] = {}
    for lang in sorted({passage.lang for passage in passages}):
        spoken = [passage for passage in passages if passage.lang == lang]
        sections = [passage for passage in spoken if passage.kind in ("policy", "page")]
        if not sections:
            continue
        holding: dict[str, list[int]] = {}
        for number, section in enumerate(sections):
            for word in set(words(section.text)):
                holding.setdefault(word, []).append(number)
        # Counted by word: thousands of FAQs beside thousands of sections would be 10^7 pairs of sets.
        places = {word: np.array(numbers) for word, numbers in holding.items()}
        stated = [figures(section.text) for section in sections]
        for faq in spoken:
            content = content_words(faq.text) if faq.kind == "faq" else set()
            held = [places[word] for word in content if word in places]
            if len(content) < N_LEAST or not held:
                continue
            counts: NDArray[np.int64] = np.bincount(np.concatenate(held), minlength=len(sections))
            needed = figures(faq.text)
            same = [n for n in np.flatnonzero(counts >= SHARE * len(content)).tolist() if needed <= stated[n]]
            if same:
                found.setdefault(twin_key(faq), set()).update(twin_key(sections[n]) for n in same)
    return found


def figures(text: str) -> set[str]:
    """Return the numbers of `text`, and its discounts and free shipping in one form for both languages."""
    folded = fold(text)
    return set(re.findall(r"\d+(?:\.\d+)?", folded)) | {figure for figure in quantities(folded) if figure[0] in "%cf"}


def content_words(text: str) -> set[str]:
    """Return the words of `text` that are about something."""
    return {word for word in words(text) if weight(word) == 1.0}


def overlap(answer: str, reply: str) -> float:
    """Return the share of the answer's content words that the reply has; 0 to 1."""
    content = content_words(answer)
    return len(content & set(words(reply))) / len(content) if content else 0.0
