"""
`python -m finetune import|train|eval|publish|rollback|releases`: what a merchant types.

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
from pathlib import Path
from typing import Any, NoReturn

from bot.errors import BotError, MerchantError
from finetune import augment
from finetune.formats import FORMATS
from finetune.importing import BadData, ImportConfig, import_dialogues


class _Parser(argparse.ArgumentParser):
    """argparse with its errors in one line, as the contract has it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = _parser().parse_args(arguments)
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

    config = ImportConfig(
        files=tuple(str(f) for f in _expanded(options.files)),
        format=options.format,
        columns=_pairs(options.columns),
        agents=tuple(_values(options.agents)),
        customers=tuple(_values(options.customers)),
        keep=(*options.keep, *_contacts(options.store)),
        exclude=tuple(q for file in options.exclude for q in _questions(file)),
        near=options.near,
        macro=options.macro,
        lookups=options.lookups,
        valid=options.valid,
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


# --- train -----------------------------------------------------------------------------------------------------------

_FLAGS = ("base", "data", "store", "method", "rank", "alpha", "lr", "schedule", "epochs", "max_steps", "max_tokens",
          "row_tokens", "batch_tokens", "adversarial", "eval_every", "patience", "unanswerable", "threads", "seed")  # fmt: skip  # noqa: E501


def _train(options: argparse.Namespace) -> int:
    from finetune.config import load_config
    from finetune.methods import check_servable

    given = {name: getattr(options, name) for name in _FLAGS}
    switches = {"packing": options.packing, "bf16": options.bf16, "gradient_checkpointing": options.checkpointing}
    config = load_config(options.config, {**given, **switches, **_set_values(options.set)})
    check_servable(config, must_serve=options.publishable)
    from finetune.data import load_data

    load_data(config.data)  # refused before torch and the index are loaded
    from finetune.train import train

    search, store, close = _search_of(config.store) if config.store else (None, None, lambda: None)
    try:
        result = train(
            config, options.run_folder, search=search, store=store, resume=options.resume, dry_run=options.dry_run,
            publishable=options.publishable, report=_tell,
        )  # fmt: skip
    finally:
        close()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _print(result, options.json, lambda r: "\n".join(f"{k}: {v}" for k, v in r.items()))
    return 0


def _set_values(items: list[str]) -> dict[str, Any]:
    """Return --set NAME=VALUE pairs, the values as JSON where they are."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise MerchantError(f"--set: {item!r}; write NAME=VALUE, for instance dropout=0.05")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _tell(event: dict[str, Any]) -> None:
    """One line of progress for a terminal; the estimate and validations for a log too."""
    if event["kind"] == "estimate":
        minutes = (event["seconds"] or 0) / 60
        print(
            f"estimate: {event['n_tokens']:,} tokens in {event['n_steps']} steps, about {minutes:.1f} min at "
            f"{event['tokens_per_s']} tokens/s, {event['memory_bytes'] / 2**30:.1f} GiB; "
            f"{event['n_trained_parameters']:,} of {event['n_parameters']:,} parameters trained",
            file=sys.stderr,
        )
    elif event["kind"] == "valid":
        print(f"\r\x1b[Kstep {event['step']}: validation loss {event['loss']:.4f}", file=sys.stderr)
    elif sys.stderr.isatty():
        share = event["step"] / event["n_steps"]
        bar = "#" * int(30 * share) + "." * (30 - int(30 * share))
        print(
            f"\r\x1b[K[{bar}] {event['step']}/{event['n_steps']} loss {event['loss']:.3f} {event['tokens_per_s']:.0f} tok/s, {event['eta_s'] / 60:.1f} min left",  # noqa: E501
            end="",
            file=sys.stderr,
            flush=True,
        )


# --- eval, publish, rollback, releases -------------------------------------------------------------------------------


def _releases(options: argparse.Namespace) -> Path:
    """The folder of releases: the server's own data folder, unless named."""
    if options.releases is not None:
        return Path(options.releases)
    from bot.settings import Settings

    return Settings().data_dir() / "releases"


def _eval(options: argparse.Namespace) -> int:
    from finetune.evaluate import evaluate
    from finetune.gate import load_gate
    from finetune.publish import current_model

    urls = _urls(options.url)
    if options.cases is not None and not (options.serve or "candidate" in urls):
        raise MerchantError("--cases needs --serve, or --url candidate=ws://… of a server that runs the candidate")
    forbidden = _lines(options.forbid) if options.forbid else []
    gate = load_gate(options.gate)
    run = options.run_folder
    try:
        store = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["store"]
    except (OSError, ValueError, KeyError):
        store = None  # said by `evaluate`, in its own words
    search, prompt_store, close = _search_of(Path(store)) if store else (None, None, lambda: None)
    try:
        found = evaluate(
            run, current=current_model(_releases(options)), search=search, store=prompt_store, gate=gate,
            cases=options.cases, urls=urls, serve=options.serve, n_samples=options.samples,
            max_new_tokens=options.max_new_tokens, forbidden=forbidden, tell=lambda t: print(t, file=sys.stderr),
        )  # fmt: skip
    finally:
        close()
    _print(found, options.json, _eval_lines)
    return 0


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


def _urls(items: list[str]) -> dict[str, str]:
    found = {}
    for item in items:
        name, equals, url = item.partition("=")
        if not equals or name not in ("candidate", "base", "current"):
            raise MerchantError(f"--url: {item!r}; write candidate=ws://HOST:PORT/ws, base=… or current=…")
        found[name] = url
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{path}: {exc}") from None


def _publish(options: argparse.Namespace) -> int:
    from finetune.publish import publish

    lineage = publish(options.run_folder, _releases(options))
    _print(lineage, options.json, lambda r: f"published {r['name']}")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from finetune.publish import rollback

    moved = rollback(_releases(options), options.to)
    _print(moved, options.json, lambda r: f"current release: {r['release'] or 'none, the base model'} (was {r['was']})")
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
        query = complete(question, tuple(Turn(q, a) for q, a in history))
        return [hit.passage for hit in retriever.search(query.standalone, k, now=at or now, lang=language)]

    titles = sorted({p.title for p in retriever.current("promotion", now=now)})
    return search, PromptStore(profile.names, profile.persona, tuple(titles)), retriever.close


# --- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m finetune", description="Fine-tune on the store's dialogues, prove it, publish it.")
    commands = parser.add_subparsers(
        required=True, metavar="import|train|eval|publish|rollback|releases", parser_class=_Parser
    )

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
    c.add_argument("--valid", type=_share, default=0.1, metavar="S", help="share for validation (0.1)")
    c.add_argument("--test", type=_share, default=0.1, metavar="S", help="share for the test, the latest (0.1)")
    c.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read instead of refusing all")
    c.add_argument("--augment", action="append", default=[], metavar="KIND,…", help="typos, noise, templates")
    c.add_argument("--seed", type=int, default=0)
    c.set_defaults(run=_import)

    c = commands.add_parser("train", help="a data folder in, a run with trained weights out")
    c.add_argument("--config", type=Path, metavar="FILE", help="knobs in TOML, YAML or JSON; flags win over it")
    c.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR", help="the run's folder")
    c.add_argument("--data", type=Path, metavar="DIR", help="a folder of `import`")
    c.add_argument("--base", metavar="NAME", help="catalog name or model folder; the default model")
    c.add_argument(
        "--store", type=Path, metavar="DIR", help="put this store's passages into the prompts, as in serving"
    )
    c.add_argument("--method", choices=("lora", "adalora", "ia3", "prefix", "prompt", "full"))
    for name, kind in (
        ("rank", int),
        ("alpha", float),
        ("lr", float),
        ("epochs", float),
        ("max-steps", int),
        ("max-tokens", int),
        ("row-tokens", int),
        ("batch-tokens", int),
        ("eval-every", int),
        ("patience", int),
        ("unanswerable", float),
        ("threads", int),
        ("seed", int),
    ):
        c.add_argument(f"--{name}", type=kind, metavar="N")
    c.add_argument("--schedule", choices=("cosine", "linear", "constant"))
    c.add_argument("--adversarial", choices=("none", "fgm", "freelb"))
    c.add_argument("--packing", action=argparse.BooleanOptionalAction, default=None)
    c.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
    c.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=None, help="gradient checkpointing"
    )
    c.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other knob of docs/finetune.md"
    )
    c.add_argument("--resume", action="store_true", help="go on with an interrupted run, exactly")
    c.add_argument("--dry-run", action="store_true", help="only the estimate: tokens, time, memory")
    c.add_argument("--publishable", action="store_true", help="refuse a method that no server can serve")
    c.set_defaults(run=_train)

    c = commands.add_parser("eval", help="a run against the base and the current release, and the gate")
    c.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR")
    c.add_argument("--cases", type=Path, metavar="C.jsonl", help="cases for facts and refusals, through servers")
    c.add_argument("--serve", action="store_true", help="start a server for each, one after the other, for the cases")
    c.add_argument(
        "--url", action="append", default=[], metavar="WHO=URL", help="a running server of candidate, base or current"
    )
    c.add_argument("--gate", type=Path, metavar="FILE", help="bounds in TOML; docs/finetune.md has the default ones")
    c.add_argument("--samples", type=int, default=32, metavar="N", help="replies to generate (32)")
    c.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    c.add_argument("--forbid", type=Path, metavar="FILE", help="wordings that no reply may hold, one a line")
    c.set_defaults(run=_eval)

    c = commands.add_parser("publish", help="make a run that passed the gate the current release")
    c.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR")
    c.set_defaults(run=_publish)
    c = commands.add_parser("rollback", help="go back to the release before, or to a named one")
    c.add_argument("--to", metavar="NAME")
    c.set_defaults(run=_rollback)
    c = commands.add_parser("releases", help="what was published")
    c.set_defaults(run=_list_releases)
    for name in ("eval", "publish", "rollback", "releases"):
        commands.choices[name].add_argument(
            "--releases", type=Path, metavar="DIR", help="folder of releases (var/releases)"
        )

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
