"""
The embedded default: a multilingual model for both languages, and an English one beside it where the text is English.

multilingual-e5-small knows Chinese and puts both languages into one space, but ranks colloquial English
poorly; all-MiniLM-L6-v2 knows English only and ranks it well (docs/experiments.md). A text's vector is the two end
to end, [√(1-β)·e5, √β·MiniLM], the second part zero for Chinese: a product of two English vectors is the weighted mean
of both cosines, of two Chinese ones e5's cosine, and across languages √(1-β) of it. Both are tuned for stores'
questions (encoders.py), of both a reranker reads the token vectors (reranker.py), and what e5 made of a question and a
passage halfway is read on together for the best of them (cross_encoder.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from retrieval.cross_encoder import SHIPPED as SHIPPED_CROSS_ENCODER
from retrieval.cross_encoder import load_cross_encoder
from retrieval.e5 import E5
from retrieval.embedder import Embedder, ReadPassage, ReadQuestion, Vectors
from retrieval.encoders import Matrix, load_moves
from retrieval.gist import gist_of, load_gist
from retrieval.minilm import MiniLM
from retrieval.reranker import SHIPPED, load_rerankers
from retrieval.words import detect_lang

ENGLISH_SHARE = 0.4  # β; 0.3 to 0.5 measured alike, 0 lost 12 points of recall@1 on colloquial English
# Share of MiniLM's reranker where question and passage are English; 0 to 0.7 are alike on kept-out stores.
ENGLISH_LOGIT = 0.5


class BilingualEmbedder:
    """Embeds and reads with both models; see `retrieval.embedder.Reads`. Vectors have unit length, 768 dimensions."""

    def __init__(
        self, n_threads: int = 2, rerankers: Path | None = SHIPPED, cross_encoder: Path = SHIPPED_CROSS_ENCODER
    ) -> None:
        """
        Load both, about 0.8 s; with None for the file of the `rerankers` it can only embed.

        Raises:
            RetrievalError: one of them is not installed.
        """
        moves, tuning = load_moves()
        self._both, self._english = E5(n_threads, moves.get("e5")), MiniLM(n_threads, moves.get("minilm"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minilm")
        self.name = f"{self._both.name}+{self._english.name}"
        self.version = f"{self._both.version}+{self._english.name}@{ENGLISH_SHARE}-{tuning}"
        self.dim = self._both.dim + self._english.dim
        self.shared = float(np.sqrt(1 - ENGLISH_SHARE))
        if rerankers is not None:
            found, reading = load_rerankers(tuning, rerankers)
            self._read_together, reading_together = load_cross_encoder(tuning, cross_encoder)
            self.version += f"-{reading}-{reading_together}"
            self._read_both, self._read_english = found["e5"], found["minilm"]
            self._gist = load_gist(tuning)
            self.width = self._read_both.width

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self.hidden(texts, as_query=True)[0]

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self.hidden(texts, as_query=False)[0]

    def read_queries(self, texts: Sequence[str]) -> tuple[Vectors, list[ReadQuestion]]:
        vectors, hidden = self.hidden(texts, as_query=True)
        ours, english = self._read_both, self._read_english
        return vectors, [(ours.question(e5), english.question(mini), middle) for e5, mini, middle in hidden]

    def read_passages(self, texts: Sequence[str]) -> tuple[Vectors, list[ReadPassage]]:
        vectors, hidden = self.hidden(texts, as_query=False)
        ours, english, together = self._read_both, self._read_english, self._read_together
        return vectors, [
            # As wide as the others, whatever the width of a token's vector here.
            (ours.passage(e5), english.passage(mini), together.passage(middle).reshape(-1, self.width))
            for e5, mini, middle in hidden
        ]

    def logits(self, question: ReadQuestion, passages: Sequence[ReadPassage]) -> Matrix:
        english = [n for n, (_, mini, _) in enumerate(passages) if len(mini)] if len(question[1]) else []
        theirs = [passages[n][1] for n in english]
        # On two cores at once, each with about half of the tokens: the longest passages go where MiniLM's part is.
        order = sorted(range(len(passages)), key=lambda n: len(passages[n][0]))
        tokens = np.cumsum([len(passages[n][0]) for n in order])
        half = (int(tokens[-1]) + sum(map(len, theirs))) / 2 if order else 0.0
        n_ours = int(np.searchsorted(tokens, half, "right"))

        def read(numbers: Sequence[int]) -> Matrix:
            return self._read_both.logits(question[0], [passages[n][0] for n in numbers])

        beside = self._thread.submit(
            lambda: (read(order[n_ours:]), self._read_english.logits(question[1], theirs))  # nothing of nothing
        )
        found = np.empty(len(passages), np.float32)
        found[order[:n_ours]] = read(order[:n_ours])
        found[order[n_ours:]], second = beside.result()
        found[english] += ENGLISH_LOGIT * (second - found[english])
        return found

    def closer(self, question: ReadQuestion, passages: Sequence[ReadPassage]) -> Matrix:
        asked, states = question[2], [middle.reshape(-1, self._both.dim) for _, _, middle in passages]

        def read(numbers: Sequence[int]) -> list[float]:
            return [self._read_together.logit(asked, states[n]) for n in numbers]

        # One by one, so that what one passage is worth does not depend on the others; on two cores.
        beside = self._thread.submit(read, range(1, len(states), 2)) if len(states) > 1 else None
        found = np.empty(len(states), np.float32)
        found[::2] = read(range(0, len(states), 2))
        if beside is not None:
            found[1::2] = beside.result()
        return found

    def gist(self, text: str, question: ReadQuestion) -> str:
        tokens, places = self._both.own(question[2]), self._both.places(text)
        if len(tokens) != len(places):  # longer than what is read of it
            return text
        return gist_of(text, places, self._gist.logits(tokens))

    def hidden(self, texts: Sequence[str], *, as_query: bool) -> tuple[Vectors, list[tuple[Matrix, Matrix, Matrix]]]:
        """
        Return the vectors of `texts`, and of each the token vectors of either model; of MiniLM for English alone.

        The third are e5's after the layer that the cross-encoder goes on from.
        """
        english = [i for i, text in enumerate(texts) if detect_lang(text) == "en"]
        # Both at once: they spend their time outside the interpreter's lock, on a core each.
        second = self._thread.submit(self._english.read, [texts[i] for i in english]) if english else None
        first, hidden, middles = self._both.read(texts, as_query=as_query)
        joined = np.zeros((len(texts), self.dim), np.float32)
        joined[:, : self._both.dim] = first
        nothing = np.zeros((0, self._english.dim), np.float32)
        tokens = [(one, nothing, middle) for one, middle in zip(hidden, middles, strict=True)]
        if second is not None:
            vectors, theirs = second.result()
            joined[english, : self._both.dim] *= np.sqrt(1 - ENGLISH_SHARE, dtype=np.float32)
            joined[english, self._both.dim :] = vectors * np.sqrt(ENGLISH_SHARE, dtype=np.float32)
            for i, one in zip(english, theirs, strict=True):
                tokens[i] = (tokens[i][0], one, tokens[i][2])
        return joined, tokens


def default_embedder(n_threads: int = 2) -> Embedder:
    """
    Return what a store gets that chooses nothing.

    Raises:
        RetrievalError: a model's package is not installed.
    """
    return BilingualEmbedder(n_threads)
