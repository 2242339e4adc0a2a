"""
Runs the queue: one process a job, with limits, its progress and words turned into the job's events.

Knows processes and the files a run leaves; what a job is, is in finetune/jobs.py, and what its process does in
finetune/job_child.py. Every job lives in a folder of its own:

    source/       links to the uploaded files, unmasked: gone once they are imported, or the job has ended
    data/         the import: masked, split
    run/          the run, as `python -m finetune train` leaves it
    job.json      the commands of the process under way; <stage>.json what they printed; lock, held by the process

Statuses are read from the queue twice a second, and a process whose job is not wanted to run is stopped. A server that
was killed finds its jobs as they were, and goes on with them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import csv
import fcntl
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from bot.errors import BotError
from finetune.files import RESULTS
from finetune.jobs import ENDED, Job, JobQueue
from finetune.runs import RunFolder

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
LOOK_EVERY_S = 0.5
SWEEP_EVERY_S = 600.0  # folders of jobs that ended long ago are looked for so often
KEEP_EVERY_S = 10.0  # what a job has computed is written down so often
PAUSE_S = 600.0  # a step may take minutes on a small machine; then its work is not waited for any longer
STOP_S = 3.0  # when the server stops: what is not in a checkpoint by then is computed again
MAX_STARTS = 5  # without a step more than before: a job that takes the server down with it is not tried for ever
MAX_FAULTS = 100  # listed as events; the first one is in the error, all are counted
FEW = 20  # dialogues: below, all are learned, since a side of two says nothing
HELD_OUT = 30  # dialogues the gate wants to see, and some that are dropped on the way
_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_KNOWN = re.compile(r"^step \d+: validation loss|^(?:error|failed): ")  # told by an event of its own


@dataclass(frozen=True)
class Limits:
    """What jobs may take."""

    at_once: int = 1
    memory_bytes: int | None = None  # resident, of one job
    hours: float = 24.0  # of computing, over all its processes
    keep_days: float | None = None  # the folder of a job that has ended; None: for ever


class Runner:
    """Runs jobs until it is cancelled. One runner works on a data folder; others wait for it to end."""

    def __init__(self, queue: JobQueue, limits: Limits) -> None:
        self._queue, self._limits = queue, limits
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Run what is in the queue, until cancelled; then stop the processes, whose jobs go on after the next start."""
        loop = asyncio.get_running_loop()
        async with _alone(self._queue.places.jobs / ".lock"):
            self._queue.changed = partial(_wake_from_thread, loop, self._wake)
            try:
                await asyncio.to_thread(self._sweep)
                swept = -math.inf
                while True:
                    self._wake.clear()
                    try:
                        if time.monotonic() - swept > SWEEP_EVERY_S:
                            swept = time.monotonic()
                            await asyncio.to_thread(self._expire)
                        for job in await asyncio.to_thread(self._startable):
                            self._running[job.id] = asyncio.create_task(self._guarded(job), name=job.id)
                    except (BotError, OSError, sqlite3.Error) as exc:
                        logger.warning("jobs: %s; trying again", exc)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), LOOK_EVERY_S)
            finally:
                self._queue.changed = lambda: None
                self._stopping = True
                await asyncio.gather(*self._running.values(), return_exceptions=True)

    def figures(self) -> dict[str, float]:
        """Return what /metrics says: jobs by status that have not ended."""
        jobs = self._queue.with_status("validating_files", "queued", "running", "paused")
        return {f"{s}": sum(j.status == s for j in jobs) for s in ("validating_files", "queued", "running", "paused")}

    def _sweep(self) -> None:
        """Delete what jobs that ended while nobody watched have left of their files, and folders that became no job."""
        self._queue.files.sweep()
        known = {
            job.id: job for job in self._queue.with_status(*ENDED, "validating_files", "queued", "running", "paused")
        }
        for folder in self._queue.places.jobs.glob("ftjob-*"):
            if folder.name not in known and time.time() - folder.stat().st_mtime > 3600:  # else it is just being made
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.name in known and known[folder.name].status in ENDED:
                _forget_sources(folder)

    def _expire(self) -> None:
        """Delete the folders of jobs that ended long ago; the jobs, their events and published releases stay."""
        if self._limits.keep_days is None:
            return
        oldest = time.time() - self._limits.keep_days * 86_400
        for job in self._queue.with_status(*ENDED):
            folder = self._queue.folder(job.id)
            if folder.exists() and (job.finished_at or time.time()) < oldest:
                shutil.rmtree(folder)
                self._queue.drop_checkpoints(job.id, ())
                self._queue.add_event(job.id, f"Run and data deleted, {self._limits.keep_days:g} days after the end")

    def _startable(self) -> list[Job]:
        """Return what may start now: one check of files at a time, and `at_once` trainings, those that were running first."""  # noqa: E501
        queue, found = self._queue, list[Job]()
        busy = [queue.job(id_) for id_, task in list(self._running.items()) if not task.done()]
        self._running = {job.id: self._running[job.id] for job in busy}
        checking = any(job.stage == "validate" for job in busy)
        n_training = sum(job.stage != "validate" for job in busy)
        for job in queue.with_status("validating_files"):
            if job.id not in self._running and not checking:
                checking = True
                found.append(job)
        for status in ("running", "queued"):
            for job in queue.with_status(status):
                if job.id in self._running or n_training >= self._limits.at_once:
                    continue
                if status == "running" or queue.move(job.id, "queued", "running"):
                    n_training += 1
                    found.append(queue.job(job.id))
        return found

    async def _guarded(self, job: Job) -> None:
        """Run a job's process; whatever breaks here ends that job and no other."""
        try:
            await self._process(job)
        except Exception:
            logger.exception("job %s broke", job.id)
            message = "an internal error; the server's log has it"
            await asyncio.to_thread(self._queue.fail, job.id, job.status, "server_error", message)
        finally:
            await asyncio.to_thread(self._tidy, job.id)
            self._wake.set()

    def _tidy(self, id_: str) -> None:
        if self._queue.job(id_).status in ENDED:
            _forget_sources(self._queue.folder(id_))

    # One process

    async def _process(self, job: Job) -> None:
        folder = self._queue.folder(job.id)
        if not await asyncio.to_thread(self._prepare, job, folder):
            return
        variables = {name: str(self._queue.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "finetune.job_child", str(folder), str(os.getpid())),
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **variables, "TOKENIZERS_PARALLELISM": "false"},
        )
        watched = _Watched(self._queue, job, folder, process)
        try:
            await asyncio.gather(watched.read_stdout(), watched.read_stderr(), self._watch(watched))
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        await asyncio.to_thread(self._finished, watched)

    def _prepare(self, job: Job, folder: Path) -> bool:
        """Write down what the process is to do; return whether there is to be one."""
        queue = self._queue
        n_starts = job.state.get("n_starts", 0) + 1
        if n_starts > MAX_STARTS:
            message = f"interrupted {MAX_STARTS} times without getting further, the last time while {_doing(job.stage)}"
            queue.fail(job.id, job.status, "interrupted", message)
            return False
        queue.note(job.id, n_starts=n_starts)
        again = n_starts > 1 or job.stage not in ("validate", "train") or (folder / "run" / "run.json").exists()
        plan = {"commands": self._commands(job, folder), "suffix": job.request["suffix"]}
        (folder / "job.json").write_text(json.dumps(plan, ensure_ascii=False), encoding="utf-8")
        if job.stage != "validate":
            queue.add_event(
                job.id, f"Fine-tuning job goes on: {_doing(job.stage)}" if again else "Fine-tuning job started"
            )
        return True

    async def _watch(self, watched: _Watched) -> None:
        """Follow a process to its end: its progress, its limits, and whether its job is still wanted."""
        process, began = watched.process, time.monotonic()
        while process.returncode is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), LOOK_EVERY_S)
            seconds = watched.job.state.get("seconds", 0.0) + time.monotonic() - began
            status = await asyncio.to_thread(watched.look, seconds)
            if process.returncode is None and (signal_ := self._judge(watched, status, seconds)) is not None:
                process.send_signal(signal_)

    def _judge(self, watched: _Watched, status: str, seconds: float) -> signal.Signals | None:
        """Return what a process is to be sent: nothing while its job is wanted and within its limits."""
        limits, memory = self._limits, _resident_bytes(watched.process.pid)
        if limits.memory_bytes and memory > limits.memory_bytes:
            took, most = memory / 2**30, limits.memory_bytes / 2**30
            watched.over = ("memory_limit", f"it took {took:.1f} GiB of memory; the limit is {most:.1f} GiB")
            return signal.SIGKILL
        if seconds > limits.hours * 3600:
            watched.over = ("time_limit", f"it computed for more than {limits.hours:g} hours, the limit")
            return signal.SIGKILL
        if status in ENDED:
            return signal.SIGKILL
        if not (self._stopping or status == "paused" or watched.stopped_at):
            return None
        if not watched.stopped_at:
            watched.stopped_at = time.monotonic()
            return signal.SIGTERM  # training writes a checkpoint after the step under way
        waited = time.monotonic() - watched.stopped_at
        return signal.SIGKILL if waited > (STOP_S if self._stopping else PAUSE_S) else None

    def _commands(self, job: Job, folder: Path) -> list[dict[str, Any]]:
        """Return what the process is to run: what a merchant would type, from where the job is."""
        if job.stage == "validate":
            shutil.rmtree(folder / "data", ignore_errors=True)  # finished as the job was paused: it is looked at again
            pairs = job.request["method"]["type"] == "dpo"
            check = {"preferences": job.request["config"]} if pairs else {"arguments": self._import(job, folder)}
            return [{"stage": "validate", "needed": True, **check}]
        run, releases, request = folder / "run", ["--releases", str(self._queue.places.releases)], job.request
        (folder / "config.json").write_text(json.dumps(request["config"], ensure_ascii=False), encoding="utf-8")
        commands: list[dict[str, Any]] = []
        if not (run / "result.json").exists():
            train = ["train", "--config", str(folder / "config.json"), "--run", str(run), "--json"]
            if (run / "run.json").exists():
                train.append("--resume")
            else:
                shutil.rmtree(run, ignore_errors=True)  # ended while its examples were made: nothing to go on from
            if request["publish"]:
                train.append("--publishable")
            commands.append({"stage": "train", "needed": True, "arguments": train})
        samples = ["--samples", str(request["samples"])] if request["samples"] is not None else []
        if job.stage != "publish":
            evaluate = ["eval", "--run", str(run), "--json", *releases, *samples]
            commands.append({"stage": "evaluate", "needed": False, "arguments": evaluate})
        if request["publish"]:
            suffix = ["--suffix", request["suffix"]] if request["suffix"] else []
            publish = ["publish", "--run", str(run), "--json", *releases, *suffix]
            where = {"releases": releases[1], "suffix": request["suffix"]}
            commands.append({"stage": "publish", "needed": False, "arguments": publish, **where})
        return commands

    def _import(self, job: Job, folder: Path) -> list[str]:
        request = job.request
        training = next((folder / "source").glob("training*"))
        n = _count_lines(training, HELD_OUT * 10)
        # Held-out dialogues are not learned, so there are no more of them than the gate needs.
        test = 0.0 if n < FEW else min(0.25, max(0.1, HELD_OUT / n)) if request["publish"] else 0.1
        valid = 0.0 if n < FEW or request["validation_file"] else 0.1
        arguments = ["import", str(training), "--out", str(folder / "data"), "--json"]
        arguments += ["--valid", f"{valid}", "--test", f"{test:.3f}", "--seed", str(request["seed"])]
        if request["validation_file"]:
            arguments += ["--validation", str(next((folder / "source").glob("validation*")))]
        if self._queue.places.store is not None:
            arguments += ["--store", str(self._queue.places.store)]
        return arguments

    # How it ended

    def _finished(self, watched: _Watched) -> None:
        """Say how a process ended, where its job still was wanted to run; else the job waits as it is."""
        queue, job = self._queue, watched.job
        status = job.status  # "validating_files" or "running", when it was started
        if watched.over is not None:
            queue.fail(job.id, status, *watched.over)
        elif self._stopping or watched.stopped_at or queue.job(job.id).status != status:
            queue.note(job.id, n_starts=0)  # interrupted on purpose: goes on when it is wanted again
        elif watched.process.returncode and watched.process.returncode < 0:
            died = signal.Signals(-watched.process.returncode).name
            hint = ": the system was short of memory?" if died == "SIGKILL" else ""
            queue.fail(job.id, status, "process_died", f"its process was ended by {died}{hint}")
        elif job.stage == "validate":
            self._validated(watched)
        elif "train" in watched.failed:
            message = watched.failed["train"] or "training failed; the server's log has more"
            lack = re.search(r"not enough memory|can't allocate memory|out of memory", message)
            queue.fail(job.id, status, "out_of_memory" if lack else "training_failed", message)
        elif watched.process.returncode:
            queue.fail(job.id, status, "process_died", f"its process ended with status {watched.process.returncode}")
        else:
            self._succeeded(watched)

    def _validated(self, watched: _Watched) -> None:
        queue, job, folder = self._queue, watched.job, watched.folder
        report: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            report = json.loads((folder / "validate.json").read_text(encoding="utf-8"))
        if "validate" in watched.failed or watched.process.returncode:
            faults = [_Fault.of(f, folder) for f in report.get("faults", ())]
            with queue.transaction():
                for fault in faults[:MAX_FAULTS]:
                    queue.add_event(job.id, str(fault), level="error", data={"param": fault.param, "line": fault.line})
                if (n := report.get("n_faults", 0)) > MAX_FAULTS:
                    queue.add_event(job.id, f"{n - MAX_FAULTS} more faults", level="error")
                param = faults[0].param if faults else "training_file"
                message = _unpathed(watched.failed.get("validate", ""), folder) or "the file cannot be read"
                if faults:
                    more = f" ({n - 1} more faults are in the events)" if n > 1 else ""
                    message = f"Invalid file format. {faults[0]}{more}"
                queue.fail(job.id, job.status, f"invalid_{param}", message, param)
            return
        sides = {name: side["n_dialogues"] for name, side in report["splits"].items()}
        if job.request["validation_file"] and not sides["valid"]:
            message = "nothing of the validation file is left: its dialogues are alike to those of the training file"
            queue.fail(job.id, job.status, "invalid_validation_file", message, "validation_file")
            return
        with queue.transaction():
            facts = f"{sides['train']} dialogues to train on, {sides['valid']} to validate, {sides['test']} held out"
            data = {"read": report["n_read"], **sides, "dropped": report["dropped"], "masked": report["masked"]}
            masked = sum(report["masked"].values())
            queue.add_event(job.id, f"Files validated: {facts}; {masked} personal data masked", data=data)
            for reason, n in report["dropped"].items():
                queue.add_event(job.id, f"{n} left out: {reason.partition(': ')[2]}", level="warn")
            if sides["train"] < 10:
                queue.add_event(job.id, f"{sides['train']} dialogues are few: expect little", level="warn")
            if queue.move(job.id, "validating_files", "queued", stage="train", n_starts=0):
                queue.add_event(job.id, "Files validated, moving job to queued state")
        if job.request["method"]["type"] != "dpo":  # whose pairs are read by the training
            _forget_sources(folder)

    def _succeeded(self, watched: _Watched) -> None:
        queue, job, folder = self._queue, watched.job, watched.folder
        run = RunFolder(folder / "run", resume=True)
        result = run.read_json("result.json")
        evaluation, published = _printed(folder, "evaluate"), _printed(folder, "publish")
        if "evaluate" in watched.failed:
            evaluation = None
        if "publish" in watched.failed:
            published = None
        gate = evaluation and {k: evaluation["gate"][k] for k in ("passed", "reasons")}
        name = published["name"] if published else watched.model
        metrics = base64.b64encode(result_csv(run).encode())
        file = queue.files.add(metrics, "step_metrics.csv", RESULTS)
        with queue.transaction():
            if watched.failed.get("evaluate"):
                queue.add_event(job.id, f"Not evaluated: {_unpathed(watched.failed['evaluate'], folder)}", level="warn")
            elif gate and gate["passed"]:
                queue.add_event(job.id, "Evaluated: the gate is passed", data={"gate": gate})
            elif gate:
                message = f"Evaluated: the gate is not passed: {'; '.join(gate['reasons'])}"
                queue.add_event(job.id, message, level="warn", data={"gate": gate})
            if published:
                queue.add_event(job.id, f"Published: {name}")
            elif watched.failed.get("publish"):
                queue.add_event(job.id, f"Not published: {_unpathed(watched.failed['publish'], folder)}", level="warn")
            elif job.request["publish"]:
                queue.add_event(job.id, "Not published: only what passes the gate is", level="warn")
            else:
                queue.add_event(job.id, "Not published: the job did not ask for it")
            queue.add_event(job.id, f"New fine-tuned model created: {name}")
            moved = queue.move(
                job.id, "running", "succeeded", stage="done", fine_tuned_model=name, gate=gate,
                published=bool(published), trained_tokens=result["n_tokens"], result_files=[file["id"]],
                estimated_finish=None,
            )  # fmt: skip
            if moved:
                queue.add_event(job.id, "The job has successfully completed")
        if not moved:
            queue.files.delete(file["id"])


class _Watched:
    """A process under way, and what it has said."""

    def __init__(self, queue: JobQueue, job: Job, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.queue, self.job, self.folder, self.process = queue, job, folder, process
        self.failed: dict[str, str] = {}  # stage -> what went wrong
        self.over: tuple[str, str] | None = None  # the limit it went over: (code, message)
        self.stopped_at: float | None = None  # when it was asked to end, monotonic
        self.model = ""  # what its result is called
        self._kept_s = -math.inf  # the seconds that were written down last
        self._n_steps = 0
        self._step_s: list[float] = []  # when the last steps ended
        # How often the better reply is ahead, where pairs are learned; no share of tokens.
        supervised = job.request["config"]["objective"] == "sft"
        self._accuracy = "mean_token_accuracy" if supervised else "reward_accuracy"
        self._last: dict[str, Any] = {}  # the last step
        self._validated_at = 0

    async def read_stdout(self) -> None:
        """Follow the stages."""
        async for line in _lines(self.process.stdout):
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                await asyncio.to_thread(self._said, json.loads(line))

    def _said(self, said: dict[str, Any]) -> None:
        stage = said.get("stage")
        if stage not in (None, "validate") and stage != self.queue.job(self.job.id).stage:
            self.queue.note(self.job.id, stage=stage)
            self.queue.add_event(self.job.id, f"Now {_doing(stage)}")
        if said.get("status"):
            self.failed[said["done"]] = said["message"]
        self.model = said.get("model", self.model)

    async def read_stderr(self) -> None:
        """Turn what the process writes into events, and into lines of the server's log."""
        async for raw in _lines(self.process.stderr):
            line = _CONTROL.sub("", raw).strip()
            if not line or _KNOWN.match(line):
                continue
            logger.info("job %s: %s", self.job.id, line)
            level = "warn" if "warning" in line.lower() else "info"
            message = _unpathed(line, self.folder)[:1000]
            await asyncio.to_thread(self.queue.add_event, self.job.id, message, level=level)

    def look(self, seconds: float) -> str:
        """Take over what the run wrote since the last look, and return what is wanted of the job now."""
        if self.job.stage != "validate":
            while self._read_events():
                pass
            self._drop_checkpoints()
        if seconds > self._kept_s + KEEP_EVERY_S or self.process.returncode is not None:
            self._kept_s = seconds
            self.queue.note(self.job.id, seconds=round(seconds, 1))
        return self.queue.job(self.job.id).status

    def _read_events(self) -> bool:
        """Turn a stretch of the run's events into the job's, each once, also over a restart; return whether there was one."""  # noqa: E501
        path = self.folder / "run" / "events.jsonl"
        offset = int(self.queue.job(self.job.id).state.get("offset", 0))
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(1 << 20)
        except OSError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            return False
        if not self._n_steps:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._n_steps = json.loads((self.folder / "run" / "run.json").read_text(encoding="utf-8"))["n_steps"]
        with self.queue.transaction():
            state: dict[str, Any] = {"offset": offset + len(whole), "n_starts": 1}
            for line in whole.splitlines():
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # where a killed run broke off
                if event.get("kind") == "step":
                    self._step(event, state)
                elif event.get("kind") == "valid":
                    self._valid(event)
            self.queue.note(self.job.id, **state)
        return True

    def _drop_checkpoints(self) -> None:
        """Forget the checkpoints that the run has deleted; that of the last validation comes a moment after it."""
        names = [p.name.split("-") for p in (self.folder / "run" / "checkpoints").glob("*-*")]  # step-N, checkpoint-N
        kept = [self._validated_at, *(int(n[1]) for n in names if n[1].isdigit())]
        self.queue.drop_checkpoints(self.job.id, kept)

    def _step(self, event: Mapping[str, Any], state: dict[str, Any]) -> None:
        step, at = int(event["step"]), float(event["at"])
        data = {"step": step, "total_steps": self._n_steps, "train_loss": event["loss"], "learning_rate": event["lr"],
                "tokens_per_s": event["tokens_per_s"]}  # fmt: skip
        if "accuracy" in event:
            data[f"train_{self._accuracy}"] = event["accuracy"]
        self._last = {"step": step, "train_loss": event["loss"], "accuracy": event.get("accuracy")}
        message = f"Step {step}/{self._n_steps}: training loss={event['loss']:.4f}"
        self.queue.add_event(self.job.id, message, data=data, at=at)
        self._step_s = [*self._step_s[-20:], at]
        if len(self._step_s) > 1 and self._n_steps:
            each = (self._step_s[-1] - self._step_s[0]) / (len(self._step_s) - 1)
            state["estimated_finish"] = int(at + each * (self._n_steps - step)) + 1

    def _valid(self, event: Mapping[str, Any]) -> None:
        step = int(event["step"])
        metrics = {"step": step, "valid_loss": event["loss"], "full_valid_loss": event["loss"]}
        if "accuracy" in event:
            metrics[f"valid_{self._accuracy}"] = metrics[f"full_valid_{self._accuracy}"] = event["accuracy"]
        message = f"Step {step}/{self._n_steps}: validation loss={event['loss']:.4f}"
        self.queue.add_event(self.job.id, message, data=dict(metrics), at=float(event["at"]))
        if self._last.get("step") == step:
            metrics["train_loss"] = self._last["train_loss"]
            if self._last.get("accuracy") is not None:
                metrics[f"train_{self._accuracy}"] = self._last["accuracy"]
        self._validated_at = step
        self.queue.add_checkpoint(self.job.id, step, metrics, float(event["at"]))


@dataclass(frozen=True)
class _Fault:
    """A fault of a file, in the client's words: its parameter and line, no path of ours."""

    param: str
    line: int | None
    text: str

    @classmethod
    def of(cls, fault: Mapping[str, Any], folder: Path) -> _Fault:
        place = str(fault["source"])
        path, _, number = place.rpartition(":")
        name = Path(path if number.isdigit() else place).stem
        line = int(number) if number.isdigit() else None
        where = f"line {line}, {fault['field']}" if line is not None else fault["field"]
        text = _unpathed(f"{where}: {fault['problem']}; {fault['remedy']}", folder)
        return cls("validation_file" if name == "validation" else "training_file", line, text)

    def __str__(self) -> str:
        return f"{self.param}, {self.text}"


def result_csv(run: RunFolder) -> str:
    """Return a run's losses as OpenAI's result file has them: a line a step."""
    valid = {e["step"]: e for e in run.events("valid")}
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    for event in run.events("step"):
        other = valid.get(event["step"], {})
        row = [event["loss"], event.get("accuracy"), other.get("loss"), other.get("accuracy")]
        table.writerow([event["step"], *("" if value is None else value for value in row)])
    return out.getvalue()


def _doing(stage: str) -> str:
    words = {"validate": "checking its files", "train": "training", "evaluate": "evaluating", "publish": "publishing"}
    return words[stage]


def _printed(folder: Path, stage: str) -> dict[str, Any] | None:
    """Return the document that a stage's command printed; None where it was not run to its end."""
    try:
        found = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _unpathed(text: str, folder: Path) -> str:
    """Return `text` without the paths of this machine that it may hold."""
    return text.replace(f"{folder}{os.sep}source{os.sep}", "").replace(f"{folder}{os.sep}", "").replace(str(folder), "")


def _forget_sources(folder: Path) -> None:
    """Delete what is unmasked of a job: its links to the files, and what an import that was broken off left."""
    for path in (folder / "source", folder / "data.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _count_lines(path: Path, most: int) -> int:
    """Return how many lines `path` has, at most `most`: whoever asks wants to know whether there are few."""
    n = 0
    with path.open("rb") as file:
        while n < most and (line := file.readline(1 << 16)):
            n += line.endswith(b"\n") or len(line) < 1 << 16
    return n


def _resident_bytes(pid: int) -> int:
    """Return the memory a process has; 0 where the system does not say."""
    try:
        with Path(f"/proc/{pid}/statm").open(encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _wake_from_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[str]:
    """Yield lines, also those that end in a carriage return; the rest of an endless one is dropped."""
    assert stream is not None
    buffer = b""
    while data := await stream.read(1 << 16):
        *whole, buffer = re.split(rb"[\r\n]", buffer + data)
        buffer = buffer[: 1 << 20]
        for line in whole:
            if line:
                yield line.decode("utf-8", "replace")
    if buffer:
        yield buffer.decode("utf-8", "replace")


@contextlib.asynccontextmanager
async def _alone(path: Path) -> AsyncIterator[None]:
    """Hold the folder's lock; wait for it as long as another server has it. The kernel frees it when that one dies."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file: IO[str] = path.open("w")
    told = False
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    told = True
                    logger.warning("jobs: another server works on %s; this one waits", path.parent)
            await asyncio.sleep(1)
        yield
    finally:
        file.close()
