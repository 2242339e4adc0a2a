"""`python -m bot ask|chat|eval|bench|agents|models|settings|schemas`: clients of a server, accounts, models."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from bot import agents_cli, catalog_cli
from bot.asyncapi import documents
from bot.bench import bench
from bot.client import connect
from bot.errors import BotError, MerchantError
from bot.evaluate import evaluate, load_cases
from bot.settings import settings_markdown

DEFAULT_URL = "ws://127.0.0.1:8000/ws"


def main(argv: list[str] | None = None) -> int:
    """Run one command; return 0 on success, 2 on bad usage or input, 1 on a failure."""
    parser = argparse.ArgumentParser(prog="python -m bot", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    ask = commands.add_parser("ask", help="one conversation, each TEXT a turn")
    ask.add_argument("text", nargs="+", metavar="TEXT")
    chat = commands.add_parser("chat", help="talk to the server in this terminal")
    evaluation = commands.add_parser("eval", help="run evaluation cases")
    evaluation.add_argument("--cases", type=Path, required=True, help="cases, one JSON object a line")
    evaluation.add_argument("--concurrency", type=int, default=1)
    load = commands.add_parser("bench", help="a load run")
    load.add_argument("--questions", type=Path, required=True, help="one question a line")
    load.add_argument("--concurrency", default="1,8", help="comma-separated, one run each (default 1,8)")
    for command in (ask, chat, evaluation, load):
        command.add_argument("--url", default=DEFAULT_URL, help=f"default {DEFAULT_URL}")
    for command in (ask, evaluation, load):
        command.add_argument("--json", action="store_true", help="print exactly one JSON document")
    for command in (ask, chat):
        command.add_argument("--locale", help="zh-CN, en, …: the language where the text does not show it")

    agents_cli.add_parser(commands)
    catalog_cli.add_parser(commands)
    commands.add_parser("settings", help="print docs/settings.md")
    schemas = commands.add_parser("schemas", help="write asyncapi.json and schemas/*.json, made from the frames")
    schemas.add_argument("folder", type=Path)

    args = parser.parse_args(argv)
    try:
        if args.command == "agents":
            return agents_cli.run(args)
        if args.command == "models":
            return catalog_cli.run(args)
        if args.command == "settings":
            print(settings_markdown(), end="")
            return 0
        if args.command == "schemas":
            for path, text in documents().items():
                (args.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (args.folder / path).write_text(text, encoding="utf-8")
            return 0
        return asyncio.run(_COMMANDS[args.command](args))
    except MerchantError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except (BotError, OSError, TimeoutError) as exc:
        print(f"failed: {exc or type(exc).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


async def _ask(args: argparse.Namespace) -> int:
    events: list[dict[str, Any]] = []
    async with connect(args.url, locale=args.locale) as client:
        for text in args.text:
            async for frame in client.stream(text):
                if frame["type"] == "delta" and not args.json:
                    print(frame["text"], end="", flush=True)
                elif frame["type"] == "event" and frame.get("role") == "bot":
                    events.append(frame)
                    if not args.json:
                        _finish(frame)
    if args.json:
        print(json.dumps(events, ensure_ascii=False))
    return 0


async def _chat(args: argparse.Namespace) -> int:
    async with connect(args.url, locale=args.locale) as client:
        print(client.welcome.get("greeting", ""))
        while True:
            try:
                text = (await asyncio.to_thread(input, "\n> ")).strip()
            except EOFError:
                print()
                return 0
            if not text:
                continue
            try:
                async for frame in client.stream(text):
                    if frame["type"] == "delta":
                        print(frame["text"], end="", flush=True)
                    elif frame["type"] == "event" and frame.get("role") == "bot":
                        _finish(frame)
            except BotError as exc:
                print(f"({exc})")


def _finish(event: dict[str, Any]) -> None:
    """Print what a streamed reply still lacks: its revision, and where it comes from."""
    if event.get("revised"):
        print(f"\n[revised] {event['text']}", end="")
    sources = "; ".join(f"{c['title']} ({c['source']})" for c in event.get("citations", ()))
    print(f"\n  [{event.get('outcome')}]" + (f" {sources}" if sources else ""))


async def _eval(args: argparse.Namespace) -> int:
    cases = load_cases(args.cases)
    result = await evaluate(args.url, cases, concurrency=args.concurrency, progress=_progress)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    for failure in result["failures"]:
        print(f"- {failure['id']} [{failure['outcome']}] {failure['question']}\n  missing {failure['missing']}")
    print({k: v for k, v in result.items() if k not in ("cases", "failures")})
    return 0


async def _bench(args: argparse.Namespace) -> int:
    try:
        levels = [int(level) for level in args.concurrency.split(",")]
        questions = [q for q in args.questions.read_text(encoding="utf-8").splitlines() if q.strip()]
    except (ValueError, OSError) as exc:
        raise MerchantError(str(exc)) from None
    if not questions or min(levels) < 1:
        raise MerchantError("needs at least one question, and --concurrency of 1 or more")
    results = [await bench(args.url, questions, level, progress=_progress) for level in levels]
    if args.json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        for result in results:
            print(result)
    return 1 if all(r["completed"] == 0 for r in results) else 0


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


_COMMANDS = {"ask": _ask, "chat": _chat, "eval": _eval, "bench": _bench}

if __name__ == "__main__":
    sys.exit(main())
