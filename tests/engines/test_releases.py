"""`bot.engines.releases`: which releases are live, with made-up engines; tests/test_publishing.py has the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from bot.engine import BoundEngine, Sampling, leased
from bot.engines.releases import ReleasedEngines
from bot.errors import EngineFailed, EngineNotReady, MerchantError
from bot.fetch import Progress
from bot.messages import Message
from bot.releases import StoredRelease, Wanted
from tests.engines.frail import FrailEngine
from tests.running import until

HELLO = [Message("user", "hello")]


def release(name: str, base: str = "tiny") -> StoredRelease:
    return StoredRelease(model=base, adapter=name, base=base)


A, B, C = (release(name) for name in "abc")


class MadeUp(FrailEngine):
    """Says its release's name; loads adapters, which say theirs."""

    async def add_adapter(self, release: StoredRelease) -> None:
        self.adapters[release.name] = f"{release.name} "

    async def remove_adapter(self, release: StoredRelease) -> None:
        del self.adapters[release.name]


class FakeMaker:
    """Makes engines as told; `hot`: releases are adapters of one engine."""

    def __init__(self, *, hot: bool = False) -> None:
        self.hot = hot
        self.errors: dict[str, Exception] = {}  # of `prepare`, by release
        self.start_errors: dict[str, list[Exception]] = {}
        self.says: dict[str, str] = {}  # instead of its name
        self.short: list[str] = []  # what `shortage` answers, one call each
        self.gates: dict[str, asyncio.Event] = {}  # `prepare` waits for it
        self.made: list[tuple[str, MadeUp]] = []

    def is_hot(self, release: StoredRelease) -> bool:
        return self.hot

    def host_of(self, release: StoredRelease) -> str:
        return release.base if self.hot else release.name

    async def prepare(self, release: StoredRelease, progress: Progress | None = None) -> None:
        if (gate := self.gates.get(release.name)) is not None:
            await gate.wait()
        if (error := self.errors.get(release.name)) is not None:
            raise error

    async def shortage(self, release: StoredRelease) -> str | None:
        return self.short.pop(0) if self.short else None

    def make(self, release: StoredRelease, adapters: Mapping[str, StoredRelease] | None) -> MadeUp:
        errors = self.start_errors.get(release.name, [])
        engine = MadeUp(errors.pop(0) if errors else None, self.says.get(release.name, f"{release.name} "))
        if adapters is not None:
            engine.words = "base "
            engine.adapters = {name: f"{name} " for name in adapters}
        self.made.append((release.name, engine))
        return engine

    def last(self, name: str) -> MadeUp:
        return [engine for made, engine in self.made if made == name][-1]


@asynccontextmanager
async def following(
    maker: FakeMaker, first: Wanted, *, drain_s: float = 30.0
) -> AsyncIterator[tuple[ReleasedEngines, list[Wanted]]]:
    """Run until the block ends; what is appended to the list is wanted from then on."""
    wanted = [first]
    before = asyncio.all_tasks()
    engines = ReleasedEngines(
        maker, lambda: wanted[-1], lambda: [HELLO], check_interval_s=0.01, drain_s=drain_s, first_wait_s=0.02
    )
    await engines.start()
    try:
        yield engines, wanted
    finally:
        await engines.close()
        assert all(engine.closed for _, engine in maker.made)
        assert asyncio.all_tasks() == before


async def said(engine: BoundEngine, n: int = 3) -> str:
    async with aclosing(engine.stream(HELLO, Sampling(max_tokens=n))) as chunks:
        return "".join([chunk.text async for chunk in chunks])


async def serving(engines: ReleasedEngines, name: str) -> None:
    await until(lambda: engines.status().name == name and engines.status().state == "serving", 10)


