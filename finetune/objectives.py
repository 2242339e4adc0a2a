"""
`Objective`: what a run minimises, apart from how it is run; and the one of dialogues, the next token of a reply.

The loop (finetune/train.py) knows rows, steps, seeds and files. What stands in a row, what its loss is and what is said of
a validation is here, and for classifiers in finetune/classifier.py.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from finetune.config import RunConfig
from finetune.examples import Example, Row
from finetune.modeling import row_inputs, row_logits, row_loss, virtual_tokens


class RowInputs(Protocol):
    """A row's tensors, as far as the loop looks."""

    segments: tuple[int, ...] | None  # packed: the lengths of the examples
    targets: torch.Tensor  # (n_learned,)
    n_tokens: int


class Objective(Protocol):
    """What is learned of the examples of "train" and measured on those of "valid"."""

    @property
    def lengths(self) -> Mapping[str, Sequence[int]]:
        """Tokens of each example, by split."""

    @property
    def n_learned(self) -> Mapping[str, Sequence[int]]:
        """Of them, those that are targets."""

    @property
    def reads_once(self) -> bool:
        """Whether the trunk is frozen and its states are kept: later epochs cost nothing."""

    def inputs(self, split: str, row: Row, device: str) -> Any:
        """Return the RowInputs of a row."""

    def loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """Return the loss summed over a row's targets, float32."""

    def sums(self, model: Any, inputs: Any) -> torch.Tensor:
        """Return what a validation adds up over rows, float64: the summed loss, the number of targets, and its own."""

    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        """Return what those sums say: "loss", a target's mean, and more that is worth a curve."""


class LanguageModel:
    """Cross-entropy of the learned tokens."""

    reads_once = False

    def __init__(self, config: RunConfig, examples: Mapping[str, Sequence[Example]], pad_id: int) -> None:
        self.config, self.examples, self.pad_id = config, examples, pad_id
        self.lengths = {split: [len(e.input_ids) for e in found] for split, found in examples.items()}
        self.n_learned = {split: [e.n_learned for e in found] for split, found in examples.items()}
        self.n_virtual = virtual_tokens(config)

    def inputs(self, split: str, row: Row, device: str) -> Any:
        return row_inputs(self.examples[split], row, packed=self.config.packs, device=device, pad_id=self.pad_id)

    def loss(self, model: Any, inputs: Any) -> torch.Tensor:
        return row_loss(model, inputs, self.config, self.n_virtual)

    def sums(self, model: Any, inputs: Any) -> torch.Tensor:
        logits = row_logits(model, inputs, self.config, self.n_virtual)
        loss = F.cross_entropy(logits, inputs.targets, reduction="sum")
        n_right = (logits.argmax(-1) == inputs.targets).sum()
        return torch.tensor([float(loss), len(inputs.targets), int(n_right)], dtype=torch.float64)

    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        loss = float(sums[0] / sums[1])
        return {"loss": loss, "perplexity": math.exp(min(loss, 50)), "accuracy": float(sums[2] / sums[1])}
