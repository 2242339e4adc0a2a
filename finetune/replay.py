"""
Offline replay: real past questions answered once by a candidate and once by the current release, and compared.

A question comes with its conversation so far, its time and what was replied to it then; personal data is masked before
anything sees it. How replies are made is handed in (`Answer`): this file knows no engine, no retriever and no database.
The verdict is what `ab start` and `publish` read.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Literal, Protocol

from bot.language import language_of
from bot.messages import Event, Turn
from finetune.dialogues import Dialogue, turns_of
from finetune.grounding import figures_of
from finetune.html import STYLE
from finetune.metrics import paired_difference, sentence_chrf, units
from finetune.pii import Masker
from finetune.runs import write_report

FOLDER = "replays"  # beside the releases, since a release's own folder is never written again
MIN_N = 20  # fewer questions say too little to let visitors be the test


@dataclass(frozen=True, slots=True)
class Question:
    """Something that was asked once, and what was replied. All text is masked."""

    id: str  # "conversation:seq" or "dialogue:n"
    history: tuple[Turn, ...]
    text: str
    at: datetime | None  # aware; None: not known, the passages of today stand in
    locale: str | None = None
    said: str = ""
    by: Literal["agent", "bot", "human"] = "bot"  # who replied; "human" in imported dialogues
    rating: Literal["up", "down"] | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A reply now, as a visitor would have got it, and what the model said by itself."""

    text: str
    outcome: str  # "failed" where no reply could be made; `text` then says why
    ms: float
    raw: str = ""  # the model's own words, before the checks; empty where it was not asked
    prompt: str = ""  # what they were to rest on
    cited: tuple[str, ...] = field(default=())  # passage ids


Answer = Callable[[Question], Awaitable[Answered]]


class Log(Protocol):
    """A conversation with its events, as `bot.storage` reads them."""

    @property
    def id(self) -> str: ...
    @property
    def locale(self) -> str | None: ...
    @property
    def events(self) -> Sequence[Event]: ...


# --- What was asked ---------------------------------------------------------------------------------------------------


def questions_of_log(log: Log, since: datetime | None, keep: Sequence[str] = ()) -> list[Question]:
    """
    Return the answered questions of a conversation, masked, in order, from `since` (aware) on.

    Messages that got one reply are one question. Of replies made again the last one counts; an agent's messages in a row
    are one reply.
    """  # noqa: E501
    said = [e for e in log.events if e.kind == "message" and e.role in ("visitor", "bot", "agent") and e.text.strip()]
    said = [e for e in said if not e.data.get("left") and e.data.get("finish") != "abort"]
    masked = dict(zip((e.seq for e in said), Masker(keep).mask([e.text for e in said]), strict=True))
    ratings = {e.data["rated"]: e.data["value"] for e in log.events if e.kind == "rating"}
    last = {str(e.data["turn"]): e.seq for e in said if e.role == "bot" and e.data.get("turn")}
    history: list[Turn] = []
    found: list[Question] = []
    asked: list[Event] = []  # by the visitor, not replied to yet
    for n, event in enumerate(said):
        if event.role == "visitor":
            asked.append(event)
            continue
        if event.role == "agent" and n and said[n - 1].role == "agent" and found:
            # An agent says it in several messages.
            history[-1] = Turn(history[-1].question, f"{history[-1].reply}\n{masked[event.seq]}", history[-1].passages)
            if found[-1].by == "agent":
                found[-1] = _with_reply(found[-1], history[-1].reply)
            continue
        turns = set(event.data.get("turns") or [event.data.get("turn")])
        if event.role == "bot" and event.data.get("turn") and last[str(event.data["turn"])] != event.seq:
            continue  # made again later
        own = asked if event.role == "agent" else [e for e in asked if e.data.get("turn") in turns]
        if not own:
            continue
        asked = [e for e in asked if e not in own]
        text = "\n".join(masked[e.seq] for e in own)
        if since is None or own[-1].at >= since:
            rating = ratings.get(event.seq)
            found.append(
                Question(
                    id=f"{log.id}:{own[-1].seq}",
                    history=tuple(history),
                    text=text,
                    at=own[-1].at,
                    locale=log.locale,
                    said=masked[event.seq],
                    by="agent" if event.role == "agent" else "bot",
                    rating=rating if rating in ("up", "down") else None,
                )
            )
        cited = tuple(str(c["id"]) for c in event.data.get("citations", ()))
        history.append(Turn(text, masked[event.seq], cited))
    return found