async def test_it_starts_with_what_is_wanted_and_says_how_far_it_is() -> None:
    maker = FakeMaker()
    maker.gates["a"] = asyncio.Event()
    async with following(maker, Wanted(A, "a")) as (engines, _):
        await until(lambda: "looking for its weights" in engines.state().detail)
        assert engines.status().state == "starting"
        assert (engines.name, engines.adapter) == ("tiny", "a")
        with leased(engines) as engine:
            assert engine is not None
            assert not engine.state().ready
            with pytest.raises(EngineNotReady):
                await said(engine)
        maker.gates["a"].set()
        await serving(engines, "a")
        assert await said(engines) == "a a a "
        assert engines.names() == ("a",)


async def test_a_turn_is_answered_by_one_release_from_its_beginning_to_its_end() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await serving(engines, "a")
        with engines.lease() as held:
            under_way = asyncio.create_task(said(held, 30))
            wanted.append(Wanted(B, "b"))
            await serving(engines, "b")
            assert await said(engines) == "b b b "
            assert (engines.name, engines.adapter) == ("tiny", "b")
            assert await under_way == "a " * 30
            await asyncio.sleep(0.05)
            # Between two pieces of one reply nothing streams; the turn has its engine all the same.
            assert (held.name, held.adapter) == ("tiny", "a")
            assert await said(held) == "a a a "
            assert not maker.last("a").closed
        await until(lambda: maker.last("a").closed)
        assert engines.figures()["releases_live"] == 1
        assert engines.figures()["release_switches"] == 1


async def test_a_turn_that_does_not_end_does_not_keep_its_engine_for_ever() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a"), drain_s=0.1) as (engines, wanted):
        await serving(engines, "a")
        with engines.lease():
            wanted.append(Wanted(B, "b"))
            await until(lambda: maker.last("a").closed)
        assert await said(engines) == "b b b "


async def test_going_back_while_the_old_one_still_drains_starts_nothing() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await serving(engines, "a")
        with engines.lease():
            wanted.append(Wanted(B, "b"))
            await serving(engines, "b")
            wanted.append(Wanted(A, "a"))
            await serving(engines, "a")
        await until(lambda: maker.last("b").closed)
        assert [name for name, _ in maker.made] == ["a", "b"]
        assert not maker.last("a").closed


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: m.errors.update(b=MerchantError("/srv/releases/b/model: no weights")), "model: no weights"),
        (lambda m: m.start_errors.update(b=[EngineFailed("out of memory")]), "out of memory"),
        (lambda m: m.says.update(b=""), "answered with nothing"),
        (lambda m: m.says.update(b="!"), "answered with '!' over and over"),
        (lambda m: m.says.update(b="\ufffda"), "bytes that are no characters"),
        (lambda m: m.short.append("a second engine needs 9 GB"), "a second engine needs 9 GB"),
    ],
    ids=["its files", "its start", "silence", "one token", "noise", "memory"],
)
async def test_what_does_not_start_leaves_the_old_one_serving_and_is_tried_again_only_after_a_change(
    spoil: object, says: str
) -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await serving(engines, "a")
        spoil(maker)  # type: ignore[operator]
        wanted.append(Wanted(B, "b"))
        await until(lambda: engines.status().state == "failed")
        assert says in engines.status().detail
        assert "/srv" not in engines.status().detail
        assert (engines.status().name, engines.status().wanted) == ("a", "b")
        assert engines.state().ready
        assert await said(engines) == "a a a "
        n_made = len(maker.made)
        await asyncio.sleep(0.1)
        assert len(maker.made) == n_made
        assert all(engine.closed for name, engine in maker.made if name == "b")
        assert (engines.figures()["release_failed"], engines.figures()["release_failures"]) == (1, 1)
        # The same release, published again after whatever it was has been mended.
        maker.errors, maker.says = {}, {}
        wanted.append(Wanted(B, "b", stamp=(1, 1)))
        await serving(engines, "b")
        assert engines.figures()["release_failed"] == 0


async def test_memory_that_a_draining_release_holds_is_waited_for() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await serving(engines, "a")
        with engines.lease():
            wanted.append(Wanted(B, "b"))
            await serving(engines, "b")
            maker.short.append("too little")
            wanted.append(Wanted(C, "c"))
            await until(lambda: "ends its turns" in engines.status().detail)
        await serving(engines, "c")


