"""
`python -m finetune import|train|search|classify|eval|publish|rollback|releases`: what a merchant types.

The composition root of this package, as serve.py is of the server: knows arguments, exit statuses and JSON, and is the
only file here that knows the retriever, so that training sees the passages that serving would. 0: done; 2: bad usage or
bad input, one line on stderr; 1: a failure. `--json` prints exactly one JSON document; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bot.errors import BotError, MerchantError
from bot.leaving import leave
from finetune import ab_cli, ablate_cli, augment, distill_cli, jobs_cli, replay_cli, train_cli
from finetune.formats import FORMATS
from finetune.importing import BadData, ImportConfig, import_dialogues
from finetune.waiting import NotServed, readyz_of, wait_until_served


class _Parser(argparse.ArgumentParser):
    """argparse with its errors in one line, as the contract has it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = _parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status: int = options.run(options)
        return status
    except BadData as exc:
        _print(exc.report(), options.json, _fault_lines)
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except MerchantError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except (BotError, OSError) as exc:
        print(f"failed: {exc or type(exc).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _print(document: Any, as_json: bool, text: Any) -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a C locale would fail on 优惠
    print(json.dumps(document, ensure_ascii=False, indent=1) if as_json else text(document))


def _fault_lines(report: dict[str, Any]) -> str:
    lines = [f"{f['source']}, {f['field']}: {f['problem']}; {f['remedy']}" for f in report["faults"]]
    return "\n".join([f"{report['n_faults']} faults, nothing was written:", *lines])


def _progress(stage: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        of = f" of {total}" if total else ""
        print(f"\r\x1b[K{stage}: {done}{of}", end="", file=sys.stderr, flush=True)


# --- import ----------------------------------------------------------------------------------------------------------


def _import(options: argparse.Namespace) -> int:
    from finetune.report import render_report

    validation = tuple(str(f) for f in _expanded(options.validation)) if options.validation else ()
    config = ImportConfig(
        files=(*(str(f) for f in _expanded(options.files)), *validation),
        validation=validation,
        format=options.format,
        columns=_pairs(options.columns),
        agents=tuple(_values(options.agents)),
        customers=tuple(_values(options.customers)),
        keep=(*options.keep, *_contacts(options.store)),
        exclude=tuple(q for file in options.exclude for q in _questions(file)),
        near=options.near,
        macro=options.macro,
        lookups=options.lookups,
        valid=0.0 if validation else options.valid,
        test=options.test,
        skip_bad=options.skip_bad,
        augment=tuple(_values(options.augment)),
        seed=options.seed,
    )
    if unknown := set(config.augment) - set(augment.KINDS):
        raise MerchantError(f"--augment: {sorted(unknown)[0]!r} is none of {', '.join(augment.KINDS)}")
    if config.valid + config.test >= 0.9 or min(config.valid, config.test) < 0:
        raise MerchantError("--valid and --test: fractions whose sum is below 0.9")
    report = import_dialogues(config, options.out, _progress)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _print(report, options.json, render_report)
    return 0


def _expanded(files: list[Path]) -> list[Path]:
    """Folders stand for the files in them, by name."""
    found: list[Path] = []
    for path in files:
        kinds = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".sqlite3")
        found += sorted(p for p in path.rglob("*") if p.suffix in kinds) if path.is_dir() else [path]
    if not found:
        raise MerchantError(f"{files[0]}: the folder holds no dialogues (.jsonl, .json, .csv, .tsv, .xlsx, .sqlite3)")
    return found


def _values(items: list[str]) -> list[str]:
    return [v.strip() for item in items for v in item.split(",") if v.strip()]


def _pairs(items: list[str]) -> dict[str, str]:
    found = {}
    for item in _values(items):
        name, equals, value = item.partition("=")
        if not equals or name not in ("session", "time", "role", "text", "customer"):
            raise MerchantError(f"--columns: {item!r}; write session=…,time=…,role=…,text=…,customer=…")
        found[name] = value
    return found


def _contacts(store: Path | None) -> tuple[str, ...]:
    """The store's own addresses and numbers stay: they are answers, not personal data."""
    if store is None:
        return ()
    try:
        contact = tomllib.loads((store / "store.toml").read_text(encoding="utf-8")).get("contact", {})
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{store / 'store.toml'}: {exc}") from None
    return tuple(str(v) for v in contact.values()) if isinstance(contact, dict) else (str(contact),)


def _questions(path: Path) -> list[str]:
    """The questions of a cases file (`turns`) or a questions file (`text`): what must not be trained on."""
    found: list[str] = []
    number = 0
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):  # noqa: B007
            if line.strip():
                raw = json.loads(line)
                found += raw["turns"][-1:] if "turns" in raw else [raw["text"]]
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{path}: {exc}") from None
    except (KeyError, TypeError):
        raise MerchantError(f"{path}:{number}: neither `turns` nor `text`; give a cases or questions file") from None
    return found


