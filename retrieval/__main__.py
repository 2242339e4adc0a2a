"""
`python -m retrieval search | eval | calibrate`: what a merchant and a check from outside type.

Knows arguments, exit statuses and JSON; everything else is elsewhere. One JSON document on stdout with --json; logs and
progress go to stderr. 0: done; 2: bad usage or bad input, one line on stderr; 1: a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from retrieval.bilingual import default_embedder
from retrieval.embedder import Progress, VectorCache
from retrieval.errors import BadStore, RetrievalError
from retrieval.evaluate import evaluate, load_questions
from retrieval.load import load_knowledge, load_zone, parse_time
from retrieval.passages import Hit
from retrieval.retriever import LiveRetriever


class _Parser(argparse.ArgumentParser):
    """argparse with its errors in one line, as the contract has it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except BadStore as exc:
        print(exc, file=sys.stderr)
        return 2
    except (RetrievalError, OSError) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1


def _search(options: argparse.Namespace) -> int:
    zone = load_zone(options.store) if options.store.is_dir() else UTC
    try:
        now = parse_time(options.at, zone, until=False) if options.at else datetime.now(UTC)
    except ValueError:
        print(f"--at: {options.at!r} is no ISO time; write 2026-11-22T10:00 or 2026-11-22T10:00+08:00", file=sys.stderr)
        return 2
    retriever = LiveRetriever(
        options.store, default_embedder(options.threads), options.cache, zone, progress=_progress()
    )
    try:
        hits = retriever.search(options.text, options.k, now=now, lang=options.lang, kinds=options.kind)
        for fault in retriever.status().faults:
            print(f"an older state of the store is searched: {fault}", file=sys.stderr)
    finally:
        retriever.close()
    if options.json:
        _print_json([dump_hit(hit) for hit in hits])
    else:
        for hit in hits:
            text = " ".join(hit.passage.text.split())
            print(f"{hit.confidence:.2f}  {hit.passage.id}  {hit.passage.title}\n      {text[:160]}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    passages = load_knowledge(options.knowledge)
    questions = load_questions(options.questions)
    cache = VectorCache(None if options.cache is None else options.cache / "embeddings.sqlite")
    try:
        found = evaluate(passages, questions, default_embedder(options.threads), cache, progress=_progress())
    finally:
        cache.close()
    if options.json:
        _print_json(found)
    else:
        for name, value in found.items():
            print(f"{name:20} {value}")
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from retrieval.calibrate import calibrate  # its data are the developers'; nobody else pays for the import

    report = calibrate(options.data, default_embedder(options.threads), options.cache, options.out)
    _print_json(report)
    return 0


def dump_hit(hit: Hit) -> dict[str, Any]:
    """Return a hit as the search command prints it."""
    passage = hit.passage
    return {
        "id": passage.id,
        "score": hit.score,
        "confidence": hit.confidence,
        "kind": passage.kind,
        "title": passage.title,
        "text": passage.text,
        "source": passage.source,
        "valid_from": passage.valid_from.isoformat() if passage.valid_from else None,
        "valid_until": passage.valid_until.isoformat() if passage.valid_until else None,
        "lang": passage.lang,
        "wording": hit.wording,
    }


def _print_json(document: Any) -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a C locale would fail on 优惠
    print(json.dumps(document, ensure_ascii=False, indent=1))


def _progress() -> Progress | None:
    """Return a one-line progress report for a terminal, nothing for a pipe."""
    if not sys.stderr.isatty():
        return None

    def tell(n_done: int, n_total: int) -> None:
        print(f"\rembedding {n_done}/{n_total}", end="\n" if n_done == n_total else "", file=sys.stderr, flush=True)

    return tell


def _parser() -> argparse.ArgumentParser:
    about = "Search a store's knowledge, or measure how well it is found."
    parser = _Parser(prog="python -m retrieval", description=about)
    commands = parser.add_subparsers(required=True, metavar="search|eval|calibrate", parser_class=_Parser)
    # The server's own (bot/settings.py), so that neither embeds what the other has embedded.
    above = os.environ.get("XDG_CACHE_HOME")
    base = os.environ.get("ZHANGGUI_CACHE") or (Path(above) if above else Path.home() / ".cache") / "zhanggui"
    default_cache = Path(base) / "index"

    search = commands.add_parser("search", help="hits for one question, best first")
    search.add_argument("text", metavar="TEXT")
    search.add_argument("--store", type=Path, required=True, metavar="DIR", help="the store folder")
    search.add_argument("-k", type=_positive, default=5, metavar="N", help="how many hits (default 5)")
    search.add_argument("--at", metavar="ISO_TIME", help="as if it were then; without an offset in the store's zone")
    search.add_argument("--lang", choices=("zh", "en"), help="the visitor's language (default: the question's)")
    search.add_argument("--kind", action="append", choices=("faq", "policy", "promotion", "product", "page"))
    search.set_defaults(run=_search)

    evaluation = commands.add_parser("eval", help="recall, MRR, coverage at 1%% risk")
    evaluation.add_argument("--knowledge", type=Path, required=True, metavar="K.jsonl")
    evaluation.add_argument("--questions", type=Path, required=True, metavar="Q.jsonl")
    evaluation.set_defaults(run=_eval)

    fit = commands.add_parser("calibrate", help="fit calibration.json on the public data sets (developers)")
    fit.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR")
    fit.add_argument("--out", type=Path, default=None, metavar="FILE", help="where to write (default: print only)")
    fit.set_defaults(run=_calibrate)

    for command, cache in ((search, default_cache), (evaluation, None), (fit, default_cache)):
        command.add_argument("--cache", type=Path, default=cache, metavar="DIR", help="where vectors are kept")
        command.add_argument("--threads", type=_positive, default=2, metavar="N", help="cores to use (default 2)")
        if command is not fit:
            command.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
