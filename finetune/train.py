"""
`train`: one run, from data to trained weights. The order of everything is fixed by the seed.

A run that was interrupted and resumed ends with the same bits as one that was not, and so does a rerun, on the same CPU
with the same number of threads, processes and library versions. Knows tokens, steps and files; what is learned is in
finetune/objectives.py, what a row or a method is in finetune/modeling.py, several processes in finetune/parallel.py. An
interrupt is answered after the step under way, with a checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bot.catalog import load_catalog, resolve_model
from bot.errors import BotError, MerchantError
from bot.messages import Message
from bot.prompt import PROMPT_VERSION, PromptStore
from finetune.adversarial import Disturbance
from finetune.classifier import SETTINGS, Classification, class_example
from finetune.config import NOT_OF_THE_RESULT, RunConfig
from finetune.data import Data, load_data
from finetune.examples import (
    Example,
    ExampleTooLong,
    Row,
    TemplateUnusable,
    label_conversation,
    mask_proof,
    plan_epoch,
    share_prefixes,
)
from finetune.grounding import NO_STORE, Conversation, Search, conversations
from finetune.heap import Heap, keep_freed_memory
from finetune.labelled import Texts, load_texts, read_texts, write_texts
from finetune.methods import check_servable
from finetune.modeling import HfTokenizer, adapt, load_base, orthogonality, save_result, trainable
from finetune.objectives import LanguageModel, Objective
from finetune.parallel import Ranks, deal, device_of, like, shard, sync_on, whole
from finetune.runs import RunFolder, environment

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


class Interrupted(BotError):
    """The run was asked to stop; a checkpoint is written, `--resume` goes on."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step

    def __str__(self) -> str:
        return f"interrupted after step {self.step}; the same command with --resume goes on from there"


class LossNotFinite(BotError):
    """The loss is no number any more: the weights are lost since; the last checkpoint is not."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step

    def __str__(self) -> str:
        return f"the loss at step {self.step} is not a finite number: lower lr, then train anew"


@dataclass
class Progress:
    """Where a run is; all of it goes into a checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    n_tokens: int = 0
    n_learned: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    n_bad: int = 0
    stopped: str = ""
    evals: list[dict[str, float]] = field(default_factory=list)


