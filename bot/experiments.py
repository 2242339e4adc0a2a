"""
A live comparison of two releases: who sees which, how many conversations it takes, what came out. No I/O.

An `Experiment` gives each conversation (or signed customer) an arm by a hash of its own name and theirs, so that every
process and every restart gives the same one. The formulas are the textbook's and are held by tests to published values.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from statistics import NormalDist
from typing import Literal

Arm = Literal["control", "candidate"]
Metric = Literal["resolved", "rating", "no_handoff"]
METRICS: tuple[Metric, ...] = ("resolved", "rating", "no_handoff")
ARMS: tuple[Arm, ...] = ("control", "candidate")
FILE = "experiment.json"  # beside the releases' pointer; absent: no experiment
MISMATCH_P = 0.001  # below it the arms' sizes are no chance: something loses or misroutes conversations


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is compared, and what was decided before it began."""

    name: str  # salts the hash: another experiment deals the arms anew
    candidate: str  # a release's name
    control: str | None  # the current release when it began; None: the default model
    share: float  # of the conversations that see the candidate, in (0, 1)
    metric: Metric
    baseline: float  # the metric's rate without the candidate, in (0, 1)
    effect: float  # the least difference worth finding, in (0, 1)
    alpha: float
    power: float
    n_control: int  # conversations each arm needs
    n_candidate: int
    started_at: datetime  # aware

    def arm(self, unit: str) -> Arm:
        """Return the arm of a unit (see `unit_of`): always the same."""
        digest = hashlib.sha256(f"{self.name}\0{unit}".encode()).digest()
        # 53 bits: what a float in [0, 1) holds exactly.
        return "candidate" if (int.from_bytes(digest[:8], "big") >> 11) / 2**53 < self.share else "control"

    def release(self, arm: Arm) -> str | None:
        return self.candidate if arm == "candidate" else self.control


def unit_of(conversation: str, customer: str | None) -> str:
    """Return what is dealt an arm: the customer the store signed for, over all their conversations, else this one."""
    return f"customer:{customer}" if customer else f"conversation:{conversation}"


def parse_experiment(text: str) -> Experiment:
    """
    Return what `dump_experiment` wrote.

    Raises:
        ValueError: it did not write this; the sentence names the field.
    """
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError("no JSON object")
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str, "candidate": str, "control": (str, type(None)), "share": (int, float), "metric": str,
        "baseline": (int, float), "effect": (int, float), "alpha": (int, float), "power": (int, float),
        "n_control": int, "n_candidate": int, "started_at": str,
    }  # fmt: skip
    for field, kind in kinds.items():
        if field not in raw or isinstance(raw[field], bool) or not isinstance(raw[field], kind):
            raise ValueError(f"{field}: missing, or of another kind")
    if raw["metric"] not in METRICS:
        raise ValueError(f"metric: none of {', '.join(METRICS)}")
    if not 0 < raw["share"] < 1:
        raise ValueError("share: not between 0 and 1")
    started_at = datetime.fromisoformat(raw["started_at"])
    if started_at.tzinfo is None:
        raise ValueError("started_at: without a time zone")
    return Experiment(**{field: raw[field] for field in kinds} | {"started_at": started_at})


def dump_experiment(experiment: Experiment) -> str:
    raw = asdict(experiment) | {"started_at": experiment.started_at.isoformat()}
    return json.dumps(raw, ensure_ascii=False, indent=1) + "\n"


# --- How many ---------------------------------------------------------------------------------------------------------


