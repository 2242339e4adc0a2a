"""
`search`: many runs, each with other knobs, the poor ones ended early, the best kept as a file that `train --config` takes.

Every trial is a run of its own in `trials/`. Optuna proposes the knobs and says after each validation whether a trial goes
on; what it knows is in search.sqlite3, so a killed search goes on with the same command, within the trial it was in. The
sampler is seeded anew for each trial from the seed and the trial's number: a search that was interrupted makes the same
trials as one that was not.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bot.errors import BotError, MerchantError
from bot.prompt import PromptStore
from finetune.config import RunConfig, read_knobs
from finetune.grounding import Search
from finetune.runs import RunFolder, draw_trials, write_json

Tell = Callable[[str], None]
N_STARTUP = 5  # trials drawn at random, and never pruned, before the sampler and the median know anything

# What is tried where no file says so: what matters most first, and little else, since a search is short.
USUAL_SPACE: dict[str, dict[str, Any]] = {
    "lr": {"low": 0.2, "high": 5.0, "log": True, "times": True},
    "rank": {"choices": [8, 16, 32]},
    "batch_tokens": {"choices": [0.5, 1.0, 2.0], "times": True},
    "warmup": {"low": 0.0, "high": 0.1},
}


@dataclass(frozen=True)
class Knob:
    """What one knob may be: a range, or a choice."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    whole: bool = False
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: Any) -> Any:
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        if self.whole:
            step = int(self.step) if self.step else 1
            return trial.suggest_int(self.name, int(self.low or 0), int(self.high or 0), log=self.log, step=step)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log, step=self.step)


def load_space(path: Path | None, config: RunConfig) -> tuple[Knob, ...]:
    """
    Return what is tried: a table `[NAME]` a knob with `low` and `high` (and `log`, `step`), or `choices`.

    Raises:
        MerchantError: unreadable, an unknown knob, or a value that the knob cannot have.
    """
    if path is None:
        knobs = _usual(config)
    else:
        knobs = tuple(_knob(f"{path}, {name}", name, values) for name, values in read_knobs(path).items())
        if not knobs:
            raise MerchantError(f"{path}: no knob; write for instance [lr] with low, high and log")
    for knob in knobs:
        for value in knob.choices or (knob.low, knob.high):
            try:
                RunConfig(**{**json.loads(config.model_dump_json(exclude_none=True)), knob.name: value})
            except ValidationError as exc:
                words = exc.errors()[0]["msg"].removeprefix("Value error, ")
                raise MerchantError(f"{path or 'space'}, {knob.name} = {value!r}: {words}") from None
    return knobs


def _usual(config: RunConfig) -> tuple[Knob, ...]:
    """The usual space, around the configuration's own values."""
    knobs = []
    for name, values in USUAL_SPACE.items():
        if name == "rank" and config.method not in ("lora", "adalora"):
            continue
        own = {"lr": config.learning_rate, "batch_tokens": config.batch_tokens}.get(name, 1)
        values = dict(values)
        if values.pop("times", False):
            if "choices" in values:
                values["choices"] = [max(config.row_tokens, int(own * c)) for c in values["choices"]]
            else:
                values |= {"low": own * values["low"], "high": own * values["high"]}
        if "choices" in values:
            values["choices"] = list(dict.fromkeys(values["choices"]))
        knobs.append(_knob(name, name, values))
    return tuple(knobs)


def _knob(where: str, name: str, values: Any) -> Knob:
    fields = RunConfig.model_fields
    if name not in fields or name in ("data", "store", "base", "task", "gpus", "fsdp", "device", "wandb", "columns"):
        raise MerchantError(f"{where}: no knob that can be tried; there are lr, rank, epochs, …: see docs/finetune.md")
    if not isinstance(values, Mapping) or not values.keys() <= {"low", "high", "log", "step", "choices"}:
        raise MerchantError(f"{where}: write low and high (and log, step), or choices")
    if "choices" in values:
        choices = values["choices"]
        if not isinstance(choices, list) or not choices or values.keys() != {"choices"}:
            raise MerchantError(f"{where}: choices is a list of values, and stands alone")
        return Knob(name, choices=tuple(choices))
    low, high, step = values.get("low"), values.get("high"), values.get("step")
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high))
    if not numbers or low > high or (values.get("log") and low <= 0):  # type: ignore[operator]
        raise MerchantError(f"{where}: low and high are numbers, low the lesser, and above 0 where log is true")
    if values.get("log") and step:
        raise MerchantError(f"{where}: log and step do not go together")
    whole = fields[name].annotation is int
    return Knob(name, low, high, bool(values.get("log", False)), step, whole)


