"""
Case files through servers' sockets: the only place where facts and refusals are what a visitor would get.

Knows `serve.py` and `python -m bot eval` as commands, and pairs their results case by case. Knows no model and no torch. Every
contestant answers with the direct path off, unless asked otherwise, since a quoted FAQ says nothing of the model.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bot.errors import BotError, MerchantError
from finetune.metrics import Interval, paired_difference, paired_ratio

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("n", "passed", "fact_accuracy", "refusal_accuracy", "by_language", "ttft_ms_p50", "e2e_ms_p50", "release")
START_TIMEOUT_S = 900.0  # an index of a large store, and a model from disk
# What of this process's environment would make a server write elsewhere, or answer by other rules than its contestants.
_NOT_HANDED_ON = tuple(
    f"ZHANGGUI_{name}"
    for name in ("DATABASE_URL", "HOST", "PORT", "STORE", "ENGINE", "MODEL", "DATA", "DIRECT", "API_KEY")
)


class ServerFailed(BotError):
    """A server that was started for the cases did not come up or fell over; its last words are in the sentence."""

    def __init__(self, what: str, words: str) -> None:
        super().__init__(what, words)
        self.what, self.words = what, words

    def __str__(self) -> str:
        return f"the server of {self.what}: {self.words}"


@dataclass(frozen=True)
class CaseFile:
    """Cases, and the store they are about. `label` is unique among the files of an evaluation."""

    label: str
    path: Path
    store: Path | None  # None: the demo store


def parse_case_files(items: Sequence[str], store: Path | None) -> list[CaseFile]:
    """
    Return the files of `--cases FILE[:STORE]`; `store` is that of those which name none. A file's label is its stem.

    Raises:
        MerchantError: no such file or store folder, or two files of one name.
    """
    found: list[CaseFile] = []
    for item in items:
        path, its_store = Path(item), store
        if not path.exists():
            file, colon, folder = item.rpartition(":")
            if not colon or not Path(file).exists():
                raise MerchantError(f"--cases: no file {item!r}; write FILE, or FILE:STORE for cases of another store")
            path, its_store = Path(file), Path(folder)
            if not (its_store / "store.toml").is_file():
                raise MerchantError(f"--cases: {folder!r} is no store folder (it has no store.toml)")
        if any(c.label == path.stem for c in found):
            raise MerchantError(
                f"--cases: two files are called {path.stem!r}; the gate knows them by name, so rename one"
            )
        found.append(CaseFile(path.stem, path, its_store))
    return found


def parse_urls(items: Sequence[str], labels: Sequence[str]) -> dict[tuple[str, str], str]:
    """
    Return the servers of `--url WHO[@LABEL]=ws://…` by (contestant, label); without a label it is the first file's.

    Raises:
        MerchantError: an unknown contestant or label, or no ws:// address.
    """
    found = {}
    for item in items:
        name, equals, url = item.partition("=")
        who, at, label = name.partition("@")
        if not equals or who not in ("candidate", "base", "current") or not url.startswith(("ws://", "wss://")):
            raise MerchantError(f"--url: {item!r}; write candidate=ws://HOST:PORT/ws, base=… or current=…")
        if not labels:
            raise MerchantError(f"--url: {item!r} is for cases; name them with --cases")
        if at and label not in labels:
            raise MerchantError(
                f"--url: {item!r}: no file of --cases is called {label!r}; there are {', '.join(labels)}"
            )
        found[who, label or labels[0]] = url
    return found


def run_cases(what: str, file: CaseFile, url: str, *, direct: bool, concurrency: int) -> dict[str, Any]:
    """
    Return {"figures", "cases": {id: verdict}} of the server at `url`.

    Raises:
        MerchantError: the cases cannot be read, or the server quotes where it should generate.
        ServerFailed: it cannot be reached, or no case got a reply.
    """
    command = [sys.executable, "-m", "bot", "eval", "--url", url, "--cases", str(file.path.resolve())]
    command += ["--concurrency", str(concurrency), "--json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    if ran.returncode:
        words = (ran.stderr.strip().splitlines() or ["the cases could not be run"])[-1]
        if ran.returncode == 2:
            raise MerchantError(words.removeprefix("error: "))
        raise ServerFailed(what, words)
    report = json.loads(ran.stdout)
    verdicts = {v["id"]: v for v in report["cases"]}
    if len(verdicts) != len(report["cases"]):
        raise MerchantError(f"{file.path}: an id stands there twice; results are compared by id")
    errors = [v for v in report["cases"] if v["outcome"] == "error"]
    if len(errors) == len(report["cases"]):
        raise ServerFailed(what, f"no case got a reply; the first: {errors[0]['text'][:200]}")
    quoted = [v for v in report["cases"] if v["outcome"] == "direct" and v["n_facts"]]
    if quoted and not direct:
        raise MerchantError(
            f"{what} at {url} quotes approved answers (case {quoted[0]['id']!r}), which says nothing of its model: "
            "start that server with --direct off, or measure the whole bot with --direct on"
        )
    figures = {name: report.get(name) for name in FIGURES} | {"n_errors": len(errors)}
    silent = [v for v in report["cases"] if v["expect"] == "no_answer"]
    # Of those to refuse the ones that no guard catches: whether the model itself knows that it does not know.
    figures["no_answer_accuracy"] = round(sum(v["outcome_right"] for v in silent) / len(silent), 4) if silent else None
    return {"figures": figures, "cases": verdicts}


def compare_cases(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return how much better `new` is than `old`, both of `run_cases`, paired by case, with 95% intervals.

    {"fact_gain", "refusal_gain", "by_language": {lang: {"fact_gain", …}}}; a gain of nothing to measure is left out.
    The gain's mean is the difference of the two accuracies: facts are pooled, cases resampled.
    """
    pairs = [(v, old["cases"][i]) for i, v in new["cases"].items() if i in old["cases"]]

    def gains(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
        found: dict[str, Interval] = {}
        facts = [(a, b) for a, b in pairs if a["expect"] == "answer" and a["n_facts"]]
        if facts:
            found["fact_gain"] = paired_ratio([(a["n_found"] - b["n_found"], a["n_facts"]) for a, b in facts])
        refusals = [(a, b) for a, b in pairs if a["expect"] != "answer"]
        if refusals:
            right = ([float(p[n]["outcome_right"]) for p in refusals] for n in (0, 1))
            found["refusal_gain"] = paired_difference(*right)
        return {name: asdict(interval) for name, interval in found.items()}

    languages = sorted({a["lang"] for a, _ in pairs})
    return gains(pairs) | {
        "by_language": {lang: gains([p for p in pairs if p[0]["lang"] == lang]) for lang in languages}
    }


def report_cases(file: CaseFile, results: Mapping[str, Mapping[str, Any]], *, direct: bool, concurrency: int) -> Any:
    """Return what eval.json says of one file: each contestant's figures, the candidate against the others, samples."""
    against = {}
    for name, result in results.items():
        if name != "candidate" and "candidate" in results:
            against[name] = compare_cases(results["candidate"], result)
    first = next(iter(results.values()))
    samples = []
    for id_, verdict in first["cases"].items():
        said = {
            n: {k: r["cases"][id_][k] for k in ("text", "outcome", "passed", "n_found")} for n, r in results.items()
        }
        kept = {k: verdict[k] for k in ("id", "lang", "question", "expect", "n_facts")}
        samples.append(kept | {"said": said})
    return {
        "file": str(file.path),
        "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest(),
        "store": str(file.store) if file.store else "the demo store",
        "direct": direct,
        "concurrency": concurrency,
        "contestants": {name: result["figures"] for name, result in results.items()},
        "against": against,
        "samples": samples,
    }


@contextmanager
def served(what: str, model: Path, store: Path | None, folder: Path, *, direct: bool) -> Iterator[str]:
    """
    Run serve.py with `model` until the block ends; yield its ws:// address once it is ready. It writes into `folder`.

    Raises:
        ServerFailed: it did not come up.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve.py"), "--port", str(port), "--data", str((folder / "var").resolve())]
    command += ["--engine", "vllm", "--model", str(model.resolve()), "--direct", "on" if direct else "off"]
    command += ["--store", str(store.resolve())] if store else []
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
    path = folder / "server.log"
    with path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=kept)
        try:
            _wait_ready(what, f"http://127.0.0.1:{port}/readyz", process, path)
            yield f"ws://127.0.0.1:{port}/ws"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(what: str, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with opener.open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError) as exc:
            # A model that cannot be loaded leaves the server up: it says so, and will not mend itself.
            said = exc.read().decode(errors="replace") if isinstance(exc, urllib.error.HTTPError) else ""
            given_up = '"stopped"' in said
            if given_up or process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                wrong = [line for line in lines if "ERROR" in line or line.startswith("error:")]
                raise ServerFailed(what, (wrong or lines or [said or "no word"])[-1][:500]) from None
            time.sleep(0.5)
