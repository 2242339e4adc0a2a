"""
Fits `calibration.json`: public question sets -> small stores -> features of right and wrong hits -> a logistic model.

Knows the developers' data folder (`../shared/data`, not in the repository) and nothing of any one store. Every set is
cut into a store that answers some of its questions and not the others, so that "nothing here answers this" is learned
from near misses of the same trade, not only from strange topics. Fitted with Newton's method on numpy alone.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.confidence import N_FIRST, NAMES, RIVAL, SHIPPED, Calibration, Features, rivals
from retrieval.embedder import Embedder, VectorCache
from retrieval.errors import BadStore, Fault
from retrieval.evaluate import Question, ask_all, measures
from retrieval.hybrid import HybridRetriever
from retrieval.index import LANGS, build_index
from retrieval.passages import Passage
from retrieval.words import detect_lang

SEED = 7
STORES = Path(__file__).resolve().parent.parent / "examples" / "training"  # of a checkout, as a developer has one
KEPT_OUT = ("books", "crafts", "fitness", "phones", "wine")  # of STORES: the encoders were not tuned on them
N_QUESTIONS = 240  # a set, at most; embedding them is what takes the time
SMALL = 12  # a kept-out store is calibrated on whole, and with one passage in so many
N_STRANGE = 48  # questions a language that have to do with no store
RIDGE = 2e-4  # keeps a weight finite where a feature never varies
FIXED = {"code": 2.0, "other_lang": -0.5}  # what no public set shows; 2: a named article lifts 0.3 to 0.76


@dataclass(frozen=True, slots=True)
class Problem:
    """A small store and questions to it; `relevant` is empty where the store has no answer."""

    name: str
    passages: list[Passage]
    questions: list[Question]


def problems(data_dir: Path) -> list[Problem]:
    """
    Return the sets that are in `data_dir`, cut the same way every time.

    Raises:
        BadStore: none of them is there.
    """
    makers = (_tonghuashun, _banking, _bitext, _clinc, _ecommerce, _lcqmc)
    found: list[Problem] = []
    for make in makers:
        try:
            found.extend(make(data_dir))
        except FileNotFoundError:
            continue
    if not found:
        raise BadStore([Fault(str(data_dir), None, None, "no public data here; name the folder with --data")])
    return found


def calibrate(
    data_dir: Path, embedder: Embedder, cache_dir: Path, out: Path | None = None, stores: Path = STORES
) -> dict[str, Any]:
    """
    Fit on every set, report how each does when it is left out of the fit, and write the coefficients to `out`.

    There are two fits: one with the reranker's logits, on the stores of `KEPT_OUT`, whole and cut to a few passages
    that everyday questions are asked too; and a plain one without them, on all. The report is of what a store like the
    set would get. The mean vectors are of the sets and of the knowledge in `stores`, which are what a store's texts are
    like. Of their questions those of `KEPT_OUT` alone have a part: encoders and rerankers were trained on the others.
    Blocks for minutes the first time: thousands of questions are embedded, then kept under `cache_dir`.

    Raises:
        BadStore: no data.
        RetrievalError: the embedder failed.
    """
    cache = VectorCache(cache_dir / "calibration.sqlite")
    try:
        sets = problems(data_dir)
        texts = [[(p.questions or (p.text,))[0] for p in problem.passages] for problem in sets]
        for path in sorted(stores.glob("*/knowledge.jsonl")):
            titles = (json.loads(line)["title"] for line in path.read_text("utf-8").splitlines())
            texts.append([title.split(" > ")[-1] for title in titles])
        means = _means(texts, embedder, cache)
        kept_out = [training_store(stores / name) for name in KEPT_OUT if (stores / name).is_dir()]
        sets += kept_out + [_small(one, _strange(sets)) for one in kept_out]
        shipped = Calibration({}, 0.0, embedder.version, means)
        built = [(problem, _retriever(problem, embedder, cache, shipped)) for problem in sets]
        plain = {
            problem.name: _examples(problem, _retriever(problem, embedder, cache, shipped, reads=False))
            for problem in sets
        }
    finally:
        cache.close()
    read = {problem.name: _examples(problem, retriever) for problem, retriever in built if retriever.reads}
    taught = {name: found for name, found in read.items() if name.split()[0] in KEPT_OUT} or read
    report: dict[str, Any] = {"sets": {}}
    for problem, retriever in built:
        examples = taught if retriever.reads else plain
        # Variants of one set ("banking77 x1", "banking77 x4") leave together, or the fit would have seen the questions.
        rest = [found for name, found in examples.items() if name.split()[0] != problem.name.split()[0]]
        fitted = fit(rest or list(examples.values()))
        retriever.calibration = fitted
        report["sets"][problem.name] = {
            "n_passages": len(problem.passages),
            "n_questions": len(problem.questions),
            **measures(ask_all(retriever, problem.questions, now=datetime.now(UTC))),
            **_quality(fitted, (read if retriever.reads else plain)[problem.name]),
        }
    report |= _rounded(fit(list((taught or plain).values())))
    report["plain"] = _rounded(fit(list(plain.values())))
    if out is not None:
        document = {
            "about": "python -m retrieval calibrate; probability that a hit answers the query",
            "embedder": embedder.version,
            "sets": sorted(report["sets"]),
            "weights": report["weights"],
            "bias": report["bias"],
            "rival": report["rival"],
            "plain": report["plain"],
            "means": means,
        }
        text = json.dumps(document, indent=1)
        # One line for each of the two vectors, not one for each number.
        text = re.sub(r"\[[^\[\]]*\]", lambda match: " ".join(match[0].split()), text)
        out.write_text(text + "\n", "utf-8")
    return report


@dataclass(frozen=True, slots=True)
class Examples:
    """Hits of one set: what is known of each and of its rivals, whether it answers, and how much it counts."""

    features: NDArray[np.float64]  # (n, n_features)
    others: NDArray[np.float64]  # its rivals' (n, N_FIRST - 1, n_features), NaN where there is none
    labels: NDArray[np.float64]  # (n,), 0 or 1
    weights: NDArray[np.float64]  # (n,)

    @classmethod
    def of(cls, asked: Iterable[tuple[Sequence[Features], Sequence[bool]]]) -> Examples:
        """Return those of questions, each the features of its hits, best first, and which of them answer it."""
        rows, others, labels, weights = [], [], [], []
        nothing = (math.nan,) * len(NAMES)
        for hits, answers in asked:
            for place, (hit, answer) in enumerate(zip(hits[:N_FIRST], answers, strict=False)):
                if hit.exact:
                    continue
                rows.append(hit.values())
                theirs = [other.values() for other in rivals(hits, place)]
                others.append(theirs + [nothing] * (N_FIRST - 1 - len(theirs)))
                labels.append(float(answer))
                # The first hit is what goes out as it is; the others matter less.
                weights.append(1.0 if place == 0 else 0.25)
        shaped = np.array(others).reshape(len(rows), N_FIRST - 1, len(NAMES))
        return cls(np.array(rows).reshape(len(rows), len(NAMES)), shaped, np.array(labels), np.array(weights))

    def logits(self, theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the logits (n,) for the weights, bias and `rival` and their slopes (n, n_features + 2)."""
        own = self.features @ theta[:-2] + theta[-2]
        theirs = np.exp(np.minimum(self.others @ theta[:-2] + theta[-2] + theta[-1], 30.0))
        theirs = np.where(np.isnan(theirs), 0.0, theirs)
        whole = 1 + theirs.sum(axis=1)
        shares = theirs / whole[:, None]  # (n, N_FIRST - 1)
        slopes = np.empty((len(own), len(theta)))
        slopes[:, :-2] = self.features - np.einsum("ij,ijk->ik", shares, np.nan_to_num(self.others))
        slopes[:, -2] = 1 - shares.sum(axis=1)
        slopes[:, -1] = -shares.sum(axis=1)
        return own - np.log(whole), slopes


