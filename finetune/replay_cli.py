"""
`python -m finetune replay`: past questions asked again, of a candidate and of the current release, before any visitor is.

A composition root: the bot that serves (`bot.answer`), with its retriever and its checks, around one engine after the other;
its clock stands at each question's own time, so that both get the passages that were valid then. What is compared is
`finetune.replay`'s.
"""  # noqa: E501

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bot.answer import Answerer, Retriever, Rules
from bot.engine import Chunk, Engine, EngineState, Sampling
from bot.errors import BotError, MerchantError
from bot.messages import Message, Reply
from bot.releases import StoredRelease, default_release, load_release, read_pointer, resolve_release
from bot.settings import Settings, StoreProfile, load_store_profile, secret_of
from finetune import replay
from finetune.replay import FOLDER, Answered, Bounds, Question
from retrieval.errors import RetrievalError


def add_parser(commands: Any) -> None:
    """Add `replay`."""
    c = commands.add_parser("replay", help="past questions, answered by a candidate and by the current release")
    c.add_argument("--run", dest="run_folder", type=Path, metavar="DIR", help="the candidate: a finished run")
    c.add_argument("--release", metavar="NAME", help="the candidate: a release that is not the current one")
    c.add_argument(
        "--conversations", metavar="FILE", help="the server's conversations.sqlite3, or its SQLAlchemy URL (var/)"
    )  # fmt: skip
    c.add_argument("--data", type=Path, metavar="DIR", help="an imported data folder instead: its test side")
    c.add_argument("--store", type=Path, metavar="DIR", help="the store's folder; the run's own, else the demo store")
    c.add_argument("--since", type=_moment, metavar="TIME", help="only questions from then on, for instance 2026-11-01")
    c.add_argument("--n", type=int, default=200, metavar="N", help="questions to replay (200)")
    c.add_argument("--min-n", type=int, default=replay.MIN_N, metavar="N", help=f"fewer do not pass ({replay.MIN_N})")
    c.add_argument(
        "--max-latency", type=float, default=Bounds.max_latency, metavar="X",
        help=f"times as slow as the current release that passes ({Bounds.max_latency:g}); the machine should be quiet",
    )  # fmt: skip
    c.add_argument("--concurrency", type=int, default=4, metavar="N", help="questions asked at a time (4)")
    c.add_argument(
        "--direct", choices=("on", "off"), default="on", help="off: every answer is generated, as none is in service"
    )
    c.add_argument(
        "--url", action="append", default=[], metavar="WHO=MODEL@URL",
        help="candidate or current at an OpenAI-compatible server, instead of an engine here",
    )  # fmt: skip
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--releases", type=Path, metavar="DIR", help="folder of releases (var/releases)")
    c.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    c.set_defaults(run=_replay)


def _moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 2026-11-01 or 2026-11-01T09:00+08:00") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _replay(options: argparse.Namespace) -> int:
    if (options.run_folder is None) == (options.release is None):
        raise MerchantError("replay needs a candidate: --run DIR or --release NAME, and not both")
    if options.n < 1 or options.concurrency < 1:
        raise MerchantError("--n and --concurrency: 1 or more")
    settings = Settings()
    releases = options.releases or settings.releases_dir()
    remotes = _remotes(options.url)
    current = _current(releases)
    head: dict[str, Any] = {}
    if options.run_folder is not None:
        from finetune.evaluate import finished

        head, result = finished(options.run_folder)
        name, path = options.run_folder.name, options.run_folder / "replay.json"
        head["result_sha256"] = result["sha256"]
    else:
        name, path = options.release, releases / FOLDER / f"{options.release}.json"
        if not (releases / name / "release.json").is_file():
            raise MerchantError(
                f"--release: no release {name!r} in {releases}; `python -m finetune releases` lists them"
            )
        if name == current.adapter:
            raise MerchantError(f"--release: {name!r} is the current release: it would be compared with itself")

    store = options.store or _store_of(head, settings)
    profile = load_store_profile(store)
    questions, source = _questions(options, settings, profile)
    if not questions:
        raise MerchantError(
            f"{source}: no question with a reply{' since then' if options.since else ''}; nothing to replay"
        )
    with _retriever(store, settings) as retriever, tempfile.TemporaryDirectory() as temporary:
        bot = _Bot(retriever, profile, settings, options.direct == "on", options.concurrency)
        answers = {}
        for who in ("candidate", "current"):
            _tell(f"{who}: {len(questions)} questions")
            if who in remotes:
                engine = _remote(*remotes[who])
            elif who == "candidate":
                engine = _local(_candidate_folder(options, releases, head, Path(temporary), settings), name, settings)
            else:
                engine = _local(resolve_release(current, settings.cache_dir()), current.name, settings)
            answers[who] = asyncio.run(bot.answer_all(engine, questions))
    bounds = Bounds(min_n=options.min_n, max_latency=options.max_latency)
    found = {
        "candidate": name,
        "current": current.adapter,
        "result_sha256": head.get("result_sha256"),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "store": str(store),
        "direct": options.direct == "on",
        "concurrency": options.concurrency,
        "seed": options.seed,
        **replay.compare(questions, answers["candidate"], answers["current"], bounds),
        "samples": replay.samples_of(questions, answers["candidate"], answers["current"]),
    }
    replay.save(found, path)
    print(json.dumps(found, ensure_ascii=False, indent=1) if options.json else _lines(found, path))
    return 0