# --- eval, publish, rollback, releases -------------------------------------------------------------------------------


def _releases(options: argparse.Namespace) -> Path:
    """The folder of releases: the server's own data folder, unless named."""
    if options.releases is not None:
        return Path(options.releases)
    from bot.settings import Settings

    return Settings().releases_dir()


def _eval(options: argparse.Namespace) -> int:
    from finetune.cases import parse_case_files, parse_urls
    from finetune.gate import load_gate

    forbidden = _lines(options.forbid) if options.forbid else []
    gate = load_gate(options.gate)
    run = options.run_folder
    try:
        head = json.loads((run / "run.json").read_text(encoding="utf-8"))
        store, task, base = head["config"]["store"], head["config"].get("task"), head["base"]
    except (OSError, ValueError, KeyError):
        store, task, base = None, None, ""  # said by `evaluate`, in its own words
    if task == "classify":
        from finetune.classify import evaluate_classifier

        _print(evaluate_classifier(run), options.json, _classifier_lines)
        return 0
    cases = parse_case_files(options.cases, Path(store) if store else None)
    urls = parse_urls(options.url, [file.label for file in cases])
    if missing := [c.label for c in cases if not options.serve and ("candidate", c.label) not in urls]:
        url = f"--url candidate@{missing[0]}=ws://…"
        raise MerchantError(f"--cases {missing[0]} needs --serve, or {url} of a server that runs the candidate")
    from finetune.evaluate import evaluate  # what is wrong with the options is said before torch is loaded
    from finetune.publish import rival_model

    search, prompt_store, close = _search_of(Path(store)) if store else (None, None, lambda: None)
    try:
        found = evaluate(
            run, current=rival_model(_releases(options), base), search=search, store=prompt_store, gate=gate,
            cases=cases, urls=urls, serve=options.serve, direct=options.direct == "on",
            concurrency=options.concurrency, n_samples=options.samples, max_new_tokens=options.max_new_tokens,
            forbidden=forbidden, tell=lambda t: print(t, file=sys.stderr),
        )  # fmt: skip
    finally:
        close()
    _print(found, options.json, _eval_lines)
    return 0


def _classifier_lines(found: dict[str, Any]) -> str:
    lines = []
    for name, report in (("classifier", found["candidate"]), *found["others"].items()):
        macro = report["macro"]
        lines.append(
            f"{name}: accuracy {report['accuracy']:.4f}, macro precision {macro['precision']:.4f}, recall {macro['recall']:.4f}, "  # noqa: E501
            f"F1 {macro['f1']:.4f}; micro F1 {report['micro']['f1']:.4f}, weighted F1 {report['weighted']['f1']:.4f}"
        )
    for name, compared in found["against"].items():
        gain = compared["accuracy_gain"]
        lines.append(f"accuracy against {name}: {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]")
    return "\n".join([*lines, f"report: {found['run']}/eval.html"])


def _eval_lines(found: dict[str, Any]) -> str:
    lines = [f"{name}: {value}" for name, value in found["candidate"].items()]
    for name, compared in found["against"].items():
        lines += [
            f"{what} against {name}: {i['mean']:+.4f} [{i['low']:+.4f}, {i['high']:+.4f}]"
            for what, i in compared.items()
        ]
    gate = found["gate"]
    return "\n".join(
        [
            *lines,
            "gate: passed" if gate["passed"] else f"gate: not passed: {'; '.join(gate['reasons'])}",
            f"report: {found['run']}/eval.html",
        ]
    )


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{path}: {exc}") from None


