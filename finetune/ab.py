"""
A live experiment's result: conversations as the log has them -> what each arm came to. Pure.

The unit is what was dealt an arm (a conversation, or a signed customer with all of theirs), never a message. What counts is
written out here, and what does not count is counted by its reason, so that a result can be checked by hand.
"""  # noqa: E501

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from bot.experiments import (
    ARMS,
    METRICS,
    MISMATCH_P,
    Arm,
    Difference,
    Experiment,
    Metric,
    clustered,
    mismatch_p,
    newcombe,
    unit_of,
    wilson,
)
from bot.messages import Event

OPEN = "still open"
OPEN_S = 1800.0  # a conversation whose last event is younger may still go either way, unless it was closed


class Log(Protocol):
    """A conversation with its events, as `bot.storage` reads them."""

    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> datetime: ...
    @property
    def state(self) -> str: ...
    @property
    def customer(self) -> str | None: ...
    @property
    def events(self) -> Sequence[Event]: ...


@dataclass(frozen=True, slots=True)
class Counted:
    """A conversation that one arm answered from its beginning on. A metric is None where it does not apply."""

    unit: str
    arm: Arm
    values: dict[Metric, bool | None]


def first_answered(logs: Iterable[Log], experiment: Experiment) -> datetime | None:
    """
    Return when the first conversation began that the candidate answered; None where it has not answered any.

    Its engine takes a minute to start. Until then every conversation is the control's, so that counting them would
    make that arm too large and the result not to be read.
    """
    began = [log.created_at for log in logs if any(_arm_of(e, experiment) == "candidate" for e in _replies(log))]
    return min((at for at in began if at >= experiment.started_at), default=None)


def count(log: Log, experiment: Experiment, now: datetime, live_at: datetime | None) -> Counted | str:
    """
    Return what a conversation comes to, or why it does not count.

    - It must have begun after the experiment, and every reply of the bot in it must bear the release of the arm it was dealt.
    - One that an agent had before the bot said anything says nothing of the bot. One that an agent took later counts: as
      handed off, hence not resolved; the agent's own messages and their ratings count for nothing.
    """  # noqa: E501
    if log.created_at < experiment.started_at:
        return "began before the experiment"
    if live_at is None or log.created_at < live_at:
        return "began before the candidate was live"
    values = values_of(log, now)
    if isinstance(values, str) and values != OPEN:
        return values
    unit = unit_of(log.id, log.customer)
    dealt, seen = experiment.arm(unit), {_arm_of(e, experiment) for e in _replies(log)}
    if "other" in seen:
        return "another release"
    if len(seen) > 1:
        return "both arms"
    if seen != {dealt}:
        return "not the arm it was dealt"
    return values if isinstance(values, str) else Counted(unit, dealt, values)


def values_of(log: Log, now: datetime) -> dict[Metric, bool | None] | str:
    """
    Return every metric of a conversation, whoever answered it, or why it has none.

    resolved    no human was asked for, the last reply answered something, and no reply was rated down
    rating      no reply of the bot was rated down, where one was rated; else a closing score of 4 or 5
    no_handoff  no human was asked for
    """
    replies = _replies(log)
    human = [e.seq for e in log.events if _is_human(e)]
    if not replies:
        return "no reply of the bot"
    if human and human[0] < replies[0].seq:
        return "an agent before the bot"
    if log.state != "closed" and now - log.events[-1].at < timedelta(seconds=OPEN_S):
        return OPEN
    own = {e.seq for e in replies}
    ratings = {e.data["rated"]: e.data["value"] for e in log.events if e.kind == "rating" and e.data["rated"] in own}
    scores = [e.data["score"] for e in log.events if e.kind == "state" and e.data.get("score") is not None]
    rated: bool | None = None
    if ratings:
        rated = "down" not in ratings.values()
    elif scores and not human:  # with a human in it, the score at the end is not the bot's
        rated = scores[-1] >= 4
    resolved = not human and replies[-1].data.get("outcome") in ("direct", "generated") and rated is not False
    return {"resolved": resolved, "rating": rated, "no_handoff": not human}


def baseline_of(logs: Iterable[Log], metric: Metric, now: datetime) -> tuple[int, int]:
    """Return (good, all) conversations by `metric`, whatever answered them: the rate that an experiment starts from."""
    found = [values_of(log, now) for log in logs]
    values = [v[metric] for v in found if not isinstance(v, str) and v[metric] is not None]
    return sum(map(bool, values)), len(values)


def _replies(log: Log) -> list[Event]:
    return [e for e in log.events if e.kind == "message" and e.role == "bot"]


def _is_human(event: Event) -> bool:
    """Whether a human was asked for or said something."""
    return event.role == "agent" or (event.kind == "state" and event.data.get("state") in ("waiting", "human"))


def _arm_of(reply: Event, experiment: Experiment) -> str:
    adapter = (reply.data.get("release") or {}).get("adapter")
    return next((arm for arm in ARMS if experiment.release(arm) == adapter), "other")


