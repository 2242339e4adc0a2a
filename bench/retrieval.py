"""
Is the retriever better than what a user would use instead? `python bench/retrieval.py --cache DIR [--data DIR]`.

The same questions to the same knowledge, the same embedder for every arm, in one run:

- ours, untuned and (where the set has questions to learn from) tuned on one half and asked the other;
- LangChain's plain recipe: `FAISS.from_documents`, one document an entry, `similarity_search`;
- LangChain's `EnsembleRetriever` of that and `BM25Retriever`, half each. BM25Retriever gets our words, since its own
  are split at blanks, which finds nothing in Chinese;
- MaxKB's default pipeline, rebuilt from its documentation and source (`embedding` search: cosine of the question with
  every paragraph and every problem of it, the best of each paragraph, nothing under 0.6, three hits).

Prints a table and writes bench/results/retrieval.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from langchain_classic.retrievers import EnsembleRetriever  # noqa: E402
from langchain_community.retrievers import BM25Retriever  # noqa: E402
from langchain_community.vectorstores import FAISS  # noqa: E402
from langchain_core.documents import Document  # noqa: E402
from langchain_core.embeddings import Embeddings  # noqa: E402

from bot.demo import date_promotions  # noqa: E402
from retrieval.bilingual import default_embedder  # noqa: E402
from retrieval.embedder import Embedder, VectorCache  # noqa: E402
from retrieval.evaluate import Question, ask_all, load_questions, measures  # noqa: E402
from retrieval.hybrid import HybridRetriever  # noqa: E402
from retrieval.index import build_index  # noqa: E402
from retrieval.load import load_store, load_terms  # noqa: E402
from retrieval.passages import Passage  # noqa: E402
from retrieval.terms import Terms  # noqa: E402
from retrieval.tune import Problem, tune  # noqa: E402
from retrieval.tuning import tuned_retriever  # noqa: E402
from retrieval.words import words  # noqa: E402

SEED = 7
DEPTH = 10
MAXKB_LEAST = 0.6  # its default similarity
MAXKB_TOP = 3

Ranked = Callable[[str], Sequence[str]]  # question -> ids, best first


class Cached(Embeddings):
    """Our embedder as LangChain's, through the vector cache: every arm pays once, all have the same vectors."""

    def __init__(self, embedder: Embedder, cache: VectorCache) -> None:
        self.embedder, self.cache = embedder, cache

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.cache.embed(self.embedder, texts, as_query=False).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.cache.embed(self.embedder, [text], as_query=True)[0].tolist()


class Set:
    def __init__(
        self,
        name: str,
        passages: list[Passage],
        asked: list[Question],
        learned: list[Question] | None = None,
        terms: Terms | None = None,
    ) -> None:
        self.name, self.passages, self.asked, self.learned = name, passages, asked, learned or []
        self.terms = terms or Terms()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder of the vectors; the first run embeds for minutes"
    )
    parser.add_argument("--n", type=int, default=1_000, help="questions asked of each set, at most")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "retrieval.json")
    options = parser.parse_args()
    embedder = default_embedder()
    cache = VectorCache(options.cache / "embeddings.sqlite")
    rows = [measure(one, embedder, cache) for one in sets(options.data, options.n)]
    arms = list(rows[0]["recall@1"])
    print(f"\n{'recall@1':24} {'n':>5}  " + "  ".join(f"{arm:>16}" for arm in arms))
    for row in rows:
        values = [row["recall@1"].get(arm) for arm in arms]
        print(
            f"{row['set']:24} {row['n']:>5}  " + "  ".join("-".rjust(16) if v is None else f"{v:16.3f}" for v in values)
        )
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", "utf-8")
    ahead = [row["recall@1"]["ours"] / max(row["recall@1"][arm], 1e-9) for row in rows for arm in arms if arm in OTHERS]
    print(f"ours / the others: {min(ahead):.2f} to {max(ahead):.2f}")
    return 0


OTHERS = ("langchain", "ensemble", "maxkb")


def measure(one: Set, embedder: Embedder, cache: VectorCache) -> dict:
    now = datetime.now(UTC)
    texts = [question.text for question in one.asked]
    vectors = cache.embed(embedder, texts, as_query=True)
    index = build_index(one.passages, embedder, cache)
    plain = HybridRetriever(index, embedder, terms=one.terms)
    found: dict[str, float | None] = {"ours": _ours(plain, one.asked, vectors, now), "ours, tuned": None}
    if one.learned:
        tuning, report = tune(Problem(one.passages, one.learned, now, one.terms), embedder, cache)
        print(f"{one.name}: tune {report['untuned']} -> {report['tuned']}", file=sys.stderr)
        if tuning is not None:
            retriever = tuned_retriever(index, embedder, cache, one.terms, tuning)
            found["ours, tuned"] = _ours(retriever, one.asked, vectors, now)
    embeddings = Cached(embedder, cache)
    documents = [
        Document(page_content="\n".join(dict.fromkeys([*p.questions, p.text])), metadata={"id": p.id})
        for p in one.passages
    ]
    store = FAISS.from_documents(documents, embeddings)
    keyword = BM25Retriever.from_documents(documents, preprocess_func=words, k=DEPTH)
    both = EnsembleRetriever(retrievers=[store.as_retriever(search_kwargs={"k": DEPTH}), keyword], weights=[0.5, 0.5])
    found["langchain"] = _share(one.asked, lambda q: [d.metadata["id"] for d in store.similarity_search(q, k=DEPTH)])
    found["ensemble"] = _share(one.asked, lambda q: [d.metadata["id"] for d in both.invoke(q)])
    found["maxkb"] = _share(one.asked, maxkb(one.passages, embeddings))
    row = {"set": one.name, "n": len(one.asked), "n_passages": len(one.passages), "recall@1": found}
    print(json.dumps(row, ensure_ascii=False), file=sys.stderr, flush=True)
    return row


