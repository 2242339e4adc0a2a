"""
`python -m bot eval`: scripted cases against a running server, through its socket, as a visitor would ask them.

It knows the wire and the cases file; nothing of how answers are made. Figures it prints:
fact_accuracy     facts (inner lists of `must_include`) found, of all facts of the cases that expect an answer;
                  a case with a forbidden wording counts none of its facts
refusal_accuracy  cases that expect no_answer, handoff or refuse whose reply has that outcome
passed            cases with every fact, nothing forbidden, and the expected outcome
`cases` lists each with its facts found, in the file's order: what two runs are compared by, case by case.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bot.client import connect
from bot.errors import BotError, MerchantError

_OUTCOMES = {
    "answer": ("direct", "generated"),
    "no_answer": ("no_answer",),
    "handoff": ("handoff",),
    "refuse": ("refused",),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One scripted conversation; only its last reply is judged."""

    id: str
    lang: str
    turns: tuple[str, ...]
    must_include: tuple[tuple[str, ...], ...]
    must_not_include: tuple[str, ...]
    expect: str


@dataclass(frozen=True, slots=True)
class Verdict:
    case: Case
    text: str
    outcome: str
    missing: tuple[tuple[str, ...], ...]
    forbidden: tuple[str, ...]
    ttft_ms: float | None
    e2e_ms: float
    release: dict[str, Any] = field(default_factory=dict)

    @property
    def outcome_right(self) -> bool:
        return self.outcome in _OUTCOMES[self.case.expect]

    @property
    def passed(self) -> bool:
        return self.outcome_right and not self.missing and not self.forbidden

    @property
    def facts_found(self) -> int:
        return 0 if self.forbidden else len(self.case.must_include) - len(self.missing)


def load_cases(path: Path) -> list[Case]:
    """
    Return the cases of a JSONL file.

    Raises:
        MerchantError: names the file, the line and the field.
    """
    cases: list[Case] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise MerchantError(f"{path}: cannot be read: {exc}") from None
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            case = Case(
                str(raw["id"]),
                str(raw.get("lang", "")),
                tuple(str(t) for t in raw["turns"]),
                tuple(tuple(str(w) for w in group) for group in raw.get("must_include", [])),
                tuple(str(w) for w in raw.get("must_not_include", [])),
                str(raw.get("expect", "answer")),
            )
        except (ValueError, TypeError) as exc:
            raise MerchantError(f"{path}, line {n}: not a case: {exc}") from None
        except KeyError as exc:
            raise MerchantError(f"{path}, line {n}, {exc.args[0]}: missing") from None
        if not case.turns or case.expect not in _OUTCOMES:
            raise MerchantError(f"{path}, line {n}: needs `turns`, and `expect` one of {', '.join(_OUTCOMES)}")
        cases.append(case)
    if not cases:
        raise MerchantError(f"{path}: no cases")
    return cases


def squeeze(text: str) -> str:
    """Return `text` as wordings are compared: no case, width or spaces."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def judge(case: Case, text: str, outcome: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Return (facts missing, wordings that must not be there)."""
    squeezed = squeeze(text)
    missing = tuple(g for g in case.must_include if not any(squeeze(w) in squeezed for w in g))
    forbidden = tuple(w for w in case.must_not_include if squeeze(w) in squeezed)
    return missing, forbidden


async def run_case(url: str, case: Case, timeout_s: float) -> Verdict:
    """Ask the turns of `case` in a fresh conversation and judge the last reply."""
    async with connect(url, locale={"zh": "zh-CN", "en": "en"}.get(case.lang)) as client:
        final: dict[str, Any] = {}
        ttft_ms: float | None = None
        started = 0.0
        for turn in case.turns:
            started, ttft_ms = time.perf_counter(), None
            async with asyncio.timeout(timeout_s):
                async for frame in client.stream(turn):
                    if frame["type"] == "delta" and ttft_ms is None:
                        ttft_ms = (time.perf_counter() - started) * 1000
                    if frame["type"] == "event" and frame.get("role") == "bot":
                        final = frame
        e2e_ms = (time.perf_counter() - started) * 1000
    missing, forbidden = judge(case, final.get("text", ""), final.get("outcome", ""))
    return Verdict(
        case,
        final.get("text", ""),
        final.get("outcome", ""),
        missing,
        forbidden,
        ttft_ms,
        e2e_ms,
        final.get("release", {}),
    )


async def evaluate(
    url: str,
    cases: Sequence[Case],
    *,
    concurrency: int = 1,
    timeout_s: float = 180.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run all cases and return the figures; one that breaks counts as failed, with the error as its text."""
    places = asyncio.Semaphore(concurrency)
    done = 0

    async def one(case: Case) -> Verdict:
        nonlocal done
        async with places:
            try:
                verdict = await run_case(url, case, timeout_s)
            except (BotError, OSError, TimeoutError) as exc:
                verdict = Verdict(case, f"{type(exc).__name__}: {exc}", "error", case.must_include, (), None, 0.0)
        done += 1
        progress(done, len(cases))
        return verdict

    verdicts = await asyncio.gather(*map(one, cases))
    languages = sorted({v.case.lang for v in verdicts})
    e2e = [v.e2e_ms for v in verdicts if v.outcome != "error"]
    ttft = [v.ttft_ms for v in verdicts if v.ttft_ms is not None]
    return {
        **_figures(verdicts),
        "by_language": {lang: _figures([v for v in verdicts if v.case.lang == lang]) for lang in languages},
        "by_outcome": {
            outcome: {
                "n": len(times := [v.e2e_ms for v in verdicts if v.outcome == outcome]),
                "ttft_ms_p50": _median([v.ttft_ms for v in verdicts if v.outcome == outcome and v.ttft_ms is not None]),
                "e2e_ms_p50": _median(times),
            }
            for outcome in sorted({v.outcome for v in verdicts})
        },
        "ttft_ms_p50": _median(ttft),
        "e2e_ms_p50": _median(e2e),
        "release": next((v.release for v in verdicts if v.release), {}),
        "cases": [
            {
                "id": v.case.id,
                "lang": v.case.lang,
                "question": v.case.turns[-1],
                "expect": v.case.expect,
                "outcome": v.outcome,
                "outcome_right": v.outcome_right,
                "passed": v.passed,
                "n_facts": len(v.case.must_include),
                "n_found": v.facts_found,
                "text": v.text,
            }
            for v in verdicts
        ],
        "failures": [
            {
                "id": v.case.id,
                "lang": v.case.lang,
                "question": v.case.turns[-1],
                "expect": v.case.expect,
                "outcome": v.outcome,
                "missing": v.missing,
                "forbidden": v.forbidden,
                "text": v.text,
            }
            for v in verdicts
            if not v.passed
        ],
    }


def _figures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    answers = [v for v in verdicts if v.case.expect == "answer"]
    others = [v for v in verdicts if v.case.expect != "answer"]
    n_facts = sum(len(v.case.must_include) for v in answers)
    return {
        "n": len(verdicts),
        "passed": sum(v.passed for v in verdicts),
        "fact_accuracy": _share(sum(v.facts_found for v in answers), n_facts),
        "refusal_accuracy": _share(sum(v.outcome_right for v in others), len(others)),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 1) if values else None
