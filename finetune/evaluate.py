"""
`evaluate`: a run's result against the base and the current release, on the same held-out dialogues, question by question.

Measured in this process: perplexity of the humans' replies, and replies generated greedily from the same prompts (BLEU,
chrF, ROUGE-L, language, length, forbidden content, speed). Facts and refusals are measured by `python -m bot eval` through
servers' sockets, started here one after the other or already running: that is the only place where they are real.
Everything is kept in eval.json and, for people, eval.html.
"""  # noqa: E501

from __future__ import annotations

import json
import logging
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bot.catalog import resolve_model
from bot.errors import MerchantError
from bot.messages import Message
from bot.prompt import PromptStore
from finetune.cases import CaseFile, report_cases, run_cases, served
from finetune.config import RunConfig
from finetune.data import load_data
from finetune.examples import Example, ExampleTooLong, label_conversation
from finetune.gate import Gate, judge
from finetune.grounding import NO_STORE, Conversation, Search, figures_of
from finetune.html import render_html
from finetune.metrics import (
    bleu,
    chrf,
    paired_difference,
    paired_perplexity,
    rouge_l,
    same_language,
    sentence_chrf,
)
from finetune.modeling import HfTokenizer, load_for_evaluation, merge, row_inputs, row_loss, virtual_tokens
from finetune.pii import PLACEHOLDER
from finetune.runs import write_report
from finetune.train import folder_hash, read_conversations, write_conversations

logger = logging.getLogger(__name__)

GAINS = ("fact_gain", "refusal_gain")
_CONTROL = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|</?think>")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Contestant:
    """A model to measure: a base, and what was trained on it."""

    name: str  # "candidate", "base", "current"
    base: Path
    adapter: Path | None  # None: the folder `base` is all of it


@dataclass
class Measured:
    """What one contestant did, item by item in the order of the held-out replies."""

    losses: list[tuple[float, int]]
    replies: list[str]
    tokens_per_s: float
    figures: dict[str, Any]


