"""Files and the refusals of `/v1/files` and `/v1/fine_tuning/jobs`, by OpenAI's own SDK over a real socket. No training."""  # noqa: E501

from __future__ import annotations

import asyncio
import importlib.util
import resource
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bot.errors import BadRequest
from bot.forms import read_form
from tests.finetune.jobs_server import fine_tuning_of
from tests.running import Running, running_server

ROOT = Path(__file__).resolve().parents[2]
LINE = b'{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello!"}]}\n'


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "log.db", fine_tuning=fine_tuning_of(tmp_path, upload_mb=1)) as running:
        yield running


@pytest.fixture
async def client(server: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0) as found:
        yield found


def error_of(exc: openai.APIStatusError) -> dict[str, Any]:
    """Return OpenAI's error object, which has exactly its four fields."""
    error = exc.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not any(place in error["message"] for place in (tempfile.gettempdir(), str(ROOT)))  # no path of this machine
    return dict(error)


# --- Files -----------------------------------------------------------------------------------------------------------


async def test_a_file_comes_back_as_it_was_sent_and_is_gone_when_deleted(
    client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    content = LINE + "您好，在吗？\r\n--boundary--\r\n".encode() + bytes(range(256)) * 700
    file = await client.files.create(file=("十月.jsonl", content), purpose="fine-tune")
    assert file.id.startswith("file-")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(content), "十月.jsonl", "fine-tune")
    assert file.status == "processed"
    assert abs(file.created_at - time.time()) < 60
    assert await client.files.retrieve(file.id) == file
    assert (await client.files.wait_for_processing(file.id)).id == file.id
    assert (await client.files.content(file.id)).content == content

    stored = tmp_path / "data" / "files" / file.id
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert stat.S_IMODE(stored.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "data" / "fine_tuning.sqlite3").stat().st_mode) == 0o600
    deleted = await client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    assert not stored.exists()
    with pytest.raises(openai.NotFoundError) as caught:
        await client.files.retrieve(file.id)
    assert error_of(caught.value)["message"] == f"No such File object: {file.id}"


async def test_files_are_listed_by_purpose_page_and_order(client: openai.AsyncOpenAI) -> None:
    made = [(await client.files.create(file=(f"{n}.jsonl", LINE), purpose="fine-tune")).id for n in range(5)]
    other = await client.files.create(file=("notes.txt", b"notes"), purpose="assistants")
    assert [f.id async for f in client.files.list(purpose="fine-tune")] == made[::-1]
    assert [f.id async for f in client.files.list(purpose="fine-tune", order="asc", limit=2)] == made  # three pages
    page = await client.files.list(limit=2)
    assert [f.id for f in page.data] == [other.id, made[4]]
    assert page.has_more
    assert [f.id for f in (await client.files.list(after=made[1])).data] == [made[0]]
    cases: list[dict[str, Any]] = [{"limit": 0}, {"limit": 10_001}, {"after": "file-none"}, {"order": "up"}]
    for wrong in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.files.list(**wrong)
        assert error_of(caught.value)["param"] == next(iter(wrong))


@pytest.mark.parametrize("purpose", ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"])
async def test_every_purpose_the_sdk_knows_is_taken(client: openai.AsyncOpenAI, purpose: Any) -> None:
    assert (await client.files.create(file=b"x", purpose=purpose)).purpose == purpose


async def test_an_upload_without_a_purpose_a_file_or_a_form_is_refused(
    client: openai.AsyncOpenAI, server: Running, tmp_path: Path
) -> None:
    for purpose in ("fine-tune-results", "training", ""):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.files.create(file=b"x", purpose=purpose)  # type: ignore[arg-type]
        assert error_of(caught.value)["param"] == "purpose"
    url = f"{server.http_url}/v1/files"
    two = [("file", ("a", b"a")), ("file", ("b", b"b"))]
    cut = {"content": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
           "headers": {"Content-Type": "multipart/form-data; boundary=x"}}  # fmt: skip
    async with httpx.AsyncClient() as http:
        wrong: list[dict[str, Any]] = [{"files": {"purpose": (None, "fine-tune")}}, {"json": {}}, {"files": two}, cut]
        for sent in wrong:
            answer = await http.post(url, **sent)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "file"
    assert list((tmp_path / "data" / "files").iterdir()) == []


async def test_a_file_expires_when_it_was_said_to(
    client: openai.AsyncOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await client.files.create(
        file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError):
        await client.files.create(file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 59})
    monkeypatch.setattr("finetune.files.time.time", lambda: file.created_at + 3600.5)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)
    assert [f.id async for f in client.files.list()] == []
    assert list((tmp_path / "data" / "files").iterdir()) == []


