"""bot/experiments.py: arms by hash, sample sizes and intervals, held to published values."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bot.experiments import (
    Experiment,
    clustered,
    dump_experiment,
    mismatch_p,
    newcombe,
    parse_experiment,
    sample_sizes,
    unit_of,
    wilson,
)

ROOT = Path(__file__).parents[2]
STARTED = datetime(2026, 11, 22, tzinfo=UTC)
EXPERIMENT = Experiment("e1", "new", "old", 0.3, "resolved", 0.6, 0.05, 0.05, 0.8, 100, 50, STARTED)


def test_a_unit_has_one_arm_in_every_process() -> None:
    units = [f"conversation:{n}" for n in range(50)]
    here = [EXPERIMENT.arm(unit) for unit in units]
    code = "import sys; from bot.experiments import parse_experiment as p; e = p(sys.argv[1])\n"
    code += "print([e.arm(f'conversation:{n}') for n in range(50)])"
    command = [sys.executable, "-c", code, dump_experiment(EXPERIMENT)]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(here)
    assert {"control", "candidate"} == set(here)


def test_arms_have_their_share_and_another_experiment_deals_anew() -> None:
    units = [f"conversation:{n}" for n in range(20_000)]
    candidates = {unit for unit in units if EXPERIMENT.arm(unit) == "candidate"}
    assert abs(len(candidates) / 20_000 - 0.3) < 0.012  # four standard deviations
    other = replace(EXPERIMENT, name="e2")
    both = sum(other.arm(unit) == "candidate" for unit in candidates)
    assert abs(both / len(candidates) - 0.3) < 0.025  # independent of the first
    assert [replace(EXPERIMENT, share=0.6).arm(u) for u in candidates] == ["candidate"] * len(candidates)


def test_a_signed_customer_is_one_unit_over_all_their_conversations() -> None:
    assert unit_of("c_1", "anna") == unit_of("c_2", "anna")
    assert unit_of("c_1", None) != unit_of("c_2", None)
    assert unit_of("anna", None) != unit_of("c_1", "anna")


@pytest.mark.parametrize(
    ("p1", "p2", "power", "n"),
    [
        (0.5, 0.75, 0.9, 77),  # R: power.prop.test(p1 = .50, p2 = .75, power = .90), n = 76.7
        (0.5, 0.6, 0.8, 388),  # R: power.prop.test(p1 = .5, p2 = .6, power = .8), n = 387.3
        (0.1, 0.15, 0.8, 686),  # R: power.prop.test(p1 = .1, p2 = .15, power = .8), n = 685.6
    ],
)
def test_sample_sizes_are_those_of_r(p1: float, p2: float, power: float, n: int) -> None:
    assert sample_sizes(p1, p2 - p1, power=power) == (n, n)


def test_of_both_directions_the_one_that_needs_more_decides() -> None:
    assert sample_sizes(0.4, 0.1) == sample_sizes(0.5, 0.1) == sample_sizes(0.6, 0.1)
    assert sample_sizes(0.97, 0.05) < sample_sizes(0.92, 0.05)  # 1.02 is no rate, 0.87 is


def test_unequal_arms_reach_the_power_they_were_computed_for() -> None:
    n_old, n_new = sample_sizes(0.3, 0.1, share=0.2)
    assert n_new == math.ceil(n_old / 4) or abs(n_new - n_old / 4) < 1
    rng = random.Random(7)

    def drawn(n: int, p: float) -> int:
        return sum(rng.random() < p for _ in range(n))

    found = 0
    for _ in range(800):
        k_old, k_new = drawn(n_old, 0.3), drawn(n_new, 0.4)
        pooled = (k_old + k_new) / (n_old + n_new)
        z = (k_new / n_new - k_old / n_old) / math.sqrt(pooled * (1 - pooled) * (1 / n_old + 1 / n_new))
        found += abs(z) > 1.959964
    assert 0.75 < found / 800 < 0.85


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("baseline", (1.0, 0.05)),
        ("effect", (0.5, 0.0)),
        ("effect", (0.5, 0.6)),
        ("share", (0.5, 0.1, 1.0)),
        ("power", (0.5, 0.1, 0.5, 1.0)),
    ],
)
def test_what_is_no_rate_is_named(name: str, arguments: tuple[float, ...]) -> None:
    baseline, effect, *rest = arguments
    options = dict(zip(("share", "power"), rest, strict=False))
    with pytest.raises(ValueError, match=name):
        sample_sizes(baseline, effect, **options)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_the_score_interval_of_a_rate(k: int, n: int, low: float, high: float) -> None:
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("new", "old", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0000),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_the_interval_of_a_difference(new: tuple[int, int], old: tuple[int, int], low: float, high: float) -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 873-890, table II, method 10.
    found = newcombe(*new, *old)
    assert found.mean == pytest.approx(new[0] / new[1] - old[0] / old[1])
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)


def test_conversations_of_one_customer_are_not_independent() -> None:
    alone = [(n % 2, 1) for n in range(200)]
    ten_times = [(10 * (n % 2), 10) for n in range(20)]
    narrow, wide = clustered(alone, alone), clustered(ten_times, ten_times)
    assert narrow.mean == wide.mean == 0.0
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)  # the square root of ten
    by_formula = newcombe(100, 200, 100, 200)
    assert narrow.high - narrow.low == pytest.approx(by_formula.high - by_formula.low, rel=0.12)


def test_arms_of_the_wrong_size_show() -> None:
    assert mismatch_p(469, 531, 0.5) == pytest.approx(0.0499, abs=2e-4)  # chi-squared 3.844
    assert mismatch_p(500, 500, 0.5) == 1.0
    assert mismatch_p(9_000, 1_300, 0.1) < 1e-6
    assert mismatch_p(0, 0, 0.5) == 1.0


def test_an_experiment_is_read_as_it_was_written_and_a_spoilt_one_names_its_field() -> None:
    text = dump_experiment(EXPERIMENT)
    assert parse_experiment(text) == EXPERIMENT
    raw = json.loads(text)
    for field, value, words in (
        ("share", 1.5, "share"),
        ("metric", "clicks", "metric"),
        ("candidate", None, "candidate"),
        ("started_at", "2026-11-22T00:00:00", "time zone"),
        ("n_control", "many", "n_control"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_experiment(json.dumps(raw | {field: value}))
    with pytest.raises(ValueError, match="no JSON object"):
        parse_experiment("[]")
