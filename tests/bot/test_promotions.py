"""What the bot says of offers that are on, over, to come, or on again later: by their rows and the clock alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bot.answer import Answerer
from bot.messages import Reply
from bot.skills.promotions import not_now_text
from retrieval.embedder import VectorCache
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from retrieval.load import load_store
from tests.fakes import store_profile
from tests.retrieval.conftest import HashingEmbedder

COLUMNS = "id,title,description,code,starts_at,ends_at,lang,products,conditions,repeats"
ROWS = (
    "bath-zh,浴室周末：浴室用品9折,浴室用品9折。,BATH10,2026-10-01,2026-12-31,zh,bath,,每周末",
    "bath-en,Bath weekend: bath products 10% off,Bath products 10% off.,BATH10,2026-10-01,2026-12-31,en,bath,,every weekend",
    "night-zh,周五夜茶：茶9折,茶9折。,NIGHT10,,,zh,tea,,每周五18:00-22:00",
    "night-en,Friday tea night: tea 10% off,Tea 10% off.,NIGHT10,,,en,tea,,every Friday 18:00-22:00",
    "soon-zh,开春会员日：全场95折,全场95折。,SPRING5,2026-12-25,,zh,all,,每月8日",
    "soon-en,Spring member day: 5% off,5% off.,SPRING5,2026-12-25,,en,all,,8th of every month",
    "over-zh,秋茶周末：茶8折,茶8折。,AUTUMN20,2026-10-01,2026-11-04,zh,tea,,每周末",
    "over-en,Autumn tea weekend: tea 20% off,Tea 20% off.,AUTUMN20,2026-10-01,2026-11-04,en,tea,,every weekend",
    "plain-zh,全场满减：满399减50,满¥399减¥50。,,2026-11-01,2026-12-31,zh,all,,",
    "plain-en,Site-wide: ¥50 off ¥399,¥50 off from ¥399.,,2026-11-01,2026-12-31,en,all,,",
)
SATURDAY = datetime(2026, 11, 21, 4, tzinfo=UTC)  # noon in Shanghai
FRIDAY_EVENING = datetime(2026, 11, 27, 13, 59, 59, tzinfo=UTC)  # a second before 22:00
MONDAY = datetime(2026, 11, 23, 4, tzinfo=UTC)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> HybridRetriever:
    folder = tmp_path_factory.mktemp("offers")
    (folder / "store.toml").write_text('timezone = "Asia/Shanghai"\n', "utf-8")
    Path(folder / "promotions.csv").write_text("\n".join([COLUMNS, *ROWS]) + "\n", "utf-8")
    embedder, cache = HashingEmbedder(), VectorCache(None)
    index = build_index(load_store(folder), embedder, cache)
    cache.close()
    return HybridRetriever(index, embedder)


async def say(retriever: HybridRetriever, question: str, now: datetime) -> str:
    bot = Answerer(retriever=retriever, engine=None, profile=store_profile(), clock=lambda: now)
    steps: Sequence[object] = [step async for step in bot.answer((), question)]
    bot.close()
    reply = steps[-1]
    assert isinstance(reply, Reply)
    return reply.text


@pytest.mark.parametrize(
    ("now", "on"),
    [(SATURDAY, {"bath", "plain"}), (FRIDAY_EVENING, {"night", "plain"}), (MONDAY, {"plain"})],
)
@pytest.mark.parametrize("question", ["今天有什么优惠活动？", "Is there a promotion today?"])
async def test_what_is_on_today_is_what_holds_this_minute(
    retriever: HybridRetriever, question: str, now: datetime, on: set[str]
) -> None:
    text = await say(retriever, question, now)
    lang = "en" if question.isascii() else "zh"
    titles = {p.id.removesuffix(f"-{lang}"): p.title for p in retriever.index.passages if p.lang == lang}
    assert {name for name, title in titles.items() if title in text} == on


@pytest.mark.parametrize(
    ("question", "now", "said"),
    [
        ("BATH10 还能用吗", MONDAY, "现在不在活动时间内：活动时间是每周六、周日，下一次从2026年11月28日开始。"),
        (
            "does BATH10 work?",
            MONDAY,
            "is not on right now: it runs every Saturday and Sunday, next from 28 November 2026.",
        ),
        ("NIGHT10 能用吗", SATURDAY, "下一次从2026年11月27日18:00开始"),
        ("does NIGHT10 work?", SATURDAY, "it runs every Friday, 18:00–22:00, next from 27 November 2026, 18:00."),
        ("SPRING5 能用吗", MONDAY, "还没有开始，将于2027年1月8日开始（每月8日）。"),
        ("does SPRING5 work?", MONDAY, "has not started yet; it begins on 8 January 2027 (on the 8th of every month)."),
        ("AUTUMN20 还能用吗", MONDAY, "已于2026年11月1日结束。"),
        ("does AUTUMN20 still work?", MONDAY, "ended on 1 November 2026."),
    ],
)
async def test_an_offer_that_is_not_on_is_told_with_when(
    retriever: HybridRetriever, question: str, now: datetime, said: str
) -> None:
    text = await say(retriever, question, now)
    assert said in text
    code = question.split()[1 if question.isascii() else 0].rstrip("?")
    assert code not in text, "no code of an offer that is not on"


async def test_a_code_is_quoted_while_its_hours_last(retriever: HybridRetriever) -> None:
    assert "NIGHT10" in await say(retriever, "有什么优惠活动？", FRIDAY_EVENING)


def test_an_offer_without_an_end_is_never_said_to_be_over(retriever: HybridRetriever) -> None:
    night = retriever.get("night-en")
    assert night is not None
    text = not_now_text(night, MONDAY, store_profile().timezone, "en")
    assert "next from 27 November 2026" in text
