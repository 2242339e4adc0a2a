"""
A model that names the class of a text: the catalog's trunk, one state of each text, a linear layer over the labels.

What is saved is transformers' and peft's own form of a sequence classifier, so either loads it. Rows are packed as those
of dialogues are; the state read is the last token's or the mean. With method "head" the trunk is frozen, so each text's
state is computed once, in rows that do not depend on the seed, and kept.

Knows no file of texts (finetune/labelled.py) and no figure of a whole evaluation (finetune/classify.py).
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bot.catalog import resolve_model
from finetune.config import RunConfig
from finetune.examples import IGNORE, Example, Row
from finetune.modeling import HfTokenizer, autocast, load_base, row_inputs, with_adapter

SETTINGS = "classifier.json"  # in a result: what its weights do not say


def class_example(text: str, label: int, tokenizer: HfTokenizer, max_tokens: int) -> Example:
    """
    Return a text with its class as what follows it, the one thing learned. A long text loses its end.

    Tokenised as transformers' pipeline and vLLM's classifiers do, without a chat template.
    """
    ids = list(tokenizer.inner(text)["input_ids"])[:max_tokens]
    return Example(tuple(ids), (*[IGNORE] * len(ids), label))  # a label more than tokens: nothing comes behind it


def class_weights(labels: Sequence[int], n_labels: int, kind: str) -> torch.Tensor | None:
    """Return what an example of each class weighs, their mean over `labels` one; None where all weigh the same."""
    if kind == "none":
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=n_labels).clamp(min=1)
    return len(labels) / (n_labels * counts.float())


def f1_macro(confusion: torch.Tensor) -> float:
    """Return the unweighted mean F1 of the classes that occur; `confusion[i, j]`: texts of class i taken for j."""
    right, of_class, taken = confusion.diag(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * right / (of_class + taken).clamp(min=1)
    return float(f1[of_class > 0].mean()) if bool((of_class > 0).any()) else 0.0


@dataclass(frozen=True)
class TextRow:
    """A row of texts: their tokens or, where the trunk is frozen and has read them, their states."""

    tokens: Any | None  # finetune.modeling.Inputs
    states: torch.Tensor | None  # (n_texts, hidden)
    targets: torch.Tensor  # (n_texts,)
    n_tokens: int

    @property
    def segments(self) -> tuple[int, ...] | None:
        return self.tokens.segments if self.tokens is not None else None


class Classification:
    """Cross-entropy of a text's class, weighted by class where asked for."""

    def __init__(
        self, config: RunConfig, examples: Mapping[str, Sequence[Example]], labels: Sequence[str], pad_id: int
    ) -> None:
        self.config, self.examples, self.labels, self.pad_id = config, examples, labels, pad_id
        self.lengths = {split: [len(e.input_ids) for e in found] for split, found in examples.items()}
        self.n_learned = {split: [1] * len(found) for split, found in examples.items()}
        self.reads_once = config.method == "head"
        self.weights = class_weights([e.labels[-1] for e in examples["train"]], len(labels), config.class_weights)
        self._states: dict[str, torch.Tensor] = {}

    def read_all(self, model: Any, device: str, tell: Callable[[int, int], None]) -> None:
        """Compute the state of every text with the frozen trunk. Blocks as long as one epoch's forward passes."""
        n_all, n_done = sum(map(len, self.examples.values())), 0
        model.eval()
        for split, found in self.examples.items():
            states: list[torch.Tensor | None] = [None] * len(found)
            with torch.no_grad():
                for row in rows_of(self.lengths[split], self.config):
                    inputs = row_inputs(found, row, packed=self.config.packs, device=device, pad_id=self.pad_id)
                    for n, state in zip(row, pooled(model, inputs, self.config), strict=True):
                        states[n] = state
                    n_done += len(row)
                    tell(n_done, n_all)
            self._states[split] = torch.stack([s for s in states if s is not None]) if states else torch.empty(0)

    def inputs(self, split: str, row: Row, device: str) -> TextRow:
        found = self.examples[split]
        n_tokens = sum(self.lengths[split][n] for n in row)
        if split in self._states:
            targets = torch.tensor([found[n].labels[-1] for n in row], device=device)
            return TextRow(None, self._states[split][list(row)], targets, n_tokens)
        tokens = row_inputs(found, row, packed=self.config.packs, device=device, pad_id=self.pad_id)
        return TextRow(tokens, None, tokens.targets, n_tokens)

    def _logits(self, model: Any, inputs: TextRow) -> torch.Tensor:
        states = inputs.states if inputs.tokens is None else pooled(model, inputs.tokens, self.config)
        logits: torch.Tensor = _inner(model).score(states)
        return logits

    def loss(self, model: Any, inputs: TextRow) -> torch.Tensor:
        weights = self.weights.to(inputs.targets.device) if self.weights is not None else None
        return F.cross_entropy(self._logits(model, inputs), inputs.targets, weight=weights, reduction="sum")

    def sums(self, model: Any, inputs: TextRow) -> torch.Tensor:
        # Not weighted: what is measured is the texts as they come.
        logits, n_labels = self._logits(model, inputs), len(self.labels)
        loss = F.cross_entropy(logits, inputs.targets, reduction="sum")
        confusion = torch.zeros(n_labels, n_labels, dtype=torch.float64)
        for true, taken in zip(inputs.targets.tolist(), logits.argmax(1).tolist(), strict=True):
            confusion[true, taken] += 1
        return torch.cat([torch.tensor([float(loss), len(inputs.targets)], dtype=torch.float64), confusion.flatten()])

    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        confusion = sums[2:].reshape(len(self.labels), -1)
        return {
            "loss": float(sums[0] / sums[1]),
            "accuracy": float(confusion.diag().sum() / sums[1]),
            "f1_macro": f1_macro(confusion),
        }


