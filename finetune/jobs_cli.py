"""
`python -m finetune jobs …`: the queue from a terminal, beside a server (`--data`) or through one (`--url`).

Beside a server it writes into the same database, which the server reads twice a second; jobs that nobody runs wait
there for the next one. Part of the command line's composition: knows settings, and which of the two ways is meant.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, cast

from bot.errors import BadRequest, BotError, MerchantError
from bot.settings import Settings, secret_of
from finetune.jobs import ENDED, JobQueue, open_queue

FOLLOW_EVERY_S = 1.0
Page = tuple[list[dict[str, Any]], bool]  # (objects, whether there are more)


class ServerRefused(BotError):
    """The server at `--url` did not do what was asked, or is not there; the sentence says why."""


class Jobs(Protocol):
    """What both ways can do; lists are newest first, with whether there are more."""

    def create(self, request: dict[str, Any]) -> dict[str, Any]: ...
    def upload(self, path: Path) -> str: ...
    def forget(self, file_id: str) -> None: ...
    def get(self, id_: str) -> dict[str, Any]: ...
    def list(self, *, after: str | None, limit: int) -> Page: ...
    def events(self, id_: str, *, after: str | None, limit: int) -> Page: ...
    def checkpoints(self, id_: str, *, after: str | None, limit: int) -> Page: ...
    def cancel(self, id_: str) -> dict[str, Any]: ...
    def pause(self, id_: str) -> dict[str, Any]: ...
    def resume(self, id_: str) -> dict[str, Any]: ...


class _Local(JobQueue):
    """The queue of a data folder."""

    def upload(self, path: Path) -> str:
        try:
            with path.open("rb") as file, self.files.upload() as upload:
                while data := file.read(1 << 20):
                    upload.write(data)
                return str(upload.finish(path.name, "fine-tune")["id"])
        except OSError as exc:
            raise MerchantError(f"{path}: {exc.strerror or exc}") from None

    def forget(self, file_id: str) -> None:
        self.files.delete(file_id)


class _Remote:
    """The queue of a running server."""

    def __init__(self, url: str, key: str | None) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise MerchantError(f"--url: {url!r}; write http://HOST:PORT")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._key = key

    def _call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Return the answer as JSON; `body` is bytes, or an iterable of them with its Content-Length in `headers`."""
        named = {
            name.replace("_", "-"): value for name, value in {"Content_Type": "application/json", **headers}.items()
        }
        request = urllib.request.Request(f"{self._base}{path}", body, named, method=method)  # noqa: S310
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
                return json.loads(response.read())
        except urllib.error.HTTPError as exc:
            try:
                error = json.loads(exc.read())["error"]
            except (ValueError, KeyError, TypeError):
                raise ServerRefused(f"{self._base} answered with status {exc.code}") from None
            if exc.code in (400, 404, 409, 413):
                raise BadRequest(error["message"], param=error.get("param"), code=error.get("code")) from None
            raise ServerRefused(f"{self._base}: {error['message']}") from None
        except (OSError, ValueError) as exc:
            raise ServerRefused(f"{self._base} does not answer ({getattr(exc, 'reason', exc)})") from None

    def _page(self, path: str, after: str | None, limit: int) -> Page:
        query = urllib.parse.urlencode({"limit": limit, **({"after": after} if after else {})})
        page = self._call("GET", f"{path}?{query}")
        return page["data"], page["has_more"]

    def upload(self, path: Path) -> str:
        try:
            size = path.stat().st_size
            file = path.open("rb")
        except OSError as exc:
            raise MerchantError(f"{path}: {exc.strerror or exc}") from None
        boundary = uuid.uuid4().hex
        name = path.name.replace('"', "'")
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        )
        pieces = (head.encode(), f"\r\n--{boundary}--\r\n".encode())
        headers = {
            "Content_Type": f"multipart/form-data; boundary={boundary}",
            "Content_Length": str(size + sum(map(len, pieces))),
        }
        with file:
            body = itertools.chain(pieces[:1], iter(lambda: file.read(1 << 20), b""), pieces[1:])
            return str(self._call("POST", "/files", body, **headers)["id"])

    def forget(self, file_id: str) -> None:
        self._call("DELETE", f"/files/{urllib.parse.quote(file_id, safe='')}")

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        return cast(dict[str, Any], self._call("POST", "/fine_tuning/jobs", json.dumps(request).encode()))

    def get(self, id_: str) -> dict[str, Any]:
        return cast(dict[str, Any], self._call("GET", f"/fine_tuning/jobs/{urllib.parse.quote(id_, safe='')}"))

    def list(self, *, after: str | None, limit: int) -> Page:
        return self._page("/fine_tuning/jobs", after, limit)

    def events(self, id_: str, *, after: str | None, limit: int) -> Page:
        return self._page(f"/fine_tuning/jobs/{urllib.parse.quote(id_, safe='')}/events", after, limit)

    def checkpoints(self, id_: str, *, after: str | None, limit: int) -> Page:
        return self._page(f"/fine_tuning/jobs/{urllib.parse.quote(id_, safe='')}/checkpoints", after, limit)

    def cancel(self, id_: str) -> dict[str, Any]:
        return self._do(id_, "cancel")

    def pause(self, id_: str) -> dict[str, Any]:
        return self._do(id_, "pause")

    def resume(self, id_: str) -> dict[str, Any]:
        return self._do(id_, "resume")

    def _do(self, id_: str, verb: str) -> dict[str, Any]:
        path = f"/fine_tuning/jobs/{urllib.parse.quote(id_, safe='')}/{verb}"
        return cast(dict[str, Any], self._call("POST", path, b""))


