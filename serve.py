"""
`python serve.py`: the server, composed. Settings -> retriever, engine, storage -> app.

The one file that knows every implementation. Nothing heavy is imported before it is known to be needed: with
`--engine none` neither torch nor vLLM is ever loaded. The server answers within seconds and says on /readyz what
it still waits for; the index is built and the model fetched and loaded behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bot.agents.accounts import Accounts
from bot.agents.desk import Desk, DeskRules
from bot.agents.faq_file import FaqFile
from bot.agents.records import Records
from bot.answer import Answerer, Rules
from bot.attachments import AttachmentStore
from bot.conversations import ConversationHub
from bot.demo import ZONE as DEMO_ZONE
from bot.demo import date_promotions, demo_store
from bot.engine import Engine, has_releases
from bot.errors import BotError, MerchantError
from bot.fine_tuning_api import FineTuning
from bot.identity import Identities
from bot.leaving import leave
from bot.live_experiment import LiveExperiment
from bot.messages import Event, Language, Message
from bot.metrics import Metrics
from bot.prompt import render_prompt
from bot.releases import Wanted, follow_pointer, named
from bot.server import IndexStatus, Parts, ServerLimits, create_app, run
from bot.settings import Settings, load_store_profile, secret_of
from bot.storage import Storage
from bot.uploads import sweep_unused
from retrieval.errors import BadStore, RetrievalError
from retrieval.passages import Hit, Passage
from retrieval.retriever import LiveRetriever
from retrieval.settings import load_settings

logger = logging.getLogger("zhanggui")


class LateRetriever:
    """A retriever that is built behind the running server; until then every search raises RetrievalError."""

    def __init__(self, store_dir: Path, settings: Settings) -> None:
        self._store_dir, self._settings = store_dir, settings
        self._live: LiveRetriever | None = None
        self._detail = "waiting to be built"
        self._stopping = False

    async def build(self) -> None:
        """Build or load the index, then keep it up with the files until cancelled."""
        try:
            while self._live is None:
                try:
                    self._live = await asyncio.to_thread(self._open)
                except BadStore as exc:
                    # Nothing older is there to serve: wait for the merchant to mend the files.
                    self._detail = "the store's files have faults"
                    logger.error("no index: %s", exc)
                    await asyncio.sleep(5)
                except (RetrievalError, OSError) as exc:
                    # A package missing or a full disk: said on /readyz, and tried again, since people mend these.
                    self._detail = f"cannot be built: {exc}" if isinstance(exc, RetrievalError) else "cannot be built"
                    logger.error("no index: %s", exc)
                    await asyncio.sleep(30)
            self._live.start()
            status = self._live.status()
            logger.info("index ready: %d passages, version %s", status.n_passages, status.version)
            await asyncio.Event().wait()
        finally:
            self._stopping = True  # a thread cannot be cancelled; it looks here after each batch
            if self._live is not None:
                self._live.close()

    def _open(self) -> LiveRetriever:
        self._detail = "loading the embedder"
        settings = self._settings
        chosen = load_settings(
            self._store_dir,
            embedder=settings.embedder,
            embedder_url=settings.embedder_url,
            embedder_api_key=secret_of(settings.embedder_api_key),
            vectors=settings.vectors,
            vectors_url=secret_of(settings.vectors_url),
        )
        embedder = chosen.open_embedder(settings.embedder_threads)
        began = shown = time.monotonic()

        def progress(n_done: int, n_total: int) -> None:
            nonlocal shown
            if self._stopping:
                raise RetrievalError("the server stops")
            now = time.monotonic()
            left = (now - began) / max(n_done, 1) * (n_total - n_done)
            self._detail = f"embedding {n_done} of {n_total} texts, about {left:.0f} s left"
            if n_done == n_total or now - shown >= 5:
                shown = now
                logger.info("index: %s", self._detail)

        cache = settings.cache_dir() / "index"
        return LiveRetriever(self._store_dir, embedder, cache, progress=progress, vectors=chosen.open_vectors())

    def index_status(self) -> IndexStatus:
        if self._live is None:
            return IndexStatus(False, detail=self._detail)
        status = self._live.status()
        faults = (
            [f"{len(status.faults)} faults in the store's files; an older version is served"] if status.faults else []
        )
        return IndexStatus(True, status.version, status.n_passages, "; ".join([*faults, *status.notes]))

    def _ready(self) -> LiveRetriever:
        if self._live is None:
            raise RetrievalError(f"no index yet: {self._detail}")
        return self._live

    @property
    def version(self) -> str:
        return self._live.version if self._live is not None else ""

    @property
    def thresholds(self) -> Mapping[str, float]:
        return self._live.thresholds if self._live is not None else {}

    def gist(self, message: str, *, now: datetime) -> str:
        return self._ready().gist(message, now=now)

    def search(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        return self._ready().search(query, k, now=now, lang=lang, kinds=kinds)

    def expired(self, query: str, k: int = 3, *, now: datetime) -> list[Hit]:
        return self._ready().expired(query, k, now=now)

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]:
        return self._live.current(kind, now=now, lang=lang) if self._live is not None else []

    def get(self, passage_id: str) -> Passage | None:
        return self._live.get(passage_id) if self._live is not None else None


def build_engine(
    settings: Settings, canaries: Callable[[], Sequence[Sequence[Message]]], followed: Callable[[], Wanted]
) -> Engine | None:
    """
    Return the engine the settings name, not started; None for approved answers only. It must answer `canaries`.

    `followed` says which releases are to be live, where the settings name no model.
    """
    if settings.engine == "none":
        return None
    if settings.engine == "openai":
        from bot.engines.openai import OpenAIEngine

        if not settings.model:
            raise MerchantError("--engine openai needs --model, the name the remote server serves it under")
        return OpenAIEngine(settings.openai_url, settings.model, settings.openai_api_key)
    from bot.engines.fetched import EngineMaker
    from bot.engines.releases import ReleasedEngines

    wanted = followed
    if settings.model:
        fixed = Wanted(named(settings.model), follows=False)
        wanted = lambda: fixed  # noqa: E731
    return ReleasedEngines(EngineMaker(settings.cache_dir(), settings.vllm), wanted, canaries)


def build_fine_tuning(settings: Settings, store_dir: Path) -> tuple[FineTuning, Callable[[], Awaitable[None]]]:
    """
    Return the files and jobs of the data folder, and what runs them beside the server. Loads no torch: jobs do.

    Raises:
        MerchantError: the database of jobs cannot be opened.
    """
    from finetune.files import check_expiry, check_purpose
    from finetune.jobs import open_queue
    from finetune.runner import Limits, Runner

    queue = open_queue(
        settings.data_dir(),
        releases=settings.releases_dir(),
        models=settings.cache_dir() / "models",
        store=store_dir,
        max_file_bytes=settings.upload_mb * 2**20,
        threads=settings.job_threads,
    )
    memory = settings.job_memory_gb
    limits = Limits(
        settings.jobs_at_once,
        None if memory is None else int(memory * 2**30),
        settings.job_hours,
        settings.job_keep_days,
    )
    runner = Runner(queue, limits)
    return FineTuning(queue.files, queue, check_purpose, check_expiry, runner.figures), runner.run


def build_parts(settings: Settings) -> Parts:
    """
    Return everything the server is made of; nothing is started, opened or fetched yet.

    Raises:
        MerchantError: a setting or store.toml that cannot be used.
    """
    data = settings.data_dir()
    data.mkdir(parents=True, exist_ok=True)
    store_dir = demo_store(data / "demo") if settings.store is None else settings.store
    # A store whose promotions are given by day offsets, as the demo store's are.
    is_demo = (store_dir / "promotions.rules.csv").exists() and os.access(store_dir, os.W_OK)
    if is_demo:
        date_promotions(store_dir, datetime.now(DEMO_ZONE).date())
    profile = load_store_profile(store_dir)
    retriever = LateRetriever(store_dir, settings)

    def canaries() -> list[list[Message]]:
        # As visitors ask, with a passage to answer from; begun as every prompt is, which warms the prefix cache.
        asked: dict[Language, tuple[str, str]] = {
            "zh": ("你们几点上班？", "人工客服的工作时间是每天9点到21点。"),
            "en": ("When are you open?", "Our agents are here every day from 9:00 to 21:00."),
        }
        store = answerer.prompt_store(datetime.now(UTC))
        return [
            render_prompt(store, (), question, [Passage("hours", "faq", question, text, language, "canary")], language)
            for language, (question, text) in asked.items()
            if language in profile.languages
        ]

    experiment = LiveExperiment(settings.releases_dir(), follow_pointer(settings.releases_dir()))
    engine = build_engine(settings, canaries, experiment.wanted)
    rules = Rules(
        direct=settings.direct,
        direct_confidence=settings.direct_confidence,
        sure_confidence=settings.sure_confidence,
        answer_confidence=settings.answer_confidence,
        n_passages=settings.n_passages,
        max_reply_tokens=settings.max_reply_tokens,
    )
    answerer = Answerer(retriever=retriever, engine=engine, profile=profile, rules=rules)
    storage = Storage(settings.database())
    metrics = Metrics()
    hub = ConversationHub(storage, answerer, recorder=metrics, policy=profile.handoff, assign=experiment.assign)
    records = Records(storage)
    desk = Desk(
        hub=hub,
        records=records,
        accounts=Accounts(records, session_h=settings.agent_session_h),
        answerer=answerer,
        engine=engine,
        store=profile,
        recorder=metrics,
        faq_file=FaqFile(store_dir),
        rules=DeskRules(agent_gone_s=settings.agent_gone_s, conversations_per_agent=settings.conversations_per_agent),
    )

    attachments = AttachmentStore(data / "attachments")
    fine_tuning, run_jobs = build_fine_tuning(settings, store_dir)

    async def events_of(conversation: str) -> Sequence[Event]:
        await storage.get(conversation)
        return await storage.events(conversation)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(3600)
            try:
                await sweep_unused(attachments, events_of)
            except (BotError, OSError) as exc:
                logger.warning("unused attachments were not removed: %s", exc)

    async def keep_dated() -> None:
        # A demo that runs past midnight keeps promotions that are on today.
        while True:
            await asyncio.sleep(600)
            await asyncio.to_thread(date_promotions, store_dir, datetime.now(DEMO_ZONE).date())

    async def warm() -> None:
        # What every prompt begins with is computed before a visitor waits for it: with each new engine (a release,
        # a restart), and when the promotions of the day change.
        while has_releases(engine):
            await asyncio.sleep(1)
            if engine.state().ready and retriever.index_status().ready:
                try:
                    await engine.warm(render_prompt(answerer.prompt_store(datetime.now(UTC)), (), "", (), "zh"))
                except BotError as exc:
                    logger.warning("the prompt was not warmed: %s", exc.code)

    return Parts(
        storage=storage,
        hub=hub,
        answerer=answerer,
        engine=engine,
        index=retriever.index_status,
        release=answerer.release,
        releases=engine.status if has_releases(engine) else None,
        store=profile,
        promotions=lambda: [_promotion(p) for p in retriever.current("promotion", now=datetime.now(UTC))],
        products=lambda: [_product(p) for p in retriever.current("product", now=datetime.now(UTC))],
        metrics=metrics,
        web_dir=Path(__file__).resolve().parent / "bot" / "web",
        store_dir=store_dir,
        attachments=attachments,
        desk=desk,
        identities=Identities(secret_of(settings.identity_secret)),
        fine_tuning=fine_tuning,
        api_key=secret_of(settings.api_key),
        limits=ServerLimits(
            allowed_origins=settings.allowed_origins,
            asks_per_minute=settings.asks_per_minute,
            sockets_per_address=settings.sockets_per_address,
        ),
        jobs=(retriever.build, warm, sweep, run_jobs, *((keep_dated,) if is_demo else ())),
    )


def _promotion(p: Passage) -> dict[str, Any]:
    return {
        "id": p.id,
        "title": p.title,
        "description": p.meta.get("description", p.text),
        "code": p.meta.get("code") or None,
        "lang": p.lang,
        "valid_from": p.valid_from.isoformat() if p.valid_from else None,
        "valid_until": p.valid_until.isoformat() if p.valid_until else None,
    }


def _product(p: Passage) -> dict[str, Any]:
    fields = ("sku", "price", "currency", "category", "stock", "image", "url", "description")
    return {"id": p.id, "title": p.title, "lang": p.lang, **{f: p.meta.get(f) for f in fields}}


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """Return the settings: command line over environment over defaults."""
    parser = argparse.ArgumentParser(prog="serve.py", description="Zhanggui: the chat server of one online store.")
    parser.add_argument("--store", type=Path, metavar="DIR", help="store folder; without it the demo store")
    parser.add_argument("--host", metavar="H", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="P", help="port to listen on (8000)")
    parser.add_argument("--engine", choices=("vllm", "openai", "none"), help="what generates (vllm)")
    parser.add_argument("--model", metavar="NAME", help="catalog name, or a folder; without it what is published")
    parser.add_argument("--releases", type=Path, metavar="DIR", help="published releases to follow (DATA/releases)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder for conversations (var/)")
    parser.add_argument("--direct", choices=("on", "off"), help="off: every answer is generated (for measuring)")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "direct" in given:
        given["direct"] = given["direct"] == "on"
    try:
        return Settings(**given)
    except ValueError as exc:  # pydantic's ValidationError is one
        first = str(exc).splitlines()
        raise MerchantError("; ".join(line.strip() for line in first[1:3])) from None


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; return 0, or 2 where a setting or file cannot be used."""
    try:
        settings = parse_arguments(argv)
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
        for noisy in ("httpx", "httpcore", "faiss", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns of a Triton that nobody needs here
        parts = build_parts(settings)
        app = create_app(parts)
        shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
        print(f"Zhanggui 掌柜: {parts.store.name} at http://{shown}:{settings.port}", flush=True)
        run(
            app,
            settings.host,
            settings.port,
            trusted_proxies=settings.trusted_proxies,
            log_config=None,  # set up above, at the level asked for
        )
    except MerchantError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
