"""
`train`, `search` and `classify` on the command line: their arguments, and what is said while they run.

Knows flags, the terminal and which process says something. The retriever is handed in by finetune/__main__.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bot.errors import MerchantError
from finetune.config import RunConfig, load_config

SearchOf = Callable[[Path], tuple[Any, Any, Callable[[], None]]]  # store folder -> search, prompt store, close
Main = Callable[[list[str]], int]

_NUMBERS: tuple[tuple[str, type], ...] = (
    ("rank", int), ("alpha", float), ("beta", float),
    ("lr", float), ("warmup", float), ("weight-decay", float), ("epochs", float),
    ("max-steps", int), ("max-tokens", int), ("row-tokens", int), ("batch-tokens", int), ("eval-every", int),
    ("patience", int), ("unanswerable", float), ("gpus", int), ("threads", int), ("seed", int),
)  # fmt: skip
_FLAGS = (
    "task", "base", "data", "store", "method", "start_from",
    "schedule", "adversarial", "packing", "bf16", "pool", "class_weights",
    "skip_bad", "fsdp", "device", "wandb", "objective", *(name.replace("-", "_") for name, _ in _NUMBERS),
)  # fmt: skip


def add_parsers(commands: Any, main: Main, search_of: SearchOf) -> None:
    """Register the three commands; `main` is called again in each process of a run over several."""
    c = commands.add_parser("train", help="data in, a run with trained weights out")
    add_config(c)
    c.add_argument("--resume", action="store_true", help="go on with an interrupted run, exactly")
    c.add_argument("--dry-run", action="store_true", help="only the estimate: tokens, time, memory")
    c.add_argument("--publishable", action="store_true", help="refuse a method that no server can serve")
    c.set_defaults(run=lambda options: _train(options, main, search_of))

    c = commands.add_parser("search", help="try configurations, drop the poor ones early, keep the best as a file")
    add_config(c)
    c.add_argument("--trials", type=_count, default=20, metavar="N", help="runs to make, those of before counted (20)")
    c.add_argument("--time", type=_seconds, metavar="2h", help="begin no run after so long: 90s, 30m, 2h")
    c.add_argument("--space", type=Path, metavar="FILE", help="what is tried, in TOML, YAML or JSON; docs/finetune.md")
    c.add_argument(
        "--pruner", choices=("median", "hyperband", "none"), default="median", help="what is dropped (median)"
    )
    c.set_defaults(run=lambda options: _search(options, search_of))

    c = commands.add_parser("classify", help="name the class of texts with a run of --task classify")
    c.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR")
    c.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, the lines of stdin")
    c.set_defaults(run=_classify)


def add_config(c: argparse.ArgumentParser) -> None:
    """The knobs of a run: a flag for the usual ones, --set for all."""
    c.add_argument("--config", type=Path, metavar="FILE", help="knobs in TOML, YAML or JSON; flags win over it")
    c.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR", help="the folder to write")
    c.add_argument("--task", choices=("dialogue", "classify"), help="to reply (the default), or to name a text's class")
    c.add_argument("--data", type=Path, metavar="PATH", help="a folder of `import`; to classify: texts and labels")
    c.add_argument("--base", metavar="NAME", help="catalog name or model folder; the default model")
    c.add_argument(
        "--store", type=Path, metavar="DIR", help="put this store's passages into the prompts, as in serving"
    )
    c.add_argument("--method", choices=("lora", "adalora", "ia3", "prefix", "prompt", "full", "head"))
    c.add_argument("--start-from", type=Path, metavar="DIR", help="go on from this LoRA adapter: a release, a result")
    c.add_argument("--objective", choices=("sft", "kto", "dpo"), help="from replies, thumbs, or pairs of replies")
    for name, kind in _NUMBERS:
        c.add_argument(f"--{name}", type=kind, metavar="N")
    c.add_argument("--schedule", choices=("cosine", "linear", "constant"))
    c.add_argument("--adversarial", choices=("none", "fgm", "freelb"))
    c.add_argument("--packing", action=argparse.BooleanOptionalAction, default=None)
    c.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
    c.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=None, help="gradient checkpointing"
    )
    c.add_argument("--columns", action="append", default=[], metavar="text=NAME,…", help="to classify: text and label")
    c.add_argument("--pool", choices=("last", "mean"), help="to classify: the state that the head reads")
    c.add_argument("--class-weights", choices=("none", "balanced"), help="to classify: let rare classes weigh more")
    c.add_argument("--skip-bad", action="store_true", default=None, help="to classify: leave out rows with faults")
    c.add_argument("--fsdp", action="store_true", default=None, help="shard the weights over the --gpus processes")
    c.add_argument("--device", choices=("auto", "cpu", "cuda"))
    c.add_argument("--wandb", metavar="PROJECT", help="show the run at Weights & Biases too")
    c.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other knob of docs/finetune.md"
    )


def config_of(options: argparse.Namespace) -> RunConfig:
    given = {name: getattr(options, name) for name in _FLAGS}
    given["gradient_checkpointing"] = options.checkpointing
    given["columns"] = _columns(options.columns) or None
    return load_config(options.config, {**given, **_set_values(options.set)})


def _columns(items: list[str]) -> dict[str, str]:
    found = {}
    for item in (part for text in items for part in text.split(",") if part.strip()):
        name, equals, value = item.strip().partition("=")
        if not equals or name not in ("text", "label"):
            raise MerchantError(f"--columns: {item!r}; write text=NAME,label=NAME")
        found[name] = value
    return found


def _set_values(items: list[str]) -> dict[str, Any]:
    """Return --set NAME=VALUE pairs, the values as JSON where they are."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise MerchantError(f"--set: {item!r}; write NAME=VALUE, for instance dropout=0.05")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError("write 90s, 30m, 2h or 1d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2] or "s"]