def _with_reply(question: Question, said: str) -> Question:
    return Question(
        question.id, question.history, question.text, question.at, question.locale, said, question.by, question.rating
    )


def questions_of_dialogue(dialogue: Dialogue) -> list[Question]:
    """Return the questions of an imported dialogue, which is masked already."""
    turns = turns_of(dialogue.lines)
    locale = {"zh": "zh-CN", "en": "en"}.get(dialogue.lang)
    return [
        Question(
            id=f"{dialogue.id}:{n}",
            history=tuple(turns[:n]),
            text=turn.question,
            at=dialogue.at,
            locale=locale,
            said=turn.reply,
            by="human",
            rating=dialogue.lines[2 * n + 1].rating,
        )
        for n, turn in enumerate(turns)
    ]


def sample(questions: Iterable[Question], n: int, seed: int) -> list[Question]:
    """Return at most `n` questions, the rated ones first, then by lot; in the order given."""
    listed = list(questions)
    order = list(range(len(listed)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: listed[i].rating is None)  # stable: by lot within each
    return [listed[i] for i in sorted(order[:n])]


# --- What came out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """How much worse than the current release a candidate may be before visitors see it."""

    min_n: int = MIN_N
    max_failed: int = 0
    max_no_answer: float = 0.05  # more of the replies without an answer
    max_ungrounded: float = 0.02  # more of the model's replies with a figure that stands nowhere in its prompt
    max_language: float = 0.02  # more replies in another language than the question's
    max_length: float = 2.0  # median length against the current release's
    max_latency: float = 3.0  # median time to the whole reply against the current release's, one engine after the other
    max_liked_loss: float = 0.05  # less like the replies that visitors rated up or agents wrote (chrF), lower end


def compare(
    questions: Sequence[Question], candidate: Sequence[Answered], current: Sequence[Answered], bounds: Bounds
) -> dict[str, Any]:
    """Return the figures of both, what changed, and the verdict."""
    of_both = {"candidate": list(candidate), "current": list(current)}
    figures = {name: _figures(questions, answers) for name, answers in of_both.items()}
    equal = [_same(a.text, b.text) for a, b in zip(candidate, current, strict=True)]
    spoke = [bool(a.raw or b.raw) for a, b in zip(candidate, current, strict=True)]
    passages = [a.cited == b.cited for a, b in zip(candidate, current, strict=True)]
    found: dict[str, Any] = {
        "n": len(questions),
        "n_model": sum(spoke),
        "equal": _share(equal),
        "equal_model": _share([e for e, s in zip(equal, spoke, strict=True) if s]),
        "same_citations": _share(passages),
        "outcomes_changed": dict(
            Counter(
                f"{b.outcome} -> {a.outcome}" for a, b in zip(candidate, current, strict=True) if a.outcome != b.outcome
            ).most_common()
        ),
        "figures": figures,
        "agreement": _agreement(questions, of_both),
        "rated": {value: _rated(questions, of_both, value) for value in ("up", "down")},
    }
    found["verdict"] = _judge(found, bounds)
    return found


def _figures(questions: Sequence[Question], answers: Sequence[Answered]) -> dict[str, Any]:
    made = [(q, a) for q, a in zip(questions, answers, strict=True) if a.outcome != "failed"]
    raw = [a for _, a in made if a.raw]
    other_language = [_other_language(q.text, a.text) for q, a in made]
    return {
        "n_failed": len(answers) - len(made),
        "outcomes": dict(Counter(a.outcome for a in answers).most_common()),
        "no_answer": _share([a.outcome == "no_answer" for _, a in made]),
        "ungrounded": _share([not figures_of(a.raw) <= figures_of(a.prompt) for a in raw]),
        "other_language": _share(other_language),
        "length_median": statistics.median(len(a.text) for _, a in made) if made else None,
        "ms_p50": round(statistics.median(a.ms for _, a in made), 1) if made else None,
        "ms_p95": round(_quantile([a.ms for _, a in made], 0.95), 1) if made else None,
    }


def _agreement(questions: Sequence[Question], of_both: dict[str, list[Answered]]) -> dict[str, Any] | None:
    """Return how like they are to replies that were good: an agent's own words, and what a visitor rated up (chrF)."""
    at = [n for n, q in enumerate(questions) if q.said and (q.by != "bot" or q.rating == "up") and q.rating != "down"]
    if not at:
        return None
    scores = {
        name: [sentence_chrf(answers[n].text, questions[n].said) for n in at] for name, answers in of_both.items()
    }
    gain = asdict(paired_difference(scores["candidate"], scores["current"]))
    return {"n": len(at), "gain": gain, **{name: round(statistics.fmean(s), 4) for name, s in scores.items()}}


def _rated(questions: Sequence[Question], of_both: dict[str, list[Answered]], value: str) -> dict[str, int]:
    """Return how many replies that were rated so would be others now."""
    at = [n for n, q in enumerate(questions) if q.rating == value]
    changed = {
        name: sum(not _same(answers[n].text, questions[n].said) for n in at) for name, answers in of_both.items()
    }
    return {"n": len(at), **{f"{name}_changed": n for name, n in changed.items()}}


def _judge(found: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    """Return {"passed", "reasons"}; a figure that could not be measured is not held against the candidate."""
    new, old = found["figures"]["candidate"], found["figures"]["current"]
    reasons = []
    if found["n"] < bounds.min_n:
        reasons.append(f"{found['n']} questions; the bound is {bounds.min_n}")
    if new["n_failed"] > bounds.max_failed:
        reasons.append(f"{new['n_failed']} questions without a reply; the bound is {bounds.max_failed}")
    for figure, bound in (
        ("no_answer", bounds.max_no_answer),
        ("ungrounded", bounds.max_ungrounded),
        ("other_language", bounds.max_language),
    ):
        if new[figure] is not None and old[figure] is not None and new[figure] - old[figure] > bound:
            reasons.append(
                f"{figure.replace('_', ' ')} {new[figure]:.1%} instead of {old[figure]:.1%}; at most {bound:.1%} more"
            )
    for figure, bound in (("length_median", bounds.max_length), ("ms_p50", bounds.max_latency)):
        if new[figure] is not None and old[figure] and new[figure] > bound * old[figure]:
            name = {"length_median": "median length", "ms_p50": "median milliseconds"}[figure]
            reasons.append(f"{name} {new[figure]:.0f} instead of {old[figure]:.0f}; at most {bound:g} times as much")
    if (agreement := found["agreement"]) is not None and agreement["n"] >= bounds.min_n:
        gain = agreement["gain"]
        if gain["low"] < -bounds.max_liked_loss:
            reasons.append(
                f"less like the replies that were liked: {gain['mean']:+.3f}, down to {gain['low']:+.3f}; "
                f"the bound is {-bounds.max_liked_loss:+.3f}"
            )
    return {"passed": not reasons, "reasons": reasons, "bounds": asdict(bounds)}


def _same(a: str, b: str) -> bool:
    """Whether two replies say the same words; spaces, width and case aside."""
    return units(a) == units(b)


def _other_language(question: str, reply: str) -> bool:
    asked, said = language_of(question), language_of(reply)
    return asked is not None and said is not None and asked != said


def _share(values: Sequence[bool]) -> float | None:
    return round(statistics.fmean(values), 4) if values else None


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


# --- Kept -------------------------------------------------------------------------------------------------------------


def replay_of(releases: Path, name: str) -> dict[str, Any] | None:
    """Return the replay of a release: made for it, or for the very result it came from; None where there is none."""
    if (found := _read(releases / FOLDER / f"{name}.json")) is not None:
        return found
    found, lineage = _read(releases / name / "replay.json"), _read(releases / name / "release.json")
    same = found and lineage and found.get("result_sha256") == lineage.get("result_sha256")
    return found if same else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def save(found: dict[str, Any], path: Path) -> None:
    """Write `path` (JSON) and the page beside it, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, found, render_html(found))


def render_html(found: dict[str, Any]) -> str:
    """Return the replay as one page: verdict, figures, and every question with both replies side by side."""
    verdict = found["verdict"]
    grade = "pass" if verdict["passed"] else "fail"
    said = "passed" if verdict["passed"] else "not passed"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Replay</title><style>{STYLE}</style>",
        f"<h1>Replay <span class={grade}>{said}</span></h1>",
        f"<p><small>{escape(found['candidate'])} against {escape(str(found['current'] or 'the default model'))}, "
        f"{escape(found['at'])}; {found['n']} past questions, of which {found['n_model']} reached a model</small></p>",
    ]
    if verdict["reasons"]:
        parts.append("<ul class=fail>" + "".join(f"<li>{escape(r)}</li>" for r in verdict["reasons"]) + "</ul>")
    parts.append("<h2>Figures</h2><table><tr><th></th><th>candidate</th><th>current</th></tr>")
    for figure in found["figures"]["candidate"]:
        cells = "".join(f"<td>{escape(_text(found['figures'][n][figure]))}</td>" for n in ("candidate", "current"))
        parts.append(f"<tr><td>{escape(figure.replace('_', ' '))}</td>{cells}</tr>")
    parts.append("</table><ul>")
    parts.append(f"<li>equal replies: {_text(found['equal'])}; where a model spoke: {_text(found['equal_model'])}</li>")
    for change, n in found["outcomes_changed"].items():
        parts.append(f"<li>{escape(change)}: {n}</li>")
    if (agreement := found["agreement"]) is not None:
        gain = agreement["gain"]
        parts.append(
            f"<li>like {agreement['n']} replies that were liked or written by people (chrF): {agreement['candidate']}, "
            f"current {agreement['current']}; {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]</li>"
        )
    for value, rated in found["rated"].items():
        parts.append(
            f"<li>of {rated['n']} replies rated {value}, changed: {rated['candidate_changed']} by the candidate, "
            f"{rated['current_changed']} by the current release</li>"
        )
    parts.append("</ul><h2>Side by side</h2><table><tr><th>question</th><th>said then</th>")
    parts.append("<th>candidate</th><th>current</th></tr>")
    for item in found["samples"]:
        rating = f" ({item['rating']})" if item["rating"] else ""
        cells = "".join(
            f"<td class=wrap><small>{escape(item[n]['outcome'])}, {item[n]['ms']:.0f} ms</small>\n"
            f"{escape(item[n]['text'])}</td>"
            for n in ("candidate", "current")
        )
        mark = "" if item["equal"] else " class=fail"
        parts.append(
            f"<tr><td class=q><small{mark}>{escape(item['id'])}{'' if item['equal'] else ', changed'}</small>\n"
            f"{escape(item['question'])}</td><td class=wrap><small>{escape(item['by'])}{rating}</small>\n"
            f"{escape(item['said'])}</td>{cells}</tr>"
        )
    parts.append("</table></html>\n")
    return "\n".join(parts)


def samples_of(
    questions: Sequence[Question], candidate: Sequence[Answered], current: Sequence[Answered]
) -> list[dict[str, Any]]:
    """Return every question with both replies, the changed ones first."""
    found: list[dict[str, Any]] = []
    for question, a, b in zip(questions, candidate, current, strict=True):
        kept = {"text", "outcome", "ms", "raw", "cited"}
        found.append(
            {
                "id": question.id,
                "at": question.at.isoformat() if question.at else None,
                "question": question.text,
                "n_history": len(question.history),
                "said": question.said,
                "by": question.by,
                "rating": question.rating,
                "equal": _same(a.text, b.text),
                "candidate": {k: v for k, v in asdict(a).items() if k in kept},
                "current": {k: v for k, v in asdict(b).items() if k in kept},
            }
        )
    return sorted(found, key=lambda s: bool(s["equal"]))


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