async def test_a_start_that_is_not_wanted_any_more_is_given_up() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await serving(engines, "a")
        maker.gates["b"] = asyncio.Event()
        wanted.append(Wanted(B, "b"))
        await until(lambda: engines.status().state == "switching")
        wanted.append(Wanted(A, "a", stamp=(1, 1)))
        await serving(engines, "a")
        wanted.append(Wanted(C, "c"))
        await serving(engines, "c")
        assert [name for name, _ in maker.made] == ["a", "c"]


async def test_either_engine_may_die_while_one_is_being_replaced() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await serving(engines, "a")
        # The old one, before the new one is ready: it is brought back, or the new one takes its place.
        maker.gates["b"] = asyncio.Event()
        wanted.append(Wanted(B, "b"))
        await until(lambda: engines.status().state == "switching")
        maker.last("a").dead.set()
        await until(lambda: len(maker.made) == 2, 10)
        await until(lambda: engines.state().ready, 10)
        assert await said(engines) == "a a a "
        maker.gates["b"].set()
        await serving(engines, "b")
        # The new one, after it took over: it is brought back, too, and nobody goes back to the old one.
        maker.last("b").dead.set()
        await until(lambda: [name for name, _ in maker.made].count("b") == 2, 10)
        await until(lambda: engines.state().ready, 10)
        assert await said(engines) == "b b b "


async def test_what_cannot_be_read_changes_nothing_while_something_serves() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await serving(engines, "a")
        wanted.append(Wanted(C, "x", fault="current.json: not readable"))
        await until(lambda: engines.status().state == "failed")
        assert engines.status().detail == "current.json: not readable"
        assert await said(engines) == "a a a "
        assert [name for name, _ in maker.made] == ["a"]


async def test_at_the_start_the_release_before_stands_in_for_one_that_does_not_start() -> None:
    maker = FakeMaker()
    maker.errors["b"] = MerchantError("no weights")
    async with following(maker, Wanted(B, "b", fallbacks=(A,))) as (engines, _):
        await until(lambda: engines.state().ready)
        assert (engines.status().name, engines.status().state) == ("a", "failed")
        assert await said(engines) == "a a a "


async def test_with_nothing_to_serve_it_tries_again_unless_no_try_would_help() -> None:
    maker = FakeMaker()
    maker.start_errors["a"] = [EngineFailed("no network"), EngineFailed("no network")]
    async with following(maker, Wanted(A, "a")) as (engines, _):
        await serving(engines, "a")
        assert len(maker.made) == 3
    maker = FakeMaker()
    maker.errors["a"] = MerchantError("there is no model in x")
    async with following(maker, Wanted(A, "a")) as (engines, wanted):
        await until(lambda: engines.state().phase == "stopped")
        assert engines.state().detail == "there is no model in x"
        wanted.append(Wanted(B, "b"))
        await serving(engines, "b")


async def test_two_releases_side_by_side_answer_who_asks_for_them() -> None:
    maker = FakeMaker()
    async with following(maker, Wanted(A, "a", beside=(B,))) as (engines, wanted):
        await until(lambda: engines.names() == ("a", "b"))
        for name, text in (("a", "a a a "), ("b", "b b b "), (None, "a a a "), ("nobody", "a a a ")):
            with leased(engines, name) as engine:
                assert engine is not None
                assert await said(engine) == text
                assert engine.adapter == text[0]
        assert engines.status().live == ("a", "b")
        # The challenger dies: its visitors get the default until it is back.
        maker.last("b").hangs = True
        maker.last("b").dead.set()
        await until(lambda: len(maker.made) == 3, 10)
        # It wins: nothing is started, the loser goes.
        wanted.append(Wanted(B, "b"))
        await serving(engines, "b")
        await until(lambda: engines.names() == ("b",))
        await until(lambda: maker.last("a").closed)
        assert len(maker.made) == 3


