"""
OpenAI's `/v1/files` and `/v1/fine_tuning/jobs` over HTTP, so that the official SDK works unchanged.

Knows requests, OpenAI's shapes and pages; files and jobs are behind two protocols, which `serve.py` fills with those of
`finetune`. Nothing here trains, and nothing is held in memory that a client sends. What ours has beside OpenAI's is in
the field `zhanggui` of requests and jobs. docs/jobs.md is the long form.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from bot.errors import BadRequest, BotError, ClientError, TooLong
from bot.forms import read_form

logger = logging.getLogger(__name__)

T = TypeVar("T")
Page = tuple[Sequence[dict[str, Any]], bool]  # (objects, whether there are more)
Fresh = tuple[Sequence[dict[str, Any]], int, bool]  # (events, the place behind them, whether no more will come)

MAX_BODY_BYTES = 256 * 1024  # of a job's request
MAX_FORM_BYTES = 1 << 20  # of a form besides its file
STREAM_EVERY_S = 0.5
STREAM_PING_S = 15.0


class Upload(Protocol):
    """A file that is coming in."""

    def write(self, data: bytes) -> None:
        """Append; raises TooLong over the limit."""
        ...

    def finish(self, filename: str, purpose: str, expires_after_s: int | None = None) -> dict[str, Any]:
        """Return the file object."""
        ...


class Files(Protocol):
    """Uploaded files by id. Methods block on the disk; BadRequest where there is no such file."""

    max_bytes: int

    def upload(self) -> AbstractContextManager[Upload]: ...
    def get(self, id_: str) -> dict[str, Any]: ...
    def path(self, id_: str) -> Path: ...
    def list(self, *, purpose: str | None, after: str | None, limit: int, newest_first: bool) -> Page: ...
    def delete(self, id_: str) -> None: ...


class Jobs(Protocol):
    """Fine-tuning jobs by id, lists newest first. Methods block on the disk; BadRequest where a job cannot do that."""

    def create(self, request: Mapping[str, Any]) -> dict[str, Any]: ...
    def get(self, id_: str) -> dict[str, Any]: ...
    def list(self, *, after: str | None, limit: int, metadata: Mapping[str, str] | None) -> Page: ...
    def events(self, id_: str, *, after: str | None, limit: int) -> Page: ...
    def events_since(self, id_: str, n: int) -> Fresh:
        """Return (events behind the place `n`, oldest first, the new place, whether no more will come)."""
        ...

    def checkpoints(self, id_: str, *, after: str | None, limit: int) -> Page: ...
    def cancel(self, id_: str) -> dict[str, Any]: ...
    def pause(self, id_: str) -> dict[str, Any]: ...
    def resume(self, id_: str) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class FineTuning:
    """What the endpoints stand on."""

    files: Files
    jobs: Jobs
    check_purpose: Callable[[str | None], str]  # raises BadRequest
    check_expiry: Callable[[str | None, str | None], int | None]  # (anchor, seconds) -> seconds; raises BadRequest
    figures: Callable[[], dict[str, float]]  # jobs by status, for /metrics


# --- What a client may send ------------------------------------------------------------------------------------------


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore")


_Whole = Annotated[int, Field(strict=True, ge=1, le=1000)]
_Positive = Annotated[float, Field(gt=0, le=1000)]


class Hyperparameters(_Model):
    n_epochs: Literal["auto"] | _Whole | None = None
    batch_size: Literal["auto"] | _Whole | None = None
    learning_rate_multiplier: Literal["auto"] | _Positive | None = None


class DpoHyperparameters(Hyperparameters):
    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=10)] | None = None


class Supervised(_Model):
    hyperparameters: Hyperparameters | None = None


class Dpo(_Model):
    hyperparameters: DpoHyperparameters | None = None


class Method(_Model):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None


class Wandb(_Model):
    project: str = Field(min_length=1, max_length=128)
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(_Model):
    type: Literal["wandb"]
    wandb: Wandb


class Ours(BaseModel):
    """Beside OpenAI's fields; sent with the SDK's `extra_body`."""

    model_config = ConfigDict(extra="forbid")

    publish: bool | None = Field(None, description="Publish the result if it passes the gate.")
    store: bool | None = Field(None, description="Put the store's passages into the prompts, as in serving (true).")
    config: dict[str, Any] | None = Field(None, description="Knobs of the run, as docs/finetune.md has them.")
    samples: int | None = Field(None, ge=0, le=1000, description="Replies the evaluation generates.")


class JobRequest(_Model):
    model: str = Field(min_length=1, max_length=200)
    training_file: str = Field(max_length=200)
    validation_file: str | None = Field(None, max_length=200)
    suffix: str | None = None
    seed: int | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[Integration] | None = Field(None, max_length=5)
    metadata: dict[str, str] | None = None
    zhanggui: Ours | None = None


def _body_schema(path: str, kind: str, schema: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return `openapi_extra` of a body that is parsed by hand: FastAPI's own 422 is not OpenAI's error shape."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/{kind.replace('/', '~1')}/schema"
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema(f"{place}/$defs/{{model}}")}}}}


_JOB_BODY = _body_schema(
    "/v1/fine_tuning/jobs", "application/json", lambda ref: JobRequest.model_json_schema(ref_template=ref)
)
_FILE_BODY = _body_schema(
    "/v1/files",
    "multipart/form-data",
    lambda ref: {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "description": "`fine-tune` for a job's files."},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
        },
    },
)

# --- Routes ----------------------------------------------------------------------------------------------------------


def fine_tuning_routes(parts: FineTuning, *, own_origin: Callable[[Request], bool]) -> APIRouter:
    """
    Return the routes. Whoever gets here may use them: the key is `bot.access`'s affair.

    Args:
        own_origin: whether a request comes from a page of this server, or from no page. Without a key this machine's
            requests pass, and so would a form that some page in its browser sends.
    """
    router = APIRouter(prefix="/v1")
    files, jobs = parts.files, parts.jobs

    async def answered(request: Request, work: Callable[[], Awaitable[T]]) -> T | Response:
        """Return what `work` does, or its refusal in OpenAI's error shape."""
        try:
            if not own_origin(request):
                raise BadRequest("not from a page of another origin", code="forbidden", status=403)
            return await work()
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as exc:
            # What the client still sends is read and dropped by uvicorn: it hears why, and nothing is held.
            return _refusal(exc)

    def by(call: Callable[[], T]) -> Callable[[], Awaitable[T]]:
        return lambda: asyncio.to_thread(call)

    # Files

    @router.post("/files", tags=["Files"], response_model=None, openapi_extra=_FILE_BODY)
    async def create_file(request: Request) -> dict[str, Any] | Response:
        """Upload a file; it goes to the disk as it comes."""
        return await answered(request, lambda: _receive(request, parts))

    @router.get("/files", tags=["Files"], response_model=None)
    async def list_files(
        request: Request, purpose: str | None = None, after: str | None = None, limit: str | None = None,
        order: str | None = None,
    ) -> dict[str, Any] | Response:  # fmt: skip
        """List the files; newest first, or with `order=asc` oldest first."""

        async def work() -> dict[str, Any]:
            if order not in (None, "asc", "desc"):
                raise BadRequest("order: 'asc' or 'desc'", param="order")
            n, newest_first = _limit(limit, 10_000, 10_000), order != "asc"
            return _page(
                *await asyncio.to_thread(
                    files.list, purpose=purpose, after=after or None, limit=n, newest_first=newest_first
                )
            )

        return await answered(request, work)

    @router.get("/files/{file_id}", tags=["Files"], response_model=None)
    async def retrieve_file(request: Request, file_id: str) -> dict[str, Any] | Response:
        """Return what is known of a file."""
        return await answered(request, by(lambda: files.get(file_id)))

    @router.delete("/files/{file_id}", tags=["Files"], response_model=None)
    async def delete_file(request: Request, file_id: str) -> dict[str, Any] | Response:
        """Delete a file and its bytes. A job that has begun with it goes on."""

        async def work() -> dict[str, Any]:
            await asyncio.to_thread(files.delete, file_id)
            return {"id": file_id, "object": "file", "deleted": True}

        return await answered(request, work)

    @router.get("/files/{file_id}/content", tags=["Files"], response_model=None, response_class=Response)
    async def file_content(request: Request, file_id: str) -> Response:
        """Return a file's bytes."""

        async def work() -> Response:
            file = await asyncio.to_thread(files.get, file_id)
            path = await asyncio.to_thread(files.path, file_id)
            headers = {
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file['filename'], safe='')}",
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
            }
            return FileResponse(path, headers=headers, media_type="application/octet-stream")

        return await answered(request, work)

    # Jobs

    @router.post("/fine_tuning/jobs", tags=["Fine-tuning"], response_model=None, openapi_extra=_JOB_BODY)
    async def create_job(request: Request) -> dict[str, Any] | Response:
        """Queue a job. Its files are checked after that: see its events."""

        async def work() -> dict[str, Any]:
            body = _parse_job(await _read_body(request))
            return await asyncio.to_thread(jobs.create, body.model_dump(exclude_none=True))

        return await answered(request, work)

    @router.get("/fine_tuning/jobs", tags=["Fine-tuning"], response_model=None)
    async def list_jobs(
        request: Request, after: str | None = None, limit: str | None = None
    ) -> dict[str, Any] | Response:
        """List the jobs, newest first; `metadata[k]=v` keeps those with that pair."""

        async def work() -> dict[str, Any]:
            wanted = {
                key[len("metadata[") : -1]: value
                for key, value in request.query_params.multi_items()
                if key.startswith("metadata[") and key.endswith("]")
            }
            n = _limit(limit, 20, 100)
            return _page(*await asyncio.to_thread(jobs.list, after=after or None, limit=n, metadata=wanted or None))

        return await answered(request, work)

    @router.get("/fine_tuning/jobs/{job_id}", tags=["Fine-tuning"], response_model=None)
    async def retrieve_job(request: Request, job_id: str) -> dict[str, Any] | Response:
        """Return a job."""
        return await answered(request, by(lambda: jobs.get(job_id)))

    @router.get("/fine_tuning/jobs/{job_id}/events", tags=["Fine-tuning"], response_model=None)
    async def list_events(
        request: Request, job_id: str, after: str | None = None, limit: str | None = None,
        stream: Annotated[bool, Query(description="Server-sent events, oldest first, until the job ends.")] = False,
    ) -> dict[str, Any] | Response:  # fmt: skip
        """List what a job has said, newest first."""

        async def work() -> dict[str, Any] | Response:
            if not stream:
                n = _limit(limit, 20, 100)
                return _page(*await asyncio.to_thread(jobs.events, job_id, after=after or None, limit=n))
            await asyncio.to_thread(jobs.get, job_id)  # a 404 before the stream begins
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would collect the stream
            return StreamingResponse(_stream(jobs, job_id), media_type="text/event-stream", headers=headers)

        return await answered(request, work)

    @router.get("/fine_tuning/jobs/{job_id}/checkpoints", tags=["Fine-tuning"], response_model=None)
    async def list_checkpoints(
        request: Request, job_id: str, after: str | None = None, limit: str | None = None
    ) -> dict[str, Any] | Response:
        """List the checkpoints a job has kept, newest first."""

        async def work() -> dict[str, Any]:
            n = _limit(limit, 10, 100)
            return _page(*await asyncio.to_thread(jobs.checkpoints, job_id, after=after or None, limit=n))

        return await answered(request, work)

    @router.post("/fine_tuning/jobs/{job_id}/cancel", tags=["Fine-tuning"], response_model=None)
    async def cancel_job(request: Request, job_id: str) -> dict[str, Any] | Response:
        """End a job for good."""
        return await answered(request, by(lambda: jobs.cancel(job_id)))

    @router.post("/fine_tuning/jobs/{job_id}/pause", tags=["Fine-tuning"], response_model=None)
    async def pause_job(request: Request, job_id: str) -> dict[str, Any] | Response:
        """Stop a job after the step under way; a checkpoint is kept."""
        return await answered(request, by(lambda: jobs.pause(job_id)))

    @router.post("/fine_tuning/jobs/{job_id}/resume", tags=["Fine-tuning"], response_model=None)
    async def resume_job(request: Request, job_id: str) -> dict[str, Any] | Response:
        """Let a paused job go on from its checkpoint."""
        return await answered(request, by(lambda: jobs.resume(job_id)))

    return router