def _publish(options: argparse.Namespace) -> int:
    from finetune.publish import publish

    if options.wait:
        readyz_of(options.wait)
        if options.stage:
            raise MerchantError("--wait: what is staged is served by no server; leave out one of --stage and --wait")
    lineage = publish(options.run_folder, _releases(options), options.suffix, stage=options.stage)
    done = "staged" if options.stage else "published"
    return _served(lineage, lineage["name"], options, lambda r: f"{done} {r['name']}")


def _rollback(options: argparse.Namespace) -> int:
    from finetune.publish import rollback

    if options.wait:
        readyz_of(options.wait)
    moved = rollback(_releases(options), options.to)
    return _served(
        moved,
        moved["release"],
        options,
        lambda r: f"current release: {r['release'] or 'none, so the shipped one'} (was {r['was']})",
    )


def _served(document: dict[str, Any], release: str | None, options: argparse.Namespace, text: Any) -> int:
    """Print what was done; with --wait once the server serves it. It stays done where the server does not."""
    failed: NotServed | None = None
    if options.wait:
        try:
            status = wait_until_served(options.wait, release, tell=lambda line: print(line, file=sys.stderr))
        except NotServed as exc:
            failed, status = exc, {"state": "failed", "detail": str(exc)}
        document = document | {"served": {"url": options.wait} | status}
    _print(document, options.json, text)
    if failed is not None:
        raise failed  # status 1, with its reason
    return 0


def _list_releases(options: argparse.Namespace) -> int:
    from finetune.publish import listed

    def text(found: list[dict[str, Any]]) -> str:
        return (
            "\n".join(
                f"{'*' if r['current'] else ' '} {r['name']}  {r['published_at']}  loss {r['best_loss']:.4f}"
                for r in found
            )
            or "none"
        )

    _print(listed(_releases(options)), options.json, text)
    return 0


def _search_of(folder: Path) -> tuple[Any, Any, Any]:
    """
    Return (search, what every prompt begins with, close) of a store, exactly as serve.py would have them.

    Here and not deeper: training itself knows a protocol, as the answerer does.
    """
    from datetime import UTC, datetime

    from bot.answer import search_in_context
    from bot.followup import complete
    from bot.messages import Turn
    from bot.prompt import PromptStore
    from bot.settings import default_cache_dir, load_store_profile
    from retrieval.bilingual import default_embedder
    from retrieval.errors import RetrievalError
    from retrieval.retriever import LiveRetriever

    profile = load_store_profile(folder)
    try:
        retriever = LiveRetriever(folder, default_embedder(2), default_cache_dir() / "index")
    except RetrievalError as exc:
        raise MerchantError(str(exc)) from exc
    now = datetime.now(UTC)

    def search(question: str, history: Any, language: Any, at: datetime | None, k: int) -> list[Any]:
        turns = tuple(Turn(q, a) for q, a in history)
        gist = partial(retriever.gist, now=at or now)
        query = complete(gist(question) or question, turns, gist=gist)
        return [hit.passage for hit in search_in_context(retriever, query, k, now=at or now, lang=language)]

    titles = sorted({p.title for p in retriever.current("promotion", now=now)})
    return search, PromptStore(profile.names, profile.persona, tuple(titles)), retriever.close