def _jobs(options: argparse.Namespace) -> Jobs:
    settings = Settings() if options.data is None else Settings(data=options.data)
    if options.url is not None:
        return _Remote(options.url, options.key or secret_of(settings.api_key))
    if options.do != "create" and not (settings.data_dir() / "fine_tuning.sqlite3").exists():
        raise MerchantError(f"{settings.data_dir()}: no jobs there; name the server's folder with --data, or its --url")
    queue = open_queue(
        settings.data_dir(),
        releases=settings.releases_dir(),
        models=settings.cache_dir() / "models",
        store=getattr(options, "store", None) or settings.store,
        max_file_bytes=settings.upload_mb * 2**20,
        threads=settings.job_threads,
        kind=_Local,
    )
    return cast(Jobs, queue)


def _all(page: Callable[..., Page], limit: int) -> Iterator[dict[str, Any]]:
    """Yield the newest `limit` of a list, page by page; 0: all of it."""
    after, n = None, 0
    while True:
        found, more = page(after=after, limit=min(100, limit - n) if limit else 100)
        yield from found
        n += len(found)
        if not more or (limit and n >= limit):
            return
        after = found[-1]["id"]


# --- Commands --------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    jobs = _jobs(options)
    try:
        found = _COMMANDS[options.do](jobs, options)
    except BadRequest as exc:
        raise MerchantError(str(exc)) from None
    if found is not None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        print(json.dumps(found, ensure_ascii=False, indent=1) if options.json else _text(options.do, found))
    return 0


def _create(jobs: Jobs, options: argparse.Namespace) -> Any:
    request: dict[str, Any] = {"model": options.model, "zhanggui": {"publish": options.publish}}
    given = {"n_epochs": options.epochs, "learning_rate_multiplier": options.lr_multiplier}
    request["hyperparameters"] = {name: value for name, value in given.items() if value is not None}
    request |= {name: v for name in ("suffix", "seed") if (v := getattr(options, name)) is not None}
    sent = {"training_file": options.file, "validation_file": options.validation_file}
    try:
        for name, path in sent.items():
            if path is not None:
                request[name] = jobs.upload(path)
        return jobs.create(request)
    except BotError:
        for name in sent.keys() & request.keys():
            jobs.forget(request[name])  # customers' words that no job wants
        raise


def _show(jobs: Jobs, options: argparse.Namespace) -> Any:
    job = jobs.get(options.id)
    return {**job, "checkpoints": list(_all(lambda **page: jobs.checkpoints(options.id, **page), 0))}


def _events(jobs: Jobs, options: argparse.Namespace) -> Any:
    newest_first = list(_all(lambda **page: jobs.events(options.id, **page), options.limit))
    if not options.follow:
        return newest_first
    for event in reversed(newest_first):
        _tell(event, options.json)
    last = newest_first[0]["id"] if newest_first else None
    while True:
        ended = jobs.get(options.id)["status"] in ENDED  # looked at before the events, of which none comes after
        fresh = []
        for event in _all(lambda **page: jobs.events(options.id, **page), 0):
            if event["id"] == last:
                break
            fresh.append(event)
        for event in reversed(fresh):
            _tell(event, options.json)
        last = fresh[0]["id"] if fresh else last
        if ended:
            return None
        time.sleep(FOLLOW_EVERY_S)