async def _receive(request: Request, parts: FineTuning) -> dict[str, Any]:
    """Take one upload to the disk and return its object."""
    most = parts.files.max_bytes
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most + MAX_FORM_BYTES:
        raise TooLong("file", int(length), most, "bytes")  # before a byte of it is read

    async def body() -> AsyncIterator[bytes]:
        n = 0
        async for piece in request.stream():
            n += len(piece)
            if n > most + MAX_FORM_BYTES:
                raise TooLong("file", n, most, "bytes")
            yield piece

    with parts.files.upload() as upload:
        fields, filename = await read_form(body(), request.headers.get("content-type", ""), upload)
        purpose = parts.check_purpose(fields.get("purpose"))
        expires = parts.check_expiry(fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]"))
        if filename is None:
            raise BadRequest("'file' is a required property", param="file", code="missing_required_parameter")
        return await asyncio.to_thread(upload.finish, filename, purpose, expires)


async def _stream(jobs: Jobs, id_: str) -> AsyncIterator[str]:
    """Yield a job's events as they come, from its first one to its last."""
    place, ended, quiet_s = 0, False, 0.0
    while not ended:
        found, place, ended = await asyncio.to_thread(jobs.events_since, id_, place)
        for event in found:
            yield f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
        quiet_s = 0.0 if found else quiet_s + STREAM_EVERY_S
        if quiet_s >= STREAM_PING_S:
            quiet_s = 0.0
            yield ": \n\n"  # tells proxies that somebody is there
        if not ended and not found:
            await asyncio.sleep(STREAM_EVERY_S)
    yield "data: [DONE]\n\n"


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise TooLong("body", len(body), MAX_BODY_BYTES, "bytes")
    return bytes(body)


