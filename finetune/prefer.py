"""
`train --objective kto|dpo`: preferences through TRL's trainers, into a run like any other.

TRL has the losses, the loop and its checkpoints; this file gives it tokens made as everywhere here (the prompt as in
serving, the reply with its end mark, by prefix difference) and turns what it says into the run's events. The reference
is the same model with the adapter switched off. The only importer of trl and datasets; they are the
extra `prefer`, and `_prepare_dataset`, which is stepped over because it would render and cut the prompts itself, is why
the version is pinned.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bot.catalog import load_catalog, resolve_model
from bot.errors import MerchantError
from bot.messages import Message
from bot.prompt import PromptStore
from finetune.config import RunConfig
from finetune.examples import IGNORE, Example, ExampleTooLong, label_conversation, mask_proof
from finetune.grounding import NO_STORE, Search
from finetune.heap import Heap, keep_freed_memory
from finetune.methods import METHODS
from finetune.modeling import HfTokenizer, adapt, load_base, row_inputs, row_loss, save_result, trainable
from finetune.preferences import Preference, Preferences, load_preferences, render
from finetune.runs import RunFolder
from finetune.train import Interrupted, LossNotFinite, check_same, cores, folder_hash, interrupts, run_head, seed_all

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


def load_trl(objective: str) -> tuple[Any, Any, Any]:
    """
    Return (trainer class, its configuration class, datasets.Dataset).

    Raises:
        MerchantError: the extra is not installed.
    """
    try:
        from datasets import Dataset
        from datasets.utils.logging import disable_progress_bar
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    except ImportError as exc:
        raise MerchantError(f"objective {objective} needs TRL ({exc}): pip install 'zhanggui[prefer]'") from None
    disable_progress_bar()
    base, settings = (DPOTrainer, DPOConfig) if objective == "dpo" else (KTOTrainer, KTOConfig)

    class Trainer(base):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # tokens already

    return Trainer, settings, Dataset


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt's tokens and those of the replies to it; of one that was judged alone the other is None."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...] | None
    rejected: tuple[int, ...] | None

    def examples(self) -> list[Example]:
        """The same as sequences whose reply is learned: for counting, timing and showing."""
        sides = [side for side in (self.chosen, self.rejected) if side is not None]
        return [Example(self.prompt + side, (*[IGNORE] * len(self.prompt), *side)) for side in sides]


def train_preferences(
    config: RunConfig,
    folder: Path,
    *,
    search: Search | None = None,
    store: PromptStore | None = None,
    resume: bool = False,
    dry_run: bool = False,
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """
    Train as `finetune.train.train` does, on preferences; return result.json, or with `dry_run` only the estimate.

    Raises:
        MerchantError: the extra is missing, or the data or the folder cannot be used.
        Interrupted: SIGINT or SIGTERM came; the folder can be resumed.
        LossNotFinite: training diverged.
    """
    trainer_class, settings_class, dataset_class = load_trl(config.objective)
    data = load_preferences(config)
    run = RunFolder(folder, resume=resume)
    try:
        if resume:
            check_same(run, config, data.sha256)
        base_name = config.base or load_catalog().default_name
        base = resolve_model(base_name)
        torch.set_num_threads(config.threads or cores())
        keep_freed_memory()
        seed_all(config.seed)
        tokenizer = HfTokenizer(base)

        # 1) Tokens. What is held out is written for `eval` as any other run's.
        counts: Counter[str] = Counter(data.counts)
        judged = _judged(run, data, config, tokenizer, search, store or NO_STORE, counts)
        if not judged["train"]:
            raise MerchantError(f"no preference is left to train on: {dict(counts)}")
        lengths = {split: [len(e.input_ids) for j in found for e in j.examples()] for split, found in judged.items()}
        shape = _Shape.of(config, judged["train"], lengths["train"])
        if not resume:
            run.write_json(
                "run.json", run_head(config, data.sha256, base_name, base, tokenizer, counts, lengths, shape.n_steps)
            )
            examples = [e for j in judged["train"][:3] for e in j.examples()]
            (folder / "mask_proof.txt").write_text(mask_proof(examples, tokenizer.decode, 6), encoding="utf-8")
        run.watch(config)

        # 2) The model, and what the run will cost. Padded rows: a packed one would join a pair.
        padded = config.model_copy(update={"packing": False})
        model = adapt(load_base(base, padded), padded, shape.n_steps, base_name)
        estimate = _estimate(model, padded, judged["train"], lengths, shape)
        report({"kind": "estimate", **estimate})
        if dry_run:
            return estimate
        if not resume:
            run.write_json("estimate.json", estimate)

        # 3) Train; the best adapter is the result.
        datasets = {
            split: dataset_class.from_list(_rows(found, config.objective)) for split, found in judged.items() if found
        }
        n_trained = estimate["n_trained_parameters"]
        teller = _teller(run, shape, report)
        with interrupts() as stop:
            trainer = trainer_class(
                model=model,
                args=settings_class(**_arguments(config, folder, shape, judged, bool(datasets.get("valid")))),
                train_dataset=datasets["train"],
                eval_dataset=datasets.get("valid"),
                processing_class=tokenizer.inner,
                callbacks=[teller, *_callbacks(config, stop, bool(datasets.get("valid")))],
            )
            # TRL keeps a copy of the adapter's beginning as its reference. It adds nothing to the base, so the adapter
            # switched off is the same, which TRL takes where there is no copy; and beside a second adapter
            # transformers would not load the first from a checkpoint again.
            model.delete_adapter("ref")
            _drop_bars(trainer)
            trainer.train(resume_from_checkpoint=_newest(folder) if resume else None)
        step = int(trainer.state.global_step)
        if stop.is_set() and step < shape.n_steps:
            raise Interrupted(step)
        shutil.rmtree(folder / "result", ignore_errors=True)
        saved = save_result(model, tokenizer, config, folder / "result")
        result = {
            **_summary(run, trainer, shape, n_trained),
            **saved,
            "task": config.task,
            "objective": config.objective,
            "method": config.method,
            "serve": {k: getattr(METHODS[config.method], k) for k in ("cuda", "cpu", "how")},
            "sha256": folder_hash(folder / "result"),
            "estimate": run.read_json("estimate.json"),
        }
        run.write_json("result.json", result)
        run.draw_curves()
        return result
    finally:
        run.close()
        if dry_run and not resume:
            shutil.rmtree(folder, ignore_errors=True)


# --- Tokens ----------------------------------------------------------------------------------------------------------


def _judged(
    run: RunFolder, data: Preferences, config: RunConfig, tokenizer: HfTokenizer, search: Search | None,
    store: PromptStore, counts: Counter[str],
) -> dict[str, list[Judged]]:  # fmt: skip
    """Return the tokens to train and validate on; kept in the run, so that a resumed one needs no index."""
    judged: dict[str, list[Judged]] = {}
    for split in ("train", "valid", "test"):
        path = run.folder / f"preferences-{split}.jsonl"
        if not path.exists():
            _write(path, data.splits[split], config, tokenizer, search, store, counts)
        found = []
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            prompt = [Message(r, c) for r, c in line["prompt"]]
            one = _tokens(prompt, line["chosen"], line["rejected"], tokenizer, config)
            if one is None:
                counts[f"left out of {split}: longer than max_tokens"] += 1
            else:
                found.append(one)
        if split == "test":
            # What `eval` measures: the replies that were liked, or preferred.
            held_out = [
                {"kind": "reply", "learn": [*[False] * len(x["prompt"]), True],
                 "messages": [*x["prompt"], ["assistant", x["chosen"]]]}
                for x in lines if x["chosen"] is not None
            ]  # fmt: skip
            _write_lines(run.folder / "conversations-test.jsonl", held_out)
        else:
            judged[split] = found
    return judged


def _write(
    path: Path, found: Sequence[Preference], config: RunConfig, tokenizer: HfTokenizer, search: Search | None,
    store: PromptStore, counts: Counter[str],
) -> None:  # fmt: skip
    rendered = []
    for p in found:
        try:
            prompt = render(p, store, search, config, tokenizer.count)
        except ValueError:
            counts["left out: too long"] += 1
            continue
        messages = [[m.role, m.content] for m in prompt]
        rendered.append({"prompt": messages, "chosen": p.chosen, "rejected": p.rejected, "source": p.source})
        counts["pair" if p.chosen and p.rejected else "liked" if p.chosen else "disliked"] += 1
    _write_lines(path, rendered)


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def _tokens(
    prompt: Sequence[Message], chosen: str | None, rejected: str | None, tokenizer: HfTokenizer, config: RunConfig
) -> Judged | None:
    """Return the tokens, or None where they do not fit with the same prompt on both sides."""
    learn = [*[False] * len(prompt), True]
    halves: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = []
    for reply in (chosen, rejected):
        if reply is None:
            halves.append(None)
            continue
        try:
            (example,) = label_conversation([*prompt, Message("assistant", reply)], learn, tokenizer, config.max_tokens)
        except ExampleTooLong:
            return None
        first = next(n for n, label in enumerate(example.labels) if label != IGNORE)
        halves.append((example.input_ids[:first], example.input_ids[first:]))
    prompts = {half[0] for half in halves if half is not None}
    if len(prompts) != 1:
        return None  # the longer reply pushed a turn out of the prompt
    a, b = halves
    return Judged(prompts.pop(), a[1] if a else None, b[1] if b else None)


def _rows(found: Sequence[Judged], objective: str) -> list[dict[str, Any]]:
    """Return what TRL's collators read."""
    if objective == "dpo":
        return [
            {"prompt_ids": list(j.prompt), "chosen_ids": list(j.chosen or ()), "rejected_ids": list(j.rejected or ())}
            for j in found
        ]
    replies = [list(j.chosen if j.chosen is not None else j.rejected or ()) for j in found]
    # KTO estimates how far it has gone from replies beside prompts that are not theirs: the one before's.
    return [
        {
            "prompt_ids": list(j.prompt),
            "completion_ids": r,
            "KL_completion_ids": other,
            "label": j.chosen is not None,
        }
        for j, r, other in zip(found, replies, [*replies[-1:], *replies[:-1]], strict=True)
    ]


