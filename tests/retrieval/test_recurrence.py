"""recurrence.py and the one predicate: what merchants write, when it holds, and that search and `is_valid` agree."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from retrieval.errors import BadStore
from retrieval.hybrid import HybridRetriever
from retrieval.load import dump_passage, load_knowledge, load_store, parse_passage
from retrieval.passages import Passage, is_valid, last_valid_end, next_valid
from retrieval.recurrence import parse_repeats
from tests.retrieval.conftest import PROMOTIONS, HashingEmbedder

SHANGHAI = ZoneInfo("Asia/Shanghai")
NEW_YORK = ZoneInfo("America/New_York")
START = datetime(2026, 11, 1, tzinfo=SHANGHAI)
Build = Callable[..., HybridRetriever]


@pytest.mark.parametrize(
    ("written", "rule", "zh", "en"),
    [
        ("every weekend", "FREQ=WEEKLY;BYDAY=SA,SU", "每周六、周日", "every Saturday and Sunday"),
        ("每周末", "FREQ=WEEKLY;BYDAY=SA,SU", "每周六、周日", "every Saturday and Sunday"),
        ("every Friday 18:00-22:00", "FREQ=WEEKLY;BYDAY=FR", "每周五18:00–22:00", "every Friday, 18:00–22:00"),
        ("fridays 6-10pm", "FREQ=WEEKLY;BYDAY=FR", "每周五18:00–22:00", "every Friday, 18:00–22:00"),
        ("每周五18:00-22:00", "FREQ=WEEKLY;BYDAY=FR", "每周五18:00–22:00", "every Friday, 18:00–22:00"),
        ("每週五晚上6点到10点", "FREQ=WEEKLY;BYDAY=FR", "每周五18:00–22:00", "every Friday, 18:00–22:00"),
        ("monthly on the 8th", "FREQ=MONTHLY;BYMONTHDAY=8", "每月8日", "on the 8th of every month"),
        ("8th of every month", "FREQ=MONTHLY;BYMONTHDAY=8", "每月8日", "on the 8th of every month"),
        ("每月8号会员日", "FREQ=MONTHLY;BYMONTHDAY=8", "每月8日", "on the 8th of every month"),
        ("每年11月11日", "FREQ=YEARLY;BYMONTH=11;BYMONTHDAY=11", "每年11月11日", "every year on 11 November"),
        ("yearly 11-11", "FREQ=YEARLY;BYMONTH=11;BYMONTHDAY=11", "每年11月11日", "every year on 11 November"),
        ("first Monday of every month", "FREQ=MONTHLY;BYDAY=1MO", "每月第一个周一", "on the first Monday of every month"),
        ("每月最后一天", "FREQ=MONTHLY;BYMONTHDAY=-1", "每月最后一天", "on the last day of every month"),
        ("RRULE:FREQ=MONTHLY;BYDAY=-1FR", "FREQ=MONTHLY;BYDAY=-1FR", "每月最后一个周五", "on the last Friday of every month"),
        ("隔周周五", "FREQ=WEEKLY;INTERVAL=2;BYDAY=FR", "每2周的周五", "every 2 weeks on Friday"),
        ("FREQ=DAILY;BYHOUR=9,10,20", "FREQ=DAILY", "每天09:00–11:00、20:00–21:00", "every day, 09:00–11:00, 20:00–21:00"),
        ("工作日 22:00-02:00", "FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR", "每周一至周五22:00–次日02:00",
         "every Monday to Friday, 22:00–02:00 (the next day)"),
    ],
)  # fmt: skip
def test_both_languages_and_rrules_are_read_and_told(written: str, rule: str, zh: str, en: str) -> None:
    found = parse_repeats(written, SHANGHAI, START)
    assert (found.rule, found.describe("zh"), found.describe("en")) == (rule, zh, en)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("every blue moon", "no repetition"),
        ("每月32日", "32 is no day of a month"),
        ("every Friday 25:00-26:00", "25:00 is no time of day"),
        ("every Friday 18:00-18:00", "begins and ends at once"),
        ("FREQ=HOURLY", "FREQ must be"),
        ("FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30", "falls on no day"),
        ("FREQ=WEEKLY;BYDAY=XX", "no repetition that a calendar knows"),
        ("FREQ=DAILY;COUNT=999999999", "COUNT must be"),
        ("FREQ=WEEKLY;BYDAY=FR;BYSETPOS=1", "no part of an RRULE"),
        ("x" * 1000, "too long"),
    ],
)
def test_what_is_no_repetition_is_said_with_the_remedy(written: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_repeats(written, SHANGHAI, START)


def test_what_counts_from_a_first_day_needs_one() -> None:
    with pytest.raises(ValueError, match="fill in the start"):
        parse_repeats("every other Friday", SHANGHAI)
    fridays = parse_repeats("every other Friday", SHANGHAI, datetime(2026, 11, 6, tzinfo=SHANGHAI))
    days = [n for n in range(30) if fridays.holds(datetime(2026, 11, 1 + n, 12, tzinfo=SHANGHAI))]
    assert days == [5, 19]


def test_hours_are_the_stores_wall_clock_also_where_daylight_saving_changes() -> None:
    nights = parse_repeats("every day 01:30-03:30", NEW_YORK)
    # 8 March 2026: 02:00 to 03:00 is left out; 1 November 2026: 01:00 to 02:00 comes twice.
    for day, hours in (((2026, 3, 7), 2.0), ((2026, 3, 8), 1.0), ((2026, 11, 1), 3.0), ((2026, 11, 2), 2.0)):
        midnight = datetime(*day, tzinfo=NEW_YORK).astimezone(UTC)
        on = [n for n in range(24 * 60) if nights.holds(midnight + timedelta(minutes=n))]
        assert len(on) / 60 == hours
    day_off = parse_repeats("每周日", NEW_YORK)
    before = datetime(2026, 11, 1, tzinfo=NEW_YORK).astimezone(UTC)
    assert sum(day_off.holds(before + timedelta(minutes=n)) for n in range(-60, 27 * 60)) == 25 * 60


def test_midnight_is_on_one_side_only() -> None:
    member_day = parse_repeats("每月8日", SHANGHAI)
    second = timedelta(seconds=1)
    begins, ends = datetime(2026, 12, 8, tzinfo=SHANGHAI), datetime(2026, 12, 9, tzinfo=SHANGHAI)
    moments = [begins - second, begins, ends - second, ends]
    assert [member_day.holds(moment) for moment in moments] == [False, True, True, False]
    late = parse_repeats("every Friday 22:00-02:00", SHANGHAI)
    saturday = datetime(2026, 11, 28, 1, 59, 59, tzinfo=SHANGHAI)
    assert [late.holds(saturday), late.holds(saturday + second)] == [True, False]


WRITTEN = [
    "every weekend", "每周五18:00-22:00", "每月8日", "yearly 11-11", "first Monday of every month", "every day 22:30-01:30",
    "FREQ=MONTHLY;BYMONTHDAY=31", "every day 01:00-02:30", "每月最后一天", "FREQ=WEEKLY;INTERVAL=3;BYDAY=SU,WE", "weekdays",
]  # fmt: skip


def test_search_and_the_predicate_agree_at_any_time(build: Build, hashing: HashingEmbedder) -> None:
    chance = random.Random(3)
    passages = []
    for number in range(120):
        zone = chance.choice((SHANGHAI, NEW_YORK, ZoneInfo("Australia/Lord_Howe"), UTC))
        start = datetime(2026, chance.randint(1, 12), chance.randint(1, 28), chance.choice((0, 2, 10)), tzinfo=zone)
        end = start + timedelta(days=chance.randint(1, 400))
        repeats = parse_repeats(chance.choice(WRITTEN), zone, start) if chance.random() < 0.8 else None
        bounds = {"valid_from": start, "valid_until": end if chance.random() < 0.7 else None}
        passages.append(Passage(f"p{number}", "page", f"t{number}", "offer", "en", "x", **bounds, repeats=repeats))  # type: ignore[arg-type]
    retriever = build(passages, hashing)
    for change in (
        datetime(2026, 3, 8, 7),
        datetime(2026, 11, 1, 6),
        datetime(2026, 4, 4, 15),
        datetime(2026, 12, 31, 16),
    ):
        for _ in range(12):
            now = change.replace(tzinfo=UTC) + timedelta(minutes=chance.choice((0, -1, 1, chance.randint(-3000, 3000))))
            on = {p.id for p in passages if is_valid(p, now)}
            assert {hit.passage.id for hit in retriever.search("offer", 200, now=now)} == on
            assert {p.id for p in retriever.current("page", now=now)} == on
            assert {hit.passage.id for hit in retriever.expired("offer", 200, now=now)} == {p.id for p in passages} - on


def test_the_next_and_the_last_time_are_where_the_predicate_turns() -> None:
    chance = random.Random(5)
    for written in WRITTEN:
        start = datetime(2026, 6, 3, 10, tzinfo=NEW_YORK)
        repeats = parse_repeats(written, NEW_YORK, start)
        passage = Passage("p", "promotion", "t", "t", "en", "x", valid_from=start, repeats=repeats)
        passage = replace(passage, valid_until=datetime(2027, 6, 3, tzinfo=NEW_YORK))
        for _ in range(20):
            now = start + timedelta(minutes=chance.randint(-50_000, 480_000))
            following = next_valid(passage, now)
            if following is None:
                continue
            assert is_valid(passage, following)
            assert following == now or not is_valid(passage, following - timedelta(seconds=1))
            steps = [now + (following - now) * n / 40 for n in range(40)]
            assert following == now or not any(is_valid(passage, step) for step in steps)
        over = datetime(2027, 7, 1, tzinfo=NEW_YORK)
        assert next_valid(passage, over) is None
        ended = last_valid_end(passage, over)
        assert ended is not None
        assert is_valid(passage, ended - timedelta(seconds=1))
        assert not is_valid(passage, ended)


def test_a_passage_comes_back_from_a_snapshot_as_it_went() -> None:
    repeats = parse_repeats("FREQ=WEEKLY;INTERVAL=2;BYDAY=FR", NEW_YORK, datetime(2026, 11, 6, tzinfo=NEW_YORK))
    passage = Passage("p", "promotion", "t", "t", "en", "x", repeats=repeats)
    again = parse_passage(dump_passage(passage))
    assert again == passage
    assert again.repeats is not None
    day = datetime(2026, 11, 13, 12, tzinfo=NEW_YORK)
    assert [again.repeats.holds(day), again.repeats.holds(day + timedelta(days=7))] == [False, True]


def test_the_columns_are_read_and_the_sentence_is_in_the_visitors_language(store: Path) -> None:
    lines = PROMOTIONS.splitlines()
    rows = [
        "w-zh,周末茶会,茶9折,,2026-11-01,2026-12-31,zh,,,每周末",
        'f-en,Friday night,Tea 10% off,,,,en,,,"every Friday 18:00-22:00"',
    ]
    text = "\n".join([lines[0] + ",repeats", *(line + "," for line in lines[1:]), *rows])
    (store / "promotions.csv").write_text(text + "\n", "utf-8")
    faqs = "id,question,answer,repeats\nm,Is it member day?,Yes.,8th of every month\n"
    (store / "faqs.csv").write_text(faqs, "utf-8")
    (store / "more.jsonl").write_text('{"id": "k", "text": "Open house.", "repeats": "每月第一个周一"}\n', "utf-8")
    found = {p.id: p for p in load_store(store)}
    assert found["w-zh"].text == "茶9折。活动时间：每周六、周日。有效期：2026年11月1日至12月31日（含）。"
    assert found["f-en"].text == "Tea 10% off. Runs every Friday, 18:00–22:00."
    assert [is_valid(found["m"], datetime(2026, 12, day, 12, tzinfo=SHANGHAI)) for day in (7, 8)] == [False, True]
    assert [is_valid(found["k"], datetime(2026, 12, day, 12, tzinfo=SHANGHAI)) for day in (7, 8)] == [True, False]


def test_a_faulty_repetition_is_named_with_file_row_and_field(store: Path, tmp_path: Path) -> None:
    lines = PROMOTIONS.splitlines()
    rows = ["a,t,d,,,,en,,,now and then", "b,t,d,,2026-11-02,2026-11-03,en,,,every weekend"]
    (store / "promotions.csv").write_text("\n".join([lines[0] + ",repeats", *rows]) + "\n", "utf-8")
    with pytest.raises(BadStore) as raised:
        load_store(store)
    first, second = map(str, raised.value.faults)
    assert first.startswith("promotions.csv, row 2, repeats: 'now and then' is no repetition")
    assert 'write "every weekend"' in first
    assert second == (
        "promotions.csv, row 3, repeats: never falls between the start and the end; correct one of the three"
    )
    knowledge = tmp_path / "K.jsonl"
    knowledge.write_text('{"id": "k", "text": "x", "repeats": "sometimes"}\n', "utf-8")
    with pytest.raises(BadStore, match=r"K\.jsonl, row 1, repeats: 'sometimes'"):
        load_knowledge(knowledge)


def test_a_year_out_of_range_is_never_on() -> None:
    daily = parse_repeats("every day", UTC)
    assert not daily.holds(datetime(2500, 1, 1, tzinfo=UTC))