def _tell(event: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(event, ensure_ascii=False) if as_json else _event_line(event), flush=True)


_COMMANDS: dict[str, Callable[[Jobs, argparse.Namespace], Any]] = {
    "list": lambda jobs, options: list(_all(jobs.list, options.limit)),
    "show": _show,
    "create": _create,
    "cancel": lambda jobs, options: jobs.cancel(options.id),
    "pause": lambda jobs, options: jobs.pause(options.id),
    "resume": lambda jobs, options: jobs.resume(options.id),
    "events": _events,
}


def _text(command: str, found: Any) -> str:
    if command == "list":
        return "\n".join(_job_line(job) for job in found) or "none"
    if command == "events":
        return "\n".join(_event_line(event) for event in reversed(found)) or "none"
    lines = [
        f"{k}: {v}"
        for k, v in found.items()
        if k not in ("object", "checkpoints", "zhanggui") and v not in (None, [], {})
    ]
    lines += [f"zhanggui.{k}: {v}" for k, v in found["zhanggui"].items() if v is not None]
    steps = [f"checkpoint: step {c['step_number']}, {c['metrics']}" for c in found.get("checkpoints", ())]
    return "\n".join([*lines, *steps])


def _job_line(job: dict[str, Any]) -> str:
    about = job["fine_tuned_model"] or (job["error"] or {}).get("message") or ""
    return f"{job['id']}  {_at(job['created_at'])}  {job['status']:<16}  {job['model']}  {about}".rstrip()


def _event_line(event: dict[str, Any]) -> str:
    level = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{_at(event['created_at'])}  {level}{event['message']}"


def _at(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


# --- Arguments -------------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Add `jobs` and its commands to the subparsers of `python -m finetune`."""
    jobs = commands.add_parser(
        "jobs", help="the queue of fine-tuning jobs: list, show, create, cancel, pause, resume, events"
    )
    jobs.set_defaults(run=_run)
    do = jobs.add_subparsers(dest="do", required=True, metavar="list|show|create|cancel|pause|resume|events")
    helps = {
        "list": "the jobs, newest first",
        "show": "one job, and its checkpoints",
        "create": "upload a file and queue a job",
        "cancel": "end a job for good",
        "pause": "stop a job; a checkpoint is kept",
        "resume": "let a paused job go on",
        "events": "what a job has said",
    }
    for name, help_ in helps.items():
        c = do.add_parser(name, help=help_)
        if name not in ("list", "create"):
            c.add_argument("id", metavar="ID")
        where = c.add_mutually_exclusive_group()
        where.add_argument("--data", type=Path, metavar="DIR", help="the server's data folder (var/)")
        where.add_argument("--url", metavar="URL", help="a running server, for instance http://127.0.0.1:8000")
        c.add_argument("--key", metavar="KEY", help="the server's ZHANGGUI_API_KEY; by default that of the environment")
        c.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
        if name in ("list", "events"):
            c.add_argument("--limit", type=_count, default=0 if name == "events" else 20, metavar="N")
        if name == "events":
            c.add_argument("--follow", action="store_true", help="until the job ends; with --json an event a line")
        if name == "create":
            c.add_argument("file", type=Path, metavar="FILE", help="dialogues, as for `import`")
            c.add_argument(
                "--model", required=True, metavar="NAME", help="catalog name, release or folder in the cache"
            )
            c.add_argument("--validation-file", type=Path, metavar="FILE")
            c.add_argument("--epochs", type=_count, metavar="N")
            c.add_argument("--lr-multiplier", type=float, metavar="X", help="times the method's usual learning rate")
            c.add_argument("--suffix", metavar="TEXT", help="a word of your own in the model's name")
            c.add_argument("--seed", type=int, metavar="N")
            c.add_argument("--publish", action="store_true", help="publish the result if it passes the gate")
            c.add_argument(
                "--store", type=Path, metavar="DIR", help="with --data: the store, where the settings name none"
            )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value