def maxkb(passages: Sequence[Passage], embeddings: Cached) -> Ranked:
    """Return MaxKB's `embedding` search: a row for each paragraph and each of its problems, the best row counts."""
    owners, texts = [], []
    for passage in passages:
        for text in (passage.text or passage.title, *passage.questions):
            owners.append(passage.id)
            texts.append(text)
    matrix = np.asarray(embeddings.embed_documents(texts), dtype=np.float32)

    def ranked(question: str) -> list[str]:
        cosines = matrix @ np.asarray(embeddings.embed_query(question), dtype=np.float32)
        order = [n for n in np.argsort(-cosines, kind="stable")[: 20 * DEPTH] if cosines[n] >= MAXKB_LEAST]
        return list(dict.fromkeys(owners[n] for n in order))[:MAXKB_TOP]

    return ranked


def _ours(retriever: HybridRetriever, asked: list[Question], vectors: np.ndarray, now: datetime) -> float | None:
    for question, vector in zip(asked, vectors, strict=True):
        retriever.remember([question.text], vector[None])
        retriever.search(question.text, 1, now=now)
    return measures(ask_all(retriever, asked, now=now))["recall@1"]


def _share(asked: Sequence[Question], ranked: Ranked) -> float:
    right = 0
    for question in asked:
        ids = ranked(question.text)
        right += bool(ids) and ids[0] in question.relevant
    return round(right / len(asked), 4)


def sets(data: Path, n: int) -> list[Set]:
    """Return the sets; those that can be learned from are cut in half, by question, the same way every time."""

    def rows(*path: str) -> list[dict[str, str]]:
        with data.joinpath(*path).open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))

    def classes(name: str, wordings: dict[str, str], pool: list[tuple[str, str]]) -> Set:
        passages = [Passage(one, "faq", text, text, "", name, questions=(text,)) for one, text in wordings.items()]
        unique = sorted({(text, one) for text, one in pool if text != wordings[one]})
        random.Random(SEED).shuffle(unique)
        asked = [Question(text, frozenset([one])) for text, one in unique]
        half = len(asked) // 2
        return Set(name, passages, asked[half : half + n], asked[:half])

    found = []
    standard = {row["faq_id"]: row["standard_question"] for row in rows("zh_tonghuashun_faq", "faq_standard.csv")}
    pool = [(row["query"], row["faq_id"]) for row in rows("zh_tonghuashun_faq", "queries_dev.csv")]
    found.append(classes("zh_tonghuashun_faq", standard, pool))
    bitext = "Bitext_Sample_Customer_Service_Training_Dataset.csv"
    for name, file, text, label in (
        ("en_banking77", "train.csv", "text", "category"),
        ("en_bitext_support", bitext, "utterance", "intent"),
    ):
        pool = [(row[text], row[label]) for row in rows(name, file)]
        chance = random.Random(SEED)
        by_class: dict[str, list[str]] = {}
        for question, one in sorted(set(pool)):
            by_class.setdefault(one, []).append(question)
        found.append(classes(name, {one: chance.choice(texts) for one, texts in sorted(by_class.items())}, pool))
    faq = json.loads((data / "en_ecommerce_faq" / "Ecommerce_FAQ_Chatbot_dataset.json").read_text("utf-8"))["questions"]
    by_answer = {row["answer"]: str(number) for number, row in enumerate(faq)}
    bodies = [Passage(one, "policy", "", answer, "en", "ecommerce") for answer, one in by_answer.items()]
    asked = [Question(row["question"], frozenset([by_answer[row["answer"]]])) for row in faq]
    found.append(Set("en_ecommerce_faq, answers", bodies, asked[:n]))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "demo"
        shutil.copytree(HERE.parent / "examples" / "demo", store)
        date_promotions(store, datetime.now(UTC).date())
        passages, terms = load_store(store), load_terms(store)
    labelled = [one for one in load_questions(HERE.parent / "examples" / "questions.jsonl") if one.relevant]
    for lang in ("zh", "en"):
        ours = [
            one
            for one in labelled
            if any("\u4e00" <= character <= "\u9fff" for character in one.text) == (lang == "zh")
        ]
        found.append(Set(f"demo store, {lang}", passages, ours, terms=terms))
    return found


if __name__ == "__main__":
    sys.exit(main())
