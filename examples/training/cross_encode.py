"""
Trains the shipped cross-encoder on the stores of this folder: does this passage answer this question?

The upper layers of e5, each weight of them, over what the lower ones made of question and passage apart; the lower ones
stay as they are. It learns from the same questions and passages as the reranker (rerank.py), which is quicker and is
asked first: every question and what the search puts first for it, in the same two losses.

    make default-reranker                       # rerank.py and this, on all stores but KEPT_OUT; two hours for this one
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

from rerank import Asked, Texts, batch_loss, batches, fit, options_of, read_stores  # noqa: E402
from tune import Layer  # noqa: E402

from retrieval.bilingual import BilingualEmbedder  # noqa: E402
from retrieval.cross_encoder import EPS, FROM_LAYER, MAX_PASSAGE_TOKENS, N_HEADS, SHIPPED, rounded  # noqa: E402
from retrieval.e5_file import E5File, installed_path  # noqa: E402
from retrieval.encoders import load_moves  # noqa: E402

EPOCHS = 4
BATCH = 16  # questions
STRANGERS_ASKED = 0.25  # share of the questions of other stores that an epoch asks; they are the easy ones
N_SHOWN = 4  # candidates a question: what answers it, and of the others the first or, as often, any
RATE, HEAD_RATE = 1.5e-4, 1e-3  # of the layers, which know a language already, and of what is new
DROPOUT = 0.1  # in the head alone: in the layers it takes a seventh of a step and bought nothing
STEPS = 6 / 127  # of a value's spread in one step of its 8 bits: nothing lies further out


class Network(nn.Module):
    """Token vectors of questions and passages after layer FROM_LAYER, with what is real in each -> logits (n,)."""

    def __init__(self) -> None:
        super().__init__()
        file, moves = E5File(installed_path()), load_moves()[0]["e5"]
        width, parts = file.dim, ("q", "k", "v", "ao", "fi", "fo")
        self.layers = nn.ModuleList(
            Layer(width, file.n_inner, EPS, nn.Linear) for _ in range(FROM_LAYER, file.n_layers)
        )
        for n, layer in enumerate(self.layers, start=FROM_LAYER):
            for part in (*parts, "aln", "oln"):
                name, into = f"l{n}.{part}", getattr(layer, part)
                n_in = file.n_inner if part == "fo" else width
                weight = file.matrix(f"{name}.w", n_in) if part in parts else file.floats(f"{name}.w")
                into.weight.data = torch.from_numpy(moves.moved(f"{name}.w", weight))
                into.bias.data = torch.from_numpy(moves.moved(f"{name}.b", file.floats(f"{name}.b")))
        self.kind = nn.Parameter(torch.zeros(2, width))  # what tells a question's token from a passage's
        self.norm, self.inner, self.outer = nn.LayerNorm(4 * width), nn.Linear(4 * width, width), nn.Linear(width, 1)
        self.drop = nn.Dropout(DROPOUT)

    def forward(
        self, questions: Tensor, asked_real: Tensor, which: Tensor, passages: Tensor, theirs_real: Tensor
    ) -> Tensor:
        """`which` (n,) is the question that each of the passages (n, longest, dim) is read beside."""
        n = questions.shape[1]
        x = torch.cat([questions[which].float() + self.kind[0], passages.float() + self.kind[1]], 1)
        real = torch.cat([asked_real[which], theirs_real], 1)
        absent = torch.zeros(real.shape).masked_fill(~real, -1e9)[:, None, None]
        for layer in self.layers:
            x = layer(x, absent, N_HEADS)
        x, shown = x.float(), real.float()[:, :, None]
        question = (x[:, :n] * shown[:, :n]).sum(1) / shown[:, :n].sum(1)
        passage = (x[:, n:] * shown[:, n:]).sum(1) / shown[:, n:].sum(1)
        pooled = self.norm(torch.cat([x[:, 0], question, passage, question * passage], 1))
        return self.outer(self.drop(functional.gelu(self.inner(pooled))))[:, 0].float()  # type: ignore[no-any-return]

    def tensors(self, mean: Tensor, spread: Tensor) -> dict[str, Any]:
        """Return what is shipped, by name; `mean` and `spread` (dim,) are of passages' token vectors."""
        found: dict[str, Any] = {"mean": mean.numpy(), "step": (spread * STEPS).numpy()}
        for name, tensor in self.state_dict().items():
            values = tensor.float().numpy()
            if name.endswith(".weight") and values.ndim == 2 and name != "outer.weight":
                found[name], found[f"{name.removesuffix('weight')}scale"] = rounded(values)
            else:
                found[name] = values
        return {f"e5/{name}": np.ascontiguousarray(values) for name, values in found.items()}


def some(one: Asked, chance: random.Random) -> Asked:
    """Return the question with N_SHOWN of its candidates."""
    answers, others = ([c for c in one.candidates if c[2] is yes] for yes in (True, False))
    if chance.random() < 0.5:
        chance.shuffle(others)
    return replace(one, candidates=tuple((answers[:1] + others)[:N_SHOWN]))


def main() -> None:
    parser = options_of("Train the shipped cross-encoder on the stores of this folder.", SHIPPED)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = Texts(["middle"], MAX_PASSAGE_TOKENS)
    read_stores(texts, options.stores, BilingualEmbedder(options.threads, rerankers=None), options.cache)
    sample = torch.cat(texts.passages["middle"][::9]).float()
    chance = random.Random(0)
    torch.manual_seed(0)
    network, asked = Network(), texts.of("middle")
    planned = [
        batch
        for _ in range(options.epochs)
        for batch in batches(asked, texts, "middle", chance, BATCH, STRANGERS_ASKED)
    ]
    head = [parameter for name, parameter in network.named_parameters() if not name.startswith("layers.")]

    def loss(batch: list[Asked]) -> Tensor:
        return batch_loss(network, [some(one, chance) for one in batch], texts, "middle", chance)

    fit(network, [(network.layers.parameters(), RATE), (head, HEAD_RATE)], planned, loss)
    tensors = network.tensors(sample.mean(0), sample.std(0))
    save_file(dict(sorted(tensors.items())), options.out, {"encoders": load_moves()[1]})


if __name__ == "__main__":
    main()
