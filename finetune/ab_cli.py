"""
`python -m finetune ab start|status|stop`: a live experiment, a file beside the releases' pointer that servers follow.

A composition root: knows the server's settings and storage, the releases and the arithmetic of `finetune.ab`; decides
when an experiment may begin (its candidate was replayed offline, and passed) and when its candidate may be kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bot.errors import MerchantError
from bot.experiments import FILE, METRICS, Experiment, as_metric, dump_experiment, parse_experiment, sample_sizes
from bot.releases import StoredRelease, default_release, load_release, read_pointer
from bot.settings import Settings
from finetune import ab
from finetune.replay import replay_of

BASELINE_DAYS, BASELINE_N = 28, 50  # a rate is measured over so many days, from at least so many conversations


def add_parser(commands: Any) -> None:
    """Add `ab` with its three actions."""
    parser = commands.add_parser("ab", help="a live comparison of a release with the current one")
    actions = parser.add_subparsers(required=True, metavar="start|status|stop", parser_class=type(parser))
    c = actions.add_parser("start", help="let a share of the conversations be answered by another release")
    c.add_argument(
        "--release", required=True, metavar="NAME", help="the candidate: `publish --stage` made it, `replay` passed it"
    )
    c.add_argument("--name", metavar="NAME", help="of the experiment; the release's with the time where not given")
    c.add_argument(
        "--share", type=float, default=0.5, metavar="S", help="of the conversations that see the candidate (0.5)"
    )
    c.add_argument("--metric", choices=METRICS, default="resolved", help="what decides (resolved)")
    c.add_argument(
        "--baseline", type=float, metavar="R",
        help=f"the metric's rate without the candidate; measured over {BASELINE_DAYS} days where not given",
    )  # fmt: skip
    c.add_argument("--effect", type=float, default=0.05, metavar="D", help="the least difference worth finding (0.05)")
    c.add_argument(
        "--alpha", type=float, default=0.05, metavar="A", help="chance of a difference where there is none (0.05)"
    )
    c.add_argument("--power", type=float, default=0.8, metavar="P", help="chance to find that difference (0.8)")
    c.add_argument(
        "--elsewhere", action="store_true", help="the server is on another machine: do not look at this one's memory"
    )
    c.set_defaults(run=_start)
    c = actions.add_parser("status", help="what it came to so far, and whether that is enough")
    c.set_defaults(run=_status)
    c = actions.add_parser("stop", help="end it; the current release stays unless another is kept")
    c.add_argument("--keep", metavar="NAME", help="the release that is current afterwards: one of the two")
    c.add_argument("--anyway", action="store_true", help="keep a candidate that was not found better")
    c.set_defaults(run=_stop)
    for action in actions.choices.values():
        action.add_argument("--releases", type=Path, metavar="DIR", help="folder of releases (var/releases)")
        action.add_argument(
            "--database", metavar="URL", help="the server's conversations: an SQLite file or an SQLAlchemy URL"
        )
        action.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")


def _start(options: argparse.Namespace) -> int:
    from finetune.publish import listed, lock

    releases = _releases(options)
    if not (releases / options.release / "release.json").is_file():
        names = ", ".join(r["name"] for r in listed(releases)) or "none"
        raise MerchantError(f"--release: no release {options.release!r} in {releases}; there are {names}")
    control = _current(releases)
    if options.release == control:
        raise MerchantError(f"--release: {options.release!r} is the current release; a candidate is another one")
    _check_replay(releases, options.release, control)
    if not options.elsewhere:
        _check_room(load_release(releases / options.release))
    now = datetime.now(UTC)
    baseline = options.baseline if options.baseline is not None else asyncio.run(_baseline(options, now))
    try:
        sizes = sample_sizes(baseline, options.effect, share=options.share, alpha=options.alpha, power=options.power)
    except ValueError as exc:
        raise MerchantError(f"--{exc}") from None
    experiment = Experiment(
        name=options.name or f"{options.release}-{now:%Y%m%d%H%M%S}",
        candidate=options.release,
        control=control,
        share=options.share,
        metric=as_metric(options.metric),
        baseline=baseline,
        effect=options.effect,
        alpha=options.alpha,
        power=options.power,
        n_control=sizes[0],
        n_candidate=sizes[1],
        started_at=now,
    )
    if "/" in experiment.name or experiment.name.startswith("."):
        raise MerchantError(f"--name: {experiment.name!r} would be a file's name: no slash, and no dot in front")
    with lock(releases):
        if (running := _read(releases)) is not None:
            raise MerchantError(f"experiment {running.name!r} is running: `python -m finetune ab stop` ends it")
        if _record(releases, experiment.name).exists():
            raise MerchantError(
                f"--name: there was an experiment {experiment.name!r}: its name deals the arms, so take a new one"
            )
        _write(releases / FILE, dump_experiment(experiment))
    raw = json.loads(dump_experiment(experiment))
    _print(raw, options.json, lambda e: (
        f"experiment {e['name']}: {e['share']:.0%} of the conversations to {e['candidate']}; "
        f"it takes {e['n_control']} conversations of the current release and {e['n_candidate']} of the candidate "
        f"to find {e['effect']:.1%} from {e['baseline']:.1%} ({e['metric']})"
    ))  # fmt: skip
    return 0


def _check_replay(releases: Path, name: str, control: str | None) -> None:
    replay = replay_of(releases, name)
    command = f"`python -m finetune replay --release {name}`"
    if replay is None:
        raise MerchantError(f"release {name!r} was not replayed: visitors are no first test; run {command}")
    if replay["current"] != control:
        was = replay["current"] or "no release"
        raise MerchantError(
            f"the replay of {name!r} compared with {was}, and the current release is {control or 'none'}: run {command}"
        )
    if not replay["verdict"]["passed"]:
        raise MerchantError(f"the replay of {name!r} was not passed: {'; '.join(replay['verdict']['reasons'])}")


def _check_room(candidate: StoredRelease) -> None:
    """Two engines at once must fit, or the server would refuse the candidate and answer everybody with the other."""
    from bot.engines.fetched import EngineMaker

    settings = Settings()
    maker = EngineMaker(settings.cache_dir(), settings.vllm)
    if not maker.is_hot(candidate) and (why := asyncio.run(maker.shortage(candidate))) is not None:
        raise MerchantError(f"--release {candidate.name}: {why}")


async def _baseline(options: argparse.Namespace, now: datetime) -> float:
    logs = await _logs(options, now - timedelta(days=BASELINE_DAYS))
    good, n = ab.baseline_of(logs, as_metric(options.metric), now)
    if n < BASELINE_N or good in (0, n):
        raise MerchantError(
            f"--baseline: {good} of {n} conversations in {BASELINE_DAYS} days is too little to measure "
            f"{options.metric!r} by; give the rate"
        )
    return good / n


def _status(options: argparse.Namespace) -> int:
    found = _result(options, _running(_releases(options)))
    _print(found, options.json, ab.text_of)
    return 0


def _stop(options: argparse.Namespace) -> int:
    from finetune.publish import lock, point_to

    releases = _releases(options)
    experiment = _running(releases)
    if options.keep not in (None, "candidate", "control", experiment.candidate, experiment.control):
        raise MerchantError(
            f"--keep: {options.keep!r} is neither {experiment.candidate!r} nor {experiment.control or 'control'!r}"
        )
    keep_candidate = options.keep in ("candidate", experiment.candidate)
    try:
        found = _result(options, experiment)
    except MerchantError as exc:
        if keep_candidate and not options.anyway:
            raise
        found = {"verdict": f"not known: {exc}"}
    if keep_candidate and not options.anyway and found["verdict"] != "the candidate is better":
        raise MerchantError(f"--keep: {found['verdict']}; --anyway keeps {experiment.candidate!r} all the same")
    with lock(releases):
        was = _current(releases)
        if keep_candidate:
            point_to(releases, experiment.candidate)
        record = json.loads(dump_experiment(experiment)) | {
            "stopped_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "kept": experiment.candidate if keep_candidate else was,
            "was": was,
            "result": found,
        }
        path = _record(releases, experiment.name)
        path.parent.mkdir(exist_ok=True)
        _write(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        (releases / FILE).unlink()
    _print(
        record,
        options.json,
        lambda r: f"experiment {r['name']} ended: {found['verdict']}; current release: {r['kept'] or 'none'}",
    )
    return 0


# --- Files and the database -------------------------------------------------------------------------------------------


def _releases(options: argparse.Namespace) -> Path:
    return Path(options.releases) if options.releases is not None else Settings().releases_dir()


def _current(releases: Path) -> str | None:
    """Return the name that the current release's replies bear: the published one's, else the shipped one's."""
    name = read_pointer(releases).release
    return name if name is not None else default_release().adapter


def _record(releases: Path, name: str) -> Path:
    return releases / "experiments" / f"{name}.json"


def _read(releases: Path) -> Experiment | None:
    try:
        return parse_experiment((releases / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{releases / FILE}: not readable ({exc}); delete it to end the experiment") from None


def _running(releases: Path) -> Experiment:
    experiment = _read(releases)
    if experiment is None:
        raise MerchantError(f"{releases}: no experiment is running; `python -m finetune ab start` begins one")
    return experiment


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _result(options: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    logs = asyncio.run(_logs(options, experiment.started_at))
    return ab.result(experiment, logs, datetime.now(UTC), current=_current(_releases(options)))


async def _logs(options: argparse.Namespace, since: datetime) -> list[ab.Log]:
    from bot.storage import Storage

    storage = Storage(options.database or Settings().database())
    await storage.open(shared=True, must_exist=True)
    try:
        return [log async for log in storage.logs(since=since)]
    finally:
        await storage.close()


def _print(document: Any, as_json: bool, text: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=1) if as_json else text(document))
