"""
What a classifier has to beat: the commonest class, and TF-IDF with logistic regression.

The latter as scikit-learn's TfidfVectorizer (sublinear, smooth) and LogisticRegression (L2, C = 10) would have it, over
words of English, characters of Chinese and their pairs. Written here, in torch: scikit-learn would be a dependency for this
alone, and a baseline that is there on some machines only is none.
"""  # noqa: E501

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from finetune.metrics import units

MAX_TERMS = 50_000
_C = 10.0  # inverse strength of the L2 penalty


def majority(labels: Sequence[int], n: int) -> list[int]:
    """Return the commonest of the training `labels`, `n` times."""
    return [Counter(labels).most_common(1)[0][0]] * n


def tfidf_regression(texts: Sequence[str], labels: Sequence[int], asked: Sequence[str], n_labels: int) -> list[int]:
    """Fit on `texts` and return the class of each of `asked`. Seconds for ten thousand short texts; no randomness."""
    documents = [_terms(t) for t in texts]
    found: Counter[str] = Counter(term for d in documents for term in d)
    kept = sorted(found, key=lambda term: (-found[term], term))[:MAX_TERMS]
    places = {term: n for n, term in enumerate(kept)}
    idf = torch.tensor([math.log((1 + len(texts)) / (1 + found[term])) + 1 for term in kept])
    x, y = _matrix(documents, places, idf), torch.tensor(labels)
    weights = torch.zeros(len(kept), n_labels, requires_grad=True)
    bias = torch.zeros(n_labels, requires_grad=True)
    solver = torch.optim.LBFGS([weights, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(torch.sparse.mm(x, weights) + bias, y, reduction="sum") + (weights**2).sum() / (2 * _C)
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        logits = torch.sparse.mm(_matrix([_terms(t) for t in asked], places, idf), weights) + bias
    return [int(n) for n in logits.argmax(1)]


def _terms(text: str) -> Counter[str]:
    words = units(text)
    return Counter([*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))])


def _matrix(documents: Sequence[Counter[str]], places: dict[str, int], idf: torch.Tensor) -> torch.Tensor:
    """Return (n_documents, n_terms), sparse; each line of length one."""
    rows, columns, values = list[int](), list[int](), list[float]()
    for n, document in enumerate(documents):
        line = {places[t]: (1 + math.log(k)) * float(idf[places[t]]) for t, k in document.items() if t in places}
        norm = math.sqrt(sum(v * v for v in line.values())) or 1.0
        for place, value in line.items():
            rows.append(n)
            columns.append(place)
            values.append(value / norm)
    shape = (len(documents), len(places))
    return torch.sparse_coo_tensor([rows, columns], values, shape, check_invariants=True).coalesce()
