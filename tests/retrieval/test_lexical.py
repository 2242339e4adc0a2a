"""lexical.py: BM25 and the share of a query it covers."""

from __future__ import annotations

import time

import numpy as np

from retrieval.lexical import Lexical


def test_the_text_with_the_rare_word_wins_and_covers_the_query() -> None:
    index = Lexical(["运费是多少", "怎么退货", "how do I return a pan", "postage cost"])
    for query, best in (("退货", 1), ("returning pans", 2), ("運費", 0)):
        scores, most = index.score(query)
        assert scores.shape == (4,)
        assert int(np.argmax(scores)) == best
        assert 0.5 < scores.max() / most < 1.6


def test_unknown_words_lower_the_coverage() -> None:
    index = Lexical(["we rent nothing", "pans and pots"])
    known, most_known = index.score("pans")
    mixed, most_mixed = index.score("pans sofas drones")
    assert mixed.max() / most_mixed < known.max() / most_known / 2


def test_nothing_in_common_is_zero_and_an_empty_index_answers() -> None:
    scores, most = Lexical(["pans"]).score("发票")
    assert scores.max() == 0
    assert most > 0
    assert Lexical([]).score("pans")[0].shape == (0,)


def test_three_thousand_texts_take_milliseconds() -> None:
    chance = np.random.default_rng(1)
    characters = [chr(0x4E00 + n) for n in range(800)]
    index = Lexical(["".join(row) for row in chance.choice(characters, (3_000, 15))])
    times = []
    for _ in range(20):
        query = "".join(chance.choice(characters, 12))
        began = time.process_time()
        index.score(query)
        times.append(time.process_time() - began)
    assert sorted(times)[10] < 0.01  # 1 ms on an idle machine; the bound is for a busy one