def result(experiment: Experiment, logs: Iterable[Log], now: datetime, *, current: str | None) -> dict[str, Any]:
    """Return what `ab status` prints: experiment, arms, difference, verdict. `current` is the current release now."""
    counted: list[Counted] = []
    excluded: Counter[str] = Counter()
    logs = list(logs)
    live_at = first_answered(logs, experiment)
    for log in logs:
        found = count(log, experiment, now, live_at)
        if isinstance(found, str):
            excluded[found] += 1
        else:
            counted.append(found)
    n_units = {arm: len({c.unit for c in counted if c.arm == arm}) for arm in ARMS}
    p = mismatch_p(n_units["control"], n_units["candidate"], experiment.share)
    metrics = {metric: _measured(metric, counted, experiment) for metric in METRICS}
    main = metrics[experiment.metric]
    needed = {"control": experiment.n_control, "candidate": experiment.n_candidate}
    enough = all(main["arms"][arm]["n_units"] >= needed[arm] for arm in ARMS)
    return {
        "experiment": asdict(experiment) | {"started_at": experiment.started_at.isoformat()},
        "at": now.isoformat(timespec="seconds"),
        "n_units": n_units,
        "excluded": dict(excluded.most_common()),
        "sample_ratio": {"expected": experiment.share, "p": p, "ok": p >= MISMATCH_P},
        "needed": needed,
        "enough": enough,
        "current": current,
        "verdict": _verdict(main, needed, enough, p, experiment, current),
        **main,
        "others": {metric: found for metric, found in metrics.items() if metric != experiment.metric},
    }


def _measured(metric: Metric, counted: Sequence[Counted], experiment: Experiment) -> dict[str, Any]:
    """Return the arms' rates of a metric and their difference."""
    units: dict[Arm, dict[str, tuple[int, int]]] = {arm: {} for arm in ARMS}
    for each in counted:
        value = each.values[metric]
        if value is not None:
            k, n = units[each.arm].get(each.unit, (0, 0))
            units[each.arm][each.unit] = (k + value, n + 1)
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        k, n = (sum(x[i] for x in units[arm].values()) for i in (0, 1))
        low, high = wilson(k, n, experiment.alpha)
        arms[arm] = {
            "release": experiment.release(arm),
            "n_units": len(units[arm]),
            "n": n,
            "n_good": k,
            "rate": k / n if n else None,
            "low": low,
            "high": high,
        }
    new, old = arms["candidate"], arms["control"]
    difference: Difference | None = None
    if new["n"] and old["n"]:
        alone = all(arms[arm]["n"] == arms[arm]["n_units"] for arm in ARMS)
        if alone:
            difference = newcombe(new["n_good"], new["n"], old["n_good"], old["n"], experiment.alpha)
        else:
            of_new, of_old = list(units["candidate"].values()), list(units["control"].values())
            difference = clustered(of_new, of_old, experiment.alpha)
    return {"metric": metric, "arms": arms, "difference": asdict(difference) if difference else None}


def _verdict(
    main: dict[str, Any], needed: dict[str, int], enough: bool, p: float, experiment: Experiment, current: str | None
) -> str:
    if current != experiment.control:
        was, now = (name or "the default model" for name in (experiment.control, current))
        return f"not to be read: it compares with {was}, and the current release is {now} since; stop it"
    if p < MISMATCH_P:
        return (
            f"not to be read: the arms' sizes do not fit a share of {experiment.share:g} (p {p:.2g}); "
            "something loses or misroutes conversations"
        )
    if not enough:
        have = ", ".join(f"{arm} {main['arms'][arm]['n_units']} of {needed[arm]}" for arm in ARMS)
        return f"too early: {have}"
    found = main["difference"]
    if found["low"] > 0:
        return "the candidate is better"
    if found["high"] < 0:
        return "the candidate is worse"
    return "no difference found"


def text_of(found: dict[str, Any]) -> str:
    """Return a result as lines for a terminal."""
    experiment = found["experiment"]
    lines = [f"{experiment['name']}: {found['verdict']}", f"metric {found['metric']}, since {experiment['started_at']}"]
    for measured in (found, *found["others"].values()):
        if measured is not found:
            lines.append(f"also {measured['metric']}")
        for arm in ARMS:
            a = measured["arms"][arm]
            rate = "–" if a["rate"] is None else f"{a['rate']:.1%} [{a['low']:.1%}, {a['high']:.1%}]"
            lines.append(f"  {arm} ({a['release'] or 'the default model'}): {a['n_good']} of {a['n']}, {rate}")
        if (d := measured["difference"]) is not None:
            lines.append(f"  difference {d['mean']:+.1%} [{d['low']:+.1%}, {d['high']:+.1%}], {d['method']}")
    ratio = found["sample_ratio"]
    lines.append(f"sample ratio: {'as expected' if ratio['ok'] else 'WRONG'} (p {ratio['p']:.2g})")
    if found["excluded"]:
        lines.append("not counted: " + ", ".join(f"{n} {why}" for why, n in found["excluded"].items()))
    return "\n".join(lines)
