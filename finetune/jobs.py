"""
The queue of fine-tuning jobs, in OpenAI's shape: what was asked for, where each job is, its events and checkpoints.

Knows requests, states and the database; starts no process (finetune/runner.py) and speaks no HTTP (bot/fine_tuning_api.py).
A job's status is what is wanted of it: who pauses or cancels only writes that, and the runner makes it true. So the command
line and the server may both do it, and a restart loses nothing.

    validating_files -> queued -> running -> succeeded
                   \\       |  \\     |   \\-> failed          each of the first three -> cancelled
                    \\----- paused ---/                        paused: a checkpoint is kept; resume goes on from it
"""  # noqa: E501

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from bot.catalog import check_folder, load_catalog
from bot.errors import BadRequest, MerchantError
from finetune.config import RunConfig
from finetune.files import Database, FileStore, new_id
from finetune.methods import METHODS

Page = tuple[list[dict[str, Any]], bool]  # (objects, whether there are more)
Fresh = tuple[list[dict[str, Any]], int, bool]  # (events, the place behind them, whether no more will come)

NEEDED = ("torch", "transformers", "peft", "sacrebleu", "tensorboard", "matplotlib")  # the extra `train`
NEEDED_TO_PREFER = ("trl", "datasets")  # the extra `prefer`
PAIRS = "training.jsonl"  # the file of a job that learns from preferences
ENDED = ("succeeded", "failed", "cancelled")
OPEN = ("validating_files", "queued", "running")
KEEP_CHECKPOINTS = 3  # OpenAI's number, too
OURS = ("task", "base", "data", "store", "threads", "seed", "keep_checkpoints")  # knobs that a job sets itself
MAX_METADATA = 16


@dataclass(frozen=True)
class Places:
    """Where things are."""

    jobs: Path  # a folder for each job
    releases: Path
    models: Path  # models of one's own and fetched ones, by name
    store: Path | None  # the store whose passages stand in the prompts


@dataclass(frozen=True)
class Job:
    """A row of the queue."""

    id: str
    status: str
    stage: str  # "validate", "train", "evaluate", "publish", "done"
    created_at: int
    finished_at: int | None
    request: dict[str, Any]
    state: dict[str, Any]


def _job(row: sqlite3.Row) -> Job:
    return Job(
        row["id"], row["status"], row["stage"], row["created_at"], row["finished_at"], json.loads(row["request"]),
        json.loads(row["state"]),
    )  # fmt: skip