def fit(examples: Sequence[Examples], prior: Calibration | None = None, ridge: float = RIDGE) -> Calibration:
    """
    Return the coefficients that make the labels most likely; every set counts the same, whatever its size.

    `ridge` draws the weights to those of `prior`, by default to zero: what the examples do not show stays as it was.
    What rivals count for is fitted without a prior alone: one store shows too few of them.
    """
    joined = Examples(
        np.concatenate([one.features for one in examples]),
        np.concatenate([one.others for one in examples]),
        np.concatenate([one.labels for one in examples]),
        np.concatenate([one.weights / one.weights.sum() for one in examples]),
    )
    labels, weights = joined.labels, joined.weights * len(joined.labels) / joined.weights.sum()
    pull = ridge * np.eye(len(NAMES) + 2) * float(weights.sum())
    if prior is None:
        before = np.array([0.0] * len(NAMES) + [0.0, RIVAL])
        pull[-2, -2] = 0
    else:
        before = np.array([prior.weights.get(name, 0.0) for name in NAMES] + [prior.bias, prior.rival])
    free = slice(None, None if prior is None else -1)
    theta = before.copy()

    def loss(at: NDArray[np.float64]) -> float:
        logits, _ = joined.logits(at)
        wrong = float(weights @ (np.logaddexp(0, logits) - labels * logits))
        return wrong + float((at - before) @ pull @ (at - before)) / 2

    least = loss(theta)
    for _ in range(50):
        logits, slopes = joined.logits(theta)
        chance = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
        gradient = slopes.T @ (weights * (chance - labels)) + pull @ (theta - before)
        curvature = slopes.T @ (slopes * (weights * chance * (1 - chance))[:, None]) + pull
        curvature += 1e-9 * np.eye(len(theta))
        step = np.zeros(len(theta))
        step[free] = np.linalg.solve(curvature[free, free], gradient[free])
        # A full step may overshoot where the chances are near 0 and 1 already; halved, it goes down.
        while (found := loss(theta - step)) > least and float(np.abs(step).max()) > 1e-6:
            step /= 2
        theta, least = theta - step, min(found, least)
        if float(np.abs(step).max()) < 1e-6:
            break
    weights_of = {name: float(value) for name, value in zip(NAMES, theta, strict=False)}
    if prior is None:
        return Calibration(weights_of | FIXED, float(theta[-2]), rival=float(theta[-1]))
    return Calibration(weights_of, float(theta[-2]), prior.embedder, prior.means, rival=prior.rival)


