"""
Training speed: the loop of `python -m finetune train` against the tutorials' (padded to the longest allowed, batch 16, all
logits) and TRL's SFTTrainer with packing.

Only real tokens are counted, for all: padding is no work anybody wanted. Same model, data and machine, a process each; LoRA
r=16 on the seven linear layers, bfloat16. Each loop goes over the same examples; the first step warms up and is not counted.
The processes take turns in rounds of `--round` seconds, the others stopped meanwhile (SIGSTOP), so that load from outside
hits all alike, until each has had `--seconds`. Peak memory is each process's own.

    .venv/bin/python bench/finetune.py --data DATA [--base NAME] [--seconds 60] [--round 10] [--max-tokens 512]
    .venv/bin/python bench/finetune.py --data DATA --loop trl     # one of them, not stopped
    python bench/finetune.py --data DATA --device cuda --max-tokens 1024 --row-tokens 16384 --base NAME    # on a GPU
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LOOPS = ("tutorial", "trl", "ours")


def measure(which: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one loop in this process and return its figures."""
    sys.path.insert(0, str(ROOT))
    import torch

    from bot.catalog import resolve_model
    from bot.settings import default_cache_dir
    from finetune.config import RunConfig
    from finetune.data import load_data
    from finetune.examples import IGNORE, Example, label_conversation, plan_epoch
    from finetune.grounding import NO_STORE, conversations
    from finetune.heap import keep_freed_memory
    from finetune.modeling import HfTokenizer, adapt, autocast, load_base, row_inputs, row_loss, trainable
    from finetune.parallel import device_of

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if which == "ours":
        keep_freed_memory()  # as `train` does
    base = resolve_model(options.base, default_cache_dir())
    ours = which == "ours"
    row_tokens = options.row_tokens or 2 * options.max_tokens
    config = RunConfig(
        data=options.data, packing=ours, max_tokens=options.max_tokens, row_tokens=row_tokens,
        batch_tokens=max(8192, row_tokens), device=options.device,
    )  # fmt: skip
    device = options.device
    if ours:
        device_of(config)  # turns off what `train` does without on a GPU
    tokenizer = HfTokenizer(base)
    from collections import Counter

    found = conversations(
        load_data(options.data).splits["train"], NO_STORE, None, n_passages=4, unanswerable=0, ungrounded="drop", seed=0,  # noqa: E501
        count_tokens=tokenizer.count, max_prompt_tokens=options.max_tokens, counts=Counter(),
    )  # fmt: skip
    examples: list[Example] = []
    for c in found:
        try:
            examples += label_conversation(c.messages, c.learn, tokenizer, options.max_tokens)
        except ValueError:
            continue
    if len(examples) < options.batch:
        raise SystemExit(
            f"{options.data}: {len(examples)} examples of at most {options.max_tokens} tokens, fewer than a batch"
        )
    lengths = [len(e.input_ids) for e in examples]
    model = adapt(load_base(base, config), config, 1000, options.base).to(device)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-4)
    model.train()

    def our_steps() -> Any:
        for epoch in range(1000):
            plan = plan_epoch(
                lengths, row_tokens=row_tokens, batch_tokens=config.batch_tokens, packing=True, seed=0, epoch=epoch
            )
            for rows in plan:
                n_learned = sum(examples[n].n_learned for row in rows for n in row)
                for row in rows:
                    inputs = row_inputs(examples, row, packed=True, device=device)
                    (row_loss(model, inputs, config) / n_learned).backward()
                    yield inputs.n_tokens
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def tutorial_steps() -> Any:
        # tokenizer(…, padding="max_length", truncation=True), per_device_train_batch_size=16, model(…, labels=labels).loss  # noqa: E501
        pad = int(tokenizer.inner.pad_token_id or 0)
        while True:
            for at in range(0, len(examples) - options.batch + 1, options.batch):
                batch = examples[at : at + options.batch]
                room = [options.max_tokens - len(e.input_ids) for e in batch]
                ids = torch.tensor([[*e.input_ids, *[pad] * n] for e, n in zip(batch, room, strict=True)])
                mask = torch.tensor([[1] * len(e.input_ids) + [0] * n for e, n in zip(batch, room, strict=True)])
                labels = torch.tensor([[*e.labels, *[IGNORE] * n] for e, n in zip(batch, room, strict=True)])
                ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
                with autocast(config, device):
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                yield sum(len(e.input_ids) for e in batch)

    def trl_steps() -> Iterator[int]:
        yield from _trl_steps(examples, lengths, model, tokenizer, config, options)

    loop = {"ours": our_steps, "tutorial": tutorial_steps, "trl": trl_steps}[which]
    steps = loop()
    next(steps)  # warms up
    print("ready", flush=True)
    began = time.perf_counter()
    n_tokens, n_steps = 0, 0
    for n in steps:
        if device == "cuda":
            torch.cuda.synchronize()
        n_tokens, n_steps = n_tokens + n, n_steps + 1
        # What came until now, at each step: the process is ended from outside, or by itself where it is alone.
        figures = {
            "loop": which, "n_tokens": n_tokens, "n_steps": n_steps, "seconds": round(time.perf_counter() - began, 2),
            "n_examples": len(examples), "mean_tokens": round(sum(lengths) / len(lengths), 1),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }  # fmt: skip
        print(json.dumps(figures), flush=True)
        if options.loop and not options.turns and figures["seconds"] >= options.seconds:
            break
    return figures