class JobQueue:
    """Jobs by id. Safe from several threads and processes; every method is short and blocks on the disk."""

    def __init__(self, database: Database, files: FileStore, places: Places, *, threads: int) -> None:
        """Return the queue; `threads` are those a job computes with."""
        self._db, self.files, self.places, self.threads = database, files, places, threads
        self.changed: Callable[[], None] = lambda: None  # called after a change that the runner should look at
        places.jobs.mkdir(parents=True, exist_ok=True, mode=0o700)

    def folder(self, id_: str) -> Path:
        return self.places.jobs / id_

    # What clients ask for

    def create(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """
        Take a job into the queue and return its object; its files are looked at later, by the runner.

        Raises:
            BadRequest: a field that cannot be used, or this installation cannot train.
        """
        _check_installed("train", NEEDED)
        training = self._file(request.get("training_file"), "training_file")
        validation = None
        if request.get("validation_file"):
            validation = self._file(request["validation_file"], "validation_file")
        suffix = request.get("suffix")
        if suffix is not None and not 1 <= len(suffix) <= 64:
            raise BadRequest("suffix: from 1 to 64 characters", param="suffix")
        metadata = _checked_metadata(request.get("metadata"))
        seed = request.get("seed")
        seed = random.SystemRandom().randrange(2**31) if seed is None else seed
        if not 0 <= seed < 2**32:
            raise BadRequest("seed: from 0 to 4294967295", param="seed")
        extra = {"publish": _asks_to_publish(metadata), "store": True, "config": {}, "samples": None}
        extra |= {k: v for k, v in (request.get("zhanggui") or {}).items() if v is not None}
        method, hyperparameters = _method(request)
        if method["type"] == "dpo" and validation is not None:
            raise BadRequest(
                "validation_file: preferences have their validation side from the training file",
                param="validation_file",
                code="unsupported_method",
            )
        id_ = new_id("ftjob")
        model = str(request.get("model") or "")
        config = self._config(id_, find_base(model, self.places), extra, method, hyperparameters, int(seed), request)
        kept = {
            "model": model,
            "training_file": training["id"],
            "validation_file": validation and validation["id"],
            "suffix": suffix,
            "seed": seed,
            "metadata": metadata,
            "method": method,
            "hyperparameters": hyperparameters,
            "integrations": [dict(i) for i in request.get("integrations") or ()],
            "publish": extra["publish"],
            "samples": extra["samples"],
            "config": config,
        }
        # The folder first: a job in the queue has its files, whatever happens to them in the store.
        source = self.folder(id_) / "source"
        source.mkdir(parents=True, mode=0o700)
        self.folder(id_).chmod(0o700)
        try:
            for name, file in (("training", training), ("validation", validation)):
                if file is not None:
                    as_ = PAIRS if method["type"] == "dpo" else f"{name}{Path(file['filename']).suffix.lower()}"
                    link(self.files.path(file["id"]), source / as_)
        except (BadRequest, OSError):
            shutil.rmtree(self.folder(id_), ignore_errors=True)
            raise
        now = int(time.time())
        with self._db.transaction() as db:
            db.execute(
                "INSERT INTO jobs (id, status, stage, created_at, request, state) VALUES (?, ?, ?, ?, ?, ?)",
                (id_, "validating_files", "validate", now, json.dumps(kept), "{}"),
            )
            self.add_event(id_, f"Created fine-tuning job: {id_}")
            self.add_event(id_, f"Validating training file: {training['id']}")
            if validation:
                self.add_event(id_, f"Validating validation file: {validation['id']}")
        self.changed()
        return self.get(id_)

    def _file(self, id_: Any, param: str) -> dict[str, Any]:
        try:
            file = self.files.get(str(id_))
        except BadRequest as exc:
            raise BadRequest(str(exc), param=param, code="file_not_found", status=400) from None
        if file["purpose"] != "fine-tune":
            raise BadRequest(
                f"{param}: {file['id']} was uploaded with the purpose '{file['purpose']}'; upload it with 'fine-tune'",
                param=param,
                code="invalid_file_purpose",
            )
        if not file["bytes"]:
            raise BadRequest(f"{param}: {file['id']} is empty", param=param, code="invalid_file_format")
        return file

    def _config(
        self, id_: str, base: str, extra: Mapping[str, Any], method: Mapping[str, Any], given: Mapping[str, Any],
        seed: int, request: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Return the run's configuration: ours, then `zhanggui.config`, then OpenAI's hyperparameters."""
        knobs = dict(extra["config"])
        if own := [name for name in OURS if name in knobs]:
            raise BadRequest(f"zhanggui.config: {own[0]} is set by the job itself", param=f"zhanggui.config.{own[0]}")
        for name, knob in (("n_epochs", "epochs"), ("batch_size", "batch_examples"), ("beta", "beta")):
            if given.get(name, "auto") != "auto":
                knobs[knob] = given[name]
        for integration in request.get("integrations") or ():
            knobs["wandb"] = integration["wandb"]["project"]
        folder = self.folder(id_)
        knobs |= {"base": base, "data": str(folder / "data"), "seed": seed, "threads": self.threads}
        knobs["keep_checkpoints"] = KEEP_CHECKPOINTS
        if method["type"] == "dpo":
            # Pairs are masked when they are read, by `train` itself: there is no import of them.
            knobs |= {"objective": "dpo", "data": str(folder / "source" / PAIRS)}
        if extra["store"] and self.places.store is not None:
            knobs["store"] = str(self.places.store)
        try:
            config = RunConfig(**knobs)
            if given["learning_rate_multiplier"] != "auto":
                config = RunConfig(**knobs, lr=config.learning_rate * given["learning_rate_multiplier"])
        except (ValidationError, TypeError) as exc:
            raise _refused(exc) from None
        if config.objective != "sft":
            _check_installed("prefer", NEEDED_TO_PREFER)
        if extra["publish"] and METHODS[config.method].cpu == "evaluate":
            raise BadRequest(
                f"method {config.method!r} cannot be published: {METHODS[config.method].how}",
                param="zhanggui.config.method",
            )
        return cast(dict[str, Any], json.loads(config.model_dump_json()))

    def get(self, id_: str) -> dict[str, Any]:
        """Return the object of a job; raises BadRequest where there is none."""
        return job_object(self.job(id_))

    def list(self, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None) -> Page:
        """Return (job objects, newest first, whether there are more); only those with all of `metadata`."""
        found: list[dict[str, Any]] = []
        while True:
            rows, more = self._db.page("jobs", where={}, after=after, limit=limit)
            for n, row in enumerate(rows):
                job = _job(row)
                if metadata and not metadata.items() <= (job.request["metadata"] or {}).items():
                    continue
                if len(found) == limit:
                    return found, True
                found.append(job_object(job))
                if len(found) == limit and not metadata:
                    return found, more or n + 1 < len(rows)
            if not more:
                return found, False
            after = rows[-1]["id"]

    def events(self, id_: str, *, after: str | None = None, limit: int = 20) -> Page:
        """Return (event objects of a job, newest first, whether there are more)."""
        self.job(id_)
        rows, more = self._db.page("events", where={"job": id_}, after=after, limit=limit)
        return [_event_object(row) for row in rows], more

    def events_since(self, id_: str, n: int) -> Fresh:
        """Return (events behind the place `n`, oldest first, the new place, whether the job has ended)."""
        ended = self.job(id_).status in ENDED  # before the events: none comes after
        rows = self._db.rows("SELECT * FROM events WHERE job = ? AND n > ? ORDER BY n LIMIT 500", (id_, n))
        return [_event_object(row) for row in rows], rows[-1]["n"] if rows else n, ended and len(rows) < 500

    def checkpoints(self, id_: str, *, after: str | None = None, limit: int = 10) -> Page:
        """Return (checkpoint objects of a job, newest first, whether there are more)."""
        self.job(id_)
        rows, more = self._db.page("checkpoints", where={"job": id_}, after=after, limit=limit)
        return [_checkpoint_object(row) for row in rows], more

    def cancel(self, id_: str) -> dict[str, Any]:
        """End a job for good."""
        return self._ask(id_, (*OPEN, "paused"), "cancelled", "Fine-tuning job cancelled")

    def pause(self, id_: str) -> dict[str, Any]:
        """Stop a job where it is; what it computes is kept in a checkpoint after the step under way."""
        return self._ask(id_, OPEN, "paused", "Fine-tuning job paused")

    def resume(self, id_: str) -> dict[str, Any]:
        """Let a paused job go on from its checkpoint."""
        job = self.job(id_)
        status = "validating_files" if job.stage == "validate" else "queued"
        return self._ask(id_, ("paused",), status, "Fine-tuning job resumed")

    def _ask(self, id_: str, from_: Sequence[str], to: str, message: str) -> dict[str, Any]:
        with self._db.transaction():
            job = self.job(id_)
            if job.status not in from_:
                verb = {"cancelled": "cancelled", "paused": "paused"}.get(to, "resumed")
                raise BadRequest(
                    f"job {id_} is {job.status} and cannot be {verb}", param="status", code="invalid_job_status"
                )
            if job.stage == "publish" and to in ("cancelled", "paused") and job.status == "running":
                raise BadRequest(
                    f"job {id_} is trained and being published; `python -m finetune rollback` goes back afterwards",
                    param="status",
                    code="invalid_job_status",
                )
            self._set(id_, to, ended=to in ENDED, estimated_finish=None)
            self.add_event(id_, message)
        self.changed()
        return self.get(id_)

    # What the runner says

    def job(self, id_: str) -> Job:
        """Return a job's row; raises BadRequest where there is none."""
        rows = self._db.rows("SELECT * FROM jobs WHERE id = ?", (id_,))
        if not rows:
            raise BadRequest(
                f"Could not find fine tune: {id_[:100]}",
                param="fine_tune_id",
                code="fine_tune_not_found",
                status=404,
            )
        return _job(rows[0])

    def with_status(self, *statuses: str) -> Sequence[Job]:
        """Return the jobs with one of these statuses, oldest first."""
        marks = ", ".join("?" for _ in statuses)
        return [_job(r) for r in self._db.rows(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY n", statuses)]  # noqa: S608

    def move(self, id_: str, from_: str, to: str, *, stage: str | None = None, **state: Any) -> bool:
        """Change the status of a job that still is `from_`; return whether it was. Somebody may have paused it."""
        with self._db.transaction():
            if self.job(id_).status != from_:
                return False
            self._set(id_, to, stage=stage, ended=to in ENDED, **state)
        return True

    def note(self, id_: str, stage: str | None = None, **state: Any) -> None:
        """Keep what is known of a job beside its status."""
        with self._db.transaction():
            self._set(id_, self.job(id_).status, stage=stage, **state)

    def _set(self, id_: str, status: str, *, stage: str | None = None, ended: bool = False, **state: Any) -> None:
        with self._db.transaction() as db:
            job = self.job(id_)
            db.execute(
                "UPDATE jobs SET status = ?, stage = ?, finished_at = ?, state = ? WHERE id = ?",
                (
                    status,
                    stage or job.stage,
                    int(time.time()) if ended else job.finished_at,
                    json.dumps({**job.state, **state}, ensure_ascii=False),
                    id_,
                ),
            )

    def fail(self, id_: str, from_: str, code: str, message: str, param: str | None = None) -> bool:
        """End a job that still is `from_` with an error; return whether it was."""
        error = {"code": code, "message": message, "param": param}
        with self._db.transaction():
            if not self.move(id_, from_, "failed", error=error, estimated_finish=None):
                return False
            self.add_event(id_, f"The job failed: {message}", level="error", data={"code": code, "param": param})
        return True

    def add_event(
        self, id_: str, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None, at: float = 0.0
    ) -> None:
        """Add an event; one with a `step` in its data is of the type `metrics`. `at` is its Unix time, by default now."""  # noqa: E501
        kind = "metrics" if data is not None and "step" in data else "message"
        with self._db.transaction() as db:
            db.execute(
                "INSERT INTO events (id, job, created_at, level, message, type, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    new_id("ftevent"),
                    id_,
                    int(at or time.time()),
                    level,
                    message[:4000],
                    kind,
                    None if data is None else json.dumps(data, ensure_ascii=False),
                ),
            )

    def add_checkpoint(self, id_: str, step: int, metrics: Mapping[str, Any], at: float) -> None:
        """Add a checkpoint and its event; one of a step that a resumed run repeats is there already."""
        name = f"{self.model_name(self.job(id_))}:ckpt-step-{step}"
        with self._db.transaction() as db:
            added = db.execute(
                "INSERT OR IGNORE INTO checkpoints (id, job, created_at, step, name, metrics) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: E501
                (new_id("ftckpt"), id_, int(at), step, name, json.dumps(metrics)),
            ).rowcount
            if added:
                self.add_event(id_, f"Checkpoint created at step {step}", at=at)

    def drop_checkpoints(self, id_: str, kept: Sequence[int]) -> None:
        """Forget the checkpoints whose weights the run has deleted, all but those of the steps `kept`."""
        with self._db.transaction() as db:
            for row in self._db.rows("SELECT n, step FROM checkpoints WHERE job = ?", (id_,)):
                if row["step"] not in kept:
                    db.execute("DELETE FROM checkpoints WHERE n = ?", (row["n"],))

    def transaction(self) -> Any:
        """Return a context in which several changes are kept together or not at all."""
        return self._db.transaction()

    @staticmethod
    def model_name(job: Job) -> str:
        """Return what a job's model is called while it has no release's name, which holds a checksum of its weights."""
        stem = re.sub(r"[^a-z0-9.]+", "-", job.request["model"].lower()).strip("-.")
        suffix = slug(job.request["suffix"])
        return "-".join(x for x in (stem, job.request["config"]["method"], suffix, job.id[-8:]) if x)


def open_queue(
    data: Path, *, releases: Path, models: Path, store: Path | None, max_file_bytes: int, threads: int,
    kind: type[JobQueue] = JobQueue,
) -> JobQueue:  # fmt: skip
    """
    Return the queue of the data folder `data`, made if it is not there.

    Args:
        models: folder of models by name, fetched or one's own.
        store: whose passages are put into the prompts, unless a job wants none.
        threads: of a job's computations; 0: half the cores.

    Raises:
        MerchantError: the folder or its database cannot be used.
    """
    database = Database(data / "fine_tuning.sqlite3")
    files = FileStore(database, data / "files", max_bytes=max_file_bytes)
    jobs, releases, models = (path.resolve() for path in (data / "jobs", releases, models))
    places = Places(jobs, releases, models, store and store.resolve())
    return kind(database, files, places, threads=threads or max(1, (os.cpu_count() or 2) // 2))


# --- Requests --------------------------------------------------------------------------------------------------------


def find_base(name: str, places: Places) -> str:
    """
    Return what `train` takes as the base `name`: a model of the catalog, a release, or a folder of one's own in the cache.

    Raises:
        BadRequest: there is none. Paths are not taken: whoever may send a job need not be one who may read the disk.
    """  # noqa: E501
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise BadRequest(f"model: {name[:100]!r} is no name of a model", param="model", code="model_not_found")
    catalog = load_catalog()
    if any(entry.name == name.lower() for entry in catalog.entries):
        return name.lower()
    if (places.releases / name / "release.json").is_file():
        folder = places.releases / name / "model"
    else:
        folder = places.models / name
    if folder.is_dir():
        try:
            return str(check_folder(folder))
        except MerchantError as exc:
            raise BadRequest(f"model: {exc}", param="model", code="model_not_available") from None
    known = [
        *(entry.name for entry in catalog.entries),
        *sorted(p.parent.name for p in places.releases.glob("*/model")),
    ]
    raise BadRequest(
        f"The model '{name[:100]}' does not exist; there are {', '.join(known)}, and the folders in {places.models.name}/ of the cache",  # noqa: E501
        param="model",
        code="model_not_found",
    )


def _check_installed(extra: str, names: Sequence[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadRequest(
                f"this server is installed without what trains that ({name} is missing): pip install 'zhanggui[{extra}]'",  # noqa: E501
                code="training_not_installed",
            )


def slug(text: str | None) -> str:
    """Return `text` as a part of a name: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", (text or "").lower()).strip("-")[:40]


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(0o600)


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    if metadata is None:
        return None
    if len(metadata) > MAX_METADATA:
        raise BadRequest(f"metadata: at most {MAX_METADATA} pairs", param="metadata")
    for key, value in metadata.items():
        if len(key) > 64 or len(value) > 512:
            raise BadRequest("metadata: keys up to 64 characters, values up to 512", param=f"metadata.{key[:64]}")
    return dict(metadata)


def _asks_to_publish(metadata: Mapping[str, str] | None) -> bool:
    return (metadata or {}).get("publish", "").strip().lower() in ("true", "1", "yes", "on")


def _method(request: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (method as the job shows it, its hyperparameters), "auto" where not given."""
    method = dict(request.get("method") or {"type": "supervised"})
    kind = method["type"]
    if kind == "reinforcement":
        raise BadRequest(
            "method.type: 'supervised' or 'dpo'; 'reinforcement' is not trained here",
            param="method.type",
            code="unsupported_method",
        )
    given = (method.get(kind) or {}).get("hyperparameters") or request.get("hyperparameters") or {}
    names = ("n_epochs", "batch_size", "learning_rate_multiplier", *(("beta",) if kind == "dpo" else ()))
    found = {name: "auto" if given.get(name) is None else given[name] for name in names}
    return {"type": kind, kind: {"hyperparameters": found}}, found


def _refused(exc: Exception) -> BadRequest:
    if not isinstance(exc, ValidationError):
        return BadRequest(f"zhanggui.config: {exc}", param="zhanggui.config")
    first = exc.errors()[0]
    where = ".".join(map(str, first["loc"]))
    param = {"epochs": "hyperparameters.n_epochs", "lr": "hyperparameters.learning_rate_multiplier"}.get(
        where, f"zhanggui.config.{where}" if where else "zhanggui.config"
    )
    return BadRequest(f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param)


# --- Objects in OpenAI's shape ---------------------------------------------------------------------------------------


def job_object(job: Job) -> dict[str, Any]:
    """Return `fine_tuning.job`. What OpenAI's has no field for is in `zhanggui`."""
    request, state = job.request, job.state
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "model": request["model"],
        "fine_tuned_model": state.get("fine_tuned_model"),
        "organization_id": "zhanggui",
        "status": job.status,
        "hyperparameters": request["hyperparameters"],
        "method": request["method"],
        "training_file": request["training_file"],
        "validation_file": request["validation_file"],
        "result_files": state.get("result_files", []),
        "trained_tokens": state.get("trained_tokens"),
        "error": state.get("error"),
        "user_provided_suffix": request["suffix"],
        "seed": request["seed"],
        "estimated_finish": state.get("estimated_finish"),
        "integrations": request["integrations"],
        "metadata": request["metadata"],
        "zhanggui": {
            "stage": job.stage,
            "publish": request["publish"],
            "published": state.get("published", False),
            "gate": state.get("gate"),
            "config": {k: v for k, v in request["config"].items() if k not in ("base", "data", "store")},
        },
    }


def _event_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.event",
        "created_at": row["created_at"],
        "level": row["level"],
        "message": row["message"],
        "type": row["type"],
        "data": json.loads(row["data"]) if row["data"] else {},
    }


def _checkpoint_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["name"],
        "fine_tuning_job_id": row["job"],
        "metrics": json.loads(row["metrics"]),
        "step_number": row["step"],
    }