def _refuse_early(config: RunConfig) -> None:
    """What can be refused before torch and the index are loaded."""
    from finetune.data import load_data
    from finetune.labelled import load_texts
    from finetune.preferences import load_preferences
    from finetune.runs import load_wandb

    if config.task == "classify":
        load_texts(config)
    elif config.objective != "sft":
        load_preferences(config)
    else:
        load_data(config.data)
    if config.wandb is not None:
        load_wandb()


# --- train -----------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, main: Main, search_of: SearchOf) -> int:
    from finetune.methods import check_servable

    config = config_of(options)
    check_servable(config, must_serve=options.publishable)
    _refuse_early(config)
    from finetune.parallel import is_alone, launch, ranks_of
    from finetune.train import train

    if config.gpus > 1 and is_alone():
        return launch(main, options.arguments, config)
    ranks = ranks_of(config)
    searched = config.store is not None and ranks.writes
    search, store, close = search_of(config.store) if config.store and searched else (None, None, lambda: None)
    try:
        if config.objective != "sft":
            from finetune.prefer import train_preferences

            result = train_preferences(
                config, options.run_folder, search=search, store=store, resume=options.resume,
                dry_run=options.dry_run, report=Teller(),
            )  # fmt: skip
        else:
            result = train(
                config, options.run_folder, search=search, store=store, resume=options.resume,
                dry_run=options.dry_run, publishable=options.publishable, report=Teller(), ranks=ranks,
            )  # fmt: skip
    finally:
        close()
    if ranks.writes:
        _print(result, options.json, lambda r: "\n".join(f"{k}: {v}" for k, v in r.items()))
    return 0


class Teller:
    """Says on stderr how a run goes: a bar with the time left on a terminal, the estimate and validations in a log too."""  # noqa: E501

    def __init__(self) -> None:
        self._bar = sys.stderr.isatty()

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "estimate":
            minutes = (event["seconds"] or 0) / 60
            over = f" on {event['n_processes']} processes" if event["n_processes"] > 1 else ""
            self._line(
                f"estimate: {event['n_tokens']:,} tokens in {event['n_steps']} steps, about {minutes:.1f} min at "
                f"{event['tokens_per_s']} tokens/s{over}, {event['memory_bytes'] / 2**30:.1f} GiB; "
                f"{event['n_trained_parameters']:,} of {event['n_parameters']:,} parameters trained"
            )
        elif kind == "valid":
            more = "".join(
                f", {name} {event[key]:.4f}"
                for key, name in (("accuracy", "accuracy"), ("f1_macro", "F1"))
                if key in event
            )
            self._line(f"step {event['step']}: validation loss {event['loss']:.4f}{more}")
        elif kind == "step":
            done = f"loss {event['loss']:.3f} {event['tokens_per_s']:.0f} tok/s, {_left(event['eta_s'])} left"
            self._draw(event["step"], event["n_steps"], done)
            if event["step"] == event["n_steps"] and self._bar:
                print(file=sys.stderr)
        elif kind == "reading":
            self._draw(event["n_done"], event["n_all"], "texts read")

    def _line(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self._bar else text, file=sys.stderr, flush=True)

    def _draw(self, n: int, of: int, text: str) -> None:
        if self._bar:
            full = int(30 * n / of)
            bar = "#" * full + "." * (30 - full)
            print(f"\r\x1b[K[{bar}] {n}/{of} {text}", end="", file=sys.stderr, flush=True)


def _left(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# --- search, classify ------------------------------------------------------------------------------------------------


def _search(options: argparse.Namespace, search_of: SearchOf) -> int:
    from finetune.search import load_space, render_trials, search

    config = config_of(options)
    space = load_space(options.space, config)
    if config.objective != "sft":
        raise MerchantError(f"objective {config.objective}: a search tries sft only")
    if config.gpus > 1:
        raise MerchantError("gpus: a search makes its runs one after the other in this process; leave it out")
    _refuse_early(config)
    found, store, close = search_of(config.store) if config.store else (None, None, lambda: None)
    try:
        document = search(
            config, options.run_folder, space=space, n_trials=options.trials, time_s=options.time,
            pruner=options.pruner, search_store=found, store=store, report=Teller(),
            tell=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
    finally:
        close()
    _print(document, options.json, render_trials)
    return 0


def _classify(options: argparse.Namespace) -> int:
    texts = options.texts or [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise MerchantError("no text to classify: give some, or write one a line to stdin")
    from finetune.classify import classify

    found = classify(options.run_folder, texts)
    _print(
        {"results": found},
        options.json,
        lambda d: "\n".join(f"{r['label']}\t{r['probability']:.3f}\t{r['text']}" for r in d["results"]),
    )
    return 0


def _print(document: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a C locale would fail on 优惠
    print(json.dumps(document, ensure_ascii=False, indent=1) if as_json else text(document))