def _means(sets: Sequence[Sequence[str]], embedder: Embedder, cache: VectorCache) -> dict[str, list[float]]:
    """Return the mean vector of the texts as questions and as bodies in each language; every set counts the same."""
    means: dict[str, list[float]] = {}
    for lang in LANGS:
        for role in ("query", "passage"):
            found = []
            for one in sets:
                texts = [text for text in one if detect_lang(text) == lang]
                if len(texts) > 10:
                    found.append(cache.embed(embedder, texts, as_query=role == "query").mean(axis=0))
            if found:
                means[f"{role}-{lang}"] = [round(float(value), 4) for value in np.mean(found, axis=0)]
    return means


def _retriever(
    problem: Problem, embedder: Embedder, cache: VectorCache, shipped: Calibration, *, reads: bool = True
) -> HybridRetriever:
    index = build_index(problem.passages, embedder, cache, calibration=shipped)
    retriever = HybridRetriever(index, embedder, shipped, reads=reads)
    texts = [question.text for question in problem.questions]
    # The questions go through the disk cache too, so that a second fit takes seconds.
    retriever.remember(texts, cache.embed(embedder, texts, as_query=True))
    return retriever


def _rounded(fitted: Calibration) -> dict[str, Any]:
    weights = {name: round(value, 4) for name, value in fitted.weights.items()}
    return {"weights": weights, "bias": round(fitted.bias, 4), "rival": round(fitted.rival, 4)}


