"""`python -m finetune train --objective kto|dpo`: thumbs and pairs in, a run like any other out. Tiny random model."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bot.storage import Storage
from finetune.__main__ import main
from finetune.config import RunConfig
from finetune.preferences import Preferences, load_preferences
from tests.finetune.tiny import build_model

with_trl = pytest.mark.usefixtures("trl")


@pytest.fixture(scope="module")
def trl() -> None:
    pytest.importorskip("trl", reason="the extra `prefer` is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base"))


def _words(n: int) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choice("abcdefgh") for _ in range(8)) for _ in range(n)]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def pairs(path: Path, n: int = 60) -> Path:
    """TRL's shape: the reply that says yes is preferred to the one that says no."""
    return write(
        path,
        [
            {
                "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"is {w} here?"}],
                "chosen": [{"role": "assistant", "content": f"yes, {w}."}],
                "rejected": [{"role": "assistant", "content": "zzz no no"}],
            }
            for w in _words(n)
        ],
    )


def arguments(base: Path, data: Path, run: Path, objective: str) -> list[str]:
    given = {"max-tokens": 200, "row-tokens": 800, "batch-tokens": 800, "max-steps": 6, "eval-every": 3, "lr": "3e-3"}
    flags = [a for k, v in given.items() for a in (f"--{k}", str(v))]
    where = ["--base", str(base), "--data", str(data), "--run", str(run)]
    return ["train", "--objective", objective, *where, "--no-bf16", "--threads", "1", *flags]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [e for e in lines if e["kind"] == kind]


def result_of(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "result" / "adapter_model.safetensors")
    return found