# --- TRL -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape:
    """How the run is cut into steps."""

    n_at_once: int  # pairs, or rated replies, in one forward pass
    n_passes: int  # in one step
    n_steps: int
    eval_every: int

    @staticmethod
    def of(config: RunConfig, judged: Sequence[Judged], lengths: Sequence[int]) -> _Shape:
        # A pair is two rows, and a rated reply one and its mismatched twin for the divergence: twice as many tokens.
        n_at_once = max(1 if config.objective == "dpo" else 2, min(8, config.row_tokens // (2 * max(lengths))))
        mean = sum(lengths) / len(judged)
        wanted = config.batch_examples or max(1, round(config.batch_tokens / mean))
        n_at_once = min(n_at_once, len(judged))
        n_passes = max(1, round(min(wanted, len(judged)) / n_at_once))
        per_epoch = math.ceil(math.ceil(len(judged) / n_at_once) / n_passes)
        n_steps = max(1, math.ceil(config.epochs * per_epoch))
        n_steps = min(n_steps, config.max_steps) if config.max_steps else n_steps
        return _Shape(n_at_once, n_passes, n_steps, config.eval_every or max(1, per_epoch // 4))


def _arguments(
    config: RunConfig, folder: Path, shape: _Shape, judged: Mapping[str, Sequence[Judged]], validates: bool
) -> dict[str, Any]:
    cuda = config.device != "cpu" and torch.cuda.is_available()
    found: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": shape.n_at_once,
        "per_device_eval_batch_size": shape.n_at_once,
        "gradient_accumulation_steps": shape.n_passes,
        "max_steps": shape.n_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": max(1, round(config.warmup * shape.n_steps)) if config.warmup else 0,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": config.bf16,
        "use_cpu": not cuda,
        "beta": config.beta,
        "max_length": None,  # nothing is cut: what is too long was left out
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": shape.eval_every,
        "save_strategy": "steps",
        "save_steps": shape.eval_every,
        "save_total_limit": config.keep_checkpoints,
        "load_best_model_at_end": validates,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
    }
    if config.objective == "kto":
        n_liked = sum(j.chosen is not None for j in judged["train"])
        n_not = len(judged["train"]) - n_liked
        # Thumbs up and down weigh the same in sum, as the paper (arXiv:2402.01306, eq. 8) recommends.
        found["undesirable_weight"] = max(1.0, n_liked / n_not)
        found["desirable_weight"] = max(1.0, n_not / n_liked)
    return found


def _drop_bars(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # it prints to stdout, where --json has its one document


def _newest(folder: Path) -> str | None:
    found = [p for p in (folder / "checkpoints").glob("checkpoint-*") if p.name[11:].isdigit()]
    return str(max(found, key=lambda p: int(p.name[11:]))) if found else None


def _callbacks(config: RunConfig, stop: threading.Event, validates: bool) -> list[Any]:
    from transformers import EarlyStoppingCallback, TrainerCallback

    heap = Heap()

    class Stop(TrainerCallback):  # type: ignore[misc]
        """An interrupt is answered after the step under way, with a checkpoint."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            heap.trim()
            if stop.is_set():
                control.should_save = control.should_training_stop = True
            return control

    patient = [EarlyStoppingCallback(config.patience, config.min_delta)] if validates and config.patience else []
    return [Stop(), *patient]


def _teller(run: RunFolder, shape: _Shape, report: Report) -> Any:
    """Return a callback that turns what TRL logs into the run's events."""
    from transformers import TrainerCallback

    class Teller(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.began = self.last = time.perf_counter()
            self.first_step = 0
            self.n_tokens = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = self.last = time.perf_counter()
            self.first_step = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logs = logs or {}
            if "loss" in logs:
                loss = float(logs["loss"])
                if not math.isfinite(loss):
                    raise LossNotFinite(state.global_step)
                now = time.perf_counter()
                tokens = float(logs.get("num_tokens", 0)) - self.n_tokens
                seconds, self.last, self.n_tokens = now - self.last, now, float(logs.get("num_tokens", 0))
                event = {
                    "step": state.global_step, "loss": round(loss, 6), "lr": float(logs.get("learning_rate", 0)),
                    "grad_norm": round(float(logs.get("grad_norm", 0)), 4), "n_tokens": int(tokens),
                    "tokens_per_s": round(tokens / seconds, 1), **_figures(logs, ""),
                }  # fmt: skip
                run.event("step", **event)
                done = state.global_step - self.first_step
                eta = (now - self.began) / max(1, done) * (shape.n_steps - state.global_step)
                report({"kind": "step", "n_steps": shape.n_steps, "eta_s": round(eta, 1), **event})
            elif "eval_loss" in logs:
                event = {
                    "step": state.global_step,
                    "loss": round(float(logs["eval_loss"]), 6),
                    **_figures(logs, "eval_"),
                }
                run.event("valid", **event)
                report({"kind": "valid", **event})
                self.last = time.perf_counter()  # a validation is no part of a step's time

    return Teller()


def _figures(logs: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Of TRL's figures those that say whether it learns: how often, and by how much, the better reply is ahead."""
    wanted = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl": "kl"}
    return {
        name: round(float(logs[prefix + key]), 6)
        for key, name in wanted.items()
        if isinstance(logs.get(prefix + key), (int, float)) and math.isfinite(logs[prefix + key])
    }


def _estimate(
    model: Any, config: RunConfig, judged: Sequence[Judged], lengths: Mapping[str, Sequence[int]], shape: _Shape
) -> dict[str, Any]:
    """Return tokens, steps, time and memory of the run, from two real passes; leaves no trace in the run's state."""
    state = torch.get_rng_state()
    model.train()
    examples = [e for j in judged[: shape.n_at_once] for e in j.examples()]
    inputs = row_inputs(examples, tuple(range(len(examples))), packed=False)
    seconds = 0.0
    for _ in range(2):  # the first one also warms caches and picks kernels
        began = time.perf_counter()
        row_loss(model, inputs, config).backward()
        seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    # A step asks the reference too, without its backward pass; KTO asks both for mismatched replies as well.
    work = 4 / 3 if config.objective == "dpo" else 2.0
    speed = inputs.n_tokens / (seconds * work)
    per_epoch = sum(lengths["train"])
    n_examples = len(judged)
    n_tokens = int(per_epoch / n_examples * shape.n_at_once * shape.n_passes * shape.n_steps)
    n_evals = shape.n_steps // shape.eval_every
    n_trained = sum(p.numel() for p in trainable(model).values())
    return {
        "n_examples": n_examples,
        "n_tokens_per_epoch": per_epoch,
        "n_steps": shape.n_steps,
        "n_tokens": n_tokens,
        "tokens_per_s": round(speed, 1),
        "seconds": round((n_tokens + sum(lengths["valid"]) * n_evals / 2) / speed, 1),
        "n_trained_parameters": n_trained,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_processes": 1,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 16 * n_trained,
    }


def _summary(run: RunFolder, trainer: Any, shape: _Shape, n_trained: int) -> dict[str, Any]:
    steps, evals = run.events("step"), run.events("valid")
    best = min(evals, key=lambda e: e["loss"]) if evals else steps[-1]
    seconds = sum(e["n_tokens"] / e["tokens_per_s"] for e in steps if e["tokens_per_s"])
    n_tokens = sum(e["n_tokens"] for e in steps)
    done = int(trainer.state.global_step)
    return {
        "n_steps": done, "n_epochs": round(float(trainer.state.epoch or 0), 3),
        "stopped": "all steps made" if done >= shape.n_steps else "no gain in validation",
        "best_step": best["step"], "best_loss": best["loss"], "best_accuracy": best.get("accuracy"),
        "n_tokens": n_tokens, "seconds": round(seconds, 1),
        "tokens_per_s": round(n_tokens / seconds, 1) if seconds else None, "n_trained_parameters": n_trained,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