def train(
    config: RunConfig,
    folder: Path,
    *,
    search: Search | None = None,
    store: PromptStore | None = None,
    resume: bool = False,
    dry_run: bool = False,
    publishable: bool = False,
    report: Report = lambda event: None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """
    Train as `config` says into `folder` and return result.json; with `dry_run` only the estimate, and nothing is kept.

    Every one of several processes calls it with its `ranks`; the first alone writes and reports, the others return {}.
    What `report` raises ends the run.

    Raises:
        MerchantError: the configuration, the data or the folder cannot be used.
        Interrupted: SIGINT or SIGTERM came; the folder can be resumed.
        LossNotFinite: training diverged.
    """
    # 1) Everything that can be refused, before anything heavy.
    method = check_servable(config, must_serve=publishable)
    ranks = ranks or Ranks(device=device_of(config))
    if not ranks.writes:
        ranks.wait()  # the first makes the folder, and what it is trained on
    data = load_texts(config) if config.task == "classify" else load_data(config.data)
    run = RunFolder(folder, resume=resume or not ranks.writes, writes=ranks.writes)
    try:
        if resume:
            check_same(run, config, data.sha256)
        base_name = config.base or load_catalog().default_name
        base = resolve_model(base_name)
        torch.set_num_threads(config.threads or max(1, cores() // ranks.size))
        keep_freed_memory()
        seed_all(config.seed)
        tokenizer = HfTokenizer(base, chat=config.task != "classify")

        # 2) Examples, rendered as in serving; kept in the run, so that a resumed one needs no index.
        counts: Counter[str] = Counter()
        objective: Objective
        if isinstance(data, Texts):
            objective, proof = _classification(run, data, config, tokenizer, counts)
        else:
            objective, proof = _language_model(run, data, config, tokenizer, search, store or NO_STORE, counts)
        if not objective.lengths["train"]:
            raise MerchantError(f"no example is left to train on: {dict(counts)}")
        n_steps = _n_steps(config, objective.lengths["train"])
        if not resume and ranks.writes:
            run.write_json(
                "run.json",
                run_head(config, data.sha256, base_name, base, tokenizer, counts, objective.lengths, n_steps)
                | {"data_lineage": data.lineage if isinstance(data, Data) else None},
            )
            (folder / "mask_proof.txt").write_text(proof, encoding="utf-8")
        if ranks.writes:
            ranks.wait()
        if not dry_run:
            run.watch(config)

        # 3) The model, and what the run will cost.
        labels = data.labels if isinstance(data, Texts) else ()
        model = adapt(load_base(base, config, labels), config, n_steps, base_name)
        model = shard(model, config, ranks) if config.fsdp else model.to(ranks.device)
        if ranks.rank:
            torch.manual_seed(config.seed + ranks.rank)  # equal weights, and dropout of its own
        trainer = _Trainer(config, run, model, objective, n_steps, report if ranks.writes else _say_nothing, ranks)
        estimate = trainer.estimate()
        trainer.report({"kind": "estimate", **estimate})
        if dry_run:
            ranks.wait()  # the folder goes with the first of them
            return estimate
        if not resume:
            run.write_json("estimate.json", estimate)

        # 4) Train; then the best weights, not the last ones, are the result.
        if resume:
            trainer.load_checkpoint()
        with interrupts() as stop:
            trainer.run_to_end(stop)
        trainer.load_best()
        state = {name: whole(p) for name, p in model.state_dict().items()} if config.fsdp else None
        if not ranks.writes:
            return {}
        shutil.rmtree(folder / "result", ignore_errors=True)
        saved = save_result(model, tokenizer, config, folder / "result", state)
        if labels:
            run.write_json(
                f"result/{SETTINGS}", {"labels": labels, "pool": config.pool, "max_tokens": config.max_tokens}
            )
        result = {
            **trainer.summary(),
            **saved,
            "task": config.task,
            "method": method.name,
            "serve": {"cuda": method.cuda, "cpu": method.cpu, "how": method.how},
            "sha256": folder_hash(folder / "result"),
            "estimate": run.read_json("estimate.json"),
        }
        run.write_json("result.json", result)
        run.draw_curves()
        return result
    finally:
        run.close()
        if dry_run and not resume and ranks.writes:
            shutil.rmtree(folder, ignore_errors=True)


def _say_nothing(event: dict[str, Any]) -> None:
    return None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_same(run: RunFolder, config: RunConfig, data_sha256: str) -> None:
    head = run.read_json("run.json")
    asked = json.loads(config.model_dump_json())
    # A run of an older version has not got the newer knobs: it was made as their defaults say.
    began = json.loads(RunConfig(**head["config"]).model_dump_json())
    for name in asked.keys() - NOT_OF_THE_RESULT:
        if began[name] != asked[name]:
            raise MerchantError(
                f"--resume: {name} was {began[name]!r} and is {asked[name]!r}; a run keeps its configuration"
            )
    if head["data_sha256"] != data_sha256:
        raise MerchantError(f"--resume: {str(config.data)!r} is other data than the run began with")


def run_head(
    config: RunConfig, data_sha256: str, base_name: str, base: Path, tokenizer: HfTokenizer, counts: Counter[str],
    lengths: Mapping[str, Sequence[int]], n_steps: int,
) -> dict[str, Any]:  # fmt: skip
    template = hashlib.sha256(str(tokenizer.inner.chat_template).encode()).hexdigest()
    return {
        "config": json.loads(config.model_dump_json()),
        "command": sys.argv,
        "data_sha256": data_sha256,
        "base": base_name,
        "base_sha256": _weights_hash(base),
        "prompt_version": PROMPT_VERSION,
        "chat_template_sha256": template,
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "counts": dict(counts),
        "n_examples": {split: len(found) for split, found in lengths.items()},
        "n_steps": n_steps,
        "start_from_sha256": folder_hash(config.start_from) if config.start_from else None,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _weights_hash(base: Path) -> str:
    """Name the base by its files' names and sizes: hashing gigabytes at every start would take longer than a short run."""  # noqa: E501
    files = sorted((p.name, p.stat().st_size) for p in base.glob("*.safetensors"))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def folder_hash(folder: Path) -> str:
    """Return the checksum of a result: of its weights and configurations, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _language_model(
    run: RunFolder, data: Data, config: RunConfig, tokenizer: HfTokenizer, search: Search | None, store: PromptStore,
    counts: Counter[str],
) -> tuple[Objective, str]:  # fmt: skip
    """Return what is learned of dialogues, and the text that shows it."""
    examples = {
        split: _examples(run, split, data, config, tokenizer, search, store, counts) for split in ("train", "valid")
    }
    proof = mask_proof(examples["train"], tokenizer.decode)
    return LanguageModel(config, examples, int(tokenizer.inner.pad_token_id or 0)), proof


def _classification(
    run: RunFolder, data: Texts, config: RunConfig, tokenizer: HfTokenizer, counts: Counter[str]
) -> tuple[Objective, str]:
    """Return what is learned of labelled texts, and the first of them as the model reads them."""
    counts.update(data.counts)
    examples: dict[str, list[Example]] = {}
    for split, texts in data.splits.items():
        path = run.folder / f"texts-{split}.jsonl"
        if not path.exists():
            write_texts(path, texts)
        kept = read_texts(path)
        counts[split] = len(kept)
        if split != "test":
            examples[split] = [
                class_example(t.text, data.labels.index(t.label), tokenizer, config.max_tokens) for t in kept
            ]
    shown = zip(examples["train"], data.splits["train"], strict=True)
    proof = "".join(f"{tokenizer.decode(e.input_ids)} ⟦{t.label}⟧\n" for e, t in itertools.islice(shown, 5))
    return Classification(config, examples, data.labels, int(tokenizer.inner.pad_token_id or 0)), proof


def _examples(
    run: RunFolder, split: str, data: Data, config: RunConfig, tokenizer: HfTokenizer, search: Search | None,
    store: PromptStore, counts: Counter[str],
) -> list[Example]:  # fmt: skip
    path = run.folder / f"conversations-{split}.jsonl"
    if not path.exists() and data.rendered:
        shutil.copyfile(data.folder / f"{split}.jsonl", path)
    elif not path.exists():
        write_conversations(path, split, data, config, tokenizer, search, store, counts)
    examples: list[Example] = []
    for conversation in read_conversations(path):
        try:
            examples += label_conversation(conversation.messages, conversation.learn, tokenizer, config.max_tokens)
        except ExampleTooLong:
            counts[f"left out of {split}: longer than max_tokens"] += 1
        except TemplateUnusable as exc:
            raise MerchantError(f"base {config.base!r}: {exc}") from None
    examples = [e for e in examples if e.n_learned]
    return share_prefixes(examples, config.row_tokens) if config.shared_prefixes and config.packs else examples


def write_conversations(
    path: Path, split: str, data: Data, config: RunConfig, tokenizer: HfTokenizer, search: Search | None,
    store: PromptStore, counts: Counter[str],
) -> None:  # fmt: skip
    """Render a side of the data into a run's file, whole or not at all. Unanswerable questions are made for training only."""  # noqa: E501
    found = conversations(
        data.splits[split], store, search, n_passages=config.n_passages,
        unanswerable=config.unanswerable if split == "train" else 0.0, ungrounded=config.ungrounded, seed=config.seed,
        count_tokens=tokenizer.count, max_prompt_tokens=config.max_tokens * 3 // 4, counts=counts,
    )  # fmt: skip
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for c in found:
            messages = [[m.role, m.content] for m in c.messages]
            file.write(json.dumps({"kind": c.kind, "learn": c.learn, "messages": messages}, ensure_ascii=False) + "\n")
    partial.replace(path)


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Yield what a run was trained on, as it is kept in the run's folder."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            raw = json.loads(line)
            yield Conversation(tuple(Message(r, c) for r, c in raw["messages"]), tuple(raw["learn"]), raw["kind"])


def _plan(config: RunConfig, lengths: Sequence[int], epoch: int) -> list[list[Row]]:
    return plan_epoch(
        lengths, row_tokens=config.row_tokens, batch_tokens=config.batch_tokens, packing=config.packs,
        seed=config.seed, epoch=epoch, batch_examples=config.batch_examples,
    )  # fmt: skip


def _n_steps(config: RunConfig, lengths: Sequence[int]) -> int:
    whole, part = int(config.epochs), config.epochs - int(config.epochs)
    n = sum(len(_plan(config, lengths, e)) for e in range(min(whole, 3)))
    if whole > 3:  # epochs differ by a step at most; planning a hundred to know would be idle
        n += (whole - 3) * len(_plan(config, lengths, 2))
    n += math.ceil(part * len(_plan(config, lengths, whole)))
    return max(1, min(n, config.max_steps) if config.max_steps else n)


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a set event; a second one kills as usual. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for s in before:
        signal.signal(s, ask)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class _Trainer:
    """The loop, with everything that changes while it turns."""

    def __init__(
        self, config: RunConfig, run: RunFolder, model: Any, objective: Objective, n_steps: int, report: Report,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self.config, self.run, self.model, self.n_steps, self.report = config, run, model, n_steps, report
        self.objective, self.ranks = objective, ranks
        self.lengths = objective.lengths["train"]
        self.parameters = trainable(model)
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
        )
        self.progress = Progress()
        self.last: tuple[float, int] = (math.inf, 0)  # loss and targets of the last step
        self.disturbance = Disturbance(model.get_input_embeddings()) if config.adversarial != "none" else None
        valid_lengths = objective.lengths["valid"]
        self.valid_rows = [r for step in _plan(config, valid_lengths, 0) for r in step] if valid_lengths else []
        per_epoch = len(_plan(config, self.lengths, 0))
        self.eval_every = config.eval_every or max(1, per_epoch // 4)
        self.heap = Heap()

    # Before the first step

    def estimate(self) -> dict[str, Any]:
        """Return tokens, steps, time and memory of the run, from three real rows; leaves no trace in the run's state."""  # noqa: E501
        state = torch.get_rng_state()
        self.model.train()
        plan = _plan(self.config, self.lengths, 0)
        rows = list(itertools.islice(itertools.chain.from_iterable(plan), 3))
        tokens, seconds = 0, 0.0
        for n, row in enumerate(rows):
            began = time.perf_counter()
            inputs = self._inputs("train", row)
            self._backward(inputs, 1.0)
            if n or len(rows) == 1:  # the first one also warms caches and picks kernels
                tokens += inputs.n_tokens
                seconds += time.perf_counter() - began
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(state)
        per_epoch = sum(self.lengths)
        # A frozen trunk reads each text once, whatever the epochs; the head behind it costs next to nothing.
        n_epochs = 1.0 if self.objective.reads_once else self.n_steps / max(1, len(plan))
        n_tokens = int(per_epoch * n_epochs)
        n_trained = sum(p.numel() for p in self.parameters.values())
        n_valid = sum(self.objective.lengths["valid"])
        n_evals = 3 if self.objective.reads_once else self.n_steps // self.eval_every + 1
        # A validation pass has no backward pass, about a third of the work.
        speed = tokens / seconds * self.ranks.size if seconds else 0.0
        return {
            "n_examples": len(self.lengths),
            "n_tokens_per_epoch": per_epoch,
            "n_learned_per_epoch": sum(self.objective.n_learned["train"]),
            "n_steps": self.n_steps,
            "n_tokens": n_tokens,
            "tokens_per_s": round(speed, 1),
            "seconds": round((n_tokens + n_valid * n_evals / 3) / speed, 1) if speed else None,
            "n_trained_parameters": n_trained,
            "n_parameters": sum(p.numel() for p in self.model.parameters()),
            # Gradients and AdamW's two moments come on top of what the warm rows took, in float32.
            "memory_bytes": self._peak_memory() + 12 * n_trained // (self.ranks.size if self.config.fsdp else 1),
            "n_processes": self.ranks.size,
            "device": self.ranks.device.partition(":")[0],
            "row_fill": round(per_epoch / max(1, sum(self._row_size(r) for s in plan for r in s)), 3),
        }

    def _peak_memory(self) -> int:
        """Return bytes: of this process's GPU, else of the process."""
        if self.ranks.device != "cpu":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _row_size(self, row: Row, split: str = "train") -> int:
        """Tokens a row occupies, padding counted; a packed row has none."""
        sizes = [self.objective.lengths[split][n] for n in row]
        return sum(sizes) if self.config.packs else len(sizes) * max(sizes)

    def _own(self, rows: Sequence[Row], split: str) -> tuple[list[Row], int]:
        """
        Return this process's rows, and how many of them are its own: sharded weights are gathered in every process at
        once, so each must pass as many rows, and whoever has fewer passes one again that then counts for nothing.
        """
        dealt = deal(rows, [self._row_size(r, split) for r in rows], self.ranks.size)
        mine = dealt[self.ranks.rank]
        missing = max(map(len, dealt)) - len(mine) if self.config.fsdp else 0
        return [*mine, *[rows[0]] * missing], len(mine)

    # The loop

    def run_to_end(self, stop: threading.Event) -> None:
        p = self.progress
        if isinstance(self.objective, Classification) and self.objective.reads_once:
            began = time.perf_counter()
            self.objective.read_all(self.model, self.ranks.device, self._reading)
            p.seconds += time.perf_counter() - began
        while p.step < self.n_steps and not p.stopped:
            plan = _plan(self.config, self.lengths, p.epoch)
            while p.step_in_epoch < len(plan) and p.step < self.n_steps and not p.stopped:
                self._step(plan[p.step_in_epoch])
                p.step_in_epoch += 1
                if p.step % self.eval_every == 0 or p.step == self.n_steps:
                    self._validate()
                    self.save_checkpoint()
                if self.ranks.any(stop.is_set()) and p.step < self.n_steps and not p.stopped:
                    self.save_checkpoint()
                    self.ranks.wait()  # whoever ends first would end the one that writes
                    raise Interrupted(p.step)
            if p.step_in_epoch >= len(plan):
                p.epoch, p.step_in_epoch = p.epoch + 1, 0

    def _reading(self, n_done: int, n_all: int) -> None:
        self.report({"kind": "reading", "n_done": n_done, "n_all": n_all})

    def _step(self, rows: Sequence[Row]) -> None:
        p, config = self.progress, self.config
        began = time.perf_counter()
        self.model.train()
        own, n_own = self._own(rows, "train") if self.ranks.size > 1 else (rows, len(rows))
        inputs = [self._inputs("train", row) for row in own]
        n_learned = sum(self.objective.n_learned["train"][n] for row in rows for n in row)
        loss = 0.0
        for n, i in enumerate(inputs):
            if self.config.fsdp:
                sync_on(self.model, n == len(inputs) - 1)
            # Every learned token weighs the same, whatever row it is in and whichever process has it.
            part = self._backward(i, 1.0 / n_learned if n < n_own else 0.0)
            loss += part if n < n_own else 0.0
        self.ranks.add_gradients(self.parameters.values())
        if self.ranks.size > 1:
            loss = float(self.ranks.add(torch.tensor(loss, dtype=torch.float64)))
        if not math.isfinite(loss):
            raise LossNotFinite(p.step + 1)
        self.last = (loss, n_learned)
        if config.method == "adalora":
            penalty = orthogonality(self.model)
            if isinstance(penalty, torch.Tensor):
                penalty.backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), config.max_grad_norm))
        lr = config.learning_rate * self._scale(p.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        p.step += 1
        if config.method == "adalora":
            # Reads the gradients, so it stands between the step and their end. Nothing in transformers calls it.
            self.model.base_model.update_and_allocate(p.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.heap.trim()

        seconds = time.perf_counter() - began
        n_tokens = sum(self.lengths[n] for row in rows for n in row)
        p.seconds, p.n_tokens, p.n_learned = p.seconds + seconds, p.n_tokens + n_tokens, p.n_learned + n_learned
        event = {
            "step": p.step, "loss": round(loss, 6), "lr": lr, "grad_norm": round(float(norm), 4), "n_tokens": n_tokens,
            "n_learned": n_learned, "tokens_per_s": round(n_tokens / seconds, 1),
        }  # fmt: skip
        if config.method == "adalora":
            event["mean_rank"] = round(_mean_rank(self.model), 3)
        self.run.event("step", **event)
        eta = p.seconds / p.step * (self.n_steps - p.step)
        self.report({"kind": "step", "n_steps": self.n_steps, "eta_s": round(eta, 1), **event})

    def _inputs(self, split: str, row: Row) -> Any:
        return self.objective.inputs(split, row, self.ranks.device)

    def _backward(self, inputs: Any, weight: float) -> float:
        """Accumulate the gradient of a row's summed loss times `weight`; return that product, the clean one."""
        config = self.config
        # FSDP takes the mean over the processes of what it sums, and the weights here are of the whole step.
        factor = self.ranks.size if config.fsdp and config.method == "full" else 1

        def loss_of() -> torch.Tensor:
            return self.objective.loss(self.model, inputs) * (weight * factor)

        if self.disturbance is None:
            loss = loss_of()
            loss.backward()
            return float(loss.detach()) / factor
        if config.adversarial == "fgm":
            clean = self.disturbance.fgm(loss_of, inputs.segments, config.adversarial_eps)
        else:
            clean = self.disturbance.freelb(loss_of, inputs.segments, config.adversarial_eps, config.adversarial_steps)
        return float(clean) / factor

    def _scale(self, step: int) -> float:
        """Return the learning rate's factor for the step after `step` others: up, then down by the schedule."""
        n_warm = max(1, round(self.config.warmup * self.n_steps)) if self.config.warmup else 0
        if step < n_warm:
            return (step + 1) / n_warm
        done = (step - n_warm) / max(1, self.n_steps - n_warm)
        if self.config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if self.config.schedule == "linear" else 1.0

    def _validate(self) -> None:
        p, config = self.progress, self.config
        figures, n = self.validation()
        loss = figures["loss"]
        event = {"step": p.step, **{k: round(v, 6 if k == "loss" else 4) for k, v in figures.items()}, "n_learned": n}
        p.evals.append({"step": p.step, **figures})
        self.run.event("valid", **event)
        self.report({"kind": "valid", **event})
        if loss < p.best_loss - config.min_delta or p.best_step == 0:
            p.best_loss, p.best_step, p.n_bad = loss, p.step, 0
            self._save(self._state(), self.run.folder / "best.safetensors")
        else:
            p.n_bad += 1
            if config.patience and p.n_bad >= config.patience:
                p.stopped = f"no gain in {p.n_bad} validations"

    def validation(self) -> tuple[dict[str, float], int]:
        """Return the figures of the validation side and its number of targets; without one the training loss stands in."""  # noqa: E501
        if not self.valid_rows:
            return {"loss": self.last[0]}, self.last[1]
        self.model.eval()
        own, n_own = self._own(self.valid_rows, "valid") if self.ranks.size > 1 else (self.valid_rows, math.inf)
        sums: torch.Tensor | None = None
        with torch.no_grad():
            for n, row in enumerate(own):
                found = self.objective.sums(self.model, self._inputs("valid", row))
                found = found if n < n_own else torch.zeros_like(found)
                sums = found if sums is None else sums + found
        self.model.train()
        if self.ranks.size > 1:
            size = max(self.ranks.gather(0 if sums is None else len(sums)))  # one without a row knows no figures
            sums = self.ranks.add(torch.zeros(size, dtype=torch.float64) if sums is None else sums)
        assert sums is not None, "there are rows"
        return self.objective.figures(sums), int(sums[1])

    # State

    def _state(self) -> dict[str, torch.Tensor]:
        """Return the trained weights, whole; sharded ones are gathered, so every process has to ask."""
        return {name: whole(p) for name, p in self.parameters.items()}

    def _save(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        if self.ranks.writes:
            _save_tensors(tensors, path)

    def save_checkpoint(self) -> None:
        """
        Write all that a resumed run needs to go on with the same bits; every process has to call it, the first writes.

        Sharded weights and moments are written whole, so that a run can be resumed by another number of processes.
        """
        weights = self._state()
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            n: {name: whole(v) if isinstance(v, torch.Tensor) else v for name, v in of_one.items()}
            for n, of_one in optimizer["state"].items()
        }
        rngs = self.ranks.gather({"cpu": torch.get_rng_state(), **_cuda_rng(self.ranks.device)})
        if not self.ranks.writes:
            return
        partial, final = self.run.new_checkpoint(self.progress.step)
        if final.exists():
            shutil.rmtree(partial)
            return
        _save_tensors(weights, partial / "weights.safetensors")
        state: dict[str, Any] = {"optimizer": optimizer, "rngs": rngs}
        if self.config.method == "adalora":
            allocator = self.model.base_model.rankallocator
            state["allocator"] = {k: dict(getattr(allocator, k)) for k in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
            state["rank_pattern"] = self.model.peft_config["default"].rank_pattern
        torch.save(state, partial / "state.pt")
        document = json.dumps(asdict(self.progress))
        (partial / "progress.json").write_text(document, encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(final)
        self.run.keep_checkpoints(self.config.keep_checkpoints)

    def load_checkpoint(self) -> None:
        """Go on from the newest checkpoint; from the beginning where there is none yet."""
        found = self.run.checkpoints()
        if not found:
            return
        folder = found[-1]
        _load_tensors(self.parameters, folder / "weights.safetensors")
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        of = list(self.parameters.values())
        for n, moments in state["optimizer"]["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = like(moments[name], of[n])
        self.optimizer.load_state_dict(state["optimizer"])
        rngs = state["rngs"] if "rngs" in state else [{"cpu": state["rng"]}]  # of an older version
        if self.ranks.rank < len(rngs):
            torch.set_rng_state(rngs[self.ranks.rank]["cpu"])
            if "cuda" in rngs[self.ranks.rank] and self.ranks.device != "cpu":
                torch.cuda.set_rng_state(rngs[self.ranks.rank]["cuda"])
        if self.config.method == "adalora":
            for name, values in state["allocator"].items():
                moved = {k: v.to(self.ranks.device) for k, v in values.items()}
                getattr(self.model.base_model.rankallocator, name).update(moved)
            self.model.peft_config["default"].rank_pattern = state["rank_pattern"]
        self.progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))

    def load_best(self) -> None:
        _load_tensors(self.parameters, self.run.folder / "best.safetensors")

    def summary(self) -> dict[str, Any]:
        p = self.progress
        return {
            "n_steps": p.step, "n_epochs": round(p.epoch + p.step_in_epoch / max(1, len(_plan(self.config, self.lengths, p.epoch))), 3),  # noqa: E501
            "stopped": p.stopped or "all steps made", "best_step": p.best_step, "best_loss": p.best_loss,
            "best_perplexity": math.exp(min(p.best_loss, 50)) if self.config.task == "dialogue" else None, "n_tokens": p.n_tokens, "n_learned": p.n_learned,  # noqa: E501
            "seconds": round(p.seconds, 1), "tokens_per_s": round(p.n_tokens / p.seconds, 1) if p.seconds else None,
            "best_figures": next((e for e in p.evals if e["step"] == p.best_step), {}),
            "peak_memory_bytes": self._peak_memory(),
        }  # fmt: skip


def _cuda_rng(device: str) -> dict[str, torch.Tensor]:
    return {} if device == "cpu" else {"cuda": torch.cuda.get_rng_state()}


def _mean_rank(model: Any) -> float:
    """Return how many directions AdaLoRA uses a layer now."""
    ranks = [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]
    return sum(ranks) / max(1, len(ranks))


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial)
    partial.replace(path)


def _load_tensors(parameters: dict[str, torch.nn.Parameter], path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path)
    assert set(tensors) == set(parameters), f"{path} belongs to another model or method"
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(like(tensors[name], p))