def rows_of(lengths: Sequence[int], config: RunConfig) -> Iterator[Row]:
    """Yield rows of texts of like length, the longest first: the same for the same lengths, whatever the seed."""
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    row: list[int] = []
    for n in order:
        if row and (len(row) + 1) * lengths[row[0]] > config.row_tokens:
            yield tuple(row)
            row = []
        row.append(n)
    if row:
        yield tuple(row)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pooled(model: Any, inputs: Any, config: RunConfig) -> torch.Tensor:
    """Return (n_texts, hidden), float32: the state of each text of a row, in the order of its examples."""
    inner = _inner(model)
    trunk = getattr(inner, inner.base_model_prefix)
    arguments: dict[str, Any] = {"input_ids": inputs.input_ids, "use_cache": False}
    if inputs.segments is not None:
        arguments |= {"position_ids": inputs.position_ids, "segments": inputs.segments}
    else:
        arguments["attention_mask"] = inputs.attention_mask
    with autocast(config, inputs.input_ids.device.type):
        hidden = trunk(**arguments).last_hidden_state  # (1, T, hidden) packed, (n_texts, W, hidden) padded
    if config.pool == "last":
        return hidden[inputs.at].float()
    if inputs.segments is not None:
        return torch.stack([part.float().mean(0) for part in hidden[0].split(list(inputs.segments))])
    mask = inputs.attention_mask[:, :, None]
    return (hidden.float() * mask).sum(1) / mask.sum(1)


# --- A finished run --------------------------------------------------------------------------------------------------


class Classifier:
    """The result of a run, ready to name classes."""

    def __init__(self, model: Any, tokenizer: HfTokenizer, config: RunConfig, labels: Sequence[str]) -> None:
        self.model, self.tokenizer, self.config, self.labels = model, tokenizer, config, list(labels)

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """Return (n_texts, n_labels), each line adding up to one. Blocks; long texts lose their end."""
        examples = [class_example(t, 0, self.tokenizer, self.config.max_tokens) for t in texts]
        found = torch.empty(len(texts), len(self.labels))
        with torch.no_grad():
            for row in rows_of([len(e.input_ids) for e in examples], self.config):
                pad_id = int(self.tokenizer.inner.pad_token_id or 0)
                inputs = row_inputs(examples, row, packed=self.config.packs, pad_id=pad_id)
                logits = _inner(self.model).score(pooled(self.model, inputs, self.config))
                found[list(row)] = logits.softmax(1)
        return found


def load_classifier(run: Path, head: Mapping[str, Any], result: Mapping[str, Any]) -> Classifier:
    """Return the classifier of a finished run, whose run.json and result.json are given."""
    from safetensors.torch import load_file

    config = RunConfig(**head["config"])
    base = resolve_model(head["base"])
    labels = json.loads((run / "result" / SETTINGS).read_text(encoding="utf-8"))["labels"]
    whole = result["kind"] == "model"
    model = load_base(run / "result" if whole else base, config, labels)
    if result["kind"] == "head":
        model.load_state_dict(load_file(run / "result" / "head.safetensors"), strict=False)
    elif not whole:
        model = with_adapter(model, run / "result")
    return Classifier(model.eval(), HfTokenizer(base, chat=False), config, labels)
