"""
When an offer repeats: "every Friday 18:00-22:00", "每月8日", an RFC 5545 rule -> is it on now, when next. No I/O.

Knows calendars, time zones and how merchants write a repetition in Chinese and English; knows nothing of passages.
Every way of writing becomes one RRULE (which days) and one list of hours (when on those days); python-dateutil reckons
the days, a year at a time and remembered, so that asking is two look-ups in a set. Days and hours are the store's own
wall clock; what is compared are instants, so that the hour a daylight-saving change repeats or leaves out does no harm.
"""

from __future__ import annotations

import re
import unicodedata
from calendar import isleap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import MAXYEAR, date, datetime, time, timedelta, timezone, tzinfo
from functools import lru_cache
from itertools import pairwise
from zoneinfo import ZoneInfo

from dateutil.rrule import rrulestr

MAX_CHARS = 300
FIRST_YEAR, LAST_YEAR = 1970, 2199  # outside of them nothing repeats: what a calendar is asked stays bounded
LOOK_AHEAD_YEARS = 9  # 29 February may be eight years away
REMEDY = (
    'write "every weekend", "every Friday 18:00-22:00", "8th of every month", "每周五18:00-22:00", "每月8日" or an RRULE'
    ' such as "FREQ=MONTHLY;BYMONTHDAY=8"'
)

_DAYS = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")
_DAYS_EN = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DAYS_ZH = ("周一", "周二", "周三", "周四", "周五", "周六", "周日")
_MONTHS_EN = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_ORDINALS_EN = {1: "first", 2: "second", 3: "third", 4: "fourth", 5: "fifth", -1: "last", -2: "second to last"}
_ORDINALS_ZH = {1: "第一个", 2: "第二个", 3: "第三个", 4: "第四个", 5: "第五个", -1: "最后一个", -2: "倒数第二个"}
_FREQUENCIES = ("DAILY", "WEEKLY", "MONTHLY", "YEARLY")
_PARTS = ("FREQ", "INTERVAL", "BYDAY", "BYMONTHDAY", "BYMONTH", "BYHOUR", "COUNT", "UNTIL", "WKST")

Hours = tuple[int, int]  # minutes since midnight: from, until; an end at or before the start is on the next day
ALL_DAY: Hours = (0, 1440)


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Days that repeat, and the hours of such a day. Made by `parse_repeats`; equal ones hold at the same times."""

    text: str  # as the merchant wrote it
    zone: tzinfo
    rule: str = field(compare=False)  # the RRULE it was read as, with its DTSTART where it needs one
    start: date  # where intervals are counted from; one and the same day where nothing is counted
    hours: tuple[Hours, ...] = field(default=(ALL_DAY,), compare=False)

    def holds(self, now: datetime) -> bool:
        """Return whether `now` (aware) lies in one of the windows; some microseconds, milliseconds once a year."""
        moment = now.timestamp()
        today = now.astimezone(self.zone).date()
        # Yesterday's too: "Friday 22:00-02:00" is still on early on Saturday.
        days = (today, today - timedelta(days=1)) if self._over_midnight() else (today,)
        for day in days:
            if self._falls_on(day):
                for hours in self.hours:
                    begins, ends = self._instants(day, hours)
                    if begins <= moment < ends:
                        return True
        return False

    def next_start(self, after: datetime) -> datetime | None:
        """Return when the next window begins, at `after` (aware) or later, in the store's offset of that day."""
        moment = after.timestamp()
        for window in self.windows(after.astimezone(self.zone).date()):
            if window[0].timestamp() >= moment:
                return window[0]
        return None

    def window_end(self, now: datetime) -> datetime | None:
        """Return when the window that holds at `now` ends; None where none does."""
        moment = now.timestamp()
        for begins, ends in self.windows(now.astimezone(self.zone).date() - timedelta(days=1)):
            if begins.timestamp() > moment:
                return None
            if moment < ends.timestamp():
                return ends
        return None

    def last_end(self, before: datetime) -> datetime | None:
        """Return when the last window that began before `before` ended, at the latest `before`; None if none did."""
        day = before.astimezone(self.zone).date()
        for year in range(day.year, max(FIRST_YEAR, day.year - LOOK_AHEAD_YEARS) - 1, -1):
            for found in sorted(_days_of(self.rule, self.start, year), reverse=True):
                if found > day:
                    continue
                ends = [self._moments(found, hours) for hours in reversed(self.hours)]
                begun = [min(end, before, key=datetime.timestamp) for begin, end in ends if begin < before]
                if begun:
                    return max(begun, key=datetime.timestamp).astimezone(self.zone)
        return None

    def windows(self, day: date) -> Iterator[tuple[datetime, datetime]]:
        """Yield beginnings and ends (aware) of the windows of `day` and later, in order, some years ahead."""
        for year in range(day.year, day.year + LOOK_AHEAD_YEARS):
            for found in sorted(_days_of(self.rule, self.start, year)):
                if found >= day:
                    for hours in self.hours:
                        yield self._moments(found, hours)

    def describe(self, lang: str) -> str:
        """Return the repetition as a visitor reads it: 每周六、周日 / every Saturday and Sunday."""
        return _describe_zh(self) if lang == "zh" else _describe_en(self)

    def _over_midnight(self) -> bool:
        return any(end <= begin for begin, end in self.hours)

    def _falls_on(self, day: date) -> bool:
        return day in _days_of(self.rule, self.start, day.year)

    def _instants(self, day: date, hours: Hours) -> tuple[float, float]:
        begins, ends = self._moments(day, hours)
        return begins.timestamp(), ends.timestamp()

    def _moments(self, day: date, hours: Hours) -> tuple[datetime, datetime]:
        begin, end = hours
        if end <= begin:
            end += 1440
        return _at(day, begin, self.zone), _at(day, end, self.zone)