def sample_sizes(
    baseline: float, effect: float, *, share: float = 0.5, alpha: float = 0.05, power: float = 0.8
) -> tuple[int, int]:
    """
    Return (control, candidate): conversations needed to find a difference of `effect` from `baseline`, two-sided.

    Fleiss, Levin & Paik, Statistical Methods for Rates and Proportions, 3rd ed., eq. 4.14 and 4.19 (unequal arms),
    without continuity correction. Of baseline ± effect the one nearer to a half is taken, which needs more.

    Raises:
        ValueError: a value outside of its range; the sentence names it.
    """
    for name, value in (
        ("baseline", baseline),
        ("effect", effect),
        ("share", share),
        ("alpha", alpha),
        ("power", power),
    ):
        if not 0 < value < 1:
            raise ValueError(f"{name}: {value} is not between 0 and 1")
    others = [p for p in (baseline - effect, baseline + effect) if 0 <= p <= 1]
    if not others:
        raise ValueError(f"effect: {effect} from a baseline of {baseline} is no rate")
    other = max(others, key=lambda p: p * (1 - p))
    ratio = share / (1 - share)  # candidate : control
    mean = (baseline + ratio * other) / (1 + ratio)
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    spread = z_alpha * math.sqrt((1 + 1 / ratio) * mean * (1 - mean))
    spread += z_power * math.sqrt(baseline * (1 - baseline) + other * (1 - other) / ratio)
    control = spread**2 / effect**2
    return math.ceil(control), math.ceil(ratio * control)


# --- What came out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """A rate of the candidate less the control's, with its interval."""

    mean: float
    low: float
    high: float
    method: str


def wilson(k: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Return the score interval of k of n (Wilson 1927); (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - alpha / 2)
    p, z2 = k / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends rounding would leave a hair outside.
    low = 0.0 if k == 0 else (middle - half) / (1 + z2 / n)
    return low, 1.0 if k == n else (middle + half) / (1 + z2 / n)


def newcombe(k_new: int, n_new: int, k_old: int, n_old: int, alpha: float = 0.05) -> Difference:
    """Return k_new/n_new - k_old/n_old, its interval from both Wilson intervals (Newcombe 1998, method 10)."""
    if not n_new or not n_old:
        return Difference(0.0, -1.0, 1.0, "newcombe")
    p_new, p_old = k_new / n_new, k_old / n_old
    (low_new, high_new), (low_old, high_old) = wilson(k_new, n_new, alpha), wilson(k_old, n_old, alpha)
    mean = p_new - p_old
    low = mean - math.sqrt((p_new - low_new) ** 2 + (high_old - p_old) ** 2)
    high = mean + math.sqrt((high_new - p_new) ** 2 + (p_old - low_old) ** 2)
    return Difference(mean, low, high, "newcombe")


def clustered(
    new: Sequence[tuple[int, int]], old: Sequence[tuple[int, int]], alpha: float = 0.05, *, n_resamples: int = 2_000,
    seed: int = 0,
) -> Difference:  # fmt: skip
    """
    Return the difference of two rates whose units count more than once: (successes, conversations) of each unit.

    A percentile bootstrap over the units of each arm, since conversations of one customer are not independent.
    """

    def rate(units: Sequence[tuple[int, int]]) -> float:
        return sum(k for k, _ in units) / sum(n for _, n in units)

    if not new or not old:
        return Difference(0.0, -1.0, 1.0, "bootstrap")
    rng = random.Random(seed)
    found = sorted(rate(rng.choices(new, k=len(new))) - rate(rng.choices(old, k=len(old))) for _ in range(n_resamples))
    low, high = (found[round(q * (n_resamples - 1))] for q in (alpha / 2, 1 - alpha / 2))
    return Difference(rate(new) - rate(old), low, high, "bootstrap")


def mismatch_p(n_control: int, n_candidate: int, share: float) -> float:
    """Return how likely sizes this far from `share` are by chance: chi-squared, one degree of freedom."""
    n = n_control + n_candidate
    if n == 0:
        return 1.0
    expected = n * share
    chi2 = (n_candidate - expected) ** 2 / expected + (n_control - (n - expected)) ** 2 / (n - expected)
    return math.erfc(math.sqrt(chi2 / 2))


def as_metric(text: str) -> Metric:
    """Return `text` as a metric; raises ValueError where it is none."""
    if text not in METRICS:
        raise ValueError(f"{text!r} is none of {', '.join(METRICS)}")
    return text
