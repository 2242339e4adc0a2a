"""
Trains the shipped rerankers on the stores of this folder: does this passage answer this question?

One for each encoder, over its last layer's token vectors, which stay as they are: the network of retrieval/reranker.py
in torch. Learned from are every question and the passages that the search puts first for it: which of them answers
(cross entropy among them) and whether one does (each for itself), so that a near miss ("can I rent one?") is a question
none of whose passages may be liked. So are some questions of the other stores, which no passage answers. What is
shipped is the mean of the weights over the last steps (arXiv 1803.05407).

    make default-reranker                       # on all stores but KEPT_OUT; forty minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from retrieval.bilingual import BilingualEmbedder  # noqa: E402
from retrieval.calibrate import KEPT_OUT, training_store  # noqa: E402
from retrieval.confidence import Calibration, load_calibration  # noqa: E402
from retrieval.embedder import VectorCache  # noqa: E402
from retrieval.encoders import load_moves  # noqa: E402
from retrieval.evaluate import Question  # noqa: E402
from retrieval.hybrid import HybridRetriever  # noqa: E402
from retrieval.index import BODY_CHARS, body_of, build_index  # noqa: E402
from retrieval.load import twin_key  # noqa: E402
from retrieval.reranker import MAX_PASSAGE_TOKENS, MAX_QUERY_TOKENS, N_HEADS, SCALE, SHIPPED  # noqa: E402
from retrieval.words import detect_lang  # noqa: E402

WIDTH = 128
N_BLOCKS = 2
N_CANDIDATES = 6  # passages a question, those that answer it among them
BATCH = 24  # questions
EPOCHS = 4
RATE = 1e-3
WARM_UP = 100  # steps
MEAN_OF = 150  # steps, about, that the shipped weights are the mean of
DROPOUT = 0.15
WORDS_DROPPED = 0.1  # share of a question's tokens that the training does not show
OWN_LANG = 0.7  # share of the passages shown in the question's language; the others are their translations
WITHOUT_WORDINGS = 0.2  # share of the questions that are shown FAQs without their wordings, as some stores have them
N_STRANGERS = 60  # questions of other stores that each is asked
STRANGERS_ASKED = 0.5  # share of them that an epoch asks
MAX_TOKENS = 96  # of a passage, in training
LIKE = 40  # batches whose questions are sorted by length, so that little of a batch is padding
TEXTS = 256  # that go through the encoders at once

Rows = list[Tensor]  # token vectors of texts, (n_tokens, dim) each, bfloat16


@dataclass(frozen=True)
class Asked:
    """A question, and its candidates: the passage in its language, its translation, and whether they answer it."""

    number: int
    candidates: tuple[tuple[int, int, bool], ...]
    stranger: bool  # a question of another store


class Block(nn.Module):
    """The question's tokens look at the passage's."""

    def __init__(self) -> None:
        super().__init__()
        self.question_norm, self.inner_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, theirs: Tensor, absent: Tensor) -> Tensor:
        def heads(tokens: Tensor) -> Tensor:
            return tokens.view(*tokens.shape[:2], N_HEADS, -1).transpose(1, 2)

        # By hand: for texts this short torch's own attention takes most of a step on a CPU.
        asked = heads(self.query(self.question_norm(x))) * (WIDTH // N_HEADS) ** -0.5
        scores = asked @ heads(self.key(theirs)).transpose(2, 3) + absent
        seen = scores.softmax(3).to(asked.dtype) @ heads(self.value(theirs))
        x = x + self.drop(self.out(seen.transpose(1, 2).reshape(x.shape)))
        inner = functional.gelu(self.inner(self.inner_norm(x)), approximate="tanh")
        return x + self.drop(self.outer(inner))  # type: ignore[no-any-return]


class Network(nn.Module):
    """
    Token vectors of questions and passages, padded, with what is real in each -> logits (n,).

    The encoders' vectors share a direction and have a length of their own; both are taken out beforehand (`Texts`).
    """

    def __init__(self, mean: Tensor, length: Tensor) -> None:
        super().__init__()
        self.mean, self.length = mean, length
        self.question, self.passage = nn.Linear(len(mean), WIDTH), nn.Linear(len(mean), WIDTH)
        self.question_norm, self.passage_norm, self.norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.blocks = nn.ModuleList(Block() for _ in range(N_BLOCKS))
        self.inner, self.outer = nn.Linear(2 * WIDTH + 3, WIDTH), nn.Linear(WIDTH, 1)
        self.share = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(DROPOUT)

    def forward(
        self, questions: Tensor, asked_real: Tensor, which: Tensor, passages: Tensor, theirs_real: Tensor
    ) -> Tensor:
        """`which` (n,) is the question that each of the passages (n, longest, dim) is read beside."""
        ours, theirs, real = self.question(questions)[which], self.passage(passages), asked_real[which]
        near = functional.normalize(ours.float(), dim=-1) @ functional.normalize(theirs.float(), dim=-1).transpose(1, 2)
        near = near.masked_fill(~theirs_real[:, None], -1e9).amax(2)  # (n, n_tokens)
        n_real = real.sum(1)
        mean = (near * real).sum(1) / n_real
        # Of one token the root's slope would be infinite.
        spread = (((near - mean[:, None]).square() * real).sum(1) / n_real + 1e-6).sqrt()
        absent = torch.zeros(theirs_real.shape).masked_fill(~theirs_real, -1e9)[:, None, None]
        x, seen = self.question_norm(ours), self.passage_norm(theirs)
        for block in self.blocks:
            x = block(x, seen, absent)
        x = self.norm(x).float()
        pooled = [(x * real[:, :, None]).sum(1) / n_real[:, None], x.masked_fill(~real[:, :, None], -1e9).amax(1)]
        measured = torch.stack([mean, near.masked_fill(~real, 1e9).amin(1), spread], 1)
        inner = self.drop(functional.gelu(self.inner(torch.cat([*pooled, measured], 1)), approximate="tanh"))
        return self.outer(inner)[:, 0].float() + self.share * SCALE * mean  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Any]:
        """Return what is shipped, by name, float16: the first maps are of vectors as the encoder gives them."""
        found = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        for name in ("question", "passage"):
            found[f"{name}.weight"] /= self.length
            found[f"{name}.bias"] -= found[f"{name}.weight"] @ self.mean
        return {name: tensor.numpy().astype(np.float16) for name, tensor in found.items()}


class Texts:
    """Questions and passages of stores as token vectors, and what is asked of which."""

    def __init__(self, kinds: Sequence[str] = ("e5", "minilm"), longest: int = MAX_PASSAGE_TOKENS) -> None:
        """
        Of each passage so many token vectors as `longest` are kept.

        `kinds` are which: e5's, MiniLM's or, "middle", e5's that are read on together.
        """
        self.longest = longest
        self.questions: dict[str, Rows] = {kind: [] for kind in kinds}
        self.passages: dict[str, Rows] = {kind: [] for kind in kinds}
        self.asked: list[Asked] = []
        self.english: list[bool] = []  # of each question
        self.is_english: list[bool] = []  # of each passage
        self.bare: list[int] = []  # of each passage the one that is the same without its wordings, or itself

    def add(self, folder: Path, embedder: BilingualEmbedder, cache: VectorCache) -> None:
        """Read one store; what the search finds is searched without a reranker."""
        problem = training_store(folder)
        theirs = strangers(folder)
        asked = [*problem.questions, *(Question(text, frozenset()) for text in theirs)]
        n_questions, n_passages = len(self.english), len(self.is_english)
        texts = [one.text for one in asked]
        self._read(embedder, texts, self.questions, MAX_QUERY_TOKENS, as_query=True)
        bodies = [body_of(passage)[:BODY_CHARS] for passage in problem.passages]
        with_wordings = [n for n, passage in enumerate(problem.passages) if passage.questions]
        bare = [body_of(replace(problem.passages[n], questions=()))[:BODY_CHARS] for n in with_wordings]
        self._read(embedder, bodies + bare, self.passages, self.longest, as_query=False)
        self.english += [detect_lang(text) == "en" for text in texts]
        self.is_english += [detect_lang(text) == "en" for text in bodies + bare]
        places = list(range(len(bodies) + len(bare)))
        for place, n in enumerate(with_wordings, start=len(bodies)):
            places[n] = place
        self.bare += [n_passages + place for place in places]
        calibration = centred(embedder)
        index = build_index(problem.passages, embedder, cache, calibration=calibration)
        retriever = HybridRetriever(index, embedder, calibration)
        retriever.remember(texts, cache.embed(embedder, texts, as_query=True))
        versions: dict[str, list[int]] = {}
        for number, passage in enumerate(problem.passages):
            versions.setdefault(twin_key(passage), []).append(number)
        numbers = {passage.id: number for number, passage in enumerate(problem.passages)}
        for number, question in enumerate(asked):
            lang = detect_lang(question.text)
            found: list[tuple[int, int, bool]] = []
            for passage, _ in retriever.rank(question.text, now=datetime.now(UTC)):
                same = versions[twin_key(passage)]
                answers = any(problem.passages[one].id in question.relevant for one in same)
                if len(found) >= N_CANDIDATES and (not answers or any(yes for _, _, yes in found)):
                    continue
                own = next((one for one in same if problem.passages[one].lang == lang), numbers[passage.id])
                other = next((one for one in same if one != own), own)
                found.append((n_passages + own, n_passages + other, answers))
            self.asked.append(Asked(n_questions + number, tuple(found), number >= len(problem.questions)))

    @staticmethod
    def _read(
        embedder: BilingualEmbedder, texts: Sequence[str], into: dict[str, Rows], longest: int, *, as_query: bool
    ) -> None:
        for start in range(0, len(texts), TEXTS):
            for hidden in embedder.hidden(texts[start : start + TEXTS], as_query=as_query)[1]:
                for kind, rows in zip(("e5", "minilm", "middle"), hidden, strict=True):
                    if kind in into:
                        into[kind].append(torch.from_numpy(rows[:longest]).bfloat16())

    def of(self, encoder: str) -> list[Asked]:
        """Return what the encoder's reranker learns from: of MiniLM English questions with English passages alone."""
        if encoder != "minilm":
            return [one for one in self.asked if one.candidates]
        found = []
        for one in self.asked:
            if self.english[one.number]:
                pairs = [(own if self.is_english[own] else other, yes) for own, other, yes in one.candidates]
                kept = tuple((passage, passage, yes) for passage, yes in pairs if self.is_english[passage])
                if kept:
                    found.append(Asked(one.number, kept, one.stranger))
        return found

    def plain(self, encoder: str) -> tuple[Tensor, Tensor]:
        """Take out of the encoder's vectors, once, what all of them share; return their mean (dim,) and length ()."""
        sample = torch.cat(self.passages[encoder][::7]).float()
        mean, length = sample.mean(0), sample.std()
        for rows in (self.questions[encoder], self.passages[encoder]):
            rows[:] = [((row.float() - mean) / length).bfloat16() for row in rows]
        return mean, length


