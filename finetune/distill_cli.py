"""
`distill` on the command line, and the teacher: a model here through vLLM, or any OpenAI-compatible server.

A composition root: the only place of this package that brings an engine to train with. The retriever is handed in by
finetune/__main__.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from bot.engine import Engine, Sampling
from bot.errors import EngineBusy, EngineFailed, MerchantError
from bot.messages import Message
from bot.settings import Settings
from finetune.grounding import NO_STORE

SearchOf = Callable[[Path], tuple[Any, Any, Callable[[], None]]]  # store folder -> search, prompt store, close
N_TRIES = 3  # of one question, where a busy or broken teacher may recover


def add_parser(commands: Any, search_of: SearchOf) -> None:
    """Register `distill`."""
    c = commands.add_parser("distill", help="a larger model's answers, translations or labels as data to train on")
    c.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of `import`")
    c.add_argument("--out", type=Path, required=True, metavar="DIR", help="the data folder to write")
    c.add_argument(
        "--teacher", required=True, metavar="MODEL", help="catalog name or model folder, or MODEL@http://HOST:PORT/v1"
    )
    c.add_argument("--store", type=Path, metavar="DIR", help="the teacher answers from its passages, as in serving")
    c.add_argument(
        "--make", choices=("replies", "pseudo", "back-translation"), default="replies",
        help="its answers in the place of people's, answers to unanswered questions, or other wordings of questions",
    )  # fmt: skip
    c.add_argument(
        "--unlabelled", action="append", type=Path, default=[], metavar="FILE", help="pseudo: dialogues without a reply"
    )
    c.add_argument("--votes", type=int, default=3, metavar="N", help="answers drawn to see whether it is sure (3)")
    c.add_argument("--sure", action="store_true", help="replies: keep only what it is sure of, as pseudo does")
    c.add_argument("--min-confidence", type=_share, default=0.67, metavar="S", help="share of votes that agree (0.67)")
    c.add_argument("--max-chars", type=int, default=400, metavar="N", help="longest answer that is kept (400)")
    c.add_argument("--max-same", type=int, default=3, metavar="N", help="equal answers that are kept (3)")
    c.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    c.add_argument("--skip-bad", action="store_true", help="leave out unlabelled lines that cannot be read")
    c.add_argument("--seed", type=int, default=0)
    c.set_defaults(run=lambda options: _distill(options, search_of))


def _distill(options: argparse.Namespace, search_of: SearchOf) -> int:
    from finetune.data import load_data
    from finetune.distill import Limits

    if (options.make == "pseudo") != bool(options.unlabelled):
        raise MerchantError("--make pseudo and --unlabelled FILE go together: the questions that nobody answered")
    load_data(options.data)  # refused before a model is loaded
    if options.out.exists():
        raise MerchantError(f"--out {str(options.out)!r} is there already: name a new folder")
    limits = Limits(
        max_chars=options.max_chars, n_votes=options.votes, min_confidence=options.min_confidence,
        max_same=options.max_same,
    )  # fmt: skip
    engine, name = _engine(options.teacher)
    search, store, close = search_of(options.store) if options.store else (None, NO_STORE, lambda: None)
    try:
        report = asyncio.run(_work(options, engine, name, search, store, limits))
    finally:
        close()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(json.dumps(report, ensure_ascii=False, indent=1) if options.json else _lines(report))
    return 0


async def _work(
    options: argparse.Namespace, engine: Engine, name: str, search: Any, store: Any, limits: Any
) -> dict[str, Any]:
    from finetune.distill import distill

    await engine.start()
    try:
        return await distill(
            options.make, options.data, options.out, EngineTeacher(engine, name, options.max_new_tokens),
            search=search, store=store, unlabelled=options.unlabelled, limits=limits, ask_votes=options.sure,
            skip_bad=options.skip_bad, seed=options.seed, tell=_tell,
        )  # fmt: skip
    finally:
        await engine.close()


class EngineTeacher:
    """A teacher that is an engine."""

    def __init__(self, engine: Engine, name: str, max_tokens: int) -> None:
        self.name = name
        self._engine, self._max_tokens = engine, max_tokens

    async def answer(self, messages: Sequence[Message], *, seed: int | None) -> str:
        """Return the whole reply; "" for one that did not end, which no filter lets through."""
        sampling = Sampling(
            max_tokens=self._max_tokens, temperature=0.0 if seed is None else 0.8, seed=seed, priority=10
        )
        for attempt in range(N_TRIES):
            try:
                text, finish = "", None
                async with aclosing(self._engine.stream(messages, sampling)) as chunks:
                    async for chunk in chunks:
                        text, finish = text + chunk.text, chunk.finish or finish
                return text if finish == "stop" else ""
            except (EngineBusy, EngineFailed):
                if attempt == N_TRIES - 1:
                    raise
                await asyncio.sleep(2.0**attempt)
        raise AssertionError("unreachable")


def _engine(teacher: str) -> tuple[Engine, str]:
    """Return the engine of a teacher, not started, and its name."""
    settings = Settings()
    model, at, url = teacher.rpartition("@")
    if at and url.startswith(("http://", "https://")):
        from bot.engines.openai import OpenAIEngine

        return OpenAIEngine(url, model, settings.openai_api_key), model
    from bot.catalog import resolve_model
    from bot.engines.vllm import VllmEngine, profile_for_this_machine

    folder = resolve_model(teacher)
    name = Path(teacher).name
    return VllmEngine(folder, name, profile_for_this_machine().changed(settings.vllm)), name


def _tell(stage: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{stage}: {done} of {total}", end="", file=sys.stderr, flush=True)


def _lines(report: dict[str, Any]) -> str:
    counts = [f"- {name}: {n}" for name, n in report["counts"].items()]
    return "\n".join([f"{report['n_made']} dialogues made by {report['teacher']} ({report['work']})", *counts])


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value