# --- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m finetune", description="Fine-tune on the store's dialogues, prove it, publish it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    c = commands.add_parser("import", help="dialogues in, a masked and split data folder out")
    c.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="JSONL, JSON, CSV, TSV, XLSX, the server's database, or a folder of them",
    )
    c.add_argument("--out", type=Path, required=True, metavar="DIR", help="the data folder; must not exist")
    c.add_argument("--format", choices=FORMATS, default="auto", help="only where it cannot be told from the file")
    c.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="session=NAME,…",
        help="columns of a log: session, time, role, text, customer",
    )
    c.add_argument("--agents", action="append", default=[], metavar="VALUE,…", help="role values that mean the shop")
    c.add_argument(
        "--customers", action="append", default=[], metavar="VALUE,…", help="role values that mean the customer"
    )
    c.add_argument("--store", type=Path, metavar="DIR", help="its contact details in store.toml are not masked")
    c.add_argument("--keep", action="append", default=[], metavar="VALUE", help="a value that is not masked")
    c.add_argument(
        "--exclude",
        action="append",
        type=Path,
        default=[],
        metavar="C.jsonl",
        help="leave out dialogues that ask its questions",
    )
    c.add_argument("--near", type=_share, default=0.9, metavar="S", help="dialogues this alike are one (0.9)")
    c.add_argument(
        "--macro", type=int, default=0, metavar="N", help="a reply in N dialogues is a macro (1%%, at least 10)"
    )
    c.add_argument(
        "--lookups",
        choices=("keep", "context"),
        default="keep",
        help='context: do not learn "I\'ve checked your order"',
    )
    side = "the validation side, instead of a share"
    c.add_argument("--validation", action="append", type=Path, default=[], metavar="FILE", help=side)
    c.add_argument("--valid", type=_share, default=0.1, metavar="S", help="share for validation (0.1)")
    c.add_argument("--test", type=_share, default=0.1, metavar="S", help="share for the test, the latest (0.1)")
    c.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read instead of refusing all")
    c.add_argument("--augment", action="append", default=[], metavar="KIND,…", help="typos, noise, templates")
    c.add_argument("--seed", type=int, default=0)
    c.set_defaults(run=_import)

    train_cli.add_parsers(commands, main, _search_of)

    c = commands.add_parser("eval", help="a run against the base and the current release, and the gate")
    c.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR")
    c.add_argument(
        "--cases",
        action="append",
        default=[],
        metavar="FILE[:STORE]",
        help="cases for facts and refusals, through servers; of the run's own store, or of STORE; may be repeated",
    )
    c.add_argument("--serve", action="store_true", help="start a server for each, one after the other, for the cases")
    c.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="WHO[@FILE]=URL",
        help="a running server of candidate, base or current; @FILE, without its ending, for all but the first",
    )
    c.add_argument("--direct", choices=("on", "off"), default="off", help="on: measure the whole bot, quotes and all")
    c.add_argument("--concurrency", type=_count, default=4, metavar="N", help="cases asked at a time (4)")
    c.add_argument("--gate", type=Path, metavar="FILE", help="bounds in TOML; docs/finetune.md has the default ones")
    c.add_argument("--samples", type=int, default=32, metavar="N", help="replies to generate (32)")
    c.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    c.add_argument("--forbid", type=Path, metavar="FILE", help="wordings that no reply may hold, one a line")
    c.set_defaults(run=_eval)

    c = commands.add_parser("publish", help="make a run that passed the gate the current release")
    c.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR")
    c.add_argument("--suffix", metavar="TEXT", help="a word of your own in the release's name")
    c.add_argument("--stage", action="store_true", help="not the current one yet: for replay and ab start")
    c.set_defaults(run=_publish)
    c = commands.add_parser("rollback", help="go back to the release before, or to a named one")
    c.add_argument("--to", metavar="NAME")
    c.set_defaults(run=_rollback)
    c = commands.add_parser("releases", help="what was published")
    c.set_defaults(run=_list_releases)
    for name in ("publish", "rollback"):
        commands.choices[name].add_argument(
            "--wait", metavar="URL", help="until the server there serves it; status 1 with the reason where it does not"
        )
    for name in ("eval", "publish", "rollback", "releases"):
        commands.choices[name].add_argument(
            "--releases", type=Path, metavar="DIR", help="folder of releases (var/releases)"
        )

    distill_cli.add_parser(commands, _search_of)
    ablate_cli.add_parser(commands, _search_of)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    jobs_cli.add_parser(commands)
    replay_cli.add_parser(commands)
    ab_cli.add_parser(commands)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


if __name__ == "__main__":
    leave(main())
