"""
Trains what finds the question in a message: which of its tokens are talk ("hi, I'm Emily", "在线等")?

A small network over what e5 made of each token after layer FROM_LAYER, which stays as it is. It learns from the
messages in `around.jsonl`, written for this and cut by hand into what comes before the question, the question with
every circumstance that matters, and what comes after; and from the questions of the stores beside it, alone, two
together, and with beginnings and ends of those messages around them.

    make default-gist                           # on all stores but KEPT_OUT; ten minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from retrieval.calibrate import KEPT_OUT  # noqa: E402
from retrieval.e5 import E5  # noqa: E402
from retrieval.encoders import load_moves  # noqa: E402
from retrieval.gist import SHIPPED  # noqa: E402

WIDTH = 128
N_LAYERS, BESIDE = 4, 7  # what each token learns of the BESIDE around it, so many times
BATCH = 64  # messages
LIKE = 40  # batches whose messages are sorted by length, so that little of a batch is padding
EPOCHS = 6
RATE = 2e-3
DROPOUT = 0.3
SHORT = 8  # tokens; a shorter message counts less
TEXTS = 256  # that go through the encoder at once
MEAN_OF = 300  # steps, about, that the shipped weights are the mean of


@dataclass(frozen=True, slots=True)
class Message:
    """A message in three parts: the middle one is what is to be searched for."""

    before: str
    core: str
    after: str
    lang: str

    @property
    def text(self) -> str:
        return self.before + self.core + self.after


class Network(nn.Module):
    """Token vectors (n_texts, longest, dim), with what is real in them -> how surely each is part of the question."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(dim), nn.Linear(dim, WIDTH), nn.Linear(WIDTH, 1)
        self.beside = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, BESIDE, padding=BESIDE // 2) for _ in range(N_LAYERS))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        x = functional.gelu(self.inner(self.drop(self.norm(tokens.float()))), approximate="tanh")
        for layer in self.beside:
            seen = self.drop(x * real[:, :, None]).transpose(1, 2)
            x = x + functional.gelu(layer(seen).transpose(1, 2), approximate="tanh")
        return self.outer(self.drop(x))[:, :, 0]  # type: ignore[no-any-return]


def written(path: Path) -> list[Message]:
    """Return the messages of `path`."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [Message(row["pre"], row["core"], row["post"], row["lang"]) for row in rows]


def questions(chance: random.Random) -> dict[str, list[str]]:
    """Return the questions to all stores but KEPT_OUT and what goes on from them, by language, shuffled."""
    found: dict[str, list[str]] = {"zh": [], "en": []}
    for folder in sorted(path.parent for path in HERE.glob("*/questions.jsonl")):
        if folder.name in KEPT_OUT:
            continue
        for line in (folder / "questions.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            found[row["lang"]].append(row["text"])
        follow_ups = folder / "followups.jsonl"
        for line in follow_ups.read_text("utf-8").splitlines() if follow_ups.exists() else ():
            row = json.loads(line)
            found[row["lang"]].append(row["turns"][-1])
    for texts in found.values():
        chance.shuffle(texts)
    return found


def around(question: str, lang: str, model: Message, chance: random.Random) -> Message:
    """Return `question` with what stands around the question in `model`."""
    before, after = model.before, model.after
    drawn = chance.random()
    if before and after and drawn < 0.3:
        before, after = (before, "") if drawn < 0.2 else ("", after)
    if before and chance.random() < 0.2:  # as many type: no punctuation, or another
        before = re.sub(r"[\s,，.。!！~:：]+$", "", before) + chance.choice(
            (" ", "，", "") if lang == "zh" else (" ", ", ", ". ")
        )
    runs_in = lang == "en" and before and (model.core[:1].islower() or not before.rstrip().endswith((".", "!", "?")))
    if runs_in and chance.random() < 0.8 and not question.startswith(("I ", "I'")):
        question = question[:1].lower() + question[1:]
    if after and chance.random() < 0.3:
        question = question.rstrip("?？。.!！")
    if after and lang == "en" and question[-1:].isalnum() and after[:1].isalnum():
        after = f" {after}"
    return Message(before, question, after, lang)


def messages(models: Sequence[Message], chance: random.Random) -> list[Message]:
    """Return what is learned from: the written messages, and the stores' questions alone, in twos and talked around."""
    found = list(models) * 2
    for lang, texts in questions(chance).items():
        talk = [model for model in models if model.lang == lang and (model.before or model.after)]
        for n, text in enumerate(texts):
            drawn = chance.random()
            if drawn < 0.1:
                between = chance.choice((" ", "，", "", "？") if lang == "zh" else (" ", " and ", ". "))
                text = f"{text}{between}{texts[-n - 1]}"
            if drawn < 0.35:
                found.append(Message("", text, "", lang))
            else:
                found.append(around(text, lang, chance.choice(talk), chance))
        found += [Message(model.before + model.after, "", "", lang) for model in talk[::4]]
    return sorted(found, key=lambda message: len(message.text))  # read in batches of like length


