"""`ablate` on the command line: which changes of the data to try. finetune/__main__.py hands the retriever in."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bot.errors import MerchantError

SearchOf = Callable[[Path], tuple[Any, Any, Callable[[], None]]]  # store folder -> search, prompt store, close


def add_parser(commands: Any, search_of: SearchOf) -> None:
    """Register `ablate`."""
    from finetune.train_cli import add_config

    c = commands.add_parser("ablate", help="train with and without each change of the data, and keep what helps")
    add_config(c)
    c.add_argument(
        "--change", action="append", default=[], metavar="KIND|NAME=DIR",
        help="typos, noise or templates, or a data folder, for instance of `distill`; tried in this order",
    )  # fmt: skip
    c.add_argument(
        "--by", choices=("perplexity", "rouge_l", "chrf"), default="perplexity", help="what must become better"
    )
    c.add_argument("--samples", type=int, default=32, metavar="N", help="replies to generate for rouge_l, chrf (32)")
    c.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    c.set_defaults(run=lambda options: _ablate(options, search_of))


def _ablate(options: argparse.Namespace, search_of: SearchOf) -> int:
    from finetune.ablate import ablate, parse_changes, render_table
    from finetune.train_cli import Teller, config_of

    config = config_of(options)
    if config.task != "dialogue" or config.objective != "sft" or config.gpus > 1:
        raise MerchantError("ablate compares runs on dialogues: task dialogue, objective sft, one process")
    changes = parse_changes(options.change)
    search, store, close = search_of(config.store) if config.store else (None, None, lambda: None)
    try:
        found = ablate(
            config, options.run_folder, changes, by=options.by, search=search, store=store,
            n_samples=options.samples, max_new_tokens=options.max_new_tokens, report=Teller(),
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    finally:
        close()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(json.dumps(found, ensure_ascii=False, indent=1) if options.json else render_table(found))
    return 0
