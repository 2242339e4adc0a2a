"""
What a release must have shown before it is published. Pure: figures in, reasons out.

A figure may only stand in the way where it was measured; a gate that measured nothing does not open. The thresholds are
those of the fine-tuning issue; non-inferiority is by the interval's bad end, an improvement by its good side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bot.errors import MerchantError


@dataclass(frozen=True)
class Gate:
    """Bounds; what the `eval` did not measure is not held against a release."""

    min_held_out: int = 20  # dialogues; an interval over fewer says little
    max_perplexity_change: float = 0.0  # upper end of the interval, against the base
    max_perplexity_change_current: float = 0.02  # against the current release: not worse by more than this
    min_language_match: float = 0.95
    max_forbidden: int = 0
    max_length_ratio: float = 2.0  # median reply length against the humans'

    # Of cases, each file by itself; `[cases.LABEL]` in the TOML file has other ones for the file of that stem.
    min_fact_gain: float = 0.0  # lower end, against the base
    min_fact_gain_mean: float = 0.0  # the difference itself, against the base
    min_fact_gain_current: float = -0.05  # lower end, against the current release: not worse by more than this
    min_refusal_gain_current: float = -0.1  # the difference itself: few cases, so the interval is wide
    min_fact_accuracy: float = 0.0
    min_language_fact_accuracy: float = 0.0  # of the language that has the lowest
    min_refusal_accuracy: float = 0.0
    max_case_errors: int = 0  # cases without a reply: such a figure is not the model's
    cases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of_cases(self, label: str) -> Gate:
        """Return the bounds for one case file."""
        own: dict[str, Any] = dict(self.cases.get(label, {}))
        return replace(self, **own)


_OF_CASES = (
    "min_fact_gain",
    "min_fact_gain_mean",
    "min_fact_gain_current",
    "min_refusal_gain_current",
    "min_fact_accuracy",
    "min_language_fact_accuracy",
    "min_refusal_accuracy",
    "max_case_errors",
)


def load_gate(path: Path | None) -> Gate:
    """
    Return the bounds in a TOML file; the default ones without.

    Raises:
        MerchantError: the file is not TOML, or names a bound there is not.
    """
    if path is None:
        return Gate()
    import tomllib

    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{path}: {exc}") from None
    cases = raw.pop("cases", {})
    if not isinstance(cases, dict) or not all(isinstance(bounds, dict) for bounds in cases.values()):
        raise MerchantError(f"{path}, cases: write a table for each file of cases, for instance [cases.second]")
    _check_bounds(path, "", raw, tuple(f.name for f in fields(Gate) if f.name != "cases"))
    for label, bounds in cases.items():
        _check_bounds(path, f"cases.{label}.", bounds, _OF_CASES)
    return Gate(**raw, cases=cases)


def _check_bounds(path: Path, where: str, bounds: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name, value in bounds.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MerchantError(f"{path}, {where}{name}: no such bound, or no number; there are {', '.join(known)}")


class _Checks:
    """What was held against a release so far."""

    def __init__(self) -> None:
        self.n = 0
        self.reasons: list[str] = []

    def hold(self, ok: bool, reason: str) -> None:
        self.n += 1
        if not ok:
            self.reasons.append(reason)


def judge(evaluation: Mapping[str, Any], gate: Gate) -> dict[str, Any]:
    """Return {"passed", "reasons", "n_checks", "bounds"}; a reason names the figure, its value and its bound."""
    candidate, against, cases = evaluation["candidate"], evaluation["against"], evaluation.get("cases", {})
    checks = _Checks()
    n = evaluation["n_held_out"]
    checks.hold(n >= gate.min_held_out, f"{n} held-out dialogues; the bound is {gate.min_held_out}")
    for name, other in against.items():
        bound = gate.max_perplexity_change if name == "base" else gate.max_perplexity_change_current
        if (change := other.get("perplexity_change")) is not None:
            high = change["high"]
            checks.hold(
                high <= bound,
                f"perplexity against {name}: {change['mean']:+.3f}, up to {high:+.3f}; the bound is {bound:+.3f}",
            )
    for label, measured in cases.items():
        _judge_cases(label, measured, gate.of_cases(label), checks)
    for label in gate.cases:
        # Bounds for cases that were not run were not met: a second store left out would else open the gate.
        checks.hold(label in cases, f"cases {label}: not run, and the gate has bounds for them")
    if (value := candidate.get("language_match")) is not None:
        low = gate.min_language_match
        checks.hold(value >= low, f"language_match {value:.3f}; the bound is {low:.3f}")
    if (n := candidate.get("n_forbidden")) is not None:
        checks.hold(n <= gate.max_forbidden, f"{n} replies with forbidden content; the bound is {gate.max_forbidden}")
    if (ratio := candidate.get("length_ratio")) is not None:
        checks.hold(
            ratio <= gate.max_length_ratio,
            f"replies {ratio:.2f} times as long as the humans'; the bound is {gate.max_length_ratio:.2f}",
        )
    compared = any("perplexity_change" in o for o in against.values()) or any(c["against"] for c in cases.values())
    if not compared:
        checks.reasons.append("nothing was compared with the base or the current release")
    return {
        "passed": not checks.reasons, "reasons": checks.reasons, "n_checks": checks.n, "bounds": asdict(gate)
    }  # fmt: skip


def _judge_cases(label: str, measured: Mapping[str, Any], gate: Gate, checks: _Checks) -> None:
    for name, other in measured["against"].items():
        if (gain := other.get("fact_gain")) is not None:
            bound = gate.min_fact_gain if name == "base" else gate.min_fact_gain_current
            checks.hold(
                gain["low"] >= bound,
                f"cases {label}, facts against {name}: {gain['mean']:+.3f}, down to {gain['low']:+.3f}; the bound is {bound:+.3f}",  # noqa: E501
            )
            if name == "base":
                bound = gate.min_fact_gain_mean
                reason = f"cases {label}, facts against base: {gain['mean']:+.3f}; the bound is {bound:+.3f}"
                checks.hold(gain["mean"] >= bound, reason)
        if name == "current" and (gain := other.get("refusal_gain")) is not None:
            bound = gate.min_refusal_gain_current
            reason = f"cases {label}, refusals against current: {gain['mean']:+.3f}; the bound is {bound:+.3f}"
            checks.hold(gain["mean"] >= bound, reason)
    candidate = measured["contestants"].get("candidate", {})
    for figure, low in (("fact_accuracy", gate.min_fact_accuracy), ("refusal_accuracy", gate.min_refusal_accuracy)):
        if (value := candidate.get(figure)) is not None:
            checks.hold(value >= low, f"cases {label}, {figure} {value:.3f}; the bound is {low:.3f}")
    for lang, figures in (candidate.get("by_language") or {}).items():
        if (value := figures.get("fact_accuracy")) is not None:
            low = gate.min_language_fact_accuracy
            checks.hold(value >= low, f"cases {label}, fact_accuracy in {lang} {value:.3f}; the bound is {low:.3f}")
    for name, figures in measured["contestants"].items():
        if (n := figures.get("n_errors")) is not None:
            bound_n = gate.max_case_errors
            checks.hold(n <= bound_n, f"cases {label}, {name}: {n} without a reply; the bound is {bound_n}")