def evaluate(
    run: Path,
    *,
    current: tuple[str, Path] | None = None,
    search: Search | None = None,
    store: PromptStore | None = None,
    gate: Gate | None = None,
    cases: Sequence[CaseFile] = (),
    urls: Mapping[tuple[str, str], str] | None = None,
    serve: bool = False,
    direct: bool = False,
    concurrency: int = 4,
    n_samples: int = 32,
    max_new_tokens: int = 96,
    forbidden: Sequence[str] = (),
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """
    Measure, judge, write eval.json and eval.html into `run`, and return the former. Blocks for minutes.

    `current` is (name, model folder) of the current release. `cases` are run where `urls` names a server of a
    contestant and a file's label, or `serve` starts one; `concurrency` of them at a time. `direct`: the whole bot is
    measured instead of its model.

    Raises:
        MerchantError: no finished run, its result was changed, or there is nothing to measure on.
        ServerFailed: a started server did not come up, or a running one did not answer.
    """
    head, result = finished(run)
    config = RunConfig(**head["config"])
    base = resolve_model(head["base"])
    contestants = [
        Contestant(
            "candidate",
            run / "result" if result["kind"] == "model" else base,
            None if result["kind"] == "model" else run / "result",
        )
    ]
    contestants.append(Contestant("base", base, None))
    if current is not None:
        contestants.append(Contestant("current", current[1], None))

    # 1) The held-out replies, rendered as the run's own were.
    tokenizer = HfTokenizer(base)
    held_out = _held_out(run, config, tokenizer, search, store or NO_STORE)
    examples = labelled(held_out, tokenizer, config)
    if not examples:
        raise MerchantError(f"{config.data / 'test.jsonl'}: no dialogue to measure on; import with --test above 0")
    prompts = first_replies(held_out)[:n_samples]

    # 2) Each contestant on all of them.
    measured: dict[str, Measured] = {}
    for contestant in contestants:
        own, comparable = tokenizer, examples
        if contestant.name == "current":
            # It may be of another base: its tokens are others then, and a perplexity over them compares nothing.
            own = HfTokenizer(contestant.base)
            comparable = examples if own.inner.get_vocab() == tokenizer.inner.get_vocab() else []
        tell(f"{contestant.name}: perplexity of {len(comparable)} dialogues, {len(prompts)} replies")
        measured[contestant.name] = measure(contestant, config, own, comparable, prompts, max_new_tokens, forbidden)
    asked = _run_all_cases(
        contestants, cases, urls or {}, run, serve=serve, direct=direct, concurrency=concurrency, tell=tell
    )

    # 3) The candidate against each other one, pair by pair.
    against = {}
    for name in measured:
        if name != "candidate":
            against[name] = _compare(measured["candidate"], measured[name], prompts)
    figures = {name: dict(m.figures) for name, m in measured.items()}
    for n, (label, of_file) in enumerate(asked.items()):
        # The accuracies once more where a release's lineage looks: the first file's under their own names.
        suffix = f"[{label}]" if n else ""
        for name, found in of_file["contestants"].items():
            figures[name] |= {f"{f}{suffix}": found[f] for f in ("fact_accuracy", "refusal_accuracy", "by_language")}
        for name, gains in of_file["against"].items():
            against[name] |= {f"{gain}{suffix}": gains[gain] for gain in GAINS if gain in gains}
    evaluation: dict[str, Any] = {
        "run": str(run),
        "result_sha256": result["sha256"],
        "data_sha256": head["data_sha256"],
        "current": current[0] if current else None,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "n_held_out": len(examples),
        "n_replies": len(prompts),
        "candidate": figures.pop("candidate"),
        "others": figures,
        "against": against,
        "cases": asked,
        "samples": [
            {
                "question": p.messages[-1].content,
                "human": p.reply,
                **{name: m.replies[n] for name, m in measured.items()},
            }
            for n, p in enumerate(prompts)
        ],
    }
    evaluation["gate"] = judge(evaluation, gate or Gate())
    write_report(run / "eval.json", evaluation, render_html(evaluation))
    return evaluation


def finished(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Return run.json and result.json of a finished run.

    Raises:
        MerchantError: it is not finished, or its result was changed since.
    """
    try:
        head = json.loads((run / "run.json").read_text(encoding="utf-8"))
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MerchantError(
            f"{str(run)!r} is no finished run: `python -m finetune train --run {run}` (with --resume) ends it"
        ) from None
    if folder_hash(run / "result") != result["sha256"]:
        raise MerchantError(f"{run / 'result'}: changed since the run ended (sha256 differs); train again")
    return head, result


@dataclass(frozen=True)
class Prompt:
    """What is asked of each contestant, and what the human replied."""

    messages: tuple[Message, ...]
    reply: str
    grounded: bool


def _held_out(
    run: Path, config: RunConfig, tokenizer: HfTokenizer, search: Search | None, store: PromptStore
) -> list[Conversation]:
    path = run / "conversations-test.jsonl"
    if not path.exists():
        write_conversations(path, "test", load_data(config.data), config, tokenizer, search, store, Counter())
    return list(read_conversations(path))


def read_held_out(run: Path) -> list[Conversation]:
    """Return the held-out conversations that `evaluate` measured `run` on."""
    return list(read_conversations(run / "conversations-test.jsonl"))


def labelled(held_out: Sequence[Conversation], tokenizer: HfTokenizer, config: RunConfig) -> list[Example]:
    examples: list[Example] = []
    for conversation in held_out:
        try:
            examples += label_conversation(conversation.messages, conversation.learn, tokenizer, config.max_tokens)
        except ExampleTooLong:
            continue
    return [e for e in examples if e.n_learned]


def first_replies(held_out: Sequence[Conversation]) -> list[Prompt]:
    """The first learned reply of each conversation: every conversation counts once, short or long."""
    found = []
    for c in held_out:
        n = next((i for i, learned in enumerate(c.learn) if learned), None)
        if n is not None:
            found.append(Prompt(c.messages[:n], c.messages[n].content, c.kind != "dialogue"))
    return found


# --- In this process -------------------------------------------------------------------------------------------------


def measure(
    contestant: Contestant, config: RunConfig, tokenizer: HfTokenizer, examples: Sequence[Example],
    prompts: Sequence[Prompt], max_new_tokens: int, forbidden: Sequence[str],
) -> Measured:  # fmt: skip
    model = load_for_evaluation(contestant.base, contestant.adapter, bf16=config.bf16)
    n_virtual = virtual_tokens(config) if contestant.adapter is not None else 0
    losses = per_example_losses(model, examples, config, n_virtual)
    replies, n_tokens, seconds = [], 0, 0.0
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(tokenizer.render(prompt.messages, generation_prompt=True))])
        ids = ids[:, -(4096 - max_new_tokens) :]
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=sorted(tokenizer.end_ids),
                pad_token_id=tokenizer.inner.pad_token_id,
            )
        seconds += time.perf_counter() - began
        new = out[0, ids.shape[1] :].tolist()
        n_tokens += len(new)
        replies.append(tokenizer.inner.decode(new, skip_special_tokens=True).strip())
    speed = n_tokens / seconds if seconds else 0.0
    del model
    return Measured(losses, replies, speed, _figures(losses, replies, prompts, speed, forbidden))


def per_example_losses(
    model: Any, examples: Sequence[Example], config: RunConfig, n_virtual: int = 0
) -> list[tuple[float, int]]:
    """Return (summed loss, learned tokens) of each example."""
    found = []
    with torch.no_grad():
        for n in range(len(examples)):
            inputs = row_inputs(examples, (n,), packed=False)
            found.append((float(row_loss(model, inputs, config, n_virtual)), len(inputs.targets)))
    return found


def _figures(
    losses: Sequence[tuple[float, int]], replies: Sequence[str], prompts: Sequence[Prompt], speed: float,
    forbidden: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    total, n = sum(x[0] for x in losses), sum(x[1] for x in losses)
    humans = [p.reply for p in prompts]
    questions = [p.messages[-1].content for p in prompts]
    by_lang: dict[str, list[int]] = {}
    for i, human in enumerate(humans):
        by_lang.setdefault("zh" if re.search(r"[\u4e00-\u9fff]", human) else "en", []).append(i)
    said = [_is_forbidden(r, p, forbidden) for r, p in zip(replies, prompts, strict=True)]
    lengths = (statistics.median(map(len, replies)), statistics.median(map(len, humans))) if replies else (0, 0)
    return {
        "perplexity": round(float(torch.tensor(total / n).exp()), 4) if n else None,
        "n_learned": n,
        "bleu": {
            lang: round(bleu([replies[i] for i in at], [humans[i] for i in at], lang), 2)
            for lang, at in by_lang.items()
        },
        "chrf": round(chrf(replies, humans), 2) if replies else None,
        "rouge_l": round(statistics.fmean(rouge_l(r, h) for r, h in zip(replies, humans, strict=True)), 4)
        if replies
        else None,
        "language_match": round(
            statistics.fmean(same_language(r, _bare(q)) for r, q in zip(replies, questions, strict=True)), 4
        )
        if replies
        else None,
        "length_median": lengths[0],
        "length_ratio": round(lengths[0] / lengths[1], 3) if lengths[1] else None,
        "n_forbidden": sum(said),
        "ungrounded_figures": _ungrounded(replies, prompts),
        "tokens_per_s": round(speed, 2),
    }


def _bare(question: str) -> str:
    """Return the visitor's words of a rendered question: the last line, behind the instruction."""
    return re.split(r"请根据以上资料，用中文简短回答：|answer briefly in English: ", question)[-1]


def _is_forbidden(reply: str, prompt: Prompt, forbidden: Sequence[str]) -> bool:
    """Whether a reply makes up a placeholder, leaks a control token, or says what the merchant forbids."""
    seen = "\n".join(m.content for m in prompt.messages)
    made_up = any(m.group() not in seen for m in PLACEHOLDER.finditer(reply))
    return made_up or bool(_CONTROL.search(reply)) or any(w.lower() in reply.lower() for w in forbidden)


def _ungrounded(replies: Sequence[str], prompts: Sequence[Prompt]) -> float | None:
    """Return the share of replies to grounded prompts with a figure that stands nowhere in the prompt."""
    pairs = [(r, p) for r, p in zip(replies, prompts, strict=True) if p.grounded]
    if not pairs:
        return None
    wrong = [not figures_of(r) <= figures_of("\n".join(m.content for m in p.messages)) for r, p in pairs]
    return round(statistics.fmean(wrong), 4)


def _compare(new: Measured, old: Measured, prompts: Sequence[Prompt]) -> dict[str, Any]:
    humans = [p.reply for p in prompts]
    found: dict[str, Any] = {}
    if len(new.losses) == len(old.losses):
        found["perplexity_change"] = asdict(paired_perplexity(new.losses, old.losses))
    for name, score in (("rouge_l_gain", rouge_l), ("chrf_gain", sentence_chrf)):
        found[name] = asdict(
            paired_difference(
                [score(r, h) for r, h in zip(new.replies, humans, strict=True)],
                [score(r, h) for r, h in zip(old.replies, humans, strict=True)],
            )
        )
    return found


# --- Through servers -------------------------------------------------------------------------------------------------


def _run_all_cases(
    contestants: Sequence[Contestant], files: Sequence[CaseFile], urls: Mapping[tuple[str, str], str], run: Path, *,
    serve: bool, direct: bool, concurrency: int, tell: Tell,
) -> dict[str, Any]:  # fmt: skip
    """Return eval.json's `cases`: every file by every contestant that has a server; one server runs at a time."""
    results: dict[str, dict[str, Any]] = {file.label: {} for file in files}

    def ask(contestant: Contestant, file: CaseFile, url: str) -> None:
        tell(f"{contestant.name}: cases {file.label} at {url}")
        results[file.label][contestant.name] = run_cases(
            contestant.name, file, url, direct=direct, concurrency=concurrency
        )

    for contestant in contestants:
        left = []
        for file in files:
            if (url := urls.get((contestant.name, file.label))) is not None:
                ask(contestant, file, url)
            else:
                left.append(file)
        if not serve or not left:
            continue
        with tempfile.TemporaryDirectory(dir=run, prefix=".serving-") as temporary:
            model = contestant.base
            if contestant.adapter is not None:
                model = Path(temporary) / contestant.name
                merge(contestant.base, contestant.adapter, model)
            for store in dict.fromkeys(file.store for file in left):
                tell(f"{contestant.name}: starting a server of {store or 'the demo store'}")
                folder = Path(temporary) / f"server-{len(list(Path(temporary).iterdir()))}"
                folder.mkdir()
                with served(contestant.name, model, store, folder, direct=direct) as url:
                    for file in left:
                        if file.store == store:
                            ask(contestant, file, url)
    for label, found in results.items():
        stamps = {n: (r["figures"]["release"] or {}).get("model") for n, r in found.items() if (n, label) in urls}
        same = [n for n, stamp in stamps.items() if stamp == stamps.get("candidate")]
        if len(same) > 1:
            raise MerchantError(
                f"--url: the servers of {' and '.join(same)} answer with one model, {stamps[same[0]]!r}"
            )
    return {
        file.label: report_cases(file, results[file.label], direct=direct, concurrency=concurrency) for file in files
    }