def _lines(found: dict[str, Any], path: Path) -> str:
    lines = [f"{found['n']} questions, {found['n_model']} reached a model; equal replies {found['equal']:.1%}"]
    for name, figures in found["figures"].items():
        lines.append(f"{name}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in figures.items()))
    for value, rated in found["rated"].items():
        lines.append(f"rated {value}: {rated['n']}, changed by the candidate {rated['candidate_changed']}")
    if (agreement := found["agreement"]) is not None:
        gain = agreement["gain"]
        lines.append(
            f"like the {agreement['n']} good ones: {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        )
    verdict = found["verdict"]
    lines.append("replay: passed" if verdict["passed"] else f"replay: not passed: {'; '.join(verdict['reasons'])}")
    return "\n".join([*lines, f"report: {path.with_suffix('.html')}"])


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


# --- Who answers ------------------------------------------------------------------------------------------------------


def _current(releases: Path) -> StoredRelease:
    name = read_pointer(releases).release
    return load_release(releases / name) if name is not None else default_release()


def _candidate_folder(
    options: argparse.Namespace, releases: Path, head: dict[str, Any], temporary: Path, settings: Settings
) -> Path:
    """Return a model folder with the candidate's weights."""
    if options.release is not None:
        return resolve_release(load_release(releases / options.release), settings.cache_dir())
    from bot.catalog import resolve_model
    from finetune.modeling import merge

    result = options.run_folder / "result"
    if (result / "config.json").is_file():
        return Path(result)
    merge(resolve_model(head["base"]), result, temporary / "merged")
    return temporary / "merged"


def _remotes(items: Sequence[str]) -> dict[str, tuple[str, str]]:
    found = {}
    for item in items:
        who, equals, rest = item.partition("=")
        model, at, url = rest.partition("@")
        if who not in ("candidate", "current") or not equals or not at or not url.startswith(("http://", "https://")):
            raise MerchantError(f"--url: {item!r}; write candidate=MODEL@http://HOST:PORT/v1, or current=…")
        found[who] = (model, url)
    return found


def _remote(model: str, url: str) -> Engine:
    from bot.engines.openai import OpenAIEngine

    return OpenAIEngine(url, model, Settings().openai_api_key)


def _local(folder: Path, name: str, settings: Settings) -> Engine:
    from bot.engines.vllm import VllmEngine, profile_for_this_machine

    return VllmEngine(folder, name, profile_for_this_machine().changed(settings.vllm))


# --- What is asked, and of what store ---------------------------------------------------------------------------------


def _store_of(head: dict[str, Any], settings: Settings) -> Path:
    from bot.demo import demo_store

    named = (head.get("config") or {}).get("store") or settings.store
    return Path(named) if named else demo_store(settings.data_dir() / "demo")


def _questions(options: argparse.Namespace, settings: Settings, profile: StoreProfile) -> tuple[list[Question], str]:
    if options.data is not None:
        from finetune.data import load_data

        asked = [q for d in load_data(options.data).splits["test"] for q in replay.questions_of_dialogue(d)]
        if options.since is not None:
            asked = [q for q in asked if q.at is not None and q.at >= options.since]
        return replay.sample(asked, options.n, options.seed), str(options.data / "test.jsonl")
    database = options.conversations or settings.database()
    asked = asyncio.run(_logged(database, options.since, tuple(profile.contact.values())))
    shown = database if "@" not in database else "the database"  # the URL may hold a password
    return replay.sample(asked, options.n, options.seed), shown


async def _logged(database: str, since: datetime | None, keep: tuple[str, ...]) -> list[Question]:
    from bot.storage import Storage

    storage = Storage(database)
    await storage.open(shared=True, must_exist=True)
    try:
        found: list[Question] = []
        async for log in storage.logs(since=since or datetime(2000, 1, 1, tzinfo=UTC)):
            found += replay.questions_of_log(log, since, keep)
        return found
    finally:
        await storage.close()


@contextmanager
def _retriever(store: Path, settings: Settings) -> Iterator[Retriever]:
    """Open the store's index as serve.py does."""
    from retrieval.retriever import LiveRetriever
    from retrieval.settings import load_settings

    try:
        chosen = load_settings(
            store,
            embedder=settings.embedder,
            embedder_url=settings.embedder_url,
            embedder_api_key=secret_of(settings.embedder_api_key),
            vectors=settings.vectors,
            vectors_url=secret_of(settings.vectors_url),
        )
        embedder = chosen.open_embedder(settings.embedder_threads)
        found = LiveRetriever(store, embedder, settings.cache_dir() / "index", vectors=chosen.open_vectors())
    except RetrievalError as exc:
        raise MerchantError(str(exc)) from exc
    try:
        yield found
    finally:
        found.close()


# --- The bot around an engine -----------------------------------------------------------------------------------------


@dataclass
class _Asking:
    """The question that a task is busy with: its time, and what the model was asked and said for it."""

    at: datetime
    prompts: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


_ASKING: ContextVar[_Asking] = ContextVar("asking")


class _Overheard:
    """An engine whose words are kept for the task that asked, as they were before any check."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self.name, self.adapter = inner.name, None

    @property
    def max_prompt_tokens(self) -> int:
        return self._inner.max_prompt_tokens

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        if sampling.n_likely:  # a look before a quotation: nothing that the model says
            async with aclosing(self._inner.stream(messages, sampling)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        asking = _ASKING.get()
        asking.prompts.append("\n".join(m.content for m in messages))
        async with aclosing(self._inner.stream(messages, sampling)) as chunks:
            async for chunk in chunks:
                asking.said.append(chunk.text)
                yield chunk

    def state(self) -> EngineState:
        return self._inner.state()

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return self._inner.count_tokens(messages)

    async def start(self) -> None:
        await self._inner.start()

    async def close(self) -> None:
        await self._inner.close()

    def figures(self) -> dict[str, float]:
        return self._inner.figures()


class _Bot:
    """The bot of a store, for one engine after the other."""

    def __init__(
        self, retriever: Retriever, profile: StoreProfile, settings: Settings, direct: bool, concurrency: int
    ) -> None:
        self._retriever, self._profile, self._concurrency = retriever, profile, concurrency
        self._rules = Rules(
            direct=direct,
            direct_confidence=settings.direct_confidence,
            sure_confidence=settings.sure_confidence,
            answer_confidence=settings.answer_confidence,
            n_passages=settings.n_passages,
            max_reply_tokens=settings.max_reply_tokens,
        )
        self._now = datetime.now(UTC)  # one for both contestants

    async def answer_all(self, engine: Engine, questions: Sequence[Question]) -> list[Answered]:
        """Return the replies of `engine`, in the questions' order; it is started and closed here."""
        overheard = _Overheard(engine)
        answerer = Answerer(
            retriever=self._retriever,
            engine=overheard,
            profile=self._profile,
            rules=self._rules,
            clock=lambda: _ASKING.get().at,
        )
        places = asyncio.Semaphore(self._concurrency)
        done = 0

        async def one(question: Question) -> Answered:
            nonlocal done
            async with places:
                found = await self._answer(answerer, question)
            done += 1
            if sys.stderr.isatty():
                print(f"\r\x1b[K{done}/{len(questions)}", end="" if done < len(questions) else "\n", file=sys.stderr)
            return found

        try:
            await overheard.start()
            return list(await asyncio.gather(*map(one, questions)))
        finally:
            answerer.close()
            await overheard.close()

    async def _answer(self, answerer: Answerer, question: Question) -> Answered:
        asking = _Asking(question.at or self._now)
        _ASKING.set(asking)  # in this task's own context
        began = time.perf_counter()
        reply: Reply | None = None
        failure = "no reply"
        try:
            steps = answerer.answer(question.history, question.text, locale=question.locale)
            async with aclosing(steps), asyncio.timeout(300):
                async for step in steps:
                    if isinstance(step, Reply):
                        reply = step
        except (BotError, TimeoutError) as exc:
            failure = f"{type(exc).__name__}: {exc}"
        ms = 1000 * (time.perf_counter() - began)
        raw, prompt = "".join(asking.said), "\n".join(asking.prompts)
        if reply is None:
            return Answered(failure, "failed", ms, raw, prompt)
        return Answered(reply.text, reply.outcome, ms, raw, prompt, tuple(c.id for c in reply.citations))
