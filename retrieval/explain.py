"""
Why a search came out as it did: plain data, and the page a merchant reads. No I/O.

Knows what there is to say of a hit; how scores and confidences come about is hybrid.py's and confidence.py's. The parts
of a score are those it was summed from, so that nothing can rank a hit that is not shown here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from retrieval.passages import Hit, Passage
from retrieval.terms import Slot

Why = Literal["ended", "not begun", "outside its times", "kind", "translation"]

_PART_NAMES = {
    "body": "meaning of the whole entry",
    "best_wording": "meaning of the wording that matched",
    "all_wordings": "meaning of all its wordings, mean",
    "words": "share of the question's words",
    "same_lang": "in the visitor's language, or in no other",
    "approved": "an approved answer",
    "section": "a section of a policy",
    "exact": "the question is one of its wordings",
    "code": "named by its code",
    "read": "read beside the question, word by word",
    "translation": "taken over from its translation",
}


@dataclass(frozen=True, slots=True)
class HitReasons:
    """What one hit's place and confidence are made of."""

    hit: Hit
    parts: dict[str, float]  # their sum is the score
    features: dict[str, float]  # what the confidence is made of
    logit: dict[str, float]  # what each feature adds to it, and "bias"; empty where the wording is exact
    words: tuple[tuple[str, float], ...]  # index words shared with the question, and what share of it each covers


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A passage that would have stood among the hits."""

    passage: Passage
    score: float
    confidence: float | None  # None of a translation
    why: Why
    instead: str = ""  # the translation that stands in its place
    since: datetime | None = None  # when it ended
    next_on: datetime | None = None  # when it holds next


@dataclass(frozen=True, slots=True)
class Explanation:
    """A search and all its reasons."""

    query: str
    gist: str  # what of it was searched for: the question without the talk around it
    lang: str
    read_as: tuple[Slot, ...]
    gloss: str  # the query in the other language, term by term; "" where that was not asked
    unknown: tuple[str, ...]  # index words that no passage has
    hits: tuple[HitReasons, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From which confidence on what happens; the bot's, given as numbers since nothing here knows the bot."""

    direct: float = 0.5
    answer: float = 0.25
    near: float = 0.12

    def verdict(self, confidence: float) -> str:
        """Return what the bot does with a best hit of this confidence."""
        if confidence >= self.direct:
            return "direct"
        if confidence >= self.answer:
            return "answer"
        return "near" if confidence >= self.near else "no answer"


_VERDICTS = {
    "direct": "quoted word for word",
    "answer": "worded by the model from the hits, or shown as the closest where there is no model",
    "near": 'a "no" with the nearest entries shown as such',
    "no answer": 'a "no" with an offer of a human',
}


def dump_explanation(found: Explanation, thresholds: Thresholds) -> dict[str, Any]:
    """Return all but the hits themselves as JSON values; `dump_why` is what belongs to each hit."""
    top = found.hits[0].hit.confidence if found.hits else 0.0
    return {
        "query": found.query,
        "gist": found.gist,
        "lang": found.lang,
        "thresholds": {"direct": thresholds.direct, "answer": thresholds.answer, "near": thresholds.near},
        "verdict": thresholds.verdict(top),
        "read_as": [{"written": s.shown, "meant": list(s.meant), "why": s.why} for s in found.read_as],
        "gloss": found.gloss or None,
        "unknown_words": list(found.unknown),
        "left_out": [
            {
                "id": one.passage.id,
                "kind": one.passage.kind,
                "title": one.passage.title,
                "score": one.score,
                "confidence": one.confidence,
                "why": one.why,
                "instead": one.instead or None,
                "valid_from": one.passage.valid_from.isoformat() if one.passage.valid_from else None,
                "valid_until": one.passage.valid_until.isoformat() if one.passage.valid_until else None,
                "repeats": one.passage.repeats.text if one.passage.repeats else None,
                "ended_at": one.since.isoformat() if one.since else None,
                "next_on": one.next_on.isoformat() if one.next_on else None,
            }
            for one in found.left_out
        ],
    }


