"""
What each command of `python -m retrieval` does, but for `import`: options in, printed result and exit status out.

Knows what is printed and as which JSON; everything else is elsewhere. Apart from `__main__.py` because of what stands
behind it: models, indexes and LangChain take a second to import, and neither --help nor `import` needs them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval import learn, thumbs, tune
from retrieval.embedder import Embedder, Progress, VectorCache
from retrieval.embedders import SentenceTransformersEmbedder
from retrieval.errors import BadStore, Fault, RetrievalError
from retrieval.evaluate import Question, evaluate, load_questions
from retrieval.explain import Explanation, Thresholds, dump_explanation, dump_why, explanation_text
from retrieval.finetuned import Finetuned, tune_embedder
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from retrieval.load import load_knowledge, load_store, load_terms, load_zone, parse_time
from retrieval.passages import Hit, Passage
from retrieval.retriever import LiveRetriever
from retrieval.settings import RetrievalSettings, load_settings
from retrieval.snapshots import Snapshots
from retrieval.terms import Terms
from retrieval.tuning import Tunings


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
    bot = Thresholds()
    given = (options.direct, options.answer, options.near)
    own = (bot.direct, bot.answer, bot.near)
    thresholds = Thresholds(*(mine if value is None else value for value, mine in zip(given, own, strict=True)))
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
            _embedder(options, tuned=not options.untuned),
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
    report = {"version": folder.save(tuning) if tuning else None} | report
    if options.json:
        _print_json(report)
        return 0
    n_asked, loss = report["n_questions"] + report["n_unanswered"], report["log_loss"]
    print(f"log loss on {n_asked} questions not fitted on: shipped {loss['shipped']:.3f}   fitted {loss['fitted']:.3f}")
    if not report["confidence_kept"]:
        print("not kept: the fitted confidence does not win over the shipped one")
    if tuning is not None:
        print(f"version {report['version']} in {folder.folder}; `tune --off` goes back to none")
    _print_curve(report)
    return 0


def _tune(options: argparse.Namespace) -> int:
    folder = _tuning_folder(options)
    if options.method == "embedder":
        return _tune_embedder(options, Finetuned(folder.folder))
    if _versions_of(options, folder):
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
    _print_trial(report)
    if tuning is None:
        print("not kept: it does not win on the questions kept aside")
    else:
        print(f"kept as version {report['version']} in {folder.folder}; `tune --off` goes back to none")
        _print_curve(report)
    return 0


def _tune_embedder(options: argparse.Namespace, folder: Finetuned) -> int:
    if _versions_of(options, folder):
        return 0
    cache = VectorCache(options.cache / "embeddings.sqlite")
    try:
        base = _embedder(options, tuned=False)
        if not isinstance(base, SentenceTransformersEmbedder):
            problem = "only sentence-transformers models are fine-tuned; give --embedder sentence-transformers:NAME"
            raise BadStore([Fault("arguments", None, "embedder", problem)])
        report = tune_embedder(_problem(options, base, cache), base, cache, folder, progress=_progress())
    finally:
        cache.close()
    if options.json:
        _print_json(report)
        return 0
    _print_trial(report)
    if report["version"] is None:
        print("not kept: it does not win on the questions kept aside")
    else:
        print(f"kept as version {report['version']} in {folder.folder}; a server has it after its next start")
        print("`tune --method embedder --off` goes back to the model as it was")
    return 0


def _versions_of(options: argparse.Namespace, folder: Tunings | Finetuned) -> bool:
    """List the versions of `folder` or choose one of them, where that is what was asked; return whether it was."""
    if options.list:
        current = folder.current()
        listed = [{"version": one, "current": one == current} for one in folder.versions()]
        if options.json:
            _print_json(listed)
        for one in [] if options.json else listed:
            print(f"{one['version']}{'  in use' if one['current'] else ''}")
        return True
    if options.use or options.off:
        folder.use(None if options.off else options.use)
        print("no tuning is in use" if options.off else f"{options.use} is in use", file=sys.stderr)
        return True
    return False


def _print_trial(report: dict[str, Any]) -> None:
    before, after = report["untuned"], report["tuned"]
    print(f"{report['n_questions']} questions, {report['n_held_out']} of them kept aside to measure:")
    for name in before:
        print(f"  {name:10} untuned {before[name]:.3f}   tuned {after[name]:.3f}")
    print(f"  right only when tuned {report['better']}, only when untuned {report['worse']}; p = {report['p_by_luck']}")


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


def _problem(options: argparse.Namespace, embedder: Embedder, cache: VectorCache) -> tune.Problem:
    """Return what is tuned on: the questions of a store's dialogues and of files, and those with visitors' thumbs."""
    passages = _passages(options)
    questions = [question for path in options.questions or () for question in load_questions(path)]
    questions += thumbs.questions_of(thumbs.load_thumbs(options.conversations or ()))
    moment = datetime.now(UTC)
    if options.store is None:
        return tune.Problem(passages, questions, moment, Terms())
    terms = load_terms(options.store)
    turns = learn.load_turns(sorted((options.store / "dialogues").glob("*.jsonl")))
    if turns:
        retriever = HybridRetriever(build_index(passages, embedder, cache, _progress()), embedder, terms=terms)
        texts = learn.texts_of(turns)
        retriever.remember(texts, cache.embed(embedder, texts, as_query=True, progress=_progress()))
        pairs = learn.propose(turns, retriever, moment, ())
        questions = [*(Question(pair.question, frozenset([pair.faq_id])) for pair in pairs), *questions]
    return tune.Problem(passages, questions, moment, terms)


def _learn(options: argparse.Namespace) -> int:
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
    environment: Mapping[str, str] = options.environment
    names = ("embedder", "embedder_url", "embedder_api_key", "vectors", "vectors_url")
    asked = {name: environment.get(f"ZHANGGUI_{name.upper()}") for name in names}
    return load_settings(store, **(asked | ({"embedder": options.embedder} if options.embedder else {})))


def _embedder(options: argparse.Namespace, *, tuned: bool = True) -> Embedder:
    """Return the embedder that is chosen; `tuned`: as the store has fine-tuned it where it has."""
    chosen = _settings(options, getattr(options, "store", None))
    folder = getattr(options, "tuned", None) or chosen.tuned
    return replace(chosen, tuned=folder if tuned else None).open_embedder(options.threads)


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


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "search": _search,
    "eval": _eval,
    "learn": _learn,
    "tune": _tune,
    "calibrate": _calibrate,
    "versions": _versions,
    "rollback": _rollback,
}
