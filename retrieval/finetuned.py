"""
`tune --method embedder`: a sentence-transformers model made better at a store's own questions, in versions.

Learns from (question, passage that answers it), every other passage of a batch being one that does not
(MultipleNegativesRankingLoss; Henderson et al., arXiv 1705.00652). As with the light model (tune.py), a fifth of the
questions is kept aside, and a model that does not find more of them is thrown away. Beside the light model's versions,
in `embedders/` of the same folder, lie the model's own files, `finetuned.json` (what it was made from, the report) and
`current.json`. Knows training and files; imports torch and sentence-transformers when it trains, not before.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval.embedder import Progress, VectorCache
from retrieval.embedders import SentenceTransformersEmbedder
from retrieval.errors import BadStore, Fault, RetrievalError
from retrieval.index import BODY_CHARS, body_of
from retrieval.learned import N_EXAMPLES
from retrieval.tune import Bench, Problem, trial
from retrieval.tuning import point_to

FOLDER = "embedders"
ABOUT = "finetuned.json"
FORMAT = 1
SEED = 7
EPOCHS = 4  # more where they are fewer steps than …
N_STEPS = 200
MOST_EPOCHS = 16
BATCH = 32  # as many passages each question is told from; two of one passage never meet
RATE = 5e-5
WARM_UP = 0.1  # of the steps
MAX_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and what answers it."""

    question: str
    passage: str
    key: str  # what the passage shares with its translation; no two of one stand in a batch


def tune_embedder(
    problem: Problem,
    base: SentenceTransformersEmbedder,
    cache: VectorCache,
    folder: Finetuned,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """
    Fine-tune `base`, keep it in `folder` where it wins, and return the report; "version" is None where it did not.

    Blocks: minutes, for a few hundred questions and a small model on two cores.

    Raises:
        BadStore: too few questions, or none that this knowledge answers.
        RetrievalError: the model cannot be trained.
        OSError: the folder cannot be written; nothing of it stays.
    """
    bench = Bench(problem, base, cache, progress)
    answerable, aside, rest = bench.split()
    texts: dict[str, str] = {}
    for passage in problem.passages:
        texts.setdefault(bench.keys[passage.id], body_of(passage)[:BODY_CHARS])
    pairs = [Pair(example.text, texts[example.key], example.key) for example in bench.examples(rest)]
    folder.folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".training-", dir=folder.folder))
    try:
        losses = fine_tune(base, pairs, beside, progress)
        own = VectorCache(None)  # vectors of a model that may be thrown away
        try:
            tuned = Bench(problem, SentenceTransformersEmbedder(str(beside), base.model), own, progress)
            report: dict[str, Any] = {
                "method": "embedder",
                "n_questions": len(answerable),
                "n_held_out": len(aside),
                "losses": losses,
                **trial(bench.outcomes(bench.plain, aside), tuned.outcomes(tuned.plain, aside)),
            }
        finally:
            own.close()
        version = folder.take(beside, base, report) if report["kept"] else None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {"version": version} | report


