"""
Training speed: the loop of `python -m finetune train` against the tutorials' (padded to the longest allowed, batch 16,
all logits).

Only real tokens are counted, for both: padding is no work anybody wanted. Same model, data and machine, a process each;
LoRA r=16 on the seven linear layers, bfloat16. Each loop goes over the same examples until `--seconds` are over; the
first row or batch warms up and is not counted.

    .venv/bin/python bench/finetune.py --data DATA [--base NAME] [--seconds 60] [--max-tokens 512]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


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
    from finetune.modeling import HfTokenizer, adapt, autocast, load_base, row_inputs, row_loss, trainable

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = resolve_model(options.base, default_cache_dir())
    ours = which == "ours"
    config = RunConfig(
        data=options.data, packing=ours, max_tokens=options.max_tokens, row_tokens=2 * options.max_tokens
    )
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
    lengths = [len(e.input_ids) for e in examples]
    model = adapt(load_base(base, config), config, 1000, options.base)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-4)
    model.train()

    def our_steps() -> Any:
        for epoch in range(1000):
            plan = plan_epoch(
                lengths, row_tokens=config.row_tokens, batch_tokens=8192, packing=True, seed=0, epoch=epoch
            )
            for rows in plan:
                n_learned = sum(examples[n].n_learned for row in rows for n in row)
                for row in rows:
                    inputs = row_inputs(examples, row, packed=True)
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
                with autocast(config, "cpu"):
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                yield sum(len(e.input_ids) for e in batch)

    steps = our_steps() if ours else tutorial_steps()
    next(steps)  # warms up
    n_tokens, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < options.seconds:
        n_tokens += next(steps)
    return {
        "loop": which,
        "tokens_per_s": round(n_tokens / seconds, 1),
        "n_tokens": n_tokens,
        "seconds": round(seconds, 1),
        "n_examples": len(examples),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of `python -m finetune import`")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loop", choices=("ours", "tutorial"), help="one of them, in this process")
    options = parser.parse_args()
    if options.loop:
        print(json.dumps(measure(options.loop, options)))
        return 0
    rows = []
    for loop in ("tutorial", "ours"):  # a process each, so that neither's peak memory is the other's
        ran = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--loop", loop], capture_output=True, text=True)
        if ran.returncode:
            print(ran.stderr[-2000:], file=sys.stderr)
            return 1
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    ratio = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    print(f"ours / tutorial: {ratio:.2f} times the tokens a second")
    RESULTS.mkdir(exist_ok=True)
    document = {
        "base": options.base,
        "max_tokens": options.max_tokens,
        "batch": options.batch,
        "loops": rows,
        "ratio": ratio,
    }
    (RESULTS / "finetune.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
