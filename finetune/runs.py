"""
A run's folder: its configuration, environment, events, curves and checkpoints. Knows no model.

    run.json         configuration, data, versions, machine: what is needed to run it again
    events.jsonl     every step and validation; tensorboard/ holds the same for TensorBoard
    curves.png       loss and learning rate
    mask_proof.txt   five examples, what is learned in brackets
    checkpoints/     step-N folders, each complete or absent
    best.safetensors the trained weights of the best validation
    result/          what publishing takes: an adapter, or a whole model
    result.json      how it ended
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bot.errors import MerchantError
from finetune.config import RunConfig

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "zhanggui")


def load_wandb() -> Any:
    """
    Return the module, which nothing else here needs.

    Raises:
        MerchantError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise MerchantError("wandb is not installed: pip install wandb, or leave out --wandb") from None
    return wandb


def environment() -> dict[str, Any]:
    """Return versions, machine and commit: what a rerun must match to be equal to the bit."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": sys.version.split()[0],
        "packages": versions,
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": code_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def code_version() -> str | None:
    """Return the commit of the checkout, with "+" where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(root), *a], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for a in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "bot", "retrieval", "finetune"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0] + ("+" if run[1] else "")


def write_json(path: Path, document: Any) -> None:
    """Write a file whole or not at all."""
    _write(path, json.dumps(document, ensure_ascii=False, indent=1, default=str) + "\n")


def write_report(path: Path, document: Any, page: str) -> None:
    """Write `document` as the JSON file `path` and `page`, for people, as HTML beside it, each whole or not at all."""
    write_json(path, document)
    _write(path.with_suffix(".html"), page)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def draw_trials(path: Path, document: Mapping[str, Any]) -> None:
    """Draw the trials of a search.json: each one's validations, and the best of those that ended so far."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {"complete": "#2b5c9e", "pruned": "#c0a060", "failed": "#999999"}
    better = max if document["direction"] == "maximise" else min
    best: list[tuple[int, float]] = []
    for trial in document["trials"]:
        found = trial["validations"]
        left.plot(range(1, len(found) + 1), found, "o-", ms=3, lw=0.9, color=colours[trial["state"]])
        if found:
            right.plot([trial["number"]], [found[-1]], "o", color=colours[trial["state"]])
        if trial["state"] == "complete":
            value = trial["value"]
            best.append((trial["number"], better(value, best[-1][1]) if best else value))
    right.step([n for n, _ in best], [v for _, v in best], where="post", color="#c0392b", label="best so far")
    for axis, words in ((left, "validation"), (right, "trial")):
        axis.set_xlabel(words)
        axis.set_ylabel(document["objective"])
        axis.grid(alpha=0.3)
    right.legend()
    left.set_title("blue: complete, sand: pruned", fontsize=9)
    figure.savefig(path, dpi=110)


class RunFolder:
    """One run on disk. Events go to events.jsonl at once, so that a killed run shows how far it came."""

    def __init__(self, folder: Path, *, resume: bool, writes: bool = True) -> None:
        """
        Open `folder`; of several processes only one `writes`, and the events of the others are lost.

        Raises:
            MerchantError: the folder is in use and `resume` is not asked for, or there is nothing to resume.
        """
        self.folder = folder
        started = (folder / "run.json").exists()
        if started and not resume:
            raise MerchantError(f"--run {str(folder)!r} is there already: add --resume to go on, or name a new folder")
        if not started and folder.exists() and any(folder.iterdir()):
            raise MerchantError(f"--run {str(folder)!r} is not empty and no run: name a new folder")
        if resume and not started:
            raise MerchantError(f"--run {str(folder)!r}: nothing to resume there; leave out --resume")
        folder.mkdir(parents=True, exist_ok=True)
        self.writes = writes
        self._board: Any = None
        self._watcher: Any = None

    def watch(self, config: RunConfig) -> None:
        """
        Send the run's events to Weights & Biases too, where `config.wandb` names a project. A resumed run goes on there.

        Raises:
            MerchantError: wandb is not installed, or did not start.
        """  # noqa: E501
        if config.wandb is None or not self.writes:
            return
        wandb = load_wandb()
        key = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        try:
            self._watcher = wandb.init(
                project=config.wandb, name=self.folder.name, id=key, resume="allow", dir=str(self.folder),
                config=json.loads(config.model_dump_json()),
            )  # fmt: skip
        except Exception as exc:  # wandb's own errors, known only where it is installed
            raise MerchantError(f"wandb: {' '.join(str(exc).split())}; WANDB_MODE=offline needs no account") from None

    def write_json(self, name: str, document: Any) -> None:
        """Write a file whole or not at all."""
        if self.writes:
            write_json(self.folder / name, document)

    def read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def event(self, kind: str, **data: Any) -> None:
        if not self.writes:
            return
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": round(time.time(), 3), "kind": kind, **data}, ensure_ascii=False) + "\n")
        step = data.get("step")
        if step is not None:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard"))
            for name, value in data.items():
                if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
            if self._watcher is not None:
                self._watcher.log({f"{kind}/{k}": v for k, v in data.items() if k != "step"}, step=step)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind; of a step that was made twice, after a resume, the later one."""
        by_step: dict[Any, dict[str, Any]] = {}
        path = self.folder / "events.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the last line of a killed run
            if event.get("kind") == kind:
                by_step[event.get("step")] = event
        return [by_step[step] for step in sorted(by_step, key=lambda s: s or 0)]

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._watcher is not None:
            self._watcher.finish()
            self._watcher = None

    # Checkpoints

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        folders = (self.folder / "checkpoints").glob("step-*")
        return sorted((p for p in folders if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))

    def new_checkpoint(self, step: int) -> tuple[Path, Path]:
        """Return (folder to write into, its final name): rename when it is complete."""
        final = self.folder / "checkpoints" / f"step-{step}"
        partial = final.with_name(f"{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial, final

    def keep_checkpoints(self, n: int) -> None:
        for folder in self.checkpoints()[:-n]:
            shutil.rmtree(folder)

    def draw_curves(self) -> None:
        """Write curves.png: training and validation loss, learning rate."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure

        steps, evals = self.events("step"), self.events("valid")
        figure = Figure(figsize=(9, 6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([e["step"] for e in steps], [e["loss"] for e in steps], lw=0.8, color="#8aa4c8", label="training")
        upper.plot([e["step"] for e in evals], [e["loss"] for e in evals], "o-", color="#c0392b", label="validation")
        upper.set_ylabel("loss a learned token")
        upper.legend()
        upper.grid(alpha=0.3)
        lower.plot([e["step"] for e in steps], [e["lr"] for e in steps], color="#555555")
        lower.set_ylabel("learning rate")
        lower.set_xlabel("step")
        lower.grid(alpha=0.3)
        figure.savefig(self.folder / "curves.png", dpi=110)
