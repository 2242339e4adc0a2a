"""`python -m finetune train` on a tiny random model: exact, resumable, refused where it must be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bot.errors import MerchantError
from bot.messages import Message
from bot.prompt import PromptStore, render_prompt
from finetune.__main__ import main
from finetune.config import RunConfig
from finetune.dialogues import Dialogue, Line
from finetune.examples import Example, label_conversation
from finetune.grounding import REFUSALS, conversations
from finetune.modeling import HfTokenizer, adapt, load_base, row_inputs, row_loss
from finetune.parallel import device_of
from retrieval.passages import Passage
from tests.finetune.tiny import build_data, build_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "imported")


def arguments(base: Path, data: Path, run: Path, **flags: Any) -> list[str]:
    values = {
        "max-tokens": 200,
        "row-tokens": 400,
        "batch-tokens": 800,
        "epochs": 50,
        "max-steps": 6,
        "eval-every": 3,
        "threads": 1,
        **flags,
    }
    listed = [a for k, v in values.items() for a in ((f"--{k}",) if v is True else (f"--{k}", str(v)))]
    return ["train", "--base", str(base), "--data", str(data), "--run", str(run), "--no-bf16", *listed]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "best.safetensors")
    return found


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    folders = sorted((run / "checkpoints").iterdir(), key=lambda p: int(p.name[5:]))
    found: dict[str, torch.Tensor] = load_file(folders[-1] / "weights.safetensors")
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [e["loss"] for e in lines if e["kind"] == "step"]


# --- Rows ------------------------------------------------------------------------------------------------------------


def _examples(base: Path) -> list[Example]:
    tokenizer = HfTokenizer(base)
    out = []
    for n in range(5):
        talk = (Message("user", "question " * (n + 1)), Message("assistant", f"reply {n} " * (5 - n)))
        out += label_conversation(talk, (False, True), tokenizer, 500)
    return out


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_a_packed_row_is_equal_to_its_conversations_one_by_one(tmp_path: Path, sliding: bool) -> None:
    folder = build_model(tmp_path, sliding=sliding)
    examples = _examples(folder)
    config = RunConfig(data=tmp_path, bf16=False, method="full")
    packed, plain = (
        load_base(folder, config),
        load_base(folder, RunConfig(data=tmp_path, bf16=False, method="full", packing=False)),
    )
    together = row_loss(packed, row_inputs(examples, (0, 1, 2, 3, 4), packed=True), config)
    alone = sum(row_loss(plain, row_inputs(examples, (n,), packed=False), config) for n in range(5))
    padded = row_loss(plain, row_inputs(examples, (4, 3, 2, 1, 0), packed=False), config)
    assert isinstance(alone, torch.Tensor)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    assert padded.item() == pytest.approx(alone.item(), rel=1e-5)
    # So are the gradients, every one of them.
    together.backward()
    alone.backward()
    for (name, p), q in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_what_stands_beside_a_conversation_in_its_row_changes_nothing_of_it(base: Path, tmp_path: Path) -> None:
    examples = _examples(base)
    config = RunConfig(data=tmp_path, bf16=False, method="full")
    model = load_base(base, config)
    other = Example(tuple(reversed(examples[1].input_ids)), tuple(reversed(examples[1].labels)))

    def logits_of_last(neighbour: Example) -> torch.Tensor:
        inputs = row_inputs([neighbour, examples[2]], (0, 1), packed=True)
        with torch.no_grad():
            out = model(
                input_ids=inputs.input_ids, position_ids=inputs.position_ids, segments=inputs.segments, use_cache=False
            )
        return out.logits[0, -len(examples[2].input_ids) :]

    torch.testing.assert_close(logits_of_last(examples[1]), logits_of_last(other), rtol=0, atol=0)


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything_needed_to_make_it_again(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*arguments(base, data, run, lr="3e-3"), "--max-steps", "20", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert losses(run)[-1] < losses(run)[0] - 0.1
    assert result["best_loss"] < json.loads((run / "events.jsonl").read_text().splitlines()[3])["loss"]
    head = json.loads((run / "run.json").read_text())
    assert head["config"]["rank"] == 16
    assert head["config"]["rslora"] is True
    assert head["data_sha256"] == json.loads((data / "manifest.json").read_text())["data_sha256"]
    assert head["environment"]["packages"]["peft"]
    assert head["prompt_version"]
    assert head["base_sha256"]
    assert head["chat_template_sha256"]
    assert result["estimate"]["n_tokens"] > 0
    assert result["estimate"]["seconds"] > 0
    assert "⟦yes, the " in (run / "mask_proof.txt").read_text(encoding="utf-8")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert (run / "result" / "adapter_model.safetensors").exists()
    assert json.loads((run / "result" / "adapter_config.json").read_text())["use_rslora"] is True


def test_a_run_goes_on_from_an_adapter(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shape = [
        "--rank",
        "8",
        "--alpha",
        "12",
        "--set",
        'targets=["q_proj","v_proj","down_proj"]',
        "--set",
        "from_layer=1",
    ]
    assert main([*arguments(base, data, first, lr="2e-2"), *shape, "--max-steps", "20"]) == 0
    more = ["--max-steps", "4", "--start-from", str(first / "result")]
    assert main([*arguments(base, data, second, lr="1e-9"), *more]) == 0
    # It begins where the first one ended, and steps of next to nothing leave it there.
    assert losses(second)[0] < losses(first)[0] - 0.1
    ours, theirs = (load_file(run / "result" / "adapter_model.safetensors") for run in (first, second))
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    head = json.loads((second / "run.json").read_text())
    assert head["config"]["start_from"] == str(first / "result")
    assert (head["config"]["rank"], head["config"]["alpha"], head["config"]["from_layer"]) == (
        8,
        12,
        1,
    )  # the adapter's
    assert len(head["start_from_sha256"]) == 64
    capsys.readouterr()
    for extra, says in (
        (["--rank", "16"], "has rank 8, the run 16"),
        (["--set", "from_layer=0"], "other layers"),
        (["--start-from", str(data)], "holds no adapter"),
        (["--method", "ia3"], "start_from goes on with a LoRA adapter"),
    ):
        assert main([*arguments(base, data, tmp_path / "no"), *more, *extra]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
        shutil.rmtree(tmp_path / "no", ignore_errors=True)


def test_a_rerun_is_equal_to_the_bit(base: Path, data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(arguments(base, data, tmp_path / name, set="dropout=0.1")) == 0
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert main(arguments(base, data, tmp_path / "c", set="dropout=0.1", seed=1)) == 0
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.timeout(180)  # a second process imports torch, which takes half a minute on a busy machine
def test_a_stopped_run_says_how_to_go_on_and_ends_with_the_same_bits(base: Path, data: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"max-steps": 40, "eval-every": 20, "patience": 0, "set": "dropout=0.1"}
    command = [sys.executable, "-m", "finetune", *arguments(base, data, tmp_path / "cut", **flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    events = tmp_path / "cut" / "events.jsonl"
    while (not events.exists() or events.read_text().count('"kind": "step"') < 5) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "--resume goes on from there" in err
    assert "Traceback" not in err
    assert not (tmp_path / "cut" / "result.json").exists()
    assert main([*arguments(base, data, tmp_path / "cut", **flags), "--resume"]) == 0
    assert main(arguments(base, data, tmp_path / "whole", **flags)) == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert equal(last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut"))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_going_on_from_any_checkpoint_ends_with_the_same_bits(
    base: Path, data: Path, tmp_path: Path, method: str
) -> None:
    flags: dict[str, Any] = {"method": method, "max-steps": 12, "eval-every": 3, "set": "keep_checkpoints=9"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(arguments(base, data, whole, **flags)) == 0
    # What a process leaves that was killed while it wrote its third checkpoint.
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "result")
    (cut / "checkpoints" / "step-9").rename(cut / "checkpoints" / "step-9.partial")
    shutil.rmtree(cut / "checkpoints" / "step-12")
    assert main([*arguments(base, data, cut, **flags), "--resume"]) == 0
    assert equal(last_weights(whole), last_weights(cut))
    assert equal(weights(whole), weights(cut))


@pytest.mark.parametrize("method", ["adalora", "ia3", "prefix", "prompt", "full"])
def test_every_method_learns_and_says_what_can_serve_it(
    base: Path, data: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lr = {"full": "1e-2", "adalora": "2e-2", "ia3": "3e-2", "prefix": "5e-2", "prompt": "3e-1"}[method]
    assert main([*arguments(base, data, tmp_path / "run", method=method, lr=lr, **{"max-steps": 12}), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert result["serve"]["cpu"] == {"prefix": "evaluate", "prompt": "evaluate"}.get(method, "merged")
    assert any((tmp_path / "run" / "result").glob("*.safetensors"))


def test_adaloras_ranks_adapt_and_fold_into_a_plain_lora_of_the_same_model(
    base: Path, data: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert (
        main(
            arguments(
                base, data, tmp_path / "run", method="adalora", rank=4, lr="2e-2", **{"max-steps": 30, "eval-every": 30}
            )
        )
        == 0
    )
    steps = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    ranks = [e["mean_rank"] for e in steps if e["kind"] == "step"]
    assert ranks[2] > 4.5
    assert ranks[-1] == pytest.approx(4, abs=0.1)
    config = json.loads((tmp_path / "run" / "result" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    folded = {*config["rank_pattern"].values(), config["r"]}
    assert len(folded) > 1  # the layers did not all end with the same rank

    # The folded adapter computes what AdaLoRA does.
    run_config = RunConfig(data=data, method="adalora", rank=4, bf16=False, packing=False)
    own = adapt(load_base(base, run_config), run_config, 30, "base")
    from finetune.modeling import trainable

    tensors = weights(tmp_path / "run")
    with torch.no_grad():
        for name, p in trainable(own).items():
            p.copy_(tensors[name])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "run" / "result"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        a, b = own.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits
        untuned = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (a - untuned).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "method"), [("fgm", "lora"), ("freelb", "full")])
def test_adversarial_training_changes_the_gradients_not_the_reported_loss(
    base: Path, data: Path, tmp_path: Path, kind: str, method: str
) -> None:
    lr = "1e-3"
    for name, flags in (("plain", {}), ("hard", {"adversarial": kind})):
        assert main(arguments(base, data, tmp_path / name, method=method, lr=lr, **{"max-steps": 3, **flags})) == 0
    assert losses(tmp_path / "plain")[0] == pytest.approx(losses(tmp_path / "hard")[0], rel=1e-5)
    assert not equal(weights(tmp_path / "plain"), weights(tmp_path / "hard"))


def test_fgms_disturbance_raises_the_loss_by_its_length(base: Path, tmp_path: Path) -> None:
    from finetune.adversarial import Disturbance

    config = RunConfig(data=tmp_path, bf16=False, method="full")
    model = load_base(base, config)
    disturbance = Disturbance(model.get_input_embeddings())
    inputs = row_inputs(_examples(base), (0, 1, 2), packed=True)
    seen: list[tuple[float, list[float]]] = []

    def loss_of() -> torch.Tensor:
        loss = row_loss(model, inputs, config)
        delta = disturbance.delta
        assert delta is not None
        assert inputs.segments is not None
        seen.append((loss.item(), [p.norm().item() for p in delta[0].split(list(inputs.segments))]))
        return loss

    clean = disturbance.fgm(loss_of, inputs.segments, 0.02)
    assert seen[0][1] == [0.0, 0.0, 0.0]
    assert clean.item() == seen[0][0]
    assert seen[1][1] == pytest.approx([0.02] * 3, rel=1e-4)
    assert seen[1][0] > seen[0][0]


def test_gradient_checkpointing_changes_no_bit_of_the_result(base: Path, data: Path, tmp_path: Path) -> None:
    assert main(arguments(base, data, tmp_path / "a")) == 0
    assert main([*arguments(base, data, tmp_path / "b"), "--checkpointing"]) == 0
    for key, value in weights(tmp_path / "a").items():
        torch.testing.assert_close(value, weights(tmp_path / "b")[key], rtol=1e-5, atol=1e-6)


def test_training_stops_early_and_keeps_the_best(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"lr": "3e-1", "max-steps": 60, "eval-every": 2, "patience": 2, "schedule": "constant"}
    assert main(arguments(base, data, tmp_path / "run", **flags)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["n_steps"] < 60
    assert "no gain in 2 validations" in result["stopped"]
    assert result["best_step"] < result["n_steps"]


def test_a_dry_run_estimates_and_leaves_nothing(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(base, data, tmp_path / "run"), "--dry-run", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["n_steps"] == 6
    assert estimate["memory_bytes"] > 0
    assert not (tmp_path / "run").exists()


# --- Several processes -----------------------------------------------------------------------------------------------

# What two processes may differ by from one: the order in which the same float32 numbers are added. Measured 2e-8.
SAME = 1e-5


def validations(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [e["loss"] for e in lines if e["kind"] == "valid"]


@pytest.mark.timeout(240)  # new processes import torch
@pytest.mark.parametrize(
    ("method", "more"), [("lora", []), ("lora", ["--fsdp"]), ("full", ["--fsdp"])], ids=["lora", "lora-fsdp", "fsdp"]
)
def test_two_processes_make_the_steps_of_one_and_one_goes_on_where_they_were(
    base: Path, data: Path, tmp_path: Path, method: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"method": method, "lr": "3e-3", "row-tokens": 250, "batch-tokens": 750, "patience": 0,
                             "set": "keep_checkpoints=9"}  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(arguments(base, data, one, **flags)) == 0
    # As it is typed: under `python -m` the command's own module has another name, which the new processes do not know.
    typed = [sys.executable, "-m", "finetune", *arguments(base, data, two, **flags), "--gpus", "2", *more]
    subprocess.run(typed, cwd=ROOT, check=True, timeout=200)
    assert losses(two) == pytest.approx(losses(one), rel=SAME)
    assert validations(two) == pytest.approx(validations(one), rel=SAME)
    a, b = last_weights(one), last_weights(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    # Every row once, whoever had it.
    lines = [json.loads(x) for x in (two / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [e["step"] for e in lines if e["kind"] == "step"] == list(range(1, 7))
    n_two, n_one = (json.loads((r / "result.json").read_text())["n_tokens"] for r in (two, one))
    assert n_two == n_one
    assert json.loads((two / "estimate.json").read_text())["n_processes"] == 2
    # The state that two wrote, sharded or not, is whole: one goes on from it and ends where they did.
    for gone in ("result", "checkpoints/step-6"):
        shutil.rmtree(two / gone)
    assert main([*arguments(base, data, two, **flags), "--resume"]) == 0
    for name, found in last_weights(two).items():
        torch.testing.assert_close(found, b[name], rtol=1e-3, atol=1e-5, msg=name)


def test_rows_are_dealt_once_each_and_evenly() -> None:
    from finetune.parallel import deal

    rows = [(n,) for n in range(7)]
    sizes = [900, 100, 500, 400, 100, 300, 200]
    dealt = deal(rows, sizes, 3)
    assert sorted(r for of_one in dealt for r in of_one) == rows
    loads = [sum(sizes[r[0]] for r in of_one) for of_one in dealt]
    assert max(loads) - min(loads) <= 100
    assert deal(rows[:1], sizes, 3) == [[(0,)], [], []]


# --- Who watches -----------------------------------------------------------------------------------------------------

WANDB = """
import json, pathlib
class Run:
    def __init__(self, **given):
        self.path = pathlib.Path(given["dir"]) / "wandb.jsonl"
        self.write({"init": {k: str(v) if k == "dir" else v for k, v in given.items()}})
    def write(self, line):
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\\n")
    def log(self, values, step):
        self.write({"step": step, **values})
    def finish(self):
        self.write({"finished": True})