def _examples(problem: Problem, retriever: HybridRetriever) -> Examples:
    now = datetime.now(UTC)
    asked = []
    for question in problem.questions:
        ranked = retriever.rank(question.text, now=now)[:N_FIRST]
        asked.append(([features for _, features in ranked], [one.id in question.relevant for one, _ in ranked]))
    return Examples.of(asked)


def _quality(fitted: Calibration, examples: Examples) -> dict[str, float]:
    labels = examples.labels
    logits, _ = examples.logits(np.array([fitted.weights[name] for name in NAMES] + [fitted.bias, fitted.rival]))
    chance = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    error = 0.0
    for low in np.arange(0, 1, 0.1):
        inside = (chance >= low) & (chance < low + 0.1 + 1e-9)
        if inside.any():
            error += float(inside.mean() * abs(chance[inside].mean() - labels[inside].mean()))
    loss = -np.mean(labels * np.log(chance + 1e-12) + (1 - labels) * np.log(1 - chance + 1e-12))
    return {"calibration_error": round(error, 4), "log_loss": round(float(loss), 4)}


# --- the sets ---------------------------------------------------------------------------------------------------------


def _store(name: str, wordings: dict[str, list[str]], asked: Iterable[tuple[str, str]], share_out: float) -> Problem:
    """Return a store of one FAQ a class, without `share_out` of the classes; questions of those have no answer."""
    chance = random.Random(SEED)
    ids = sorted(wordings)
    out = set(chance.sample(ids, int(share_out * len(ids))))
    passages = [
        Passage(one, "faq", wordings[one][0], text="", lang="", source=name, questions=tuple(wordings[one]))
        for one in ids
        if one not in out
    ]
    pool = sorted(set(asked))
    chance.shuffle(pool)
    questions = [
        Question(text, frozenset() if one in out else frozenset([one]))
        for text, one in pool
        if text not in wordings.get(one, ())
    ]
    return Problem(name, passages, questions[:N_QUESTIONS])


def _by_class(name: str, rows: list[tuple[str, str]], n_wordings: int, share_out: float) -> Problem:
    chance = random.Random(SEED)
    classes: dict[str, list[str]] = {}
    for text, one in rows:
        classes.setdefault(one, []).append(text)
    wordings = {one: chance.sample(texts, n_wordings) for one, texts in sorted(classes.items())}
    return _store(f"{name} x{n_wordings}", wordings, rows, share_out)