async def test_names_of_files_are_only_names(client: openai.AsyncOpenAI) -> None:
    for sent, kept in (("../../etc/passwd", "passwd"), ("C:\\chats\\十月.csv", "十月.csv"), ("a" * 400, "a" * 200)):
        assert (await client.files.create(file=(sent, b"x"), purpose="user_data")).filename == kept
    with pytest.raises(openai.NotFoundError):
        await client.files.content("..%2F..%2Ffine_tuning.sqlite3")


async def test_a_file_over_the_limit_is_refused_while_it_comes(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    assert (await client.files.create(file=b"x" * 2**20, purpose="user_data")).bytes == 2**20
    with pytest.raises(openai.APIStatusError) as caught:
        await client.files.create(file=b"x" * (2**20 + 1), purpose="user_data")
    assert caught.value.status_code == 413
    assert error_of(caught.value)["code"] == "too_long"
    assert len(list((tmp_path / "data" / "files").iterdir())) == 1


async def test_six_hundred_megabytes_are_refused_before_they_come(tmp_path: Path) -> None:
    async with running_server(tmp_path / "log.db", fine_tuning=fine_tuning_of(tmp_path)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        size = len(head) + 600 * 2**20
        writer.write(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (size, head)
        )
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 20)  # and nothing more was sent
        assert answer.startswith(b"HTTP/1.1 413 ")
        writer.close()
        await writer.wait_closed()
    assert list((tmp_path / "data" / "files").iterdir()) == []


async def test_what_comes_in_pieces_without_an_end_is_refused_and_not_held(server: Running, tmp_path: Path) -> None:
    piece = b"x" * 2**20

    async def body() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        for _ in range(200):
            yield piece

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with httpx.AsyncClient(timeout=50) as http:
        answer = await http.post(f"{server.http_url}/v1/files", content=body(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_long"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB, client and server
    assert list((tmp_path / "data" / "files").iterdir()) == []


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_a_form_is_read_alike_however_it_is_cut_into_pieces(size: int) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\nContent-Type: text/x\r\n\r\n'
        b"one\r\n--bo\r\n-two\r\n--b--\r\n"
    )

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(form), size):
            yield form[at : at + size]

    class Sink:
        def __init__(self) -> None:
            self.data = b""

        def write(self, data: bytes) -> None:
            self.data += data

    sink = Sink()
    assert await read_form(pieces(), "multipart/form-data; boundary=b", sink) == ({"purpose": "fine-tune"}, "a.jsonl")
    assert sink.data == b"one\r\n--bo\r\n-two"
    with pytest.raises(BadRequest, match="multipart"):
        await read_form(pieces(), "text/plain", sink)


# --- Who may ---------------------------------------------------------------------------------------------------------


async def test_without_the_key_nothing_is_answered(tmp_path: Path) -> None:
    async with running_server(tmp_path / "log.db", api_key="secret", fine_tuning=fine_tuning_of(tmp_path)) as server:
        url = f"{server.http_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger:
            for call in (
                stranger.files.create(file=b"x", purpose="fine-tune"),
                stranger.files.retrieve("file-1"),
                stranger.files.content("file-1"),
                stranger.fine_tuning.jobs.create(model="m", training_file="file-1"),
                stranger.fine_tuning.jobs.cancel("ftjob-1"),
            ):
                with pytest.raises(openai.AuthenticationError) as caught:
                    await call
                assert error_of(caught.value)["code"] == "invalid_api_key"
        async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as merchant:
            assert (await merchant.files.list()).data == []
            assert (await merchant.fine_tuning.jobs.list()).data == []
    assert list((tmp_path / "data" / "files").iterdir()) == []


async def test_a_page_of_another_origin_cannot_use_the_open_door_of_this_machine(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.http_url) as http:
        form: Any = {"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}}
        for origin, status in (("http://evil.example", 403), ("null", 403), (server.http_url, 200)):
            answer = await http.post("/v1/files", headers={"Origin": origin}, **form)
            assert answer.status_code == status
        refused = await http.post("/v1/fine_tuning/jobs", headers={"Origin": "http://evil.example"}, json={})
        assert refused.status_code == 403


# --- Jobs that cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="without the extra `train` every job is refused")
async def test_a_request_that_cannot_be_is_refused_by_the_field_at_fault(client: openai.AsyncOpenAI) -> None:
    file = (await client.files.create(file=("a.jsonl", LINE), purpose="fine-tune")).id
    notes = (await client.files.create(file=("a.txt", LINE), purpose="assistants")).id
    empty = (await client.files.create(file=("a.jsonl", b""), purpose="fine-tune")).id
    good: dict[str, Any] = {"model": "qwen2.5-coder-0.5b-instruct", "training_file": file}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "gpt-4o-mini"}, "model"),
        ({"model": "../../etc"}, "model"),
        ({"model": "/etc"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"training_file": notes}, "training_file"),
        ({"training_file": empty}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 1.5}}, "hyperparameters.batch_size"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb"),
        ({"extra_body": {"zhanggui": {"config": {"rank": 9999}}}}, "zhanggui.config.rank"),
        ({"extra_body": {"zhanggui": {"config": {"no_such_knob": 1}}}}, "zhanggui.config.no_such_knob"),
        ({"extra_body": {"zhanggui": {"config": {"base": "/etc"}}}}, "zhanggui.config.base"),
        ({"extra_body": {"zhanggui": {"publsh": True}}}, "zhanggui.publsh"),
        ({"extra_body": {"zhanggui": {"config": {"method": "prefix"}, "publish": True}}}, "zhanggui.config.method"),
    ]
    for wrong, param in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.fine_tuning.jobs.create(**{**good, **wrong})
        assert error_of(caught.value)["param"] == param, wrong
    assert (await client.fine_tuning.jobs.list()).data == []
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/fine_tuning/jobs", cast_to=object, body={"model": "x"})
    assert error_of(caught.value)["message"] == "Missing required parameter: 'training_file'."
    for call in (client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause,
                 client.fine_tuning.jobs.resume):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as missing:
            await call("ftjob-none")
        assert error_of(missing.value)["code"] == "fine_tune_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.fine_tuning.jobs.list_events("ftjob-none")


async def test_without_the_extra_files_work_and_a_job_says_what_to_install(
    client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.jobs.NEEDED", ("torch", "no_such_package_here"))
    file = await client.files.create(file=("a.jsonl", LINE), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.fine_tuning.jobs.create(model="qwen2.5-coder-0.5b-instruct", training_file=file.id)
    error = error_of(caught.value)
    assert error["code"] == "training_not_installed"
    assert "pip install 'zhanggui[train]'" in error["message"]


async def test_the_routes_are_described(server: Running) -> None:
    async with httpx.AsyncClient() as http:
        document = (await http.get(f"{server.http_url}/openapi.json")).json()
        figures = (await http.get(f"{server.http_url}/metrics")).text
    paths = document["paths"]
    assert set(paths["/v1/files"]) == {"get", "post"}
    assert set(paths["/v1/files/{file_id}"]) == {"get", "delete"}
    jobs = "/v1/fine_tuning/jobs"
    assert {p.removeprefix(jobs) for p in paths if p.startswith(jobs)} == {
        "", "/{job_id}", "/{job_id}/cancel", "/{job_id}/pause", "/{job_id}/resume", "/{job_id}/events",
        "/{job_id}/checkpoints",
    }  # fmt: skip
    body = paths[jobs]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "training_file"} == set(body["required"])
    assert "file" in paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert "zhanggui_jobs_running 0.0" in figures


async def test_a_slow_disk_or_a_broken_one_does_not_stop_the_server(
    client: openai.AsyncOpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.files.os.fsync", full)
    with pytest.raises(openai.APIStatusError) as caught:
        await client.files.create(file=b"x", purpose="fine-tune")
    assert caught.value.status_code == 507
    assert error_of(caught.value)["code"] == "insufficient_storage"
    monkeypatch.undo()
    files = await asyncio.gather(*(client.files.create(file=b"x" * n, purpose="fine-tune") for n in range(1, 21)))
    assert sorted(f.bytes for f in files) == list(range(1, 21))