def centred(embedder: BilingualEmbedder) -> Calibration:
    """Return the shipped mean vectors, which the reranker they were made beside has no part in."""
    shipped = load_calibration()
    known = shipped.embedder.startswith(embedder.version)
    return Calibration({}, 0.0, embedder.version, shipped.means if known else None)


def strangers(folder: Path) -> list[str]:
    """Return questions of the other stores that this one cannot answer: on nothing to do with a store, on products."""
    texts: list[str] = []
    for path in sorted(folder.parent.glob("*/questions.jsonl")):
        if path.parent == folder or path.parent.name in KEPT_OUT:
            continue
        with path.with_name("knowledge.jsonl").open(encoding="utf-8") as file:
            kinds = {entry["pair"]: entry["kind"] for entry in map(json.loads, file)}
        with path.open(encoding="utf-8") as file:
            theirs = [json.loads(line) for line in file]
        texts += [q["text"] for q in theirs if q["kind"] == "off_topic"] * 2
        texts += [q["text"] for q in theirs if q["relevant"] and {kinds[one] for one in q["relevant"]} == {"product"}]
    return sorted(set(random.Random(folder.name).sample(texts, N_STRANGERS)))


def padded(rows: Sequence[Tensor], kept: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the rows as one tensor (n, longest, dim), and what of it is real; of each row about `kept` is."""
    real = nn.utils.rnn.pad_sequence([torch.ones(max(1, len(row)), dtype=torch.bool) for row in rows], True)
    if kept < 1:
        drawn = real & (torch.rand(real.shape) < kept)
        real = torch.where(drawn.any(1, keepdim=True), drawn, real)
    dim = max(row.shape[1] for row in rows)
    whole = [row if len(row) else torch.zeros(1, dim, dtype=torch.bfloat16) for row in rows]
    return nn.utils.rnn.pad_sequence(whole, True), real


def batch_loss(network: nn.Module, batch: Sequence[Asked], texts: Texts, encoder: str, chance: random.Random) -> Tensor:
    """Return the loss of some questions with all their candidates."""
    passages, places, answers = [], [], []
    for place, one in enumerate(batch):
        without = chance.random() < WITHOUT_WORDINGS
        for column, (own, other, yes) in enumerate(one.candidates):
            shown = own if chance.random() < OWN_LANG else other
            passages.append(texts.passages[encoder][texts.bare[shown] if without else shown][:MAX_TOKENS])
            places.append((place, column))
            answers.append(float(yes))
    questions, real = padded([texts.questions[encoder][one.number] for one in batch], 1 - WORDS_DROPPED)
    theirs, theirs_real = padded(passages)
    rows, columns = torch.tensor(places).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(questions, real, rows, theirs, theirs_real)
    right = torch.tensor(answers)
    n_most = max(len(one.candidates) for one in batch)
    table = torch.full((len(batch), n_most), -1e9).index_put((rows, columns), logits)
    answered = torch.full((len(batch), n_most), -1e9)
    answered = answered.index_put((rows, columns), torch.where(right > 0, logits, -1e9))
    has = torch.zeros(len(batch), n_most).index_put((rows, columns), right).sum(1) > 0
    among = (torch.logsumexp(table, 1) - torch.logsumexp(answered, 1))[has]
    loss = functional.binary_cross_entropy_with_logits(logits, right)
    return loss + among.mean() if len(among) else loss


def batches(
    asked: Sequence[Asked],
    texts: Texts,
    encoder: str,
    chance: random.Random,
    batch: int = BATCH,
    strangers_asked: float = STRANGERS_ASKED,
) -> list[list[Asked]]:
    """Return one epoch in batches, each of questions and passages of like length."""

    def size(one: Asked) -> tuple[int, int]:
        longest = max(len(texts.passages[encoder][own]) for own, _, _ in one.candidates)
        return min(longest, MAX_TOKENS) // 24, len(texts.questions[encoder][one.number])

    left = [one for one in asked if not one.stranger or chance.random() < strangers_asked]
    chance.shuffle(left)
    found = []
    for start in range(0, len(left), LIKE * batch):
        alike = sorted(left[start : start + LIKE * batch], key=size)
        found += [alike[at : at + batch] for at in range(0, len(alike), batch)]
    chance.shuffle(found)
    return found


def train(texts: Texts, encoder: str, epochs: int) -> dict[str, Any]:
    """Return the trained network's tensors by name, float16."""
    chance = random.Random(0)
    torch.manual_seed(0)
    asked = texts.of(encoder)
    network = Network(*texts.plain(encoder))
    planned = [batch for _ in range(epochs) for batch in batches(asked, texts, encoder, chance)]
    fit(network, [(network.parameters(), RATE)], planned, lambda one: batch_loss(network, one, texts, encoder, chance))
    return network.tensors()


def fit(
    network: nn.Module,
    rates: Sequence[tuple[Iterable[nn.Parameter], float]],
    planned: Sequence[list[Asked]],
    loss_of: Callable[[list[Asked]], Tensor],
) -> None:
    """Learn from the `planned` batches, parameters at their `rates`; the network ends as the mean of its last steps."""
    mean = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    groups = [{"params": list(parameters), "lr": rate, "highest": rate} for parameters, rate in rates]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    shown, began = 0.0, time.perf_counter()
    for n, batch in enumerate(planned, start=1):
        loss = loss_of(batch)
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * min(1, n / WARM_UP) * max(0.02, 1 - n / len(planned))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        kept = min(1 - 1 / MEAN_OF, n / (n + 10))
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                mean[name].mul_(kept).add_(tensor, alpha=1 - kept)
        shown = loss.item() if n == 1 else 0.98 * shown + 0.02 * loss.item()
        if n % 100 == 0:
            print(f"{n}/{len(planned)}  loss {shown:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    network.load_state_dict(mean)


def read_stores(texts: Texts, names: Sequence[str], embedder: BilingualEmbedder, cache_dir: Path) -> None:
    """Add the stores `names` to the texts; their vectors are kept under `cache_dir`."""
    cache = VectorCache(cache_dir / "calibration.sqlite")
    for name in sorted(names):
        began = time.perf_counter()
        texts.add(HERE / name, embedder, cache)
        print(f"{name}: read in {time.perf_counter() - began:.0f} s", flush=True)
    cache.close()


def options_of(about: str, out: Path) -> argparse.ArgumentParser:
    """Return what both trainings of this folder can be told."""
    stores = sorted(path.parent.name for path in HERE.glob("*/knowledge.jsonl"))
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=out)
    default = [store for store in stores if store not in KEPT_OUT]
    parser.add_argument("--stores", nargs="+", default=default, choices=stores, metavar="STORE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=HERE.parent.parent / "var" / "cache", help="folder of vectors")
    return parser


def main() -> None:
    parser = options_of("Train the shipped rerankers on the stores of this folder.", SHIPPED)
    parser.add_argument("--only", choices=("e5", "minilm"), help="the other one stays as --out has it")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = Texts()
    read_stores(texts, options.stores, BilingualEmbedder(options.threads, rerankers=None), options.cache)
    kept: dict[str, Any] = load_file(options.out) if options.only and options.out.exists() else {}
    for encoder in ("e5", "minilm"):
        if options.only in (None, encoder):
            print(encoder, flush=True)
            trained = train(texts, encoder, options.epochs)
            kept = {name: tensor for name, tensor in kept.items() if not name.startswith(f"{encoder}/")}
            kept |= {f"{encoder}/{name}": tensor for name, tensor in trained.items()}
    save_file(dict(sorted(kept.items())), options.out, {"encoders": load_moves()[1]})


if __name__ == "__main__":
    main()
