"""
Figures of replies, and whether a difference is more than chance. Pure but for sacrebleu.

BLEU and chrF are sacrebleu's (Chinese by its `zh` tokenizer); ROUGE-L is written here, over characters of Chinese and words
of English, since rouge-score drops everything that is not ASCII. Intervals are of paired bootstraps: two models answer the
same questions, so the questions are resampled, not the models.
"""  # noqa: E501

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bot.language import language_of

_UNIT = re.compile(r"[\u3400-\u9fff]|[A-Za-z0-9]+(?:[.,'’]\w+)*")


def units(text: str) -> list[str]:
    """Return the words of English and the characters of Chinese, one width, lower case."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def rouge_l(reply: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of units, in [0, 1]."""
    a, b = units(reply), units(reference)
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    common = row[-1]
    return 2 * common / (len(a) + len(b))


def bleu(replies: Sequence[str], references: Sequence[str], lang: str) -> float:
    """Return corpus BLEU in [0, 100]."""
    import sacrebleu

    tokenizer = "zh" if lang == "zh" else "13a"
    return float(sacrebleu.corpus_bleu(list(replies), [list(references)], tokenize=tokenizer).score)


def chrf(replies: Sequence[str], references: Sequence[str]) -> float:
    """Return corpus chrF2 in [0, 100]; the same for any language."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(replies), [list(references)]).score)


def sentence_chrf(reply: str, reference: str) -> float:
    import sacrebleu

    return float(sacrebleu.sentence_chrf(reply, [reference]).score) / 100


def same_language(reply: str, question: str) -> bool:
    """Whether a reply is in the question's language; true where either shows none."""
    asked, said = language_of(question), language_of(reply)
    return asked is None or said is None or asked == said


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference with the bounds of its 95% interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    new: Sequence[float], old: Sequence[float], *, n_resamples: int = 2_000, seed: int = 0
) -> Interval:
    """Return new - old of the same items, by a percentile bootstrap over the items."""
    return bootstrap(np.asarray(new, dtype=float) - np.asarray(old, dtype=float), np.mean, n_resamples, seed)


def paired_perplexity(
    new: Sequence[tuple[float, int]], old: Sequence[tuple[float, int]], *, n_resamples: int = 2_000, seed: int = 0
) -> Interval:
    """Return how the perplexity changes, as a share (-0.35: 35% lower). Items are (summed loss, learned tokens)."""
    pairs = np.asarray([[a[0] - b[0], a[1]] for a, b in zip(new, old, strict=True)], dtype=float)
    return bootstrap(pairs, lambda x: np.exp(x[..., 0].sum(-1) / x[..., 1].sum(-1)) - 1, n_resamples, seed)


def paired_ratio(pairs: Sequence[tuple[float, float]], *, n_resamples: int = 2_000, seed: int = 0) -> Interval:
    """Return sum / sum of (difference, weight) items, the items resampled: a difference of two pooled accuracies."""
    items = np.asarray(pairs, dtype=float).reshape(-1, 2)
    return bootstrap(items, lambda x: x[..., 0].sum(-1) / x[..., 1].sum(-1), n_resamples, seed)


def bootstrap(items: np.ndarray, statistic: Callable[..., object], n_resamples: int, seed: int) -> Interval:
    """Return `statistic` of the items and the 2.5 and 97.5 percentiles of it over resampled ones."""
    if len(items) == 0:
        return Interval(0.0, 0.0, 0.0)
    rng = np.random.default_rng(seed)
    values = [float(statistic(items[rng.integers(0, len(items), len(items))])) for _ in range(n_resamples)]  # type: ignore[arg-type]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(statistic(items)), float(low), float(high))  # type: ignore[arg-type]
