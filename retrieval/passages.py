"""
Passage, Hit and the one validity predicate. No I/O.

Search, prompt and the final check all ask `is_valid`, so that they can never disagree on what is on today.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

from retrieval.recurrence import Recurrence

Kind = Literal["faq", "policy", "promotion", "product", "page"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of the store's knowledge that is indexed and quoted."""

    id: str
    kind: Kind
    title: str  # a FAQ's question, a policy's "Title > Heading", a promotion's or product's title
    text: str  # what is quoted: a FAQ's answer, a section, a description with its facts in sentences
    lang: str  # "zh", "en"; "" where unknown
    source: str  # file and place in the store folder, for instance "faqs.csv:12", "policies/returns.en.md#Refunds"
    questions: tuple[str, ...] = ()  # every wording that finds a FAQ, its own question first
    valid_from: datetime | None = None  # aware; inclusive
    valid_until: datetime | None = None  # aware; exclusive
    approved: bool = False  # may be sent to visitors word for word
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # price, code, category, stock, …
    repeats: Recurrence | None = None  # between the two times it holds in these windows only; None: all the time


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage found for a query."""

    passage: Passage
    score: float  # the fused score hits are ranked by; comparable within one query only
    confidence: float  # probability in [0, 1] that this passage answers the query
    wording: str = ""  # the wording of the passage that matched best


def is_valid(passage: Passage, now: datetime) -> bool:
    """Return whether `passage` holds at `now` (aware): `valid_from` to before `valid_until`, when it `repeats`."""
    if passage.valid_from is not None and now < passage.valid_from:
        return False
    if passage.valid_until is not None and now >= passage.valid_until:
        return False
    return passage.repeats is None or passage.repeats.holds(now)


def next_valid(passage: Passage, now: datetime) -> datetime | None:
    """Return the first moment from `now` (aware) on at which `passage` holds: `now` itself, or later; None if never."""
    moment: datetime | None = now
    if passage.valid_from is not None and now < passage.valid_from:
        moment = passage.valid_from
    if moment is not None and passage.repeats is not None and not passage.repeats.holds(moment):
        moment = passage.repeats.next_start(moment)
    if moment is None or (passage.valid_until is not None and moment >= passage.valid_until):
        return None
    return moment


def last_valid_end(passage: Passage, now: datetime) -> datetime | None:
    """Return when `passage`, which will not hold again after `now`, ended (exclusive); None where it never held."""
    end = passage.valid_until
    if passage.repeats is None or end is None:
        return end
    last = passage.repeats.last_end(min(end, now))
    began = passage.valid_from
    return None if last is None or (began is not None and last <= began) else last