def labelled(found: Sequence[Message], encoder: E5) -> tuple[list[Tensor], list[Tensor]]:
    """Return of each message its tokens' vectors (n, dim), and for each whether it is of the question (n,)."""
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, len(found), TEXTS):
        some = found[start : start + TEXTS]
        read = encoder.read([one.text for one in some], as_query=True)[2]
        for message, middle in zip(some, read, strict=True):
            places = encoder.places(message.text)
            ends = np.array([*places[1:], len(message.text)])
            begin, end = len(message.before), len(message.before) + len(message.core)
            # By its last character, since the space before a piece is the piece's.
            inside = (ends > begin) & (ends <= end) if message.core else np.zeros(len(places), bool)
            tokens.append(torch.from_numpy(encoder.own(middle)).bfloat16())
            labels.append(torch.from_numpy(inside).float())
        print(f"\r{len(tokens)} of {len(found)} messages read", end="", file=sys.stderr)
    print(file=sys.stderr)
    return tokens, labels


def fit(tokens: list[Tensor], labels: list[Tensor], epochs: int, chance: random.Random) -> Network:
    """Return the mean network of the last steps."""
    network = Network(tokens[0].shape[1])
    plan: list[list[int]] = []
    for _ in range(epochs):
        order = chance.sample(range(len(tokens)), len(tokens))
        for start in range(0, len(order), LIKE * BATCH):
            alike = sorted(order[start : start + LIKE * BATCH], key=lambda n: len(tokens[n]))
            found = [alike[at : at + BATCH] for at in range(0, len(alike), BATCH)]
            plan += chance.sample(found, len(found))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=len(plan), pct_start=0.1)
    mean = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for step, batch in enumerate(plan):
        x, y = (nn.utils.rnn.pad_sequence([rows[n] for n in batch], True) for rows in (tokens, labels))
        real = nn.utils.rnn.pad_sequence([torch.ones(len(labels[n])) for n in batch], True)
        weight = real / real.sum(1, keepdim=True).clamp(min=SHORT)  # each message counts alike, however long
        found_loss = functional.binary_cross_entropy_with_logits(network(x, real), y, weight, reduction="sum")
        loss = found_loss / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        share = min(1 - 1 / MEAN_OF, step / (step + 10))
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                mean[name].mul_(share).add_(tensor, alpha=1 - share)
        if step % 200 == 0 or step == len(plan) - 1:
            print(f"step {step} of {len(plan)}: loss {loss.item():.4f}", file=sys.stderr)
    network.load_state_dict(mean)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train what finds the question in a message.")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = E5(options.threads, load_moves()[0]["e5"])
    tokens, labels = labelled(messages(written(HERE / "around.jsonl"), random.Random(0)), encoder)
    torch.manual_seed(0)
    network = fit(tokens, labels, options.epochs, random.Random(0))
    save_file(
        {f"e5/{name}": t.numpy().astype(np.float16) for name, t in network.state_dict().items()},
        options.out,
        {"encoders": load_moves()[1]},
    )


if __name__ == "__main__":
    main()
