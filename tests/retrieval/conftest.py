"""
Fixtures of the retrieval tests: a small store in both languages, a deterministic embedder, the real one loaded once.

The fake knows character pairs only: equal texts are equal vectors, alike texts are near. It counts what it embeds and
can be told to fail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from retrieval.bilingual import default_embedder
from retrieval.e5 import E5
from retrieval.embedder import Embedder, VectorCache, Vectors
from retrieval.errors import RetrievalError
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from retrieval.passages import Passage

NOW = datetime(2026, 11, 22, 4, 0, tzinfo=UTC)
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


class HashingEmbedder:
    """A protocol-true embedder without a model: character pairs hashed into 64 dimensions."""

    name = "hashing"
    shared = 1.0
    dim = 64

    def __init__(self, version: str = "hashing-1") -> None:
        self.version = version
        self.embedded: list[str] = []  # every text ever asked for
        self.fails = False

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        if self.fails:
            raise RetrievalError("told to fail")
        self.embedded.extend(texts)
        return np.stack([self._vector(text) for text in texts]) if texts else np.zeros((0, self.dim), np.float32)

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self.embed_queries(texts)

    def _vector(self, text: str) -> Vectors:
        vector = np.zeros(self.dim, dtype=np.float32)
        padded = f" {text.lower()} "
        for start in range(len(padded) - 1):
            digest = hashlib.md5(padded[start : start + 2].encode()).digest()
            vector[digest[0] % self.dim] += 1
        unit: Vectors = vector / np.linalg.norm(vector)
        return unit


@pytest.fixture
def hashing() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture(scope="session")
def nano() -> E5:
    return E5(n_threads=2)


@pytest.fixture(scope="session")
def model() -> Embedder:
    """The embedded default, loaded once."""
    return default_embedder(n_threads=2)


@pytest.fixture(scope="session")
def build() -> Iterator[Callable[..., HybridRetriever]]:
    """Build a retriever over passages in memory; a text is embedded once for all tests."""
    cache = VectorCache(None)

    def make(passages: Sequence[Passage], embedder: Embedder) -> HybridRetriever:
        return HybridRetriever(build_index(passages, embedder, cache), embedder)

    yield make
    cache.close()


FAQS = """\
id,question,answer,lang,questions,tags,valid_from,valid_until
f-ship-zh,运费是多少？,订单满¥99包邮，否则运费¥8。,zh,包邮吗|邮费怎么算,shipping,,
f-ship-en,How much is shipping?,"Shipping is ¥8, free from ¥99.",en,is delivery free|postage cost,shipping,,
f-return-zh,怎么退货？,签收后7天内可以无理由退货。,zh,东西不想要了怎么退|能退吗,returns,,
f-return-en,How do I return an item?,You can return it within 7 days of delivery.,en,send it back,returns,,
f-invoice-zh,怎么开发票？,签收24小时后自动开具电子发票。,zh,要报销需要票据,invoice,,
f-xmas-en,Do you ship at Christmas?,"Yes, until 24 December.",en,,shipping,2026-12-01,2026-12-24
"""
PROMOTIONS = """\
id,title,description,code,starts_at,ends_at,lang,products,conditions
p-warm-zh,暖居季,床品75折,WARM25,2026-11-16T00:00,2026-12-01T00:00,zh,QH1001,每单限用一次
p-warm-en,Warm home weeks,Bedding 25% off,WARM25,2026-11-16,2026-11-30,en,QH1001,One code per order
p-tea-en,Tea week,Tea ¥30 off ¥200,TEA30,2026-10-01,2026-10-07,en,,
p-lamp-en,Lamp festival,Lamps 30% off,LIGHT30,2026-12-20T10:00,2026-12-27T22:00,en,,
"""
PRODUCTS = """\
id,title,description,price,currency,url,image,category,stock,lang
QH1001-zh,羽绒被 1.5米,白鸭绒，可干洗,399,CNY,https://shop.example/1,1.svg,bedding,42,zh
QH1001-en,Down quilt 150 cm,White duck down; dry-clean,399,CNY,https://shop.example/1,1.svg,bedding,42,en
QH2002-en,Brass desk lamp,LED,"1,299.50",CNY,,,lighting,0,en
"""
RETURNS = """\
# Returns
Our promise in short.

## Conditions
Unused and in the original packing.

## Refunds
The money arrives within 3 working days.

### Bank cards
Cards take up to 7 working days.
"""
STORE = 'name = "Test"\nlanguages = ["zh", "en"]\ntimezone = "Asia/Shanghai"\n'


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A complete, valid store folder."""
    return write_store(tmp_path / "store")


def write_store(folder: Path) -> Path:
    """Write the small store and return its folder."""
    (folder / "policies").mkdir(parents=True)
    (folder / "store.toml").write_text(STORE, "utf-8")
    (folder / "faqs.csv").write_text(FAQS, "utf-8")
    (folder / "promotions.csv").write_text(PROMOTIONS, "utf-8")
    (folder / "products.csv").write_text(PRODUCTS, "utf-8")
    (folder / "policies" / "returns.en.md").write_text(RETURNS, "utf-8")
    return folder


@pytest.fixture
def faq() -> Callable[..., Passage]:
    """Make a FAQ passage from its wordings and its answer."""

    def make(passage_id: str, *questions: str, answer: str = "Yes.", lang: str = "en", **rest: object) -> Passage:
        fields: dict[str, object] = {"approved": True} | rest
        at = "faqs.csv:2"
        return Passage(passage_id, "faq", questions[0], answer, lang, at, questions, **fields)  # type: ignore[arg-type]

    return make