def dump_why(why: HitReasons, thresholds: Thresholds) -> dict[str, Any]:
    """Return one hit's reasons as JSON values."""
    return {
        "parts": {name: round(value, 6) for name, value in why.parts.items()},
        "score": why.hit.score,
        "wording": why.hit.wording,
        "words": [{"word": word, "share": round(share, 4)} for word, share in why.words],
        "features": {name: round(value, 4) for name, value in why.features.items()},
        "logit": {name: round(value, 4) for name, value in why.logit.items()},
        "verdict": thresholds.verdict(why.hit.confidence),
    }


def explanation_text(found: Explanation, thresholds: Thresholds) -> str:
    """Return the page: the question as read, the cut-off, every hit with its parts, and what was left out."""
    lines = [f"Question ({found.lang or 'language unknown'}): {found.query}"]
    if found.gist != found.query:
        lines.append(f"  searched for: {found.gist}")
    for slot in found.read_as:
        names = {
            "term": "the store's term",
            "synonym": "synonym",
            "typo": "typing error?",
            "code": "code",
            "gloss": "gloss",
        }
        lines.append(f"  {slot.shown} also read as {' | '.join(slot.meant)} ({names[slot.why]})")
    if found.gloss:
        lines.append(f"  for what only the other language has: {found.gloss}")
    if found.unknown:
        lines.append(f"  in no entry: {', '.join(found.unknown)}")
    lines.append(
        f"Cut-off: quoted from {thresholds.direct:.2f}, answered from {thresholds.answer:.2f}, "
        f"shown as nearest from {thresholds.near:.2f}"
    )
    if not found.hits:
        lines.append("Nothing was found.")
    for place, why in enumerate(found.hits, start=1):
        hit = why.hit
        verdict = thresholds.verdict(hit.confidence)
        lines += ["", f"{place}. {hit.passage.id}  {hit.passage.title}"]
        lines.append(f"   confidence {hit.confidence:.2f} -> {verdict}" + f": {_VERDICTS[verdict]}" * (place == 1))
        lines.append(f"   score {hit.score:.3f}, wording that matched: {' '.join(hit.wording.split())[:100]}")
        for name, value in why.parts.items():
            if abs(value) >= 0.0005:
                lines.append(f"     {value:+.3f}  {_PART_NAMES.get(name, name)}")
        if why.words:
            lines.append("   words: " + ", ".join(f"{word} {share:.0%}" for word, share in why.words))
        if why.logit:
            said = ", ".join(f"{name} {value:+.2f}" for name, value in why.logit.items() if abs(value) >= 0.005)
            lines.append(f"   confidence from: {said}")
    if found.left_out:
        lines += ["", "Left out, though it matched as well:"]
        lines += [
            f"   {one.score:.3f}  {one.passage.id}  {one.passage.title}: {_reason(one)}" for one in found.left_out
        ]
    return "\n".join(lines)


def _reason(one: LeftOut) -> str:
    if one.why == "kind":
        return f"is a {one.passage.kind}, not asked for"
    if one.why == "translation":
        return f"its translation {one.instead} stands for it"
    repeats = f" ({one.passage.repeats.text})" if one.passage.repeats else ""
    if one.why == "ended" and one.since is not None:
        return f"ended at {_moment(one.since)}{repeats}"
    if one.next_on is not None:
        begins = "has not begun, on from" if one.why == "not begun" else "is not on now, next on"
        return f"{begins} {_moment(one.next_on)}{repeats}"
    return f"{one.why}{repeats}"


def _moment(moment: datetime) -> str:
    offset = moment.utcoffset() or timedelta()
    return f"{moment:%Y-%m-%d %H:%M}" + (f" ({moment:%z})" if offset else " (UTC)")