async def test_a_challenger_that_fails_is_said_and_takes_nothing_down() -> None:
    maker = FakeMaker()
    maker.errors["b"] = MerchantError("no weights")
    async with following(maker, Wanted(A, "a", beside=(B,))) as (engines, _):
        await until(lambda: "b: no weights" in engines.status().detail)
        assert engines.status().state == "serving"
        with leased(engines, "b") as engine:
            assert engine is not None
            assert await said(engine) == "a a a "


class TestAdaptersOfOneEngine:
    """As on CUDA: a release of the running base is loaded while it runs."""

    async def test_a_release_is_added_tried_and_the_old_one_removed_after_its_last_turn(self) -> None:
        maker = FakeMaker(hot=True)
        async with following(maker, Wanted(A, "a")) as (engines, wanted):
            await serving(engines, "a")
            assert await said(engines) == "a a a "
            with engines.lease() as held:
                wanted.append(Wanted(B, "b"))
                await serving(engines, "b")
                assert await said(engines) == "b b b "
                assert await said(held) == "a a a "
                assert set(maker.last("a").adapters) == {"a", "b"}
            await until(lambda: set(maker.last("a").adapters) == {"b"})
            assert len(maker.made) == 1  # one engine for both
            assert not maker.last("a").closed
            # Nothing published any more: the bare base, without another start.
            wanted.append(Wanted(StoredRelease("tiny", None, "tiny")))
            await serving(engines, "tiny")
            assert await said(engines) == "base base base "
            assert engines.adapter is None
            await until(lambda: not maker.last("a").adapters)
            assert len(maker.made) == 1

    async def test_an_engine_that_comes_back_has_the_adapters_it_had(self) -> None:
        maker = FakeMaker(hot=True)
        async with following(maker, Wanted(A, "a", beside=(B,))) as (engines, _):
            await until(lambda: engines.names() == ("a", "b"))
            maker.last("a").dead.set()
            await until(lambda: len(maker.made) == 2, 10)
            await until(lambda: engines.state().ready, 10)
            assert set(maker.last("a").adapters) == {"a", "b"}
            with leased(engines, "b") as engine:
                assert engine is not None
                assert await said(engine) == "b b b "

    async def test_an_adapter_that_fails_its_canary_is_forgotten(self) -> None:
        maker = FakeMaker(hot=True)
        async with following(maker, Wanted(A, "a")) as (engines, wanted):
            await serving(engines, "a")
            engine = maker.last("a")

            async def silent(release: StoredRelease) -> None:
                engine.adapters[release.name] = ""

            engine.add_adapter = silent  # type: ignore[method-assign]
            wanted.append(Wanted(B, "b"))
            await until(lambda: engines.status().state == "failed")
            assert set(engine.adapters) == {"a"}
            assert await said(engines) == "a a a "

    async def test_a_release_of_another_base_gets_an_engine_of_its_own(self) -> None:
        maker = FakeMaker(hot=True)
        async with following(maker, Wanted(A, "a")) as (engines, wanted):
            await serving(engines, "a")
            wanted.append(Wanted(replace(B, base="other", model="other"), "b"))
            await serving(engines, "b")
            assert engines.name == "other"
            await until(lambda: maker.last("a").closed)


async def test_what_every_prompt_begins_with_is_computed_once_for_each_release_and_engine() -> None:
    maker = FakeMaker()
    rules: Sequence[Message] = [Message("system", "rules"), Message("user", "")]
    async with following(maker, Wanted(A, "a", beside=(B,))) as (engines, _):
        await until(lambda: engines.names() == ("a", "b"))
        for _n in range(3):
            await engines.warm(rules)
        assert (maker.last("a").warmed, maker.last("b").warmed) == ([None], [None])
        await engines.warm([Message("system", "other rules")])
        assert len(maker.last("a").warmed) == 2
        maker.last("a").dead.set()
        await until(lambda: len(maker.made) == 3, 10)
        await until(lambda: engines.state().ready, 10)
        await engines.warm([Message("system", "other rules")])
        assert len(maker.last("a").warmed) == 1