def training_store(folder: Path) -> Problem:
    """Return one of the stores in examples/training as a store would import it, and its questions."""
    passages: list[Passage] = []
    for line in (folder / "knowledge.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        is_faq = entry["kind"] == "faq"
        wordings = (entry["title"], *entry["questions"]) if is_faq else (entry["title"].split(" > ")[-1],)
        passages.append(
            Passage(
                entry["id"], entry["kind"], entry["title"], entry["text"], entry["lang"], folder.name,
                questions=tuple(dict.fromkeys(wordings)), approved=is_faq,
            )
        )  # fmt: skip
    questions: list[Question] = []
    for line in (folder / "questions.jsonl").read_text("utf-8").splitlines():
        asked = json.loads(line)
        relevant = frozenset(f"{pair}-{lang}" for pair in asked["relevant"] for lang in LANGS)
        questions.append(Question(asked["text"], relevant))
    return Problem(folder.name, passages, questions)


def _strange(sets: Sequence[Problem]) -> list[str]:
    """Return what is asked of no store: everyday questions in both languages."""
    clinc = [q.text for one in sets if one.name.startswith("clinc150") for q in one.questions if not q.relevant]
    lcqmc = [q.text for one in sets if one.name == "lcqmc" for q in one.questions]
    return [text for texts in (clinc, lcqmc) for text in texts[-N_STRANGE:]]


def _small(store: Problem, strange: Sequence[str]) -> Problem:
    """Return `store` cut to one in `SMALL`, with as many questions that are no longer answered, and `strange` ones."""
    chance = random.Random(SEED)
    pairs = sorted({passage.id.rpartition("-")[0] for passage in store.passages})
    kept = set(chance.sample(pairs, len(pairs) // SMALL))
    passages = [passage for passage in store.passages if passage.id.rpartition("-")[0] in kept]
    known = frozenset(passage.id for passage in passages)
    answered = [Question(q.text, q.relevant & known) for q in store.questions if q.relevant & known]
    others = [q.text for q in store.questions if not q.relevant & known]
    missed = [*chance.sample(others, min(len(others), len(answered))), *strange]
    return Problem(f"{store.name} small", passages, answered + [Question(text, frozenset()) for text in missed])


def _tonghuashun(data_dir: Path) -> list[Problem]:
    folder = data_dir / "zh_tonghuashun_faq"
    wordings = {row["faq_id"]: [row["standard_question"]] for row in _csv(folder / "faq_standard.csv")}
    asked = [(row["query"], row["faq_id"]) for row in _csv(folder / "queries_dev.csv")]
    return [_store("tonghuashun", wordings, asked, 0.25)]


def _banking(data_dir: Path) -> list[Problem]:
    rows = [(row["text"], row["category"]) for row in _csv(data_dir / "en_banking77" / "train.csv")]
    return [_by_class("banking77", rows, n, 0.25) for n in (1, 4)]


def _bitext(data_dir: Path) -> list[Problem]:
    path = data_dir / "en_bitext_support" / "Bitext_Sample_Customer_Service_Training_Dataset.csv"
    rows = [(row["utterance"], row["intent"]) for row in _csv(path)]
    return [_by_class("bitext", rows, n, 0.25) for n in (1, 5)]


def _clinc(data_dir: Path) -> list[Problem]:
    entry = json.loads((data_dir / "en_clinc150" / "train_val.json").read_text("utf-8"))
    rows = [(text, one) for part in ("train", "val") for text, one in entry.get(part, ())]
    outside = sorted(text for part in entry for text, one in entry[part] if one == "oos")
    random.Random(SEED).shuffle(outside)
    made = _by_class("clinc150", rows, 1, 0.1)
    strange = [Question(text, frozenset()) for text in outside[: N_QUESTIONS // 3]]
    return [Problem(made.name, made.passages, made.questions[: N_QUESTIONS * 2 // 3] + strange)]


def _ecommerce(data_dir: Path) -> list[Problem]:
    """Answers without their questions: what finding a policy section by its body is like."""
    path = data_dir / "en_ecommerce_faq" / "Ecommerce_FAQ_Chatbot_dataset.json"
    rows = json.loads(path.read_text("utf-8"))["questions"]
    chance = random.Random(SEED)
    out = set(chance.sample(range(len(rows)), len(rows) // 4))
    # Two rows with one answer are one passage: either question finds it.
    ids = {row["answer"]: str(number) for number, row in enumerate(rows) if number not in out}
    passages = [
        Passage(one, "policy", title="", text=answer, lang="en", source="ecommerce") for answer, one in ids.items()
    ]
    questions = [
        Question(row["question"], frozenset([ids[row["answer"]]] if row["answer"] in ids else [])) for row in rows
    ]
    return [Problem("ecommerce-bodies", passages, questions)]


def _lcqmc(data_dir: Path) -> list[Problem]:
    rows = [line.split("\t") for line in (data_dir / "zh_lcqmc" / "dev.tsv").read_text("utf-8").splitlines()]
    pairs = [(row[0], row[1]) for row in rows if len(row) == 3 and row[2] == "1"][: N_QUESTIONS + 60]
    wordings = {f"{number:04}": [first] for number, (first, _) in enumerate(pairs)}
    return [_store("lcqmc", wordings, [(second, f"{n:04}") for n, (_, second) in enumerate(pairs)], 0.3)]


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


__all__ = ["SHIPPED", "Problem", "calibrate", "fit", "problems", "training_store"]
