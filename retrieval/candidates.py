"""
Which passages a query is compared with in full: the nearest, those that share most words, and what it names.

Knows neither weights nor the clock: what may be found is handed in as a mask. The step whose time depends on the size
of the store; everything after it sees a few hundred passages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.glossary import Gloss
from retrieval.index import Index, side_of
from retrieval.terms import Slot
from retrieval.vectors import FLAT_UNITS

N_DENSE = 160  # units of each language taken from the vector side
N_LEXICAL = 64  # passages taken from the word side that the vector side did not bring

_second_core = ThreadPoolExecutor(2, thread_name_prefix="nearest")  # its threads begin with the first large index


@dataclass(frozen=True, slots=True)
class Across:
    """A query in the other language, for the passages that are in that one alone."""

    gloss: Gloss
    raw: NDArray[np.float32]  # its vector (dim,) as the embedder gave it
    placed: NDArray[np.float32]  # the same as `index.place` returns it
    only: NDArray[np.bool_]  # which passages (n_passages,) have no translation in the query's language
    alone: NDArray[np.bool_]  # which of them may be found


@dataclass(frozen=True, slots=True)
class Candidates:
    """The passages one query is compared with."""

    owners: NDArray[np.int64]  # numbers of passages, ascending
    coverage: NDArray[np.float64]  # weighted share of the query's words that each has, in [0, 1]
    exact: set[int]  # FAQs and products one of whose wordings is the query
    n_words: int  # of the query as it is written
    units: NDArray[np.int64]  # what was nearest to `placed`, ascending: those cosines are known already …
    cosines: NDArray[np.float32]  # … and need not be computed again


def find_candidates(
    index: Index,
    query: str,
    raw: NDArray[np.float32],
    placed: NDArray[np.float32],
    allowed: NDArray[np.bool_],
    slots: Sequence[Slot] = (),
    named: Collection[int] = (),
    across: Across | None = None,
) -> Candidates:
    """
    Return the candidates for `query` among the `allowed` passages (n_passages,).

    `raw` (dim,) is the query's vector as the embedder gave it, `placed` the same as `index.place` returns it; `slots`
    are the other ways to read it, `named` the passages whose article number or coupon code it has. `across` is the
    query in the other language, where some allowed passages are in that one alone.
    """
    # The nearest of each language by itself: across languages cosines are lower, not worse.
    ours = side_of(query)
    theirs = "en" if ours == "zh" else "zh"

    def nearest_of_theirs() -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        found = [index.nearest(raw, placed, theirs, allowed, N_DENSE)]
        if across is not None:
            found.append(index.nearest(across.raw, across.placed, theirs, across.alone, N_DENSE))
        return found

    # Of a small store less than a millisecond, and handing it to a thread would cost as much; of a larger one it is
    # done outside the interpreter's lock while this thread does the rest.
    other = _second_core.submit(nearest_of_theirs) if len(index.units) > FLAT_UNITS else None
    of_ours = index.nearest(raw, placed, ours, allowed, N_DENSE)
    lexical = index.lexical.query(query, slots)
    by_words = [lexical.best(allowed, N_LEXICAL)]
    if across is not None:
        translated = index.lexical.query(across.gloss.apart, across.gloss.slots)
        by_words.append(translated.best(across.alone, N_LEXICAL))
    of_theirs = nearest_of_theirs() if other is None else other.result()
    near = [of_ours, of_theirs[0]]
    cosines, nearest = (np.concatenate([found[part] for found in near]) for part in (0, 1))
    in_order = np.argsort(nearest)
    units = [nearest, *(found[1] for found in of_theirs[1:])]
    exact = {n for n in index.worded(query) if index.passages[n].kind in ("faq", "product")}
    brought = _distinct(index.owners[np.concatenate(units)].astype(np.int64))
    owners = _distinct(np.concatenate([brought, *by_words, np.fromiter(exact.union(named), dtype=np.int64)]))
    shares = lexical.of(owners) / max(lexical.most, 1e-9)
    if across is not None:
        in_other = translated.of(owners) / max(translated.most, 1e-9)
        shares = np.where(across.only[owners], np.maximum(shares, in_other), shares)
    near_enough = np.zeros(len(owners), dtype=np.bool_)
    near_enough[np.searchsorted(owners, brought)] = True
    kept = allowed[owners] & (near_enough | (shares > 0))
    coverage = np.minimum(shares[kept], 1.0).astype(np.float64)
    return Candidates(owners[kept], coverage, exact, lexical.n_words, nearest[in_order], cosines[in_order])


def _distinct(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each of a few hundred numbers once, ascending; np.unique takes ten times as long for so few."""
    ordered = np.sort(numbers)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered
