"""Fine-tuning jobs by OpenAI's own SDK: a real server, its queue, a process a job, and a tiny random model."""

from __future__ import annotations

import asyncio
import base64
import csv
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.jobs import open_queue
from tests.finetune.jobs_server import fine_tuning_of
from tests.finetune.tiny import build_model
from tests.running import running_server

ROOT = Path(__file__).parents[2]
SMALL = {"max_tokens": 200, "row_tokens": 400, "batch_tokens": 800, "bf16": False, "patience": 0}
N_STEPS = 160
LONG = {**SMALL, "epochs": 1000, "max_steps": N_STEPS, "eval_every": 30, "dropout": 0.1}
WAIT_S = 240  # a process imports torch first, which takes half a minute on a busy machine


def dialogues(n: int, *, seed: int = 1) -> bytes:
    """Return `n` dialogues, no two alike, as a file of OpenAI's messages."""
    rng, goods, lines = random.Random(seed), ["lamp", "rug", "pan", "quilt", "毛巾", "台灯", "书架"], []
    for i in range(n):
        item, word = goods[i % len(goods)], "".join(rng.choice("abcdefghij") for _ in range(24))
        talk = [("user", f"is the {item} {word[:12]} here?"), ("assistant", f"yes, the {item} is: {word[12:]}.")]
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}, ensure_ascii=False))
    return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def home(model: Path, tmp_path: Path) -> Path:
    """A folder with a model of the merchant's own in its cache."""
    shutil.copytree(model, tmp_path / "cache" / "models" / "tiny")
    return tmp_path


def sdk(port: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@asynccontextmanager
async def serving(home: Path, **settings: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """A server in this process."""
    fine_tuning = fine_tuning_of(home, **settings)
    async with running_server(home / "log.db", fine_tuning=fine_tuning) as server, sdk(server.port) as client:
        yield client


async def upload(client: openai.AsyncOpenAI, content: bytes, name: str = "chats.jsonl") -> str:
    return (await client.files.create(file=(name, content), purpose="fine-tune")).id


async def create(client: openai.AsyncOpenAI, content: bytes, config: dict[str, Any] = SMALL, **given: Any) -> Any:
    """Queue a job for the tiny model; without the store's passages, of which there are none."""
    ours = {"store": False, "config": config, "samples": 0, **given.pop("zhanggui", {})}
    file = given.pop("training_file", None) or await upload(client, content)
    return await client.fine_tuning.jobs.create(
        model="tiny", training_file=file, extra_body={"zhanggui": ours}, **{"seed": 7, **given}
    )


async def until(client: openai.AsyncOpenAI, id_: str, holds: Callable[[Any], bool]) -> Any:
    """Return the job once `holds` of it; fail where it ends otherwise."""
    deadline = time.monotonic() + WAIT_S
    while not holds(job := await client.fine_tuning.jobs.retrieve(id_)):
        said = [e.message for e in (await client.fine_tuning.jobs.list_events(id_)).data]
        assert job.status not in ("succeeded", "failed", "cancelled"), (job.status, job.error, said)
        assert time.monotonic() < deadline, (job.status, said)
        await asyncio.sleep(0.1)
    return job


async def ended(client: openai.AsyncOpenAI, id_: str) -> Any:
    return await until(client, id_, lambda job: job.status in ("succeeded", "failed", "cancelled"))


async def events_of(client: openai.AsyncOpenAI, id_: str) -> list[Any]:
    """Return all events, oldest first, through all pages."""
    return [e async for e in client.fine_tuning.jobs.list_events(id_, limit=100)][::-1]


async def stepped(client: openai.AsyncOpenAI, id_: str, n: int = 1) -> None:
    """Return once the job has made `n` steps more than it has now."""

    async def steps() -> int:
        return sum("train_loss" in (e.data or {}) for e in await events_of(client, id_))

    before, deadline = await steps(), time.monotonic() + WAIT_S
    while await steps() < before + n:
        assert (await client.fine_tuning.jobs.retrieve(id_)).status in ("validating_files", "queued", "running")
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def table(content: bytes) -> list[dict[str, str]]:
    """Return the rows of a result file, which is CSV in base64 as OpenAI's is."""
    return list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))