# --- Searching -------------------------------------------------------------------------------------------------------


class SearchInterrupted(BotError):
    """The search was asked to stop; the trial under way has a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted in trial {self.number}; the same command goes on from there"


class _Pruned(Exception):
    """The trial under way is not worth going on with."""


def search(
    config: RunConfig,
    folder: Path,
    *,
    space: tuple[Knob, ...],
    n_trials: int,
    time_s: float | None = None,
    pruner: str = "median",
    search_store: Search | None = None,
    store: PromptStore | None = None,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """
    Make trials until `folder` holds `n_trials`, or `time_s` is over; return search.json. Goes on where a search was cut.

    Raises:
        MerchantError: the folder is another search's, is in use, or no trial ended.
        SearchInterrupted: SIGINT or SIGTERM came; the same call goes on.
    """  # noqa: E501
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    began = time.monotonic()
    with _held(folder, _asked(config, space, pruner)):
        maximise = config.task == "classify"
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'search.sqlite3'}",
            study_name="search",
            direction="maximize" if maximise else "minimize",
            load_if_exists=True,
            pruner=_pruner(pruner),
        )
        running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,), deepcopy=False)
        while True:
            done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
            if len(done) >= n_trials or (time_s is not None and done and time.monotonic() - began >= time_s):
                break
            number = len(done)
            study.sampler = optuna.samplers.TPESampler(
                seed=_seed(config.seed, number), n_startup_trials=N_STARTUP, multivariate=True
            )  # fmt: skip
            # What a kill left half done is gone on with: its knobs are in the storage, its steps in its own checkpoints.  # noqa: E501
            trial = optuna.trial.Trial(study, running.pop(0)._trial_id) if running else study.ask()
            _one(study, trial, config, folder, space, search_store, store, report, tell, maximise)
        return _write_report(study, config, folder, maximise)


def _one(
    study: Any, trial: Any, config: RunConfig, folder: Path, space: tuple[Knob, ...], search_store: Search | None,
    store: PromptStore | None, report: Callable[[dict[str, Any]], None], tell: Tell, maximise: bool,
) -> None:  # fmt: skip
    """Make one trial, and tell the study how it ended."""
    import optuna

    from finetune.train import Interrupted, LossNotFinite, train

    values = {knob.name: knob.suggest(trial) for knob in space}
    run = folder / "trials" / f"{trial.number:03}"
    seen = set(trial.storage.get_trial(trial._trial_id).intermediate_values)
    resume = (run / "run.json").exists()
    figures = _figures_before(run, maximise) if resume else []

    def watch(event: dict[str, Any]) -> None:
        report(event)
        if event["kind"] != "valid":
            return
        figures.append(event["f1_macro"] if maximise else event["perplexity"])
        if len(figures) not in seen:
            # The best so far, by the count of validations: trials make steps of different sizes.
            trial.report(max(figures) if maximise else min(figures), len(figures))
        if trial.should_prune():
            raise _Pruned

    tell(
        f"trial {trial.number}: "
        + ", ".join(f"{k} = {v:.3g}" if isinstance(v, float) else f"{k} = {v}" for k, v in values.items())
    )
    if not resume:
        shutil.rmtree(run, ignore_errors=True)  # killed before it began
    began = time.monotonic()
    failed = ""
    try:
        trial_config = RunConfig(**{**json.loads(config.model_dump_json(exclude_none=True)), **values})
        result = train(trial_config, run, search=search_store, store=store, resume=resume, report=watch)
        value = max(figures) if maximise else min(figures)
        study.tell(trial, value)
        trial_state = f"{value:.4f} at step {result['best_step']}"
    except _Pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        trial_state = f"ended early at {figures[-1]:.4f}"
    except Interrupted:
        raise SearchInterrupted(trial.number) from None
    except (LossNotFinite, ValueError) as exc:  # a poor choice of knobs is an answer, too
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        failed = trial_state = str(exc).splitlines()[0]
    write_json(
        run / "trial.json",
        {"number": trial.number, "values": values, "seconds": round(time.monotonic() - began, 1), "failed": failed},
    )
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the best weights stay; no trial that ended is resumed
    tell(f"trial {trial.number}: {trial_state}")


def _figures_before(run: Path, maximise: bool) -> list[float]:
    """Return what a cut trial found before its newest checkpoint: train, going on from there, reports only the rest."""
    checkpoints = RunFolder(run, resume=True, writes=False).checkpoints()
    if not checkpoints:
        return []
    evals = json.loads((checkpoints[-1] / "progress.json").read_text(encoding="utf-8"))["evals"]
    return [round(e["f1_macro"] if maximise else e["perplexity"], 4) for e in evals]


def _seed(seed: int, number: int) -> int:
    return int(hashlib.sha256(f"{seed}:{number}".encode()).hexdigest()[:8], 16)


def _pruner(name: str) -> Any:
    import optuna

    if name == "none":
        return optuna.pruners.NopPruner()
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource="auto", reduction_factor=3)
    return optuna.pruners.MedianPruner(n_startup_trials=N_STARTUP, n_warmup_steps=1)


def _asked(config: RunConfig, space: tuple[Knob, ...], pruner: str) -> dict[str, Any]:
    knobs = {k.name: {f: v for f, v in vars(k).items() if f != "name" and v not in (None, (), False)} for k in space}
    return json.loads(json.dumps({"config": json.loads(config.model_dump_json()), "space": knobs, "pruner": pruner}))  # type: ignore[no-any-return]


@contextlib.contextmanager
def _held(folder: Path, asked: dict[str, Any]) -> Iterator[None]:
    """Hold `folder` against a second search, and against one with other knobs."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "asked.json").exists():
        raise MerchantError(f"--run {str(folder)!r} is not empty and no search: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MerchantError(f"--run {str(folder)!r}: another search is at work there") from None
        path = folder / "asked.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before != asked:
                what = next(k for k in asked if before.get(k) != asked[k])
                raise MerchantError(f"--run {str(folder)!r}: a search with another {what}; name a new folder")
        write_json(path, asked)
        yield


# --- Report ----------------------------------------------------------------------------------------------------------


def _write_report(study: Any, config: RunConfig, folder: Path, maximise: bool) -> dict[str, Any]:
    trials = []
    for t in study.get_trials(deepcopy=False):
        if not t.state.is_finished():
            continue
        run = folder / "trials" / f"{t.number:03}"
        extra = json.loads((run / "trial.json").read_text(encoding="utf-8")) if (run / "trial.json").exists() else {}
        trials.append(
            {
                "number": t.number,
                "state": {"COMPLETE": "complete", "PRUNED": "pruned"}.get(t.state.name, "failed"),
                "value": t.value if t.state.name == "COMPLETE" else None,
                "validations": [v for _, v in sorted(t.intermediate_values.items())],
                "values": t.params,
                "seconds": extra.get("seconds"),
                "failed": extra.get("failed", ""),
                "run": str(run),
            }
        )
    complete = [t for t in trials if t["state"] == "complete"]
    if not complete:
        raise MerchantError(
            f"{folder}: none of {len(trials)} trials ended with a figure: {trials[0]['failed'] if trials else 'no time'}"  # noqa: E501
        )
    best = (max if maximise else min)(complete, key=lambda t: t["value"])
    own = json.loads(
        RunConfig(**{**json.loads(config.model_dump_json(exclude_none=True)), **best["values"]}).model_dump_json(
            exclude_none=True
        )
    )
    write_json(folder / "best.json", own)
    document = {
        "run": str(folder),
        "objective": "f1_macro" if maximise else "perplexity",
        "direction": "maximise" if maximise else "minimise",
        "seed": config.seed,
        "n_trials": len(trials),
        "n_pruned": sum(t["state"] == "pruned" for t in trials),
        "best": best,
        "best_config": str(folder / "best.json"),
        "trials": trials,
    }
    write_json(folder / "search.json", document)
    (folder / "search.md").write_text(render_trials(document) + "\n", encoding="utf-8")
    draw_trials(folder / "trials.png", document)
    return document


def render_trials(document: Mapping[str, Any]) -> str:
    """Return the trials as a table in Markdown, the best first; those without a figure at the end."""
    names = list(dict.fromkeys(name for t in document["trials"] for name in t["values"]))
    sign = -1 if document["direction"] == "maximise" else 1
    ranked = sorted(document["trials"], key=lambda t: (t["value"] is None, sign * (t["value"] or 0), t["number"]))
    head = ["trial", document["objective"], "state", *names, "seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for t in ranked:
        value = f"{t['value']:.4f}" if t["value"] is not None else ""
        cells = [t["number"], value, t["state"], *(_short(t["values"].get(n)) for n in names), t["seconds"] or ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(
        [*lines, "", f"best: trial {document['best']['number']}; train --config {document['best_config']}"]
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
