"""`bot.merging`: what numpy adds to a base model is what peft would have added, or it is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bot.errors import MerchantError
from bot.merging import merge_adapter, rank_of, weight_shapes

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.finetune.tiny import build_model  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers in bfloat16, as bases are served."""
    folder = build_model(tmp_path_factory.mktemp("merging") / "base")
    weights = {name: w.to(torch.bfloat16) for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapter_of(base: Path, folder: Path, dtype: Any = None, **options: Any) -> Path:
    """Save a random LoRA of `base` as peft does."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chosen = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    adapted.to(dtype or torch.float32).save_pretrained(str(folder))
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    """In float32, rounded to bfloat16 once: as `finetune.modeling.merge` publishes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: w.to(torch.bfloat16) for name, w in merged.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 12},
            "alpha_pattern": {"v_proj": 40},
        },
        {"target_modules": ["q_proj", "down_proj"], "dtype": "bfloat16"},
    ],
    ids=["plain", "rank-stabilised", "patterns", "two modules, in bfloat16"],
)
def test_it_adds_what_peft_adds(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if options.get("dtype") else None
    adapter = adapter_of(base, tmp_path / "adapter", dtype, **{k: v for k, v in options.items() if k != "dtype"})
    of_base, of_result = merge_adapter(base, adapter, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    theirs = merged_by_peft(base, adapter)
    n_changed = 0
    assert ours.keys() == before.keys()
    for name, weight in ours.items():
        assert weight.dtype == torch.bfloat16
        # The order of a sum may move a value over the border between two neighbours, and no further.
        apart = (weight.view(torch.int16).int() - theirs[name].view(torch.int16).int()).abs()
        assert apart.max() <= 1, name
        assert (apart > 0).float().mean() < 0.01, name
        n_changed += not torch.equal(weight, before[name])
    assert n_changed == (4 if options.get("dtype") else 14)
    assert of_base == hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert of_result == hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert rank_of(adapter) == max([8, *options.get("rank_pattern", {}).values()])


def test_a_base_in_float32_and_in_several_files_stays_so(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(tmp_path / "split", max_shard_size="50KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    adapter = adapter_of(base, tmp_path / "adapter")
    merge_adapter(tmp_path / "split", adapter, tmp_path / "out")
    assert weight_shapes(tmp_path / "out") == weight_shapes(tmp_path / "split")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    whole = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6)


def _config(**changed: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def _weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def changed(adapter: Path) -> None:
        save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")

    return changed


def _cut(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another method": (_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (_config(use_dora=True), "use_dora: True does not merge exactly"),
    "saved modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (_config(init_lora_weights="pissa"), "init_lora_weights: 'pissa'"),
    "biases": (_config(bias="all"), "bias: 'all'"),
    "rank": (_config(r=4), "has not rank 4"),
    "cut short": (_cut, "not readable as safetensors"),
    "no such layer": (
        _weights(lambda w: {k.replace("layers.1", "layers.7"): v for k, v in w.items()}),
        "does not have: another base",
    ),
    "shape": (
        _weights(lambda w: {k: v[:, :-1].contiguous() if ".lora_A" in k else v for k, v in w.items()}),
        "another base",
    ),
    "no B": (_weights(lambda w: {k: v for k, v in w.items() if ".lora_B" not in k}), "beside it"),
    "embedding": (
        _weights(lambda w: {k.replace("lora_A", "lora_embedding_A"): v for k, v in w.items()}),
        "no part of a plain LoRA",
    ),
}


@pytest.mark.parametrize(("spoil", "says"), SPOILED.values(), ids=SPOILED)
def test_what_does_not_merge_exactly_is_refused(
    base: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    spoil(adapter)
    with pytest.raises(MerchantError, match=says):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stamp_and_pickles_of_the_base_are_not_copied(base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    (own / "zhanggui.json").write_text("{}")
    (own / "old.bin").write_bytes(b"x")
    merge_adapter(own, adapter_of(base, tmp_path / "adapter"), tmp_path / "out")
    assert not {"zhanggui.json", "old.bin"} & {path.name for path in (tmp_path / "out").iterdir()}