def init(**given):
    return Run(**given)
"""


def test_weights_and_biases_sees_every_event_when_asked(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert main(arguments(base, data, tmp_path / "run", wandb="my-store")) == 0
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "wandb.jsonl").read_text().splitlines()]
    assert lines[0]["init"]["project"] == "my-store"
    assert lines[0]["init"]["config"]["rank"] == 16
    assert [x["step/loss"] for x in lines if "step/loss" in x] == losses(tmp_path / "run")
    assert [x["step"] for x in lines if "valid/loss" in x] == [3, 6]
    assert lines[-1] == {"finished": True}


def test_without_wandb_asking_for_it_is_refused_before_anything_is_written(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    assert main(arguments(base, data, tmp_path / "run", wandb="my-store")) == 2
    err = capsys.readouterr().err
    assert "pip install wandb" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main(arguments(base, data, tmp_path / "run")) == 0  # and nobody else needs it


def test_a_terminal_shows_a_bar_with_the_time_left_and_a_log_no_escape_codes(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(base, data, tmp_path / "log")) == 0
    log = capsys.readouterr().err
    assert "step 3: validation loss" in log
    assert "\x1b" not in log
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(arguments(base, data, tmp_path / "terminal")) == 0
    shown = capsys.readouterr().err
    assert "[##############################] 6/6 loss " in shown
    assert " left" in shown


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_then_follows_its_schedule(
    base: Path, data: Path, tmp_path: Path, schedule: str
) -> None:
    flags: dict[str, Any] = {"schedule": schedule, "lr": "1e-3", "warmup": 0.5, "weight-decay": 0.01, "max-steps": 4}
    assert main([*arguments(base, data, tmp_path / "run", **flags), "--checkpointing"]) == 0
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [e["lr"] for e in events if e["kind"] == "step"]
    after = {"cosine": [1e-3, 5e-4], "linear": [1e-3, 5e-4], "constant": [1e-3, 1e-3]}[schedule]
    assert rates == pytest.approx([5e-4, 1e-3, *after])
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (config["weight_decay"], config["gradient_checkpointing"]) == (0.01, True)


# --- Refused before it starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--method", "prefix", "--checkpointing"], "gradient checkpointing"),
        (["--method", "prompt", "--publishable"], "cannot be published"),
        (["--method", "prefix", "--adversarial", "fgm"], "adversarial"),
        (["--max-tokens", "512"], "row_tokens is below max_tokens"),
        (["--rank", "0"], "rank"),
        (["--set", "colour=red"], "colour"),
        (["--set", 'targets=["no_proj"]'], "no linear layer 'no_proj'"),
        (["--resume"], "nothing to resume"),
        (["--fsdp"], "fsdp shards a dialogue model over two processes"),
        (["--method", "head"], "add task classify"),
        (["--device", "cuda"], "cuda is not available here"),
    ],
    ids=[
        "prefix-checkpointing",
        "publishable",
        "prefix-fgm",
        "rows",
        "rank",
        "unknown",
        "targets",
        "resume",
        "fsdp",
        "head",
        "cuda",
    ],
)
def test_what_cannot_go_together_is_refused_in_one_line(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], says: str
) -> None:
    assert main([*arguments(base, data, tmp_path / "run"), *extra]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_unmasked_data_is_refused(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train.jsonl").write_text((data / "train.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(arguments(base, raw, tmp_path / "run")) == 2
    assert "python -m finetune import" in capsys.readouterr().err

    # A folder that says it is masked, and is not: somebody edited both the data and the checksum.
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    text = (copy / "train.jsonl").read_text(encoding="utf-8").replace("is the ", "call 138 1234 5678: is the ", 1)
    (copy / "train.jsonl").write_text(text, encoding="utf-8")
    assert main(arguments(base, copy, tmp_path / "run")) == 2
    assert "changed since its import" in capsys.readouterr().err
    import hashlib

    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["train.jsonl"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments(base, copy, tmp_path / "run")) == 2
    assert "holds personal data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_runs_folder_is_not_taken_for_another(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, data, tmp_path / "run")) == 0
    assert main(arguments(base, data, tmp_path / "run")) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*arguments(base, data, tmp_path / "run", rank=8), "--resume"]) == 2
    assert "rank was 16 and is 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", 'method = "ia3"\nlr = 0.02\n'),
        ("c.yaml", "method: ia3\nlr: 0.02\n"),
        ("c.json", '{"method": "ia3", "lr": 0.02}'),
    ],
)
def test_a_configuration_file_is_read_and_flags_win(
    base: Path, data: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    assert main([*arguments(base, data, tmp_path / "run", lr="0.01"), "--config", str(tmp_path / name)]) == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["method"] == "ia3"
    assert config["lr"] == 0.01


def test_a_broken_configuration_names_its_file(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("method = ")
    assert main([*arguments(base, data, tmp_path / "run"), "--config", str(tmp_path / "c.toml")]) == 2
    assert "c.toml" in capsys.readouterr().err


# --- Grounding -------------------------------------------------------------------------------------------------------


def _passage(id_: str, text: str) -> Passage:
    return Passage(id_, "faq", id_, text, "en", "faqs.csv:1")


STORE = PromptStore({"zh": "青禾", "en": "Qinghe"}, {"zh": "", "en": ""})
DIALOGUE = Dialogue(
    "d",
    (
        Line("user", "How much is shipping?"),
        Line("assistant", "It is ¥8."),
        Line("user", "And the lamp?"),
        Line("assistant", "The lamp is ¥129, [NAME_1]."),
        Line("user", "warranty?"),
        Line("assistant", "It has 36 months."),
        Line("user", "ok, my order is [ORDER_1]"),
        Line("assistant", "I have noted [ORDER_1]."),
    ),
    "x:1",
    lang="en",
)


def _grounded(unanswerable: float) -> tuple[list[Any], dict[str, int]]:
    from collections import Counter

    counts: Counter[str] = Counter()
    passages = [
        _passage("b-ship", "Shipping costs ¥8."),
        _passage("a-lamp", "The lamp costs ¥129."),
        _passage("c", "We are open daily."),
    ]
    found = list(
        conversations(
            [DIALOGUE], STORE, lambda question, history, language, at, k: passages[:k], n_passages=2, unanswerable=unanswerable,
            ungrounded="drop", seed=0, count_tokens=lambda m: 1, max_prompt_tokens=100, counts=counts,
        )
    )  # fmt: skip
    return found, counts


def test_training_prompts_are_the_ones_serving_renders() -> None:
    found, counts = _grounded(0.0)
    first = found[0]
    served = render_prompt(
        STORE,
        (),
        "How much is shipping?",
        [_passage("b-ship", "Shipping costs ¥8."), _passage("a-lamp", "The lamp costs ¥129.")],
        "en",
    )
    assert list(first.messages[:-1]) == served
    assert first.messages[-1] == Message("assistant", "It is ¥8.")
    assert first.learn[-1]
    assert not any(first.learn[:-1])
    # A reply that makes up a name is not learned, nor one with a figure from nowhere.
    assert [c.messages[-1].content for c in found] == ["It is ¥8.", "I have noted [ORDER_1]."]
    assert counts["left out: figures that no passage holds"] == 1
    assert counts["left out: not to be learned"] == 1


def test_unanswerable_questions_lose_their_passage_and_are_refused() -> None:
    found, counts = _grounded(1.0)
    assert counts["refusal"] == 1
    refused = next(c for c in found if c.kind == "refusal")
    assert refused.messages[-1].content in REFUSALS["en"]
    prompt = refused.messages[-2].content
    assert "¥8" not in prompt
    assert "The lamp" in prompt
    assert "open daily" in prompt


# --- CUDA, where there is none: what is set before a step ------------------------------------------------------------


class TestDevice:
    @pytest.fixture
    def one_gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        yield
        torch.backends.cuda.enable_cudnn_sdp(before)

    def test_on_a_gpu_cudnns_attention_is_off(self, one_gpu: None) -> None:
        # On an H100 it made the loss NaN at step 22 of the default release's run (docs/experiments.md).
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert device_of(RunConfig(data=Path("d"))) == "cuda:0"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()

    def test_more_processes_than_gpus_are_refused(self, one_gpu: None) -> None:
        with pytest.raises(MerchantError, match="2 or more asked for, and 1 here"):
            device_of(RunConfig(data=Path("d")), local_rank=1)

    def test_cuda_that_is_not_there_is_refused_and_auto_takes_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(MerchantError, match="cuda is not available"):
            device_of(RunConfig(data=Path("d"), device="cuda"))
        assert device_of(RunConfig(data=Path("d"))) == "cpu"
