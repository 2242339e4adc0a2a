"""
The process of one job: `python -m finetune.job_child FOLDER PARENT`. Runs the commands in FOLDER/job.json, one after the other.

Started by finetune/runner.py and by nobody else. The commands are those a merchant types; this file gives way to the server,
dies with it, and says on stdout, a JSON object a line, where it is: {"stage"}, {"done", "status", "message"}. What a command
prints goes to FOLDER/<stage>.json, a traceback to FOLDER/traceback.txt, everything else to stderr.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

NICE = 19  # visitors first: a job takes what is left
_PR_SET_PDEATHSIG = 1  # prctl(2)
_MESSAGE = re.compile(r"^(?:error|failed): (.+)$", re.M)


def main(folder: Path, parent: int) -> int:
    """Run the commands of `folder`; return the exit status of the first needed one that fails."""
    _follow(parent)
    _give_way()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # an earlier child that is still ending; the kernel frees it when it has
        plan = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        for command in plan["commands"]:
            stage = command["stage"]
            _say(stage=stage)
            status, message = _run(folder, stage, command)
            _say(done=stage, status=status, message=message)
            if status and command["needed"]:
                return status
            if status or (stage == "evaluate" and not _passed(folder)):
                break
        if (folder / "run" / "result.json").exists():
            from finetune.publish import result_name

            _say(model=result_name(folder / "run", plan["suffix"]))
        return 0


def _run(folder: Path, stage: str, command: dict[str, Any]) -> tuple[int, str]:
    """Return (exit status, what went wrong) of one command, run in this process."""
    from finetune.__main__ import main as run

    words = _Heard(sys.stderr)
    partial = folder / f".{stage}.json.partial"
    try:
        with (
            partial.open("w", encoding="utf-8") as out,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(words),
        ):
            if "preferences" in command:
                status = _check_preferences(command["preferences"])
            elif stage == "publish" and (done := _release(folder, command)).exists():
                # Published before it could be said, or by another job with the same weights: it is there.
                out.write(done.read_text(encoding="utf-8"))
                status = 0
            else:
                status = run(command["arguments"])
    except SystemExit as exc:  # argparse
        status = exc.code if isinstance(exc.code, int) else 1
    except MemoryError:
        return 1, "not enough memory"
    except Exception as exc:
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return 1, " ".join(f"{type(exc).__name__}: {exc}".split())[:500]
    partial.replace(folder / f"{stage}.json")
    return status, words.last()


def _release(folder: Path, command: dict[str, Any]) -> Path:
    """Return where the release.json of a job's result is, or will be."""
    from finetune.publish import result_name

    return Path(command["releases"]) / result_name(folder / "run", command["suffix"]) / "release.json"


def _check_preferences(config: dict[str, Any]) -> int:
    """Read a file of preferences as the training will, and print what `import` would of one of dialogues."""
    from bot.errors import MerchantError
    from finetune.config import RunConfig
    from finetune.importing import BadData
    from finetune.preferences import load_preferences

    try:
        found = load_preferences(RunConfig(**config))
    except MerchantError as exc:
        if isinstance(exc, BadData):
            sys.stdout.write(json.dumps(exc.report(), ensure_ascii=False))
        sys.stderr.write(f"error: {exc}\n")
        return 2
    splits = {name: {"n_dialogues": len(side)} for name, side in found.splits.items()}
    # As an import's report has them: the kinds of personal data bare, the reasons behind "left out: ".
    dropped = {name: n for name, n in found.counts.items() if name.startswith("left out")}
    masked = {name.removeprefix("masked: "): n for name, n in found.counts.items() if name.startswith("masked: ")}
    n = sum(len(side) for side in found.splits.values())
    report = {"n_read": n, "splits": splits, "dropped": dropped, "masked": masked}
    sys.stdout.write(json.dumps(report, ensure_ascii=False))
    return 0


def _passed(folder: Path) -> bool:
    return bool(json.loads((folder / "evaluate.json").read_text(encoding="utf-8"))["gate"]["passed"])


class _Heard(io.TextIOBase):
    """Stderr, and the last line on it that says what went wrong."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._tail = stream, ""

    def write(self, text: str) -> int:
        self._tail = (self._tail + text)[-8000:]
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def last(self) -> str:
        found = _MESSAGE.findall(self._tail)
        return found[-1].strip() if found else ""


def _say(**fields: Any) -> None:
    assert sys.__stdout__ is not None
    print(json.dumps(fields, ensure_ascii=False), file=sys.__stdout__, flush=True)


def _follow(parent: int) -> None:
    """Die when the server dies, however it does: a job that nobody watches has no limits."""
    with contextlib.suppress(OSError, AttributeError):  # Linux; elsewhere the thread below is a second later
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _give_way() -> None:
    """
    Let the server have processor and memory first: the lowest priority, and the first to go when memory is short.

    In a group of our own, so that Ctrl-C stops the server, which then stops us. Not in a session of our own: Linux
    weighs priorities within a session only (sched_autogroup), and the server's would then get no more than ours.
    """
    os.setpgid(0, 0)
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    with contextlib.suppress(OSError):  # Linux
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
