"""
When agents are there: business hours, holidays, and how long a wait may be. Pure; the clock is the caller's.

Knows a week, days off and a time zone; does not know who is signed in. `bot.settings` reads them from store.toml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, tzinfo
from statistics import median

DAY_MIN = 24 * 60
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
HORIZON_DAYS = 400  # a store that does not open within a year does not open

_SPAN = re.compile(r"^(\d{1,2})[:：](\d{2})\s*(?:-|–|—|~|～|to|至|到)\s*(\d{1,2})[:：](\d{2})$", re.IGNORECASE)
_LINE = re.compile(r"^(?P<days>.*?)[\s:,，]*(?P<span>\d{1,2}[:：]\d{2}.*)$")
_ZH_DAYS = str.maketrans("一二三四五六日天", "01234566")


@dataclass(frozen=True, slots=True)
class Span:
    """Open from minute `begin` of a day until `end`, exclusive; over 1440 where it goes on past midnight."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Hours:
    """A week of opening hours, Monday first, in the store's zone, and the days off."""

    week: tuple[tuple[Span, ...], ...]
    zone: tzinfo
    holidays: frozenset[date] = frozenset()
    yearly: frozenset[tuple[int, int]] = frozenset()  # (month, day) of each year

    def is_open(self, now: datetime) -> bool:
        """Return whether agents are on duty at `now` (aware)."""
        local = now.astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        today, yesterday = local.date(), local.date() - timedelta(days=1)
        return any(s.begin <= minute < s.end for s in self._on(today)) or any(
            minute < s.end - DAY_MIN for s in self._on(yesterday)
        )

    def next_opening(self, now: datetime) -> datetime | None:
        """Return when they are next on duty, `now` itself where they are; None where that is never."""
        if self.is_open(now):
            return now
        local = now.astimezone(self.zone)
        for n in range(HORIZON_DAYS):
            day = local.date() + timedelta(days=n)
            for span in sorted(self._on(day), key=lambda s: s.begin):
                opening = datetime.combine(day, time(span.begin // 60, span.begin % 60), self.zone)
                if opening > local:
                    return opening
        return None

    def _on(self, day: date) -> tuple[Span, ...]:
        if day in self.holidays or (day.month, day.day) in self.yearly:
            return ()
        return self.week[day.weekday()]


def parse_span(text: str) -> Span:
    """Return "09:00-21:00" as a Span; an end at or before its begin is on the next day. Raises ValueError."""
    match = _SPAN.match(text.strip())
    if match is None:
        raise ValueError(f'{text!r} is no span of hours; write "09:00-21:00"')
    h1, m1, h2, m2 = (int(g) for g in match.groups())
    if max(m1, m2) > 59 or h1 > 23 or h2 * 60 + m2 > DAY_MIN:
        raise ValueError(f"{text!r}: hours go from 00:00 to 24:00")
    begin, end = h1 * 60 + m1, h2 * 60 + m2
    return Span(begin, end if end > begin else end + DAY_MIN)


def parse_days(text: str) -> tuple[int, ...]:
    """
    Return the weekdays of "Mon-Fri", "mon,wed", "daily", "周一至周五", "每天" (0 is Monday); all where it is empty.

    Raises:
        ValueError: not readable.
    """
    cleaned = re.sub(r"(?:星期|礼拜|周)", "", text.strip().lower())
    if cleaned in ("", "daily", "every day", "每天", "每日", "天天", "mon-sun"):
        return tuple(range(7))
    cleaned = cleaned.replace("工作日", "一至五").translate(_ZH_DAYS)
    days: list[int] = []
    for part in re.split(r"[,，、/&]|\band\b|和|及", cleaned):
        ends = [_day(end) for end in re.split(r"-|–|—|~|～|\bto\b|至|到", part.strip()) if end.strip()]
        if len(ends) == 1:
            days += ends
        elif len(ends) == 2:
            n = (ends[1] - ends[0]) % 7
            days += [(ends[0] + i) % 7 for i in range(n + 1)]
        else:
            raise ValueError(f'{text!r} are no weekdays; write "Mon-Fri"')
    return tuple(dict.fromkeys(days))


def parse_line(text: str) -> tuple[tuple[Span, ...], ...]:
    """Return the week of a line such as "Mon-Sun 09:00-21:00" or "09:00-18:00". Raises ValueError."""
    match = _LINE.match(text.strip())
    if match is None:
        raise ValueError(f'{text!r}: no hours in it; write "Mon-Sun 09:00-21:00"')
    span, days = parse_span(match["span"]), parse_days(match["days"])
    return tuple((span,) if day in days else () for day in range(7))


def parse_day_off(text: str) -> tuple[frozenset[date], frozenset[tuple[int, int]]]:
    """
    Return what one entry of `holidays` means: "2027-02-05", "2027-02-05/2027-02-09", or "12-25" for every year.

    Raises:
        ValueError: none of these.
    """
    text = text.strip()
    if re.fullmatch(r"\d{1,2}-\d{1,2}", text):
        month, day = (int(n) for n in text.split("-"))
        date(2024, month, day)  # a leap year: 02-29 is a day
        return frozenset(), frozenset({(month, day)})
    first, _, last = text.partition("/")
    begin, end = date.fromisoformat(first), date.fromisoformat(last or first)
    if end < begin or (end - begin).days > 366:
        raise ValueError(f"{text!r}: the end is before the beginning, or more than a year after it")
    return frozenset(begin + timedelta(days=n) for n in range((end - begin).days + 1)), frozenset()


def _day(text: str) -> int:
    text = text.strip()
    if text.isdigit() and int(text) < 7:
        return int(text)
    if text[:3] in DAYS:
        return DAYS.index(text[:3])
    raise ValueError(f"{text!r} is no weekday")


def expected_wait_s(
    position: int, n_agents: int, n_human: int, handling_s: Sequence[float], *, per_agent: int, least: int = 3
) -> float | None:
    """
    Return how long the one at `position` (1 is next) may have to wait, or None where nobody can know.

    Places free up at the rate of recent handling times: with s = agents x places, one every median / s seconds.

    Args:
        n_agents: who is there and not away.
        n_human: conversations they have already.
        handling_s: recent times from accepting to the end.
        per_agent: conversations one agent has at a time.
        least: with fewer recent ones than this there is nothing to go by.
    """
    if n_agents < 1 or len(handling_s) < least:
        return None
    n_places = n_agents * per_agent
    ahead = position - max(0, n_places - n_human)  # how many have to leave before a place is free for this one
    return max(0, ahead) * median(handling_s) / n_places