def fine_tune(
    base: SentenceTransformersEmbedder, pairs: Sequence[Pair], target: Path, progress: Progress | None = None
) -> list[float]:
    """
    Train a copy of `base` on `pairs`, save it to `target`, and return the mean loss of each epoch.

    Equal pairs give an equal model on one machine.

    Raises:
        RetrievalError: there is nothing to tell apart, or the library failed.
    """
    try:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.util import batch_to_device
    except ImportError as exc:
        raise RetrievalError("sentence-transformers is not installed: pip install sentence-transformers") from exc
    chance = random.Random(SEED)
    if len(pairs) > N_EXAMPLES:
        pairs = chance.sample(list(pairs), N_EXAMPLES)
    epochs = [list(_batches(pairs, chance)) for _ in range(EPOCHS)]
    while 0 < sum(map(len, epochs)) < N_STEPS and len(epochs) < MOST_EPOCHS:
        epochs.append(list(_batches(pairs, chance)))
    n_steps = sum(map(len, epochs))
    if not n_steps:
        raise RetrievalError("the questions are all of one passage: there is nothing to tell apart")
    query, passage = base.prefixes
    losses: list[float] = []
    try:
        torch.manual_seed(SEED)
        model: Any = SentenceTransformer(base.path)
        loss_of = MultipleNegativesRankingLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
        warm = max(1, round(WARM_UP * n_steps))
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (n_steps - step) / max(1, n_steps - warm), 1.0)
        )
        model.train()
        n_done = 0
        for batches in epochs:
            total = 0.0
            for batch in batches:
                columns = [[query + pair.question for pair in batch], [passage + pair.passage for pair in batch]]
                features = [batch_to_device(model.preprocess(texts), model.device) for texts in columns]
                loss = loss_of(features, None)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rates.step()
                total += loss.item()
                n_done += 1
                if progress:
                    progress(n_done, n_steps)
            losses.append(round(total / len(batches), 4))
        model.eval()
        model.save(str(target), create_model_card=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as exc:  # as embedders.py: the library's are a dozen kinds
        raise RetrievalError(f"{base.name} cannot be trained: {exc}") from exc
    return losses


def _batches(pairs: Sequence[Pair], chance: random.Random) -> Iterator[list[Pair]]:
    """Yield all pairs in batches of different passages; a last pair that has no other to be told from is left out."""
    left = list(pairs)
    chance.shuffle(left)
    while left:
        batch: dict[str, Pair] = {}
        rest: list[Pair] = []
        for pair in left:
            if len(batch) < BATCH and pair.key not in batch:
                batch[pair.key] = pair
            else:
                rest.append(pair)
        if len(batch) < 2:
            return
        yield list(batch.values())
        left = rest


class Finetuned:
    """The fine-tuned embedders beside a store's tuning: `embedders/` in its folder."""

    def __init__(self, tuned: Path) -> None:
        self.folder = tuned / FOLDER

    def take(self, model: Path, base: SentenceTransformersEmbedder, report: dict[str, Any]) -> str:
        """Make the files in `model` a version, the current one, and return its name. It appears whole or not at all."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"format": FORMAT, "base": base.model, "report": report, "created_at": created}
        (model / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", "utf-8")
        version = "e-" + SentenceTransformersEmbedder.checksum(model)[:10]
        model.chmod(0o755)
        if not (self.folder / version).is_dir():
            model.replace(self.folder / version)
        self.use(version)
        return version

    def use(self, version: str | None) -> None:
        """
        Make `version` the current one, or none of them.

        Raises:
            BadStore: there is no such version.
        """
        point_to(self.folder, version, self.versions())

    def versions(self) -> list[str]:
        """Return the versions there are, oldest first."""
        found = [path for path in self.folder.glob("e-*") if (path / ABOUT).is_file()]
        return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))]

    def current(self) -> str | None:
        """
        Return the version in use; None where there is none.

        Raises:
            BadStore: `current.json` is damaged, or names a version that is gone.
        """
        if not (self.folder / "current.json").is_file():
            return None
        version = _read(self.folder / "current.json").get("version")
        if version is not None and version not in self.versions():
            problem = "names no version; see tune --list and tune --use"
            raise BadStore([Fault(str(self.folder / "current.json"), None, "version", problem)])
        return version

    def open(self, choice: str) -> SentenceTransformersEmbedder | None:
        """
        Return the current version where it was made from the embedder `choice`; None where there is none such.

        Raises:
            BadStore: its files are damaged.
            RetrievalError: it cannot be loaded.
        """
        version = self.current()
        if version is None:
            return None
        base = _read(self.folder / version / ABOUT).get("base")
        if not isinstance(base, str) or choice != f"sentence-transformers:{base}":
            return None
        return SentenceTransformersEmbedder(str(self.folder / version), base)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        entry = json.loads(path.read_text("utf-8"))
        if not isinstance(entry, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as exc:
        problem = f"cannot be read ({exc}); use another version (tune --use) or none (tune --off)"
        raise BadStore([Fault(str(path), None, None, problem)]) from exc
    return entry