def processes(home: Path) -> list[int]:
    """Return the job processes of a server in `home`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if b"finetune.job_child" in command and str(home).encode() in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.timeout(WAIT_S + 60)
async def test_a_job_lives_from_its_file_to_a_published_release(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(home) as client:
        config = {**SMALL, "lr": 5e-3, "max_steps": 30, "epochs": 50, "eval_every": 10}
        told = b'\n{"messages": [{"role": "user", "content": "my mail is joe.bloggs@example.org"}, ' \
               b'{"role": "assistant", "content": "thanks, or call 400 123 4567, noted well."}]}'  # fmt: skip
        job = await create(
            client, dialogues(110) + told, config, suffix="Autumn 25", metadata={"publish": "true", "by": "test"},
            method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 8}}},
        )  # fmt: skip
        assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", "tiny", 7)
        assert job.id.startswith("ftjob-")
        assert job.fine_tuned_model is job.trained_tokens is job.error is job.finished_at is None
        assert job.method.supervised.hyperparameters.batch_size == job.hyperparameters.batch_size == 8
        assert job.hyperparameters.n_epochs == "auto"
        await client.files.delete(job.training_file)  # a job has what it needs
        job = await ended(client, job.id)
        events = await events_of(client, job.id)
        said = [e.message for e in events]
        assert job.status == "succeeded", said

        # What it says, in order.
        order = [said.index(next(m for m in said if m.startswith(words))) for words in (
            "Created fine-tuning job", "Validating training file", "Files validated:", "Files validated, moving job to",
            "Fine-tuning job started", "estimate: ", "Step 1/30: training loss=", "Checkpoint created at step 10",
            "Now evaluating", "Evaluated: the gate is passed", "Published: ", "The job has successfully completed")]  # fmt: skip
        assert order == sorted(order)
        assert len({e.id for e in events}) == len(events)
        steps = [e for e in events if e.type == "metrics" and "train_loss" in e.data]
        assert [e.data["step"] for e in steps] == list(range(1, 31))
        assert all(e.data["total_steps"] == 30 and e.level == "info" for e in steps)
        stream = await client.get(f"/fine_tuning/jobs/{job.id}/events?stream=true", cast_to=httpx.Response)
        streamed = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
        assert streamed.pop() == "[DONE]"
        assert [json.loads(line)["id"] for line in streamed] == [e.id for e in events]

        # What it left.
        checkpoints = [c async for c in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
        assert [c.step_number for c in checkpoints] == [30, 20, 10]
        assert all(
            c.metrics.step == c.step_number and c.metrics.valid_loss and c.metrics.train_loss for c in checkpoints
        )
        accuracies = [c.metrics.valid_mean_token_accuracy for c in checkpoints]
        assert all(accuracy is not None and 0 <= accuracy <= 1 for accuracy in accuracies)
        assert accuracies == [c.metrics.full_valid_mean_token_accuracy for c in checkpoints]
        assert {c.fine_tuning_job_id for c in checkpoints} == {job.id}
        assert checkpoints[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-30")
        rows = table((await client.files.content(job.result_files[0])).content)
        assert (await client.files.retrieve(job.result_files[0])).purpose == "fine-tune-results"
        assert [int(r["step"]) for r in rows] == list(range(1, 31))
        assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
        assert [n for n, r in enumerate(rows, 1) if r["valid_loss"]] == [10, 20, 30]
        assert job.trained_tokens > 0
        assert job.created_at <= job.finished_at <= time.time() + 1
        assert job.fine_tuned_model.startswith("tiny-lora-autumn-25-")
        current = json.loads((home / "data" / "releases" / "current.json").read_text())
        assert current["release"] == job.fine_tuned_model
        assert (home / "data" / "releases" / job.fine_tuned_model / "release.json").exists()

        # The merchant's words as they were said are nowhere but in the file, which was deleted.
        folder = home / "data" / "jobs" / job.id
        assert not (folder / "source").exists()
        texts = b"".join(
            p.read_bytes() for p in (home / "data").rglob("*") if p.is_file() and p.suffix != ".safetensors"
        )
        assert b"joe.bloggs" not in texts
        assert b"[EMAIL_1]" in texts
        assert b"400 123 4567" in texts  # the store's own number is no secret
        assert folder.stat().st_mode & 0o077 == 0

        # It is found by its metadata, and by the command line, beside the server and through it.
        jobs = client.fine_tuning.jobs
        assert [j.id async for j in jobs.list(metadata={"by": "test"})] == [job.id]
        assert [j.id async for j in jobs.list(metadata={"by": "another"})] == []
        for where in (["--data", str(home / "data")], ["--url", str(client.base_url).removesuffix("/v1/")]):
            shown = await command(capsys, "show", job.id, *where)
            assert (shown["status"], len(shown["checkpoints"])) == ("succeeded", 3)
            assert [j["id"] for j in await command(capsys, "list", *where)] == [job.id]
            assert len(await command(capsys, "events", job.id, *where)) == len(events)
            assert await asyncio.to_thread(main, ["jobs", "cancel", job.id, *where]) == 2
            assert "is succeeded and cannot be cancelled" in capsys.readouterr().err
        with pytest.raises(openai.BadRequestError, match="cannot be paused"):
            await jobs.pause(job.id)
    assert (folder / "run").exists()

    # A server that is told to keep folders for a while deletes it when that is over, and nothing else.
    async with serving(home, job_keep_days=1e-6) as client:
        deadline = time.monotonic() + 30
        while folder.exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert [c async for c in client.fine_tuning.jobs.checkpoints.list(job.id)] == []
        assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "succeeded"
        said = [e.message for e in await events_of(client, job.id)]
        assert sum(m.startswith("Run and data deleted") for m in said) == 1
        assert (await client.files.content(job.result_files[0])).content
        assert (home / "data" / "releases" / job.fine_tuned_model / "release.json").exists()


async def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run `finetune jobs` and return the JSON document it prints."""
    capsys.readouterr()
    assert await asyncio.to_thread(main, ["jobs", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class Killable:
    """A server in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    async def __aenter__(self) -> openai.AsyncOpenAI:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.finetune.jobs_server", str(self.home)),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.client = sdk(int(await asyncio.wait_for(self.process.stdout.readline(), 60)))
        return self.client

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()
        if self.process.returncode is None:
            self.process.terminate()
            await asyncio.wait_for(self.process.wait(), 20)


@pytest.mark.timeout(3 * WAIT_S)
async def test_paused_resumed_and_killed_with_its_server_a_job_ends_as_one_that_ran_through(home: Path) -> None:
    content = dialogues(60)
    first = Killable(home)
    async with first as client:
        job = await create(client, content, LONG)
        await stepped(client, job.id, 3)
        waiting = await create(client, content, {**LONG, "max_steps": 1})

        # One process at a time; a pause keeps what was computed, and lets the next one go.
        await until(client, waiting.id, lambda j: j.status == "queued")
        assert len(processes(home)) == 1
        assert str((await client.fine_tuning.jobs.pause(job.id)).status) == "paused"
        await until(client, waiting.id, lambda j: j.status == "running")
        assert (await client.fine_tuning.jobs.cancel(waiting.id)).status == "cancelled"
        n_made = max(int(p.name[5:]) for p in (home / "data" / "jobs" / job.id / "run" / "checkpoints").glob("step-*"))
        assert 3 <= n_made < N_STEPS
        assert str((await client.fine_tuning.jobs.retrieve(job.id)).status) == "paused"
        with pytest.raises(openai.BadRequestError, match="is paused and cannot be paused"):
            await client.fine_tuning.jobs.pause(job.id)
        assert (await client.fine_tuning.jobs.resume(job.id)).status == "queued"
        await stepped(client, job.id, 3)
        finish = (await client.fine_tuning.jobs.retrieve(job.id)).estimated_finish
        assert finish is not None
        assert finish > time.time() - 5

        # kill -9: its process goes with it; the next server finds the job and goes on.
        (child,) = processes(home)
        await first.kill()
        deadline = time.monotonic() + 10
        while processes(home):
            assert time.monotonic() < deadline, f"{child} outlived its server"
            await asyncio.sleep(0.05)
    async with Killable(home) as client:
        assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "running"
        cut = await ended(client, job.id)
        assert cut.status == "succeeded"
        said = [e.message for e in await events_of(client, job.id)]
        assert said.count("Fine-tuning job started") == 1
        assert said.count("Fine-tuning job goes on: training") == 2
        assert "Fine-tuning job paused" in said

        # One that ran through, with the same seed on the same file.
        again = await create(client, content, LONG)
        whole = await ended(client, again.id)
        files = [(await client.files.content(j.result_files[0])).content for j in (cut, whole)]
        assert files[0] == files[1]
        assert cut.fine_tuned_model == whole.fine_tuned_model  # it holds the checksum of the weights
        runs = [home / "data" / "jobs" / j.id / "run" for j in (cut, whole)]
        one, other = (load_file(run / "result" / "adapter_model.safetensors") for run in runs)
        assert set(one) == set(other)
        assert all((one[name] == other[name]).all() for name in one)
        assert [j.id async for j in client.fine_tuning.jobs.list(limit=1)] == [again.id, waiting.id, job.id]


async def test_a_bad_file_fails_its_job_with_every_line_and_trains_nothing(home: Path) -> None:
    bad = dialogues(20) + (
        b'\n{"messages": [{"role": "user", "content": "Hi"}, {"role": "bott", "content": "x"}]}\n'
        b"no json\n"
        b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}\n'
        b'{"messages": [{"role": "user", "content": "is it cut'
    )
    async with serving(home) as client:
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("training_file", {"training_file": await upload(client, bad)}),
            ("validation_file", {"validation_file": await upload(client, bad)}),
        ]
        for kind, given in wrong:
            job = await create(client, dialogues(20, seed=2), **given)
            job = await until(client, job.id, lambda j: j.status == "failed")
            assert (job.error.code, job.error.param) == (f"invalid_{kind}", kind)
            assert job.error.message.startswith(f"Invalid file format. {kind}, line 21, messages[1].role: unknown role")
            faults = [e for e in await events_of(client, job.id) if e.level == "error" and (e.data or {}).get("line")]
            assert [e.data["line"] for e in faults] == [21, 22, 23, 24]
            assert not any(str(home) in e.message for e in faults)
            assert job.fine_tuned_model is job.trained_tokens is None
            assert job.result_files == []
            left = sorted(p.name for p in (home / "data" / "jobs" / job.id).iterdir())
            assert not {"source", "data", "data.partial", "run"} & set(left)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="preferences need the extra `prefer`")
async def test_a_job_of_preferences_checks_its_pairs_and_masks_them(home: Path) -> None:
    def pair(n: int, worse: str) -> str:
        asked = {"messages": [{"role": "user", "content": f"how long does number {n} take to joe@example.org?"}]}
        sides = {"preferred_output": f"it takes {n} days.", "non_preferred_output": worse}
        said = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
        return json.dumps({"input": asked, **said})

    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}
    good = [pair(n, "no idea.") for n in range(30)]
    async with serving(home) as client:
        bad = await create(client, "\n".join([*good, pair(7, "it takes 7 days."), "{"]).encode(), method=method)
        bad = await until(client, bad.id, lambda j: j.status == "failed")
        assert (bad.error.code, bad.error.param) == ("invalid_training_file", "training_file")
        faults = [e for e in await events_of(client, bad.id) if e.level == "error" and (e.data or {}).get("line")]
        assert [e.data["line"] for e in faults] == [31, 32]
        assert not (home / "data" / "jobs" / bad.id / "source").exists()

        job = await create(client, "\n".join(good).encode(), method=method)
        assert job.method.dpo.hyperparameters.beta == 0.2
        assert job.zhanggui["config"]["objective"] == "dpo"
        await until(client, job.id, lambda j: j.status in ("queued", "running"))
        (facts,) = [e.data for e in await events_of(client, job.id) if "masked" in (e.data or {})]
        assert facts["masked"]["EMAIL"] == 30
        await client.fine_tuning.jobs.cancel(job.id)
        with pytest.raises(openai.BadRequestError, match="validation side from the training file"):
            await create(client, b"", method=method, training_file=job.training_file, validation_file=job.training_file)


async def test_a_validation_file_is_the_validation_side_and_no_copy_of_the_training(home: Path) -> None:
    async with serving(home) as client:
        same = await upload(client, dialogues(30))
        job = await create(client, b"", training_file=same, validation_file=same)
        job = await until(client, job.id, lambda j: j.status == "failed")
        assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")
        other = await create(client, dialogues(30), validation_file=await upload(client, dialogues(9, seed=3)))
        await until(client, other.id, lambda j: j.status in ("queued", "running"))
        (facts,) = [e.data for e in await events_of(client, other.id) if "masked" in (e.data or {})]
        assert (facts["read"], facts["valid"]) == (39, 9)
        assert facts["train"] + facts["test"] == 30
        # Cancelled while its process starts, it is over, and the process gone.
        assert (await client.fine_tuning.jobs.cancel(other.id)).status == "cancelled"
        deadline = time.monotonic() + 10
        while processes(home):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert (await client.fine_tuning.jobs.retrieve(other.id)).finished_at is not None


@pytest.mark.parametrize(
    ("settings", "code"), [({"job_memory_gb": 0.1}, "memory_limit"), ({"job_hours": 1e-4}, "time_limit")]
)
async def test_a_job_over_a_limit_fails_and_says_which(home: Path, settings: dict[str, Any], code: str) -> None:
    async with serving(home, **settings) as client:
        job = await create(client, dialogues(20))
        job = await until(client, job.id, lambda j: j.status == "failed")
        assert job.error.code == code
        assert processes(home) == []


async def test_a_process_that_dies_fails_its_job_and_the_next_one_runs(home: Path) -> None:
    async with serving(home) as client:
        job = await create(client, dialogues(20))
        while not (found := processes(home)):
            await asyncio.sleep(0.02)
        os.kill(found[0], signal.SIGKILL)
        job = await until(client, job.id, lambda j: j.status == "failed")
        assert job.error.code == "process_died"
        other = await create(client, dialogues(20))
        await until(client, other.id, lambda j: j.status in ("queued", "running"))
        await client.fine_tuning.jobs.cancel(other.id)


def test_a_queue_without_a_server_waits_and_says_where_it_looked(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(home / "data")
    assert main(["jobs", "list", "--data", data]) == 2
    assert "no jobs there" in capsys.readouterr().err
    open_queue(
        home / "data",
        releases=home / "data" / "releases",
        models=home / "cache" / "models",
        store=None,
        max_file_bytes=1,
        threads=1,
    )
    assert main(["jobs", "list", "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    for verb in ("show", "pause", "resume", "cancel", "events"):
        assert main(["jobs", verb, "ftjob-none", "--data", data]) == 2
        assert capsys.readouterr().err == "error: Could not find fine tune: ftjob-none\n"
    (tmp_path / "chats.jsonl").write_bytes(dialogues(2))
    refused = ["jobs", "create", str(tmp_path / "chats.jsonl"), "--model", "no-such-model", "--data", data]
    assert main(refused) == 2
    assert "The model 'no-such-model' does not exist" in capsys.readouterr().err
    assert list((home / "data" / "files").iterdir()) == []
    assert main(["jobs", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err
