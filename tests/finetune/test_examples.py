"""Masks, truncation, rows: what is learned is what the assistant said, with any chat template."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bot.messages import Message
from bot.settings import default_cache_dir
from finetune.examples import IGNORE, Example, ExampleTooLong, TemplateUnusable, label_conversation, plan_epoch
from finetune.modeling import HfTokenizer
from tests.finetune.tiny import CHATML, GEMMA, QWEN3, QWEN25, build_model

TALK = (
    Message("system", "Be brief."),
    Message("user", "运费多少？"),
    Message("assistant", "¥8，满¥99包邮。"),
    Message("user", "and to Lhasa?"),
    Message("assistant", "¥15 more."),
)
ALL = (False, False, True, False, True)
END = {CHATML: "<|im_end|>", QWEN25: "<|im_end|>", QWEN3: "<|im_end|>", GEMMA: "<end_of_turn>"}


def learned(example: Example, tokenizer: HfTokenizer) -> list[str]:
    """Return the stretches of text that are learned."""
    stretches: list[list[int]] = []
    before = IGNORE
    for label in example.labels:
        if label != IGNORE:
            if before == IGNORE:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(s) for s in stretches]


@pytest.mark.parametrize("template", [CHATML, QWEN25, GEMMA], ids=["chatml", "qwen2.5", "gemma"])
def test_every_reply_is_learned_with_its_end_and_nothing_else(tmp_path: Path, template: str) -> None:
    tokenizer = HfTokenizer(build_model(tmp_path, template))
    (example,) = label_conversation(TALK, ALL, tokenizer, 1000)
    assert learned(example, tokenizer) == [f"¥8，满¥99包邮。{END[template]}", f"¥15 more.{END[template]}"]
    assert all(label in (IGNORE, token) for token, label in zip(example.input_ids, example.labels, strict=True))


def test_where_past_replies_are_written_otherwise_there_is_one_example_a_reply(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(build_model(tmp_path, QWEN3))
    first, second = label_conversation(TALK, ALL, tokenizer, 1000)
    assert learned(first, tokenizer) == ["<think>\n\n</think>\n\n¥8，满¥99包邮。<|im_end|>"]
    assert learned(second, tokenizer) == ["<think>\n\n</think>\n\n¥15 more.<|im_end|>"]
    # The earlier reply stands in the second prompt without thoughts, as serving would show it.
    assert "assistant\n¥8" in tokenizer.decode(second.input_ids)


@pytest.mark.parametrize("template", [CHATML, QWEN25, QWEN3, GEMMA], ids=["chatml", "qwen2.5", "qwen3", "gemma"])
def test_the_tokens_before_a_reply_are_those_serving_makes(tmp_path: Path, template: str) -> None:
    tokenizer = HfTokenizer(build_model(tmp_path, template))
    example = label_conversation(TALK, (False, False, False, False, True), tokenizer, 1000)[-1]
    turns = [{"role": m.role, "content": m.content} for m in TALK[:-1]]
    served = tokenizer.inner.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    n = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    assert list(example.input_ids[:n]) == served


@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"])
def test_masks_hold_on_the_embedded_models_own_tokenizers(name: str) -> None:
    folder = default_cache_dir() / "models" / name
    if not folder.exists():
        pytest.skip(f"{name} is not in the cache; `python -m bot models fetch {name}`")
    tokenizer = HfTokenizer(folder)
    (example,) = label_conversation(TALK, ALL, tokenizer, 1000)
    assert learned(example, tokenizer) == ["¥8，满¥99包邮。<|im_end|>", "¥15 more.<|im_end|>"]
    # SmolLM2's padding token is its end of turn: labels must not come from it.
    assert example.labels[-1] == tokenizer.inner.convert_tokens_to_ids("<|im_end|>")


def test_a_reply_that_is_not_to_be_learned_is_context(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(build_model(tmp_path))
    (example,) = label_conversation(TALK, (False, False, True, False, False), tokenizer, 1000)
    assert learned(example, tokenizer) == ["¥8，满¥99包邮。<|im_end|>"]
    assert "Lhasa" not in tokenizer.decode(example.input_ids)  # nothing behind the last learned token is computed
    assert label_conversation(TALK, (False,) * 5, tokenizer, 1000) == []


def test_what_is_too_long_loses_its_oldest_turns_whole(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(build_model(tmp_path))
    (whole,) = label_conversation(TALK, ALL, tokenizer, 1000)
    (shorter,) = label_conversation(TALK, ALL, tokenizer, len(whole.input_ids) - 1)
    text = tokenizer.decode(shorter.input_ids)
    assert "Be brief." in text
    assert "Lhasa" in text
    assert "运费" not in text
    assert learned(shorter, tokenizer) == ["¥15 more.<|im_end|>"]
    with pytest.raises(ExampleTooLong):
        label_conversation(TALK, ALL, tokenizer, 20)


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = HfTokenizer(build_model(tmp_path, endless))
    with pytest.raises(TemplateUnusable, match="never end"):
        label_conversation(TALK, ALL, tokenizer, 1000)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_example_once_within_its_bounds(packing: bool) -> None:
    rng = random.Random(2)
    lengths = [rng.randint(5, 200) for _ in range(500)]
    steps = plan_epoch(lengths, row_tokens=256, batch_tokens=1024, packing=packing, seed=3, epoch=1)
    rows = [row for step in steps for row in step]
    assert sorted(n for row in rows for n in row) == list(range(500))
    size = [sum(lengths[n] for n in r) if packing else len(r) * max(lengths[n] for n in r) for r in rows]
    assert max(size) <= 256
    assert all(sum(sum(lengths[n] for n in r) for r in step) <= 1024 for step in steps)
    if packing:
        assert sum(lengths) / (256 * len(rows)) > 0.9  # rows are full
    assert steps == plan_epoch(lengths, row_tokens=256, batch_tokens=1024, packing=packing, seed=3, epoch=1)
    assert steps != plan_epoch(lengths, row_tokens=256, batch_tokens=1024, packing=packing, seed=3, epoch=2)


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_has_as_many_examples_as_are_asked_for(packing: bool) -> None:
    rng = random.Random(2)
    lengths = [rng.randint(5, 200) for _ in range(50)]
    steps = plan_epoch(
        lengths, row_tokens=256, batch_tokens=1024, packing=packing, seed=3, epoch=1, batch_examples=8
    )  # fmt: skip
    assert [sum(map(len, step)) for step in steps] == [8, 8, 8, 8, 8, 8, 2]
    assert sorted(n for step in steps for row in step for n in row) == list(range(50))
    assert all(
        (sum if packing else lambda r: len(r) * max(r))([lengths[n] for n in row]) <= 256
        for step in steps
        for row in step
    )