def _at(day: date, minute: int, zone: tzinfo) -> datetime:
    """Return that wall-clock minute of `day` with the offset it has there, fixed."""
    day += timedelta(days=minute // 1440)
    # Of an hour that is repeated the first counts; one that is left out is told by the clock after it. The offset is
    # fixed: times of one ZoneInfo are compared by their wall clocks, which is wrong in an hour that is repeated.
    moment = datetime.combine(day, time(minute % 1440 // 60, minute % 60), zone).timestamp()
    local = datetime.fromtimestamp(moment, zone)
    return local.replace(tzinfo=timezone(local.utcoffset() or timedelta()))


@lru_cache(maxsize=4096)
def _days_of(rule: str, start: date, year: int) -> frozenset[date]:
    """Return the days of `year` on which `rule`, counted from `start`, falls; at most 366."""
    if not max(FIRST_YEAR, start.year) <= year <= LAST_YEAR:
        return frozenset()
    parts = _parts(rule)
    left = int(parts["COUNT"]) if "COUNT" in parts else None
    if left is not None:
        left -= sum(len(_days_of(rule.replace("COUNT=", "_="), start, before)) for before in range(start.year, year))
    until = datetime.strptime(parts["UNTIL"], "%Y%m%dT%H%M%S").date() if "UNTIL" in parts else date.max
    base = ";".join(f"{name}={parts[name]}" for name in ("FREQ", "BYDAY", "BYMONTHDAY", "BYMONTH") if name in parts)
    days = [date(year, *of_year) for of_year in _base_days(base, date(year, 1, 1).weekday(), isleap(year))]
    kept = [day for day in days if start <= day <= until and _is_turn(parts, start, day)]
    return frozenset(kept if left is None else kept[: max(left, 0)])


@lru_cache(maxsize=4096)
def _base_days(base: str, weekday: int, leap: bool) -> tuple[tuple[int, int], ...]:
    """Return (month, day) of each day of a year that begins on `weekday` on which a rule without counting falls."""
    # Of years alike the last but one there is: what never falls is looked for until the year 9999, and no further.
    alike = (y for y in range(MAXYEAR - 1, 0, -1) if (date(y, 1, 1).weekday(), isleap(y)) == (weekday, leap))
    year = next(alike)
    moments = rrulestr(base, dtstart=datetime(year, 1, 1))
    found: list[tuple[int, int]] = []
    # dateutil may walk over the end of the calendar where a rule does not fall any more.
    with suppress(ValueError):
        for moment in moments:
            if moment.year > year:
                break
            found.append((moment.month, moment.day))
    return tuple(found)


def _is_turn(parts: dict[str, str], start: date, day: date) -> bool:
    """Return whether an INTERVAL of 2 and more counts `day` in."""
    frequency, interval = parts["FREQ"], int(parts.get("INTERVAL", "1"))
    if frequency == "DAILY":
        return (day - start).days % interval == 0
    if frequency == "WEEKLY":
        first_of_week = _DAYS.index(parts.get("WKST", "MO"))
        weeks = (day.toordinal() - 1 - first_of_week) // 7 - (start.toordinal() - 1 - first_of_week) // 7
        return weeks % interval == 0
    months = (day.year - start.year) * 12 + day.month - start.month
    return (months if frequency == "MONTHLY" else day.year - start.year) % interval == 0


def _is_counted(rule: str) -> bool:
    return "INTERVAL=" in rule or "COUNT=" in rule


# --- reading ----------------------------------------------------------------------------------------------------------


def parse_repeats(text: str, zone: tzinfo, start: datetime | None = None) -> Recurrence:
    """
    Return the repetition that `text` says, counted from `start` (aware; only "every second week" and COUNT need it).

    Raises:
        ValueError: it is none; the message names what is wrong, in one line.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text)} characters are too long for a repetition; {REMEDY}")
    said = " ".join(unicodedata.normalize("NFKC", text).replace("–", "-").replace("—", "-").split())
    anywhere = date(FIRST_YEAR, 1, 1)
    start_day = anywhere if start is None else start.astimezone(zone).date()
    if not FIRST_YEAR <= start_day.year <= LAST_YEAR:
        raise ValueError(f"a repetition from the year {start_day.year} on is out of range")
    rest, hours = _take_hours(said)
    if re.match(r"(?:RRULE\s*:|DTSTART|FREQ\s*=)|.*\bFREQ\s*=", rest, re.IGNORECASE):
        rule, anywhere, by_hour = _rrule(rest, start_day, counted=start is not None)
        if hours and by_hour:
            raise ValueError("has BYHOUR and hours besides; give one of the two")
        hours = hours or by_hour
    else:
        rule = _plain_rule(rest)
        if _is_counted(rule):
            if start is None:
                raise ValueError("counts from a first day; fill in the start (valid_from or starts_at)")
            anywhere = start_day
    start_day = anywhere
    try:
        first_year = start_day.year if start_day.year > FIRST_YEAR else 2024
        years = range(first_year, min(first_year + LOOK_AHEAD_YEARS, LAST_YEAR + 1))
        falls = any(_days_of(rule, start_day, year) for year in years)
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError, IndexError) as exc:
        raise ValueError(f"is no repetition that a calendar knows ({exc}); {REMEDY}") from exc
    if not falls:
        raise ValueError(f"falls on no day at all; {REMEDY}")
    return Recurrence(text.strip(), zone, rule, start_day, hours or (ALL_DAY,))


def _rrule(text: str, start: date, *, counted: bool) -> tuple[str, date, tuple[Hours, ...]]:
    """Return an RRULE without its hours, the day it counts from (or any, where it does not count), and the hours."""
    match = re.fullmatch(
        r"(?:DTSTART[^:]*:\s*(\d{8})(?:T\d{6}Z?)?[\s;]+)?(?:RRULE\s*:\s*)?([A-Z]+\s*=[^\s].*)", text, re.IGNORECASE
    )
    if match is None:
        raise ValueError(f"is no RRULE; {REMEDY}")
    dated = False
    if match[1]:
        start, counted, dated = datetime.strptime(match[1], "%Y%m%d").date(), True, True
    parts: dict[str, str] = {}
    for part in match[2].strip("; ").split(";"):
        name, sign, value = (piece.strip().upper() for piece in part.partition("="))
        if not sign or not value or name in parts or name not in _PARTS:
            raise ValueError(f"{part[:30]!r} is no part of an RRULE that is read here; use {', '.join(_PARTS)}")
        parts[name] = value
    if parts.get("FREQ") not in _FREQUENCIES:
        raise ValueError(f"FREQ must be {', '.join(_FREQUENCIES[:-1])} or {_FREQUENCIES[-1]}")
    for name, most in (("INTERVAL", 366), ("COUNT", 3660)):
        if name in parts and not (parts[name].isdecimal() and 1 <= int(parts[name]) <= most):
            raise ValueError(f"{name} must be a whole number from 1 to {most}")
    if parts.get("INTERVAL", "").strip("0") == "1":
        del parts["INTERVAL"]
    if ("COUNT" in parts or "INTERVAL" in parts) and not counted:
        raise ValueError("counts from a first day; fill in the start (valid_from or starts_at), or give a DTSTART")
    for name, most in (("BYMONTHDAY", 31), ("BYMONTH", 12)):
        for value in parts[name].split(",") if name in parts else ():
            if (
                not re.fullmatch(r"[+-]?\d{1,2}", value)
                or not 1 <= abs(int(value)) <= most
                or value[0] + name == "-BYMONTH"
            ):
                raise ValueError(f"{name} must be whole numbers from 1 to {most}")
    if parts.get("WKST", "MO") not in _DAYS:
        raise ValueError("WKST must be one of MO, TU, WE, TH, FR, SA, SU")
    hours: tuple[Hours, ...] = ()
    if "BYHOUR" in parts:
        values = parts.pop("BYHOUR").split(",")
        if not all(value.isdecimal() and int(value) < 24 for value in values):
            raise ValueError("BYHOUR must be hours from 0 to 23")
        hours = _joined(sorted({int(value) for value in values}))
    if "UNTIL" in parts:  # its day counts in full, in the store's zone; a rule without a time is all this file hands on
        until = re.fullmatch(r"(\d{8})(?:T\d{6}Z?)?", parts["UNTIL"])
        if until is None:
            raise ValueError("UNTIL must be a day such as 20261231")
        parts["UNTIL"] = f"{until[1]}T000000"
    # Without a day of its own a rule takes that of its start; which is then part of the rule, not of when it was read.
    if not {"BYDAY", "BYMONTHDAY"} & parts.keys():
        if parts["FREQ"] != "DAILY" and not counted:
            raise ValueError("names no day; add BYDAY or BYMONTHDAY")
        if parts["FREQ"] == "WEEKLY":
            parts["BYDAY"] = _DAYS[start.weekday()]
        elif parts["FREQ"] != "DAILY":
            parts["BYMONTHDAY"] = str(start.day)
            if parts["FREQ"] == "YEARLY":
                parts.setdefault("BYMONTH", str(start.month))
    rule = ";".join(f"{name}={parts[name]}" for name in _PARTS if name in parts)
    return rule, start if dated or _is_counted(rule) else date(FIRST_YEAR, 1, 1), hours


def _joined(hours: list[int]) -> tuple[Hours, ...]:
    """Return whole hours as windows: 18, 19, 20 -> 18:00 to 21:00."""
    found: list[list[int]] = []
    for hour in hours:
        if found and found[-1][1] == hour * 60:
            found[-1][1] += 60
        else:
            found.append([hour * 60, hour * 60 + 60])
    return tuple((begin, end) for begin, end in found)


_CLOCK = r"(\d{1,2})(?:(?:[:点時时]|\s*h\s*)(\d{2})?分?)?(半)?\s*(am|pm|a\.m\.|p\.m\.)?"
_PERIOD_ZH = r"(凌晨|早上|上午|中午|下午|傍晚|晚上|晚间|晚|夜里)?"
_HOURS = re.compile(
    rf"(?:\b(?:from|between)\s+)?{_PERIOD_ZH}\s*{_CLOCK}\s*(?:-|~|to|until|till|and|至|到)\s*(?:次日|第二天|翌日)?{_PERIOD_ZH}\s*{_CLOCK}(?![\d月号日])",
    re.IGNORECASE,
)


def _take_hours(text: str) -> tuple[str, tuple[Hours, ...]]:
    """Return `text` without its hours, and these."""
    hours: list[Hours] = []

    def read(match: re.Match[str]) -> str:
        part_a, hour_a, minute_a, half_a, noon_a, part_b, hour_b, minute_b, half_b, noon_b = match.groups()
        shown = match.group()
        # "8-10" alone are days of a month; hours have a colon, 点, am or pm somewhere.
        if not (re.search(r"[:点时時]", shown) or noon_a or noon_b or part_a):
            return shown
        if noon_b and not noon_a and hour_a:  # "6-10pm"
            noon_a = noon_b if int(hour_a) <= int(hour_b) or int(hour_b) == 12 else None
        begin = _minute(hour_a, minute_a, half_a, noon_a, part_a)
        end = _minute(hour_b, minute_b, half_b, noon_b, part_b or (part_a if int(hour_b) >= int(hour_a) else None))
        if begin >= 1440:
            raise ValueError(f"{shown.strip()!r} begins after the day is over; write 00:00")
        if begin == end:
            raise ValueError(f"{shown.strip()!r} begins and ends at once; correct the hours")
        hours.append((begin, end))
        return " "

    rest = re.sub(r"\ball day(?: long)?\b|全天|整天", " ", _HOURS.sub(read, text), flags=re.IGNORECASE)
    hours.sort()
    for (_, end), (begin, _) in pairwise(hours):
        if begin < end:
            raise ValueError("has hours that overlap; join them into one window")
    return " ".join(rest.split()).strip(" ,，;；、"), tuple(hours)


def _minute(hour: str, minute: str | None, half: str | None, noon: str | None, part: str | None) -> int:
    value, rest = int(hour), 30 if half else int(minute or 0)
    if noon:
        if not 1 <= value <= 12:
            raise ValueError(f"{hour}{noon} is no time of day; write 18:00 or 6pm")
        value = value % 12 + (12 if noon.lower().startswith("p") else 0)
    elif (part in ("下午", "傍晚", "晚上", "晚间", "晚", "夜里") and value < 12) or (part == "中午" and value < 11):
        value += 12
    if value > 24 or rest > 59 or (value == 24 and rest):
        raise ValueError(f"{hour}:{minute or '00'} is no time of day; write 18:00")
    return value * 60 + rest


_NUMBERS_ZH = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"两": 2}
_WEEKDAY_ZH = {"一": 0, "二": 1, "三": 2, "四": 3, "五": 4, "六": 5, "日": 6, "天": 6, "末": 5}
_WEEKDAY_EN = {
    short: number
    for number, name in enumerate(_DAYS_EN)
    for short in {name.lower(), f"{name.lower()}s", name.lower()[:3], {1: "tues", 2: "weds", 3: "thur"}.get(number, "")}
    if short
} | {"thurs": 3}
_MONTH_EN = {short: n for n, name in enumerate(_MONTHS_EN, 1) for short in (name.lower(), name.lower()[:3])} | {
    "sept": 9
}
_ORDINAL_EN = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "last": -1}
_W = "|".join(sorted(_WEEKDAY_EN, key=len, reverse=True))
_M = "|".join(sorted(_MONTH_EN, key=len, reverse=True))
_DAY_LIST = rf"(?:{_W})(?:\s*(?:,|and|&|/|,\s*and|\bto\b|\bthrough\b|-)\s*(?:{_W}))*"
_NTH = r"(?:first|second|third|fourth|fifth|last|[1-5](?:st|nd|rd|th))"
_OF_MONTH = r"(?:of\s+)?(?:the|each|every)\s+month"
_MEMBER_ZH = r"(?:的?(?:会员日|會員日|粉丝日|会员节|促销日|特惠日|活动日|折扣日))?"
_DAY_OF_MONTH = r"\d{1,2}(?:\s*(?:st|nd|rd|th))"


def _plain_rule(text: str) -> str:
    """Return the RRULE of plain English or Chinese without hours; "" in front of hours alone means every day."""
    said = re.sub(r"\s+", " ", text.lower()).strip(" .。")
    said = re.sub(r"^(?:member(?:s|ship)? days?|会员日|會員日)\s*[:：,，]?\s*(?:on |is |为|是)?(?=.)", "", said)
    said = re.sub(r"\s*(?:,|\bis)?\s*(?:our )?member(?:s|ship)? days?$", "", said)
    for read in (_english, _chinese):
        rule = read(said)
        if rule is not None:
            return rule
    raise ValueError(f"{text[:40]!r} is no repetition that is read here; {REMEDY}")


def _english(said: str) -> str | None:
    every = r"(?:every|each|on|on every|every week on|each week on)?\s*"
    if re.fullmatch(r"|every ?day|daily|each day", said):
        return "FREQ=DAILY"
    if re.fullmatch(rf"(?:{every}(?:week-?ends?)|at weekends|at the weekend|weekly on weekends)", said):
        return "FREQ=WEEKLY;BYDAY=SA,SU"
    if re.fullmatch(rf"{every}(?:week-?days?|working days?|workdays?)", said):
        return "FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR"
    if match := re.fullmatch(rf"(?:{every}|weekly(?: on)? )({_DAY_LIST})", said):
        return f"FREQ=WEEKLY;BYDAY={_codes(_weekdays_en(match[1]))}"
    if match := re.fullmatch(rf"every (?:other|second|2(?:nd)?|two weeks on) ({_DAY_LIST})", said):
        return f"FREQ=WEEKLY;INTERVAL=2;BYDAY={_codes(_weekdays_en(match[1]))}"
    if match := re.fullmatch(rf"every (\d{{1,2}}|two|three|four) weeks on ({_DAY_LIST})", said):
        n = {"two": 2, "three": 3, "four": 4}.get(match[1]) or int(match[1])
        return f"FREQ=WEEKLY;INTERVAL={n};BYDAY={_codes(_weekdays_en(match[2]))}"
    nth = rf"({_NTH}(?:\s*(?:,|and|&|,\s*and)\s*{_NTH})*)"
    if match := re.fullmatch(rf"(?:on )?(?:the |every )?{nth} ({_W}) {_OF_MONTH}", said) or re.fullmatch(
        rf"monthly on (?:the )?{nth} ({_W})", said
    ):
        day = _DAYS[_WEEKDAY_EN[match[2]]]
        return f"FREQ=MONTHLY;BYDAY={','.join(f'{n}{day}' for n in _nths(match[1]))}"
    if match := re.fullmatch(
        rf"(?:yearly |every year )?(?:on )?(?:the |every )?({_NTH}) ({_W}) (?:of|in) ({_M})", said
    ):
        n = _nths(match[1])[0]
        return f"FREQ=YEARLY;BYMONTH={_MONTH_EN[match[3]]};BYDAY={n}{_DAYS[_WEEKDAY_EN[match[2]]]}"
    if re.fullmatch(rf"(?:on )?(?:the )?last day {_OF_MONTH}|monthly on the last day|month[- ]end", said):
        return "FREQ=MONTHLY;BYMONTHDAY=-1"
    days = r"((?:the )?\d{1,2}(?:st|nd|rd|th)?(?:\s*(?:,|and|&|,\s*and)\s*(?:the )?\d{1,2}(?:st|nd|rd|th)?)*)"
    if match := (
        re.fullmatch(rf"(?:monthly|every month|each month)\s*(?:on )?{days}(?: day)?", said)
        or re.fullmatch(rf"(?:on )?{days}(?: day)? {_OF_MONTH}", said)
        or re.fullmatch(rf"every ({_DAY_OF_MONTH})(?: {_OF_MONTH})?", said)
    ):
        return f"FREQ=MONTHLY;BYMONTHDAY={_month_days(match[1])}"
    if match := re.fullmatch(
        rf"(?:yearly|annually|every year|each year|every)\s*(?:on )?(?:the )?(?:({_M})\.? (\d{{1,2}})(?:st|nd|rd|th)?|"
        rf"(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? ({_M})|(\d{{1,2}})[-/](\d{{1,2}}))",
        said,
    ) or re.fullmatch(
        rf"(?:on )?(?:every )?(?:the )?(?:({_M})\.? (\d{{1,2}})(?:st|nd|rd|th)?|(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? ({_M})|"
        r"(\d{1,2})[-/](\d{1,2}))(?:,? (?:every|each) year|,? yearly|,? annually)",
        said,
    ):
        month = _MONTH_EN[match[1] or match[4]] if match[1] or match[4] else int(match[5])
        return _yearly(month, int(match[2] or match[3] or match[6]))
    return None


def _chinese(said: str) -> str | None:
    said = said.replace(" ", "").replace("星期", "周").replace("礼拜", "周").replace("週", "周").replace("號", "号")
    said = re.sub(r"^每逢", "每", re.sub(rf"{_MEMBER_ZH}$", "", said))
    if re.fullmatch(r"每[天日]|天天|每一天", said):
        return "FREQ=DAILY"
    if re.fullmatch(r"(?:每个?|逢)?周末", said):
        return "FREQ=WEEKLY;BYDAY=SA,SU"
    if re.fullmatch(r"(?:每个?|逢)?工作日", said):
        return "FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR"
    if match := re.fullmatch(
        r"(?:每|逢|隔)个?(?:([两二三四2-9])|隔?一)?周((?:[至到、,，和及/与-]?周?[一二三四五六日天末])+)", said
    ):
        days: set[int] = set()
        for a, b in re.findall(r"([一二三四五六日天末])(?:[至到-]周?([一二三四五六日天]))?", match[2]):
            first, last = _WEEKDAY_ZH[a], _WEEKDAY_ZH[b] if b else _WEEKDAY_ZH[a] + (a == "末")
            days |= set(_span(first, last))
        interval = 2 if "隔" in said else _number_zh(match[1]) if match[1] else 1
        return f"FREQ=WEEKLY;{f'INTERVAL={interval};' if interval > 1 else ''}BYDAY={_codes(days)}"
    if match := re.fullmatch(r"每个?月的?(?:第([一二三四五1-5])个?|(最后一?个?))周([一二三四五六日天])", said):
        n = -1 if match[2] else _number_zh(match[1])
        return f"FREQ=MONTHLY;BYDAY={n}{_DAYS[_WEEKDAY_ZH[match[3]]]}"
    if re.fullmatch(r"每个?月的?(?:最后一[天日]|月底|月末)", said):
        return "FREQ=MONTHLY;BYMONTHDAY=-1"
    if match := re.fullmatch(
        r"(?:每个?月的?)((?:(?:[、,，和及与]|[至到-])?(?:\d{1,2}|[一二三四五六七八九十廿]{1,3})[日号]?)+)", said
    ):
        spans = re.findall(
            r"(\d{1,2}|[一二三四五六七八九十]{1,3})[日号]?(?:[至到-](\d{1,2}|[一二三四五六七八九十]{1,3}))?", match[1]
        )
        numbers = {n for a, b in spans for n in range(_number_zh(a), _number_zh(b or a) + 1)}
        return f"FREQ=MONTHLY;BYMONTHDAY={_in_month(numbers)}"
    if match := re.fullmatch(
        r"每年的?(?:(\d{1,2}|[一二三四五六七八九十]{1,3})月(\d{1,2}|[一二三四五六七八九十]{1,3})[日号]?|(\d{1,2})[-/.](\d{1,2}))",
        said,
    ):
        return _yearly(_number_zh(match[1] or match[3]), _number_zh(match[2] or match[4]))
    if match := re.fullmatch(
        r"每年的?(\d{1,2}|[一二三四五六七八九十]{1,3})月的?(?:第([一二三四五1-5])个?|(最后一?个?))周([一二三四五六日天])",
        said,
    ):
        n = -1 if match[3] else _number_zh(match[2])
        month = _number_zh(match[1])
        if not 1 <= month <= 12:
            raise ValueError(f"{month} is no month; write 1 to 12")
        return f"FREQ=YEARLY;BYMONTH={month};BYDAY={n}{_DAYS[_WEEKDAY_ZH[match[4]]]}"
    return None


def _weekdays_en(text: str) -> set[int]:
    days: set[int] = set()
    for a, b in re.findall(rf"({_W})(?:\s*(?:to|through|-)\s*({_W}))?", text):
        days |= set(_span(_WEEKDAY_EN[a], _WEEKDAY_EN[b or a]))
    return days


def _span(first: int, last: int) -> Iterator[int]:
    """Yield weekdays from `first` to `last`, over Sunday where need be."""
    for n in range((last - first) % 7 + 1):
        yield (first + n) % 7


def _codes(days: set[int]) -> str:
    return ",".join(_DAYS[day] for day in sorted(days))


def _nths(text: str) -> list[int]:
    return [_ORDINAL_EN.get(word) or int(word[0]) for word in re.findall(_NTH, text)]


def _month_days(text: str) -> str:
    return _in_month({int(number) for number in re.findall(r"\d+", text)})


def _in_month(numbers: set[int]) -> str:
    wrong = [number for number in numbers if not 1 <= number <= 31]
    if wrong or not numbers:
        raise ValueError(f"{wrong[0] if wrong else 0} is no day of a month; write 1 to 31")
    return ",".join(map(str, sorted(numbers)))


def _yearly(month: int, day: int) -> str:
    try:
        date(2024, month, day)  # a leap year
    except ValueError as exc:
        raise ValueError(f"{month}-{day} is no day of a year; write month-day, such as 11-11") from exc
    return f"FREQ=YEARLY;BYMONTH={month};BYMONTHDAY={day}"


def _number_zh(text: str) -> int:
    if text.isdecimal():
        return int(text)
    tens, sign, ones = text.replace("廿", "二十").rpartition("十")
    if not sign:
        return _NUMBERS_ZH[text] if len(text) == 1 else 0
    return _NUMBERS_ZH.get(tens, 1) * 10 + _NUMBERS_ZH.get(ones, 0)


# --- telling ----------------------------------------------------------------------------------------------------------


def _parts(rule: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in rule.split(";"))


def _weekday_parts(value: str) -> list[tuple[int, int]]:
    """Return BYDAY as (n, weekday) pairs; n is 0 where every such day is meant."""
    found = []
    for entry in value.split(","):
        match = re.fullmatch(r"([+-]?\d{0,2})(MO|TU|WE|TH|FR|SA|SU)", entry)
        if match:
            found.append((int(match[1]) if match[1] else 0, _DAYS.index(match[2])))
    return found


def _clock(minute: int) -> str:
    return "24:00" if minute == 1440 else f"{minute % 1440 // 60:02d}:{minute % 60:02d}"


def _hours_text(hours: tuple[Hours, ...], zh: bool) -> str:
    if hours == (ALL_DAY,):
        return ""
    said = []
    for begin, end in hours:
        after = ("次日" if zh else "") if end <= begin else ""
        beyond = " (the next day)" if end <= begin and not zh else ""
        said.append(f"{_clock(begin)}–{after}{_clock(end)}{beyond}")
    return "、".join(said) if zh else ", ".join(said)


def _describe_zh(recurrence: Recurrence) -> str:
    parts = _parts(recurrence.rule)
    n, frequency = int(parts.get("INTERVAL", "1")), parts["FREQ"]
    unit = {"DAILY": "天", "WEEKLY": "周", "MONTHLY": "个月", "YEARLY": "年"}[frequency]
    every = {"DAILY": "每天", "WEEKLY": "每", "MONTHLY": "每月", "YEARLY": "每年"}[frequency]
    said = every if n == 1 else f"每{n}{unit}{'的' if 'BYDAY' in parts or 'BYMONTHDAY' in parts else ''}"
    if "BYMONTH" in parts:
        months = "、".join(f"{month}月" for month in parts["BYMONTH"].split(","))
        said = (said if frequency == "YEARLY" else "每年") + months + ("的每天" if frequency == "DAILY" else "")
    if "BYMONTHDAY" in parts:
        days = [int(day) for day in parts["BYMONTHDAY"].split(",")]
        said += "、".join(f"{day}日" if day > 0 else _from_end_zh(day) for day in days)
    if "BYDAY" in parts:
        named = _weekday_parts(parts["BYDAY"])
        said += "且为" * ("BYMONTHDAY" in parts)
        if {day for _, day in named} == set(range(5)) and not any(nth for nth, _ in named):
            said += "周一至周五"
        else:
            said += "、".join(
                (_ORDINALS_ZH.get(nth, f"第{nth}个") if nth else "") + _DAYS_ZH[day] for nth, day in named
            )
    hours = _hours_text(recurrence.hours, zh=True)
    return said + hours + _bounds(parts, recurrence.start, zh=True)


def _from_end_zh(day: int) -> str:
    return "最后一天" if day == -1 else f"倒数第{-day}天"


def _describe_en(recurrence: Recurrence) -> str:
    parts = _parts(recurrence.rule)
    n, frequency = int(parts.get("INTERVAL", "1")), parts["FREQ"]
    unit = {"DAILY": "day", "WEEKLY": "week", "MONTHLY": "month", "YEARLY": "year"}[frequency]
    every = f"every {unit}" if n == 1 else f"every {n} {unit}s"
    months = [_MONTHS_EN[int(month) - 1] for month in parts["BYMONTH"].split(",")] if "BYMONTH" in parts else []
    named = _weekday_parts(parts["BYDAY"]) if "BYDAY" in parts else []
    weekdays = _listed([(_ORDINALS_EN.get(nth, f"{nth}th") + " " if nth else "") + _DAYS_EN[day] for nth, day in named])
    if {day for _, day in named} == set(range(5)) and not any(nth for nth, _ in named):
        weekdays = "Monday to Friday"
    month_days = [int(day) for day in parts["BYMONTHDAY"].split(",")] if "BYMONTHDAY" in parts else []
    on_days = _listed([_ordinal(day) if day > 0 else _from_end_en(day) for day in month_days])
    if month_days and months and len(month_days) == 1 and month_days[0] > 0:
        said = f"{every if frequency == 'YEARLY' else 'every year'} on {month_days[0]} {_listed(months)}"
    elif month_days:
        within = f"of {_listed(months)} {every}" if months else f"of {every}" if n == 1 else every
        said = f"on the {on_days} {within}"
    elif frequency == "WEEKLY" and named:
        said = f"every {weekdays}" if n == 1 else f"{every} on {weekdays}"
    elif named:
        within = f"of {_listed(months)} {every}" if months else f"of {every}" if n == 1 else every
        said = f"on the {weekdays} {within}" if named[0][0] else f"every {weekdays} {within}"
    else:
        said = every
    if month_days and named:
        said += f", if it is a {weekdays}"
    if months and not month_days and not (named and frequency in ("MONTHLY", "YEARLY")):
        said += f" in {_listed(months)}"
    hours = _hours_text(recurrence.hours, zh=False)
    return said + (f", {hours}" if hours else "") + _bounds(parts, recurrence.start, zh=False)


def _bounds(parts: dict[str, str], start: date, zh: bool) -> str:
    said = ""
    if "COUNT" in parts:
        said = f"，共{parts['COUNT']}次" if zh else f", {parts['COUNT']} times"
    if "UNTIL" in parts:
        day = datetime.strptime(parts["UNTIL"][:8], "%Y%m%d").date()
        said += (
            f"，至{day.year}年{day.month}月{day.day}日"
            if zh
            else f", until {day.day} {_MONTHS_EN[day.month - 1]} {day.year}"
        )
    return said


def _from_end_en(day: int) -> str:
    return "last day" if day == -1 else f"{_ordinal(-day)} to last day"


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# --- keeping ----------------------------------------------------------------------------------------------------------


def dump_repeats(recurrence: Recurrence) -> dict[str, str]:
    """Return `recurrence` as JSON values for a snapshot; `load_repeats` is the inverse."""
    return {"text": recurrence.text, "zone": zone_name(recurrence.zone), "start": recurrence.start.isoformat()}


def load_repeats(entry: dict[str, str]) -> Recurrence:
    """
    Return what `dump_repeats` wrote.

    Raises:
        KeyError, TypeError, ValueError: `entry` is not one.
    """
    zone = zone_of(entry["zone"])
    return parse_repeats(entry["text"], zone, datetime.combine(date.fromisoformat(entry["start"]), time(), zone))


def zone_name(zone: tzinfo) -> str:
    """Return a name that `zone_of` reads: an IANA name, or an offset in seconds."""
    if isinstance(zone, ZoneInfo):
        return zone.key
    return str(int((zone.utcoffset(None) or timedelta()).total_seconds()))


def zone_of(name: str) -> tzinfo:
    """
    Return the zone that `zone_name` named.

    Raises:
        ValueError: no such zone.
    """
    if re.fullmatch(r"-?\d{1,6}", name):
        return timezone(timedelta(seconds=int(name)))
    try:
        return ZoneInfo(name)
    except (KeyError, OSError) as exc:  # ZoneInfoNotFoundError is a KeyError
        raise ValueError(f"no time zone {name!r}") from exc
