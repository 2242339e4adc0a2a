"""Several questions on the same passages share their beginning, and train as if each stood alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bot.errors import MerchantError
from bot.messages import Message
from finetune.config import load_config
from finetune.examples import IGNORE, Example, label_conversation, share_prefixes
from finetune.modeling import HfTokenizer, load_base, row_inputs, row_loss
from tests.finetune.tiny import build_model

PASSAGES = "Passages:\n[1] " + "Standard delivery costs ¥8 and is free from ¥99. " * 4


def family(base: Path, passages: str, *questions: str) -> list[Example]:
    tokenizer = HfTokenizer(base)
    out: list[Example] = []
    for n, question in enumerate(questions):
        talk = (Message("user", f"{passages}\n\n{question}"), Message("assistant", f"reply {n} " * (n + 1)))
        out += label_conversation(talk, (False, True), tokenizer, 900)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base"))


def test_joined_examples_have_the_loss_and_the_gradients_of_separate_ones(base: Path, tmp_path: Path) -> None:
    alone = family(base, PASSAGES, "how much?", "from where is it free?", "do you rent?")
    alone += family(base, "other", "hm?")
    joined = share_prefixes(alone, 2000)
    assert [len(e.branches) for e in joined] == [4, 0]
    assert len(joined[0].input_ids) < 0.6 * sum(len(e.input_ids) for e in alone[:3])
    config = load_config(None, {"data": tmp_path, "bf16": False, "method": "full"})
    gradients = []
    losses = []
    for examples in (alone, joined):
        model = load_base(base, config)
        loss = row_loss(model, row_inputs(examples, tuple(range(len(examples))), packed=True), config)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_every_learned_token_is_learned_once_and_none_of_the_beginning(base: Path) -> None:
    alone = family(base, PASSAGES, "how much?", "from where is it free?")
    joined = share_prefixes(alone, 2000)[0]
    assert joined.n_learned == sum(e.n_learned for e in alone)
    assert all(label == IGNORE for label in joined.labels[: joined.branches[0] + 1])
    assert sum(joined.branches) == len(joined.input_ids) == len(joined.labels)


def test_what_begins_otherwise_or_grows_too_long_stays_apart(base: Path) -> None:
    first, second = family(base, PASSAGES, "how much?", "and why?")
    assert share_prefixes([first, second], len(first.input_ids) + 10) == [first, second]
    other = family(base, "Passages:\n[1] Gift cards are valid for 3 years.", "how long?")[0]
    assert share_prefixes([first, other], 2000) == [first, other]


def test_a_stranger_that_shares_less_does_not_break_a_family_up(base: Path) -> None:
    head = "The shop's own words. " * 5
    one = family(base, head + PASSAGES, "how much?", "and why?", "for me?", "today?")
    gifts = "Passages:\n[1] Gift cards are valid for 3 years and cannot be paid out."
    two = family(base, head + gifts, "how long?", "cash?")
    joined = share_prefixes([*one, *two], 4000)
    assert [len(e.branches) for e in joined] == [5, 3]


def test_it_is_refused_with_adversarial_training(tmp_path: Path) -> None:
    with pytest.raises(MerchantError, match="shared_prefixes"):
        load_config(None, {"data": tmp_path, "shared_prefixes": True, "adversarial": "fgm"})