def _parse_job(body: bytes) -> JobRequest:
    try:
        return JobRequest.model_validate_json(body)
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_input=False, include_context=False)
        # Of a union ("auto" or a number) every branch fails: the last one says what a number must be.
        error = errors[-1] if all(e["loc"][:-1] == errors[0]["loc"][:-1] for e in errors) else errors[0]
        where = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("literal[", "constrained-")))
        where = where.removesuffix(".int").removesuffix(".float") or "body"
        missing = error["type"] == "missing"
        message = f"Missing required parameter: '{where}'." if missing else f"{where}: {error['msg']}"
        raise BadRequest(message, param=where, code="missing_required_parameter" if missing else None) from None


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise BadRequest(f"limit: a number from 1 to {most}", param="limit")
    return int(text)


def _page(objects: Sequence[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {}
    return {"object": "list", "data": objects, "has_more": more, **ends}


def _refusal(exc: Exception) -> Response:
    """Return OpenAI's error object; of our own faults only the code is told, the log has the rest."""
    if isinstance(exc, ClientError):
        status = exc.status if isinstance(exc, BadRequest) else 413 if isinstance(exc, TooLong) else 400
        param = exc.param if isinstance(exc, BadRequest) else exc.field if isinstance(exc, TooLong) else None
        error = {"message": str(exc), "type": "invalid_request_error", "param": param, "code": exc.code}
        return JSONResponse({"error": error}, status)
    logger.error("files and jobs", exc_info=exc)
    full = isinstance(exc, OSError) and exc.errno in (28, 122)  # ENOSPC, EDQUOT
    message = "the server's disk is full" if full else "an internal error; the server's log has it"
    code = exc.code if isinstance(exc, BotError) else "insufficient_storage" if full else "internal"
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return JSONResponse({"error": error}, 507 if full else 500)