def _trl_steps(
    examples: Any, lengths: list[int], model: Any, tokenizer: Any, config: Any, options: argparse.Namespace
) -> Iterator[int]:
    """Yield the real tokens of each backward pass of TRL's SFTTrainer, packing on, on the same tokens and labels."""
    import threading

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    done: list[int] = []
    more, ask = threading.Semaphore(0), threading.Semaphore(0)

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            ask.acquire()
            loss = super().training_step(model, inputs, *args, **kwargs)
            mask = inputs.get("attention_mask")
            done.append(int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel()))
            more.release()
            return loss

    rows = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in examples]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_length=config.row_tokens, packing=True, packing_strategy="bfd",
            per_device_train_batch_size=1, gradient_accumulation_steps=max(1, 8192 // config.row_tokens),
            max_steps=1_000_000, learning_rate=2e-4, bf16=True, use_cpu=options.device == "cpu",
            gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_steps=1_000_000, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Counting(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer.inner
        )
        thread = threading.Thread(target=trainer.train, daemon=True)
        thread.start()
        while thread.is_alive():
            ask.release()
            while not more.acquire(timeout=1.0):
                if not thread.is_alive():
                    raise RuntimeError("TRL's trainer ended; its error is above")
            yield done.pop()


class _Turn:
    """One loop in a process of its own, stopped unless it is its turn."""

    def __init__(self, loop: str) -> None:
        self.loop, self.figures, self.seconds = loop, dict[str, Any](), 0.0
        command = [sys.executable, __file__, *sys.argv[1:], "--loop", loop, "--turns"]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, text=True, bufsize=1)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), True)
        for line in self.process.stdout:
            if line.strip() == "ready":
                break
        else:
            self.fail()
        self.stop()

    def fail(self) -> None:
        self.process.wait()
        self.errors.seek(0)
        raise SystemExit(f"{self.loop}: {self.errors.read()[-2000:]}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go(self, seconds: float) -> None:
        """Let it run for at least `seconds`, to the end of a step."""
        assert self.process.stdout is not None
        began = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        while time.perf_counter() - began < seconds:
            line = self.process.stdout.readline()
            if not line:
                self.fail()
            self.figures = json.loads(line)
        self.stop()
        self.seconds += time.perf_counter() - began

    def end(self) -> dict[str, Any]:
        self.process.kill()
        self.process.wait()
        self.figures["seconds"] = round(self.seconds, 1)
        self.figures["tokens_per_s"] = round(self.figures["n_tokens"] / self.seconds, 1)
        return self.figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of `python -m finetune import`")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--row-tokens", type=int, default=0, help="of a packed row, ours and TRL's (2 x --max-tokens)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--round", type=float, default=10.0, help="seconds of a turn")
    parser.add_argument("--loop", choices=LOOPS, help="one of them, in this process")
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        measure(options.loop, options)
        return 0
    turns: list[_Turn] = []
    try:
        for loop in LOOPS:
            turns.append(_Turn(loop))  # they load one after the other, the others stopped
        while min(t.seconds for t in turns) < options.seconds:
            for turn in turns:
                turn.go(options.round)
    finally:
        rows = [t.end() for t in turns if t.figures]
        for t in turns:
            t.process.kill()
    by_name = {r["loop"]: r for r in rows}
    for row in rows:
        print(row)
    ours = by_name["ours"]
    ratios = {name: ours["tokens_per_s"] / by_name[name]["tokens_per_s"] for name in ("tutorial", "trl")}
    memory = {name: ours["peak_memory_bytes"] / by_name[name]["peak_memory_bytes"] for name in ratios}
    for name, bound in (("tutorial", 2.5), ("trl", 1.0)):
        print(
            f"ours / {name}: {ratios[name]:.2f} times the tokens a second (bound {bound}), "
            f"{memory[name]:.2f} of its peak memory"
        )
    RESULTS.mkdir(exist_ok=True)
    document = {
        "base": options.base,
        "max_tokens": options.max_tokens,
        "batch": options.batch,
        "loops": rows,
        "ratios": ratios,
        "memory_ratios": memory,
    }
    (RESULTS / "finetune.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