@pytest.fixture(scope="module")
def preferred(trl: None, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished DPO run."""
    folder = tmp_path_factory.mktemp("dpo")
    run = folder / "run"
    assert main(arguments(base, pairs(folder / "pairs.jsonl"), run, "dpo")) == 0
    return run


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_dpo_learns_to_prefer_and_leaves_a_run_like_any_other(preferred: Path) -> None:
    steps, valid = events(preferred, "step"), events(preferred, "valid")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: nothing is preferred yet
    assert valid[-1]["loss"] < 0.6
    assert valid[-1]["accuracy"] == 1.0
    assert json.loads((preferred / "run.json").read_text())["config"]["objective"] == "dpo"
    result = json.loads((preferred / "result.json").read_text())
    assert (result["kind"], result["peft_type"], result["n_steps"]) == ("adapter", "LORA", 6)
    assert result["best_step"] == min(valid, key=lambda e: e["loss"])["step"]
    # One adapter, and no trace of TRL's reference beside it.
    assert sorted(p.name for p in (preferred / "result").iterdir() if p.is_dir()) == []
    assert all(".ref." not in name for name in result_of(preferred))
    assert "⟦yes" in (preferred / "mask_proof.txt").read_text()
    assert "Be kind." not in (preferred / "preferences-train.jsonl").read_text()
    assert (preferred / "curves.png").exists()


def test_a_dpo_run_that_goes_on_ends_with_the_same_bits(base: Path, preferred: Path, tmp_path: Path) -> None:
    data = preferred.parent / "pairs.jsonl"
    half = tmp_path / "half"
    shutil.copytree(preferred, half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-6")
    shutil.rmtree(half / "result")
    (half / "result.json").unlink()
    assert main([*arguments(base, data, half, "dpo"), "--resume"]) == 0
    resumed, whole = result_of(half), result_of(preferred)
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_dpo_run_is_evaluated_and_judged_by_the_gate(
    preferred: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate.toml"
    gate.write_text("min_held_out = 1\nmax_length_ratio = 1000\nmin_language_match = 0\nmax_forbidden = 1000\n")
    command = ["eval", "--run", str(preferred), "--gate", str(gate), "--samples", "2", "--max-new-tokens", "4"]
    assert main([*command, "--releases", str(tmp_path / "releases"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidate"]["perplexity"] < found["others"]["base"]["perplexity"]
    assert found["gate"]["passed"], found["gate"]["reasons"]


@with_trl
def test_kto_learns_from_the_thumbs_of_this_server_s_own_conversations(base: Path, tmp_path: Path) -> None:
    database = tmp_path / "conversations.sqlite3"
    asyncio.run(_thumbs(database, 60))
    run = tmp_path / "run"
    assert main(arguments(base, database, run, "kto")) == 0
    head = json.loads((run / "run.json").read_text())
    assert {"liked", "disliked"} <= set(head["counts"])
    assert events(run, "step")[-1]["loss"] < events(run, "step")[0]["loss"]
    assert result_of(run)


async def _thumbs(path: Path, n: int) -> None:
    storage = Storage(f"sqlite+aiosqlite:///{path}")
    await storage.open()
    try:
        for i, word in enumerate(_words(n)):
            conversation, _ = await storage.create_conversation("en")
            await _turn(storage, conversation, f"t{i}", f"is {word} here?", f"yes, {word}." if i % 2 else "zzz no")
            await storage.append(conversation, "rating", {"rated": 2, "value": "up" if i % 2 else "down"})
    finally:
        await storage.close()


async def _turn(storage: Storage, conversation: str, turn: str, question: str, *replies: str) -> None:
    await storage.append(conversation, "message", {"role": "visitor", "turn": turn, "text": question})
    for reply in replies:
        data = {"role": "bot", "turn": turn, "text": reply, "finish": "stop"}
        await storage.append(conversation, "message", data)


# --- Data ------------------------------------------------------------------------------------------------------------


def loaded(path: Path, objective: str) -> Preferences:
    return load_preferences(RunConfig(data=path, objective=objective, valid=0.0, test=0.0))


def test_a_regenerated_reply_is_preferred_to_the_one_before_unless_the_thumbs_say_the_opposite(tmp_path: Path) -> None:
    async def fill() -> None:
        storage = Storage(f"sqlite+aiosqlite:///{tmp_path / 'c.sqlite3'}")
        await storage.open()
        first, _ = await storage.create_conversation("en")
        await _turn(storage, first, "a", "do you ship abroad?", "we never do", "yes, to Canada")
        await _turn(storage, first, "b", "and to Peru?", "only by sea")
        second, _ = await storage.create_conversation("en")
        await _turn(storage, second, "c", "is it open on Sunday?", "yes, all day", "sorry, what?")
        await storage.append(second, "rating", {"rated": 2, "value": "up"})
        await storage.append(second, "rating", {"rated": 3, "value": "down"})
        await storage.close()

    asyncio.run(fill())
    found = {p.question: p for p in loaded(tmp_path / "c.sqlite3", "dpo").splits["train"]}
    assert (found["do you ship abroad?"].chosen, found["do you ship abroad?"].rejected) == (
        "yes, to Canada",
        "we never do",
    )
    assert (found["is it open on Sunday?"].chosen, found["is it open on Sunday?"].rejected) == (
        "yes, all day",
        "sorry, what?",
    )
    assert "and to Peru?" not in found  # nobody said anything of that reply


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "open today?", "chosen": "yes", "rejected": "no"},
        {
            "chosen": [{"role": "user", "content": "open today?"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": "open today?"}, {"role": "assistant", "content": "no"}],
        },
        {
            "input": {"messages": [{"role": "user", "content": "open today?"}]},
            "preferred_output": [{"role": "assistant", "content": "yes"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        },
    ],
    ids=["TRL explicit", "TRL implicit", "OpenAI"],
)
def test_pairs_are_read_in_the_usual_shapes(tmp_path: Path, line: dict[str, Any]) -> None:
    (one,) = loaded(write(tmp_path / "x.jsonl", [line]), "dpo").splits["train"]
    assert (one.question, one.chosen, one.rejected) == ("open today?", "yes", "no")


def test_personal_data_in_preferences_is_masked_before_training_sees_it(tmp_path: Path) -> None:
    line = {"prompt": "call me at 13812345678", "chosen": "we call 13812345678", "rejected": "no"}
    (one,) = loaded(write(tmp_path / "x.jsonl", [line]), "dpo").splits["train"]
    assert (one.question, one.chosen) == ("call me at [PHONE_1]", "we call [PHONE_1]")


def test_a_conversation_and_a_question_are_on_one_side(tmp_path: Path) -> None:
    lines = [
        {"id": f"c{n // 2}", "prompt": f"what of {w}?", "completion": f"{w} {k}", "label": k == 0}
        for n, w in enumerate(_words(200))
        for k in range(2)
    ]
    config = RunConfig(data=write(tmp_path / "x.jsonl", lines), objective="kto", valid=0.2, test=0.2)
    splits = load_preferences(config).splits
    assert all(splits.values())
    for what in ("group", "question"):
        sides = [{getattr(p, what) for p in found} for found in splits.values()]
        assert len(sides[0] | sides[1] | sides[2]) == sum(map(len, sides))


def test_the_sides_are_the_same_wherever_the_file_lies(tmp_path: Path) -> None:
    sides = []
    for n in range(3):
        folder = tmp_path / f"folder{n}"
        folder.mkdir()
        config = RunConfig(data=pairs(folder / "pairs.jsonl"), objective="dpo", valid=0.2, test=0.2)
        splits = load_preferences(config).splits
        sides.append({side: [p.question for p in found] for side, found in splits.items()})
    assert sides[0] == sides[1] == sides[2]
    assert all(sides[0].values())


def test_lines_that_are_no_preference_are_named_and_nothing_is_trained(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a?", "chosen": "b", "rejected": "b"},
        {"prompt": "a?", "completion": "b", "label": "yes"},
        {"prompt": [{"role": "king", "content": "a?"}], "chosen": "b", "rejected": "c"},
        {"messages": []},
    ]
    data = write(tmp_path / "x.jsonl", lines)
    assert main([*arguments(base, data, tmp_path / "run", "dpo"), "--json"]) == 2
    out = capsys.readouterr()
    faults = json.loads(out.out)["faults"]
    assert [f["source"].rpartition(":")[2] for f in faults] == ["1", "2", "3", "4"]
    assert len(out.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_thumbs_all_up_or_no_pairs_at_all_are_refused_in_words(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "x.jsonl", [{"prompt": w, "completion": "yes", "label": True} for w in _words(9)])
    assert main(arguments(base, data, tmp_path / "run", "kto")) == 2
    assert "kto needs some of each" in capsys.readouterr().err
    assert main(arguments(base, data, tmp_path / "run", "dpo")) == 2
    assert "dpo needs pairs" in capsys.readouterr().err


def test_without_the_extra_the_remedy_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(arguments(base, pairs(tmp_path / "x.jsonl"), tmp_path / "run", "dpo")) == 2
    err = capsys.readouterr().err
    assert "pip install 'zhanggui[prefer]'" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_compared_with_its_own_beginning_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments(base, pairs(tmp_path / "x.jsonl"), tmp_path / "run", "dpo"), "--method", "full"]
    assert main(command) == 2
    assert "method lora" in capsys.readouterr().err
